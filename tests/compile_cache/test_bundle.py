"""Bundles: what is exported comes back bit for bit, and a damaged or hostile one costs one line and nothing else."""

from __future__ import annotations

import bz2
import errno
import hashlib
import json
import lzma
import os
import random
import shutil
import signal
import stat
import struct
import threading
import time
import tracemalloc
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from compile_cache import (
    BlobRef,
    BundleError,
    BundleReport,
    CacheKey,
    CacheWriteError,
    CompileCache,
    DamagedEntry,
    SigningKey,
    UntrustedEntryWarning,
    store,
)
from compile_cache import bundle as module
from compile_cache.records import MAX_RECORD, Record, decode_record, encode_record

ONE, TWO, LARGE = CacheKey({"n": 1}), CacheKey({"n": 2}), CacheKey({"n": 3})
KEYS = (ONE, TWO, LARGE)
NOISE = random.Random(5).randbytes(3000)
FILES: dict[CacheKey, dict[str, bytes]] = {
    ONE: {"code.so": bytes(range(256)) * 4, "deep/er/data.json": b'{"a": 1}'},
    TWO: {"code.so": bytes(range(256)) * 4, "empty": b""},  # shares a blob with the first
    LARGE: {"noise": NOISE, "zeros": bytes(70_000)},
}


def build(key: CacheKey) -> Callable[[Path], dict[str, object]]:
    def write(directory: Path) -> dict[str, object]:
        for name, data in FILES[key].items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return {"seconds": 12.5, "words": ["\u00e9", None]}

    return write


def snapshot(location: Path) -> dict[str, bytes]:
    """Every file, but for what any look at a cache may leave: locks, counts of uses, the tag."""
    leave = ("v1/locks/", "v1/used/", "CACHEDIR.TAG")
    found = {path.relative_to(location).as_posix(): path for path in location.rglob("*") if not path.is_dir()}
    return {name: path.read_bytes() for name, path in sorted(found.items()) if not name.startswith(leave)}


def record_of(location: Path, key: CacheKey) -> Path:
    return location / "v1/actions" / key.digest[:2] / f"{key.digest}.json"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def blob_of(location: Path, data: bytes) -> Path:
    return location / "v1/blobs" / sha256(data)[:2] / sha256(data)


def holds_exactly(location: Path, keys: Iterable[CacheKey], source: Path) -> None:
    """The cache holds these entries of the source, bit for bit, and nothing else."""
    wanted = {record_of(source, key).relative_to(source).as_posix(): record_of(source, key) for key in keys}
    wanted |= {
        blob_of(source, data).relative_to(source).as_posix(): blob_of(source, data)
        for key in keys
        for data in FILES[key].values()
    }
    assert snapshot(location) == {name: path.read_bytes() for name, path in sorted(wanted.items())}
    report = CompileCache(location).verify()
    assert report.ok and not report.orphan_blobs and report.entries == len(set(keys))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = CompileCache(tmp_path_factory.mktemp("source") / "cache")
    for key in KEYS:
        cache.get_or_build(key, build(key))
    return cache.location


@pytest.fixture(scope="module")
def bundle(source: Path) -> Path:
    CompileCache(source).export_bundle(source.parent / "bundle.zip")
    return source.parent / "bundle.zip"


@pytest.fixture
def here(tmp_path: Path, source: Path) -> Path:
    """A cache with one of the entries."""
    shutil.copytree(source, tmp_path / "here")
    for key in (TWO, LARGE):
        record_of(tmp_path / "here", key).unlink()
    for data in (b"", NOISE, bytes(70_000)):
        blob_of(tmp_path / "here", data).unlink()
    return tmp_path / "here"


def refused(location: Path, path: Path, match: str = ".", **options: Any) -> str:
    """The bundle is refused with one line, and nothing is stored."""
    before = snapshot(location)
    trust = {"trust": options.pop("trust")} if "trust" in options else {}
    with pytest.raises(BundleError, match=match) as caught:
        CompileCache(location, **trust).import_bundle(path, **options)
    text = str(caught.value)
    assert len(text.splitlines()) == 1 and len(text) < 1000 and text.startswith("expected a ")
    assert snapshot(location) == before
    if (location / "v1/tmp").exists():
        assert not os.listdir(location / "v1/tmp") and not os.listdir(location / "v1/damaged")
    return text


