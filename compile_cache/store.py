"""The directory of a cache: where things lie, how they are written, and how they are read back with every byte checked.

    <location>/CACHEDIR.TAG                     tells backup tools to skip the directory
    <location>/v1/actions/ab/<key digest>.json  one record per key
    <location>/v1/blobs/ab/<sha256>             one file per distinct content
    <location>/v1/tmp/                          unfinished work; anything here may be deleted when nothing builds
    <location>/v1/locks/<key digest>.lock       one lock file per key, empty, never removed (removal would race)
    <location>/v1/locks/store                   held by all who publish together, or by one who removes
    <location>/v1/locks/records                 held by one of them, while its record takes the place of another
    <location>/v1/used/ab/<key digest>          a byte per use; its modification time is the last one
    <location>/v1/pins/<key digest>             the entry is kept whatever the limits say
    <location>/v1/held/<key digest>.<name>      a record that was replaced while some process held its entry
    <location>/v1/damaged/                      what was found damaged, for a person to look at

Everything is written under a unique name in ``tmp``, flushed to the disk, and renamed into place: blobs first, the
record last; removed is the record first, its blobs after it. All paths are relative to the location, so a copied cache
works.
"""

from __future__ import annotations

import errno
import os
import stat
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Final

from .errors import CacheWriteError, one_line
from .files import (
    Identity,
    again_if_stale,
    hash_file,
    identity_of,
    read_at_most,
    remove,
    rename,
    sync_directory,
    write_synced,
)
from .leases import Lease, held_alone, locked, open_leased
from .records import (
    MAX_RECORD,
    BadRecord,
    BlobRef,
    ForeignRecord,
    Record,
    decode_record,
    encode_record,
    is_sha256,
    skim_record,
)
from .usage import Usage

TAG: Final = (
    "Signature: 8a477f597d28d172789f06886806bc55\n"
    "# This directory is a compile cache. It can be deleted; what it held is then compiled again.\n"
)
JUNK_AGE: Final = 24 * 3600.0  # seconds after which unfinished work in tmp is taken for dead


class Damage(Exception):
    """A stored file is not what was written.

    Args:
        path: the file.
        reason: what is wrong with it, without the path.
        identity: of the file that was looked at; None if it must stay where it is (it is missing, or could not be
            read for a reason that says nothing about its bytes).
        foreign: it is whole, and of a format that another version writes.
        unreadable: nothing is known of its bytes now (no permission, too many open files): what needs it stays.
    """

    def __init__(
        self,
        path: Path,
        reason: str,
        identity: Identity | None = None,
        *,
        foreign: bool = False,
        unreadable: bool = False,
    ) -> None:
        super().__init__(reason)
        self.path, self.reason, self.identity = path, reason, identity
        self.foreign, self.unreadable = foreign, unreadable


