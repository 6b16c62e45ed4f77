"""The sources that decide what is in a graph: their digest is in every key, whatever the version says."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Final

import accel_hidiff

_GRAPH_SOURCES: Final = (
    "regions/base.py",
    "regions/blocks.py",
    "regions/ends.py",
    "regions/samplers.py",
    "regions/step.py",
    "regions/whole.py",
    "cfgpp/maths.py",
    "windows.py",
    "forwards.py",
    "call.py",
)


@lru_cache(maxsize=8)
def source_digest(*own: str) -> str:
    """SHA-256, 64 hex digits, over the graphs' sources and a backend's own ("backends/aot.py")."""
    here = Path(accel_hidiff.__file__).parent
    return hashlib.sha256(b"".join((here / name).read_bytes() for name in (*_GRAPH_SOURCES, *own))).hexdigest()