# ---- there and back --------------------------------------------------------------------------------------------------


def test_round_trip(source, bundle, tmp_path):
    report = CompileCache(tmp_path / "new").import_bundle(bundle)
    everything = {data for files in FILES.values() for data in files.values()}
    assert report == BundleReport(
        tuple(sorted(key.digest for key in KEYS)), (), sum(map(len, everything)), bundle.stat().st_size
    )
    holds_exactly(tmp_path / "new", KEYS, source)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
    for key in KEYS:
        entry = CompileCache(tmp_path / "new").get(key)
        assert {name: entry.read(name) for name in entry.files} == FILES[key]
    assert not os.listdir(tmp_path / "new/v1/tmp")


def test_the_same_entries_give_the_same_bytes(source, bundle, tmp_path):
    cache = CompileCache(source)
    cache.get(ONE)  # a use is nothing that a bundle holds
    report = cache.export_bundle(tmp_path / "again.zip", digests=[key.digest for key in (*KEYS, ONE)])
    assert (tmp_path / "again.zip").read_bytes() == bundle.read_bytes()
    assert report.entries == tuple(sorted(key.digest for key in KEYS)) and report.size == bundle.stat().st_size
    CompileCache(tmp_path / "copy").import_bundle(bundle)
    CompileCache(tmp_path / "copy").export_bundle(str(tmp_path / "third.zip"))
    assert (tmp_path / "third.zip").read_bytes() == bundle.read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["again.zip", "copy", "third.zip"]
    with zipfile.ZipFile(bundle) as found:  # any tool can look into it
        assert found.testzip() is None and len(found.namelist()) == 8
        assert not any(info.extra or info.comment for info in found.infolist() if info.filename.endswith(".json"))


def test_a_subset(source, tmp_path):
    CompileCache(source).export_bundle(tmp_path / "two.zip", [TWO.digest])
    report = CompileCache(tmp_path / "new").import_bundle(tmp_path / "two.zip")
    assert report.entries == (TWO.digest,)
    holds_exactly(tmp_path / "new", [TWO], source)


def test_progress(bundle, source, tmp_path):
    seen: list[tuple[int, int]] = []
    CompileCache(source).export_bundle(tmp_path / "b.zip", progress=lambda *step: seen.append(step))
    total = seen[-1][1]
    assert seen[-1] == (total, total) and seen == sorted(seen) and len(seen) == 5
    seen.clear()
    CompileCache(tmp_path / "new").import_bundle(bundle, progress=lambda *step: seen.append(step))
    assert seen[-1] == (total, total) and seen == sorted(seen) and len(seen) == 5


def test_a_signed_bundle(source, tmp_path):
    pytest.importorskip("cryptography")
    mine, theirs = SigningKey.generate(), SigningKey.generate()
    before = snapshot(source)
    CompileCache(source).export_bundle(tmp_path / "signed.zip", sign_with=mine)
    assert snapshot(source) == before  # only the records in the bundle carry it
    for trust in (mine.public, [theirs.public, mine.public]):
        location = tmp_path / str(len(os.listdir(tmp_path)))
        cache = CompileCache(location, trust=trust)  # needs no private key
        assert len(cache.import_bundle(tmp_path / "signed.zip").entries) == 3
        assert {entry.signed_by for entry in cache.entries()} == {(str(mine.public),)} and cache.verify().ok
    refused(tmp_path / "other", tmp_path / "signed.zip", f"signed by {mine.public.short}, not", trust=theirs.public)
    CompileCache(source).export_bundle(tmp_path / "plain.zip")
    refused(tmp_path / "other", tmp_path / "plain.zip", "not signed by a trusted key", trust=mine.public)
    assert not (tmp_path / "other").exists()


