"""The reading half of the cache: get, list, compare, explain. Takes no lock."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .entry import Entry, Nearest
from .errors import CacheLocationError, DamagedEntry, DamagedEntryWarning, one_line
from .files import Identity
from .keys import CacheKey
from .records import is_sha256
from .store import BlobStore, Damage


@dataclass(frozen=True)
class _Fault:
    """A damaged entry: one line on it, and the files to move away if they are still the ones that were read."""

    reason: str
    files: tuple[tuple[Path, Identity], ...]


class CacheReader:
    """What a cache can do without writing an entry; see :class:`compile_cache.CompileCache`."""

    def __init__(self, location: str | os.PathLike[str], *, read_only: bool = False) -> None:
        self._store = BlobStore(_checked_location(location))
        self._read_only = read_only

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
        """
        found = self._look(key.digest)
        if isinstance(found, _Fault):
            moved = [] if self._read_only else [self._store.set_aside(*file) for file in found.files]
            self._warn(key.digest, found, "moved to v1/damaged" if moved and all(moved) else "left in place")
            return None
        return found

    def find(self, digest: str) -> Entry | None:
        """Return the entry with the full key digest ``digest``, checked as in :meth:`get`, or None.

        Raises:
            DamagedEntry: if it is damaged; it stays where it is.
        """
        found = self._look(digest) if is_sha256(digest) else None
        if isinstance(found, _Fault):
            raise DamagedEntry(f"expected entry {digest[:12]} as stored, got {found.reason}; run verify with repair")
        return found

    def digests(self) -> Iterator[str]:
        """Yield the key digest of every stored record, sorted, without reading the records."""
        yield from self._store.digests()

    def entries(self) -> Iterator[Entry]:
        """Yield all entries in the order of their digests.

        Records are checked in full, blobs for their presence and size only: :meth:`get` and :meth:`verify` read them.
        A damaged entry is skipped with a :class:`DamagedEntryWarning`.
        """
        for digest, found in self._scan():
            if isinstance(found, _Fault):
                self._warn(digest, found, "left in place")
            else:
                yield found

    def nearest(self, key: CacheKey, limit: int = 3) -> list[Nearest]:
        """Return the at most ``limit`` entries that differ from ``key`` in the fewest factors, nearest first."""
        sound = [Nearest.of(key, found) for _, found in self._scan() if isinstance(found, Entry)]
        return sorted(sound, key=lambda near: (len(near.differences), near.entry.digest))[:limit]

    def explain(self, key: CacheKey) -> str:
        """Return one line: ``key`` is present, damaged, or missing, and how the nearest entry differs from it."""
        found = self._look(key.digest)
        if isinstance(found, Entry):
            return f"{key.short} present: {len(found.files)} files, {found.size} bytes, stored {found.created}"
        if found is not None:
            return f"{key.short} damaged: {found.reason}; it counts as missing"
        near = self.nearest(key, limit=1)
        if not near:
            return f"{key.short} missing: the cache holds no entries"
        shown = "; ".join(str(difference) for difference in near[0].differences[:3])
        more = len(near[0].differences) - 3
        tail = f"; and {more} more" if more > 0 else ""
        nearest = f"the nearest entry {near[0].entry.digest[:12]} differs in {one_line(shown, 600)}{tail}"
        return f"{key.short} missing: {nearest}"

    def _look(self, digest: str, *, contents: bool = True) -> Entry | _Fault | None:
        try:
            stored = self._store.read_record(digest)
        except Damage as found:
            return self._fault(found)
        if stored is None:
            return None
        record, identity = stored
        for ref in record.files.values():
            try:
                self._store.check_blob(ref, contents=contents)
            except Damage as found:
                return self._fault(found, (self._store.record_path(digest), identity))
        return Entry.of(record, self.location)

    def _fault(self, found: Damage, *record: tuple[Path, Identity]) -> _Fault:
        reason = f"{found.path.relative_to(self.location).as_posix()}: {found.reason}"
        blob = () if found.identity is None else ((found.path, found.identity),)
        return _Fault(reason, (*blob, *record))

    def _scan(self) -> Iterator[tuple[str, Entry | _Fault]]:
        for digest in self._store.digests():
            found = self._look(digest, contents=False)
            if found is not None:
                yield digest, found

    def _warn(self, digest: str, fault: _Fault, done: str) -> None:
        text = f"expected entry {digest[:12]} as stored, got {fault.reason}; it counts as missing and is {done}"
        warnings.warn(text, DamagedEntryWarning, stacklevel=3)


def _checked_location(location: str | os.PathLike[str]) -> Path:
    text = os.fspath(location)
    if not isinstance(text, str) or not text or "\0" in text:
        raise CacheLocationError(f"expected the path of a directory, got {text!r}; give one such as ./cache")
    path = Path(os.path.abspath(text))
    for place in (path, *path.parents):
        try:
            if place.is_dir():
                break
            if place.exists():
                raise CacheLocationError(
                    f"expected a directory, got the file {place}; give another location for the cache"
                )
        except OSError as error:
            got = one_line(error.strerror or error)
            raise CacheLocationError(f"expected a usable path, got {path}: {got}; give another location") from error
    return path
