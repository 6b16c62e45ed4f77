"""Builds that failed: remembered with their error, so that nobody tries the same thing again and again.

One small JSON file per key, ``v1/failed/<digest>.json``. It is advice and no part of an entry: what cannot be read
counts as nothing, what cannot be written is not remembered, and nothing fails.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from .errors import one_line
from .files import remove, rename, write_synced
from .records import is_sha256

MAX_AGE: Final = 7 * 86400.0  # seconds after which a failure counts no more: somebody may have mended its cause
_MAX_FILE: Final = 1 << 14
_MAX_ERROR: Final = 1000  # characters


@dataclass(frozen=True)
class Failure:
    """A build that failed.

    Attributes:
        error: one line.
        when: UTC in ISO 8601.
        attempts: how often it was tried.
    """

    error: str
    when: str
    attempts: int


class Failures:
    """The failed builds of one cache.

    Args:
        root: the cache's ``v1``.
        writable: False: nothing is remembered beyond what is there.
    """

    def __init__(self, root: Path, writable: bool = True) -> None:
        self._folder = root / "failed"
        self._tmp = root / "tmp"
        self._writable = writable

    def of(self, digest: str) -> Failure | None:
        """What is remembered of a key; None if nothing, or if it is older than seven days."""
        path = self._path(digest)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            with open(descriptor, "rb") as file:
                found = json.loads(file.read(_MAX_FILE))
                age = time.time() - os.fstat(file.fileno()).st_mtime
            failure = Failure(one_line(str(found["error"]), _MAX_ERROR), str(found["when"]), int(found["attempts"]))
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        return failure if age < MAX_AGE else None

    def note(self, digest: str, error: str) -> Failure:
        """Remember that a build failed; returns what `of` gives from now on, where it could be written."""
        previous = self.of(digest)
        attempts = 1 if previous is None else previous.attempts + 1
        now = datetime.now(UTC).isoformat(timespec="seconds")
        failure = Failure(one_line(error, _MAX_ERROR), now, attempts)
        if self._writable:
            temporary = self._tmp / f"failure-{os.getpid()}-{digest}-{time.monotonic_ns()}"
            with suppress(OSError):
                self._folder.mkdir(exist_ok=True)
                try:
                    write_synced(temporary, json.dumps(vars(failure)).encode())
                    rename(temporary, self._path(digest))
                finally:
                    remove(temporary)
        return failure

    def forget(self, digest: str) -> None:
        """The next one may try again."""
        if self._writable:
            with suppress(OSError):
                self._path(digest).unlink(missing_ok=True)

    def digests(self) -> list[str]:
        """The keys of which something is remembered, sorted."""
        with suppress(OSError):
            names = [name.removesuffix(".json") for name in os.listdir(self._folder) if name.endswith(".json")]
            return sorted(name for name in names if is_sha256(name))
        return []

    def _path(self, digest: str) -> Path:
        if not is_sha256(digest):
            raise ValueError(f"digest: expected 64 hexadecimal digits, got {digest!r}; pass CacheKey.digest")
        return self._folder / f"{digest}.json"
