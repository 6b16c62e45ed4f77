"""`torch.compile`, for regions that cannot be exported: compiled in the process that runs them, nothing persists."""

from __future__ import annotations

import types
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch

from accel_hidiff.backends.base import BoundRegion, Prepared
from accel_hidiff.errors import CompileFailed, first_line
from accel_hidiff.regions import RegionGraph
from compile_cache import CacheKey, CompileCache, Entry


class InductorBackend:
    """One `torch.compile` callable for each graph of each region.

    Dynamo counts recompilations per code object and silently runs eager past its limit; so every graph gets a code
    object of its own, and no two graphs share a limit.
    """

    name = spec = "inductor"
    shares = False
    target = None
    smallest_symbolic = 2  # Dynamo takes 0 and 1 for constants
    persistent = False

    def factors(self, device: torch.device) -> Mapping[str, Any]:
        return {"backend": self.name}

    def places(self, key: CacheKey) -> tuple[CacheKey, ...]:
        return (key,)

    def prepare(self, graph: RegionGraph, cache: CompileCache) -> Prepared:
        raise CompileFailed("the inductor backend stores nothing; use backend='aot' to fill a cache")

    def ready(self, key: CacheKey) -> bool:
        return False  # each region has a callable of its own

    def bind(self, graph: RegionGraph, entry: Entry | None) -> BoundRegion | None:
        """Compiles the graph now, at its example sizes, so that no request pays for it."""
        module = graph.region.graph_module(graph.traits)
        compiled: Any = torch.compile(_own_code(module), dynamic=None if _all_exact(graph) else True)
        scope = graph.region.scope

        def run(*tensors: torch.Tensor) -> Any:
            with nullcontext() if scope is None else scope.opened(None):  # what surrounds the call is no guard
                return compiled(*tensors)

        try:
            with torch.no_grad():
                run(*graph.example())
        except Exception as problem:
            raise CompileFailed(f"{graph.region.path}: torch.compile failed: {first_line(problem)}") from problem
        return BoundRegion(run, graph.bucket, compiled=True)


def _all_exact(graph: RegionGraph) -> bool:
    return all(size.is_exact for size in graph.bucket.dims.values())


def _own_code(module: torch.nn.Module) -> Any:
    def run(*tensors: torch.Tensor) -> Any:
        return module(*tensors)

    code: types.CodeType = run.__code__.replace()
    return types.FunctionType(code, run.__globals__, "run", None, run.__closure__)
