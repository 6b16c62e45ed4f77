"""Entries to make bundles of, what an import of them leaves, and ZIP files with every field as wanted.

source, bundle and here are fixtures: a cache with these entries, a bundle of it, and a cache with one of them.
"""

from __future__ import annotations

import os
import random
import stat
import struct
import zipfile
import zlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from compile_cache import BlobRef, BundleError, CacheKey, CompileCache
from compile_cache.records import Record, encode_record
from tests.entries import Build, blob_of, builder, key, one_line, record_of, sha256, snapshot

KEYS = ONE, TWO, LARGE = key(1), key(2), key(3)
FILES: dict[CacheKey, dict[str, bytes]] = {
    ONE: {"code.so": bytes(range(256)) * 4, "deep/er/data.json": b'{"a": 1}'},
    TWO: {"code.so": bytes(range(256)) * 4, "empty": b""},  # shares a blob with the first
    LARGE: {"noise": random.Random(5).randbytes(3000), "zeros": bytes(70_000)},
}


def build(key: CacheKey) -> Build:
    return builder(FILES[key], seconds=12.5, words=["\u00e9", None])


def stored(location: Path) -> dict[str, bytes]:
    """Every file, but for what any look at a cache may leave: locks, counts of uses, the tag."""
    return snapshot(location, "v1/locks/", "v1/used/", "CACHEDIR.TAG")


def holds_exactly(location: Path, keys: Collection[CacheKey], source: Path) -> None:
    """The cache holds these entries of the source, bit for bit, and nothing else."""
    wanted = [record_of(source, key) for key in keys]
    wanted += [blob_of(source, data) for key in keys for data in FILES[key].values()]
    assert stored(location) == {path.relative_to(source).as_posix(): path.read_bytes() for path in wanted}
    report = CompileCache(location).verify()
    assert report.ok and not report.orphan_blobs and report.entries == len(set(keys))


def refused(location: Path, path: Path, match: str = ".", **options: Any) -> str:
    """The bundle is refused with one line, and nothing is stored."""
    before = stored(location)
    trust = {"trust": options.pop("trust")} if "trust" in options else {}
    with pytest.raises(BundleError, match=match) as caught:
        CompileCache(location, **trust).import_bundle(path, **options)
    text = one_line(caught.value)
    assert len(text) < 1000 and text.startswith("expected a ")
    assert stored(location) == before
    if (location / "v1/tmp").exists():
        assert not os.listdir(location / "v1/tmp") and not os.listdir(location / "v1/damaged")
    return text


# ---- ZIP files -------------------------------------------------------------------------------------------------------


@dataclass
class Member:
    """One file of a ZIP file, with every field as wanted."""

    name: bytes
    data: bytes = b""
    method: int = zipfile.ZIP_DEFLATED
    flags: int = 0
    mode: int = stat.S_IFREG | 0o644
    packed: bytes | None = None  # in place of what data packs to
    size: int | None = None  # that the headers tell
    crc: int | None = None
    local: bytes | None = None  # name in front of the data
    at: int | None = None  # where its data is said to begin; nothing is written then
    packed_size: int | None = None


def pack(data: bytes, method: int) -> bytes:
    if method == zipfile.ZIP_DEFLATED:
        packer = zlib.compressobj(6, zlib.DEFLATED, -15)
        return packer.compress(data) + packer.flush()
    return data


def archive(path: Path, members: Iterable[Member]) -> Path:
    """Write a ZIP file without any of the care that a library takes."""
    out, directory, count = bytearray(), bytearray(), 0
    for member in members:
        packed = pack(member.data, member.method) if member.packed is None else member.packed
        size = len(member.data) if member.size is None else member.size
        crc = zlib.crc32(member.data) if member.crc is None else member.crc
        packed_size = len(packed) if member.packed_size is None else member.packed_size
        start = len(out) if member.at is None else member.at
        local = member.name if member.local is None else member.local
        fields = (45, member.flags, member.method, 0, 33, crc)
        if member.at is None:
            sizes = [min(number, 2**32 - 1) for number in (packed_size, size)]
            out += struct.pack("<4s5H3L2H", b"PK\3\4", *fields, *sizes, len(local), 0) + local + packed
        extra = struct.pack("<2H3Q", 1, 24, size, packed_size, start)
        names = (len(member.name), len(extra), 0, 0, 0, member.mode << 16, 2**32 - 1)
        directory += struct.pack("<4s2B5H3L5H2L", b"PK\1\2", 45, 3, *fields, 2**32 - 1, 2**32 - 1, *names)
        directory += member.name + extra
        count += 1
    start, count = len(out), min(count, 2**16 - 1)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, len(directory), start, 0)
    path.write_bytes(bytes(out) + directory + end)
    return path


def members_of(source: Path, *keys: CacheKey) -> list[Member]:
    """What an honest bundle of these entries holds."""
    found = [Member(f"v1/actions/{key.digest}.json".encode(), record_of(source, key).read_bytes()) for key in keys]
    blobs = {sha256(data): data for key in keys for data in FILES[key].values()}
    return found + [Member(f"v1/blobs/{name}".encode(), data) for name, data in sorted(blobs.items())]


def entry_of(key: CacheKey, files: dict[str, bytes | BlobRef], notes: Any = None) -> Member:
    """A record that nothing is wrong with."""
    refs = {name: data if isinstance(data, BlobRef) else BlobRef.of(data) for name, data in files.items()}
    record = Record(key.digest, key.factors, refs, notes or {}, "2026-01-01T00:00:00+00:00")
    return Member(f"v1/actions/{key.digest}.json".encode(), encode_record(record))


def blob(data: bytes, **fields: Any) -> Member:
    return Member(f"v1/blobs/{sha256(data)}".encode(), data, **fields)
