"""The reading half of the cache: get, list, compare, explain. Takes no lock."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Final

from .entry import Entry, Nearest
from .errors import DamagedEntry, DamagedEntryWarning, TrustError, UntrustedEntryWarning, one_line
from .failures import Failures
from .files import Identity
from .keys import CacheKey
from .location import checked_location
from .records import is_sha256
from .signing import Keys, public_keys, refusal
from .stats import CacheStats
from .store import BlobStore, Damage

LOG: Final = logging.getLogger("compile_cache")
_EXPLAIN_SECONDS: Final = 0.25  # an explanation may be asked for within a request


@dataclass(frozen=True)
class Fault:
    """An entry that is there and cannot be used.

    Attributes:
        kind: "damaged", "untrusted" or "foreign" (of another record format); the last two stay where they are.
        reason: one line on it.
        files: to move away if they are still the ones that were read.
    """

    kind: str
    reason: str
    files: tuple[tuple[Path, Identity], ...] = ()


class CacheReader:
    """What a cache can do without writing an entry; see :class:`compile_cache.CompileCache`."""

    def __init__(
        self,
        location: str | os.PathLike[str],
        *,
        read_only: bool = False,
        trust: Keys | None = None,
        signs: bool = False,
    ) -> None:
        self._trust = None if trust is None else public_keys(trust)
        signed = self._trust is not None and not signs  # who signs vouches for what others could put into a build
        self._store = BlobStore(checked_location(location, signed=signed))
        self._read_only = read_only
        self.failures = Failures(self._store.root, writable=not read_only)
        self.stats = CacheStats()

    @property
    def location(self) -> Path:
        """The absolute path of the cache."""
        return self._store.location

    @property
    def read_only(self) -> bool:
        """Whether the cache was opened to be read only."""
        return self._read_only

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.location)!r}{', read_only=True' if self._read_only else ''})"

    def get(self, key: CacheKey) -> Entry | None:
        """Return the entry of ``key``, with every byte of its record and its blobs checked now, or None.

        A damaged entry gives a :class:`DamagedEntryWarning` and None, and is moved to ``v1/damaged`` where possible.
        With ``trust``, one that no trusted key signed gives an :class:`UntrustedEntryWarning` and None.
        """
        with self.stats.seconds("load_seconds"):
            found = self._look(key.digest)
        if isinstance(found, Entry):
            return self._hit(found, "hits")
        self.stats.miss("absent" if found is None else found.kind)
        if found is not None:
            moved = [] if self._read_only else [self._store.set_aside(*file) for file in found.files]
            self._warn(key.digest, found, "moved to v1/damaged" if moved and all(moved) else "left in place")
        return None

    def find(self, digest: str) -> Entry | None:
        """Return the entry with the full key digest ``digest``, checked as in :meth:`get`, or None.

        Raises:
            DamagedEntry: if it is damaged; it stays where it is.
            TrustError: if no trusted key signed it.
        """
        found = self._look(digest) if is_sha256(digest) else None
        if isinstance(found, Fault) and found.kind == "untrusted":
            raise TrustError(f"expected entry {digest[:12]} signed by a trusted key, got: {found.reason}; sign it")
        if isinstance(found, Fault):
            raise DamagedEntry(f"expected entry {digest[:12]} as stored, got {found.reason}; run verify with repair")
        return found

    def digests(self) -> Iterator[str]:
        """Yield the key digest of every stored record, sorted, without reading the records."""
        yield from self._store.digests()

    def entries(self) -> Iterator[Entry]:
        """Yield all entries in the order of their digests.

        Records are checked in full, blobs for their presence and size only: :meth:`get` and :meth:`verify` read them.
        A damaged entry is skipped with a :class:`DamagedEntryWarning`. These entries are not in use (see
        :class:`Entry`): a limit may remove them meanwhile.
        """
        for digest, found in self._scan():
            if isinstance(found, Fault):
                self._warn(digest, found, "left in place")
            else:
                yield found

    def nearest(self, key: CacheKey, limit: int = 3, *, seconds: float | None = None) -> list[Nearest]:
        """Return the at most ``limit`` entries that differ from ``key`` in the fewest factors, nearest first.

        Args:
            key: what to compare with.
            limit: how many.
            seconds: stop reading records after this time, and compare with those read; None: read all.
        """
        return self._nearest(key, limit, seconds)[0]

    def explain(self, key: CacheKey) -> str:
        """Return one line: ``key`` is present, damaged, or missing, and how the nearest entry differs from it.

        Takes a bounded time: of a very large cache it reads a part, and says so.
        """
        found = self._look(key.digest)
        if isinstance(found, Entry):
            return f"{key.short} present: {len(found.files)} files, {found.size} bytes, stored {found.created}"
        if found is not None:
            return f"{key.short} {found.kind}: {found.reason}; it counts as missing"
        if (failure := self.failures.of(key.digest)) is not None:
            return (
                f"{key.short} missing: its build failed at {failure.when} ({failure.attempts} times): {failure.error}"
            )
        near, read, all_read = self._nearest(key, 1, _EXPLAIN_SECONDS)
        if not near:
            return f"{key.short} missing: the cache holds no entries"
        shown = "; ".join(str(difference) for difference in near[0].differences[:3])
        more = len(near[0].differences) - 3
        tail = f"; and {more} more" if more > 0 else ""
        among = "" if all_read else f" (of the {read} that were looked at)"
        nearest = f"the nearest entry {near[0].entry.digest[:12]}{among} differs in {one_line(shown, 600)}{tail}"
        return f"{key.short} missing: {nearest}"

    def _nearest(self, key: CacheKey, limit: int, seconds: float | None) -> tuple[list[Nearest], int, bool]:
        """The nearest entries, how many were read, and whether these were all."""
        end = None if seconds is None else monotonic() + seconds
        sound: list[Nearest] = []
        all_read = True
        for _, found in self._scan(blobs=False):
            if isinstance(found, Entry):
                sound.append(Nearest.of(key, found))
            if end is not None and monotonic() > end:
                all_read = False
                break
        nearest = sorted(sound, key=lambda near: (len(near.differences), near.entry.digest))
        return nearest[:limit], len(sound), all_read

    def _hit(self, entry: Entry, counter: str) -> Entry:
        self.stats.add(counter)
        self.stats.add("read_bytes", entry.size)
        if not self._read_only:
            self._store.usage.note(entry.digest)
        LOG.debug("hit %s", entry.digest[:12], extra={"event": counter, "key": entry.digest, "bytes": entry.size})
        return entry

    def _look(self, digest: str, *, contents: bool = True, blobs: bool = True) -> Entry | Fault | None:
        """The entry of a digest, in use, checked; without ``contents`` blobs by size only, without ``blobs`` not."""
        try:
            stored = self._store.read_record(digest)
        except Damage as found:
            return self._fault(found)
        if stored is None:
            return None
        record, identity, lease = stored
        if self._trust is not None and (reason := refusal(record, self._trust)) is not None:
            return Fault("untrusted", reason)
        for ref in record.files.values() if blobs else ():
            try:
                self._store.check_blob(ref, contents=contents)
            except Damage as found:
                record_file = (self._store.record_path(digest), identity)
                return self._fault(found, *(() if found.unreadable else (record_file,)))
        return Entry.of(record, self._store, lease)

    def _fault(self, found: Damage, *record: tuple[Path, Identity]) -> Fault:
        reason = f"{found.path.relative_to(self.location).as_posix()}: {found.reason}"
        blob = () if found.identity is None else ((found.path, found.identity),)
        return Fault("foreign" if found.foreign else "damaged", reason, (*blob, *record))

    def _scan(self, *, blobs: bool = True) -> Iterator[tuple[str, Entry | Fault]]:
        for digest in self._store.digests():
            found = self._look(digest, contents=False, blobs=blobs)
            if found is not None:
                yield digest, found.unleased() if isinstance(found, Entry) else found

    def _warn(self, digest: str, fault: Fault, done: str) -> None:
        if fault.kind == "untrusted":
            text = f"expected entry {digest[:12]} signed by a trusted key, got: {fault.reason}; it counts as missing"
            category: type[Warning] = UntrustedEntryWarning
        else:
            text = f"expected entry {digest[:12]} as stored, got {fault.reason}; it counts as missing and is {done}"
            category = DamagedEntryWarning
        LOG.warning(text, extra={"event": fault.kind, "key": digest})
        warnings.warn(text, category, stacklevel=4)
