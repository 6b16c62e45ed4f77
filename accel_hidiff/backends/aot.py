"""AOTInductor: regions exported once, compiled ahead of time into packages without weights, bound to live weights.

Two keys as in a remote build cache: the action key (`RegionGraph.key`) comes from cheap facts; the content key comes
from the exported program, so that a region that exports to a known graph reuses its artifact. A warm start computes
action keys only and never traces.

A package for a GPU is compiled on the device, or by a `crosscompile.Session` on a machine that has none; both are keyed
by the `Target`, and each serves in the place of the other.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from contextlib import nullcontext
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

import accel_hidiff
from accel_hidiff.backends.aot_cuda import options_of, rows_at_once
from accel_hidiff.backends.aot_package import bound_call, load_package
from accel_hidiff.backends.aot_program import (
    attention_calls,
    export_region,
    program_digest,
    quietly,
    served_bucket,
    used_weights,
)
from accel_hidiff.backends.base import BoundRegion, Prepared, served
from accel_hidiff.backends.sources import source_digest
from accel_hidiff.errors import CompileFailed
from accel_hidiff.regions import RegionGraph
from accel_hidiff.target import HOST_LIBRARIES, Target
from compile_cache import CacheKey, CompileCache, Entry
from compile_cache.environment import environment_factors

if TYPE_CHECKING:
    from accel_hidiff.crosscompile.session import Session

# Passed to one compilation at a time, never set globally.
OPTIONS: dict[str, bool | int | str] = {
    "aot_inductor.package_constants_in_so": False,  # no weights in the artifact
    "always_keep_tensor_constants": True,  # else those of up to 8 numbers are: a bias of the compiled checkpoint
    "cpp.dynamic_threads": True,  # else the compiling machine's thread count is baked into the code
}
TUNED: Final = "tuned"
_PACKAGE = "package.pt2"
_SOURCES: Final = ("backends/aot.py", "backends/aot_program.py", "forms.py")
_CUDA_SOURCES: Final = (
    "backends/aot_cuda.py",
    *(f"crosscompile/{name}.py" for name in ("attention", "choosing", "host", "standins")),
)


class AOTBackend:
    """Export with `torch.export`, compile with AOTInductor, load without a compiler.

    Args:
        target: what GPU code is compiled and looked for for; None: for the device that a graph is on.
        session: compiles for the target in this process, which needs no such device; None: on the device.
        variant: "tuned": artifacts that were tuned on this device (`tuning`) are used where there are any.
    """

    name = spec = "aot"
    shares = True
    smallest_symbolic = 1
    persistent = True

    def __init__(
        self, target: Target | None = None, session: Session | None = None, variant: str | None = None
    ) -> None:
        self.target = target
        self.variant = variant
        self._session = session

    def factors(self, device: torch.device) -> Mapping[str, Any]:
        return _factors(device.type, self.target if device.type == "cuda" else None)

    def places(self, key: CacheKey) -> tuple[CacheKey, ...]:
        return (tuned_key(key), key) if self.variant == TUNED else (key,)

    def prepare(self, graph: RegionGraph, cache: CompileCache) -> Prepared:
        start = time.perf_counter()
        action = graph.key(self.factors(graph.device))
        if (entry := cache.get(action)) is not None:
            return Prepared(entry, False, time.perf_counter() - start)
        entry, compiled = self.compile(graph, cache)
        return Prepared(cache.link(action, entry), compiled, time.perf_counter() - start)

    def compile(
        self, graph: RegionGraph, cache: CompileCache, options: Mapping[str, Any] | None = None
    ) -> tuple[Entry, bool]:
        """The artifact of a graph under its content's key, and whether it was compiled now.

        Args:
            graph: of a region.
            cache: keeps it.
            options: more options of Inductor, which are a part of the content's key.

        Raises:
            CompileFailed: it cannot be exported or compiled, or holds what it should not.
        """
        start = time.perf_counter()
        factors = self.factors(graph.device)
        chosen = options_of(graph) if graph.device.type == "cuda" else {}
        factors = {**factors, "options": {**factors["options"], **chosen, **(options or {})}}
        session = self._session if graph.device.type == "cuda" else None
        program, inputs = export_region(graph, None if session is None else session.making())
        if session is not None:
            program = session.exported(program)
        bucket = served_bucket(graph, program)
        compiler = {name: value for name, value in factors.items() if name != "versions"}  # the program says it all
        made = self._made_for(graph.device)
        content = CacheKey({"content": program_digest(program), **compiler, **made})
        compiled = False

        def build(directory: Path) -> Mapping[str, Any]:
            nonlocal compiled
            compiled = True
            package = directory / _PACKAGE
            _compile(graph, program, package, factors)
            notes: dict[str, Any] = {"region": graph.region.kind, "serves": bucket.to_json(), "inputs": inputs, **made}
            notes |= self._checked(graph, program, package, inputs)
            seconds = round(time.perf_counter() - start, 2)  # what a later estimate goes by
            return {**notes, "seconds": seconds, "weights": graph.region.weights}

        return cache.get_or_build(content, build), compiled

    def ready(self, key: CacheKey) -> bool:
        return False

    def bind(self, graph: RegionGraph, entry: Entry | None) -> BoundRegion | None:
        assert entry is not None, "a persistent backend binds a cache entry"
        module = graph.region.graph_module(graph.traits)
        return BoundRegion(bound_call(graph.region.path, entry, _PACKAGE, module, graph.device), served(entry))

    def _made_for(self, device: torch.device) -> dict[str, Any]:
        """What steers how fast GPU code is, and where it was compiled: in its content's key, and noted."""
        if device.type != "cuda":
            return {}
        if self._session is not None:
            return {"made_for": str(self._session.target), "tuned": "by rule"}
        return {"made_for": torch.cuda.get_device_name(device), "tuned": "on the device"}

    def _checked(
        self, graph: RegionGraph, program: torch.export.ExportedProgram, package: Path, inputs: list[Any]
    ) -> dict[str, Any]:
        """Notes on a package that holds nothing that it should not; CompileFailed for another one."""
        from accel_hidiff.packages.archive import rewrite
        from accel_hidiff.packages.check import Expected, refusals
        from accel_hidiff.packages.facts import read_package

        rewrite(package)
        path, cuda, session = graph.region.path, graph.device.type == "cuda", self._session
        if session is None:
            # Processes that compile one graph at once share Inductor's own files, and can leave a package with
            # half-written ones: what does not load is not stored.
            advice = "nothing was stored: compile again, alone or with another TORCHINDUCTOR_CACHE_DIR"
            load_package(path, package, graph.device, advice)
        facts = read_package(package, inputs)
        target = self.target or (Target.of_factors(self.factors(graph.device)["environment"]) if cuda else None)
        expected = Expected(
            weights=used_weights(program),
            channels_last=graph.region.memory_format == torch.channels_last,
            attentions=0 if target is None else _fused_calls(program, target),
            architecture=None if target is None else target.architecture,
            machine=platform.machine(),
            versions={} if session is None else dict(HOST_LIBRARIES),
        )
        unresolved = () if session is None else session.unresolved(facts.native, package)
        if wrong := refusals(expected, facts, unresolved):
            raise CompileFailed(
                f"{path}: {wrong[0]}; nothing was stored: use backend='inductor' for this model, and report this"
            )
        if session is None:
            return {}
        kernels = [choice.to_json(session.target.profile.limits) for choice in session.take_choices()]
        return {"kernels": kernels}


