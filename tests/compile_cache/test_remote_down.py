"""A remote that is down, hangs, or cannot be one: the cache goes on without it, and the process ends when it wants."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from compile_cache import CompileCache, Remote, RemoteError
from tests.entries import ROOT, contents
from tests.remotes import (
    KEY,
    OTHER,
    PRELUDE,
    THIRD,
    Place,
    Wire,
    builder,
    clock,
    files_of,
    filled,
    memory_place,
    record_at,
    run,
    warned,
    within,
)

SIZE, STEP = 10_000, 1000  # of a blob, and of what is asked for at a time


@pytest.fixture
def place() -> Place:
    return memory_place()


@pytest.fixture
def wire(monkeypatch) -> Wire:
    monkeypatch.setattr("compile_cache.remote.CHUNK", STEP)
    return Wire(monkeypatch, MemoryFileSystem)


@pytest.fixture
def hang() -> Iterator[threading.Event]:
    """Calls that wait for it go on when the test has ended."""
    event = threading.Event()
    yield event
    event.set()


# ---- down ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["refuses", "hangs", "no rights"])
def test_down(place, wire, hang, tmp_path, monkeypatch, how):
    filled(tmp_path / "builder", KEY, remote=place.remote(push=True))
    later = clock(monkeypatch)
    errors = {"refuses": ConnectionRefusedError("refused"), "no rights": PermissionError("Access Denied")}

    def fault(name, path):
        if how == "hangs":
            hang.wait(60)
        else:
            raise errors[how]

    wire.fault = fault
    cache = CompileCache(tmp_path / "cache", remote=place.remote(timeout=0.5, retry_after=60, push=True))
    wire.calls.clear()
    with warned("no answer for 0.5 s" if how == "hangs" else str(errors[how])):
        with within(5):
            assert cache.get(KEY) is None
        asked = len(wire.calls)
        with within(3):
            assert all(cache.get(key) is None for key in (KEY, OTHER, THIRD) for _ in range(3))
        assert contents(cache.get_or_build(KEY, builder(KEY))) == files_of(KEY)
        assert contents(cache.link(THIRD, cache.get(KEY))) == files_of(KEY)
        assert len(wire.calls) == asked and cache.stats.pushed_bytes == 0
    assert cache.verify().ok and cache.stats.remote_errors == 1
    wire.fault = lambda name, path: None
    later(61)
    filled(tmp_path / "builder", OTHER, remote=place.remote(push=True))
    with warned():
        assert contents(cache.get(OTHER)) == files_of(OTHER)  # asked again
        cache.get_or_build(THIRD, builder(THIRD))
        assert cache.push() == 3


@pytest.mark.parametrize("when", ["info", "put_file", "pipe_file"])
@pytest.mark.parametrize("how", ["refuses", "hangs"])
def test_a_remote_that_goes_down_while_it_is_written_to(place, wire, hang, tmp_path, when, how):
    def fault(name, path):
        if name == when:
            if how == "hangs":
                hang.wait(60)
            raise ConnectionRefusedError("refused")

    wire.fault = fault
    cache = CompileCache(tmp_path / "cache", remote=place.remote(timeout=0.4, patience=0.6, push=True))
    with warned("no answer" if how == "hangs" else "refused"), within(5):
        assert contents(cache.get_or_build(KEY, builder(KEY, 3 * SIZE))) == files_of(KEY, 3 * SIZE)
        cache.get_or_build(OTHER, builder(OTHER))
    assert cache.verify().ok and record_at(KEY) not in place.files()
    with within(5), pytest.raises(RemoteError, match="to answer, got") as caught:
        cache.push([OTHER.digest])
    assert "\n" not in str(caught.value)
    wire.fault = lambda name, path: None
    with warned():
        assert cache.push() == 2  # where it stopped
        assert contents(CompileCache(tmp_path / "other", remote=place.remote()).get(KEY)) == files_of(KEY, 3 * SIZE)


def test_a_large_file_may_take_longer_than_the_timeout_to_send(place, wire, tmp_path):
    wire.fault = lambda name, path: time.sleep(0.8) if name == "put_file" else None  # and tells nothing of its progress
    cache = CompileCache(tmp_path / "cache", remote=place.remote(timeout=0.5, push=True))
    with warned():
        cache.get_or_build(KEY, lambda directory: (directory / "code.so").write_bytes(b"x" * SIZE) and None)
    assert len(place.files()) == 2


def test_progress_is_as_good_as_an_answer(place, tmp_path, monkeypatch):
    def slow(self, source, target, callback, **options):
        for _ in range(8):
            time.sleep(0.12)
            callback.relative_update(1)
        return real(self, source, target, **options)

    real = MemoryFileSystem.put_file
    monkeypatch.setattr(MemoryFileSystem, "put_file", slow)
    with warned():
        filled(tmp_path / "cache", KEY, remote=place.remote(timeout=0.8, push=True))
    assert len(place.files()) == 3


def test_many_files_that_hang_are_waited_for_once(place, wire, hang, tmp_path):
    def build(directory):
        for i in range(12):
            (directory / str(i)).write_bytes(bytes([i]) * 100)

    CompileCache(tmp_path / "builder", remote=place.remote(push=True)).get_or_build(KEY, build)
    wire.fault = lambda name, path: "/blobs/" in path and hang.wait(60)
    cache = CompileCache(tmp_path / "cache", remote=place.remote(timeout=0.5, workers=2))
    with warned("no answer for 0.5 s"), within(2.5):
        assert cache.get(KEY) is None


def test_threads_that_meet_a_hanging_remote_give_one_warning(place, wire, hang, tmp_path):
    wire.fault = lambda name, path: hang.wait(60) and None
    cache = CompileCache(tmp_path / "cache", remote=place.remote(timeout=0.3))
    with warned("no answer"), within(5):
        threads = [threading.Thread(target=cache.get, args=(key,)) for key in (KEY, OTHER, THIRD)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def test_what_a_person_asks_for_is_told_as_an_error(place, wire, tmp_path):
    filled(tmp_path / "builder", KEY, OTHER, remote=place.remote(push=True))
    cache = CompileCache(tmp_path / "cache", remote=place.remote())

    def refuses(name, path):
        raise ConnectionRefusedError("refused")

    wire.fault = refuses
    with warned("refused"):
        assert cache.get(KEY) is None
    for work in (cache.pull, lambda: cache.pull([KEY.digest])):
        with warned(), pytest.raises(RemoteError, match="refused"):
            work()
    wire.fault = lambda name, path: refuses(name, path) if "/blobs/" in path else None
    with warned(), pytest.raises(RemoteError, match="refused"):
        cache.pull()
    wire.fault = lambda name, path: None
    with warned():
        assert len(cache.pull()) == 2  # though get would not ask for a while
    assert cache.verify().ok


@pytest.mark.parametrize("error", [ConnectionRefusedError("refused"), FileNotFoundError("no such key file")])
def test_a_remote_that_is_down_when_the_cache_is_opened(place, tmp_path, monkeypatch, error):
    """Some file systems connect when they are made."""
    later = clock(monkeypatch)
    filled(tmp_path / "builder", KEY, remote=place.remote(push=True))

    def fails(*arguments, **options):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("fsspec.core.url_to_fs", fails)
        with warned(str(error)):
            cache = CompileCache(tmp_path / "cache", remote=place.remote())
            assert cache.get(KEY) is None
        later(61)
        with warned(str(error)):
            assert cache.get(KEY) is None
    later(61)
    with warned():
        assert contents(cache.get(KEY)) == files_of(KEY)


def test_no_credentials_in_what_is_told(tmp_path, caplog, monkeypatch):
    wire = Wire(monkeypatch, MemoryFileSystem)

    def fault(name, path):
        raise OSError("no route to memory://me:pass%40word@host/x")

    wire.fault = fault
    remote = Remote("memory://me:pass@word@host/cache", options={"key": "sesame"}, push=True)
    cache = CompileCache(tmp_path, remote=remote)
    with warned("memory://***@host/cache"):
        cache.get_or_build(KEY, builder(KEY))
    with pytest.raises(RemoteError) as caught:
        cache.push()
    with pytest.raises(RemoteError) as unknown:
        CompileCache(tmp_path, remote="xyz://me:pass@word@host/cache")
    told = [caplog.text, str(caplog.records[0].__dict__), repr(remote), repr(cache), str(caught.value)]
    for text in (*told, str(unknown.value)):
        assert "word" not in text and "sesame" not in text, text


# ---- the end of the process ------------------------------------------------------------------------------------------

HANGING = """
from fsspec.implementations.memory import MemoryFileSystem
asked = threading.Event()
def hang(self, path, **options):
    if sys.argv[2] in path:
        asked.set()
        time.sleep(60)
    return real(self, path, **options)
