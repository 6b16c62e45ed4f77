"""Inductor's on-disk cache, pointed at one folder while one graph is compiled, so that what it leaves can be stored."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch._inductor.config

_VARIABLE: Final = "TORCHINDUCTOR_CACHE_DIR"
_lock = threading.RLock()


@contextmanager
def inductor_files(folder: Path) -> Iterator[None]:
    """Inductor reads and writes its files in `folder`, whole graphs too, inside of the block; one thread at a time.

    The environment variable that says so is the whole process's: a `torch.compile` in another thread uses it meanwhile.
    """
    with _lock:
        before = os.environ.get(_VARIABLE)
        os.environ[_VARIABLE] = str(folder)
        try:
            with torch._inductor.config.patch(fx_graph_cache=True):
                yield
        finally:
            if before is None:
                del os.environ[_VARIABLE]
            else:
                os.environ[_VARIABLE] = before
            shutil.rmtree(folder / "locks", ignore_errors=True)


def libraries(folder: Path) -> frozenset[Path]:
    """The native code in such a folder: it grows when something is compiled."""
    return frozenset(path for path in folder.rglob("*") if path.suffix in (".so", ".cubin"))
