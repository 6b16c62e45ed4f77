"""What is removed, and what never is: limits by bytes and age, pruning, cleaning.

Least recently used entries go first. An entry that some process holds (see :mod:`.leases`) or that is pinned stays,
whatever the limits say. Removal and publication exclude each other; readers wait for neither.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from .errors import UnstableFactor
from .files import Identity, identity_of
from .keys import JSON, CacheKey
from .leases import held_alone
from .records import BadRecord, BlobRef, ForeignRecord, Record, decode_record, is_sha256
from .store import BlobStore
from .usage import age

ENVIRONMENT: Final = "environment"
"""The factor that holds :func:`compile_cache.environment_factors`."""


@dataclass(frozen=True)
class Limits:
    """How much a cache may hold.

    Args:
        max_bytes: of all entries together, content that entries share counted once; None: no limit.
        max_age: seconds since the last use; None: no limit.

    Raises:
        TypeError, ValueError: if a limit is not a number over 0.
    """

    max_bytes: int | None = None
    max_age: float | None = None

    def __post_init__(self) -> None:
        for name, unit in (("max_bytes", "bytes"), ("max_age", "seconds")):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name}: expected a number of {unit}, got {value!r}; None means no limit")
            if not value > 0:
                raise ValueError(f"{name}: expected more than 0 {unit}, got {value!r}; None means no limit")

    def __bool__(self) -> bool:
        return self.max_bytes is not None or self.max_age is not None


@dataclass(frozen=True)
class Removal:
    """An entry that was removed, and why.

    Attributes:
        digest: of its key.
        reason: one line.
        freed: bytes that this freed; what other entries share stays.
    """

    digest: str
    reason: str
    freed: int


@dataclass(frozen=True)
class PruneReport:
    """The outcome of a removal.

    Attributes:
        removed: the entries that are gone (with ``dry_run``: that would go).
        in_use: digests of entries that were to go, and stay because a process holds them or they are pinned.
        orphans: number of blobs without an entry that are gone.
        freed: bytes freed altogether.
        entries, bytes: what is left.
        dry_run: nothing was removed.
    """

    removed: tuple[Removal, ...]
    in_use: tuple[str, ...]
    orphans: int
    freed: int
    entries: int
    bytes: int
    dry_run: bool = False


@dataclass
class _Item:
    """What removal has to know of one entry."""

    digest: str
    refs: tuple[BlobRef, ...]
    size: int  # of the record itself
    identity: Identity
    group: str  # equal for entries that differ in superseded factors only
    created: str
    reason: str | None  # why it is to go, whatever the limits say
    last_used: float = 0.0
    pinned: bool = False


Judge = Callable[[Record], str | None]
"""Why an entry is to go; None: it may stay."""


@dataclass
class Survey:
    """The entries of a store, read once; a second look reads only what changed since."""

    store: BlobStore
    judge: Judge
    superseded: tuple[str, ...] = ()
    items: dict[str, _Item] = field(default_factory=dict)
    unknown: list[Path] = field(default_factory=list)  # records of other formats: what they need cannot be told

    def look(self) -> None:
        """Bring ``items`` up to date."""
        before, self.items, self.unknown = self.items, {}, []
        for digest in self.store.digests():
            path = self.store.record_path(digest)
            try:
                identity = identity_of(path.stat())
                item = before.get(digest)
                if item is None or item.identity != identity:
                    item = self._read(path, identity)
            except FileNotFoundError:
                continue
            except (ForeignRecord, OSError):
                self.unknown.append(path)
                continue
            if item is not None:
                use = self.store.usage.of(digest)
                item.last_used = item.identity[2] / 1e9 if use.last is None else use.last
                item.pinned = self.store.usage.is_pinned(digest)
                self.items[digest] = item
        self._mark_superseded()

    def _read(self, path: Path, identity: Identity) -> _Item | None:
        record = self.store.skim_record(path)
        if record is None:  # gone, or so damaged that it names nothing
            return None
        refs = tuple({ref.sha256: ref for ref in record.files.values()}.values())
        try:
            group = CacheKey(_without(record.factors, self.superseded)).digest if self.superseded else ""
            reason = self.judge(record)
        except UnstableFactor:  # no factors of a key: damage
            return None
        return _Item(record.digest, refs, identity[3], identity, group, record.created, reason)

    def _mark_superseded(self) -> None:
        if not self.superseded:
            return
        newest: dict[str, _Item] = {}
        for item in sorted(self.items.values(), key=lambda item: (item.created, item.identity[2], item.digest)):
            older = newest.get(item.group)
            newest[item.group] = item
            if older is not None and older.reason is None:
                older.reason = f"superseded by {item.digest[:12]}"


def remove_entries(
    store: BlobStore,
    limits: Limits,
    *,
    judge: Judge = lambda record: None,
    superseded: Sequence[str] = (),
    pinned_too: bool = False,
    dry_run: bool = False,
) -> PruneReport:
    """Remove what the judge names, what is superseded, and then what is over the limits.

    Args:
        store: where.
        limits: applied to what is left.
        judge: says why an entry is to go.
        superseded: dotted names of factors; of entries that differ only in these, the newest stays.
        pinned_too: the judge's word holds for pinned entries too.
        dry_run: only say what would go.

    Raises:
        OSError: if the cache cannot be written or listed.
    """
    survey = Survey(store, judge, tuple(superseded))
    survey.look()  # the long part, while others may publish
    with store.removing():
        survey.look()
        return _Removing(store, survey, dry_run).run(limits, pinned_too)


class _Removing:
    def __init__(self, store: BlobStore, survey: Survey, dry_run: bool) -> None:
        self.store, self.survey, self.dry_run = store, survey, dry_run
        self.removed: list[Removal] = []
        self.in_use: list[str] = []
        self.stored = dict(_blobs(store))
        self.holders = Counter(ref.sha256 for item in survey.items.values() for ref in item.refs)
        self.held = self._held()
        self.bytes = sum(self.stored.values()) + sum(item.size for item in survey.items.values())  # what is left

    def run(self, limits: Limits, pinned_too: bool) -> PruneReport:
        items = sorted(self.survey.items.values(), key=lambda item: (item.last_used, item.digest))
        orphans, freed = self._remove_orphans()
        for item in items:
            if item.reason is not None:
                self._remove(item, item.reason, pinned_too)
        left = [item for item in items if item.digest in self.survey.items]
        if limits.max_age is not None:
            for item in left:
                if (idle := age(item.last_used)) > limits.max_age:
                    self._remove(item, f"not used for {idle:.0f} s, max_age is {limits.max_age:g} s")
        if limits.max_bytes is not None:
            for item in left:
                if (held := self.bytes) <= limits.max_bytes:
                    break
                if item.digest in self.survey.items:
                    self._remove(item, f"the cache holds {held} bytes, max_bytes is {limits.max_bytes}")
        freed += sum(removal.freed for removal in self.removed)
        removed, in_use = tuple(self.removed), tuple(dict.fromkeys(self.in_use))
        return PruneReport(removed, in_use, orphans, freed, len(self.survey.items), self.bytes, self.dry_run)

    def _remove(self, item: _Item, reason: str, pinned_too: bool = False) -> None:
        path = self.store.record_path(item.digest)
        if (item.pinned and not pinned_too) or item.digest in self.held:
            self.in_use.append(item.digest)
            return
        with held_alone(path) as free:
            if not free:
                self.in_use.append(item.digest)
                return
            if not self.dry_run:
                path.unlink(missing_ok=True)  # a reader may have set it aside as damaged
        freed = item.size
        self.bytes -= item.size
        del self.survey.items[item.digest]
        if not self.dry_run:
            self.store.usage.forget(item.digest)
        for ref in item.refs:
            self.holders[ref.sha256] -= 1
            if self.holders[ref.sha256] <= 0 and not self.survey.unknown:
                freed += self._remove_blob(ref.sha256)
        self.removed.append(Removal(item.digest, reason, freed))

    def _held(self) -> set[str]:
        """Digests of entries whose record was replaced while some process held them; their blobs have a holder."""
        digests = set()
        for path in sorted(self.store.held.glob("*.*")):
            with held_alone(path) as free:
                if free and not self.dry_run:
                    path.unlink(missing_ok=True)
            if free:
                continue
            try:
                record = decode_record(path.read_bytes(), path.stem)
            except FileNotFoundError:
                continue
            except (BadRecord, OSError):
                self.survey.unknown.append(path)
                continue
            self.holders.update({ref.sha256 for ref in record.files.values()})
            digests.add(path.stem)
        return digests

    def _remove_orphans(self) -> tuple[int, int]:
        """Blobs that no record names: what a process left that was killed while it stored or removed an entry."""
        if self.survey.unknown:
            return 0, 0
        orphans = [sha256 for sha256 in self.stored if not self.holders[sha256]]
        return len(orphans), sum([self._remove_blob(sha256) for sha256 in orphans])

    def _remove_blob(self, sha256: str) -> int:
        if not self.dry_run:
            with suppress(FileNotFoundError):
                self.store.blob_path(sha256).unlink()
        size = self.stored.pop(sha256, 0)
        self.bytes -= size
        return size


def empty(store: BlobStore) -> None:
    """Remove what was set aside as damaged, and what was left unfinished long ago."""
    store.sweep()
    for path in store.damaged.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def foreign_to(environment: Mapping[str, JSON] | Sequence[Mapping[str, JSON]]) -> Judge:
    """A judge of entries that were made for another environment of the same device kind.

    An entry for another device kind, or without the factor ``environment``, stays: nothing can be said of it here.

    Args:
        environment: as :func:`compile_cache.environment_factors` gives it, or several.
    """
    several = [environment] if isinstance(environment, Mapping) else list(environment)
    here = {str(facts.get("device")): CacheKey(dict(facts)) for facts in several}

    def judge(record: Record) -> str | None:
        there = record.factors.get(ENVIRONMENT)
        if not isinstance(there, dict) or (known := here.get(str(there.get("device")))) is None:
            return None
        differences = known.diff(there)
        return f"foreign environment: {differences[0]}" if differences else None

    return judge


def _without(factors: Mapping[str, JSON], names: Sequence[str]) -> dict[str, JSON]:
    """A copy of factors without those of these dotted names."""
    rest = dict(factors)
    for name in names:
        first, dot, tail = name.partition(".")
        inner = rest.get(first)
        if not dot:
            rest.pop(first, None)
        elif isinstance(inner, dict):
            rest[first] = _without(inner, [tail])
    return rest


def _blobs(store: BlobStore) -> Iterator[tuple[str, int]]:
    """The names and sizes of all blobs."""
    for path in store.blobs.glob("??/*"):
        with suppress(FileNotFoundError):  # a reader set it aside as damaged
            if is_sha256(path.name) and path.is_file():
                yield path.name, path.stat().st_size
