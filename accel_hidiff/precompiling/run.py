"""Compiles a plan: all models of a deploy file in one pool of processes, each artifact once, resumable."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from rich.table import Table

from accel_hidiff.compiling.blueprint import CompileJob
from accel_hidiff.compiling.pool import CompilePool, Outcome
from accel_hidiff.errors import CompileFailed
from accel_hidiff.precompiling.estimate import Cost
from accel_hidiff.precompiling.plan import Plan, PlannedModel


class Watcher(Protocol):
    """Is told how the work goes, from threads of the pool."""

    def started(self, model: str, digest: str, region: str) -> None:
        """A process begins with an artifact."""

    def ended(self, model: str, outcome: Outcome) -> None:
        """An artifact is there, or it failed."""


@dataclass(frozen=True)
class ModelReport:
    """What became of one model's artifacts.

    Attributes:
        name: of the model.
        graphs, regions: UNet graphs (size x topology x batch), decoders and the like; region calls in them.
        artifacts: distinct artifacts that serve them.
        compiled: of these, compiled now, for this model.
        shared: compiled now for a model before it, which needs them as well.
        found: that were in the cache, or that somebody else compiled meanwhile.
        missing: that are not in the cache now.
        note: why there is nothing to precompile.
    """

    name: str
    graphs: int
    regions: int
    artifacts: int
    compiled: int
    shared: int
    found: int
    missing: int
    note: str


@dataclass(frozen=True)
class Failure:
    """An artifact that is not in the cache, though it was to be compiled.

    Attributes:
        model, region, key: whose it is, and the digest of its key.
        error: one line.
    """

    model: str
    region: str
    key: str
    error: str


@dataclass(frozen=True)
class RunReport:
    """What a precompilation of a deploy file did.

    Attributes:
        file: the deploy file.
        models: one row for each.
        wanted: artifacts that were missing before it.
        failed: what is missing after it.
        jobs: compiling processes.
        bytes: of all artifacts that the file needs, those that share content counted once.
        seconds: wall time.
    """

    file: str
    models: Sequence[ModelReport]
    wanted: int
    failed: Sequence[Failure]
    jobs: int
    bytes: int
    seconds: float

    @property
    def compiled(self) -> int:
        """Artifacts that were compiled."""
        return sum(model.compiled for model in self.models)

    def to_json(self) -> dict[str, Any]:
        """A plain JSON mapping."""
        return {**asdict(self), "compiled": self.compiled, "ready": not self.failed}

    def table(self) -> Table:
        """As a rich table."""
        table = Table(box=None, pad_edge=False)
        table.add_column("model", overflow="fold")
        for name in ("graphs", "calls", "artifacts", "compiled", "shared", "found", "missing"):
            table.add_column(name, justify="right")
        for model in self.models:
            counts = (model.graphs, model.regions, model.artifacts, model.compiled, model.shared, model.found)
            table.add_row(model.name, *map(str, counts), str(model.missing))
        return table

    def lines(self) -> list[str]:
        """What stands below the table."""
        notes = [f"{model.name}: {model.note}" for model in self.models if model.note]
        total = (
            f"{self.compiled} compiled in {self.seconds:.1f} s with {self.jobs} jobs; {self.bytes / 1e6:.1f} MB in all"
        )
        return [*notes, total]

    def raise_failed(self) -> None:
        """CompileFailed, with the first error and the count, if something failed."""
        if self.failed:
            first = self.failed[0]
            count = f"{len(self.failed)} of {max(self.wanted, len(self.failed))} artifacts failed"
            rest = "the others are in the cache, and the same command goes on from there"
            raise CompileFailed(f"{first.model}: {first.region}: {first.error} ({count}; {rest})")


def run(plan: Plan, pool: CompilePool, costs: Sequence[dict[str, Cost]], watcher: Watcher) -> RunReport:
    """Compiles what a plan misses, and sends everything to the cache's remote where the cache pushes.

    Args:
        plan: what is needed; its cache has to be open to store.
        pool: compiles; one that fails leaves the others.
        costs: of each model's own artifacts; the longest come first.
        watcher: is told of each artifact.

    Raises:
        CompileFailed: a model cannot be described to a compiling process.
        CacheWriteError, TrustError: nothing can be stored in the cache.
        RemoteError: the remote does not take what is pushed.
    """
    start = time.perf_counter()
    outcomes: dict[str, Outcome] = {}
    if plan.missing:
        plan.cache.require_writable()
        _compile(plan, pool, costs, watcher, outcomes)
    left = [model.handle.to_compile(model.needed) for model in plan.models]
    failed: dict[str, Failure] = {}
    for model, gone in zip(plan.models, left, strict=True):
        for digest, graph in gone.items():
            failed.setdefault(digest, Failure(model.name, graph.region.path, digest, _why(outcomes.get(digest))))
    compiled = {digest for digest, outcome in outcomes.items() if outcome.state == "compiled"}
    models = [_reported(model, compiled, gone) for model, gone in zip(plan.models, left, strict=True)]
    present = {d: m for m, gone in zip(plan.models, left, strict=True) for d in m.needed.distinct if d not in gone}
    if plan.cache.remote is not None and plan.cache.remote.push:
        plan.cache.push(present)  # those that were here before, too
    size = _bytes(plan, set(present))
    return RunReport(
        plan.file, models, plan.missing, tuple(failed.values()), pool.workers, size, time.perf_counter() - start
    )


def _compile(
    plan: Plan, pool: CompilePool, costs: Sequence[dict[str, Cost]], watcher: Watcher, outcomes: dict[str, Outcome]
) -> None:
    ended = threading.Condition()

    def done_for(model: str) -> Callable[[Outcome], None]:
        def done(outcome: Outcome) -> None:
            watcher.ended(model, outcome)
            with ended:
                outcomes[outcome.digest] = outcome
                ended.notify_all()

        return done

    def begun(model: str, digest: str, region: str) -> Callable[[], None]:
        return lambda: watcher.started(model, digest, region)

    for model, known in zip(plan.models, costs, strict=True):
        if not model.own:
            continue
        blueprint = model.handle.describe()
        for digest in sorted(model.own, key=lambda digest: -known[digest].seconds):
            graph = model.own[digest]
            job = CompileJob.of(graph, digest)
            started = begun(model.name, digest, graph.region.path)
            pool.submit(job, blueprint, plan.cache, done_for(model.name), started)
    with ended:
        while len(outcomes) < plan.missing:
            ended.wait(0.5)  # wakes up for signals


def _why(outcome: Outcome | None) -> str:
    if outcome is not None and not outcome.ok:
        return outcome.error.removeprefix(f"{outcome.path}: ")
    return "it was in the cache and is not any more: give cache.max_bytes more room, or none"


def _reported(model: PlannedModel, compiled: set[str], gone: dict[str, Any]) -> ModelReport:
    distinct = model.needed.distinct
    here = [digest for digest in distinct if digest not in gone]
    own = sum(digest in compiled and digest in model.own for digest in here)
    shared = sum(digest in compiled and digest not in model.own for digest in here)
    counts = len(model.needed.calls), model.regions, len(distinct), own, shared, len(here) - own - shared, len(gone)
    return ModelReport(model.name, *counts, model.note)


def _bytes(plan: Plan, digests: set[str]) -> int:
    blobs: dict[str, int] = {}
    for digest in digests:
        if (entry := plan.cache.find(digest)) is not None:
            blobs |= {ref.sha256: ref.size for ref in entry.files.values()}
    return sum(blobs.values())
