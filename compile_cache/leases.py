"""Who uses an entry: shared locks of the kernel on record files, and the lock between publishing and removing.

A lock of the kernel ends with the process that holds it, however that ends: nothing here can become stale. Where a file
system has no flock, an entry cannot be held: a removal there relies on the age of the last use alone.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_BUSY: Final = (errno.EAGAIN, errno.EACCES)
_WITHOUT_FLOCK: Final = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)


class Lease:
    """A file that is held open under a shared lock as long as this object lives."""

    __slots__ = ("__weakref__", "_descriptor")

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def release(self) -> None:
        """Give the file free; again is fine."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __del__(self) -> None:
        self.release()


def open_leased(path: Path) -> tuple[Lease, bytes, os.stat_result] | None:
    """Open a file, hold it under a shared lock, and read it.

    Returns:
        The lease, the bytes and the status of that very file; None if it is not there, or is being removed now.

    Raises:
        OSError: if it cannot be read.
    """
    while True:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (FileNotFoundError, NotADirectoryError):
            return None
        lease = Lease(descriptor)
        if not _try_lock(descriptor, fcntl.LOCK_SH):
            return None
        status = os.fstat(descriptor)
        if status.st_nlink == 0:  # replaced or removed between opening and locking
            continue
        with open(descriptor, "rb", closefd=False) as file:
            return lease, file.read(), status


@contextmanager
def held_alone(path: Path) -> Iterator[bool]:
    """Hold a file against every new lease; gives False, at once, if somebody uses it or it is not there."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        yield False
        return
    try:
        yield _try_lock(descriptor, fcntl.LOCK_EX) and os.fstat(descriptor).st_nlink > 0
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path, *, shared: bool) -> Iterator[None]:
    """Hold a lock file, waiting for it: any number of shared holders, or one alone."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _WITHOUT_FLOCK:
                raise
        yield
    finally:
        os.close(descriptor)


@contextmanager
def busy_directory(path: Path) -> Iterator[None]:
    """Mark a directory of unfinished work as alive: :func:`held_alone` on it fails meanwhile."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _try_lock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _BUSY:
            return False
        if error.errno not in _WITHOUT_FLOCK:
            raise
    return True