real = MemoryFileSystem.cat_file
CompileCache(sys.argv[1] + "/a", remote=Remote("memory://x", push=True)).get_or_build(KEY, builder(KEY))
MemoryFileSystem.cat_file = hang
"""

GIVES_UP = """
warnings.simplefilter("ignore")
cache = CompileCache(sys.argv[1] + "/b", remote=Remote("memory://x", timeout=0.6))
assert cache.get(KEY) is None and asked.is_set()
"""

BUSY = """
cache = CompileCache(sys.argv[1] + "/b", remote=Remote("memory://x", timeout=60))
threading.Thread(target=cache.get, args=(KEY,), daemon=True).start()
assert asked.wait(20)
"""


@pytest.mark.parametrize("part", ["/actions/", "/blobs/"])
@pytest.mark.parametrize("code", [GIVES_UP, BUSY], ids=["gives up", "busy"])
def test_a_hanging_call_does_not_hold_up_the_end_of_the_process(tmp_path, code, part):
    run(HANGING + code, tmp_path, part, timeout=15)


CTRL_C = """
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is started with it ignored
from fsspec.implementations.memory import MemoryFileSystem
import compile_cache.remote
compile_cache.remote.CHUNK = 1000
CompileCache(sys.argv[1] + "/a", remote=Remote("memory://x", push=True)).get_or_build(KEY, lambda directory: [
    (directory / str(i)).write_bytes(bytes([i]) * 500_000) for i in range(4)] and None)
