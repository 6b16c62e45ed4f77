"""Counters of one cache object in one process."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any, Final

COUNTERS: Final = {
    "hits": "entries handed out that were there",
    "remote_hits": "entries handed out that the remote had",
    "misses": "entries that were not here, by reason; those that the remote had are among them",
    "builds": "entries built here",
    "build_failures": "builds that raised",
    "build_seconds": "time in build callbacks",
    "load_seconds": "time to find and check entries",
    "remote_seconds": "time spent waiting for the remote",
    "read_bytes": "bytes of entries that were checked and handed out",
    "written_bytes": "bytes of entries that were stored",
    "pulled_bytes": "bytes that came from the remote",
    "pushed_bytes": "bytes that went to the remote",
    "remote_errors": "times that the remote did not answer, or answered with damage",
    "evictions": "entries removed by limits",
    "evicted_bytes": "bytes that removals freed",
}
"""Name -> meaning. All only grow."""

MISS_REASONS: Final = ("absent", "damaged", "untrusted", "foreign")


class CacheStats:
    """What a cache did since it was opened. Thread safe; every counter of :data:`COUNTERS` is an attribute.

    Attributes:
        misses_by_reason: how often, for each of :data:`MISS_REASONS`.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, float] = dict.fromkeys(COUNTERS, 0)
        self.misses_by_reason: Counter[str] = Counter()

    def add(self, name: str, amount: float = 1) -> None:
        """Count."""
        with self._lock:
            self._values[name] += amount

    def miss(self, reason: str) -> None:
        """Count a miss."""
        with self._lock:
            self._values["misses"] += 1
            self.misses_by_reason[reason] += 1

    @contextmanager
    def seconds(self, name: str) -> Iterator[None]:
        """Add the time that the block takes."""
        start = perf_counter()
        try:
            yield
        finally:
            self.add(name, perf_counter() - start)

    def to_json(self) -> dict[str, Any]:
        """All counters at one moment, and ``misses_by_reason``."""
        with self._lock:
            return {**self._values, "misses_by_reason": dict(self.misses_by_reason)}

    def __getattr__(self, name: str) -> float:
        if name in COUNTERS:
            return self._values[name]
        raise AttributeError(f"expected one of {', '.join(COUNTERS)}, got {name}")

    def __repr__(self) -> str:
        shown = ", ".join(f"{name} {value:g}" for name, value in self._values.items() if value)
        return f"CacheStats({shown})"
