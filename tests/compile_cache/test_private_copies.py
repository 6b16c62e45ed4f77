"""Private copies: what is loaded is what was checked, and it goes with its process."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest

from compile_cache import CacheKey, CompileCache, DamagedEntry
from tests.entries import EVIL, FILES, KEY, OTHER, blob_of, build, builder, in_time, python, snapshot, write


def test_the_private_copy(unsigned):
    entry = CompileCache(unsigned).get(KEY)
    path = entry.path
    assert snapshot(path) == FILES and entry.path == path
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700 and path.parent.stat().st_uid == os.geteuid()
    assert os.path.commonpath([path, unsigned]) not in (str(unsigned), str(path))
    assert sorted(os.listdir(path.parent)) == sorted(set(os.listdir(path.parent)) | {path.name})
    assert not [name for name in os.listdir(path.parent) if name.startswith("tmp")]


def test_entries_with_the_same_files_share_a_copy(unsigned, tmp_path):
    cache = CompileCache(tmp_path / "another")
    other = cache.get_or_build(OTHER, build)
    assert other.path == CompileCache(unsigned).get(KEY).path
    same_bytes = {"renamed.so": FILES["code.so"]}
    renamed = cache.get_or_build(CacheKey({"n": 3}), builder(same_bytes))
    assert renamed.path != other.path and snapshot(renamed.path) == same_bytes


def test_what_is_loaded_is_what_was_checked(unsigned):
    cache = CompileCache(unsigned)
    path = cache.get(KEY).path
    blob_of(unsigned).write_bytes(EVIL)  # after the check, before the loader comes
    assert snapshot(path) == FILES
    shutil.rmtree(path)
    entry = next(cache.entries())  # looks at sizes only
    before = set(os.listdir(path.parent))
    with pytest.raises(DamagedEntry, match=r"code\.so"):
        entry.path  # noqa: B018
    assert set(os.listdir(path.parent)) == before


def test_a_cleaner_of_temporary_files_does_no_harm(unsigned):
    entry = CompileCache(unsigned).get(KEY)
    path = entry.path
    (path / "code.so").unlink()
    assert snapshot(entry.path) == FILES
    shutil.rmtree(path.parent)
    path.mkdir(parents=True)  # somebody else takes the name, and puts his code there
    path.parent.chmod(0o755)
    write(path, dict.fromkeys(FILES, EVIL))
    assert snapshot(entry.path) == FILES and entry.path != path
    shutil.rmtree(path.parent)


COPIES = """
import os, sys
from pathlib import Path
from compile_cache import CompileCache
from tests.entries import KEY
entry = CompileCache(sys.argv[1]).get(KEY)
path = entry.path
child = os.fork()
if not child:
    if sys.argv[2] == "uses":
        assert entry.path != path and (entry.path / "code.so").read_bytes() == (path / "code.so").read_bytes()
        print(entry.path, flush=True)
    sys.exit(0)  # with all that runs at exit
assert os.waitpid(child, 0)[1] == 0
assert (path / "code.so").exists() and entry.path == path, "the child removed it"
print(path)
"""


@pytest.mark.parametrize("child", ["uses", "leaves"])
def test_a_copy_goes_with_its_process_and_no_other(unsigned, child):
    lines = python(COPIES, unsigned, child).splitlines()
    assert len(lines) == len(set(lines)) == (2 if child == "uses" else 1)
    assert not any(Path(line).exists() or Path(line).parent.exists() for line in lines)


def test_a_fork_while_another_thread_copies(unsigned):
    entry = CompileCache(unsigned).get(KEY)
    from compile_cache import unpacked

    with unpacked._Own.lock:  # held by another thread at the moment of the fork
        child = os.fork()
        if not child:
            code = 1
            try:
                code = 0 if snapshot(entry.path) == FILES else 1
                shutil.rmtree(entry.path.parent)
            finally:
                os._exit(code)
    assert in_time(lambda: os.waitpid(child, 0)[1]) == 0
