"""Who else can write to the location of a cache, or exchange it."""

from __future__ import annotations

import os
import stat
import warnings
from pathlib import Path
from typing import Any

import pytest

from compile_cache import CompileCache, PermissionsWarning
from tests.entries import KEY, build, one_line, signer

MINE = signer(1)


def opened(location: Path, **options: Any) -> list[str]:
    """The warnings that opening gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        CompileCache(location, **options)
    assert all(warning.category is PermissionsWarning and warning.filename == __file__ for warning in caught)
    return [one_line(warning.message) for warning in caught]


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o757, 0o1777, 0o770, 0o722])
def test_a_location_that_others_can_write_to(unsigned, mode):
    unsigned.chmod(mode)
    (text,) = opened(unsigned)
    assert f"mode {mode:o}" in text and f"chmod go-w {unsigned}" in text and "trust=" in text
    assert opened(unsigned, read_only=True) and not opened(unsigned, trust=MINE.public)
    unsigned.chmod(0o700)


@pytest.mark.parametrize("below", ["v1", "v1/actions", "v1/blobs", "v1/tmp"])
def test_a_directory_below_the_location_that_others_can_write_to(unsigned, below):
    (unsigned / below).chmod(0o775)
    assert opened(unsigned) == []  # nobody else can enter the location
    unsigned.chmod(0o755)
    (text,) = opened(unsigned)
    assert f"at {unsigned / below}, got mode 775" in text
    (unsigned / below).chmod(0o755)
    assert opened(unsigned) == []


def test_a_directory_above_the_location_that_all_can_write_to(tmp_path):
    above = tmp_path / "shared/mine"
    above.mkdir(parents=True)
    (tmp_path / "link").symlink_to(above)
    (tmp_path / "shared").chmod(0o777)  # there the directory below can be exchanged for another
    for location in (above / "cache", tmp_path / "link/cache"):
        (text,) = opened(location)
        assert f"chmod o-w {tmp_path / 'shared'}" in text and not opened(location, trust=MINE.public)
    (tmp_path / "shared").chmod(0o1777)  # as /tmp: only its owner can exchange a directory
    assert opened(above / "cache") == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
@pytest.mark.parametrize("below", ["", "v1"])
def test_a_location_of_somebody_else(unsigned, below):
    unsigned.chmod(0o755)
    os.chown(unsigned / below, 12345, -1)
    (text,) = opened(unsigned)
    assert "one of user 12345" in text and not opened(unsigned, trust=MINE.public)


def test_the_mode_of_a_location(tmp_path):
    umask = os.umask(0)
    try:
        CompileCache(tmp_path / "new").get_or_build(KEY, build)
        assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
        assert opened(tmp_path / "new") == []
        for mode in (0o755, 0o750, 0o700):
            there = tmp_path / f"{mode:o}"
            there.mkdir()
            there.chmod(mode)
            CompileCache(there).get_or_build(KEY, build)
            assert stat.S_IMODE(there.stat().st_mode) == mode
    finally:
        os.umask(umask)


def test_who_signs_is_warned_in_spite_of_trust(signed):
    signed.chmod(0o777)  # what is built here is signed here: others must not be able to change it before
    assert opened(signed, trust=MINE.public) == []
    assert len(opened(signed, trust=MINE.public, sign_with=MINE)) == 1
