"""What tests of the cache store and read back, where its files lie, and how to run something beside a test.

build: stores FILES, for KEY as a rule.
key(n), data(n), writes(n): numbered entries; each has bytes of its own and some that all of them share.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import compile_cache
from compile_cache import CacheKey, CompileCache, Entry, SigningKey, UntrustedEntryWarning
from compile_cache.records import Record, decode_record

ROOT = Path(compile_cache.__file__).parents[1]
WEEK = 7 * 86_400.0
KEY, OTHER = CacheKey({"model": "tiny", "n": 1}), CacheKey({"model": "tiny", "n": 2})
FILES = {"code.so": bytes(range(256)) * 4, "deep/er/data.json": b'{"a": 1}'}
EVIL = b"\x90" * 1024  # as long as the code

Build = Callable[[Path], dict[str, object]]


def write(directory: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def builder(files: Mapping[str, bytes], /, **notes: object) -> Build:
    def build(directory: Path) -> dict[str, object]:
        write(directory, files)
        return dict(notes)

    return build


build = builder(FILES, seconds=12.5, list=[1, None])


def never(directory: Path) -> None:
    raise AssertionError("built again")


def contents(entry: Entry | None) -> dict[str, bytes] | None:
    return None if entry is None else {name: entry.read(name) for name in entry.files}


# ---- numbered entries ------------------------------------------------------------------------------------------------


def key(n: int) -> CacheKey:
    return CacheKey({"n": n})


def data(n: int) -> dict[str, bytes]:
    return {"one": random.Random(n).randbytes(3000), "two": b"shared"}


def writes(n: int) -> Build:
    return builder(data(n))


def fill(cache: CompileCache, *numbers: int) -> CompileCache:
    for n in numbers:
        cache.get_or_build(key(n), writes(n))
    return cache


def right(entry: Entry, n: int) -> bool:
    return contents(entry) == data(n)


def kept(cache: CompileCache) -> list[int]:
    """The numbers of the entries that are there."""
    return [n for n in range(60) if key(n).digest in set(cache.digests())]


def set_used(cache: CompileCache, n: int, moment: float) -> None:
    """Say when an entry was used last; its record is as old."""
    for path in (used_of(cache.location, key(n)), record_of(cache.location, key(n))):
        os.utime(path, (moment, moment))


# ---- files of a cache ------------------------------------------------------------------------------------------------


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def record_of(location: Path, key: CacheKey = KEY) -> Path:
    return location / "v1/actions" / key.digest[:2] / f"{key.digest}.json"


def used_of(location: Path, key: CacheKey = KEY) -> Path:
    return location / "v1/used" / key.digest[:2] / key.digest


def blob_of(location: Path, data: bytes = FILES["code.so"]) -> Path:
    return location / "v1/blobs" / sha256(data)[:2] / sha256(data)


def read_record(location: Path, key: CacheKey = KEY) -> Record:
    return decode_record(record_of(location, key).read_bytes(), key.digest)


def forged(body: Mapping[str, Any]) -> bytes:
    """The text of any record, with a checksum that fits: only its meaning may be wrong."""
    body = {name: value for name, value in body.items() if name != "checksum"}
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return (json.dumps({**body, "checksum": sha256(canonical.encode())}, indent=1, sort_keys=True) + "\n").encode()


def snapshot(directory: Path, *leave: str) -> dict[str, bytes]:
    """Every file, but for those whose path begins with one of the given texts."""
    found = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if not path.is_dir()}
    return {name: path.read_bytes() for name, path in sorted(found.items()) if not name.startswith(leave)}


# ---- signatures ------------------------------------------------------------------------------------------------------


def signer(n: int) -> SigningKey:
    """A key to sign with, always the same one for a number; without cryptography, who asks for it is skipped."""
    ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")
    return SigningKey(ed25519.Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32))


def untrusted(cache: CompileCache, key: CacheKey = KEY) -> str:
    """The one warning of a look-up that finds nothing to be trusted."""
    with pytest.warns(UntrustedEntryWarning) as caught:
        assert cache.get(key) is None
    assert [warning.category for warning in caught] == [UntrustedEntryWarning]
    return one_line(caught[0].message)


# ---- errors, threads and processes -----------------------------------------------------------------------------------


def one_line(error: object) -> str:
    """The text of an error, which is one line that any terminal shows."""
    text = str(error)
    assert len(text.splitlines()) == 1 and text.isprintable(), repr(text)
    return text


def in_time(work: Callable[[], Any], seconds: float = 10) -> Any:
    """The result of something that must not block."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append((work(), None))
        except BaseException as error:
            results.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert results, "took too long"
    value, error = results[0]
    if error is not None:
        raise error
    return value


def in_threads(count: int, work: Callable[[int], object], seconds: float = 60) -> None:
    """Do something in so many threads at once; it is given the number of its thread."""
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds)
    assert not any(thread.is_alive() for thread in threads), "took too long"


def python(code: str, *arguments: object) -> str:
    """Run code in a new process, and return what it prints; it has to end well."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=60).stdout


def program(file: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    """Start a test file that is a program too."""
    command = [sys.executable, file, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, text=True, **pipes, **options)
