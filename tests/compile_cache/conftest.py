"""Caches and bundles that several test files begin with."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from compile_cache import CompileCache
from tests import bundles
from tests.entries import KEY, blob_of, build, record_of, signer


@pytest.fixture
def cache(tmp_path: Path) -> CompileCache:
    """An empty cache."""
    return CompileCache(tmp_path / "cache")


@pytest.fixture
def unsigned(tmp_path: Path) -> Path:
    """A cache with an entry that nobody signed."""
    place = tmp_path / "unsigned"
    CompileCache(place).get_or_build(KEY, build)
    return place


@pytest.fixture
def signed(tmp_path: Path) -> Path:
    """A cache with an entry that the first signer signed; skips without cryptography."""
    place, mine = tmp_path / "cache", signer(1)
    CompileCache(place, trust=mine.public, sign_with=mine).get_or_build(KEY, build)
    return place


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache that bundles are made of; read it, do not change it."""
    cache = CompileCache(tmp_path_factory.mktemp("source") / "cache")
    for key in bundles.KEYS:
        cache.get_or_build(key, bundles.build(key))
    return cache.location


@pytest.fixture(scope="module")
def bundle(source: Path) -> Path:
    """A bundle of the whole source."""
    CompileCache(source).export_bundle(source.parent / "bundle.zip")
    return source.parent / "bundle.zip"


@pytest.fixture
def here(tmp_path: Path, source: Path) -> Path:
    """A cache with one of the entries of the source."""
    shutil.copytree(source, tmp_path / "here")
    for key in (bundles.TWO, bundles.LARGE):
        record_of(tmp_path / "here", key).unlink()
    for data in (b"", *bundles.FILES[bundles.LARGE].values()):
        blob_of(tmp_path / "here", data).unlink()
    return tmp_path / "here"
