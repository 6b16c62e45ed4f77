"""What S3 does in its own way, with a real server on this machine."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import fsspec
import pytest

from compile_cache import CompileCache, Remote, RemoteError
from tests.entries import contents, never
from tests.remotes import (
    KEY,
    OTHER,
    Place,
    Server,
    blob_at,
    builder,
    files_of,
    filled,
    run,
    s3_server,
    warned,
    within,
)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def place(server) -> Place:
    return server.place()


def test_the_server_stops(tmp_path):
    with s3_server() as server:
        place = server.place()
        filled(tmp_path / "builder", KEY, OTHER, remote=place.remote(push=True))
        CompileCache(tmp_path / "cache", remote=place.remote()).pull([KEY.digest])
    cache = CompileCache(tmp_path / "cache", remote=place.remote(timeout=0.5))
    with warned():
        assert contents(cache.get(KEY)) == files_of(KEY) == contents(cache.get_or_build(KEY, never))
    with warned("no answer for 0.5 s"), within(3):
        assert not any([cache.get(OTHER) for _ in range(10)])
    with pytest.raises(RemoteError), within(5):
        cache.push()


@pytest.mark.parametrize("listening", [True, False])
def test_nothing_answers_at_the_port(server, tmp_path, listening):
    """A server that accepts and says nothing, and a port where none is."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        if listening:
            silent.listen()
        options = {**server.options, "client_kwargs": {"endpoint_url": f"http://127.0.0.1:{silent.getsockname()[1]}"}}
        remote = Remote("s3://bucket/cache", options=options, timeout=0.5, push=True)
        cache = CompileCache(tmp_path / "cache", remote=remote)
        with warned("no answer for 0.5 s"), within(5):
            assert cache.get(KEY) is None
            assert contents(cache.get_or_build(KEY, builder(KEY))) == files_of(KEY)
        assert cache.verify().ok and cache.stats.pushed_bytes == 0


PUSHES = """
import json
remote = Remote(sys.argv[2], push=True, options=json.loads(sys.argv[3]))
CompileCache(sys.argv[1], remote=remote).get_or_build(KEY, builder(KEY))
"""


def test_what_was_absent_is_found_when_another_process_has_pushed_it(place, tmp_path):
    cache = CompileCache(tmp_path / "cache", remote=place.remote(retry_after=0))
    filled(tmp_path / "builder", OTHER, remote=place.remote(push=True))
    assert cache.pull() == [OTHER.digest] and cache.get(KEY) is None
    shared = fsspec.filesystem("s3", **place.options)  # the object that the cache uses; it keeps listings
    shared.ls(f"{place.root}/v1/actions")
    run(PUSHES, tmp_path / "another", place.url, json.dumps(place.options))
    with warned():
        assert contents(cache.get(KEY)) == files_of(KEY)


def test_what_was_deleted_is_sent_again(place, tmp_path):
    cache = filled(tmp_path / "cache", KEY, remote=place.remote(push=True))
    fsspec.filesystem("s3", **place.options).ls(f"{place.root}/{blob_at(KEY).rpartition('/')[0]}")
    place.remove(blob_at(KEY))
    assert cache.push() == 1
    assert blob_at(KEY) in place.files()


FORKED = """
import json
remote = Remote(sys.argv[2], options=json.loads(sys.argv[3]))
cache = CompileCache(sys.argv[1], remote=remote)
assert contents(cache.get(KEY)) == files_of(KEY)
warnings.simplefilter("error")
child = os.fork()
if not child:
    try:
        os._exit(0 if contents(cache.get(OTHER)) == files_of(OTHER) else 1)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(2)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert cache.get(THIRD) is None
"""


def test_a_forked_child_may_use_the_remote(place, tmp_path):
    filled(tmp_path / "builder", KEY, OTHER, remote=place.remote(push=True))
    run(FORKED, tmp_path / "cache", place.url, json.dumps(place.options))


def test_without_credentials(place, tmp_path):
    filled(tmp_path / "builder", KEY, remote=place.remote(push=True))
    options = {"client_kwargs": place.options["client_kwargs"]}
    cache = CompileCache(tmp_path / "cache", remote=Remote(place.url, options=options))
    with warned("credentials"):
        assert cache.get(KEY) is None and cache.get(OTHER) is None
    with pytest.raises(RemoteError, match="credentials"):
        cache.pull()


def test_a_bucket_that_is_not_there(server, tmp_path):
    remote = Remote("s3://other-bucket/cache", options=server.options, push=True)
    cache = CompileCache(tmp_path / "cache", remote=remote)
    with warned("bucket does not exist"):
        assert contents(cache.get_or_build(KEY, builder(KEY))) == files_of(KEY)
    for work in (cache.pull, cache.push):
        with pytest.raises(RemoteError, match="bucket does not exist"):
            work()
    assert not any(
        path.startswith("/other-bucket") and method == "PUT" and path.count("/") < 3
        for method, path, _ in server.requests
    )  # and none was made


def test_only_what_is_needed_is_asked_for(server, place, tmp_path, monkeypatch):
    monkeypatch.setattr("compile_cache.remote.CHUNK", 400)
    filled(tmp_path / "builder", KEY, remote=place.remote(push=True))
    server.requests.clear()
    cache = CompileCache(tmp_path / "cache", remote=place.remote())
    assert contents(cache.get(KEY)) == files_of(KEY)
    asked = [(method, path.rsplit("/", 3)[1], size) for method, path, size in server.requests]
    assert {method for method, *_ in asked} == {"GET"}
    code = blob_at(KEY)
    wanted = [size for method, path, size in server.requests if path.endswith(code)]
    assert wanted == ["bytes=0-399", "bytes=400-799", "bytes=800-999"] and len(asked) == 5
    server.requests.clear()
    assert cache.get(KEY) is not None and server.requests == []
