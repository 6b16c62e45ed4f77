"""Files of entries as private copies of this process: what is loaded is what was checked.

A loader takes a path and reads it later. Between the check of a stored file and that reading somebody else could
replace it; so loaders get a copy, written from the very bytes that were checked, in a directory that only this user
can enter and that goes with the process. Entries with the same files share one copy.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from .records import BlobRef

_lock = threading.Lock()
_directory: tempfile.TemporaryDirectory[str] | None = None
_owner = 0  # process that made it: a forked child makes its own


def private_copy(files: Mapping[str, BlobRef], read: Callable[[str], bytes]) -> Path:
    """Return a directory that holds these files, written once per process.

    Args:
        files: relative POSIX name -> what it holds.
        read: gives the checked bytes of a name.

    Raises:
        OSError: if the system's temporary directory cannot take them.
    """
    names = "\n".join(f"{name} {ref.sha256}" for name, ref in sorted(files.items()))
    with _lock:
        place = _base() / hashlib.sha256(names.encode()).hexdigest()[:32]
        if not place.exists():
            with tempfile.TemporaryDirectory(dir=_base()) as partial:
                for name in files:
                    path = Path(partial, "files", *name.split("/"))
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(read(name))
                os.rename(Path(partial, "files"), place)
        return place


def _base() -> Path:
    global _directory, _owner  # one per process, for all caches
    if _directory is None or _owner != os.getpid():
        if _directory is not None:
            _directory._finalizer.detach()  # type: ignore[attr-defined]  # the parent's: not ours to remove
        _directory, _owner = tempfile.TemporaryDirectory(prefix="compile-cache-"), os.getpid()
    return Path(_directory.name)