class BlobStore:
    """Records and blobs below one location. Holds no state but the paths, so threads may share it.

    Args:
        location: absolute path of the cache; nothing is created until something is written.
    """

    def __init__(self, location: Path) -> None:
        self.location = location
        self.root = location / "v1"
        self.actions, self.blobs = self.root / "actions", self.root / "blobs"
        self.tmp, self.locks, self.damaged = self.root / "tmp", self.root / "locks", self.root / "damaged"
        self.held = self.root / "held"
        self.usage = Usage(self.root)

    def record_path(self, digest: str) -> Path:
        """Where the record of a key lies."""
        return self.actions / digest[:2] / f"{digest}.json"

    def blob_path(self, sha256: str) -> Path:
        """Where the bytes with that SHA-256 lie."""
        return self.blobs / sha256[:2] / sha256

    def digests(self) -> Iterator[str]:
        """Yield the digest of every record file, sorted; the records are not read."""
        for shard in _names(self.actions):
            for name in _names(self.actions / shard):
                digest = name.removesuffix(".json")
                if name.endswith(".json") and is_sha256(digest) and digest[:2] == shard:
                    yield digest

    # ---- reading -------------------------------------------------------------------------------------------------

    def read_record(self, digest: str) -> tuple[Record, Identity, Lease] | None:
        """Return the checked record of a key, or None if there is none.

        While the lease lives, no process removes the entry.

        Raises:
            Damage: if the file is there and is not a record that this version reads.
        """
        path = self.record_path(digest)

        def read() -> tuple[Lease, bytes, os.stat_result] | None:
            _regular(path)
            return open_leased(path, MAX_RECORD + 1)

        try:
            found = again_if_stale(read)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise Damage(path, f"it cannot be read ({one_line(error.strerror)})", unreadable=True) from error
        if found is None:
            return None
        lease, data, status = found
        try:
            return decode_record(data, digest), identity_of(status), lease
        except ForeignRecord as error:  # whole: another version of this package serves it
            raise Damage(path, str(error), foreign=True) from error
        except BadRecord as error:
            raise Damage(path, str(error), identity_of(status)) from error

    def skim_record(self, path: Path) -> Record | None:
        """Return what a record file says, unchecked; None if it is not there, or says nothing.

        Raises:
            ForeignRecord: if it is of a later format.
            OSError: if it cannot be read.
        """
        try:
            return skim_record(path.read_bytes(), path.stem)
        except FileNotFoundError:
            return None
        except ForeignRecord:
            raise
        except BadRecord:
            return None

    def check_blob(self, ref: BlobRef, *, contents: bool = True) -> None:
        """Check that the blob of ``ref`` is there with the right size and, with ``contents``, the right bytes.

        Raises:
            Damage: if it is not.
        """
        path = self.blob_path(ref.sha256)
        try:
            identity = again_if_stale(lambda: _regular(path))
            if identity[3] != ref.size:
                raise Damage(path, f"{identity[3]} bytes in place of {ref.size}", identity)
            if contents:
                found, identity = again_if_stale(lambda: hash_file(path))
                if found != ref:
                    raise Damage(path, "other bytes than its SHA-256 says", identity)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise Damage(path, "a missing file") from error
        except OSError as error:
            reason = f"a file that cannot be read ({one_line(error.strerror)})"
            raise Damage(path, reason, unreadable=True) from error

    # ---- writing -------------------------------------------------------------------------------------------------

    @contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """Turn an :class:`OSError` in the block into a one-line :class:`CacheWriteError`."""
        try:
            yield
        except OSError as error:
            raise self.write_error(what, error) from error

    def write_error(self, what: str, error: OSError) -> CacheWriteError:
        """Return the error to raise when ``what`` could not be written because of ``error``."""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            advice = "free space there or use another location; what was stored before is untouched"
        elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            advice = "make it writable, use another location, or open the cache with read_only=True"
        else:
            advice = "check the directory, or use another location"
        got = one_line(error.strerror or error)
        return CacheWriteError(f"expected to write {what} below {self.location}, got {got}; {advice}")

    def prepare(self, *, sweep: bool) -> None:
        """Create the directories and the tag if they are not there; with ``sweep``, clear dead work out of ``tmp``.

        A location that is created is its owner's alone (mode 0700); one that is there keeps its mode.
        """
        self.location.parent.mkdir(parents=True, exist_ok=True)
        self.location.mkdir(mode=0o700, exist_ok=True)
        for directory in (self.root, self.actions, self.blobs, self.tmp, self.locks, self.damaged):
            directory.mkdir(exist_ok=True)
            if directory.is_symlink():  # a sweep, or a repair, would work on the files of somebody else
                raise OSError(errno.ELOOP, f"the symbolic link {directory.name}")
        tag = self.location / "CACHEDIR.TAG"
        if not tag.exists():
            temporary = self.new_temporary("tag")
            try:
                write_synced(temporary, TAG.encode("ascii"))
                rename(temporary, tag)
            finally:
                remove(temporary)
        if sweep:
            self.sweep()

    def sweep(self, age: float = JUNK_AGE) -> None:
        """Remove what lies in ``tmp``, was not touched for ``age`` seconds, and that nobody works in.

        A clock that jumps makes files look old: a builder holds its directory, whatever the time. Replaced records go
        too, once nobody holds them.
        """
        if self.held.is_dir():
            with self._replacing():
                self._drop_replaced("*")
        limit = time.time() - age
        for path in self.tmp.iterdir():
            with suppress(OSError):  # another process sweeps too, or the file is not ours: the next sweep gets it
                if max(item.lstat().st_mtime for item in (path, *path.rglob("*"))) < limit:
                    with held_alone(path) as dead:
                        if dead:
                            remove(path)

    def clear_after(self, pid: int) -> None:
        """Remove what a process of this machine left in ``tmp`` when it ended; what somebody works in stays."""
        for path in self.tmp.glob(f"*-{pid}-*"):
            with held_alone(path) as dead:
                if dead:
                    remove(path)

    def new_temporary(self, kind: str) -> Path:
        """Return a path in ``tmp`` that no other thread or process uses."""
        return self.tmp / f"{kind}-{os.getpid()}-{uuid.uuid4().hex}"

    def publishing(self) -> AbstractContextManager[None]:
        """Held around every publication, with the checks that it relies on: nothing is removed meanwhile."""
        return locked(self.locks / "store", shared=True)

    def removing(self) -> AbstractContextManager[None]:
        """Held around every removal: nothing is published meanwhile."""
        return locked(self.locks / "store", shared=False)

    def _replacing(self) -> AbstractContextManager[None]:
        """Held by one of those that publish, while its record takes the place of another."""
        return locked(self.locks / "records", shared=False)

    def publish(self, record: Record, built: Mapping[str, Path]) -> None:
        """Store a record and the built files that it names, so that a reader sees all of it or nothing.

        Called under :meth:`publishing`.

        The record is written (in ``tmp``) before the first rename: a full disk is met while nothing is in place yet.

        Args:
            record: what to store; an existing record of the same key is replaced, unless it is this very one: several
                that import or fetch it at once do not take it from each other's readers.
            built: file name -> path in ``tmp``, already flushed to the disk; the files are moved away. Names that are
                not in it must be stored already.

        Raises:
            OSError: if something cannot be written; then no record was stored.
        """
        temporary, target = self.new_temporary("record"), self.record_path(record.digest)
        text = encode_record(record)
        try:
            mode = write_synced(temporary, text)
            moves = [(path, self.blob_path(record.files[name].sha256)) for name, path in built.items()]
            for path, place in (*moves, (temporary, target)):
                self._clear_way(place)
                os.chmod(path, mode)  # compilers leave private files; a cache may be read by another user
            for path, place in moves:
                rename(path, place)
            for directory in {place.parent for _, place in moves}:
                sync_directory(directory)
            self.usage.freshen(record.digest)
            with self._replacing():
                if _is_file_of(target, text):
                    with suppress(OSError):  # the file of another user
                        os.utime(target)  # its age starts again
                else:
                    with self._kept_for_holders(target):
                        rename(temporary, target)
            sync_directory(target.parent)
        finally:
            remove(temporary)

    @contextmanager
    def _kept_for_holders(self, path: Path) -> Iterator[None]:
        """Around the replacement of a record: the old one stays in ``held`` as long as somebody holds its entry.

        Called under :meth:`_replacing`. Of two at once, one would replace the record of the other without a link to it,
        so that nobody saw who holds that; and each would take the other's look at the old one for a holder.
        """
        kept = self.held / f"{path.stem}.{uuid.uuid4().hex[:12]}"
        with suppress(OSError):  # no old one, or a file system without hard links
            if path.exists():
                self.held.mkdir(exist_ok=True)
                os.link(path, kept)
        try:
            yield
        finally:
            self._drop_replaced(path.stem)

    def _drop_replaced(self, digest: str) -> None:
        """Remove the replaced records of a key that nobody holds now; ``*``: of all keys. Under :meth:`_replacing`."""
        if self.held.is_symlink():
            return
        for path in self.held.glob(f"{digest}.*"):
            with held_alone(path) as free:
                if free:
                    remove(path)

    def _clear_way(self, place: Path) -> None:
        if place.parent.exists() and not place.parent.is_dir():
            self.set_aside(place.parent)
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.is_dir():
            self.set_aside(place)

    def set_aside(self, path: Path, identity: Identity | None = None) -> bool:
        """Move a damaged file or directory into ``damaged``; with ``identity``, only if it is still that one.

        Returns:
            False if it stays where it is, because it was replaced in the meantime or cannot be moved.
        """
        try:
            if identity is not None and identity_of(os.stat(path)) != identity:
                return False
            self.damaged.mkdir(parents=True, exist_ok=True)
            rename(path, self.damaged / f"{path.name}.{uuid.uuid4().hex[:12]}")
        except OSError:
            return False
        return True


def _names(directory: Path) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _is_file_of(path: Path, data: bytes) -> bool:
    """Whether a regular file with these bytes lies there."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode) and read_at_most(path, len(data)) == (len(data), data)
    except OSError:
        return False


def _regular(path: Path) -> Identity:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise Damage(path, "something that is not a regular file", identity_of(status))
    return identity_of(status)
