"""Files of entries as private copies of this process: what is loaded is what was checked.

A loader takes a path and reads it later. Between the check of a stored file and that reading somebody else could
replace it; so loaders get a copy, written from the very bytes that were checked, in a directory that only this user
can enter and that goes with the process. Entries with the same files share one copy.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from .keys import canonical_json
from .records import BlobRef

_Identity = tuple[int, int, int, int]
"""Device, inode, owner and mode of a directory."""


class _Own:
    """The directory of this process, one for all caches."""

    lock = threading.Lock()
    directory: Path | None = None
    identity: _Identity = (0, 0, 0, 0)


def private_copy(files: Mapping[str, BlobRef], read: Callable[[str], bytes]) -> Path:
    """Return a directory that holds these files, written once per process.

    Args:
        files: relative POSIX name -> what it holds.
        read: gives the checked bytes of a name.

    Raises:
        OSError: if the system's temporary directory cannot take them.
    """
    names = canonical_json({name: ref.sha256 for name, ref in files.items()})
    with _Own.lock:
        base = _base()
        place = base / hashlib.sha256(names.encode()).hexdigest()
        if not all((place / name).is_file() for name in files):  # new, or a cleaner of temporary files was here
            shutil.rmtree(place, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=base) as partial:
                for name in files:
                    path = Path(partial, "files", *name.split("/"))
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(read(name))
                os.rename(Path(partial, "files"), place)
        return place


def _base() -> Path:
    """The directory of this process; a new one if somebody removed it, and perhaps put another in its place."""
    if _Own.directory is None or _identity_of(_Own.directory) != _Own.identity:
        _Own.directory = Path(tempfile.mkdtemp(prefix="compile-cache-"))  # mode 0700
        _Own.identity = _identity_of(_Own.directory)
        atexit.register(_remove, _Own.directory, _Own.identity, os.getpid())
    return _Own.directory


def _identity_of(path: Path) -> _Identity:
    try:
        status = path.lstat()
    except OSError:
        return 0, 0, 0, 0
    return status.st_dev, status.st_ino, status.st_uid, status.st_mode


def _remove(path: Path, identity: _Identity, owner: int) -> None:
    if os.getpid() == owner and _identity_of(path) == identity:  # a child that was forked leaves it to its parent
        shutil.rmtree(path, ignore_errors=True)


def _forget() -> None:
    """In a child that was forked: the directory is its parent's, and another thread may have held the lock."""
    _Own.lock, _Own.directory = threading.Lock(), None


os.register_at_fork(after_in_child=_forget)