def slow(self, path, **options):
    time.sleep(0.05)
    if "/blobs/" in path:
        os.write(1, b"asked\\n")
    return real(self, path, **options)
real, MemoryFileSystem.cat_file = MemoryFileSystem.cat_file, slow
CompileCache(sys.argv[1] + "/b", remote=Remote("memory://x")).pull()
"""


def test_ctrl_c_ends_a_pull(tmp_path):
    command = [sys.executable, "-c", PRELUDE + CTRL_C, str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "asked\n"
    process.send_signal(signal.SIGINT)
    with within(5):
        _, errors = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT and "KeyboardInterrupt" in errors


# ---- what cannot be --------------------------------------------------------------------------------------------------


def test_a_read_only_cache_has_no_remote(tmp_path):
    with pytest.raises(RemoteError, match="read_only=True") as caught:
        CompileCache(tmp_path, read_only=True, remote="memory://x")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "hidden", "text"),
    [("xyz://host/x", None, "xyz"), ("s3://b/x", "s3fs", "s3fs"), ("gs://b/x", "gcsfs", "gcsfs")],
)
def test_protocols_that_are_not_installed(tmp_path, monkeypatch, url, hidden, text):
    if hidden:
        monkeypatch.setitem(sys.modules, hidden, None)
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, text.removesuffix("fs"), raising=False)
    with pytest.raises(RemoteError, match=text) as caught:
        CompileCache(tmp_path, remote=url)
    assert "install" in str(caught.value) and "\n" not in str(caught.value)


def test_without_fsspec(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(RemoteError, match="fsspec"):
        CompileCache(tmp_path, remote="memory://x")


def test_options_that_do_not_fit(tmp_path):
    pytest.importorskip("s3fs")
    with pytest.raises(RemoteError, match="either key or username"):
        CompileCache(tmp_path, remote=Remote("s3://bucket/x", options={"key": "a", "username": "b"}))
    with pytest.raises(RemoteError, match="options"):
        CompileCache(tmp_path, remote=Remote("memory://x", options=3))


BAD: dict[str, list[object]] = {
    "url": ["", "  ", 3, None],
    "timeout": [0, -1, float("nan"), "10", None],
    "patience": [0, True],
    "retry_after": [-0.1],
    "workers": [0, 1.5, True],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_bad_values_of_a_remote(name, value):
    with pytest.raises(RemoteError, match=f"^{name}: expected") as caught:
        Remote(**{"url": "memory://x", name: value})
    assert "\n" not in str(caught.value)


def test_no_limit_of_time(place, tmp_path):
    for_ever = dict.fromkeys(("timeout", "patience", "retry_after"), float("inf"))
    cache = filled(tmp_path / "cache", KEY, remote=place.remote(push=True, **for_ever))
    other = CompileCache(tmp_path / "other", remote=place.remote(**for_ever))
    with warned():
        assert other.get(OTHER) is None and contents(other.get(KEY)) == files_of(KEY)
        assert other.pull() == [] and cache.push() == 1
