"""Processes that are killed, that race, and that run out of disk: the cache opens, verifies and builds again."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import compile_cache
from compile_cache import CacheKey, CacheWriteError, CompileCache

ROOT = Path(compile_cache.__file__).parents[1]
OLD, NEW = CacheKey({"n": "old"}), CacheKey({"n": "new"})

PRELUDE = """
import errno, os, signal, sys, time
from pathlib import Path
from compile_cache import CacheKey, CompileCache, CacheWriteError
OLD, NEW = CacheKey({"n": "old"}), CacheKey({"n": "new"})
def build(directory):
    for name in ("one", "two"):
        (directory / name).write_bytes(name.encode() * 1000)
cache = CompileCache(sys.argv[1])
"""

KILL = """
names, when, n = sys.argv[2].split(","), sys.argv[3], int(sys.argv[4])
calls = 0
def deadly(real):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == n and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **kwargs)
        if calls == n and when == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call
for name in names:
    setattr(os, name, deadly(getattr(os, name)))
cache.get_or_build(NEW, build)
print(calls)
"""

KILL_IN_BUILD = """
def deadly(directory):
    (directory / "one").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
cache.get_or_build(NEW, deadly)
"""

RACE = """
start, log = Path(sys.argv[2]), Path(sys.argv[3])
def slow(directory):
    with open(log, "a") as file:
        file.write(f"{os.getpid()}\\n")
    time.sleep(0.3)
    build(directory)
Path(str(start) + f".{os.getpid()}").touch()
while not start.exists():
    time.sleep(0.005)
print(cache.get_or_build(NEW, slow).read("two").decode()[:3])
"""

HOLD = """
def slow(directory):
    Path(sys.argv[2]).touch()
    time.sleep(60)
cache.get_or_build(NEW, slow)
"""

FULL_DISK = """
def large(directory):
    (directory / "code").write_bytes(os.urandom(600_000))
def growing(directory):
    for i in range(10_000):
        (directory / str(i)).write_bytes(os.urandom(4096))
cache.get_or_build(OLD, build)
before = sorted(str(p) for p in cache.location.rglob("*") if "locks" not in str(p))
for attempt in (large, growing):
    try:
        cache.get_or_build(NEW, attempt)
    except CacheWriteError as error:
        print(error)
after = sorted(str(p) for p in cache.location.rglob("*") if "locks" not in str(p))
assert after == before, (before, after)
assert cache.get(OLD) and cache.verify().ok
assert cache.get_or_build(NEW, build)
"""

READ_ONLY_DISK = """
assert cache.get(OLD).read("one") and cache.verify().ok and cache.get(NEW) is None
try:
    cache.get_or_build(NEW, build)
except CacheWriteError as error:
    print(error)
