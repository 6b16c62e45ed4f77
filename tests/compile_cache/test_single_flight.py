"""Many processes and threads, some of them killed: each key is built once, waiters take over, readers never wait.

Run as a program, this file is a process of one thread that forks the workers of a test.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import sys
import time
import traceback
import uuid
import warnings
from collections import Counter
from contextlib import suppress
from pathlib import Path

import filelock
import pytest

from compile_cache import CompileCache
from compile_cache.leases import locked
from tests.entries import data, fill, in_threads, in_time, key, program, right, write

WORKERS, KEYS, KILLS = 8, 50, 30
SOON = 2.0  # seconds within which a waiter has to take over


class Log:
    """Lines of all processes in one file; each is appended by one write."""

    def __init__(self, path):
        self.descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def __call__(self, *words):
        os.write(self.descriptor, (" ".join(map(str, (os.getpid(), *words))) + "\n").encode())


def worker(location, log, seed):
    """Get or build every key, in an order of its own."""
    order = random.Random(seed)
    cache = CompileCache(location)
    for n in order.sample(range(KEYS), KEYS):

        def build(directory, n=n):
            name = uuid.uuid4().hex
            log("start", n, name)
            time.sleep(order.uniform(0.01, 0.06))
            write(directory, data(n))
            log("finish", n, name)
            return {"build": name}

        entry = cache.get_or_build(key(n), build)
        log("got", n, entry.notes["build"])
        if not right(entry, n):
            log("wrong", n, "-")
    assert all(cache.get(key(n)) for n in range(KEYS))
    log("done", "-", "-")


def forked(function, *arguments):
    pid = os.fork()
    if pid:
        return pid
    try:
        function(*arguments)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def swarm(location, log_path, seed):
    """Run the workers, kill some (builders rather than others), and start another for each one that was killed."""
    rng, log = random.Random(seed), Log(log_path)
    alive = {forked(worker, location, log, started) for started in range(WORKERS)}
    killed, started, failed = 0, WORKERS, 0
    while alive:
        time.sleep(rng.uniform(0.005, 0.03))
        victim = -1  # none
        if killed < KILLS:
            last = {int(line.split()[0]): line.split()[1] for line in Path(log_path).read_text().splitlines()}
            building = sorted(pid for pid in alive if last.get(pid) in ("start", "finish"))
            victim = rng.choice(building if building and rng.random() < 0.8 else sorted(alive))
            os.kill(victim, signal.SIGKILL)
        pid, status = os.waitpid(victim, os.WNOHANG if victim == -1 else 0)
        if not pid:
            continue
        alive.discard(pid)
        if os.WIFSIGNALED(status):
            killed += 1
            alive.add(forked(worker, location, log, started))
            started += 1
        failed += not os.WIFSIGNALED(status) and status != 0
    print(json.dumps({"killed": killed, "failed": failed}))


pytestmark = pytest.mark.filterwarnings("error")


def test_each_key_is_built_once_however_many_builders_are_killed(tmp_path):
    begun = time.monotonic()
    process = program(__file__, "swarm", tmp_path / "cache", tmp_path / "log", 7)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    words = Counter(word for _, word, _, _ in lines)
    print(json.loads(out), dict(words), f"{time.monotonic() - begun:.1f} s")
    counts = json.loads(out)
    assert counts["failed"] == 0 and 5 <= counts["killed"] <= KILLS, (counts, err)  # fewer where builds end sooner
    assert words["done"] == WORKERS and not words["wrong"]
    assert KEYS <= words["finish"] <= words["start"] <= KEYS + KILLS
    last = {pid: (word, n, name) for pid, word, n, name in lines}
    for n in map(str, range(KEYS)):
        served = {name for _, word, number, name in lines if word == "got" and number == n}
        assert len(served) == 1, n  # nobody ever got another build of that key: it was stored once
        finished = {name: pid for pid, word, number, name in lines if word == "finish" and number == n}
        assert served <= set(finished)
        for name in set(finished) - served:  # killed between the end of its build and the commit
            assert last[finished[name]] == ("finish", n, name)
    cache = CompileCache(tmp_path / "cache")
    report = cache.verify()
    assert report.ok and report.entries == KEYS
    assert time.monotonic() - begun < 100


def test_threads_build_each_key_once(tmp_path):
    cache, built, wrong = CompileCache(tmp_path), Counter(), []

    def build(directory, n):
        built[n] += 1
        time.sleep(0.005)
        write(directory, data(n))

    def work(seed):
        for n in random.Random(seed).sample(range(20), 20):
            entry = cache.get_or_build(key(n), lambda directory, n=n: build(directory, n))
            if not right(entry, n):
                wrong.append(n)

    in_threads(8, work)
    assert built == dict.fromkeys(range(20), 1) and not wrong
    assert cache.stats.builds == 20 and cache.verify().ok


# ---- a builder that dies, with others waiting ------------------------------------------------------------------------


def hold(location, child_too):
    """Build for ever; with ``child_too``, in a process that has forked a child which does nothing and lives on."""

    def build(directory):
        if child_too and not os.fork():
            time.sleep(60)
            os._exit(0)
        print("building", flush=True)
        time.sleep(60)

    CompileCache(location).get_or_build(key(0), build)


def take_over(location):
    def build(directory):
        print("building", time.monotonic(), flush=True)
        write(directory, data(0))

    print("waiting", flush=True)
    CompileCache(location).get_or_build(key(0), build)


def line_of(process, seconds=30):
    assert select.select([process.stdout], [], [], seconds)[0], "took too long"
    return process.stdout.readline().split()


@pytest.mark.parametrize("child_too", [False, True], ids=["alone", "with a child that lives on"])
def test_a_waiter_takes_over_at_once(tmp_path, child_too):
    if child_too and int(filelock.__version__.split(".")[0]) < 4:
        pytest.skip("this filelock leaves the lock to a forked child")
    holder = program(__file__, "hold", tmp_path, child_too, start_new_session=True)
    waiters = []
    try:
        assert line_of(holder) == ["building"]
        waiters = [program(__file__, "take_over", tmp_path) for _ in range(3)]
        assert [line_of(waiter) for waiter in waiters] == [["waiting"]] * 3
        time.sleep(0.5)
        assert not any(waiter.poll() for waiter in waiters)
        killed = time.monotonic()
        os.kill(holder.pid, signal.SIGKILL)
        outs = [waiter.communicate(timeout=30) for waiter in waiters]
        took = [float(out.split()[1]) for out, _ in outs if out]
        assert [waiter.returncode for waiter in waiters] == [0] * 3, outs
        assert len(took) == 1 and took[0] - killed < SOON
        os.killpg(holder.pid, 0 if child_too else signal.SIGKILL)  # the child is still there
    except ProcessLookupError:
        assert not child_too
    finally:
        for waiter in waiters:
            waiter.kill()
        with suppress(ProcessLookupError):
            os.killpg(holder.pid, signal.SIGKILL)
        holder.communicate()


def test_a_forked_child_keeps_no_lock_of_the_store(tmp_path):
    cache = fill(CompileCache(tmp_path), 0)
    store = program(__file__, "fork_in_lock", tmp_path, start_new_session=True)
    try:
        assert line_of(store) == ["held"]
        os.kill(store.pid, signal.SIGKILL)
        store.wait(10)
        in_time(cache.prune, 20)
    finally:
        os.killpg(store.pid, signal.SIGKILL)
        store.communicate()


def fork_in_lock(location):
    """Another thread than the one that stores may fork: here, while the lock of the store is held."""
    with locked(Path(location, "v1/locks/store"), shared=True):
        if not os.fork():
            time.sleep(60)
            os._exit(0)
        print("held", flush=True)
        time.sleep(60)


# ---- readers ---------------------------------------------------------------------------------------------------------


def test_readers_wait_for_no_writer(tmp_path):
    cache = fill(CompileCache(tmp_path), 1)
    seconds = []

    def read():
        for _ in range(20):
            begun = time.monotonic()
            assert cache.get(key(1)).read("one") == data(1)["one"] and cache.get(key(0)) is None
            seconds.append(time.monotonic() - begun)

    holder = program(__file__, "hold", tmp_path, "")
    try:
        assert line_of(holder) == ["building"]  # it holds the lock of its key
        in_time(read)
    finally:
        holder.kill()
        holder.communicate()
    with locked(tmp_path / "v1/locks/store", shared=False):  # as a removal does
        in_time(read)
    assert len(seconds) == 40 and sorted(seconds)[len(seconds) // 2] < 0.5


if __name__ == "__main__":
    warnings.simplefilter("error")
    commands = {"hold": lambda location, child: hold(location, child == "True"), "swarm": swarm}
    commands |= {"take_over": take_over, "fork_in_lock": fork_in_lock}
    commands[sys.argv[1]](*sys.argv[2:])