def test_a_signed_import_takes_the_place_of_an_unsigned_entry(here, source, tmp_path):
    pytest.importorskip("cryptography")
    mine = SigningKey.generate()
    CompileCache(source).export_bundle(tmp_path / "signed.zip", sign_with=mine)
    cache = CompileCache(here, trust=mine.public)
    with pytest.warns(UntrustedEntryWarning):
        assert cache.get(ONE) is None
    assert not cache.import_bundle(tmp_path / "signed.zip").kept
    assert cache.get(ONE).signed_by == (str(mine.public),) and cache.verify().ok


def test_import_keeps_what_is_sound(here, bundle, source):
    old = {name: (here / name).stat() for name in snapshot(here)}
    report = CompileCache(here).import_bundle(bundle)
    assert report.kept == (ONE.digest,) and set(report.entries) == {TWO.digest, LARGE.digest}
    holds_exactly(here, KEYS, source)
    record = record_of(here, ONE).relative_to(here).as_posix()
    assert (old[record].st_mtime_ns, old[record].st_ino) == (
        record_of(here, ONE).stat().st_mtime_ns,
        record_of(here, ONE).stat().st_ino,
    )
    again = CompileCache(here).import_bundle(bundle)
    assert not again.entries and len(again.kept) == 3 and again.bytes == 0


@pytest.mark.parametrize("victim", ["record", "blob", "no blob", "directory"])
def test_import_heals_what_is_damaged(here, bundle, source, victim):
    blob = blob_of(here, FILES[ONE]["code.so"])
    if victim == "record":
        record_of(here, ONE).write_bytes(b"{}")
    elif victim == "blob":
        blob.write_bytes(bytes(1024))
    else:
        blob.unlink()
    if victim == "directory":
        (blob / "inside").mkdir(parents=True)
    report = CompileCache(here).import_bundle(bundle)
    assert not report.kept and len(report.entries) == 3
    shutil.rmtree(here / "v1/damaged")
    holds_exactly(here, KEYS, source)


def test_export_of_damage_writes_no_bundle(here, tmp_path):
    (tmp_path / "b.zip").write_bytes(b"an older one")
    blob_of(here, FILES[ONE]["code.so"]).write_bytes(bytes(1024))
    for digests in ([ONE.digest], [TWO.digest], None, ["../../x"]):
        with pytest.raises(DamagedEntry, match="export again") as caught:
            CompileCache(here).export_bundle(tmp_path / "b.zip", digests)
        assert "\n" not in str(caught.value)
    with pytest.raises(BundleError, match="got none"):
        CompileCache(here).export_bundle(tmp_path / "b.zip", [])
    assert (tmp_path / "b.zip").read_bytes() == b"an older one" and sorted(os.listdir(tmp_path)) == ["b.zip", "here"]


def test_export_of_a_blob_that_is_replaced_meanwhile(here, tmp_path, monkeypatch):
    """Somebody puts a link to a private file in place of a blob right after it was found: nothing of it gets out."""
    blob, data = blob_of(here, FILES[ONE]["code.so"]), FILES[ONE]["code.so"]
    (tmp_path / "private").write_bytes(bytes(reversed(data)))
    cache = CompileCache(here)
    check = cache._store.check_blob

    def check_then_replace(ref: BlobRef, **options: Any) -> None:
        check(ref, **options)
        blob.unlink(missing_ok=True)
        blob.symlink_to(tmp_path / "private")

    monkeypatch.setattr(cache._store, "check_blob", check_then_replace)
    written: list[int] = []
    monkeypatch.setattr(shutil, "copyfileobj", lambda *args: written.append(1))
    with pytest.raises(DamagedEntry, match="other bytes"):
        cache.export_bundle(tmp_path / "b.zip", [ONE.digest])
    assert len(written) <= 1 and sorted(os.listdir(tmp_path)) == ["here", "private"]


def test_export_of_more_than_a_bundle_holds(here, tmp_path, monkeypatch):
    for name, limit in (("_MAX_MEMBERS", 2), ("_MAX_RECORDS", 100)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, limit)
            with pytest.raises(BundleError, match="in parts") as caught:
                CompileCache(here).export_bundle(tmp_path / "b.zip")
            assert "\n" not in str(caught.value) and os.listdir(tmp_path) == ["here"]


# ---- damage ----------------------------------------------------------------------------------------------------------


