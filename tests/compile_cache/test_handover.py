"""A cache handed to a child process opens as it was; a pickle of the cache or of its key never carries the secret."""

from __future__ import annotations

import pickle

import pytest

from compile_cache import CompileCache, Remote
from tests.entries import KEY, build, signer

MINE = signer(1)


def test_the_same_cache_is_opened(tmp_path):
    remote = Remote(f"file://{tmp_path / 'remote'}", push=True, timeout=3, options={"auto_mkdir": True})
    cache = CompileCache(
        tmp_path / "cache", max_bytes=1 << 30, max_age=60, trust=MINE.public, sign_with=MINE, remote=remote
    )
    again = CompileCache.from_handover(pickle.loads(pickle.dumps(cache.handover())))
    assert (again.location, again.limits, again.remote) == (cache.location, cache.limits, remote)
    again.get_or_build(KEY, build)
    assert cache.get(KEY).signed_by == (str(MINE.public),)


def test_a_read_only_one_stays_read_only(tmp_path):
    CompileCache(tmp_path).get_or_build(KEY, build)
    again = CompileCache.from_handover(CompileCache(tmp_path, read_only=True).handover())
    assert again.get(KEY) is not None
    with pytest.raises(Exception, match="read_only=True"):
        again.require_writable()


def test_the_secret_is_shown_and_pickled_nowhere_else(tmp_path):
    handover = CompileCache(tmp_path, trust=MINE.public, sign_with=MINE).handover()
    secret = MINE.private_bytes()
    assert secret.hex() not in repr(handover) and repr(secret)[2:-1] not in repr(handover)
    with pytest.raises(TypeError):
        pickle.dumps(MINE)
