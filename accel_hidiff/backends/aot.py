"""AOTInductor: regions exported once, compiled ahead of time into packages without weights, bound to live weights.

Two keys as in a remote build cache: the action key (`RegionGraph.key`) comes from cheap facts; the content key comes
from the exported program, so that a region that exports to a known graph reuses its artifact. A warm start computes
action keys only and never traces.
"""

from __future__ import annotations

import hashlib
import json
import time
import warnings
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

import accel_hidiff
from accel_hidiff.backends.base import BoundRegion, Prepared, served
from accel_hidiff.backends.sources import source_digest
from accel_hidiff.errors import CompileFailed
from accel_hidiff.regions import RegionGraph
from compile_cache import CacheKey, CompileCache, Entry, Range, ShapeBucket
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
        program, inputs = _export(graph)
        bucket = _served_bucket(graph, program)
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
            _require_free_weights(graph, program, _load(graph, directory / _PACKAGE, advice))
            seconds = round(time.perf_counter() - start, 2)  # what a later estimate goes by
            notes = {"region": graph.region.kind, "serves": bucket.to_json(), "inputs": inputs}
            return {**notes, "seconds": seconds, "weights": graph.region.weights}

        entry = cache.link(action, cache.get_or_build(content, build))
        return Prepared(entry, compiled, time.perf_counter() - start)

    def ready(self, key: CacheKey) -> bool:
        return False

    def bind(self, graph: RegionGraph, entry: Entry | None) -> BoundRegion | None:
        assert entry is not None, "a persistent backend binds a cache entry"
        idle = _idle[entry.files[_PACKAGE].sha256, _device_index(graph.device)]
        try:
            package = idle.pop()
        except IndexError:
            advice = f"delete artifact {entry.digest[:12]} from the cache and compile again"
            package = _Package(_load(graph, entry.path / _PACKAGE, advice))
        module = graph.region.graph_module(graph.traits)
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        if missing := [name for name in package.names if name not in tensors]:
            raise CompileFailed(
                f"{graph.region.path}: expected a region that holds {missing[0]}, which artifact {entry.digest[:12]} "
                "binds; it was made for another structure: delete it (compile-cache verify) and compile again"
            )
        package.bind(tensors)
        call = _Call(package)
        weakref.finalize(call, _release, idle, package).atexit = False
        return BoundRegion(call, served(entry))


class _Package:
    """A loaded package, and tensors of its own over the memory of the weights that it is bound to.

    Of its own: `module.to(...)` gives a parameter other memory, and what the code reads must live until the next
    request binds anew. And always the same ones: torch's `load_constants(user_managed=True)` never lets go of a tensor
    that it was given, whatever is loaded in its place (torch 2.13), so that every model that was exchanged would stay
    in memory. These take up other memory, and give it up, but are never given up themselves.
    """

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self._slots: dict[str, Tensor] = {}
        self.names: list[str] = loader.get_constant_fqns()
        self.run: Callable[[list[Tensor]], list[Tensor]] = loader.boxed_run

    def bind(self, tensors: Mapping[str, Tensor]) -> None:
        """Calls run over these weights from now on."""
        with torch.inference_mode():
            for name in self.names:
                weight = tensors[name].detach()
                if name not in self._slots:
                    self._slots[name] = torch.empty(0, dtype=weight.dtype, device=weight.device)
                self._slots[name].set_(weight)  # type: ignore[call-overload]
        self._loader.load_constants(self._slots, False, True, user_managed=True)  # all of the active buffer

    def unbind(self) -> None:
        """The weights' memory is given up; nothing may call it before it is bound again."""
        # The collector may call this in the middle of anything: in a kernel of tracing, where all operators are meta's.
        with _disable_current_modes(), torch.inference_mode(), torch._C._PreserveDispatchKeyGuard():
            torch._C._set_meta_in_tls_dispatch_include(False)
            for slot in self._slots.values():
                slot.set_()  # type: ignore[call-overload]


# Packages that nobody calls any more, by content and device. The library of a package stays in the process once it is
# loaded (`dlclose` does not unload it), so it is bound to other weights, whoever needs the same program next.
_idle: defaultdict[tuple[str, int], deque[_Package]] = defaultdict(deque)


def _release(idle: deque[_Package], package: _Package) -> None:
    package.unbind()
    idle.append(package)


class _Call:
    """Calls a package; when the last reference to it goes, the package is idle."""

    __slots__ = ("__weakref__", "_run")

    def __init__(self, package: _Package) -> None:
        self._run = package.run

    def __call__(self, *inputs: Tensor) -> Any:
        out = self._run(list(inputs))
        return out[0] if len(out) == 1 else tuple(out)


def _load(graph: RegionGraph, path: Path, advice: str) -> Any:
    """Loads a package by torch's C++ loader; CompileFailed, with the advice, where it does not load.

    `torch._inductor.aoti_load_package` wraps the same loader, but first probes the vector instructions of this CPU, for
    a log line, by compiling and running programs: a serving process has no use for a compiler. What it would compare
    is part of every action key.
    """
    run_single_threaded, num_runners = False, 1
    loader = torch._C._aoti.AOTIModelPackageLoader
    try:
        return loader(str(path), "model", run_single_threaded, num_runners, _device_index(graph.device))
    except RuntimeError as problem:
        got = str(problem).strip().splitlines()[0]
        raise CompileFailed(f"{graph.region.path}: expected a package that loads, got: {got}; {advice}") from problem


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


