"""Who uses an entry: shared locks of the kernel on record files, and the lock between publishing and removing.

A lock of the kernel ends with the process that holds it, however that ends: nothing here can become stale. Where a file
system has no flock, an entry cannot be held: a removal there relies on the age of the last use alone.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep
from typing import Final

_BUSY: Final = (errno.EAGAIN, errno.EACCES)
_WITHOUT_FLOCK: Final = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.EBADF)
_PATIENCE: Final = 0.25  # seconds that a reader gives a removal to decide; it needs microseconds

_own: set[int] = set()  # descriptors of locks that end with a block of this process; a forked child closes its copies


def _close_copies() -> None:
    for descriptor in _own:
        with suppress(OSError):
            os.close(descriptor)
    _own.clear()


os.register_at_fork(after_in_child=_close_copies)


class Lease:
    """A file that is held open under a shared lock as long as this object lives. A copy, or a pickle, holds nothing."""

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

    def __reduce__(self) -> tuple[type[Lease], tuple[int]]:
        return Lease, (-1,)  # a second object would close the descriptor once more: by then it may be another file's


def open_leased(path: Path, limit: int) -> tuple[Lease, bytes, os.stat_result] | None:
    """Open a file, hold it under a shared lock, and read at most ``limit`` bytes of it.

    Returns:
        The lease, the bytes and the status of that very file; None if it is not there, or is being removed.

    Raises:
        OSError: if it cannot be read.
    """
    end = monotonic() + _PATIENCE
    while True:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (FileNotFoundError, NotADirectoryError):
            return None
        lease = Lease(descriptor)
        if not _try_lock(descriptor, fcntl.LOCK_SH):  # gone in a moment, or only asked whether it is in use
            if monotonic() > end:
                return None
            sleep(0.001)
            continue
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        if status.st_nlink == 0:  # replaced or removed between opening and locking
            if monotonic() > end:
                raise OSError(errno.EBUSY, "another file each time", str(path))
            continue
        with open(descriptor, "rb", closefd=False) as file:
            return lease, file.read(limit), status


@contextmanager
def held_alone(path: Path) -> Iterator[bool]:
    """Hold a file against every new lease; gives False, at once, if somebody uses it or it is not there."""
    with ExitStack() as stack:
        try:
            descriptor = stack.enter_context(_opened_to_hold(path))
        except OSError:
            yield False
            return
        yield _try_lock(descriptor, fcntl.LOCK_EX) and os.fstat(descriptor).st_nlink > 0


def _opened_to_hold(path: Path) -> AbstractContextManager[int]:
    """NFS holds a file alone for those only who may write it; a directory, or a file of others, is opened to read."""
    writable = not path.is_dir() and os.access(path, os.W_OK)
    return _opened(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_NOFOLLOW | os.O_NONBLOCK)


@contextmanager
def locked(path: Path, *, shared: bool) -> Iterator[None]:
    """Hold a lock file, waiting for it: any number of shared holders, or one alone."""
    with _opened(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW) as descriptor:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _WITHOUT_FLOCK:
                raise
        yield


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    """Open a file for a lock that ends with the block, also where a child was forked meanwhile and lives on.

    Such a child has a copy of the descriptor, so that closing alone would leave the lock with it.
    """
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
    _own.add(descriptor)
    try:
        yield descriptor
    finally:
        if descriptor in _own:  # not in a child that was forked in the block
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            _own.discard(descriptor)
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
