"""The second tier over S3, a directory and memory: what is missing here comes from there, checked, and goes there."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from compile_cache import (
    CacheKey,
    CompileCache,
    DamagedEntry,
    RemoteError,
    SigningKey,
)
from tests.entries import contents, never
from tests.remotes import (
    KEY,
    OTHER,
    THIRD,
    Place,
    Server,
    Wire,
    blob_at,
    builder,
    clock,
    directory_place,
    files_of,
    filled,
    left_in_tmp,
    memory_place,
    record_at,
    s3_server,
    warned,
)


@pytest.fixture(scope="module")
def s3() -> Iterator[Server]:
    with s3_server() as server:
        yield server


@pytest.fixture(params=["file", "memory", "s3"])
def place(request, tmp_path) -> Place:
    if request.param == "s3":
        return request.getfixturevalue("s3").place()
    return directory_place(tmp_path / "remote") if request.param == "file" else memory_place()


@pytest.fixture
def memory(monkeypatch) -> tuple[Place, Wire]:
    return memory_place(), Wire(monkeypatch, MemoryFileSystem)


# ---- reading and writing ---------------------------------------------------------------------------------------------


def test_read_through(place, tmp_path):
    first = filled(tmp_path / "first", KEY, remote=place.remote(push=True))
    second = CompileCache(tmp_path / "second", remote=place.remote())
    with warned():
        entry = second.get(KEY)
    assert contents(entry) == files_of(KEY) and entry == first.get(KEY) and entry.notes == {"seconds": 1.5}
    assert (second.stats.remote_hits, second.stats.hits, second.stats.builds) == (1, 0, 0)
    assert second.stats.pulled_bytes == sum(map(len, files_of(KEY).values()))
    for path in place.files():
        place.remove(path)
    with warned():
        assert second.get(KEY) == entry and second.get_or_build(KEY, never) == entry
    assert (second.stats.remote_hits, second.stats.hits) == (1, 2) and second.verify().ok
    assert not left_in_tmp(second) and not list((second.location / "v1/tmp").iterdir())


def test_write_back_is_a_choice(place, tmp_path):
    quiet = filled(tmp_path / "quiet", KEY, remote=place.remote())
    quiet.link(OTHER, quiet.get(KEY))
    assert place.files() == set() and quiet.stats.pushed_bytes == 0
    cache = filled(tmp_path / "cache", KEY, remote=place.remote(push=True))
    assert place.files() == {record_at(KEY), blob_at(KEY), blob_at(KEY, "deep/er/data.json")}
    sent = cache.stats.pushed_bytes
    assert sent == sum(len(place.read(path)) for path in place.files())
    cache.link(OTHER, cache.get(KEY))
    assert place.files() >= {record_at(OTHER)} and len(place.files()) == 4
    assert cache.stats.pushed_bytes == sent + len(place.read(record_at(OTHER)))  # no blob again
    assert contents(CompileCache(tmp_path / "second", remote=place.remote()).get(OTHER)) == files_of(KEY)


def test_a_better_record_at_the_remote_stays(place, tmp_path):
    """A signed one is not replaced by an unsigned one, nor one of a later format by ours."""
    cache = filled(tmp_path / "cache", KEY, remote=place.remote())
    signed = filled(tmp_path / "signed", KEY, remote=place.remote())
    signed.sign(SigningKey.generate())
    cache.push()
    signed.push()
    better = place.read(record_at(KEY))
    assert b"signatures" in better
    cache.push()
    assert place.read(record_at(KEY)) == better
    body = {**json.loads(better), "format": 2}
    body.pop("checksum")
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    body["checksum"] = hashlib.sha256(canonical.encode()).hexdigest()
    place.write(record_at(KEY), json.dumps(body, indent=1, sort_keys=True).encode() + b"\n")
    signed.push()
    assert b'"format": 2' in place.read(record_at(KEY))


def test_push_and_pull_of_all(place, tmp_path):
    cache = filled(tmp_path / "cache", KEY, OTHER, THIRD, remote=place.remote())
    assert CompileCache(tmp_path / "other", remote=place.remote()).pull() == []  # nothing is there yet
    assert cache.push([KEY.digest]) == 1 and record_at(OTHER) not in place.files()
    assert cache.push() == 3
    sent = cache.stats.pushed_bytes
    assert sent == sum(len(place.read(path)) for path in place.files())
    assert cache.push() == 3 and cache.stats.pushed_bytes == sent  # nothing again
    other = CompileCache(tmp_path / "other", remote=place.remote())
    with warned():
        assert other.pull([KEY.digest]) == [KEY.digest]
        assert sorted(other.pull()) == sorted([OTHER.digest, THIRD.digest]) and other.pull() == []
    assert other.verify().ok and [contents(other.get(key)) for key in (KEY, OTHER)] == [files_of(KEY), files_of(OTHER)]
    assert other.stats.pulled_bytes == 3 * sum(map(len, files_of(KEY).values()))
    with pytest.raises(DamagedEntry):
        cache.push([CacheKey({"n": "absent"}).digest])


def test_many_files_side_by_side_with_progress(place, tmp_path, monkeypatch):
    monkeypatch.setattr("compile_cache.remote.CHUNK", 400)

    def build(directory):
        for i in range(9):
            (directory / str(i)).write_bytes(bytes([i]) * (i * 250))

    total = sum(i * 250 for i in range(9))
    told: list[tuple[int, int]] = []
    threads = set()

    def progress(done, of):
        told.append((done, of))
        threads.add(threading.get_ident())

    cache = CompileCache(tmp_path / "cache", remote=place.remote(workers=3))
    cache.get_or_build(KEY, build)
    for work in (
        lambda: cache.push(progress=progress),
        lambda: cache.push(progress=progress),  # all is there: it still ends at the total
        lambda: CompileCache(tmp_path / "other", remote=place.remote(workers=3)).pull(progress=progress),
    ):
        told.clear()
        work()
        assert [done for done, _ in told] == sorted(done for done, _ in told) and told[-1] == (total, total)
        assert {of for _, of in told} == {total}
    assert len(threads) > 1
    entry = CompileCache(tmp_path / "other").get(KEY)
    assert {name: entry.read(name) for name in entry.files} == {str(i): bytes([i]) * (i * 250) for i in range(9)}


def test_an_error_of_the_progress_callback_reaches_its_caller(memory, tmp_path):
    place, _ = memory
    cache = filled(tmp_path / "cache", KEY, remote=place.remote(push=True))

    def fails(done, of):
        raise ZeroDivisionError("progress bar")

    for work in (cache.push, CompileCache(tmp_path / "other", remote=place.remote()).pull):
        with warned(), pytest.raises(ZeroDivisionError):
            work(progress=fails)


def test_the_record_goes_last(place, tmp_path):
    cache = filled(tmp_path / "cache", KEY, OTHER, remote=place.remote(push=True))
    place.remove(record_at(KEY))
    place.remove(blob_at(OTHER))
    other = CompileCache(tmp_path / "other", remote=place.remote(retry_after=0))
    with warned():
        assert other.get(KEY) is None  # blobs without a record: simply not there
    with warned("no blob"):
        assert other.get(OTHER) is None
    with warned("no blob"):
        assert contents(other.get_or_build(OTHER, builder(OTHER))) == files_of(OTHER)
    assert other.verify().ok and other.stats.builds == 1
    with warned():
        assert cache.push() == 2  # sends what is missing
        assert contents(CompileCache(tmp_path / "third", remote=place.remote()).get(OTHER)) == files_of(OTHER)


def test_the_record_is_sent_after_its_blobs(memory, tmp_path):
    place, wire = memory
    filled(tmp_path / "cache", KEY, remote=place.remote(push=True))
    sent = [name for name, *_ in wire.calls if name in ("put_file", "pipe_file")]
    assert sent == ["put_file", "put_file", "pipe_file"]


def test_a_copied_cache_directory_is_a_remote(tmp_path):
    filled(tmp_path / "cache", KEY, OTHER)
    shutil.copytree(tmp_path / "cache", tmp_path / "copy")
    shutil.rmtree(tmp_path / "cache")
    for url in (f"file://{tmp_path / 'copy'}/", str(tmp_path / "copy")):
        cache = CompileCache(tmp_path / f"other{len(url)}", remote=url)
        with warned():
            assert contents(cache.get(KEY)) == files_of(KEY)
            assert cache.pull() == [OTHER.digest] and cache.verify().ok


def test_empty_files(place, tmp_path):
    cache = CompileCache(tmp_path / "cache", remote=place.remote(push=True))
    cache.get_or_build(KEY, lambda directory: (directory / "empty").write_bytes(b"") or None)
    with warned():
        assert contents(CompileCache(tmp_path / "other", remote=place.remote()).get(KEY)) == {"empty": b""}


def test_a_miss_is_remembered_for_a_while(memory, tmp_path, monkeypatch):
    place, wire = memory
    later = clock(monkeypatch)
    cache = CompileCache(tmp_path / "cache", remote=place.remote(retry_after=60))
    with warned():
        assert cache.get(KEY) is None and cache.get(KEY) is None
        assert len(wire.asked("")) == 1
        filled(tmp_path / "builder", KEY, OTHER, remote=place.remote(push=True))
        assert contents(cache.get(OTHER)) == files_of(OTHER)  # other keys are asked for
        assert cache.get(KEY) is None
        later(40)
        assert cache.get(KEY) is None
        later(21)
        assert contents(cache.get(KEY)) == files_of(KEY)
    assert cache.stats.misses_by_reason["absent"] == 6


def test_what_a_person_pulls_is_asked_for_in_any_case(place, tmp_path):
    cache = CompileCache(tmp_path / "cache", remote=place.remote(retry_after=1000))
    assert cache.get(KEY) is None
    filled(tmp_path / "builder", KEY, remote=place.remote(push=True))
    with warned():
        assert cache.get(KEY) is None and cache.pull([KEY.digest]) == [KEY.digest]


def test_listings_that_a_file_system_keeps(memory, tmp_path, monkeypatch):
    """Some look for a file in a listing that they made earlier, as those of the Hugging Face hub and of Google do."""
    place, wire = memory
    listings: dict[str, set[str]] = {}

    def fault(name, path):
        known = listings.setdefault(path.rpartition("/")[0], set(MemoryFileSystem.store))
        if name in ("cat_file", "info") and path not in known:
            raise FileNotFoundError(path)

    def forget(self, path=""):
        listings.pop(path.rpartition("/")[0], None)

    wire.fault = fault
    monkeypatch.setattr(MemoryFileSystem, "invalidate_cache", forget)
    cache = CompileCache(tmp_path / "cache", remote=place.remote(retry_after=0))
    with warned():
        assert cache.get(KEY) is None
        filled(tmp_path / "builder", KEY, remote=place.remote(push=True))  # another process
        assert contents(cache.get(KEY)) == files_of(KEY)


# ---- damage ----------------------------------------------------------------------------------------------------------


def flipped(data: bytes) -> bytes:
    return data[:50] + bytes([data[50] ^ 1]) + data[51:]


DAMAGE = {
    "record flipped": lambda place: place.write(record_at(KEY), flipped(place.read(record_at(KEY)))),
    "record cut": lambda place: place.write(record_at(KEY), place.read(record_at(KEY))[:-1]),
    "record empty": lambda place: place.write(record_at(KEY), b""),
    "record swapped": lambda place: place.write(record_at(KEY), place.read(record_at(OTHER))),
    "record of 20 MB": lambda place: place.write(record_at(KEY), b" " * (20 << 20)),
    "blob flipped": lambda place: place.write(blob_at(KEY), flipped(place.read(blob_at(KEY)))),
    "blob cut": lambda place: place.write(blob_at(KEY), place.read(blob_at(KEY))[:-1]),
    "blob empty": lambda place: place.write(blob_at(KEY), b""),
    "blob longer": lambda place: place.write(blob_at(KEY), b"\0" + place.read(blob_at(KEY))),
    "blob swapped": lambda place: place.write(blob_at(KEY), place.read(blob_at(OTHER))),
    "blob gone": lambda place: place.remove(blob_at(KEY)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_at_the_remote(place, tmp_path, damage):
    filled(tmp_path / "builder", KEY, OTHER, remote=place.remote(push=True))
    DAMAGE[damage](place)
    cache = CompileCache(tmp_path / "cache", remote=place.remote(push=True))
    with warned(KEY.digest[:12]):
        assert cache.get(KEY) is None and cache.get(KEY) is None  # that key is left alone
        assert contents(cache.get(OTHER)) == files_of(OTHER)  # the others are not
    assert cache.verify().ok and not cache.verify().orphan_blobs and not left_in_tmp(cache)
    assert cache.stats.remote_errors == 1 and list(cache.digests()) == [OTHER.digest]
    with warned():
        assert contents(cache.get_or_build(KEY, builder(KEY))) == files_of(KEY)
        healed = CompileCache(tmp_path / "healed", remote=place.remote())  # what was damaged was sent again
        assert contents(healed.get(KEY)) == files_of(KEY)


@pytest.mark.parametrize("victim", [record_at, blob_at])
def test_a_directory_in_place_of_a_file(place, tmp_path, victim):
    filled(tmp_path / "builder", KEY, OTHER, remote=place.remote(push=True))
    place.remove(victim(KEY))
    place.write("v1/other", b"")
    place.fs.makedirs(f"{place.root}/{victim(KEY)}", exist_ok=True)
    place.write(f"{victim(KEY)}/inside", b"x")
    cache = CompileCache(tmp_path / "cache", remote=place.remote())
    absent = victim is record_at and not place.url.startswith("file")  # there is no such object
    with warned(*([] if absent else [KEY.digest[:12]])):
        assert cache.get(KEY) is None and contents(cache.get(OTHER)) == files_of(OTHER)
    assert cache.verify().ok and list(cache.digests()) == [OTHER.digest]


def test_a_record_that_gives_one_blob_two_sizes(memory, tmp_path):
    place, _ = memory
    filled(tmp_path / "builder", KEY, remote=place.remote(push=True))
    body = json.loads(place.read(record_at(KEY)))
    body["files"]["again"] = {**body["files"]["code.so"], "size": 7}
    body.pop("checksum")
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    body["checksum"] = hashlib.sha256(canonical.encode()).hexdigest()
    place.write(record_at(KEY), (json.dumps(body, indent=1, sort_keys=True) + "\n").encode())
    cache = CompileCache(tmp_path / "cache", remote=place.remote())
    with warned("two sizes"):
        assert cache.get(KEY) is None
    assert cache.verify().ok and not list(cache.digests())


# ---- trust -----------------------------------------------------------------------------------------------------------


def test_only_signed_entries_are_taken_where_trust_is_set(memory, tmp_path):
    place, wire = memory
    key = SigningKey.generate()
    filled(tmp_path / "unsigned", KEY, remote=place.remote(push=True))
    filled(tmp_path / "signed", OTHER, sign_with=key, remote=place.remote(push=True))
    filled(tmp_path / "stranger", THIRD, sign_with=SigningKey.generate(), remote=place.remote(push=True))
    (tmp_path / "cache").mkdir(mode=0o700)
    cache = CompileCache(tmp_path / "cache", trust=key.public, remote=place.remote())
    with warned(KEY.digest[:12], THIRD.digest[:12]):
        assert cache.get(KEY) is None and cache.get(THIRD) is None
    assert not wire.asked("/blobs/") and cache.stats.pulled_bytes == 0 and not list(cache.digests())
    with warned():
        assert contents(cache.get(OTHER)) == files_of(OTHER) and cache.verify().ok
    with warned(*sorted([KEY.digest[:12], THIRD.digest[:12]])):
        assert cache.pull() == []


def test_a_cache_without_a_remote(tmp_path):
    cache = CompileCache(tmp_path)
    for work in (cache.push, cache.pull):
        with pytest.raises(RemoteError, match="pass remote="):
            work()
