"""The cache: what :class:`~compile_cache.reader.CacheReader` reads, plus build once, link, limits and a second tier."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import Any, Final

from filelock import FileLock

from .bounded import Progress
from .bundle import MAX_BYTES, BundleReader, BundleReport, write_bundle
from .entry import Entry, VerifyReport
from .errors import (
    BuildFailed,
    BundleError,
    CacheWriteError,
    CompileCacheError,
    DamagedEntry,
    RemoteError,
    TrustError,
)
from .failures import Failures
from .files import hash_file, remove, write_synced
from .handover import Handover
from .keys import JSON, CacheKey, plain_json
from .leases import Lease, busy_directory
from .limits import Judge, Limits, PruneReport, empty, foreign_to, remove_entries
from .reader import LOG, CacheReader
from .records import BlobRef, Record, encode_record, is_file_name, is_sha256
from .remote import Remote, RemoteTier
from .shipping import import_records, pull, push_entries, sign_entries
from .signing import Keys, SigningKey
from .store import Damage
from .verify import verify

_SURVEY_EVERY: Final = 60.0  # seconds between two looks at the limits while there is room left

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
      belongs to the kernel, so a builder that dies sets it free at once.
    - Different keys never wait for each other.
    - Limits remove the least recently used entries, never one that a process holds (an :class:`Entry` that
      :meth:`get`, :meth:`get_or_build` or :meth:`link` returned and that lives) or that is pinned. Without limits,
      nothing is deleted but unfinished work in ``v1/tmp`` that is older than 24 hours and that no process works in.
    - The directory has to be on a file system with atomic rename and flock: any local one.

    Args:
        location: the directory; it does not have to exist. If it is created, it is its owner's alone (mode 0700).
        max_bytes: what the entries may hold together; looked at after a publication. None: no limit.
        max_age: seconds since its last use that an entry may stay; looked at after a publication. None: no limit.
        read_only: refuse to write, even where that would be possible.
        trust: public keys (see :func:`compile_cache.public_keys`): an entry that none of them signed is never handed
            out. None: signatures are not looked at.
        sign_with: signs every entry that is stored here; needed to store in a cache with ``trust``.
        remote: a second tier, or its URL or directory: what is missing here is fetched from there.

    Attributes:
        stats: counters, see :class:`compile_cache.CacheStats`.

    Raises:
        CacheLocationError: if the location is empty, is a file, or lies below a file.
        TrustError: if a key cannot be used, or ``sign_with`` is not among the trusted keys.
        RemoteError: if the remote cannot be used, or the cache is read-only, so that it could not keep what it fetches.
        TypeError, ValueError: if a limit is not a number over 0.
    """

    def __init__(
        self,
        location: str | os.PathLike[str],
        *,
        max_bytes: int | None = None,
        max_age: float | None = None,
        read_only: bool = False,
        trust: Keys | None = None,
        sign_with: SigningKey | None = None,
        remote: Remote | str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(location, read_only=read_only, trust=trust, signs=sign_with is not None)
        self.limits = Limits(max_bytes, max_age)
        if sign_with is not None and self._trust is not None and sign_with.public not in self._trust:
            raise TrustError(
                f"sign_with: expected a key whose public half is trusted here, got {sign_with.public.short}; "
                "add it to trust, or what is built here could not be loaded"
            )
        if remote is not None and read_only:
            raise RemoteError("expected a writable cache for a remote, got read_only=True; leave one of the two out")
        self._sign_with = sign_with
        self._remote = None if remote is None else RemoteTier(_remote(remote), self.stats)
        self._swept = False
        self._surveyed = 0.0  # when limits were last looked at (monotonic), and what was held then and is new since
        self._held = 0

    def as_read_only(self) -> CompileCache:
        """The same cache, opened to be read only and without its remote; counters are shared."""
        view = object.__new__(type(self))
        vars(view).update(vars(self))
        view._read_only, view._remote = True, None
        view.failures = Failures(self._store.root, writable=False)
        return view

    def handover(self) -> Handover:
        """What a child process needs to open this cache, its private key included."""
        options = {
            "max_bytes": self.limits.max_bytes,
            "max_age": self.limits.max_age,
            "read_only": self._read_only,
            "trust": self._trust,
            "remote": self.remote,
        }
        private = None if self._sign_with is None else self._sign_with.private_bytes()
        return Handover(str(self.location), options, private)

    @classmethod
    def from_handover(cls, handover: Handover) -> CompileCache:
        """The cache that :meth:`handover` told of, with counters, and a connection to its remote, of its own."""
        signer = None if handover.private is None else SigningKey.from_private_bytes(handover.private)
        return cls(handover.location, sign_with=signer, **handover.options)

    @property
    def remote(self) -> Remote | None:
        """The second tier."""
        return None if self._remote is None else self._remote.remote

    def require_writable(self) -> None:
        """Return if an entry could be stored now; a small file is really written and removed again.

        Raises:
            CacheWriteError: if not; the message says why and what to do.
            TrustError: if the cache loads signed entries only, and has no key to sign with.
        """
        self._require_not_read_only()
        with self._store.writing("a file"):
            self._store.prepare(sweep=not self._swept)
            self._swept = True
            self._require_signer()
            probe = self._store.new_temporary("probe")
            try:
                write_synced(probe, b"probe")
            finally:
                remove(probe)

    @contextmanager
    def workspace(self) -> Iterator[Path]:
        """A new directory for files of a build that are not stored, on the file system of the cache; gone afterwards.

        Raises:
            CacheWriteError: if it cannot be made.
        """
        self._require_not_read_only()
        with self._store.writing("a work directory"):
            self._store.prepare(sweep=False)
            directory = self._store.new_temporary("work")
            directory.mkdir()
        try:
            with busy_directory(directory):
                yield directory
        finally:
            remove(directory)

    def clear_after(self, pid: int) -> None:
        """Remove the unfinished work of a process of this machine that has ended, however it ended."""
        if not self._read_only:
            self._store.clear_after(pid)

    def verify(self, repair: bool = False) -> VerifyReport:
        """Read and check every byte of the cache.

        Args:
            repair: move what is damaged into ``v1/damaged``; the entries are then built again when they are needed.

        Raises:
            CacheWriteError: with ``repair``, if the cache cannot be written.
        """
        if repair:
            self.require_writable()
        return verify(self._store, repair=repair, trust=self._trust)

    # ---- reading -------------------------------------------------------------------------------------------------

    def get(self, key: CacheKey) -> Entry | None:
        """Return the entry of ``key``, from here or from the remote, with every byte checked now, or None.

        A damaged entry gives a :class:`DamagedEntryWarning` and None, and is moved to ``v1/damaged`` where possible.
        With ``trust``, one that no trusted key signed gives an :class:`UntrustedEntryWarning` and None. A remote that
        does not answer gives a :class:`RemoteWarning`, and is then not asked for a while.
        """
        entry = super().get(key)
        if entry is None and self._remote is not None and pull(self._store, self._remote, key.digest, self._trust):
            found = self._look(key.digest)
            entry = self._hit(found, "remote_hits") if isinstance(found, Entry) else None
            self._stored(0 if entry is None else entry.size)
        return entry

    # ---- writing -------------------------------------------------------------------------------------------------

    def get_or_build(self, key: CacheKey, build: Build) -> Entry:
        """Return the entry of ``key``, and build it first if it is missing or damaged.

        Args:
            key: what to look for.
            build: called at most once, with a new empty directory; it writes its files there (subdirectories are
                fine) and returns notes or None. It runs in this thread, under the lock of this key only.

        Raises:
            CacheWriteError: if the entry is missing and cannot be stored. Unfinished files are removed.
            TrustError: if the entry is missing or not trusted, and the cache has ``trust`` but no ``sign_with``.
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
            found = self._look(key.digest)
            if isinstance(found, Entry):  # another thread or process built it while this one waited
                return self._hit(found, "hits")
            directory = self._store.new_temporary("build")
            try:
                with ExitStack() as busy:
                    with self._store.writing("a build directory"):
                        directory.mkdir()
                        busy.enter_context(busy_directory(directory))
                    return self._store_built(key, directory, self._run(build, directory))
            finally:
                remove(directory)

    def link(self, key: CacheKey, entry: Entry) -> Entry:
        """Store the files and notes of ``entry`` under another key as well; the bytes are shared, not copied.

        An entry that is already stored under ``key`` is replaced. Takes no lock: with two writers the last one wins.

        Raises:
            CacheWriteError: if the record cannot be stored.
            DamagedEntry: if the files of ``entry`` are not all in this cache with their right size.
            TrustError: if the cache has ``trust``, and ``entry`` is not one of its trusted entries.
        """
        self.require_writable()
        if self._trust is not None:
            self._require_trusted(entry)
        return self._publish(key, dict(entry.files), entry.notes, {}, entry)

    def sign(self, key: SigningKey, digests: Iterable[str] | None = None) -> int:
        """Sign entries with a key; every byte of them is checked first. Earlier signatures of other keys stay.

        Args:
            key: the private key.
            digests: which entries; None: all that are not signed by it yet.

        Returns:
            How many were signed.

        Raises:
            DamagedEntry: if one is missing or damaged; those before it are signed.
            CacheWriteError: if the cache cannot be written.
        """
        self._require_not_read_only()
        with self._store.writing("signatures"):
            return sign_entries(self._store, key, digests)

    # ---- limits --------------------------------------------------------------------------------------------------

    def pin(self, key: CacheKey | str) -> None:
        """Keep an entry whatever the limits say, until :meth:`unpin`.

        Args:
            key: a key or its digest; it may be stored later.

        Raises:
            CacheWriteError: if that cannot be noted.
        """
        self._require_not_read_only()
        digest = _digest(key)
        with self._store.writing("a pin"):
            self._store.prepare(sweep=False)
            with self._store.publishing():  # a removal that is under way has looked at the pins already
                self._store.usage.pin(digest)

    def unpin(self, key: CacheKey | str) -> None:
        """Leave an entry to the limits again.

        Raises:
            CacheWriteError: if that cannot be noted.
        """
        self._require_not_read_only()
        with self._store.writing("a pin"):
            self._store.usage.unpin(_digest(key))

    def prune(
        self,
        *,
        environment: Mapping[str, JSON] | Sequence[Mapping[str, JSON]] | None = None,
        superseded: Sequence[str] = (),
        max_bytes: int | None = None,
        max_age: float | None = None,
        dry_run: bool = False,
    ) -> PruneReport:
        """Remove what is of no use any more, then what is over the limits. Entries in use or pinned stay.

        Args:
            environment: as :func:`environment_factors` gives it, or several (one per device kind): entries that were
                made for another one of the same device kind go (their factor ``environment`` tells).
            superseded: dotted names of factors, such as "versions": of entries that differ only in these, the one
                that was stored last stays.
            max_bytes, max_age: limits for this time; None: those of the cache.
            dry_run: only say what would go.

        Raises:
            CacheWriteError: if the cache cannot be written.
        """
        limits = Limits(
            self.limits.max_bytes if max_bytes is None else max_bytes,
            self.limits.max_age if max_age is None else max_age,
        )
        judge = (lambda record: None) if environment is None else foreign_to(environment)
        return self._remove(limits, judge, dry_run=dry_run, superseded=superseded)

    def clean(self, *, dry_run: bool = False) -> PruneReport:
        """Remove every entry that no process uses, pinned or not, and what was set aside as damaged.

        Raises:
            CacheWriteError: if the cache cannot be written.
        """
        return self._remove(Limits(), lambda record: "clean removes all", dry_run=dry_run, pinned_too=True)

    # ---- shipping ------------------------------------------------------------------------------------------------

    def export_bundle(
        self,
        bundle: str | os.PathLike[str],
        digests: Iterable[str] | None = None,
        *,
        sign_with: SigningKey | None = None,
        progress: Progress | None = None,
    ) -> BundleReport:
        """Write entries into one compressed file, every byte of them checked.

        Args:
            bundle: the file; it is replaced when the new one is whole.
            digests: which entries; None: all.
            sign_with: adds this key's signature to the records in the bundle.
            progress: told of (bytes done, bytes in all).

        Raises:
            DamagedEntry: if an entry is missing or damaged; no bundle is written then.
            TrustError: if the cache has ``trust``, and no trusted key signed an entry.
            BundleError: if there is nothing to write.
            OSError: if the file cannot be written.
        """
        chosen = list(self.digests() if digests is None else digests)
        if not chosen:
            raise BundleError(f"expected entries to export, got none in {self.location}; fill the cache first")
        target = Path(bundle)
        return write_bundle(self._store, chosen, target, trust=self._trust, sign_with=sign_with, progress=progress)

    def import_bundle(
        self,
        bundle: str | os.PathLike[str],
        *,
        max_bytes: int = MAX_BYTES,
        progress: Progress | None = None,
    ) -> BundleReport:
        """Store the entries of a bundle; a sound entry that is here already stays as it is.

        Records and signatures are checked before a byte is unpacked, and nothing is stored before all of it is whole.

        Args:
            bundle: what :meth:`export_bundle` wrote.
            max_bytes: refuse a bundle that would unpack to more.
            progress: told of (bytes done, bytes in all).

        Raises:
            BundleError: if it is refused: damaged, tampered with, too large, or with ``trust`` not signed by a trusted
                key. Nothing is stored then.
            CacheWriteError: if the cache cannot be written.
        """
        self._require_not_read_only()
        reader = BundleReader(Path(bundle), self._trust, max_bytes)
        with reader, self._store.writing("the entries of a bundle"):
            report = import_records(self._store, reader, self._is_sound, progress)
        self._stored(report.bytes)
        return report

    def push(self, digests: Iterable[str] | None = None, *, progress: Progress | None = None) -> int:
        """Copy entries to the remote; what is there already is not sent again, so an interrupted push goes on.

        Returns:
            How many entries were sent or found there.

        Raises:
            RemoteError: if there is no remote, or it does not answer.
            DamagedEntry: if an entry is missing or damaged.
        """
        tier = self._tier()
        return push_entries(self._store, tier, self.digests() if digests is None else digests, progress)

    def pull(self, digests: Iterable[str] | None = None, *, progress: Progress | None = None) -> list[str]:
        """Fetch entries from the remote that are not here; an interrupted pull goes on where it stopped.

        Args:
            digests: which; None: all that the remote has.
            progress: told of (bytes done, bytes in all) of each entry.

        Returns:
            The digests that were fetched. What the remote has and cannot be used gives a warning.

        Raises:
            RemoteError: if there is no remote, or it does not answer.
            CacheWriteError: if the cache cannot be written.
        """
        tier = self._tier()
        self._require_not_read_only()
        with self._store.writing("an entry of the remote"):
            self._store.prepare(sweep=False)
        wanted = tier.digests() if digests is None else list(digests)
        missing = [digest for digest in wanted if not self._is_sound(digest)]
        forever = float("inf")
        done = [
            digest for digest in missing if pull(self._store, tier, digest, self._trust, progress, patience=forever)
        ]
        self._stored(0)
        return done

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
            with self.stats.seconds("build_seconds"):
                return build(directory)
        except BaseException as error:
            self.stats.add("build_failures")
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise self._store.write_error("the files of a build", error) from error
            raise

    def _store_built(self, key: CacheKey, directory: Path, notes: Mapping[str, object] | None) -> Entry:
        with self._store.writing("the files of a build"):
            built = _collect(directory, key)
            files = {name: hash_file(path, sync=True)[0] for name, path in built.items()}
        entry = self._publish(key, files, notes, built)
        self.stats.add("builds")
        return entry

    def _publish(
        self,
        key: CacheKey,
        files: dict[str, BlobRef],
        notes: Mapping[str, object] | None,
        built: Mapping[str, Path],
        linked: Entry | None = None,
    ) -> Entry:
        plain = plain_json({} if notes is None else notes, "notes")
        if not isinstance(plain, dict):
            got = type(notes).__name__
            raise BuildFailed(f"expected the notes of a build as a mapping or None, got {got}; return a dict")
        created = datetime.now(UTC).isoformat(timespec="seconds")
        record = Record(key.digest, key.factors, dict(sorted(files.items())), plain, created)
        if self._sign_with is not None:
            record = self._sign_with.sign(record)
        with self._store.writing("an entry"), self._store.publishing():
            if linked is not None:
                self._require_files(linked)
            self._store.publish(record, built)
            lease = self._lease(record.digest)  # nothing removes it before it is in use
        self.failures.forget(key.digest)
        entry = Entry.of(record, self._store, lease)
        size = entry.size if built else 0
        self.stats.add("written_bytes", size)
        LOG.info(
            "stored %s, %d bytes", key.short, entry.size, extra={"event": "stored", "key": key.digest, "bytes": size}
        )
        if self._remote is not None and self._remote.remote.push:
            blobs = {ref: self._store.blob_path(ref.sha256) for ref in entry.files.values()}
            self._remote.push(record.digest, encode_record(record), blobs)
        self._stored(size)
        return entry

    def _lease(self, digest: str) -> Lease | None:
        try:
            stored = self._store.read_record(digest)
        except Damage:  # stored, and cannot be read just now
            return None
        return None if stored is None else stored[2]

    def _require_trusted(self, entry: Entry) -> None:
        found = self._look(entry.digest)
        if not isinstance(found, Entry) or (found.files, found.notes) != (entry.files, entry.notes):
            raise TrustError(
                f"expected an entry of {self.location} that a trusted key signed, got {entry.digest[:12]}; "
                "get it from this cache"
            )

    def _require_files(self, entry: Entry) -> None:
        for name, ref in entry.files.items():
            try:
                self._store.check_blob(ref, contents=False)
            except Damage as found:
                got = f"{found.reason} for {name}"
                expected = f"the files of entry {entry.digest[:12]} in {self.location}"
                raise DamagedEntry(f"expected {expected}, got {got}; build it here first") from found

    def _require_not_read_only(self) -> None:
        if self._read_only:
            raise CacheWriteError(
                f"expected a writable cache, got {self.location} opened with read_only=True; "
                "open it without read_only, or fill the cache where that is possible"
            )

    def _require_signer(self) -> None:
        if self._trust is not None and self._sign_with is None:
            raise TrustError(
                f"expected a signing key to store entries in {self.location}, which loads signed ones only, got none; "
                "pass sign_with=, or fill the cache where the key is"
            )

    def _tier(self) -> RemoteTier:
        if self._remote is None:
            raise RemoteError(f"expected a cache with a remote, got {self.location} without one; pass remote=")
        return self._remote

    def _is_sound(self, digest: str) -> bool:
        return isinstance(self._look(digest), Entry)

    def _stored(self, size: int) -> None:
        """Something was stored: looks at the limits, where they may be passed or were not looked at for a while."""
        if not self.limits:
            return
        self._held += size
        over = self.limits.max_bytes is not None and self._held > self.limits.max_bytes
        if not self._surveyed or over or monotonic() - self._surveyed > _SURVEY_EVERY:
            try:
                self._remove(self.limits, lambda record: None)
            except CacheWriteError as error:  # the entry is stored, and is worth more than the limit
                self._surveyed, self._held = monotonic(), 0
                LOG.warning("limits not applied: %s", error, extra={"event": "limits_failed"})

    def _remove(self, limits: Limits, judge: Judge, *, dry_run: bool = False, **options: Any) -> PruneReport:
        if not dry_run:
            self._require_not_read_only()
        with self._store.writing("removals"):
            self._store.prepare(sweep=not dry_run)
            report = remove_entries(self._store, limits, judge=judge, dry_run=dry_run, **options)
            if options.get("pinned_too") and not dry_run:
                empty(self._store)
                for digest in self.failures.digests():
                    self.failures.forget(digest)
        self._surveyed, self._held = monotonic(), report.bytes
        if not dry_run:
            self.stats.add("evictions", len(report.removed))
            self.stats.add("evicted_bytes", report.freed)
        for gone in () if dry_run else report.removed:
            LOG.info("removed %s: %s", gone.digest[:12], gone.reason, extra={"event": "removed", "key": gone.digest})
        return report


def _remote(remote: Remote | str | os.PathLike[str]) -> Remote:
    return remote if isinstance(remote, Remote) else Remote(os.fspath(remote))


def _digest(key: CacheKey | str) -> str:
    digest = key.digest if isinstance(key, CacheKey) else key
    if not is_sha256(digest):
        raise CompileCacheError(f"expected a key or its 64 hexadecimal digits, got {digest!r}; list them with ls")
    return digest


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