def test_every_place_to_cut_a_bundle_off(source, bundle, tmp_path):
    data, path, location = bundle.read_bytes(), tmp_path / "cut.zip", tmp_path / "cache"
    chosen = random.Random(1).sample(range(len(data)), 100)
    for length in {0, 1, 4, 21, 22, len(data) - 22, len(data) - 21, len(data) - 1, *chosen}:
        path.write_bytes(data[:length])
        refused(location, path)
    assert not location.exists()
    path.write_bytes(data)
    CompileCache(location).import_bundle(path)
    holds_exactly(location, KEYS, source)


def accepted_or_refused(path: Path, location: Path, source: Path) -> bool:
    """Whether the bundle is accepted: then its content is exactly right."""
    shutil.rmtree(location, ignore_errors=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            CompileCache(location).import_bundle(path)
        except BundleError as error:
            assert len(str(error).splitlines()) == 1, repr(error)
            assert snapshot(location) == {}
            return False
    holds_exactly(location, KEYS, source)
    return True


def test_flipped_bits_are_seen_or_do_not_matter(source, bundle, tmp_path):
    data, path, choose = bundle.read_bytes(), tmp_path / "flipped.zip", random.Random(2)
    directory = data.index(b"PK\1\2")
    places = [*choose.sample(range(directory), 120), *choose.sample(range(directory, len(data)), 220)]
    accepted = 0
    for place in places:
        flipped = bytearray(data)
        flipped[place] ^= 1 << choose.randrange(8)
        path.write_bytes(flipped)
        accepted += accepted_or_refused(path, tmp_path / "cache", source)
    assert accepted < len(places) // 3  # dates and the like


def test_random_damage_is_seen(source, bundle, tmp_path):
    data, path, choose = bundle.read_bytes(), tmp_path / "damaged.zip", random.Random(3)
    for _ in range(80):
        damaged = bytearray(data)
        start, length = choose.randrange(len(data)), choose.choice([1, 2, 4, 8, 100])
        kind = choose.randrange(4)
        if kind == 0:
            damaged[start : start + length] = choose.randbytes(length)
        elif kind == 1:
            del damaged[start : start + length]
        elif kind == 2:
            damaged[start:start] = choose.randbytes(length)
        else:
            damaged[start : start + length] = b"\xff" * length
        path.write_bytes(damaged)
        accepted_or_refused(path, tmp_path / "cache", source)


def test_bytes_in_front_of_a_bundle_or_behind_it(source, bundle, tmp_path):
    for number, text in enumerate([b"#!/bin/sh\n" + bundle.read_bytes(), bundle.read_bytes() + b"\n" * 100]):
        (tmp_path / "b.zip").write_bytes(text)
        accepted_or_refused(tmp_path / "b.zip", tmp_path / str(number), source)


# ---- what is no bundle -----------------------------------------------------------------------------------------------


def test_no_bundle_at_all(here, tmp_path, source):
    (tmp_path / "pipe").parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "text").write_text("PK\3\4 is how a bundle begins\n" * 100)
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "empty.zip").write_bytes(b"PK\5\6" + bytes(18))
    for name in ("missing", "pipe", "loop", "text/below", "x" * 300, "a\nb", ""):
        refused(here, tmp_path / name, "expected a bundle, got .*; give the path of one")
    for place in (Path("a\0b"), tmp_path, Path("/dev/zero")):
        refused(here, place, "expected a bundle, got .*; give the path of one")
    for name in ("text", "empty", "empty.zip"):
        refused(here, tmp_path / name, "expected a sound bundle")
    refused(here, record_of(source, ONE), "expected a sound bundle")


def test_a_bundle_that_cannot_be_read(here, bundle, monkeypatch):
    real = os.open

    def forbidden(path: Any, *args: Any, **options: Any) -> int:
        if os.fspath(path) == str(bundle):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(bundle))
        return real(path, *args, **options)

    monkeypatch.setattr(os, "open", forbidden)
    refused(here, bundle, "Permission denied")


# ---- hostile files ---------------------------------------------------------------------------------------------------


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


