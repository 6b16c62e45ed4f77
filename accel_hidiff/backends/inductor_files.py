"""Inductor's on-disk cache, pointed at one folder while one graph is compiled, so that what it leaves can be stored."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
import torch._inductor.codecache
import torch._inductor.config
from torch._inductor.utils import clear_inductor_caches

_VARIABLES: Final = {"TORCHINDUCTOR_CACHE_DIR": ".", "TRITON_CACHE_DIR": "triton"}  # by the place in the folder
_lock = threading.RLock()


def _named(name: str) -> Any:
    return getattr(torch, name)


def _by_name(value: Any) -> tuple[Any, tuple[str]]:
    return _named, (str(value).removeprefix("torch."),)


def _make_keys_stable() -> None:
    """Inductor names a graph by a hash of pickles, in which a dtype or memory format is an attribute of whatever module
    is found to have it first (`app.torch.contiguous_format`, where `app` was imported before torch): the same graph had
    other names in other programs. From here on these are pickled as attributes of torch. (Of torch 2.4, which nexfort
    is built for: a later torch has a table for each pickler.)"""
    table = getattr(getattr(torch._inductor.codecache, "FxGraphCachePickler", None), "dispatch_table", None)
    if isinstance(table, dict):
        table[torch.memory_format] = table[torch.dtype] = _by_name


_make_keys_stable()


@contextmanager
def inductor_files(folder: Path) -> Iterator[None]:
    """Inductor reads and writes its files in `folder`, whole graphs too, inside of the block; one thread at a time.

    The environment variables that say so are the whole process's: a `torch.compile` in another thread follows them
    meanwhile.
    """
    with _lock:
        before = {name: os.environ.get(name) for name in _VARIABLES}
        os.environ |= {name: str(folder / place) for name, place in _VARIABLES.items()}
        clear_inductor_caches()  # what it remembers of another folder, such as where a header lies
        try:
            with torch._inductor.config.patch(fx_graph_cache=True):
                yield
        finally:
            for name, value in before.items():
                del os.environ[name]
                if value is not None:
                    os.environ[name] = value
            clear_inductor_caches()
            shutil.rmtree(folder / "locks", ignore_errors=True)


def libraries(folder: Path) -> frozenset[Path]:
    """The native code in such a folder: it grows when something is compiled."""
    return frozenset(path for path in folder.rglob("*") if path.suffix in (".so", ".cubin"))
