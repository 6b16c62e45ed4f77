"""What a deploy file needs: the graphs of each of its models, from configs alone, and which of them are missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from accel_hidiff.compiling.needed import Needed
from accel_hidiff.deploy import Deployment, ModelTable
from accel_hidiff.deployed import open_deployed_cache, open_deployed_model
from accel_hidiff.errors import BadInput
from accel_hidiff.pipeline import Handle
from accel_hidiff.precompiling.estimate import Cost, Estimator
from accel_hidiff.regions import RegionGraph
from compile_cache import CompileCache


@dataclass(frozen=True)
class PlannedModel:
    """One model of a deploy file, and the artifacts that it needs.

    Attributes:
        table: its table in the file.
        handle: of its pipeline without weights.
        needed: its graphs; empty where its backend keeps no artifacts.
        missing: those that the cache does not hold, by the digest of their key.
        own: those of `missing` that no model before it needs.
    """

    table: ModelTable
    handle: Handle
    needed: Needed
    missing: Mapping[str, RegionGraph]
    own: Mapping[str, RegionGraph]

    @property
    def name(self) -> str:
        """What the file calls it."""
        return self.table.name

    @property
    def note(self) -> str:
        """Why there is nothing to precompile, if there is not."""
        if self.handle.keeps_artifacts:
            return ""
        how = "nothing" if self.table.backend == "eager" else "in every process anew"
        return f'nothing to precompile: backend "{self.table.backend}" compiles {how}'

    @property
    def regions(self) -> int:
        """Region calls of all its graphs."""
        return sum(len(graphs) for graphs in self.needed.calls)

    @property
    def shared(self) -> int:
        """Missing artifacts that a model before it needs as well: they are compiled once, for that one."""
        return len(self.missing) - len(self.own)


@dataclass(frozen=True)
class Plan:
    """Everything that a deploy file needs.

    Attributes:
        file: its path, as it was given.
        cache: its cache.
        models: in the order of the file.
    """

    file: str
    cache: CompileCache
    models: Sequence[PlannedModel]

    @property
    def artifacts(self) -> int:
        """Distinct artifacts of all models together."""
        return len({digest for model in self.models for digest in model.needed.distinct})

    @property
    def missing(self) -> int:
        """How many of them the cache does not hold."""
        return sum(len(model.own) for model in self.models)

    @property
    def command(self) -> str:
        """What compiles the missing ones."""
        return f"accel-hidiff precompile {self.file}"


def make_plan(file: str, deployment: Deployment, *, storing: bool) -> Plan:
    """Opens the models of a deploy file from their configs, and looks for their graphs. Compiles nothing.

    What the cache lacks and its remote has is fetched, as a service would.

    Args:
        file: for messages.
        deployment: what it says.
        storing: open the cache to store, with its key; else as a service does.

    Raises:
        BadInput, CompileCacheError: a model or the cache is not what it should be; the message names the model.
    """
    cache = open_deployed_cache(deployment.cache, signing=storing)
    models: list[PlannedModel] = []
    before: set[str] = set()
    for table in deployment.models:
        try:
            models.append(_planned(table, cache, before))
        except BadInput as problem:
            raise BadInput(f"{file}: model {table.name!r}: {problem}") from problem
        before |= set(models[-1].missing)
    return Plan(file, cache, tuple(models))


def _planned(table: ModelTable, cache: CompileCache, before: set[str]) -> PlannedModel:
    handle = open_deployed_model(table, cache, on_miss="eager", weights=False)
    if not handle.keeps_artifacts:
        return PlannedModel(table, handle, Needed((), {}), {}, {})
    options: dict[str, Any] = {"batch_sizes": table.batch_sizes, "strengths": table.strengths}
    needed = handle.needed(table.pixel_sizes(), table.steps, **options)
    missing = handle.to_compile(needed)
    own = {digest: graph for digest, graph in missing.items() if digest not in before}
    return PlannedModel(table, handle, needed, missing, own)


def costs_of(model: PlannedModel, estimator: Estimator) -> dict[str, Cost]:
    """What each artifact that is to be compiled for a model will cost, by the digest of its key."""
    return {
        digest: estimator.cost(graph.region.kind, graph.device.type, graph.region.weights)
        for digest, graph in model.own.items()
    }