def test_the_archives_of_these_tests_are_sound(source, tmp_path):
    path = archive(tmp_path / "b.zip", members_of(source, *KEYS))
    CompileCache(tmp_path / "cache").import_bundle(path)
    holds_exactly(tmp_path / "cache", KEYS, source)


SHA = sha256(b"x").encode()
NAMES = [
    b"../x",
    b"../../../../../../tmp/x",
    b"/etc/passwd",
    b"v1/actions/../../x",
    b"v1/blobs/../../../" + SHA,
    b"v1/blobs/" + SHA + b"/../x",
    b"v1/blobs/" + SHA[:2] + b"/" + SHA,
    b"..\\x",
    b"v1\\blobs\\" + SHA,
    b"C:\\x",
    b"\\\\server\\share",
    b"v1/blobs/" + SHA + b"\0",
    b"v1/blobs/" + SHA + b"\0/../../x",
    b"v1/blobs/" + SHA + b"\n",
    b"v1/blobs/" + SHA.upper(),
    b"v1/blobs/" + SHA[:-1],
    b"v1/blobs/" + SHA + b"0",
    b"./v1/blobs/" + SHA,
    b"v1//blobs/" + SHA,
    b" v1/blobs/" + SHA,
    b"V1/blobs/" + SHA,
    "v1\u2215blobs\u2215".encode() + SHA,
    b"v1/blobs/" + "\uff11".encode() * 64,
    b"v1/blobs/" + SHA[:-1] + "\u0661".encode(),
    "v1/blobs/\u202e".encode() + SHA,
    b"v1/blobs/\xff\xfe",
    b"v1/actions/" + ONE.digest.encode() + b".JSON",
    b"v1/actions/" + ONE.digest.encode(),
    b"v1/blobs/",
    b"v1/",
    b"",
    b"x" * 60_000,
    b"CACHEDIR.TAG",
    b"README.md",
]


@pytest.mark.parametrize("flags", [0, 0x800])  # names in cp437, in UTF-8
@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:40])
def test_names_that_no_bundle_holds(here, source, tmp_path, name, flags):
    path = archive(tmp_path / "b.zip", [*members_of(source, TWO), Member(name, b"x", flags=flags)])
    before = sorted(os.listdir(tmp_path))
    refused(here, path)
    assert sorted(os.listdir(tmp_path)) == before


def inverted(data: bytes) -> bytes:
    return bytes(255 - byte for byte in data)


ODD_MEMBERS: dict[str, Callable[[list[Member]], list[Member]]] = {
    "link": lambda members: [*members[:-1], replace(members[-1], mode=stat.S_IFLNK | 0o777)],
    "record that is a link": lambda members: [replace(members[0], mode=stat.S_IFLNK | 0o777), *members[1:]],
    "directory": lambda members: [*members[:-1], replace(members[-1], mode=stat.S_IFDIR | 0o755)],
    "pipe": lambda members: [*members[:-1], replace(members[-1], mode=stat.S_IFIFO | 0o644)],
    "device": lambda members: [*members[:-1], replace(members[-1], mode=stat.S_IFBLK | 0o644)],
    "extra directory": lambda members: [*members, Member(b"v1/blobs/", mode=stat.S_IFDIR | 0o755)],
    "blob twice": lambda members: [*members, members[-1]],
    "blob twice, another first": lambda members: [*members, replace(members[-1], data=b"evil")],
    "record twice": lambda members: [members[0], *members],
    "twice behind a nul": lambda members: [*members, replace(members[-1], name=members[-1].name + b"\0")],
    "extra blob": lambda members: [*members, blob(b"nobody names it")],
    "extra file": lambda members: [*members, Member(b"extra", b"x")],
    "encrypted": lambda members: [*members[:-1], replace(members[-1], flags=1)],
    "strongly encrypted": lambda members: [*members[:-1], replace(members[-1], flags=0x40)],
    "hidden headers": lambda members: [*members[:-1], replace(members[-1], flags=0x2000)],
    "patch": lambda members: [*members[:-1], replace(members[-1], flags=0x20)],
    "another name in front of the data": lambda members: [*members[:-1], replace(members[-1], local=b"../x")],
    "wrong crc": lambda members: [*members[:-1], replace(members[-1], crc=1)],
    "no blob": lambda members: members[:-1],
    "no blobs": lambda members: members[:1],
    "no records": lambda members: members[1:],
    "nothing": lambda members: [],
    "longer blob": lambda members: [*members[:-1], replace(members[-1], data=members[-1].data + b"x")],
    "shorter blob": lambda members: [*members[:-1], replace(members[-1], data=members[-1].data[:-1])],
    "other bytes": lambda members: [*members[:-1], replace(members[-1], data=inverted(members[-1].data))],
    "data after the end of the file": lambda members: [*members[:-1], replace(members[-1], packed_size=10**6)],
    "data at a place that no file has": lambda members: [*members, blob(b"x", at=2**62)],
    "data at a place that no number has": lambda members: [*members, blob(b"x", at=2**64 - 1)],
}
for _number in (1, 2, 3, 4, 5, 6, 9, 10, 12, 14, 18, 19, 93, 95, 96, 97, 98, 99, 65535):
    ODD_MEMBERS[f"method {_number}"] = lambda members, number=_number: [
        *members[:-1],
        replace(members[-1], method=number),
    ]