def tuned_key(key: CacheKey) -> CacheKey:
    """Where the artifact of a graph is that was tuned on this machine's device."""
    device = torch.cuda.get_device_name() if key.factors["device"] == "cuda" else "cpu"
    return CacheKey({**key.factors, "variant": {"name": TUNED, "device": device}})


def _fused_calls(program: torch.export.ExportedProgram, target: Target) -> int:
    """How many of a program's calls of attention a fused kernel takes."""
    from accel_hidiff.crosscompile.attention import PLAIN, attention_kernel

    count = 0
    for query, value, masked, grouped in attention_calls(program):
        widths, capability = (int(query.shape[-1]), int(value.shape[-1])), target.profile.capability
        count += attention_kernel(query.dtype, *widths, capability, masked=masked, grouped=grouped) != PLAIN
    return count


@lru_cache(maxsize=8)
def _factors(device: str, target: Target | None = None) -> Mapping[str, Any]:
    cuda = device == "cuda"
    return {
        "backend": "aot",
        "options": OPTIONS,
        "environment": environment_factors(device) if target is None else target.factors(),
        "versions": {
            "diffusers": metadata.version("diffusers"),
            "accel_hidiff": accel_hidiff.__version__,
            "accel_hidiff source": source_digest(*_SOURCES, *(_CUDA_SOURCES if cuda else ())),
        },
    }


def _compile(graph: RegionGraph, program: Any, path: Path, factors: Mapping[str, Any]) -> None:
    from accel_hidiff.crosscompile.host import compiling_for_host

    host = factors["environment"].get("host")  # of GPU code, which other machines take; CPU code is this machine's own
    try:
        own = rows_at_once() if graph.device.type == "cuda" else nullcontext()
        with torch.no_grad(), own, compiling_for_host(host) if host else nullcontext():
            options = {"package_path": str(path), "inductor_configs": dict(factors["options"])}
            quietly(torch._inductor.aoti_compile_and_package, program, **options)
    except Exception as problem:
        lines = str(problem).strip().splitlines()
        raise CompileFailed(
            f"{graph.region.path}: AOTInductor failed: {type(problem).__name__}: {lines[0] if lines else ''}; "
            "`accel-hidiff doctor` tells whether a compiler is usable here"
        ) from problem
