"""Clocks that jump, and a file system that lies about renames and handles: nothing is lost, nothing is half there."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest

from compile_cache import CacheWriteError, CompileCache, DamagedEntryWarning, SigningKey
from compile_cache.cli import run
from compile_cache.usage import Usage, Use
from tests.entries import WEEK, fill, kept, key, one_line, right, set_used

pytestmark = pytest.mark.filterwarnings("error")


# ---- clocks ----------------------------------------------------------------------------------------------------------


def test_times_in_the_future_break_nothing(cache, monkeypatch, capsys):
    fill(cache, 0, 1, 2)
    for n in (0, 1, 2):
        cache.get(key(n))
    set_used(cache, 1, time.time() + 500 * WEEK)
    assert cache.prune(max_age=60).removed == ()
    assert run(["ls", str(cache.location)]) == 0 and key(1).short in capsys.readouterr().out
    assert cache.get(key(1)).last_used > "2030"
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 500 * WEEK)  # now all were used in the future
    assert cache.prune(max_age=60).removed == () and right(cache.get(key(0)), 0)
    monkeypatch.setattr(time, "time", lambda: real() + WEEK)
    set_used(cache, 1, real() + 500 * WEEK)
    cache.prune(max_age=86_400)
    assert kept(cache) == [1]


@pytest.mark.parametrize("moment", [1e12, -1e12, 1e300])
def test_times_that_no_calendar_has(cache, monkeypatch, moment):
    fill(cache, 0)
    monkeypatch.setattr(Usage, "of", lambda self, digest: Use(1, moment))
    assert right(cache.get(key(0)), 0) and cache.get(key(0)).last_used is None


def test_a_clock_that_jumps_makes_no_living_builder_dead(cache, monkeypatch):
    fill(cache, 0)
    dead = cache.location / "v1/tmp/build-1-dead"
    dead.mkdir()
    (dead / "half").write_bytes(b"half")
    real = time.time

    def build(directory):
        (directory / "early").write_bytes(b"early")
        monkeypatch.setattr(time, "time", lambda: real() + WEEK)
        CompileCache(cache.location).require_writable()
        assert not dead.exists() and (directory / "early").exists()

    assert cache.get_or_build(key(1), build).read("early") == b"early"


def test_a_clock_that_jumps_during_an_import(cache, monkeypatch, tmp_path):
    fill(cache, 0, 1).export_bundle(tmp_path / "bundle")
    new, real = CompileCache(tmp_path / "new"), time.time

    def jump(done, total):
        monkeypatch.setattr(time, "time", lambda: real() + WEEK)
        CompileCache(new.location).require_writable()

    new.import_bundle(tmp_path / "bundle", progress=jump)
    assert new.verify().ok and right(new.get(key(0)), 0) and not os.listdir(new.location / "v1/tmp")


# ---- a network file system -------------------------------------------------------------------------------------------


def no_such_file(real, done, nth):
    calls = iter(range(1, 1000))

    def replace(source, target):
        here = nth in (0, next(calls))
        if done or not here:
            real(source, target)
        if here:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", os.fspath(source))

    return replace


def test_a_rename_that_was_done_and_says_no(cache, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", no_such_file(os.replace, True, 0))
        fill(cache, 0, 1)
        cache.link(key(1), cache.get(key(0)))
        cache.sign(SigningKey.generate())
    assert cache.verify().ok and right(cache.get(key(0)), 0) and right(cache.get(key(1)), 0)
    assert not os.listdir(cache.location / "v1/tmp")


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_rename_that_was_not_done(cache, monkeypatch, nth):
    fill(cache, 0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", no_such_file(os.replace, False, nth))
        with pytest.raises(CacheWriteError) as caught:
            fill(cache, 1)
    assert one_line(caught.value) and kept(cache) == [0]
    assert cache.verify().ok and cache.get(key(1)) is None and not os.listdir(cache.location / "v1/tmp")
    assert right(fill(cache, 1).get(key(1)), 1)


def stale(monkeypatch, module, name, times):
    """The next calls for each file of the store say that its handle is stale."""
    real, seen = getattr(module, name), []

    def call(path, *args, **kwargs):
        inside = isinstance(path, str | Path) and {"actions", "blobs"} & set(Path(path).parts[-3:-2])
        if inside and seen.count(str(path)) < times:
            seen.append(str(path))
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(module, name, call)
    return seen


@pytest.mark.parametrize("module, name", [(os, "open"), (os, "stat")])
def test_stale_handles_are_tried_again(cache, monkeypatch, module, name):
    entry, found = fill(cache, 0).get(key(0)), 0
    for action in (lambda: right(cache.get(key(0)), 0), lambda: right(entry, 0), lambda: cache.verify().ok):
        with monkeypatch.context() as patch:
            seen = stale(patch, module, name, 1)
            assert action()
        found += len(seen)
    assert found


@pytest.mark.parametrize("module, name", [(os, "open"), (os, "stat")])
def test_what_cannot_be_read_now_is_a_miss_and_stays(cache, monkeypatch, module, name):
    fill(cache, 0)
    with monkeypatch.context() as patch:
        stale(patch, module, name, 1000)
        with pytest.warns(DamagedEntryWarning, match="left in place"):
            assert cache.get(key(0)) is None
    assert right(cache.get(key(0)), 0) and not os.listdir(cache.location / "v1/damaged")


def test_files_that_an_nfs_client_keeps(cache):
    fill(cache, 0)
    for path in (*cache.location.glob("v1/blobs/*"), *cache.location.glob("v1/actions/*")):
        (path / ".nfs000000000123").write_bytes(b"removed, and open somewhere")
    assert cache.verify().ok and right(cache.get(key(0)), 0) and kept(cache) == [0]
    assert len(cache.clean().removed) == 1 and cache.verify().ok
