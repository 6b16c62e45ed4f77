"""onediff with oneflow: one graph object for each region graph, saved and loaded under the compile cache's keys.

Written after onediff 1.2.0's source, and not run with a real oneflow so far: no release of it on PyPI works with
onediff (docs/onediff.md tells how to verify it where a build is at hand).
"""

from __future__ import annotations

import importlib
import os
import threading
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import diffusers  # noqa: F401 - before onediff: only then are oneflow's versions of its classes registered
import torch
from torch import Tensor, nn

import accel_hidiff
from accel_hidiff.backends.base import BoundRegion, Prepared, served
from accel_hidiff.backends.sources import source_digest
from accel_hidiff.config import OneDiffConfig
from accel_hidiff.errors import BadInput, CompileFailed, first_line
from accel_hidiff.regions import RegionGraph
from compile_cache import CacheKey, CompileCache, Entry
from compile_cache.environment import environment_factors

_FILE: Final = "oneflow.graph"
_PREFIX: Final = "ONEFLOW_"


class OneflowBackend:
    """Graphs compiled by oneflow, kept in the compile cache.

    Args:
        config: fields of `OneflowCompileOptions`; the compiler is oneflow, whatever it says.

    Raises:
        BadInput: another backend of this process set oneflow's environment variables otherwise.
    """

    name = "onediff"
    smallest_symbolic = None
    persistent = True
    shares = True
    target = None

    def __init__(self, config: OneDiffConfig) -> None:
        claim_process(config.options)
        self.spec = config
        # onediff sets oneflow's variables at its first compilation, so that keys would differ before and after it.
        env_var = importlib.import_module("onediff.infer_compiler.backends.env_var")
        env_var.set_oneflow_default_env_vars()
        env_var.set_oneflow_env_vars(self._options())

    def factors(self, device: torch.device) -> Mapping[str, Any]:
        return {
            "backend": self.name,
            "compiler": "oneflow",
            "options": dict(self.spec.options),
            "variables": {name: value for name, value in os.environ.items() if name.startswith(_PREFIX)},
            "environment": environment_factors(device.type),
            "versions": {name: metadata.version(name) for name in ("onediff", "oneflow", "diffusers")},
            "accel_hidiff": accel_hidiff.__version__,
            "accel_hidiff source": source_digest("backends/oneflow.py"),
        }

    def places(self, key: CacheKey) -> tuple[CacheKey, ...]:
        return (key,)

    def prepare(self, graph: RegionGraph, cache: CompileCache) -> Prepared:
        start = time.perf_counter()
        compiled = False

        def build(directory: Path) -> Mapping[str, Any]:
            nonlocal compiled
            compiled = True
            path = directory / _FILE
            try:
                deployable = self._deployable(graph.region.graph_module(graph.traits))
                with torch.no_grad():
                    deployable(*graph.example())
                deployable.save_graph(str(path))
            except Exception as problem:
                raise CompileFailed(f"{graph.region.path}: oneflow failed: {first_line(problem)}") from problem
            if not path.is_file():  # some failures are only logged
                raise CompileFailed(f"{graph.region.path}: expected oneflow to save its graph, it wrote no file")
            seconds = round(time.perf_counter() - start, 2)
            return {"region": graph.region.kind, "serves": graph.bucket.to_json(), "seconds": seconds}

        entry = cache.get_or_build(graph.key(self.factors(graph.device)), build)
        return Prepared(entry, compiled, time.perf_counter() - start)

    def ready(self, key: CacheKey) -> bool:
        return False

    def bind(self, graph: RegionGraph, entry: Entry | None) -> BoundRegion | None:
        """The saved graph, loaded over the region's weights, by an object that nothing else uses."""
        assert entry is not None, "a persistent backend binds a cache entry"
        try:
            deployable = self._deployable(graph.region.graph_module(graph.traits))
            deployable.load_graph(str(entry.path / _FILE), None, True)
        except Exception as problem:
            raise CompileFailed(
                f"{graph.region.path}: oneflow's graph does not load: {first_line(problem)}"
            ) from problem

        def call(*inputs: Tensor) -> Any:
            with torch.no_grad():
                return deployable(*inputs)

        return BoundRegion(call, served(entry))

    def _deployable(self, module: nn.Module) -> Any:
        """onediff's callable of a module, with no graph in it yet."""
        from onediff.infer_compiler import compile as onediff_compile

        return onediff_compile(module, backend="oneflow", options=self._options())

    def _options(self) -> Any:
        from onediff.infer_compiler import OneflowCompileOptions

        # One size for each object, and no graph file of onediff's: its name would tell no shapes, dtypes or versions.
        return OneflowCompileOptions(dynamic=False, max_cached_graph_size=1, graph_file=None, **self.spec.options)


_claimed: dict[str, Any] | None = None
_claim = threading.Lock()


def claim_process(options: Mapping[str, Any]) -> None:
    """onediff hands options to oneflow as environment variables of the whole process: the first ones stay.

    Raises:
        BadInput: this process has others.
    """
    global _claimed  # noqa: PLW0603
    with _claim:
        if _claimed is None:
            _claimed = dict(options)
        if _claimed != dict(options):
            raise BadInput(
                f"onediff.options: expected {_claimed!r}, which this process uses with oneflow already, got "
                f"{dict(options)!r}; they become environment variables of the whole process: start another one"
            )
