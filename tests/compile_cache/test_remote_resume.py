"""A download that dies is continued, several that want one key share it, and a full disk here harms nothing."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from filelock import FileLock
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from compile_cache import CacheKey, CacheWriteError, CompileCache
from tests.entries import ROOT, contents
from tests.remotes import (
    KEY,
    OTHER,
    PRELUDE,
    Place,
    Wire,
    blob_at,
    clock,
    directory_place,
    files_of,
    filled,
    left_in_tmp,
    memory_place,
    run,
    warned,
    within,
)

SIZE, SMALL, STEP = 10_000, 40, 1000  # of the two files of an entry, and of what is asked for at a time


@pytest.fixture
def place() -> Place:
    return memory_place()


@pytest.fixture
def wire(monkeypatch) -> Wire:
    monkeypatch.setattr("compile_cache.remote.CHUNK", STEP)
    return Wire(monkeypatch, MemoryFileSystem)


def large(asked: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The ranges of the large blob."""
    return [(start, end) for start, end in asked if end != SMALL]


def ranges(first: int, last: int = SIZE) -> list[tuple[int, int]]:
    return [(start, start + STEP) for start in range(first, last, STEP)]


# ---- resume ----------------------------------------------------------------------------------------------------------


def dies_after(n: int, wire: Wire, error: Exception) -> None:
    """The n-th part of the large blob does not come, and then nothing does."""

    def fault(name, path):
        if len(large(wire.asked())) > n:
            raise error

    wire.fault = fault


@pytest.mark.parametrize("error", [ConnectionResetError("reset"), OSError("HTTP 500"), RuntimeError("a bug")])
def test_a_download_that_died_is_continued(place, wire, tmp_path, error):
    filled(tmp_path / "builder", KEY, size=SIZE, remote=place.remote(push=True))
    cache = CompileCache(tmp_path / "cache", remote=place.remote(retry_after=0, workers=1))
    dies_after(4, wire, error)
    with warned(str(error)):
        assert cache.get(KEY) is None
    assert not left_in_tmp(cache) and large(wire.asked()) == ranges(0, 5 * STEP)
    wire.calls.clear()
    wire.fault = lambda name, path: None
    with warned():
        assert contents(CompileCache(cache.location, remote=place.remote()).get(KEY)) == files_of(KEY, SIZE)
    assert large(wire.asked()) == ranges(4 * STEP)
    assert not list((cache.location / "v1/tmp").iterdir()) and cache.verify().ok


def test_files_that_were_whole_are_not_fetched_again(place, wire, tmp_path):
    def build(directory):
        for i in range(5):
            (directory / str(i)).write_bytes(bytes([i]) * 500)

    CompileCache(tmp_path / "builder", remote=place.remote(push=True)).get_or_build(KEY, build)
    cache = CompileCache(tmp_path / "cache", remote=place.remote(retry_after=0, workers=1))

    def fault(name, path):
        if len(wire.asked()) > 3:
            raise ConnectionResetError("reset")

    wire.fault = fault
    with warned("reset"):
        assert cache.get(KEY) is None
    wire.calls.clear()
    wire.fault = lambda name, path: None
    with warned():
        assert cache.get(KEY) is not None
    assert len(wire.asked()) == 2


def test_a_damaged_part_is_seen_and_fetched_anew(place, wire, tmp_path):
    filled(tmp_path / "builder", KEY, size=SIZE, remote=place.remote(push=True))
    cache = CompileCache(tmp_path / "cache", remote=place.remote(retry_after=0, workers=1))
    dies_after(4, wire, ConnectionResetError("reset"))
    with warned("reset"):
        assert cache.get(KEY) is None
    wire.fault = lambda name, path: None
    (part,) = (path for path in (cache.location / "v1/tmp").iterdir() if path.stat().st_size == 4 * STEP)
    part.write_bytes(b"\0" * 4 * STEP)
    with warned("SHA-256"):
        assert cache.get(KEY) is None
    assert not part.exists() and cache.verify().ok and not list(cache.digests())
    wire.calls.clear()
    with warned():
        assert contents(cache.get(KEY)) == files_of(KEY, SIZE)
    assert large(wire.asked()) == ranges(0)