@pytest.mark.parametrize("kind", ODD_MEMBERS)
def test_members_that_no_bundle_holds(here, source, tmp_path, kind):
    refused(here, archive(tmp_path / "b.zip", ODD_MEMBERS[kind](members_of(source, LARGE))))


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_the_two_methods(source, tmp_path, method):
    path = archive(tmp_path / "b.zip", [replace(member, method=method) for member in members_of(source, *KEYS)])
    CompileCache(tmp_path / "cache").import_bundle(path)
    holds_exactly(tmp_path / "cache", KEYS, source)


def later_format(data: bytes) -> bytes:
    body = {**json.loads(data), "format": 2}
    del body["checksum"]
    body["checksum"] = sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())
    return (json.dumps(body, indent=1, sort_keys=True) + "\n").encode()


def test_records_that_are_none(here, source, tmp_path):
    record, *blobs = members_of(source, LARGE)
    other = f"v1/actions/{ONE.digest}.json".encode()
    for wrong, text in (
        (replace(record, name=other), "another key"),
        (replace(record, data=later_format(record.data)), "record format 2, this version reads format 1"),
        (replace(record, data=b"5"), "not the fields"),
        (replace(record, data=b'[1, "a"]'), "not the fields"),
        (replace(record, data=b"[" * 50_000), "not a JSON record"),
        (replace(record, data=b""), "not a JSON record"),
        (replace(record, data=record.data + b"\n"), "not the ones that were written"),
        (replace(record, data=record.data.replace(b"12.5", b"12.6")), "checksum"),
    ):
        refused(here, archive(tmp_path / "b.zip", [wrong, *blobs]), text)


def test_one_bad_entry_of_many(here, source, tmp_path):
    """The last of all is wrong: nothing of the others is stored either."""
    members = members_of(source, TWO, LARGE)
    refused(here, archive(tmp_path / "b.zip", [*members[:-1], replace(members[-1], data=inverted(members[-1].data))]))


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


# ---- trouble on this side --------------------------------------------------------------------------------------------


