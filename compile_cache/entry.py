"""What the cache hands out: entries, near misses, and the report of a check."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from .errors import DamagedEntry, one_line
from .files import again_if_stale, read_at_most
from .keys import JSON, CacheKey, FactorDifference
from .leases import Lease
from .records import BlobRef, Record
from .signing import PublicKey
from .store import BlobStore
from .unpacked import private_copy


@dataclass(frozen=True)
class Entry:
    """One stored artifact: its key, its files and its notes. The bytes stay on the disk until they are read.

    Attributes:
        digest: digest of the key that it is stored under.
        factors: the factors of that key.
        files: file name (POSIX, relative) -> :class:`BlobRef`.
        notes: plain JSON from who built it; not part of the key.
        created: when it was stored, UTC in ISO 8601.
        location: the cache that it lies in.
        last_used: when it was handed out before this time, UTC in ISO 8601; None if it never was.
        hits: how often it was handed out before this time.
        pinned: whether limits leave it alone.
        signed_by: public keys (``ed25519:...``) whose signatures it carries; only a cache with ``trust`` checks them.

    An entry that the cache handed out is in use as long as this object lives: no limit removes it.
    """

    digest: str
    factors: Mapping[str, JSON]
    files: Mapping[str, BlobRef]
    notes: Mapping[str, JSON]
    created: str
    location: Path = field(repr=False, compare=False)
    last_used: str | None = field(default=None, repr=False, compare=False)
    hits: int = field(default=0, repr=False, compare=False)
    pinned: bool = field(default=False, repr=False, compare=False)
    signed_by: tuple[str, ...] = field(default=(), repr=False)
    _lease: Lease | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, record: Record, store: BlobStore, lease: Lease | None = None) -> Entry:
        """Return the entry of a record that was checked; it is in use as long as the lease lives."""
        use = store.usage.of(record.digest)
        last = None
        with suppress(ValueError, OverflowError, OSError):  # a file time that no calendar has
            last = None if use.last is None else datetime.fromtimestamp(use.last, UTC).isoformat(timespec="seconds")
        signers = tuple(str(PublicKey(signature.key)) for signature in record.signatures)
        pinned = store.usage.is_pinned(record.digest)
        facts = record.digest, record.factors, record.files, record.notes, record.created, store.location
        return cls(*facts, last, use.count, pinned, signers, lease)

    def unleased(self) -> Entry:
        """The same entry, not in use: a limit may remove it."""
        return replace(self, _lease=None)

    @property
    def size(self) -> int:
        """Bytes of all files together; content that two of them share counts twice."""
        return sum(ref.size for ref in self.files.values())

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file, by name."""
        return {name: ref.size for name, ref in self.files.items()}

    @property
    def path(self) -> Path:
        """A directory with the files of the entry: checked, private to this process, gone when it ends.

        Raises:
            DamagedEntry: if the bytes are missing, cannot be read, or are other bytes.
        """
        return private_copy(self.files, self.read)

    def read(self, name: str) -> bytes:
        """Return the bytes of one file, checked against its SHA-256 as they were read.

        Raises:
            KeyError: if the entry has no file of that name.
            DamagedEntry: if the bytes are missing, cannot be read, or are other bytes.
        """
        if name not in self.files:
            raise KeyError(f"expected one of {', '.join(sorted(self.files))}, got {name}; ask for one of those")
        ref = self.files[name]
        path = BlobStore(self.location).blob_path(ref.sha256)
        try:
            size, data = again_if_stale(lambda: read_at_most(path, ref.size))
        except OSError as error:
            raise self._damaged(name, one_line(error.strerror or error)) from error
        if size != ref.size:
            raise self._damaged(name, f"{size} bytes")
        if BlobRef.of(data) != ref:
            raise self._damaged(name, f"{len(data)} other bytes")
        return data

    def __hash__(self) -> int:
        return hash((self.digest, self.created))

    def _damaged(self, name: str, got: str) -> DamagedEntry:
        expected = f"{self.files[name].size} stored bytes of {name} in entry {self.digest[:12]}"
        return DamagedEntry(f"expected {expected}, got {got}; get the entry again, it is then built anew")


@dataclass(frozen=True)
class Nearest:
    """An entry that is close to a key.

    Attributes:
        entry: the entry.
        differences: the factors in which the key ("here") and the entry ("there") differ.
    """

    entry: Entry
    differences: tuple[FactorDifference, ...]

    @classmethod
    def of(cls, key: CacheKey, entry: Entry) -> Nearest:
        """Compare a key with an entry."""
        return cls(entry, key.diff(entry.factors))


@dataclass(frozen=True)
class VerifyReport:
    """The outcome of a check of a whole cache.

    Attributes:
        entries: number of sound entries.
        blobs: number of sound blobs.
        bytes: size of the sound blobs together.
        damaged: (path relative to the location, reason) of everything that is not sound.
        orphan_blobs: relative paths of sound blobs that no sound record names; they are not damage.
        repaired: whether the damaged things were moved into ``v1/damaged``.
        untrusted: (relative path, reason) of sound records that no trusted key signed; they stay where they are.
        foreign: (relative path, reason) of records that another version of this package wrote; they are not damage.
    """

    entries: int
    blobs: int
    bytes: int
    damaged: tuple[tuple[str, str], ...]
    orphan_blobs: tuple[str, ...]
    repaired: bool = False
    untrusted: tuple[tuple[str, str], ...] = ()
    foreign: tuple[tuple[str, str], ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing damaged and nothing untrusted was found."""
        return not self.damaged and not self.untrusted
