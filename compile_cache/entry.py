"""What the cache hands out: entries, near misses, and the report of a check."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .errors import DamagedEntry, one_line
from .keys import JSON, CacheKey, FactorDifference
from .records import BlobRef, Record
from .store import BlobStore


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
    """

    digest: str
    factors: Mapping[str, JSON]
    files: Mapping[str, BlobRef]
    notes: Mapping[str, JSON]
    created: str
    location: Path = field(repr=False, compare=False)

    @classmethod
    def of(cls, record: Record, location: Path) -> Entry:
        """Return the entry of a record that was checked."""
        return cls(record.digest, record.factors, record.files, record.notes, record.created, location)

    @property
    def size(self) -> int:
        """Bytes of all files together; content that two of them share counts twice."""
        return sum(ref.size for ref in self.files.values())

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
            data = path.read_bytes()
        except OSError as error:
            raise self._damaged(name, one_line(error.strerror or error)) from error
        if len(data) != ref.size or BlobRef.of(data) != ref:
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
    """

    entries: int
    blobs: int
    bytes: int
    damaged: tuple[tuple[str, str], ...]
    orphan_blobs: tuple[str, ...]
    repaired: bool = False

    @property
    def ok(self) -> bool:
        """Whether nothing damaged was found."""
        return not self.damaged