def test_a_part_that_is_too_long_is_begun_anew(place, wire, tmp_path):
    filled(tmp_path / "builder", KEY, size=SIZE, remote=place.remote(push=True))
    cache = CompileCache(tmp_path / "cache", remote=place.remote(retry_after=0, workers=1))
    dies_after(4, wire, ConnectionResetError("reset"))
    with warned("reset"):
        assert cache.get(KEY) is None
    wire.fault = lambda name, path: None
    for part in (cache.location / "v1/tmp").iterdir():
        part.write_bytes(b"\0" * 2 * SIZE)
    with warned():
        assert contents(cache.get(KEY)) == files_of(KEY, SIZE)


KILLED = """
from fsspec.implementations.local import LocalFileSystem
import compile_cache.remote
compile_cache.remote.CHUNK = 1000
real, calls = LocalFileSystem.cat_file, []
def deadly(self, path, **options):
    calls.append(path)
    if sum("/blobs/" in path for path in calls) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, path, **options)
LocalFileSystem.cat_file = deadly
CompileCache(sys.argv[1], remote=Remote(sys.argv[2], workers=1)).get(KEY)
"""


def test_a_download_goes_on_after_the_process_was_killed(tmp_path, monkeypatch):
    place = directory_place(tmp_path / "remote")
    filled(tmp_path / "builder", KEY, size=SIZE, remote=place.remote(push=True))
    command = [sys.executable, "-c", PRELUDE + KILLED, str(tmp_path / "cache"), place.url]
    assert subprocess.run(command, cwd=ROOT, timeout=30, check=False).returncode == -signal.SIGKILL
    parts = [path.stat().st_size for path in (tmp_path / "cache/v1/tmp").iterdir()]
    assert 0 < sum(parts) < SIZE
    monkeypatch.setattr("compile_cache.remote.CHUNK", STEP)
    wire = Wire(monkeypatch, LocalFileSystem)
    cache = CompileCache(tmp_path / "cache", remote=place.remote())
    with warned():
        assert contents(cache.get(KEY)) == files_of(KEY, SIZE)
    assert cache.stats.pulled_bytes == SIZE + SMALL - sum(parts) == sum(end - start for start, end in wire.asked())


def test_a_slow_remote_gets_as_long_as_patience_says_and_stays_in_use(place, wire, tmp_path, monkeypatch):
    later = clock(monkeypatch)
    filled(tmp_path / "builder", KEY, OTHER, size=SIZE, remote=place.remote(push=True))

    def fault(name, path):
        if blob_at(KEY, size=SIZE) in path:
            time.sleep(0.2)

    wire.fault = fault
    cache = CompileCache(tmp_path / "cache", remote=place.remote(patience=0.8))
    with warned("in the time allowed"), within(5):
        assert cache.get(KEY) is None and cache.get(KEY) is None
        assert contents(cache.get(OTHER)) == files_of(OTHER, SIZE)  # it is slow, not down
    wire.fault = lambda name, path: None
    later(61)
    with warned():
        assert contents(cache.get(KEY)) == files_of(KEY, SIZE)
    assert cache.stats.pulled_bytes == 2 * (SIZE + SMALL)


# ---- several at once -------------------------------------------------------------------------------------------------


def test_threads_fetch_one_key_once(place, wire, tmp_path):
    filled(tmp_path / "builder", KEY, size=SIZE, remote=place.remote(push=True))
    wire.fault = lambda name, path: time.sleep(0.005)
    caches = [CompileCache(tmp_path / "cache", remote=place.remote()) for _ in range(2)]
    found = []
    threads = [threading.Thread(target=lambda c=cache: found.append(c.get(KEY))) for cache in caches for _ in range(2)]
    with warned():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [contents(entry) for entry in found] == [files_of(KEY, SIZE)] * 4
    assert sum(end - start for start, end in wire.asked()) == SIZE + SMALL
    assert sum(cache.stats.pulled_bytes for cache in caches) == SIZE + SMALL


def test_a_download_of_another_process_is_waited_for_as_long_as_patience_says(place, wire, tmp_path):
    filled(tmp_path / "builder", KEY, remote=place.remote(push=True))
    cache = CompileCache(tmp_path / "cache", remote=place.remote(patience=0.2, retry_after=0))
    cache.require_writable()
    with warned():
        with FileLock(cache.location / f"v1/locks/{KEY.digest}.pull.lock"), within(2):
            assert cache.get(KEY) is None
        assert contents(cache.get(KEY)) == files_of(KEY)


