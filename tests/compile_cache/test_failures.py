"""Builds that failed are remembered; work of a process that died is cleared away; a cache opens again elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from compile_cache import CacheKey, CacheWriteError, CompileCache
from compile_cache.failures import MAX_AGE

KEY = CacheKey({"part": "one"})


def write(directory: Path) -> None:
    (directory / "code").write_bytes(b"machine code")


@pytest.fixture
def cache(tmp_path: Path) -> CompileCache:
    cache = CompileCache(tmp_path / "cache")
    cache.require_writable()
    return cache


class TestFailures:
    def test_a_failure_is_remembered_with_its_error_and_counted(self, cache: CompileCache) -> None:
        assert cache.failures.of(KEY.digest) is None
        cache.failures.note(KEY.digest, "no such\noperator")
        cache.failures.note(KEY.digest, "out of memory")
        failure = CompileCache(cache.location).failures.of(KEY.digest)
        assert failure is not None and (failure.error, failure.attempts) == ("out of memory", 2)
        assert "its build failed at" in cache.explain(KEY) and "out of memory" in cache.explain(KEY)
        assert cache.failures.digests() == [KEY.digest]

    def test_an_entry_ends_it(self, cache: CompileCache) -> None:
        cache.failures.note(KEY.digest, "out of memory")
        cache.get_or_build(KEY, write)
        assert cache.failures.of(KEY.digest) is None

    def test_it_counts_for_seven_days(self, cache: CompileCache) -> None:
        cache.failures.note(KEY.digest, "out of memory")
        path = cache.location / "v1" / "failed" / f"{KEY.digest}.json"
        old = path.stat().st_mtime - MAX_AGE - 1
        os.utime(path, (old, old))
        assert cache.failures.of(KEY.digest) is None

    @pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"error": 1}', b"\xff", b"[" * 20_000])
    def test_what_cannot_be_read_counts_as_nothing(self, cache: CompileCache, content: bytes) -> None:
        cache.failures.note(KEY.digest, "out of memory")
        (cache.location / "v1" / "failed" / f"{KEY.digest}.json").write_bytes(content)
        assert cache.failures.of(KEY.digest) is None
        assert "holds no entries" in cache.explain(KEY)

    def test_a_link_is_not_followed(self, cache: CompileCache, tmp_path: Path) -> None:
        cache.failures.note(KEY.digest, "out of memory")
        path = cache.location / "v1" / "failed" / f"{KEY.digest}.json"
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
        assert cache.failures.of(KEY.digest) is None

    def test_a_read_only_cache_writes_nothing(self, cache: CompileCache) -> None:
        reader = CompileCache(cache.location, read_only=True)
        assert reader.failures.note(KEY.digest, "out of memory").attempts == 1
        assert cache.as_read_only().failures.note(KEY.digest, "out of memory").attempts == 1
        assert cache.failures.of(KEY.digest) is None

    def test_clean_forgets(self, cache: CompileCache) -> None:
        cache.failures.note(KEY.digest, "out of memory")
        cache.clean()
        assert cache.failures.digests() == []

    def test_only_digests_are_names(self, cache: CompileCache) -> None:
        with pytest.raises(ValueError, match="64 hexadecimal digits"):
            cache.failures.of("../secret")


_DIES = """
import os, sys
from compile_cache import CacheKey, CompileCache
cache = CompileCache(sys.argv[1])
with cache.workspace() as work:
    (work / "part").write_bytes(b"x")
    def build(directory):
        (directory / "part").write_bytes(b"x")
        os.kill(os.getpid(), 9)
    cache.get_or_build(CacheKey({"part": "one"}), build)
"""


class TestWorkspace:
    def test_it_is_gone_afterwards(self, cache: CompileCache) -> None:
        with cache.workspace() as work:
            (work / "file").write_text("x")
            assert work.parent == cache.location / "v1" / "tmp"
            cache.clear_after(os.getpid())  # somebody works in it
            assert work.exists()
        assert not work.exists()

    def test_not_in_a_read_only_cache(self, cache: CompileCache) -> None:
        with pytest.raises(CacheWriteError, match="read_only=True"), cache.as_read_only().workspace():
            pass

    def test_work_of_a_killed_process_is_cleared(self, cache: CompileCache) -> None:
        tmp = cache.location / "v1" / "tmp"
        process = subprocess.Popen([sys.executable, "-c", _DIES, str(cache.location)], cwd=Path(__file__).parents[2])
        assert process.wait() == -9
        assert len(list(tmp.glob(f"*-{process.pid}-*"))) == 2
        cache.clear_after(process.pid)
        assert list(tmp.iterdir()) == []
        assert cache.get_or_build(KEY, write).size == 12


def test_a_read_only_view_shares_its_counters(cache: CompileCache) -> None:
    view = cache.as_read_only()
    assert view.get(KEY) is None and cache.stats.misses_by_reason["absent"] == 1
    assert view.read_only and not cache.read_only
