"""The reference backend: nothing is compiled, every region runs as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from accel_hidiff.backends.base import BoundRegion, Prepared
from accel_hidiff.errors import CompileFailed
from accel_hidiff.regions import RegionGraph
from compile_cache import CacheKey, CompileCache, Entry


class EagerBackend:
    """Runs every region eager; guard, phases and dispatch stay the same, for comparison."""

    name = spec = "eager"
    shares = False
    target = None
    smallest_symbolic = 1
    persistent = False

    def factors(self, device: torch.device) -> Mapping[str, Any]:
        return {"backend": self.name}

    def places(self, key: CacheKey) -> tuple[CacheKey, ...]:
        return (key,)

    def prepare(self, graph: RegionGraph, cache: CompileCache) -> Prepared:
        raise CompileFailed("the eager backend compiles nothing; use backend='aot' to fill a cache")

    def ready(self, key: CacheKey) -> bool:
        return True

    def bind(self, graph: RegionGraph, entry: Entry | None) -> BoundRegion | None:
        return None
