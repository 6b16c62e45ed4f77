"""`precompile --check` and `--dry-run`: what is missing, and what it would cost. Compile nothing, read no weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from accel_hidiff.precompiling.estimate import CUDA_FROM, TABLE_FROM, WHOLE, Estimator, samples_of, wall_seconds
from accel_hidiff.precompiling.plan import Plan, PlannedModel, costs_of
from accel_hidiff.regions import RegionGraph


@dataclass(frozen=True)
class MissingArtifact:
    """An artifact that the cache does not hold.

    Attributes:
        model: the first one in the file that needs it.
        region: a region that it serves; others of the same structure share it.
        kind: of the region.
        sizes: the bucket that it would serve.
        key: digest of its key, 64 hex digits.
        reason: why it is missing: what the nearest entry differs in, how its build failed.
    """

    model: str
    region: str
    kind: str
    sizes: str
    key: str
    reason: str


@dataclass(frozen=True)
class CheckReport:
    """What `--check` found.

    Attributes:
        file: the deploy file.
        artifacts: distinct artifacts that it needs.
        missing: those that the cache does not hold.
        models: by name, (artifacts needed, of these missing, note).
        command: what compiles the missing ones.
    """

    file: str
    artifacts: int
    missing: Sequence[MissingArtifact]
    models: Sequence[tuple[str, int, int, str]]
    command: str

    @property
    def ready(self) -> bool:
        """Whether nothing is missing."""
        return not self.missing

    def to_json(self) -> dict[str, Any]:
        """A plain JSON mapping."""
        names = ("name", "artifacts", "missing", "note")
        return {
            "file": self.file,
            "ready": self.ready,
            "artifacts": self.artifacts,
            "models": [dict(zip(names, model, strict=True)) for model in self.models],
            "missing": [asdict(artifact) for artifact in self.missing],
            "command": self.command,
        }

    def __str__(self) -> str:
        lines = []
        for name, needed, missing, note in self.models:
            own = [artifact for artifact in self.missing if artifact.model == name]
            before = f", {missing - len(own)} of them above" if missing > len(own) else ""
            told = f"{needed} artifacts, {needed - missing} in the cache, {missing} missing{before}"
            lines.append(f"{name}: {note or told}")
            lines += [f"  {one.region} ({one.kind}, {one.sizes}): {one.reason}" for one in own]
        if self.ready:
            lines.append(f"nothing is missing: all {self.artifacts} artifacts are in the cache")
        else:
            lines.append(f"{len(self.missing)} of {self.artifacts} artifacts are missing; to compile them:")
            lines.append(f"  {self.command}")
        return "\n".join(lines)


def check(plan: Plan) -> CheckReport:
    """What of a plan the cache does not hold, with reasons."""
    missing = [artifact for model in plan.models for artifact in _missing(model)]
    models = [(m.name, len(m.needed.distinct), len(m.missing), m.note) for m in plan.models]
    return CheckReport(plan.file, plan.artifacts, missing, models, plan.command)


def _missing(model: PlannedModel) -> list[MissingArtifact]:
    if not model.own:
        return []
    reasons = model.handle.missing(model.needed)
    return [
        MissingArtifact(
            model.name,
            graph.region.path,
            graph.region.kind,
            str(graph.bucket),
            digest,
            reasons.get(digest, f"{graph.region.path}: it has come just now").removeprefix(f"{graph.region.path}: "),
        )
        for digest, graph in model.own.items()
    ]


@dataclass(frozen=True)
class ModelEstimate:
    """What one model of a deploy file will cost.

    Attributes:
        name: of the model.
        graphs, regions: UNet graphs (size x topology x batch), decoders and the like; region calls in them.
        artifacts: distinct artifacts that serve them.
        found: of these, in the cache.
        shared: missing, and compiled for a model before this one.
        compile: missing, to be compiled.
        seconds: of one core, for these.
        bytes: of these.
        note: why there is nothing to precompile.
    """

    name: str
    graphs: int
    regions: int
    artifacts: int
    found: int
    shared: int
    compile: int
    seconds: float
    bytes: float
    note: str


@dataclass(frozen=True)
class EstimateReport:
    """What `--dry-run` tells.

    Attributes:
        file: the deploy file.
        models: one row for each.
        jobs: compiling processes that `minutes` assumes, each with a core of its own.
        minutes: wall time.
        bases: how many artifacts were estimated from what: "same kind", "other kinds", "table".
        measured: artifacts in this cache that were measured when they were compiled.
        tables: where the table is from.
        low: of whole models with symbolic sizes, which take far longer than anything in the table.
    """

    file: str
    models: Sequence[ModelEstimate]
    jobs: int
    minutes: float
    bases: dict[str, int]
    measured: int
    tables: str
    low: int

    @property
    def compile(self) -> int:
        """Artifacts to compile."""
        return sum(model.compile for model in self.models)

    @property
    def bytes(self) -> float:
        """Their size."""
        return sum(model.bytes for model in self.models)

    def base(self) -> str:
        """What the estimate rests on, in words."""
        texts = {
            "same kind": f"{{}} from {self.measured} artifacts that were compiled into this cache, of the same kind",
            "other kinds": f"{{}} from the table ({self.tables}), scaled by {self.measured} artifacts in this cache",
            "table": f"{{}} from the table ({self.tables}): no artifact in this cache tells",
        }
        told = [texts[base].format(count) for base, count in self.bases.items()]
        if self.low:
            told.append(f"too low for {self.low} of them: whole models with symbolic sizes, which were not measured")
        return "; ".join(told)

    def to_json(self) -> dict[str, Any]:
        """A plain JSON mapping."""
        sums = {"compile": self.compile, "bytes": round(self.bytes), "base": self.base()}
        return {**asdict(self), "minutes": round(self.minutes, 2), **sums}

    def table(self) -> Table:
        """As a rich table."""
        table = Table(box=None, pad_edge=False)
        table.add_column("model", overflow="fold")
        names = ("graphs", "calls", "artifacts", "cached", "shared", "to compile", "minutes", "MB")
        for name in names:
            table.add_column(name, justify="right")
        for model in self.models:
            counts = (model.graphs, model.regions, model.artifacts, model.found, model.shared, model.compile)
            numbers = f"{model.seconds / 60:.1f}", f"{model.bytes / 1e6:.1f}"
            table.add_row(model.name, *map(str, counts), *numbers)
        return table

    def lines(self) -> list[str]:
        """What stands below the table."""
        notes = [f"{model.name}: {model.note}" for model in self.models if model.note]
        if not self.compile:
            return [*notes, "nothing to compile"]
        processes = "1 job" if self.jobs == 1 else f"{self.jobs} jobs, each with a core of its own"
        total = f"{self.compile} artifacts to compile: about {self.minutes:.1f} minutes with {processes}, "
        return [*notes, f"{total}and {self.bytes / 1e6:.1f} MB", f"estimated: {self.base()}"]


def estimate(plan: Plan, jobs: int) -> EstimateReport:
    """What compiling a plan will cost.

    Args:
        plan: what is missing.
        jobs: compiling processes.
    """
    samples = samples_of(plan.cache)
    known = {sample.region for sample in samples}
    graphs = [graph for model in plan.models for graph in model.own.values()]
    estimator = Estimator(samples)
    models, every = [], []
    for model in plan.models:
        costs = list(costs_of(model, estimator).values())
        every += costs
        found = len(model.needed.distinct) - len(model.missing)
        counts = len(model.needed.calls), model.regions, len(model.needed.distinct), found, model.shared, len(costs)
        sums = sum(cost.seconds for cost in costs), sum(cost.bytes for cost in costs)
        models.append(ModelEstimate(model.name, *counts, *sums, model.note))
    bases = Counter(cost.base for cost in every)
    low = sum(_is_low(graph, known) for graph in graphs)
    minutes = wall_seconds(every, jobs) / 60
    tables = dict.fromkeys(CUDA_FROM if graph.device.type == "cuda" else TABLE_FROM for graph in graphs)
    return EstimateReport(plan.file, models, jobs, minutes, dict(bases), len(samples), "; ".join(tables), low)


def _is_low(graph: RegionGraph, known: set[str]) -> bool:
    symbolic = not all(size.is_exact for size in graph.bucket.dims.values())
    return symbolic and graph.region.kind in WHOLE and graph.region.kind not in known
