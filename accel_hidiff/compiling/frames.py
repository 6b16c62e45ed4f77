"""What a process and the child that it feeds agree on: frames go to the child, JSON lines come back.

`child.Child` is the parent's end; the child has an `Inbox`, and answers on the stream that `answers` gives it.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import struct
import threading
from contextlib import suppress
from typing import IO, Any, Final

LOWEST_PRIORITY: Final = 19  # niceness
_HEADER: Final = struct.Struct("!Q")  # length of a frame
_PARENT_CHECK: Final = 1.0  # seconds


def write_frame(stream: IO[bytes], kind: str, value: Any) -> None:
    """Sends a frame: a kind and a pickled value."""
    data = pickle.dumps((kind, value), protocol=pickle.HIGHEST_PROTOCOL)
    stream.write(_HEADER.pack(len(data)) + data)
    stream.flush()


def answers() -> IO[str]:
    """In a child, once, at its start: the stream for its JSON lines.

    What anything else prints on the standard output goes to the standard error from here on. An interrupt from the
    terminal is ignored: the parent decides.
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return out


class Inbox:
    """Frames from the parent, read by a thread of its own: it notices when the parent is gone, whatever runs here.

    The process ends then, with every process of its group.

    Args:
        descriptor: of the pipe that they come through.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._parent = os.getppid()
        self._frames: list[bytes] = []
        self._ready = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def next(self) -> tuple[str, Any]:
        """The next frame. Unpickled here: it imports torch, and the thread that reads has to go on watching."""
        with self._ready:
            while not self._frames:
                self._ready.wait()
            frame = self._frames.pop(0)
        kind, value = pickle.loads(frame)
        return kind, value

    def _read(self) -> None:
        try:
            while True:
                (length,) = _HEADER.unpack(self._exactly(_HEADER.size))
                frame = self._exactly(length)
                with self._ready:
                    self._frames.append(frame)
                    self._ready.notify()
        except EOFError:
            _end()

    def _exactly(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            # The end of the pipe tells that the parent is gone, unless a child that it forked holds the other end.
            while not select.select([self._descriptor], [], [], _PARENT_CHECK)[0]:
                if os.getppid() != self._parent:
                    raise EOFError
            chunk = os.read(self._descriptor, min(count - len(data), 1 << 20))
            if not chunk:
                raise EOFError
            data += chunk
        return bytes(data)


def _end() -> None:
    """Ends this process and every compiler that it started."""
    with suppress(OSError):
        os.killpg(0, signal.SIGKILL)
    os._exit(1)
