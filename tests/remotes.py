"""Remotes to test with: a real S3 server on this machine, a directory, memory, and a file system with faults.

with s3_server() as server:
    remote = server.place("prefix").remote(push=True)
"""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import pytest

from compile_cache import CacheKey, CompileCache, Remote, RemoteWarning
from tests import entries

KEY, OTHER, THIRD = (CacheKey({"n": n}) for n in range(3))


def files_of(key: CacheKey, size: int = 1000) -> dict[str, bytes]:
    """Two files that no other key has, of `size` and 40 bytes."""
    seed = key.digest.encode()
    blocks = (hashlib.sha256(seed + bytes([i % 256, i // 256])).digest() for i in range(size // 32 + 1))
    return {"code.so": b"".join(blocks)[:size], "deep/er/data.json": b'{"of": "' + seed[:30] + b'"}'}


def builder(key: CacheKey, size: int = 1000) -> entries.Build:
    return entries.builder(files_of(key, size), seconds=1.5)


def filled(location: Path, *keys: CacheKey, size: int = 1000, **options: Any) -> CompileCache:
    cache = CompileCache(location, **options)
    for key in keys:
        cache.get_or_build(key, builder(key, size))
    return cache


def record_at(key: CacheKey) -> str:
    return f"v1/actions/{key.digest[:2]}/{key.digest}.json"


def blob_at(key: CacheKey, name: str = "code.so", size: int = 1000) -> str:
    sha256 = hashlib.sha256(files_of(key, size)[name]).hexdigest()
    return f"v1/blobs/{sha256[:2]}/{sha256}"


def left_in_tmp(cache: CompileCache) -> list[str]:
    """What lies in v1/tmp and cannot be continued."""
    return [path.name for path in (cache.location / "v1/tmp").iterdir() if not path.name.startswith("partial-")]


@contextmanager
def warned(*texts: str) -> Iterator[None]:
    """Exactly these warnings, each a RemoteWarning of one line that holds the text."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    told = [warning for warning in caught if issubclass(warning.category, UserWarning)]
    messages = [str(warning.message) for warning in told]
    assert len(messages) == len(texts), messages
    for warning, message, text in zip(told, messages, texts, strict=True):
        assert warning.category is RemoteWarning and text in message and "\n" not in message, message


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """The block takes no longer (a hang of these tests would take 30 s and more)."""
    start = time.monotonic()
    yield
    assert (took := time.monotonic() - start) < seconds, f"{took:.2f} s"


def clock(patch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Call what comes back, and for remotes it is so many seconds later."""
    ahead = [0.0]
    real = time.monotonic
    patch.setattr("compile_cache.remote.monotonic", lambda: real() + ahead[0])

    def later(seconds: float) -> None:
        ahead[0] += seconds

    return later


def run(code: str, *arguments: object, timeout: float = 30) -> str:
    """Run code in a new process, and return what it prints; it has to end well."""
    command = [sys.executable, "-c", PRELUDE + code, *map(str, arguments)]
    done = subprocess.run(command, cwd=entries.ROOT, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


PRELUDE = """
import os, signal, sys, threading, time, warnings
from compile_cache import CacheKey, CompileCache, Remote, RemoteWarning
from tests.entries import contents
from tests.remotes import KEY, OTHER, THIRD, builder, files_of
"""


@dataclass
class Place:
    """Where a remote lies, and a way to its files that is not the one of the cache."""

    url: str
    options: dict[str, Any] = field(default_factory=dict)

    def remote(self, **values: Any) -> Remote:
        return Remote(self.url, options=self.options, **{"timeout": 10.0, **values})

    def __post_init__(self) -> None:
        options = {**self.options, "skip_instance_cache": True, "use_listings_cache": False}
        self.fs, self.root = fsspec.core.url_to_fs(self.url, **options)

    def read(self, path: str) -> bytes:
        return bytes(self.fs.cat_file(f"{self.root}/{path}"))

    def write(self, path: str, data: bytes) -> None:
        self.fs.pipe_file(f"{self.root}/{path}", data)

    def remove(self, path: str) -> None:
        self.fs.rm_file(f"{self.root}/{path}")

    def files(self) -> set[str]:
        return {str(name).removeprefix(f"{self.root}/") for name in self.fs.find(f"{self.root}/v1")}


def directory_place(path: Path) -> Place:
    return Place(f"file://{path}")


def memory_place() -> Place:
    return Place(f"memory://{uuid.uuid4().hex}/cache")


class Server:
    """An S3 server in this process.

    Attributes:
        requests: (method, path, Range header) of all requests so far.
        delay: seconds that each answer takes.
    """

    def __init__(self) -> None:
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.requests: list[tuple[str, str, str | None]] = []
        self.delay = 0.0
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._server.start()
        self._application = self._server._server.app
        self._server._server.app = self._answer
        self.url = "http://{}:{}".format(*self._server.get_host_and_port())
        self.options = {"key": "key", "secret": "secret", "client_kwargs": {"endpoint_url": self.url}}
        with suppress(FileExistsError):  # what servers of one process hold is common to them
            fsspec.filesystem("s3", skip_instance_cache=True, **self.options).mkdir("bucket")

    def _answer(self, environment: dict[str, Any], start: Any) -> Any:
        request = environment["REQUEST_METHOD"], environment["PATH_INFO"], environment.get("HTTP_RANGE")
        self.requests.append(request)
        time.sleep(self.delay)
        return self._application(environment, start)

    def place(self, prefix: str = "") -> Place:
        return Place(f"s3://bucket/{prefix or uuid.uuid4().hex}/cache", self.options)

    def stop(self) -> None:
        self._server.stop()
        self._server._server.server_close()


@contextmanager
def s3_server() -> Iterator[Server]:
    """Skips without moto and s3fs; nothing of the user's AWS settings is read."""
    pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        patch.setattr("fsspec.config.conf", {})
        patch.setenv("AWS_CONFIG_FILE", "/dev/null")
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("NO_PROXY", "127.0.0.1")
        server = Server()
        try:
            yield server
        finally:
            server.stop()


class Wire:
    """The calls that reach a file system, which may be made to fail.

    Attributes:
        calls: (name of the method, path, first byte, byte after the last) so far.
        fault: called with the name and the path before each call; raises or waits.
        change: what becomes of the bytes that cat_file gives.
    """

    def __init__(self, patch: pytest.MonkeyPatch, file_system: type) -> None:
        self.calls: list[tuple[str, str, Any, Any]] = []
        self.fault: Callable[[str, str], None] = lambda name, path: None
        self.change: Callable[[str, bytes], bytes] = lambda path, data: data
        for name in ("cat_file", "info", "put_file", "pipe_file", "find"):
            patch.setattr(file_system, name, self._watched(name, getattr(file_system, name)))

    def _watched(self, name: str, real: Any) -> Any:
        def call(fs: Any, *arguments: Any, **options: Any) -> Any:
            path = arguments[1] if name == "put_file" else arguments[0]
            self.calls.append((name, path, options.get("start"), options.get("end")))
            self.fault(name, path)
            found = real(fs, *arguments, **options)
            return self.change(path, found) if name == "cat_file" else found

        return call

    def asked(self, part: str = "/blobs/") -> list[tuple[int, int]]:
        """The ranges of blobs (or of another part of the remote) that were asked for."""
        return [(start, end) for name, path, start, end in self.calls if name == "cat_file" and part in path]