def test_who_waited_for_a_download_does_not_replace_the_record(place, wire, tmp_path):
    """An entry in use is held by its record file: a second one in its place would be free to be removed."""
    filled(tmp_path / "builder", KEY, remote=place.remote(push=True))
    first, second = (CompileCache(tmp_path / "cache", remote=place.remote()) for _ in range(2))
    held = []

    def fault(name, path):
        if "/actions/" in path and not held:
            held.append(None)
            held[0] = first.get(KEY)

    wire.fault = fault
    assert contents(second.get(KEY)) == files_of(KEY) == contents(held[0])
    report = CompileCache(tmp_path / "cache").prune(max_bytes=1)
    assert report.removed == () and report.in_use == (KEY.digest,) and contents(held[0]) == files_of(KEY)


PULL_ALL = """
keys = [CacheKey({"many": i}) for i in range(20)]
cache = CompileCache(sys.argv[1], remote=sys.argv[2])
warnings.simplefilter("error")
open(sys.argv[3], "w").close()
while not os.path.exists(sys.argv[4]):
    time.sleep(0.002)
found = [contents(cache.get(key)) == files_of(key) for key in keys]
print(sum(found), int(cache.stats.pulled_bytes), flush=True)
"""


def test_processes_that_pull_at_once(tmp_path):
    keys = [CacheKey({"many": i}) for i in range(20)]
    filled(tmp_path / "remote", *keys)
    arguments = [str(tmp_path / "cache"), f"file://{tmp_path / 'remote'}"]
    command = [sys.executable, "-c", PRELUDE + PULL_ALL, *arguments]
    ready = [tmp_path / f"ready{i}" for i in range(4)]
    started = [
        subprocess.Popen([*command, str(path), str(tmp_path / "go")], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for path in ready
    ]
    limit = time.monotonic() + 30
    while not all(path.exists() for path in ready) and time.monotonic() < limit:
        time.sleep(0.005)
    (tmp_path / "go").touch()
    told = [process.communicate(timeout=30)[0].split() for process in started]
    assert [found for found, _ in told] == ["20"] * 4
    assert sum(int(pulled) for _, pulled in told) == sum(len(data) for key in keys for data in files_of(key).values())
    cache = CompileCache(tmp_path / "cache")
    assert cache.verify().ok and cache.verify().entries == 20 and not list((tmp_path / "cache/v1/tmp").iterdir())


PUSH_AT_ONCE = """
import multiprocessing
from fsspec.implementations.local import LocalFileSystem
both = multiprocessing.Barrier(2)
def put(self, *arguments, **options):
    real(self, *arguments, **options)
    both.wait(10)  # each has written its file, neither has renamed it
real, LocalFileSystem.put_file = LocalFileSystem.put_file, put
cache = CompileCache(sys.argv[1], remote=sys.argv[2])
cache.get_or_build(KEY, lambda directory: (directory / "x").write_bytes(b"x" * 5000) and None)
child = os.fork()
cache.push()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_processes_that_push_one_key_at_once(tmp_path):
    place = directory_place(tmp_path / "remote")
    run(PUSH_AT_ONCE, tmp_path / "cache", place.url)
    assert len(place.files()) == 2 and CompileCache(tmp_path / "other", remote=place.remote()).pull() == [KEY.digest]


# ---- a full disk here ------------------------------------------------------------------------------------------------


class Full:
    """A file that takes the first bytes only."""

    def __init__(self, path: Path, mode: str, **options: object) -> None:
        self.file = path.open(mode)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.file.close()

    def tell(self):
        return self.file.tell()

    def flush(self):
        self.file.flush()

    def write(self, data):
        if self.file.tell() > 2 * STEP:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)


def no_space(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("failing", ["remote.open", "remote.hash_file", "store.write_synced", "store.rename"])
def test_a_full_disk(place, wire, tmp_path, monkeypatch, failing):
    filled(tmp_path / "builder", KEY, OTHER, size=SIZE, remote=place.remote(push=True))
    cache = CompileCache(tmp_path / "cache", remote=place.remote())
    later = clock(monkeypatch)
    cache.require_writable()
    with monkeypatch.context() as patch:
        patch.setattr(f"compile_cache.{failing}", Full if failing == "remote.open" else no_space, raising=False)
        with warned("No space left"):
            assert cache.get(KEY) is None and cache.get(KEY) is None  # one try, one warning
        with pytest.raises(CacheWriteError, match="No space left"):
            cache.pull()
    assert not left_in_tmp(cache) and cache.verify().ok and list(cache.digests()) == []
    with warned():
        assert contents(cache.get(OTHER)) == files_of(OTHER, SIZE)  # the remote is not to blame
        later(61)
        assert contents(cache.get(KEY)) == files_of(KEY, SIZE)
    assert not list((cache.location / "v1/tmp").iterdir())
