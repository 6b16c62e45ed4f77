"""The cache: what :class:`~compile_cache.reader.CacheReader` reads, plus build once, link, verify."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock

from .entry import Entry, VerifyReport
from .errors import (
    BuildFailed,
    CacheWriteError,
    CompileCacheError,
    DamagedEntry,
)
from .files import hash_file, remove, write_synced
from .keys import CacheKey, plain_json
from .reader import CacheReader
from .records import BlobRef, Record, is_file_name
from .store import Damage
from .verify import verify

Build = Callable[[Path], Mapping[str, object] | None]
"""Writes files below the directory that it is given, and returns notes (plain JSON) or None."""

_building = threading.local()  # .keys: the (location, digest) pairs that this thread builds now


class CompileCache(CacheReader):
    """Compiled artifacts in a local directory: records named by a key, over blobs named by their SHA-256.

    Opening writes nothing. Every byte that :meth:`get` and :meth:`Entry.read` hand out was checked; a damaged entry is
    a miss with a warning, never an error and never wrong bytes.

    With several threads and processes:

    - Readers take no lock. The rename of a record is the commit: before it a reader sees a miss (or the old entry),
      after it the whole new entry.
    - One key is built once: builders of one key wait for each other, and all but the first find its result. The lock
      belongs to the kernel, so a builder that dies sets it free at once. (A child that it forked, and that has not
      called exec, keeps it as long as the child lives.)
    - Different keys never wait for each other.
    - Nothing is ever deleted but unfinished work in ``v1/tmp`` that is older than 24 hours.
    - The directory has to be on a file system with atomic rename and flock: any local one.

    Args:
        location: the directory; it does not have to exist.
        read_only: refuse to write, even where that would be possible.

    Raises:
        CacheLocationError: if the location is empty, is a file, or lies below a file.
    """

    def __init__(self, location: str | os.PathLike[str], *, read_only: bool = False) -> None:
        super().__init__(location, read_only=read_only)
        self._swept = False

    def require_writable(self) -> None:
        """Return if an entry could be stored now; a small file is really written and removed again.

        Raises:
            CacheWriteError: if not; the message says why and what to do.
        """
        if self._read_only:
            raise CacheWriteError(
                f"expected a writable cache, got {self.location} opened with read_only=True; "
                "open it without read_only, or fill the cache where that is possible"
            )
        with self._store.writing("a file"):
            self._store.prepare(sweep=not self._swept)
            self._swept = True
            probe = self._store.new_temporary("probe")
            try:
                write_synced(probe, b"probe")
            finally:
                remove(probe)

    def verify(self, repair: bool = False) -> VerifyReport:
        """Read and check every byte of the cache.

        Args:
            repair: move what is damaged into ``v1/damaged``; the entries are then built again when they are needed.

        Raises:
            CacheWriteError: with ``repair``, if the cache cannot be written.
        """
        if repair:
            self.require_writable()
        return verify(self._store, repair=repair)

    # ---- writing -------------------------------------------------------------------------------------------------

    def get_or_build(self, key: CacheKey, build: Build) -> Entry:
        """Return the entry of ``key``, and build it first if it is missing or damaged.

        Args:
            key: what to look for.
            build: called at most once, with a new empty directory; it writes its files there (subdirectories are
                fine) and returns notes or None. It runs in this thread, under the lock of this key only.

        Raises:
            CacheWriteError: if the entry is missing and cannot be stored. Unfinished files are removed.
            BuildFailed: if ``build`` wrote no files, or something that is not a regular file.
            UnstableFactor: if the notes are not plain JSON.
            CompileCacheError: if ``build`` asks for its own key, which would wait for ever.

        Any exception of ``build`` itself passes through unchanged (but for a full disk: that is a CacheWriteError),
        and leaves nothing behind.
        """
        entry = self.get(key)
        if entry is not None:
            return entry
        self.require_writable()
        with self._lock(key):
            entry = self.get(key)
            if entry is not None:  # another thread or process built it while this one waited
                return entry
            directory = self._store.new_temporary("build")
            try:
                with self._store.writing("a build directory"):
                    directory.mkdir()
                return self._store_built(key, directory, self._run(build, directory))
            finally:
                remove(directory)

    def link(self, key: CacheKey, entry: Entry) -> Entry:
        """Store the files and notes of ``entry`` under another key as well; the bytes are shared, not copied.

        An entry that is already stored under ``key`` is replaced. Takes no lock: with two writers the last one wins.

        Raises:
            CacheWriteError: if the record cannot be stored.
            DamagedEntry: if the files of ``entry`` are not all in this cache with their right size.
        """
        self.require_writable()
        for name, ref in entry.files.items():
            try:
                self._store.check_blob(ref, contents=False)
            except Damage as found:
                got = f"{found.reason} for {name}"
                expected = f"the files of entry {entry.digest[:12]} in {self.location}"
                raise DamagedEntry(f"expected {expected}, got {got}; build it here first") from found
        return self._publish(key, dict(entry.files), entry.notes, {})

    # ---- inside --------------------------------------------------------------------------------------------------

    @contextmanager
    def _lock(self, key: CacheKey) -> Iterator[None]:
        held: set[tuple[Path, str]] = _building.__dict__.setdefault("keys", set())
        mine = (self.location, key.digest)
        if mine in held:
            raise CompileCacheError(
                f"expected a build that needs other keys only, got one that asks for its own key {key.short}; "
                "give the inner artifact its own key"
            )
        lock = FileLock(self._store.locks / f"{key.digest}.lock")
        with self._store.writing("a lock file"):
            lock.acquire()
        held.add(mine)
        try:
            yield
        finally:
            held.discard(mine)
            lock.release()

    def _run(self, build: Build, directory: Path) -> Mapping[str, object] | None:
        try:
            return build(directory)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise self._store.write_error("the files of a build", error) from error
            raise

    def _store_built(self, key: CacheKey, directory: Path, notes: Mapping[str, object] | None) -> Entry:
        with self._store.writing("the files of a build"):
            built = _collect(directory, key)
            files = {name: hash_file(path, sync=True)[0] for name, path in built.items()}
        return self._publish(key, files, notes, built)

    def _publish(
        self, key: CacheKey, files: dict[str, BlobRef], notes: Mapping[str, object] | None, built: Mapping[str, Path]
    ) -> Entry:
        plain = plain_json({} if notes is None else notes, "notes")
        if not isinstance(plain, dict):
            got = type(notes).__name__
            raise BuildFailed(f"expected the notes of a build as a mapping or None, got {got}; return a dict")
        created = datetime.now(UTC).isoformat(timespec="seconds")
        record = Record(key.digest, key.factors, dict(sorted(files.items())), plain, created)
        with self._store.writing("an entry"):
            self._store.publish(record, built)
        return Entry.of(record, self.location)


def _collect(directory: Path, key: CacheKey) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for parent, directories, files in os.walk(directory, onerror=_raise):
        for path in (Path(parent, child) for child in (*directories, *files)):
            name = path.relative_to(directory).as_posix()
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise BuildFailed(f"expected regular files from the build of {key.short}, got {name!a}; copy its bytes")
            if not is_file_name(name):
                raise BuildFailed(f"expected portable names from the build of {key.short}, got {name!a}; rename it")
            if path.is_file():
                found[name] = path
    if not found:
        raise BuildFailed(f"expected a file from the build of {key.short}, got none; write it to the given directory")
    return found


def _raise(error: OSError) -> None:
    raise error
