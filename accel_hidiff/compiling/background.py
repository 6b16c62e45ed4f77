"""What requests missed: compiled by a pool of processes, remembered where that failed, told when it has arrived."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Final

from accel_hidiff.compiling.blueprint import Blueprint, CompileJob
from accel_hidiff.compiling.pool import CompilePool, Outcome
from accel_hidiff.errors import CompileFailed
from accel_hidiff.regions import RegionGraph
from compile_cache import CacheKey, CompileCache

MAX_QUEUED: Final = 256  # graphs of one handle
_RETRY_AFTER: Final = 600.0  # seconds, where a failure says nothing of the graph: no disk, no memory, a killed process

Missed = Sequence[tuple[RegionGraph, CacheKey]]


@dataclass
class _Waiting:
    """A call that runs eager until these graphs are there."""

    digests: set[str]
    arrived: Callable[[], None]


@dataclass
class _Known:
    """What is known of a graph that was missed: it waits, a process compiles it, or that failed."""

    state: str
    error: str = ""
    until: float = float("inf")  # when a failure counts no more (monotonic)
    cancel: Callable[[], None] = field(default=lambda: None)


class Background:
    """Hands missing graphs of one handle to a pool. Thread safe.

    Args:
        pool: compiles; several handles may share it.
        cache: where artifacts go.
        blueprint: describes the handle's models as they are now.
        counts: counts what became of graphs, by state; "queued" too.
    """

    def __init__(
        self, pool: CompilePool, cache: CompileCache, blueprint: Callable[[], Blueprint], counts: Counter[str]
    ) -> None:
        self.pool = pool
        self._cache = cache
        self._describe = blueprint
        self._counts = counts
        self._blueprint: Blueprint | None = None
        self._known: dict[str, _Known] = {}
        self._waiting: dict[tuple[Hashable, ...] | None, _Waiting] = {}
        self._closed = False
        self._changed = threading.Condition(threading.RLock())

    def ask(self, call: tuple[Hashable, ...] | None, missed: Missed, arrived: Callable[[], None]) -> str:
        """Has graphs compiled; each one once, however often it is asked for.

        Args:
            call: name of the call that needs them, the name of its model first; None: of no call yet.
            missed: the graphs that a call needs and the cache does not hold, and their keys.
            arrived: called once, in a thread of the pool, when all of them are in the cache.

        Returns:
            What becomes of them, for people.
        """
        with self._changed:
            said: list[str] = []
            digests: set[str] = set()
            for graph, key in missed:
                known = self._known_of(key)
                if known is None:
                    known = self._queue(graph, key)
                if known.state == "failed":
                    said.append(f"compiling {graph.region.path} failed: {known.error}")
                else:
                    digests.add(key.digest)
            if said:
                return f"{said[0]}; it stays eager: `accel-hidiff precompile` tries again"
            if not self._closed:
                self._waiting[call] = _Waiting(digests, arrived)
            return f"{len(digests)} artifacts are being compiled in the background"

    def state(self, keys: Sequence[CacheKey]) -> str | None:
        """What becomes of missing graphs, for a table; None if nobody asked for them."""
        with self._changed:
            states = Counter(known.state for key in keys if (known := self._known_of(key)) is not None)
        return ", ".join(f"{states[name]} {name}" for name in ("compiling", "queued", "failed") if states[name]) or None

    def forget_models(self, models: Sequence[str]) -> None:
        """These models changed: what waits for them as they were is not told any more."""
        with self._changed:
            self._blueprint = None
            self._waiting = {call: item for call, item in self._waiting.items() if call and call[0] not in models}

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until nothing is queued or compiled any more; False if that took longer than `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._pending(), timeout)

    def close(self) -> None:
        """What waits is cancelled; what a process works on still reaches the cache."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            for known in self._known.values():
                known.cancel()

    def _pending(self) -> list[_Known]:
        return [known for known in self._known.values() if known.state in ("queued", "compiling")]

    def _known_of(self, key: CacheKey) -> _Known | None:
        known = self._known.get(key.digest)
        if known is not None and known.until > time.monotonic():
            return known
        if (failure := self._cache.failures.of(key.digest)) is not None:
            known = self._known[key.digest] = _Known("failed", failure.error, time.monotonic() + _RETRY_AFTER)
            return known
        return None

    def _queue(self, graph: RegionGraph, key: CacheKey) -> _Known:
        if len(self._pending()) >= MAX_QUEUED:
            return _Known("failed", f"{MAX_QUEUED} graphs are waiting already")
        known = self._known[key.digest] = _Known("queued")
        try:
            if self._blueprint is None:
                self._blueprint = self._describe()
            job = CompileJob.of(graph, key.digest)

            def started() -> None:
                known.state = "compiling"

            known.cancel = self.pool.submit(job, self._blueprint, self._cache, self._done, started)
            self._counts["queued"] += 1
        except (CompileFailed, RuntimeError) as problem:
            self._fail(known, str(problem), _RETRY_AFTER)
        return known

    def _done(self, outcome: Outcome) -> None:
        tell: list[_Waiting] = []
        with self._changed:
            self._counts[outcome.state] += 1
            known = self._known.pop(outcome.digest, _Known(outcome.state))
            needs = [call for call, waiting in self._waiting.items() if outcome.digest in waiting.digests]
            if outcome.ok:
                for call in needs:
                    self._waiting[call].digests.discard(outcome.digest)
                    if not self._waiting[call].digests:
                        tell.append(self._waiting.pop(call))
            elif outcome.state != "cancelled":
                lasting = outcome.state == "failed"
                if lasting:
                    self._cache.failures.note(outcome.digest, outcome.error)
                self._known[outcome.digest] = known
                self._fail(known, outcome.error, float("inf") if lasting else _RETRY_AFTER)
                for call in needs:
                    del self._waiting[call]
        try:
            for waiting in tell:
                waiting.arrived()
        finally:
            with self._changed:
                self._changed.notify_all()

    @staticmethod
    def _fail(known: _Known, error: str, seconds: float) -> None:
        known.state, known.error, known.until = "failed", error, time.monotonic() + seconds
