"""Records by somebody who can write into the cache: a warning, little memory and little time, and never a crash."""

from __future__ import annotations

import json
import os
import sys
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compile_cache import BlobRef, BuildFailed, CompileCache, DamagedEntry, DamagedEntryWarning
from compile_cache.keys import plain_json
from compile_cache.records import MAX_RECORD, BadRecord, decode_record, encode_record
from compile_cache.usage import Use
from tests.entries import KEY, blob_of, build, builder, forged, one_line, read_record, record_of, sha256, snapshot

HOSTILE_NAMES = {
    "file and directory": ["a", "a/b"],
    "file and deep directory": ["a/b", "a/b/c/d"],
    "absolute": ["/etc/passwd"],
    "up": ["a/../../b"],
    "dot": ["./a"],
    "double slash": ["a//b"],
    "slash at the end": ["a/"],
    "backslash": ["..\\a"],
    "nul": ["a\0b"],
    "line feed": ["a\nb"],
    "escape": ["a\x1b[2J"],
    "line separator": ["a\u2028b"],
    "surrogate": ["a\ud800"],
    "long part": ["x" * 256],
    "long part in utf-8": ["\u00e9" * 128],
    "long": ["/".join(["x" * 100] * 11)],
    "deep": ["/".join(["x"] * 600)],
    "empty": [""],
}


@pytest.mark.parametrize("kind", HOSTILE_NAMES)
def test_hostile_names_are_damage(unsigned, kind):
    body = json.loads(record_of(unsigned).read_bytes())
    ref = body["files"]["code.so"]
    record_of(unsigned).write_bytes(forged({**body, "files": {name: ref for name in HOSTILE_NAMES[kind]}}))
    cache = CompileCache(unsigned)
    with pytest.raises(DamagedEntry) as caught:
        cache.find(KEY.digest)
    one_line(caught.value)
    with pytest.warns(DamagedEntryWarning):
        assert cache.get(KEY) is None
    assert cache.get_or_build(KEY, build)


@pytest.mark.parametrize(
    "name", ["con", "a b", "..a", "a..", "...", "-rf", "~", "$HOME", "x" * 255, "\u00e9/\u4e2d", "a.b/a"]
)
def test_odd_names_are_fine(tmp_path, name):
    cache = CompileCache(tmp_path)
    cache.get_or_build(KEY, builder({name: b"odd"}))
    assert snapshot(cache.get(KEY).path) == {name: b"odd"}


def test_a_time_that_no_calendar_has(unsigned, monkeypatch):
    cache = CompileCache(unsigned)
    for moment in (1e18, -1e18, float("inf")):
        monkeypatch.setattr(cache._store.usage, "of", lambda digest, moment=moment: Use(1, moment))
        assert cache.get(KEY).last_used is None


# ---- what is hard to read --------------------------------------------------------------------------------------------


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def odd_values() -> list[Any]:
    words = ["", "a\nb", "\ud800", "\u202e", "0" * 64, "-1", "Infinity"]
    numbers = [0, -1, 1, True, 2**63, 10**4299, 0.5, -0.0, 1e308, None]
    return [*words, *numbers, [], {}, [[]], [1, "a"], {"a": [{}]}, {"": None}, nested(70), nested(900)]


@pytest.mark.parametrize("part", ["format", "key", "factors", "files", "notes", "created", "signatures"])
def test_odd_values_in_a_record_are_damage_or_fine(signed, part):
    body, accepted = json.loads(record_of(signed).read_bytes()), []
    for value in odd_values():
        inner = body[part] if isinstance(body[part], dict) else {}
        name = next(iter(inner), "x")
        changes = [value, {**inner, "x": value}, {**inner, name: value}]
        if part == "files":
            changes += [{name: {**inner[name], field: value}} for field in ("sha256", "size", "more")]
        for change in changes:
            data = forged({**body, part: change})
            try:
                record = decode_record(data, KEY.digest)
            except BadRecord as error:
                one_line(error)
            else:
                accepted.append(record)
                assert encode_record(record) == data and plain_json(record.notes) == record.notes
                one_line(record.created)
    assert all(record.files == read_record(signed).files or part == "files" for record in accepted)
    assert (len(accepted) > 0) == (part in ("notes", "files", "format")), part


