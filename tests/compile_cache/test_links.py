"""Links, pipes and devices in the directory of a cache: nothing is waited for or written through them."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest

from compile_cache import CacheLocationError, CacheWriteError, CompileCache, DamagedEntry, DamagedEntryWarning
from tests.entries import FILES, KEY, OTHER, blob_of, build, in_time, one_line, record_of, sha256, signer, used_of

MINE = signer(1)


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "victim"
    path.write_bytes(b"valuable")
    os.utime(path, (1, 1))
    return path


def untouched(victim: Path) -> bool:
    return victim.read_bytes() == b"valuable" and victim.stat().st_mtime == 1


def plant(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def test_a_use_is_not_counted_through_a_link(unsigned, victim, tmp_path):
    plant(used_of(unsigned), victim)
    assert CompileCache(unsigned).get(KEY) is not None and untouched(victim)
    plant(used_of(unsigned), tmp_path / "created")
    assert CompileCache(unsigned).get(KEY) is not None and not (tmp_path / "created").exists()


@pytest.mark.parametrize("name", [f"{OTHER.digest}.lock", "store", "records"])
def test_a_lock_is_not_taken_through_a_link(unsigned, victim, tmp_path, name):
    for target in (victim, tmp_path / "created"):
        plant(unsigned / "v1/locks" / name, target)
        with pytest.raises(CacheWriteError) as caught:
            in_time(lambda: CompileCache(unsigned).get_or_build(OTHER, build))
        one_line(caught.value)
    assert untouched(victim) and not (tmp_path / "created").exists() and CompileCache(unsigned).get(KEY)


def test_a_pin_is_not_made_through_a_link(unsigned, victim, tmp_path):
    for target in (victim, tmp_path / "created"):
        plant(unsigned / "v1/pins" / KEY.digest, target)
        with pytest.raises(CacheWriteError):
            CompileCache(unsigned).pin(KEY)
    assert untouched(victim) and not (tmp_path / "created").exists()
    CompileCache(unsigned).unpin(KEY)
    assert untouched(victim)


LAYOUT = ["v1", "v1/actions", "v1/blobs", "v1/tmp", "v1/locks", "v1/damaged", "v1/used", "v1/pins"]


def moved_away(location: Path, name: str, tmp_path: Path) -> Path:
    """Put a link in place of a directory; gives an old file where it leads."""
    place, elsewhere = location / name, tmp_path / "elsewhere"
    place.rename(elsewhere) if place.exists() else elsewhere.mkdir()
    place.symlink_to(elsewhere)
    old = elsewhere / "thesis"
    old.write_bytes(b"valuable")
    os.utime(old, (1, 1))
    return old


@pytest.mark.parametrize("name", LAYOUT)
def test_a_directory_of_the_layout_that_is_a_link_is_refused(unsigned, tmp_path, name):
    old = moved_away(unsigned, name, tmp_path)
    with pytest.raises(CacheLocationError, match="symbolic link") as caught:
        CompileCache(unsigned)
    assert str(unsigned / name) in one_line(caught.value) and untouched(old)


@pytest.mark.parametrize("name", LAYOUT[:6])
def test_a_directory_that_becomes_a_link_later_is_refused_when_something_is_written(unsigned, tmp_path, name):
    cache = CompileCache(unsigned)
    old = moved_away(unsigned, name, tmp_path)
    for write in (cache.clean, lambda: cache.get_or_build(OTHER, build), lambda: cache.verify(repair=True)):
        with pytest.raises(CacheWriteError, match="symbolic link") as caught:
            write()
        one_line(caught.value)
    assert untouched(old)


def test_a_location_that_is_a_link_is_fine(unsigned, tmp_path):
    (tmp_path / "link").symlink_to(unsigned)
    assert CompileCache(tmp_path / "link").get(KEY).read("code.so") == FILES["code.so"]


@pytest.mark.parametrize("kind", ["blobs", "actions"])
def test_repair_moves_no_files_of_others(unsigned, tmp_path, kind):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis").write_bytes(b"valuable")
    (unsigned / "v1" / kind / "zz").symlink_to(tmp_path / "home")
    report = CompileCache(unsigned).verify(repair=True)
    assert [path for path, _ in report.damaged] == [f"v1/{kind}/zz"]
    assert (tmp_path / "home/thesis").read_bytes() == b"valuable" and CompileCache(unsigned).verify().ok


def test_a_link_in_place_of_a_record_or_a_blob_gives_the_right_bytes_or_nothing(signed, tmp_path):
    cache, text = CompileCache(signed, trust=MINE.public), record_of(signed).read_bytes()
    for path in (record_of(signed), blob_of(signed)):
        path.rename(tmp_path / "moved")
        path.symlink_to(tmp_path / "moved")
        assert cache.get(KEY).read("code.so") == FILES["code.so"]  # the right bytes, wherever they lie
        whole = (tmp_path / "moved").read_bytes()
        (tmp_path / "moved").write_bytes(whole.replace(b"\x00\x01", b"\x01\x00").replace(b"12.5", b"12.6"))
        with pytest.warns(DamagedEntryWarning):
            assert cache.get(KEY) is None
        assert (tmp_path / "moved").exists() and not path.is_symlink()  # the link was set aside, not what it leads to
        path.write_bytes(whole)
        record_of(signed).write_bytes(text)  # goes with its blob
        assert cache.get(KEY) is not None


def test_a_shard_that_is_a_link(signed, tmp_path):
    shard = blob_of(signed).parent
    shard.rename(tmp_path / "shard")
    shard.symlink_to(tmp_path / "shard")
    assert CompileCache(signed, trust=MINE.public).get(KEY).read("code.so") == FILES["code.so"]


def test_nothing_is_fetched_through_a_link(signed, tmp_path, victim):
    here = CompileCache(tmp_path / "here", trust=MINE.public, remote=signed.as_uri(), sign_with=MINE)
    here.require_writable()
    for data in FILES.values():
        plant(here.location / "v1/tmp" / f"partial-{sha256(data)}", victim)
    assert here.get(KEY).read("code.so") == FILES["code.so"] and untouched(victim)


def special(path: Path, kind: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "terminal":
        path.symlink_to("/dev/tty")
    elif kind == "loop":
        path.symlink_to(path.name)
    else:
        path.mkdir()


@pytest.mark.parametrize("kind", ["pipe", "device", "terminal", "loop", "directory"])
@pytest.mark.parametrize("where", ["record", "blob", "used", "pin", "key lock", "store lock", "records lock"])
def test_what_is_no_file_is_not_waited_for(unsigned, where, kind):
    places = {
        "record": record_of(unsigned),
        "blob": blob_of(unsigned),
        "used": used_of(unsigned),
        "pin": unsigned / "v1/pins" / KEY.digest,
        "key lock": unsigned / f"v1/locks/{OTHER.digest}.lock",
        "store lock": unsigned / "v1/locks/store",
        "records lock": unsigned / "v1/locks/records",
    }
    special(places[where], kind)
    cache = CompileCache(unsigned)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DamagedEntryWarning)
        entry = in_time(lambda: cache.get(KEY))
    assert (entry is None) == (where in ("record", "blob"))
    for work in (
        lambda: cache.get_or_build(OTHER, build),
        lambda: cache.pin(KEY),
        lambda: cache.prune(max_age=1e9),
        lambda: cache.unpin(KEY),
    ):
        try:
            in_time(work)
        except CacheWriteError as error:
            assert where in ("pin", "key lock", "store lock", "records lock")
            one_line(error)


def test_a_blob_that_becomes_a_pipe_after_the_check_is_not_waited_for(unsigned):
    entry = CompileCache(unsigned).get(KEY)
    special(blob_of(unsigned), "pipe")
    try:
        with pytest.raises(DamagedEntry):
            in_time(lambda: entry.read("code.so"), 2)
    finally:
        os.close(os.open(blob_of(unsigned), os.O_RDWR | os.O_NONBLOCK))  # a reader that waits goes on


def test_a_record_that_was_removed_by_all_but_a_link_does_not_turn_for_ever(unsigned, tmp_path):
    with open(tmp_path / "gone", "w+b") as file:
        (tmp_path / "gone").unlink()
        plant(record_of(unsigned), Path(f"/proc/{os.getpid()}/fd/{file.fileno()}"))
        if not record_of(unsigned).exists():
            pytest.skip("no /proc")
        try:
            with pytest.warns(DamagedEntryWarning):
                assert in_time(lambda: CompileCache(unsigned).get(KEY), 2) is None
        finally:
            record_of(unsigned).unlink()
