"""The cache in one process: what is stored comes back, and whatever is damaged is seen, reported and built again."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
import time
import warnings
from pathlib import Path

import pytest

from compile_cache import (
    BuildFailed,
    CacheKey,
    CacheLocationError,
    CacheWriteError,
    CompileCache,
    CompileCacheError,
    DamagedEntry,
    DamagedEntryWarning,
    UnstableFactor,
)
from tests.entries import FILES, blob_of, build, contents, forged, in_threads, never, one_line, record_of, snapshot

KEY = CacheKey({"model": "tiny", "environment": {"torch": "2.13.0", "flags": ["avx", "avx2"]}, "n": 1})


def tmp_files(location: Path) -> list[str]:
    return sorted(os.listdir(location / "v1/tmp"))


def blobs_of(location: Path) -> list[Path]:
    return sorted(path for path in (location / "v1/blobs").rglob("*") if path.is_file())


@pytest.fixture
def full(cache):
    cache.get_or_build(KEY, build)
    return cache


# ---- storing and finding ---------------------------------------------------------------------------------------------


def test_opening_and_missing_write_nothing(cache):
    assert cache.get(KEY) is None and list(cache.entries()) == [] and cache.verify().ok
    assert "holds no entries" in cache.explain(KEY)
    assert not cache.location.exists()


def test_round_trip_and_layout(cache):
    entry = cache.get_or_build(KEY, build)
    for found in (entry, cache.get_or_build(KEY, never), CompileCache(cache.location).get(KEY), *cache.entries()):
        assert found == entry and hash(found) == hash(entry)
        assert contents(found) == FILES
        assert found.notes == {"seconds": 12.5, "list": [1, None]} and found.factors == KEY.factors
        assert found.size == sum(map(len, FILES.values())) and found.created.endswith("+00:00")
    stored = snapshot(cache.location)
    blobs = {f"v1/blobs/{h[:2]}/{h}": data for data in FILES.values() for h in [hashlib.sha256(data).hexdigest()]}
    record = f"v1/actions/{KEY.digest[:2]}/{KEY.digest}.json"
    assert {name: data for name, data in stored.items() if "/blobs/" in name} == blobs
    used = f"v1/used/{KEY.digest[:2]}/{KEY.digest}"
    locks = {f"v1/locks/{KEY.digest}.lock", "v1/locks/store", "v1/locks/records"}
    assert set(stored) - set(blobs) == {"CACHEDIR.TAG", record, used, *locks}
    assert stored["CACHEDIR.TAG"].startswith(b"Signature: 8a477f597d28d172789f06886806bc55")
    body = json.loads(stored[record])
    rest = {name: value for name, value in body.items() if name != "checksum"}
    canonical = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    assert body["checksum"] == hashlib.sha256(canonical.encode()).hexdigest()
    with pytest.raises(KeyError, match=r"code\.so"):
        entry.read("absent")


def test_same_content_is_stored_once_and_linked(full):
    other = CacheKey({"model": "other"})
    before = blobs_of(full.location)
    linked = full.link(other, full.get(KEY))
    full.get_or_build(CacheKey({"model": "third"}), build)
    assert blobs_of(full.location) == before
    assert linked.factors == {"model": "other"} and full.get(other).read("code.so") == FILES["code.so"]
    assert full.verify().entries == 3


def test_link_needs_the_bytes_in_this_cache(full, tmp_path):
    elsewhere = CompileCache(tmp_path / "elsewhere")
    with pytest.raises(DamagedEntry, match="build it here first"):
        elsewhere.link(KEY, full.get(KEY))
    assert elsewhere.get(KEY) is None and elsewhere.verify().ok


def test_copied_cache_works(full, tmp_path):
    shutil.copytree(full.location, tmp_path / "copy")
    shutil.rmtree(full.location)
    copy = CompileCache(tmp_path / "copy")
    assert copy.verify().ok and copy.get_or_build(KEY, never).read("code.so") == FILES["code.so"]


def test_relative_location_survives_chdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cache = CompileCache("here")
    cache.get_or_build(KEY, build)
    monkeypatch.chdir("/")
    assert cache.get(KEY) is not None


def test_blobs_are_as_readable_as_the_umask_says(cache):
    def private(directory):
        (directory / "x").write_bytes(b"x")
        (directory / "x").chmod(0o600)

    cache.get_or_build(KEY, private)
    wanted = record_of(cache.location, KEY).stat().st_mode
    assert [path.stat().st_mode for path in blobs_of(cache.location)] == [wanted]


# ---- builds that fail ------------------------------------------------------------------------------------------------


def test_an_exception_of_the_build_passes_and_leaves_nothing(full):
    before = snapshot(full.location)

    def fails(directory):
        (directory / "half").write_bytes(b"x")
        raise ValueError("no compiler")

    other = CacheKey({"n": 2})
    with pytest.raises(ValueError, match=r"^no compiler$"):
        full.get_or_build(other, fails)
    after = snapshot(full.location)
    assert after.pop(f"v1/locks/{other.digest}.lock") == b"" and after == before and not tmp_files(full.location)
    assert full.get_or_build(other, build)


@pytest.mark.parametrize("make", ["nothing", "directory", "link", "name"])
def test_what_a_build_may_not_leave(cache, make):
    def bad(directory):
        if make == "directory":
            (directory / "a").mkdir()
        elif make == "link":
            (directory / "a").symlink_to("/etc/passwd")
        elif make == "name":
            (directory / "a\\b").write_bytes(b"x")

    with pytest.raises(BuildFailed, match=KEY.short):
        cache.get_or_build(KEY, bad)
    assert cache.get(KEY) is None and not tmp_files(cache.location) and not blobs_of(cache.location)


@pytest.mark.parametrize(("notes", "error"), [({"a": {1, 2}}, UnstableFactor), (3, BuildFailed)])
def test_notes_have_to_be_json(cache, notes, error):
    with pytest.raises(error, match=r"notes"):
        cache.get_or_build(KEY, lambda directory: build(directory) and notes)
    assert cache.get(KEY) is None and not tmp_files(cache.location) and not blobs_of(cache.location)


def test_a_build_that_asks_for_its_own_key_is_refused(cache):
    with pytest.raises(CompileCacheError, match="own key"):
        cache.get_or_build(KEY, lambda directory: cache.get_or_build(KEY, build).notes)
    inner = CacheKey({"inner": 1})
    assert cache.get_or_build(KEY, lambda directory: build(directory) and cache.get_or_build(inner, build).notes)


# ---- damage ----------------------------------------------------------------------------------------------------------


def assert_detected_and_rebuilt(location: Path, victim: Path) -> None:
    """The victim is damaged: verify and every way to read see it, nothing crashes, and a rebuild heals the cache."""
    cache = CompileCache(location)
    assert not cache.verify().ok, victim
    assert victim.relative_to(location).as_posix() in [path for path, _ in cache.verify().damaged]
    assert "damaged" in one_line(cache.explain(KEY))
    with pytest.raises(DamagedEntry):
        cache.find(KEY.digest)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        list(cache.entries())
        assert cache.get(KEY) is None
    assert caught and {warning.category for warning in caught} == {DamagedEntryWarning}
    assert all(one_line(warning.message) for warning in caught)
    built = []
    entry = cache.get_or_build(KEY, lambda directory: built.append(1) or build(directory))
    assert built == [1] and contents(entry) == FILES
    assert cache.verify().ok, cache.verify()


def test_every_flipped_byte_of_a_record_is_detected(full):
    path = record_of(full.location, KEY)
    whole = path.read_bytes()
    for offset in range(len(whole)):
        for mask in (0x01, 0x2A, 0x80):  # 0x2a turns a space into a line feed
            path.write_bytes(whole[:offset] + bytes([whole[offset] ^ mask]) + whole[offset + 1 :])
            with pytest.raises(DamagedEntry):
                full.find(KEY.digest)
    path.write_bytes(whole)
    assert full.get(KEY) is not None


@pytest.mark.parametrize("place", [0.0, 0.1, 0.37, 0.5, 0.8, 0.999])
@pytest.mark.parametrize("kind", ["record", "blob0", "blob1"])
def test_flipped_bytes_are_reported_and_rebuilt(full, kind, place):
    victim = record_of(full.location, KEY) if kind == "record" else blobs_of(full.location)[int(kind[-1])]
    data = bytearray(victim.read_bytes())
    data[int(place * len(data))] ^= 0x10
    victim.write_bytes(data)
    assert_detected_and_rebuilt(full.location, victim)
    assert os.listdir(full.location / "v1/damaged")


@pytest.mark.parametrize("kind", ["record", "blob0", "blob1"])
@pytest.mark.parametrize("keep", ["nothing", "half", "all but one", "one more"])
def test_truncation(full, kind, keep):
    victim = record_of(full.location, KEY) if kind == "record" else blobs_of(full.location)[int(kind[-1])]
    data = victim.read_bytes()
    ends = {"nothing": b"", "half": data[: len(data) // 2], "all but one": data[:-1], "one more": data + b"\n"}
    victim.write_bytes(ends[keep])
    assert_detected_and_rebuilt(full.location, victim)


GARBAGE = {
    "not utf-8": b"\xff\xfe\x00",
    "null": b"null",
    "list": b"[1]",
    "deep": b"[" * 100_000,
    "deep object": b'{"a":' * 100_000,
    "nan": b'{"format": NaN}',
    "long int": b'{"format": ' + b"9" * 10_000 + b"}",
    "empty object": b"{}",
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_in_place_of_a_record(full, name):
    record_of(full.location, KEY).write_bytes(GARBAGE[name])
    assert_detected_and_rebuilt(full.location, record_of(full.location, KEY))


@pytest.mark.parametrize("kind", ["record", "blob"])
def test_directory_in_place_of_a_file(full, kind):
    victim = record_of(full.location, KEY) if kind == "record" else blobs_of(full.location)[0]
    victim.unlink()
    (victim / "inside").mkdir(parents=True)
    assert_detected_and_rebuilt(full.location, victim)


def test_pipe_in_place_of_a_file_does_not_block(full):
    victim = record_of(full.location, KEY)
    victim.unlink()
    os.mkfifo(victim)
    assert_detected_and_rebuilt(full.location, victim)


def test_file_in_place_of_a_shard_directory(full):
    shard = record_of(full.location, KEY).parent
    shutil.rmtree(shard)
    shard.write_bytes(b"x")
    assert full.get(KEY) is None
    assert not full.verify().ok
    full.get_or_build(KEY, build)
    assert full.get(KEY) is not None and full.verify().ok


def test_missing_blob(full):
    blobs_of(full.location)[0].unlink()
    assert_detected_and_rebuilt(full.location, record_of(full.location, KEY))


def forge(path: Path, change) -> None:
    """Change what a record says, with a checksum that fits."""
    body = json.loads(path.read_bytes())
    change(body)
    path.write_bytes(forged(body))


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body["factors"].update(n=2),
        lambda body: body.update(key="0" * 64),
        lambda body: body.update(format=0),
        lambda body: body.update(format=True),
        lambda body: body.update(files={}),
        lambda body: body["files"].update({"../../outside": body["files"]["code.so"]}),
        lambda body: body["files"]["code.so"].update(sha256="../../../../etc/passwd"),
        lambda body: body["files"]["code.so"].update(size=-1),
        lambda body: body.update(extra=1),
        lambda body: body.update(notes=None),
    ],
)
def test_forged_records(full, change):
    forge(record_of(full.location, KEY), change)
    assert_detected_and_rebuilt(full.location, record_of(full.location, KEY))


def test_a_record_of_a_later_version_is_no_damage(full):
    path = record_of(full.location, KEY)
    forge(path, lambda body: body.update(format=2, more="of it"))
    stored = snapshot(full.location)
    with pytest.warns(DamagedEntryWarning, match="record format 2, this version reads format 1"):
        assert full.get(KEY) is None
    assert snapshot(full.location) == stored and full.stats.misses_by_reason["foreign"] == 1
    report = full.verify(repair=True)
    assert report.ok and len(report.foreign) == 1 and snapshot(full.location) == stored
    assert full.prune().orphans == 0 and snapshot(full.location) == stored  # what it needs cannot be told


def test_a_changed_value_is_told_by_the_checksum(full):
    path = record_of(full.location, KEY)
    path.write_bytes(path.read_bytes().replace(b"12.5", b"12.6"))
    with pytest.raises(DamagedEntry, match="checksum"):
        full.find(KEY.digest)


def test_forge_without_a_change_is_accepted(full):
    forge(record_of(full.location, KEY), lambda body: None)
    assert full.get(KEY) is not None


def test_record_under_another_name(full):
    other = CacheKey({"n": 9})
    record_of(full.location, other).parent.mkdir(exist_ok=True)
    shutil.copy(record_of(full.location, KEY), record_of(full.location, other))
    with pytest.warns(DamagedEntryWarning, match="another key"):
        assert full.get(other) is None


def test_read_checks_the_bytes_again(full):
    entry = full.get(KEY)
    path = blob_of(full.location)
    path.write_bytes(b"\1" + FILES["code.so"][1:])
    with pytest.raises(DamagedEntry, match=r"code\.so"):
        entry.read("code.so")
    path.unlink()
    with pytest.raises(DamagedEntry, match="No such file"):
        entry.read("code.so")


def test_a_record_replaced_after_it_was_read_is_not_moved_away(full, monkeypatch):
    blob = blobs_of(full.location)[0]
    whole = blob.read_bytes()
    blob.write_bytes(whole[:-1])
    check = full._store.check_blob

    def check_then_rebuild(ref, **options):  # another process heals the entry right after we saw the damage
        try:
            check(ref, **options)
        finally:
            if blob.stat().st_size != len(whole):
                monkeypatch.setattr(full._store, "check_blob", check)
                CompileCache(full.location).get_or_build(KEY, build)

    monkeypatch.setattr(full._store, "check_blob", check_then_rebuild)
    with pytest.warns(DamagedEntryWarning):
        assert full.get(KEY) is None
    assert full.get(KEY) is not None and full.verify().ok


def test_verify_repair_and_orphans(full):
    other = CacheKey({"n": 2})
    full.get_or_build(other, lambda directory: (directory / "only").write_bytes(b"only here") and None)
    record_of(full.location, other).unlink()
    report = full.verify()
    assert report.ok and len(report.orphan_blobs) == 1 and (report.entries, report.blobs) == (1, 3)
    assert report.bytes == sum(map(len, FILES.values())) + len(b"only here")
    victim = blobs_of(full.location)[0]
    victim.write_bytes(b"")
    (full.location / "v1/blobs/stray").write_bytes(b"")
    (full.location / "v1/actions/00").mkdir(exist_ok=True)
    (full.location / "v1/actions/00/notes.txt").write_bytes(b"")
    before = snapshot(full.location)
    damaged = dict(full.verify().damaged)
    assert {victim.relative_to(full.location).as_posix(), "v1/blobs/stray", "v1/actions/00/notes.txt"} <= set(damaged)
    assert snapshot(full.location) == before
    assert dict(full.verify(repair=True).damaged) == damaged
    assert full.verify().ok and sorted(snapshot(full.location).values()) == sorted(before.values())


# ---- looking around --------------------------------------------------------------------------------------------------


def test_nearest_and_explain(full):
    full.get_or_build(CacheKey({"model": "far", "n": 9}), build)
    wanted = CacheKey({**KEY.factors, "environment": {"torch": "2.12.1", "flags": ["avx", "avx2"]}})
    near = full.nearest(wanted)
    assert [len(n.differences) for n in near] == sorted(len(n.differences) for n in near) and len(near) == 2
    assert near[0].entry.digest == KEY.digest and str(near[0].differences[0]) in full.explain(wanted)
    assert full.explain(wanted).endswith("environment.torch: 2.12.1 here, 2.13.0 there")
    assert len(full.nearest(wanted, limit=1)) == 1
    assert "present" in full.explain(KEY)
    many = full.explain(CacheKey({str(i): i for i in range(50)}))
    assert many.count(" here, ") == 3 and re.search(r"and \d+ more$", many) and "\n" not in many


# ---- writing where it is not possible --------------------------------------------------------------------------------


@pytest.mark.parametrize("make", ["file", "below a file", "empty", "nul", "too long"])
def test_bad_locations(tmp_path, make):
    (tmp_path / "file").write_bytes(b"")
    places = {"file": tmp_path / "file", "below a file": tmp_path / "file/a/b", "empty": "", "nul": "a\0b"}
    with pytest.raises(CacheLocationError, match="expected"):
        CompileCache(places.get(make, "x" * 5000))


def test_read_only_reads_and_refuses(full):
    before = snapshot(full.location)
    cache = CompileCache(full.location, read_only=True)
    assert cache.get_or_build(KEY, never).read("code.so") == FILES["code.so"]
    for refused in (
        cache.require_writable,
        lambda: cache.get_or_build(CacheKey({"n": 2}), never),
        lambda: cache.link(CacheKey({"n": 2}), cache.get(KEY)),
        lambda: cache.verify(repair=True),
    ):
        with pytest.raises(CacheWriteError, match="read_only=True"):
            refused()
    blobs_of(full.location)[0].write_bytes(b"")
    with pytest.warns(DamagedEntryWarning, match="left in place"):
        assert cache.get(KEY) is None
    assert set(snapshot(full.location)) == set(before)


def test_location_that_cannot_be_created():
    with pytest.raises(CacheWriteError, match="expected to write") as caught:
        CompileCache("/proc/no-such-place/cache").require_writable()
    one_line(caught.value)


def test_require_writable_leaves_only_the_layout(cache):
    cache.require_writable()
    assert set(snapshot(cache.location)) == {"CACHEDIR.TAG"} and cache.verify().ok


def test_old_junk_is_swept_on_the_first_write(full):
    tmp = full.location / "v1/tmp"
    long_ago = time.time() - 25 * 3600
    for name, times in (("old", long_ago), ("new", time.time() - 23 * 3600), ("busy", long_ago)):
        (tmp / name).mkdir()
        (tmp / name / "f").write_bytes(b"x")
        for path in (tmp / name / "f", tmp / name):
            os.utime(path, (times, times))
    os.utime(tmp / "busy/f")
    (tmp / "old-file").write_bytes(b"x")
    os.utime(tmp / "old-file", (long_ago, long_ago))
    full.get_or_build(CacheKey({"n": 2}), build)
    assert len(tmp_files(full.location)) == 4  # this cache has swept already
    CompileCache(full.location).get_or_build(CacheKey({"n": 3}), build)
    assert tmp_files(full.location) == ["busy", "new"]


# ---- threads ---------------------------------------------------------------------------------------------------------


def test_threads_build_one_key_once(cache):
    built, found = [], []

    def slow(directory):
        built.append(threading.get_ident())
        time.sleep(0.1)
        return build(directory)

    def work(_):
        found.append(cache.get_or_build(KEY, slow))

    in_threads(8, work, 20)
    assert len(built) == 1 and len(found) == 8 and len(set(found)) == 1


def test_other_keys_are_not_waited_for(cache):
    inside, release = threading.Event(), threading.Event()

    def slow(directory):
        inside.set()
        assert release.wait(20)
        return build(directory)

    thread = threading.Thread(target=cache.get_or_build, args=(KEY, slow))
    thread.start()
    try:
        assert inside.wait(20)
        assert cache.get_or_build(CacheKey({"n": 2}), build)  # would hang if it waited
        assert cache.get(KEY) is None
    finally:
        release.set()
        thread.join(20)
    assert cache.get(KEY) is not None
