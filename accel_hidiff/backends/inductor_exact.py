"""`torch.compile` on a torch whose Dynamo cannot trace a region's own code: the region is traced first.

Dynamo of torch 2.4 splits a region where it looks for the call that it is in, and compiles the parts behind that again
for other sizes, in the middle of a request. Here each graph is traced at one size, with its weights as inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from accel_hidiff.backends.base import BoundRegion, Prepared
from accel_hidiff.backends.programs import Compile, Programs, Run, make_program
from accel_hidiff.errors import CompileFailed
from accel_hidiff.regions import RegionGraph
from compile_cache import CacheKey, CompileCache, Entry


class ExactInductorBackend:
    """One program for each graph and size, shared by all equal regions; nothing persists."""

    name = spec = "inductor"
    shares = True
    target = None
    smallest_symbolic = None
    persistent = False

    def __init__(self) -> None:
        self._programs = Programs()

    def factors(self, device: torch.device) -> Mapping[str, Any]:
        return {"backend": self.name, "shapes": "exact"}

    def places(self, key: CacheKey) -> tuple[CacheKey, ...]:
        return (key,)

    def prepare(self, graph: RegionGraph, cache: CompileCache) -> Prepared:
        raise CompileFailed("the inductor backend stores nothing; use backend='aot' to fill a cache")

    def ready(self, key: CacheKey) -> bool:
        return key.digest in self._programs

    def bind(self, graph: RegionGraph, entry: Entry | None) -> BoundRegion | None:
        """The program of this graph over the region's weights, compiled now if no equal region had it before."""
        digest = graph.key(self.factors(graph.device)).digest
        program, made = self._programs.get(
            digest, lambda: make_program(graph, "torch.compile", _through_torch, _inductor)
        )
        return BoundRegion(program.over(graph), graph.bucket, made)


def _through_torch(module: fx.GraphModule, backend: Compile) -> Run:
    compiled: Run = torch.compile(module, backend=backend, dynamic=False, fullgraph=True)
    return compiled


def _inductor(module: fx.GraphModule, examples: list[Tensor]) -> Run:
    program: Run = torch._dynamo.lookup_backend("inductor")(module, examples)
    return program
