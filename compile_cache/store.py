"""The directory of a cache: where things lie, how they are written, and how they are read back with every byte checked.

    <location>/CACHEDIR.TAG                     tells backup tools to skip the directory
    <location>/v1/actions/ab/<key digest>.json  one record per key
    <location>/v1/blobs/ab/<sha256>             one file per distinct content
    <location>/v1/tmp/                          unfinished work; anything here may be deleted when nothing builds
    <location>/v1/locks/<key digest>.lock       one lock file per key, empty, never removed (removal would race)
    <location>/v1/damaged/                      what was found damaged, for a person to look at

Everything is written under a unique name in ``tmp``, flushed to the disk, and renamed into place: blobs first, the
record last. All paths are relative to the location, so a copied cache works.
"""

from __future__ import annotations

import errno
import os
import stat
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from .errors import CacheWriteError, one_line
from .files import Identity, hash_file, identity_of, remove, sync_directory, write_synced
from .records import BadRecord, BlobRef, Record, decode_record, encode_record, is_sha256

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
    """

    def __init__(self, path: Path, reason: str, identity: Identity | None = None) -> None:
        super().__init__(reason)
        self.path, self.reason, self.identity = path, reason, identity


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

    def record_path(self, digest: str) -> Path:
        """Where the record of a key lies."""
        return self.actions / digest[:2] / f"{digest}.json"

    def blob_path(self, sha256: str) -> Path:
        """Where the bytes with that SHA-256 lie."""
        return self.blobs / sha256[:2] / sha256

    def digests(self) -> Iterator[str]:
        """Yield the digest of every record file, sorted; the records are not read."""
        for path in sorted(self.actions.glob("??/*.json")):
            if is_sha256(path.stem) and path.parent.name == path.stem[:2]:
                yield path.stem

    # ---- reading -------------------------------------------------------------------------------------------------

    def read_record(self, digest: str) -> tuple[Record, Identity] | None:
        """Return the checked record of a key, or None if there is none.

        Raises:
            Damage: if the file is there and is not the record that was written.
        """
        path = self.record_path(digest)
        try:
            identity = _regular(path)
            with open(path, "rb") as file:
                data = file.read()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise Damage(path, f"it cannot be read ({one_line(error.strerror)})") from error
        try:
            return decode_record(data, digest), identity
        except BadRecord as error:
            raise Damage(path, str(error), identity) from error

    def check_blob(self, ref: BlobRef, *, contents: bool = True) -> None:
        """Check that the blob of ``ref`` is there with the right size and, with ``contents``, the right bytes.

        Raises:
            Damage: if it is not.
        """
        path = self.blob_path(ref.sha256)
        try:
            identity = _regular(path)
            if identity[3] != ref.size:
                raise Damage(path, f"{identity[3]} bytes in place of {ref.size}", identity)
            if contents:
                found, identity = hash_file(path)
                if found != ref:
                    raise Damage(path, "other bytes than its SHA-256 says", identity)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise Damage(path, "a missing file") from error
        except OSError as error:
            raise Damage(path, f"a file that cannot be read ({one_line(error.strerror)})") from error

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
        """Create the directories and the tag if they are not there; with ``sweep``, clear dead work out of ``tmp``."""
        for directory in (self.actions, self.blobs, self.tmp, self.locks, self.damaged):
            directory.mkdir(parents=True, exist_ok=True)
        tag = self.location / "CACHEDIR.TAG"
        if not tag.exists():
            temporary = self.new_temporary("tag")
            try:
                write_synced(temporary, TAG.encode("ascii"))
                os.replace(temporary, tag)
            finally:
                remove(temporary)
        if sweep:
            self.sweep()

    def sweep(self, age: float = JUNK_AGE) -> None:
        """Remove what lies in ``tmp`` and was not touched for ``age`` seconds."""
        limit = time.time() - age
        for path in self.tmp.iterdir():
            with suppress(OSError):  # another process sweeps too, or the file is not ours: the next sweep gets it
                if max(item.lstat().st_mtime for item in (path, *path.rglob("*"))) < limit:
                    remove(path)

    def new_temporary(self, kind: str) -> Path:
        """Return a path in ``tmp`` that no other thread or process uses."""
        return self.tmp / f"{kind}-{os.getpid()}-{uuid.uuid4().hex}"

    def publish(self, record: Record, built: Mapping[str, Path]) -> None:
        """Store a record and the built files that it names, so that a reader sees all of it or nothing.

        The record is written (in ``tmp``) before the first rename: a full disk is met while nothing is in place yet.

        Args:
            record: what to store; an existing record of the same key is replaced.
            built: file name -> path in ``tmp``, already flushed to the disk; the files are moved away. Names that are
                not in it must be stored already.

        Raises:
            OSError: if something cannot be written; then no record was stored.
        """
        temporary, target = self.new_temporary("record"), self.record_path(record.digest)
        try:
            mode = write_synced(temporary, encode_record(record))
            moves = [(path, self.blob_path(record.files[name].sha256)) for name, path in built.items()]
            for path, place in (*moves, (temporary, target)):
                self._clear_way(place)
                os.chmod(path, mode)  # compilers leave private files; a cache may be read by another user
            for path, place in moves:
                os.replace(path, place)
            for directory in {place.parent for _, place in moves}:
                sync_directory(directory)
            os.replace(temporary, target)
            sync_directory(target.parent)
        finally:
            remove(temporary)

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
            os.replace(path, self.damaged / f"{path.name}.{uuid.uuid4().hex[:12]}")
        except OSError:
            return False
        return True


def _regular(path: Path) -> Identity:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise Damage(path, "something that is not a regular file", identity_of(status))
    return identity_of(status)
