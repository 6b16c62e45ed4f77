"""What is removed and what never is: entries in use, pins, limits, and builders and removals at once."""

from __future__ import annotations

import copy
import errno
import os
import pickle
import random
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest

from compile_cache import CacheWriteError, CompileCache, DamagedEntryWarning, SigningKey, store
from compile_cache.usage import Usage
from tests.entries import WEEK, fill, in_threads, kept, key, program, record_of, right, set_used, writes

pytestmark = pytest.mark.filterwarnings("error")


# ---- in use ----------------------------------------------------------------------------------------------------------


def test_an_entry_of_another_process_stays_until_that_ends(cache):
    fill(cache, 0, 1)
    holder = program(__file__, "hold", cache.location, 0)
    try:
        assert holder.stdout.readline() == "held\n"
        report = cache.prune(max_bytes=1)
        assert [gone.digest for gone in report.removed] == [key(1).digest] and report.in_use == (key(0).digest,)
        assert cache.clean().removed == () and right(cache.get(key(0)), 0)
    finally:
        holder.kill()
        holder.communicate()
    assert len(cache.prune(max_bytes=1).removed) == 1 and kept(cache) == []
    assert cache.verify().blobs == 0


@pytest.mark.parametrize("replace", ["sign", "link", "build"])
def test_an_entry_stays_readable_when_its_record_is_replaced(cache, replace):
    entry = fill(cache, 0, 1).get(key(0))
    if replace == "sign":
        cache.sign(SigningKey.generate())
    elif replace == "link":
        cache.link(key(0), cache.get(key(1)))
    else:
        record_of(cache.location, key(0)).write_bytes(b"damaged")
        with pytest.warns(DamagedEntryWarning):
            cache.get_or_build(key(0), writes(2))
    for remove in (cache.prune, lambda: cache.prune(max_bytes=1), cache.clean):
        remove()
        assert replace == "build" or right(entry, 0)
    assert cache.verify().ok
    del entry
    cache.clean()
    assert kept(cache) == [] and cache.verify().blobs == 0 and not list((cache.location / "v1").glob("held/*"))


@pytest.mark.parametrize("then", ["it is replaced again", "the cache is opened again"])
def test_a_replaced_record_that_nobody_holds_any_more_goes(cache, then):
    entry = fill(cache, 0, 1).get(key(0))
    cache.link(key(0), cache.get(key(1)))
    held = cache.location / "v1/held"
    assert len(os.listdir(held)) == 1
    fill(CompileCache(cache.location), 2)  # still in use
    assert len(os.listdir(held)) == 1 and right(entry, 0)
    del entry
    if then == "it is replaced again":
        cache.link(key(0), cache.get(key(2)))
    else:
        fill(CompileCache(cache.location), 3)
    assert not os.listdir(held)


def test_records_that_are_replaced_at_once_lose_no_holder(cache, monkeypatch):
    """Of who holds the record of another that replaces it, too."""
    fill(cache, 0, 1, 2, 3)
    entries = [cache.get(key(n)) for n in range(4)]
    lost, rename = [], store.rename

    def slowly(source, target):
        time.sleep(0.002)
        rename(source, target)

    def replace(n):
        for _ in range(20):
            entry = cache.link(key(9), entries[n])
            time.sleep(0.005)
            if os.fstat(entry._lease._descriptor).st_nlink == 0:  # a removal would not see that it is in use
                lost.append(n)

    monkeypatch.setattr(store, "rename", slowly)

    in_threads(4, replace)
    assert not lost
    fill(CompileCache(cache.location), 4)
    assert not os.listdir(cache.location / "v1/held")


def test_copies_of_an_entry_hold_nothing_and_close_nothing(cache):
    entry = fill(cache, 0).get(key(0))
    for other in (copy.copy(entry), copy.deepcopy(entry), pickle.loads(pickle.dumps(entry))):
        assert right(other, 0)
    del other
    assert cache.prune(max_bytes=1).in_use == (key(0).digest,)
    del entry
    assert cache.prune(max_bytes=1).in_use == ()


def test_pins_count_for_limits_and_not_for_clean(cache):
    fill(cache, 0, 1).pin(key(0))
    cache.prune(max_bytes=1)
    assert kept(cache) == [0]
    cache.clean()
    assert kept(cache) == [] and not os.listdir(cache.location / "v1/pins")


def test_a_pin_that_was_set_is_never_missed(cache, monkeypatch):
    """Setting it while a removal is under way takes until that is done: who set it may rely on it."""
    fill(cache, 0)
    look, looks = Usage.is_pinned, []
    thread = threading.Thread(target=cache.pin, args=(key(0),))

    def slow(self, digest):
        looks.append(look(self, digest))
        if len(looks) == 2:  # the first look is before the lock
            thread.start()
            thread.join(0.3)
            looks.append(thread.is_alive())
        return looks[min(len(looks), 2) - 1]

    monkeypatch.setattr(Usage, "is_pinned", slow)
    cache.prune(max_bytes=1)
    thread.join(10)
    assert looks[:3] == [False, False, True] or kept(cache) == [0]
    assert key(0).digest in os.listdir(cache.location / "v1/pins")


