"""Files on a disk: hashing, flushing, and removal."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Callable
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import Final, TypeVar

from .records import BlobRef

_CHUNK: Final = 1 << 20  # bytes
_T = TypeVar("_T")

Identity = tuple[int, int, int, int]
"""Device, inode, modification time (ns) and size of a file, to see whether it was replaced after it was read."""


def identity_of(status: os.stat_result) -> Identity:
    """Return the :data:`Identity` of a file."""
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


def open_regular(path: Path) -> BufferedReader:
    """Open a file to read it.

    Raises:
        OSError: if it cannot be read, or is a pipe or a device: these are never waited for.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_at_most(path: Path, limit: int) -> tuple[int, bytes]:
    """The size of a file, and its bytes if they are not more than ``limit``.

    Raises:
        OSError: as :func:`open_regular`.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        return size, file.read(limit) if size <= limit else b""


def hash_file(path: Path, *, sync: bool = False) -> tuple[BlobRef, Identity]:
    """Return the SHA-256 and size of a file as read now; with ``sync``, flush it to the disk as well.

    Raises:
        OSError: if it cannot be read or flushed.
    """
    digest, size = hashlib.sha256(), 0
    with open_regular(path) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
        if sync:
            os.fsync(file.fileno())
        identity = identity_of(os.fstat(file.fileno()))
    return BlobRef(digest.hexdigest(), size), identity


def write_synced(path: Path, data: bytes) -> int:
    """Create ``path`` with ``data``, flush it to the disk, and return its permission bits (from the umask)."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return stat.S_IMODE(os.fstat(file.fileno()).st_mode)


def sync_directory(path: Path) -> None:
    """Flush the names in a directory to the disk, where the system can do that."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems without it
            raise
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    """``os.replace``, also where a server carries it out, loses the answer, and tells the second try of "no such file".

    Raises:
        OSError: if the target is not that file now.
    """
    status = os.lstat(source)
    try:
        os.replace(source, target)
    except FileNotFoundError:
        moved = os.lstat(target)
        if (moved.st_dev, moved.st_ino) != (status.st_dev, status.st_ino) or os.path.lexists(source):
            raise


def again_if_stale(read: Callable[[], _T]) -> _T:
    """Read once more where a network file system says that the file was replaced under its handle (ESTALE)."""
    try:
        return read()
    except OSError as error:
        if error.errno != errno.ESTALE:
            raise
    return read()


def remove(path: Path) -> None:
    """Remove a temporary file or directory; what cannot be removed now is swept later."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)