@pytest.mark.parametrize(
    "text", ["5", "-1.5", "true", '"text"', '[1, "a"]', "[{}, []]", "[null, 1]", "{}", '{"a": 1}', "[[[[]]]]"]
)
def test_json_that_is_no_record(text):
    with pytest.raises(BadRecord) as caught:
        decode_record(text.encode(), KEY.digest)
    one_line(caught.value)


def test_no_depth_of_nesting_gets_through_or_breaks(unsigned):
    """Where the parser still follows, and what comes after it does not any more."""
    body = json.loads(record_of(unsigned).read_bytes())
    del body["checksum"]
    limit = sys.getrecursionlimit()
    for part in ("notes", "format", "created"):
        for depth in range(60, limit + 20, 1 if part == "notes" else 7):
            deep = "[" * depth + "]" * depth
            start = json.dumps({**body, part: "DEEP"}, sort_keys=True, separators=(",", ":"))
            canonical = start.replace('"DEEP"', f'{{"n":{deep}}}')
            checksum = sha256(canonical.encode())
            with pytest.raises(BadRecord):
                decode_record(f'{canonical[:-1]},"checksum":"{checksum}"}}'.encode(), KEY.digest)


def test_a_field_twice_is_damage(unsigned):
    text = record_of(unsigned).read_text()
    for old in (' "notes": {', ' "files": {', f' "key": "{KEY.digest}"'):
        doubled = text.replace(old, f"{old.split(':')[0]}: null,\n{old}")
        assert json.loads(doubled) == json.loads(text)
        with pytest.raises(BadRecord, match="not the ones that were written"):
            decode_record(doubled.encode(), KEY.digest)


def test_a_record_has_a_largest_size(tmp_path):
    cache = CompileCache(tmp_path)

    def talkative(directory: Path) -> dict[str, object]:
        build(directory)
        return {"log": "x" * MAX_RECORD}

    with pytest.raises(BuildFailed, match=f"at most {MAX_RECORD} bytes") as caught:
        cache.get_or_build(KEY, talkative)
    one_line(caught.value)
    assert not list(cache.digests()) and not os.listdir(tmp_path / "v1/tmp") and cache.verify().ok
    cache.get_or_build(KEY, lambda directory: {**build(directory), "log": "x" * (MAX_RECORD - 2000)})
    assert len(cache.get(KEY).notes["log"]) == MAX_RECORD - 2000


def test_a_record_of_many_megabytes_costs_little(unsigned):
    body = json.loads(record_of(unsigned).read_bytes())
    record_of(unsigned).write_bytes(forged({**body, "notes": {"n": [[]] * (3 * MAX_RECORD // 16)}}))
    assert record_of(unsigned).stat().st_size > MAX_RECORD
    start = time.monotonic()
    with pytest.warns(DamagedEntryWarning, match="longer than"):
        assert CompileCache(unsigned).get(KEY) is None
    assert time.monotonic() - start < 1


def test_a_huge_file_in_place_of_a_record_takes_no_memory(unsigned):
    os.truncate(record_of(unsigned), 256 << 20)  # no blocks on the disk
    tracemalloc.start()
    try:
        with pytest.warns(DamagedEntryWarning, match="longer than"):
            assert CompileCache(unsigned).get(KEY) is None
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_a_huge_file_in_place_of_a_blob_after_the_check_takes_no_memory(unsigned):
    entry = CompileCache(unsigned).get(KEY)
    os.truncate(blob_of(unsigned), 256 << 20)
    tracemalloc.start()
    try:
        with pytest.raises(DamagedEntry):
            entry.read("code.so")
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_a_size_that_no_disk_has_is_damage(unsigned):
    for size in (2**61, 10**4000):
        with pytest.raises(BadRecord, match="not well described"):
            record = replace(read_record(unsigned), files={"code.so": BlobRef("0" * 64, size)})
            decode_record(encode_record(record), KEY.digest)
