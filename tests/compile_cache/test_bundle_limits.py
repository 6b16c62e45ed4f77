"""Bundles that are larger than they say: refused at little cost of memory, time and disk."""

from __future__ import annotations

import bz2
import lzma
import struct
import threading
import time
import tracemalloc
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compile_cache import BlobRef, CacheKey, CompileCache
from compile_cache import bundle as module
from compile_cache.records import MAX_RECORD
from tests.bundles import KEYS, TWO, Member, archive, blob, entry_of, holds_exactly, pack, refused
from tests.entries import sha256


def test_the_limit_of_what_is_unpacked(source, bundle, tmp_path):
    with zipfile.ZipFile(bundle) as found:
        total = sum(info.file_size for info in found.infolist())
    refused(tmp_path / "cache", bundle, f"{total} bytes unpacked, .* over {total - 1}", max_bytes=total - 1)
    CompileCache(tmp_path / "cache").import_bundle(bundle, max_bytes=total)
    holds_exactly(tmp_path / "cache", KEYS, source)


# ---- bombs -----------------------------------------------------------------------------------------------------------

ZEROS = 64 << 20


@pytest.fixture(scope="module")
def packed_zeros() -> bytes:
    """Many zeros, packed a thousand times smaller."""
    packer = zlib.compressobj(1, zlib.DEFLATED, -15)
    chunk = bytes(1 << 20)
    return b"".join(packer.compress(chunk) for _ in range(ZEROS >> 20)) + packer.flush()


def defused(
    here: Path, path: Path, match: str = ".", *, memory: int = 16 << 20, seconds: float = 5, **options: Any
) -> None:
    """The bundle is refused, and costs little memory, time and disk."""
    most = [0]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            held = sum(path.stat().st_size for path in (here / "v1/tmp").glob("*") if path.exists())
            most[0] = max(most[0], held)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.monotonic()
    tracemalloc.start()
    try:
        refused(here, path, match, **options)
        assert tracemalloc.get_traced_memory()[1] < memory
    finally:
        tracemalloc.stop()
        done.set()
        watcher.join()
    assert time.monotonic() - start < seconds and most[0] <= 2 << 20, most


def test_a_blob_that_unpacks_to_more_than_it_says(here, tmp_path, packed_zeros):
    """Its header, and its record, name a small size: no more than that is unpacked."""
    for size in (1, 1000, 1 << 20):
        lie = blob(b"\1" * size, packed=packed_zeros, size=size)
        defused(here, archive(tmp_path / "b.zip", [entry_of(TWO, {"x": b"\1" * size}), lie]))
    record = entry_of(TWO, {"x": bytes(1000)})
    path = archive(tmp_path / "b.zip", [record, blob(bytes(1000), packed=packed_zeros)])
    CompileCache(here).import_bundle(path)  # what it says is true: the rest is not looked at
    assert CompileCache(here).get(TWO).read("x") == bytes(1000) and CompileCache(here).verify().ok


def test_a_record_that_unpacks_to_more_than_it_says(here, tmp_path, packed_zeros):
    record = entry_of(TWO, {"x": b"x"})
    for size in (len(record.data), MAX_RECORD, ZEROS):
        bomb = replace(record, packed=packed_zeros, size=size)
        defused(here, archive(tmp_path / "b.zip", [bomb, blob(b"x")]), memory=5 * MAX_RECORD)


@pytest.mark.parametrize("size", [2**40, 2**60, 2**63 - 1, 2**64 - 1])
def test_a_huge_size_that_is_only_said(here, tmp_path, size):
    said = BlobRef(sha256(b"x"), min(size, 2**60))
    for declared in (size, said.size):
        path = archive(tmp_path / "b.zip", [entry_of(TWO, {"x": said}), blob(b"x", size=declared)])
        defused(here, path, "over")
        defused(here, path, max_bytes=2**70)


