"""Bundles: what is exported comes back bit for bit, and trouble on this side leaves a sound cache."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
import zipfile
from pathlib import Path
from typing import Any

import pytest

from compile_cache import (
    BlobRef,
    BundleError,
    BundleReport,
    CacheWriteError,
    CompileCache,
    DamagedEntry,
    SigningKey,
    UntrustedEntryWarning,
    store,
)
from compile_cache import bundle as module
from compile_cache.records import decode_record
from tests.bundles import FILES, KEYS, LARGE, ONE, TWO, holds_exactly, refused, stored
from tests.entries import blob_of, contents, in_threads, one_line, record_of

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
        assert contents(CompileCache(tmp_path / "new").get(key)) == FILES[key]
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
    before = stored(source)
    CompileCache(source).export_bundle(tmp_path / "signed.zip", sign_with=mine)
    assert stored(source) == before  # only the records in the bundle carry it
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
    old = {name: (here / name).stat() for name in stored(here)}
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


def test_import_of_an_entry_in_use_leaves_its_record(here, bundle, source):
    entry, record = CompileCache(here).get(ONE), record_of(here, ONE).stat().st_ino
    blob_of(here, FILES[ONE]["code.so"]).unlink()
    report = CompileCache(here).import_bundle(bundle)
    assert len(report.entries) == 3 and record_of(here, ONE).stat().st_ino == record
    holds_exactly(here, KEYS, source)
    assert contents(entry) == FILES[ONE] and CompileCache(here).prune(max_bytes=1).in_use == (ONE.digest,)


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
        one_line(caught.value)
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
            one_line(caught.value)
            assert os.listdir(tmp_path) == ["here"]


# ---- trouble on this side --------------------------------------------------------------------------------------------


def test_a_cache_that_cannot_be_written(here, bundle):
    before = stored(here)
    with pytest.raises(CacheWriteError, match="read_only=True") as caught:
        CompileCache(here, read_only=True).import_bundle(bundle)
    one_line(caught.value)
    assert stored(here) == before
    with pytest.raises(CacheWriteError, match="expected to write") as caught:
        CompileCache("/proc/no-such-place/cache").import_bundle(bundle)
    one_line(caught.value)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_disk_that_fails_while_unpacking(here, bundle, source, monkeypatch, nth, number):
    before, calls = stored(here), [0]
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
    assert calls[0] == nth and one_line(caught.value)
    assert stored(here) == before and not os.listdir(here / "v1/tmp")
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
    before = stored(here)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        CompileCache(here).import_bundle(bundle, progress=interrupt)
    assert stored(here) == before and not os.listdir(here / "v1/tmp")


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
            assert contents(cache.get(key)) in (None, FILES[key])
        cache.import_bundle(bundle)
        shutil.rmtree(location / "v1/tmp")
        holds_exactly(location, KEYS, source)
        if not killed:
            break
    assert not killed and seen == {0, 1, 2, 3} and nth > 8


def test_two_imports_at_once(bundle, source, tmp_path):
    reports: list[BundleReport] = []
    in_threads(4, lambda _: reports.append(CompileCache(tmp_path / "cache").import_bundle(bundle)), 30)
    assert len(reports) == 4 and all(len(report.entries) + len(report.kept) == 3 for report in reports)
    holds_exactly(tmp_path / "cache", KEYS, source)


def test_a_record_is_what_it_was(source, bundle):
    """A guard of the helpers."""
    with zipfile.ZipFile(bundle) as found:
        for key in KEYS:
            data = found.read(f"v1/actions/{key.digest}.json")
            assert data == record_of(source, key).read_bytes() and decode_record(data, key.digest).notes
