"""Counters of a handle, readable at any time and testable by difference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

_MAX_REASONS = 1000  # they may name keys, of which a service meets ever new ones


@dataclass
class Stats:
    """What happened since the handle was made.

    Attributes:
        compiles: region graphs compiled by this process.
        loads: distinct artifacts loaded from the cache.
        bindings: packages bound to the weights of a region (one artifact serves many regions).
        hits: calls (of the UNet, of the VAE decoder) that compiled graphs served.
        misses: lookups that found a graph missing from the cache.
        eager_calls: calls that ran eager.
        background: graphs that were "queued" for a compiling process, and what became of them ("compiled", "found",
            "failed", "died", "not stored", "cancelled"); "swapped": kinds of calls that took theirs up while serving.
        captures: kinds of UNet calls that were captured in CUDA graphs.
        replays: UNet calls that such a graph served; each is a hit, too.
        graph_bytes: device memory that the graphs hold now.
        rejected: reason -> calls that ran eager for it, or were refused for it under `on_miss="error"`.
    """

    compiles: int = 0
    loads: int = 0
    bindings: int = 0
    hits: int = 0
    misses: int = 0
    eager_calls: int = 0
    captures: int = 0
    replays: int = 0
    graph_bytes: int = 0
    background: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)

    def reject(self, reason: str) -> None:
        """Counts a call that ran eager, or was refused, for a reason; there are at most 1,000 different ones."""
        if reason not in self.rejected and len(self.rejected) >= _MAX_REASONS:
            reason = "other reasons"
        self.rejected[reason] += 1

    def to_json(self) -> dict[str, Any]:
        """A plain JSON mapping."""
        return {**asdict(self), "background": dict(self.background), "rejected": dict(self.rejected)}

    @contextmanager
    def expect(self, **deltas: int) -> Iterator[None]:
        """Asserts by how much counters change inside of the block; for tests and smoke checks.

        >>> stats = Stats()
        >>> with stats.expect(hits=1, compiles=0):
        ...     stats.hits += 1
        """
        before = {name: getattr(self, name) for name in deltas}
        yield
        changes = {name: getattr(self, name) - value for name, value in before.items()}
        if changes != deltas:
            raise AssertionError(f"expected counters to change by {deltas}, they changed by {changes}")
