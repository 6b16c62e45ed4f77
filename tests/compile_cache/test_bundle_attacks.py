"""Bundles that are damaged, or made to do harm: one line and nothing else."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import stat
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compile_cache import BundleError, CompileCache
from tests.bundles import (
    KEYS,
    LARGE,
    ONE,
    TWO,
    Member,
    archive,
    blob,
    entry_of,
    holds_exactly,
    members_of,
    refused,
    stored,
)
from tests.entries import forged, one_line, record_of, sha256

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
            one_line(error)
            assert stored(location) == {}
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


def test_records_that_are_none(here, source, tmp_path):
    record, *blobs = members_of(source, LARGE)
    later = forged({**json.loads(record.data), "format": 2})
    other = f"v1/actions/{ONE.digest}.json".encode()
    for wrong, text in (
        (replace(record, name=other), "another key"),
        (replace(record, data=later), "record format 2, this version reads format 1"),
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


def test_a_bundle_that_changes_after_it_was_checked(here, tmp_path):
    """The records were read; the blobs are read later, and may be others by then."""
    large = [random.Random(n).randbytes(50_000) for n in range(2)]
    blobs = [blob(data, method=zipfile.ZIP_STORED) for data in large]
    path = archive(tmp_path / "b.zip", [entry_of(TWO, {"a": large[0], "b": large[1]}), *blobs])
    honest, before = path.read_bytes(), stored(here)
    changed = honest
    for data in large:
        changed = changed.replace(data, data[:-1000] + bytes(1000))

    def change(done: int, total: int) -> None:
        with open(path, "r+b") as file:
            file.write(changed)

    with pytest.raises(BundleError):
        CompileCache(here).import_bundle(path, progress=change)
    assert stored(here) == before and not os.listdir(here / "v1/tmp")