def _device_index(device: torch.device) -> int:
    return -1 if device.type == "cpu" else (torch.cuda.current_device() if device.index is None else device.index)


@lru_cache(maxsize=8)
def _factors(device: str) -> Mapping[str, Any]:
    return {
        "backend": "aot",
        "options": dict(OPTIONS),
        "environment": environment_factors(device),
        "versions": {
            "diffusers": metadata.version("diffusers"),
            "accel_hidiff": accel_hidiff.__version__,
            "accel_hidiff source": source_digest("backends/aot.py"),
        },
    }


def _export(graph: RegionGraph) -> tuple[torch.export.ExportedProgram, list[Any]]:
    example = graph.example()
    dims = {
        name: torch.export.Dim(name, min=size.minimum // size.multiple, max=size.maximum // size.multiple)
        for name, size in graph.bucket.dims.items()
        if not size.is_exact
    }

    def symbol(name: str) -> Any:
        multiple = graph.bucket.dims[name].multiple
        return dims[name] if multiple == 1 else multiple * dims[name]

    named = graph.region.axes(graph.traits)
    axes = [{axis: symbol(name) for axis, name in axes.items() if name in dims} for axes in named]
    shapes = (tuple(axes[: len(example)]) + ({},) * (len(example) - len(axes)),) if dims else None
    try:
        with torch.no_grad():
            module = graph.region.graph_module(graph.traits)
            program = _quietly(torch.export.export, module, example, dynamic_shapes=shapes, strict=False)
    except Exception as problem:
        raise CompileFailed(
            f"{graph.region.path}: cannot be exported with {graph.bucket}: {type(problem).__name__}: "
            f"{str(problem).strip().splitlines()[0]}; backend='inductor' compiles regions without export"
        ) from problem
    if program.constants:
        raise CompileFailed(
            f"{graph.region.path}: expected weights and inputs only, its graph also holds the tensor constant "
            f"{next(iter(program.constants))}; use backend='inductor' for this model"
        )
    return program, [[list(tensor.shape), str(tensor.dtype), list(tensor.stride())] for tensor in example]


def _served_bucket(graph: RegionGraph, program: torch.export.ExportedProgram) -> ShapeBucket:
    """The bucket narrowed to the range constraints that export recorded, which can be tighter than those asked for."""
    inputs = [
        node.meta["val"]
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in program.graph_signature.user_inputs
    ]
    dims = dict(graph.bucket.dims)
    for tensor, axes in zip(inputs, graph.region.axes(graph.traits), strict=False):
        for axis, name in axes.items():
            size = tensor.shape[axis]
            if isinstance(size, int):
                if dims[name].reject(size) is not None or not dims[name].is_exact:
                    raise CompileFailed(
                        f"{graph.region.path}: asked for {name} {dims[name]}, export fixed it at {size}; "
                        "use shapes='exact' for this model"
                    )
                continue
            expression = size.node.expr
            (base,) = expression.free_symbols
            multiple = int(expression / base)
            limits = program.range_constraints[base]
            narrowed = Range(multiple * int(limits.lower), multiple * int(limits.upper), multiple)
            dims[name] = dims[name].intersect(narrowed) or narrowed
    return ShapeBucket(dims)


def program_digest(program: torch.export.ExportedProgram) -> str:
    """SHA-256 of an exported program: operators, arguments, shapes, strides, dtypes, weights' names, range constraints.

    Weights' values, source positions and stack traces are not in it.
    """
    lines = []
    for node in program.graph.nodes:
        value = node.meta.get("val")
        lines.append([node.op, node.name, _named(node.target), str(node.args), str(node.kwargs), _describe(value)])
    ranges = sorted((str(symbol), str(limits)) for symbol, limits in program.range_constraints.items())
    signature = program.graph_signature
    specs = [
        [str(spec.kind), str(spec.arg), str(spec.target)] for spec in [*signature.input_specs, *signature.output_specs]
    ]
    text = json.dumps([lines, ranges, specs], separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _named(target: Any) -> str:
    """The same in every process: the text of a plain function would have its address in it."""
    return f"{target.__module__}.{target.__qualname__}" if isinstance(target, FunctionType) else str(target)


def _describe(value: Any) -> Any:
    if isinstance(value, Tensor):
        facts = (tuple(value.shape), value.stride(), value.dtype, value.device)
        return [str(fact) for fact in facts]
    if isinstance(value, list | tuple):
        return [_describe(item) for item in value]
    return str(value)


def _compile(graph: RegionGraph, program: torch.export.ExportedProgram, path: Path) -> None:
    try:
        with torch.no_grad():
            options = {"package_path": str(path), "inductor_configs": dict(OPTIONS)}
            _quietly(torch._inductor.aoti_compile_and_package, program, **options)
    except Exception as problem:
        lines = str(problem).strip().splitlines()
        raise CompileFailed(
            f"{graph.region.path}: AOTInductor failed: {type(problem).__name__}: {lines[0] if lines else ''}; "
            "`accel-hidiff doctor` tells whether a compiler is usable here"
        ) from problem


def _quietly(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls into torch's compiler without the deprecation warnings that it gives itself."""
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning):
            warnings.simplefilter("ignore", category)
        return function(*args, **kwargs)
