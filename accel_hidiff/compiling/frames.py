"""What `pool` and `worker` agree on: frames from the parent to a compiling process, and its priority."""

from __future__ import annotations

import pickle
import struct
from typing import IO, Any, Final

HEADER: Final = struct.Struct("!Q")  # length of a frame
LOWEST_PRIORITY: Final = 19  # niceness


def write_frame(stream: IO[bytes], kind: str, value: Any) -> None:
    """Sends a frame: a kind and a pickled value."""
    data = pickle.dumps((kind, value), protocol=pickle.HIGHEST_PROTOCOL)
    stream.write(HEADER.pack(len(data)) + data)
    stream.flush()
