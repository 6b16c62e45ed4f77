"""The parent's end of a child process: started with a folder for its files, fed, and ended with all that it started."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Final

from accel_hidiff.compiling.frames import write_frame

_LOG_TAIL: Final = 4000  # bytes


class ChildDied(Exception):
    """The process ended before it answered; the message, one line, tells how."""


class Child:
    """A process `python -m MODULE ARGUMENTS...`, in a process group of its own so that its compilers end with it.

    Args:
        module: it has an `Inbox`, and prints JSON lines on what `answers` gives it.
        arguments: of its command line.
        work: an existing folder for its log and for compilers' files; the caller removes it after `end`.
        environment: more variables.
        python: the executable that runs it, in its own environment; None: this one.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        work: Path,
        environment: Mapping[str, str],
        python: Path | None = None,
    ) -> None:
        self._log = work / "log"
        with self._log.open("wb") as errors:
            self._popen = subprocess.Popen(
                [str(python or sys.executable), "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=import_path(python) | _folders(work) | dict(environment),
                process_group=0,
            )
        self.pid = self._popen.pid
        self.alive = True
        assert self._popen.stdin is not None and self._popen.stdout is not None
        self._in: IO[bytes] = self._popen.stdin
        self._out: IO[bytes] = self._popen.stdout
        self._text = b""

    def send(self, kind: str, value: Any) -> None:
        """Sends a frame.

        Raises:
            ChildDied: nobody reads it.
        """
        try:
            write_frame(self._in, kind, value)
        except OSError:
            raise self._died() from None

    def answer(self, seconds: float) -> dict[str, Any] | None:
        """The next JSON line; None if none came within so many seconds.

        Raises:
            ChildDied: none will come.
        """
        if b"\n" not in self._text and select.select([self._out], [], [], seconds)[0]:
            chunk = os.read(self._out.fileno(), 1 << 16)
            if not chunk:
                raise self._died()
            self._text += chunk
        if b"\n" not in self._text:
            return None
        line, _, self._text = self._text.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def kill(self) -> None:
        """Ends the process and its compilers, now."""
        self.alive = False
        if self._popen.returncode is None:  # once it was waited for, its number may be another one's
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)

    def end(self) -> None:
        """Ends it, and closes the pipes."""
        self.kill()
        with suppress(OSError):
            self._in.close()
        self._popen.wait()
        self._out.close()

    def _died(self) -> ChildDied:
        self.kill()  # what it may have left running
        code = self._popen.wait()
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        last = (self._log.read_bytes()[-_LOG_TAIL:].decode(errors="replace").strip().splitlines() or [""])[-1]
        return ChildDied(f"ended with {how}{': ' + last if last else ''}")


def import_path(python: Path | None = None) -> dict[str, str]:
    """This process's environment for a child, which imports from where this process does.

    Args:
        python: of an environment of its own: from there it imports this project alone.
    """
    entries = sys.path if python is None else [str(Path(__file__).resolve().parent.parent.parent)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(os.path.abspath(entry) for entry in entries)}


def _folders(work: Path) -> dict[str, str]:
    """A place for compilers' files that goes away with the child."""
    places = {"TORCHINDUCTOR_CACHE_DIR": work / "inductor", "TRITON_CACHE_DIR": work / "triton", "TMPDIR": work}
    return {name: str(place) for name, place in places.items()}