def test_methods_that_unpack_all_at_once(here, tmp_path):
    zeros = bytes(ZEROS)
    packers = {
        zipfile.ZIP_BZIP2: bz2.compress(zeros, 9),
        zipfile.ZIP_LZMA: b"\x09\x04\x05\x00\x5d\x00\x00\x10\x00"
        + lzma.compress(zeros, lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA1, "preset": 0}]),
    }
    record = entry_of(TWO, {"x": b"x"})
    for method, packed in packers.items():
        bomb = replace(record, packed=packed, method=method, size=1000)
        defused(here, archive(tmp_path / "b.zip", [bomb, blob(b"x")]), "which no bundle holds")
        small = blob(b"x", packed=packed, method=method, size=1)
        defused(here, archive(tmp_path / "b.zip", [record, small]), "which no bundle holds")


def test_members_that_share_their_data(here, tmp_path):
    """One piece of packed data under many names; and members that contain the headers of the next ones."""
    data = bytes(1 << 20)
    first, packed = blob(data), pack(data, zipfile.ZIP_DEFLATED)
    same = [blob(bytes([n]) * 10, at=0, size=len(data), packed=packed) for n in range(100)]
    defused(here, archive(tmp_path / "b.zip", [first, *same]), "overlap")
    inner = Member(b"v1/blobs/" + b"1" * 64, data)
    header = 30 + len(inner.name)
    outer = Member(b"v1/blobs/" + b"2" * 64, b"", method=0, packed_size=header + len(packed), size=header + len(packed))
    defused(here, archive(tmp_path / "b.zip", [outer, inner]), "overlap")


def test_many_members(here, tmp_path, monkeypatch):
    path = tmp_path / "b.zip"
    one = struct.pack("<4s2B5H3L5H2L", b"PK\1\2", 20, 3, 20, 0, 0, 0, 33, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"x"
    for count in (400_000, 1_000_000):  # more than the directory may have bytes
        end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 65535, 65535, count * len(one), 0, 0)
        path.write_bytes(one * count + end)
        defused(here, path, "a directory of", memory=2 << 20, seconds=2)
    path.write_bytes(one * 3000 + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 3000, 3000, 3000 * len(one), 0, 0))
    refused(here, path, "3000 files")
    monkeypatch.setattr(module, "_MAX_MEMBERS", 2)
    refused(here, archive(path, [entry_of(TWO, {"x": b"x", "y": b"y"}), blob(b"x"), blob(b"y")]), "3 files")


def test_a_record_of_many_megabytes(here, tmp_path):
    body = b'{"notes": {"n": [' + b"[]," * (2 * MAX_RECORD // 3) + b"[]]}}"
    record = replace(entry_of(TWO, {"x": b"x"}), data=body)
    defused(here, archive(tmp_path / "b.zip", [record, blob(b"x")]), "longer than", memory=5 * MAX_RECORD)


def test_many_records_of_many_megabytes(here, tmp_path):
    body = b'{"notes": {"n": [' + b"[]," * (MAX_RECORD // 3 - 100) + b"[]]}}"
    packed = pack(body, zipfile.ZIP_DEFLATED)
    records = [
        replace(entry_of(CacheKey({"n": n}), {"x": b"x"}), packed=packed, size=len(body), crc=zlib.crc32(body))
        for n in range(17)
    ]
    defused(here, archive(tmp_path / "b.zip", [*records, blob(b"x")]), "of them records", memory=2 << 20)


def test_records_are_not_all_in_memory_at_once(here, tmp_path, monkeypatch):
    """Parsed, a hostile record takes up twenty times its text: one of them at a time."""
    size = 1 << 16
    notes = {"n": [[]] * (size // 7)}
    records = [entry_of(CacheKey({"n": n}), {"x": b"x"}, notes) for n in range(12)]
    bad = replace(records[-1], data=b"5")
    path = archive(tmp_path / "b.zip", [*records[:-1], bad, blob(b"x")])
    text = sum(len(record.data) for record in records)
    defused(here, path, "not the fields", memory=text + 48 * size, seconds=10)
