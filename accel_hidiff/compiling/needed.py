"""Precompilation: every graph that some requests need, compiled here or by a pool of processes; resumable."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from accel_hidiff.binder import Binder, Graphs
from accel_hidiff.compiling.blueprint import Blueprint, CompileJob
from accel_hidiff.compiling.pool import CompilePool, Outcome
from accel_hidiff.errors import CompileFailed
from accel_hidiff.explain import PrecompileEvent, PrecompileReport
from accel_hidiff.regions import RegionGraph
from compile_cache import CacheWriteError

Progress = Callable[[PrecompileEvent], None]


@dataclass(frozen=True)
class Needed:
    """The graphs that some requests need.

    Attributes:
        calls: of each kind of call.
        distinct: those that take a compilation each, by the digest of their key (and by their region, where a backend
            compiles equal regions one by one).
    """

    calls: Sequence[Graphs]
    distinct: dict[str, RegionGraph]

    @classmethod
    def of(cls, binder: Binder, calls: Iterable[Graphs]) -> Needed:
        """Collects the distinct graphs of calls; two calls that need the same ones count once."""
        kinds: dict[tuple[str, ...], Graphs] = {}
        distinct: dict[str, RegionGraph] = {}
        for graphs in calls:
            names = []
            for graph, sizes in graphs:
                digest = binder.key(graph).digest
                name = digest if binder.backend.shares else f"{graph.region.path} {digest}"
                names += [graph.region.path, name, str(sorted(sizes.items()))]
                distinct.setdefault(name, graph)
            kinds.setdefault(tuple(names), graphs)
        return cls(tuple(kinds.values()), distinct)

    def missing(self, binder: Binder) -> dict[str, RegionGraph]:
        """Those that the cache does not hold."""
        return {name: graph for name, graph in self.distinct.items() if binder.entry(binder.key(graph)) is None}


def compile_needed(
    binder: Binder,
    needed: Needed,
    progress: Progress | None = None,
    pool: CompilePool | None = None,
    blueprint: Callable[[], Blueprint] | None = None,
) -> PrecompileReport:
    """Compiles what is missing.

    Args:
        binder: keys graphs, and compiles them where there is no pool.
        needed: what to compile.
        progress: called once before and once after each artifact.
        pool, blueprint: compile in processes; a graph that fails leaves the others to be compiled.

    Raises:
        CompileFailed: a graph cannot be compiled; what was compiled stays in the cache.
        CacheWriteError: the cache does not take an artifact.
    """
    start = time.perf_counter()
    count = _Count(len(needed.distinct), progress)
    cache = binder.cache
    if pool is None or blueprint is None or cache is None or not binder.backend.persistent:
        for graph in needed.distinct.values():
            count.begin(graph.region.path)
            began = time.perf_counter()
            made = binder.prepare(graph)
            count.end(graph.region.path, "compiled" if made else "shared", time.perf_counter() - began)
    else:
        _in_processes(binder, needed, count, pool, blueprint)
    entries = [e for graph in needed.distinct.values() if (e := binder.entry(binder.key(graph))) is not None]
    if cache is not None and cache.remote is not None and cache.remote.push:
        cache.push(entry.digest for entry in entries)  # those that were here before, too
    blobs = {ref.sha256: ref.size for entry in entries for ref in entry.files.values()}
    return PrecompileReport(
        graphs=len(needed.calls),
        regions=sum(len(graphs) for graphs in needed.calls),
        artifacts=len(needed.distinct),
        compiled=count.compiled,
        found=len(needed.distinct) - count.compiled,
        bytes=sum(blobs.values()),
        seconds=time.perf_counter() - start,
    )


class _Count:
    """Numbers events as they come."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.compiled = 0
        self._ended = 0
        self._total = total
        self._progress = progress
        self._lock = threading.Lock()

    def begin(self, path: str) -> None:
        """A region's graph is about to be compiled."""
        with self._lock:
            self._tell(PrecompileEvent(min(self._ended + 1, self._total), self._total, path, "compiling"))

    def end(self, path: str, state: str, seconds: float) -> None:
        """It is there, or it failed."""
        with self._lock:
            self._ended += 1
            self.compiled += state == "compiled"
            self._tell(PrecompileEvent(self._ended, self._total, path, state, seconds))

    def _tell(self, event: PrecompileEvent) -> None:
        if self._progress is not None:
            self._progress(event)


def _in_processes(
    binder: Binder, needed: Needed, count: _Count, pool: CompilePool, blueprint: Callable[[], Blueprint]
) -> None:
    assert binder.cache is not None
    missing = needed.missing(binder)
    for name, graph in needed.distinct.items():
        if name not in missing:
            count.end(graph.region.path, "shared", 0.0)
    if not missing:
        return
    outcomes: list[Outcome] = []
    cancels: list[Callable[[], None]] = []
    ended = threading.Condition()

    def done(outcome: Outcome) -> None:
        with ended:
            outcomes.append(outcome)
            state = {"found": "shared"}.get(outcome.state, outcome.state)
            count.end(outcome.path, state, outcome.seconds)
            ended.notify_all()

    def started(path: str) -> Callable[[], None]:
        return lambda: count.begin(path)

    models = blueprint()
    try:
        for name, graph in missing.items():
            job = CompileJob.of(graph, name)
            cancels.append(pool.submit(job, models, binder.cache, done, started(graph.region.path)))
        with ended:
            while len(outcomes) < len(missing):
                ended.wait(0.5)  # wakes up for signals
    except BaseException:
        for cancel in cancels:
            cancel()
        raise
    binder.stats.misses += len(missing)
    bad = [outcome for outcome in outcomes if not outcome.ok]
    if bad:
        rest = f" ({len(bad)} of {len(missing)} graphs failed; the others are in the cache)" if len(missing) > 1 else ""
        kind = CacheWriteError if bad[0].state == "not stored" else CompileFailed
        path = "" if bad[0].error.startswith(bad[0].path) else f"{bad[0].path}: "
        raise kind(f"{path}{bad[0].error}{rest}")