def test_an_entry_larger_than_the_limit(tmp_path):
    cache = CompileCache(tmp_path, max_bytes=100)
    entry = cache.get_or_build(key(0), writes(0))
    assert right(entry, 0) and kept(cache) == [0]
    del entry
    assert right(cache.get_or_build(key(1), writes(1)), 1) and kept(cache) == [1]


def test_the_least_recently_used_go_first_and_shared_content_stays(cache):
    fill(cache, *range(6))
    moment = time.time() - WEEK
    for place, n in enumerate([3, 1, 5, 0, 4, 2]):
        cache.get(key(n))
        set_used(cache, n, moment + place)
    size = cache.prune(dry_run=True).bytes
    assert len(cache.prune(max_bytes=size - 2 * 3000 - 100).removed) == 2 and kept(cache) == [0, 2, 4, 5]
    assert len(cache.prune(max_bytes=size - 3 * 3000 - 100).removed) == 1 and kept(cache) == [0, 2, 4]
    assert cache.verify().ok and all(right(cache.get(key(n)), n) for n in kept(cache))
    for n in (0, 2):
        record_of(cache.location, key(n)).unlink()
    assert len(cache.verify().orphan_blobs) == 2
    assert cache.prune().orphans == 2 and right(cache.get(key(4)), 4)


def test_limits_that_cannot_be_applied_cost_no_entry(tmp_path, monkeypatch):
    cache = fill(CompileCache(tmp_path, max_bytes=10), 0)
    real = os.unlink

    def unlink(path, *args, **kwargs):
        if "actions" in Path(path).parts:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        real(path, *args, **kwargs)

    monkeypatch.setattr(os, "unlink", unlink)
    assert right(cache.get_or_build(key(1), writes(1)), 1)
    with pytest.raises(CacheWriteError):
        cache.prune()


def test_asking_what_would_go_makes_no_misses(cache):
    fill(cache, 0)
    asking = program(__file__, "ask", cache.location)
    try:
        assert asking.stdout.readline() == "asking\n"
        assert sum(cache.get(key(0)) is None for _ in range(2000)) == 0 and asking.poll() is None
    finally:
        asking.kill()
        asking.communicate()


def test_builders_and_removals_at_once(cache):
    processes = [program(__file__, "churn", cache.location, seed) for seed in range(3)]
    processes.append(program(__file__, "sweep", cache.location, 9))
    for process in processes:
        out, err = process.communicate(timeout=100)
        assert process.returncode == 0, err
        print(out.strip())
    assert cache.verify().ok and cache.prune(max_bytes=1).bytes == 0 and cache.verify().blobs == 0


# ---- as a program ----------------------------------------------------------------------------------------------------

SECONDS = 4.0


def hold(location, n):
    entry = CompileCache(location).get(key(int(n)))
    print("held", flush=True)
    time.sleep(60)
    del entry


def ask(location):
    print("asking", flush=True)
    while True:
        CompileCache(location).prune(max_bytes=1, dry_run=True)


def churn(location, seed):
    """Build, read, link and sign, under a limit that is far too small; keep some entries for a while."""
    rng, cache, end = random.Random(seed), CompileCache(location, max_bytes=40_000), time.monotonic() + SECONDS
    signer, some = SigningKey.generate(), []
    while time.monotonic() < end:
        n = rng.randrange(30)
        entry = cache.get_or_build(key(n), writes(n))
        some = [(entry, n), *some][: rng.randrange(6)]
        if rng.random() < 0.1:
            cache.link(key(n + 30), entry)
        if rng.random() < 0.1:
            cache.sign(signer, [entry.digest])
        found = cache.get(key(30 + rng.randrange(30)))
        assert found is None or right(found, int(found.factors["n"]) - 30)
        assert all(right(held, number) for held, number in some)
    print(cache.stats)


def sweep(location, seed):
    rng, cache, end = random.Random(seed), CompileCache(location), time.monotonic() + SECONDS
    gone = checks = 0
    while time.monotonic() < end:
        gone += len(cache.prune(max_bytes=rng.randrange(1, 60_000)).removed)
        if rng.random() < 0.1:
            gone += len(cache.clean().removed)
        report = cache.verify()
        assert report.ok, report
        checks += 1
    print(f"{gone} removed, {checks} checks")


if __name__ == "__main__":
    warnings.simplefilter("error")
    {"hold": hold, "ask": ask, "churn": churn, "sweep": sweep}[sys.argv[1]](*sys.argv[2:])
