"""AOTInductor: regions exported once, compiled ahead of time into packages without weights, bound to live weights.

Two keys as in a remote build cache: the action key (`RegionGraph.key`) comes from cheap facts; the content key comes
from the exported program, so that a region that exports to a known graph reuses its artifact. A warm start computes
action keys only and never traces.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import accel_hidiff
from accel_hidiff.backends.aot_package import bound_call, load_package
from accel_hidiff.backends.aot_program import export_region, program_digest, quietly, served_bucket
from accel_hidiff.backends.base import BoundRegion, Prepared, served
from accel_hidiff.backends.sources import source_digest
from accel_hidiff.errors import CompileFailed
from accel_hidiff.regions import RegionGraph
from compile_cache import CacheKey, CompileCache, Entry
from compile_cache.environment import environment_factors

# Passed to one compilation at a time, never set globally.
OPTIONS: dict[str, bool | int | str] = {
    "aot_inductor.package_constants_in_so": False,  # no weights in the artifact
    "always_keep_tensor_constants": True,  # else those of up to 8 numbers are: a bias of the compiled checkpoint
    "cpp.dynamic_threads": True,  # else the compiling machine's thread count is baked into the code
}
_PACKAGE = "package.pt2"


class AOTBackend:
    """Export with `torch.export`, compile with AOTInductor, load without a compiler."""

    name = spec = "aot"
    shares = True
    smallest_symbolic = 1
    persistent = True

    def factors(self, device: torch.device) -> Mapping[str, Any]:
        return _factors(device.type)

    def prepare(self, graph: RegionGraph, cache: CompileCache) -> Prepared:
        start = time.perf_counter()
        factors = self.factors(graph.device)
        action = graph.key(factors)
        if (entry := cache.get(action)) is not None:
            return Prepared(entry, False, time.perf_counter() - start)
        program, inputs = export_region(graph)
        bucket = served_bucket(graph, program)
        compiler = {name: value for name, value in factors.items() if name != "versions"}  # the program says it all
        content = CacheKey({"content": program_digest(program), **compiler})
        compiled = False

        def build(directory: Path) -> Mapping[str, Any]:
            nonlocal compiled
            compiled = True
            _compile(graph, program, directory / _PACKAGE)
            # Processes that compile one graph at once share Inductor's own files, and can leave a package with
            # half-written ones: what does not load is not stored.
            advice = "nothing was stored: compile again, alone or with another TORCHINDUCTOR_CACHE_DIR"
            loaded = load_package(graph.region.path, directory / _PACKAGE, graph.device, advice)
            _require_free_weights(graph, program, loaded)
            seconds = round(time.perf_counter() - start, 2)  # what a later estimate goes by
            notes = {"region": graph.region.kind, "serves": bucket.to_json(), "inputs": inputs}
            return {**notes, "seconds": seconds, "weights": graph.region.weights}

        entry = cache.link(action, cache.get_or_build(content, build))
        return Prepared(entry, compiled, time.perf_counter() - start)

    def ready(self, key: CacheKey) -> bool:
        return False

    def bind(self, graph: RegionGraph, entry: Entry | None) -> BoundRegion | None:
        assert entry is not None, "a persistent backend binds a cache entry"
        module = graph.region.graph_module(graph.traits)
        return BoundRegion(bound_call(graph.region.path, entry, _PACKAGE, module, graph.device), served(entry))


def _require_free_weights(graph: RegionGraph, program: torch.export.ExportedProgram, package: Any) -> None:
    """CompileFailed if the package holds a weight as a constant: it would serve one checkpoint only."""
    signature = program.graph_signature
    named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    used = {named[node.name] for node in program.graph.nodes if node.name in named and node.users}
    if baked := sorted(used - set(package.get_constant_fqns())):
        raise CompileFailed(
            f"{graph.region.path}: expected a package that takes all weights from outside, {baked[0]} is a constant of "
            "it, which no other checkpoint shares; nothing was stored: use backend='inductor' for this model"
        )


@lru_cache(maxsize=8)
def _factors(device: str) -> Mapping[str, Any]:
    return {
        "backend": "aot",
        "options": dict(OPTIONS),
        "environment": environment_factors(device),
        "versions": {
            "diffusers": metadata.version("diffusers"),
            "accel_hidiff": accel_hidiff.__version__,
            "accel_hidiff source": source_digest("backends/aot.py", "backends/aot_program.py"),
        },
    }


def _compile(graph: RegionGraph, program: torch.export.ExportedProgram, path: Path) -> None:
    try:
        with torch.no_grad():
            options = {"package_path": str(path), "inductor_configs": dict(OPTIONS)}
            quietly(torch._inductor.aoti_compile_and_package, program, **options)
    except Exception as problem:
        lines = str(problem).strip().splitlines()
        raise CompileFailed(
            f"{graph.region.path}: AOTInductor failed: {type(problem).__name__}: {lines[0] if lines else ''}; "
            "`accel-hidiff doctor` tells whether a compiler is usable here"
        ) from problem