def test_a_cache_that_cannot_be_written(here, bundle):
    before = snapshot(here)
    with pytest.raises(CacheWriteError, match="read_only=True") as caught:
        CompileCache(here, read_only=True).import_bundle(bundle)
    assert "\n" not in str(caught.value) and snapshot(here) == before
    with pytest.raises(CacheWriteError, match="expected to write") as caught:
        CompileCache("/proc/no-such-place/cache").import_bundle(bundle)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_disk_that_fails_while_unpacking(here, bundle, source, monkeypatch, nth, number):
    before, calls = snapshot(here), [0]
    real = module.hash_file

    def failing(path: Path, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == nth:
            raise OSError(number, os.strerror(number), str(path))
        return real(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, "hash_file", failing)
        with pytest.raises(CacheWriteError, match=os.strerror(number)) as caught:
            CompileCache(here).import_bundle(bundle)
    assert calls[0] == nth and "\n" not in str(caught.value)
    assert snapshot(here) == before and not os.listdir(here / "v1/tmp")
    CompileCache(here).import_bundle(bundle)
    holds_exactly(here, KEYS, source)


def test_a_disk_that_is_full_when_the_records_are_written(here, bundle, source, monkeypatch):
    """What is in place by then is whole; nothing is left half-way, and the next import completes it."""
    real = store.write_synced
    for nth in (1, 2):
        calls = [0]

        def failing(path: Path, data: bytes, calls: list[int] = calls, nth: int = nth) -> int:
            calls[0] += 1
            if calls[0] == nth:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            return real(path, data)

        with monkeypatch.context() as patch:
            patch.setattr(store, "write_synced", failing)
            with pytest.raises(CacheWriteError, match="No space left"):
                CompileCache(here).import_bundle(bundle)
        report = CompileCache(here).verify()
        assert report.ok and not report.orphan_blobs and report.entries == nth and not os.listdir(here / "v1/tmp")
    CompileCache(here).import_bundle(bundle)
    holds_exactly(here, KEYS, source)


def test_an_interrupted_import_leaves_nothing(here, bundle):
    before = snapshot(here)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        CompileCache(here).import_bundle(bundle, progress=interrupt)
    assert snapshot(here) == before and not os.listdir(here / "v1/tmp")


def killed_import(location: Path, bundle: Path, name: str, nth: int) -> bool:
    """Import in a child that is killed at its nth call of a function of os; False if it never got so far."""
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        return os.WIFSIGNALED(status)
    code = 1
    try:
        real, calls = getattr(os, name), [0]

        def deadly(*args: Any, **options: Any) -> Any:
            calls[0] += 1
            if calls[0] == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        setattr(os, name, deadly)
        CompileCache(location).import_bundle(bundle)
        code = 0
    finally:
        os._exit(code)


@pytest.mark.parametrize("name", ["replace", "fsync"])
def test_an_import_that_is_killed_leaves_a_sound_cache(tmp_path, bundle, source, name):
    seen = set()
    for nth in range(1, 40):
        location = tmp_path / str(nth)
        killed = killed_import(location, bundle, name, nth)
        cache = CompileCache(location)
        report = cache.verify()
        assert report.ok, (nth, report)
        seen.add(report.entries)
        for key in KEYS:
            entry = cache.get(key)
            assert entry is None or {file: entry.read(file) for file in entry.files} == FILES[key]
        cache.import_bundle(bundle)
        shutil.rmtree(location / "v1/tmp")
        holds_exactly(location, KEYS, source)
        if not killed:
            break
    assert not killed and seen == {0, 1, 2, 3} and nth > 8


def test_two_imports_at_once(bundle, source, tmp_path):
    reports: list[BundleReport] = []
    threads = [
        threading.Thread(target=lambda: reports.append(CompileCache(tmp_path / "cache").import_bundle(bundle)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(reports) == 4 and all(len(report.entries) + len(report.kept) == 3 for report in reports)
    holds_exactly(tmp_path / "cache", KEYS, source)


def test_a_bundle_that_changes_after_it_was_checked(here, tmp_path):
    """The records were read; the blobs are read later, and may be others by then."""
    large = [random.Random(n).randbytes(50_000) for n in range(2)]
    blobs = [blob(data, method=zipfile.ZIP_STORED) for data in large]
    path = archive(tmp_path / "b.zip", [entry_of(TWO, {"a": large[0], "b": large[1]}), *blobs])
    honest, before = path.read_bytes(), snapshot(here)
    changed = honest
    for data in large:
        changed = changed.replace(data, data[:-1000] + bytes(1000))

    def change(done: int, total: int) -> None:
        with open(path, "r+b") as file:
            file.write(changed)

    with pytest.raises(BundleError):
        CompileCache(here).import_bundle(path, progress=change)
    assert snapshot(here) == before and not os.listdir(here / "v1/tmp")


def test_a_record_is_what_it_was(source, bundle):
    """A guard of the helpers above."""
    with zipfile.ZipFile(bundle) as found:
        for key in KEYS:
            data = found.read(f"v1/actions/{key.digest}.json")
            assert data == record_of(source, key).read_bytes() and decode_record(data, key.digest).notes