next((cache.location / "v1/blobs").rglob("*"))
"""


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PRELUDE + code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run(code: str, *arguments: object) -> tuple[int, str, str]:
    process = start(code, *arguments)
    out, err = process.communicate(timeout=60)
    return process.returncode, out.strip(), err


def build(directory: Path) -> None:
    for name in ("one", "two"):
        (directory / name).write_bytes(name.encode() * 1000)


def wait_for(condition) -> None:
    limit = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < limit, "took too long"
        time.sleep(0.005)


def assert_sound_and_rebuilds(location: Path) -> None:
    cache = CompileCache(location)
    assert cache.verify().ok, cache.verify()
    assert cache.explain(NEW)
    assert cache.get(OLD) is None or cache.get(OLD).read("old") == b"old"
    found = cache.get(NEW)  # a warning would fail here, see the marks below
    for entry in (found, cache.get_or_build(NEW, build)):
        assert entry is None or entry.read("one") + entry.read("two") == b"one" * 1000 + b"two" * 1000
    assert cache.get(NEW) is not None and cache.verify().ok


pytestmark = pytest.mark.filterwarnings("error")


def test_killed_during_the_build(tmp_path):
    assert run(KILL_IN_BUILD, tmp_path)[0] == -signal.SIGKILL
    cache = CompileCache(tmp_path)
    assert os.listdir(tmp_path / "v1/tmp") and cache.get(NEW) is None
    begun = time.monotonic()
    assert_sound_and_rebuilds(tmp_path)
    assert time.monotonic() - begun < 5  # the lock of the dead builder was free


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("names", ["replace", "fsync"])
def test_killed_at_every_rename_and_flush(tmp_path, names, when):
    total = int(run(KILL, tmp_path / "counted", names, when, 0)[1])
    assert total >= 4  # the tag, two blobs, the record
    seen = set()
    for n in range(1, total + 1):
        location = tmp_path / str(n)
        CompileCache(location).get_or_build(OLD, lambda directory: (directory / "old").write_bytes(b"old") and None)
        (location / "CACHEDIR.TAG").unlink()  # so that its rename is tried too
        code, _, err = run(KILL, location, names, when, n)
        assert code == -signal.SIGKILL, err
        cache = CompileCache(location)
        assert cache.get(OLD) is not None
        seen.add((len(cache.verify().orphan_blobs), cache.get(NEW) is not None))
        assert_sound_and_rebuilds(location)
    if names == "replace":  # the points of the commit were really hit
        assert (2, False) in seen and (1, False) in seen and ((0, True) in seen) == (when == "after")


def test_two_processes_build_once(tmp_path):
    log, go = tmp_path / "log", tmp_path / "go"
    processes = [start(RACE, tmp_path / "cache", go, log) for _ in range(3)]
    wait_for(lambda: len(list(tmp_path.glob("go.*"))) == 3)
    go.touch()
    assert [process.communicate(timeout=30)[0].strip() for process in processes] == ["two"] * 3
    assert len(log.read_text().splitlines()) == 1
    assert CompileCache(tmp_path / "cache").verify().ok


def test_a_waiter_takes_over_from_a_dead_builder(tmp_path):
    holder = start(HOLD, tmp_path / "cache", tmp_path / "inside")
    wait_for((tmp_path / "inside").exists)
    waiter = start("print(cache.get_or_build(NEW, build).read('one')[:3])", tmp_path / "cache")
    try:
        with pytest.raises(subprocess.TimeoutExpired):  # it does wait
            waiter.communicate(timeout=1)
    finally:
        holder.kill()
    assert holder.wait(10) == -signal.SIGKILL
    assert waiter.communicate(timeout=10)[0].strip() == "b'one'"
    holder.communicate()
    assert_sound_and_rebuilds(tmp_path / "cache")


def in_small_file_system(code: str, directory: Path, size: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a mount namespace of its own, with the cache on a file system of ``size``; skip without one."""
    script = f'mount -t tmpfs -o size={size} tmpfs "$1" || exit 77; {before} exec "$2" -c "$3" "$1"'
    shell = ["unshare", "-Urm", "sh", "-c", script, "sh", str(directory), sys.executable, PRELUDE + code]
    try:
        done = subprocess.run(shell, cwd=ROOT, text=True, capture_output=True, timeout=60, check=False)
    except FileNotFoundError:
        pytest.skip("no unshare")
    if done.returncode == 77 or "unshare:" in done.stderr:
        pytest.skip("mount namespaces are not permitted")
    return done


def test_full_disk(tmp_path):
    done = in_small_file_system(FULL_DISK, tmp_path, "300k")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    assert len(lines) == 2 and all("No space left" in line and "free space" in line for line in lines)


def test_read_only_disk(tmp_path):
    fill = f'"$2" -c \'{PRELUDE.replace(chr(39), chr(34))}\ncache.get_or_build(OLD, build)\' "$1"; '
    done = in_small_file_system(READ_ONLY_DISK, tmp_path, "1m", fill + 'mount -o remount,ro "$1" || exit 77;')
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip().splitlines()) == 1 and "read_only=True" in done.stdout


@pytest.mark.parametrize("failing", ["write_synced", "hash_file", "replace", "mkdir"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_errors_while_writing(tmp_path, monkeypatch, failing, number):
    cache = CompileCache(tmp_path)
    cache.get_or_build(OLD, lambda directory: (directory / "old").write_bytes(b"old") and None)
    record = sorted(path for path in tmp_path.rglob("*") if path.is_file() and "locks" not in path.parts)

    def fails(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        places = {
            "write_synced": "compile_cache.store.write_synced",
            "hash_file": "compile_cache.cache.hash_file",
            "replace": "os.replace",
            "mkdir": "pathlib.Path.mkdir",
        }
        patch.setattr(places[failing], fails)
        with pytest.raises(CacheWriteError, match=os.strerror(number)) as caught:
            cache.get_or_build(NEW, build)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file() and "locks" not in path.parts) == record
    assert not os.listdir(tmp_path / "v1/tmp")
    assert_sound_and_rebuilds(tmp_path)


def test_disk_full_inside_the_build_and_other_errors_of_it(tmp_path):
    cache = CompileCache(tmp_path)

    def fails(number):
        def build(directory):
            raise OSError(number, os.strerror(number))

        return build

    with pytest.raises(CacheWriteError, match="No space left"):
        cache.get_or_build(NEW, fails(errno.ENOSPC))
    with pytest.raises(FileNotFoundError):  # for instance no compiler: not the fault of the cache
        cache.get_or_build(NEW, fails(errno.ENOENT))
    assert not os.listdir(tmp_path / "v1/tmp")
