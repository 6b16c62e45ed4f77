"""onediff with nexfort: one program for each graph, owned here, over weights that are inputs.

onediff's own wrapper calls a program through Dynamo, whose guards (thread count, inference mode, deterministic
algorithms, ...) compile again in the middle of a request when one of them changes, without a limit. So the program is
taken over from the compiler as it is made, and called as it is: what fits a graph is decided by this package's guard.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import diffusers  # noqa: F401 - before onediff, which looks at what is imported already
import torch
import torch._inductor.config
from torch import Tensor, fx

import accel_hidiff
from accel_hidiff.availability import nexfort_wheel
from accel_hidiff.backends.base import BoundRegion, Prepared
from accel_hidiff.backends.functional import FunctionalGraph, named_weights, trace
from accel_hidiff.backends.inductor_files import inductor_files, libraries
from accel_hidiff.config import OneDiffConfig
from accel_hidiff.errors import CompileFailed, first_line
from accel_hidiff.parity import limit_of, wrong
from accel_hidiff.regions import RegionGraph
from compile_cache import CacheKey, CompileCache, Entry, ShapeBucket
from compile_cache.environment import environment_factors

_FOLDER: Final = "inductor"
_MAX_PROGRAMS: Final = 1024
_WARM_CALLS: Final = 3  # TorchScript watches the first calls and then optimizes: not in a request

Run = Callable[..., Any]


class NexfortBackend:
    """Compiles through onediff; what persists is what the mode leaves in files.

    Mode "jit" makes TorchScript in memory, which every process makes anew. All other modes compile with Inductor, whose
    files are stored in the compile cache under the graph's key; a process that finds them traces each graph, and
    compiles nothing.

    Args:
        config: mode and options; the compiler is nexfort, whatever it says.
    """

    name = "onediff"
    smallest_symbolic = None
    shares = True

    def __init__(self, config: OneDiffConfig) -> None:
        self.spec = config
        self.mode = config.mode
        self.persistent = "jit" not in config.mode.split(":")
        nexfort_wheel.repair()

    def factors(self, device: torch.device) -> Mapping[str, Any]:
        return {
            "backend": self.name,
            "compiler": "nexfort",
            "mode": self.mode,
            "options": dict(self.spec.options),
            "settings": _settings(),
            **_environment(device.type),
        }

    def prepare(self, graph: RegionGraph, cache: CompileCache) -> Prepared:
        if not self.persistent:
            raise CompileFailed('nexfort\'s mode "jit" leaves nothing to store; use another mode, or backend="aot"')
        start = time.perf_counter()
        key = graph.key(self.factors(graph.device))
        compiled = False

        def build(directory: Path) -> Mapping[str, Any]:
            nonlocal compiled
            compiled = True
            folder = directory / _FOLDER
            folder.mkdir()
            with inductor_files(folder):
                program = self._compile(graph)
            if not libraries(folder):
                raise CompileFailed(
                    f"{graph.region.path}: expected mode {self.mode!r} to leave compiled code in files, it left none; "
                    'use mode="jit", which compiles in every process, or another one'
                )
            _programs.keep(key.digest, program)
            seconds = round(time.perf_counter() - start, 2)
            return {"region": graph.region.kind, "serves": graph.bucket.to_json(), "seconds": seconds}

        entry = cache.get_or_build(key, build)
        return Prepared(entry, compiled, time.perf_counter() - start)

    def served(self, entry: Entry) -> ShapeBucket:
        serves: Any = entry.notes["serves"]
        return ShapeBucket.from_json(serves)

    def ready(self, key: CacheKey) -> bool:
        return _programs.get(key.digest) is not None

    def bind(self, graph: RegionGraph, entry: Entry | None) -> BoundRegion | None:
        """The program of this graph over the region's weights; made now if no equal region had it before."""
        digest = graph.key(self.factors(graph.device)).digest if entry is None else entry.digest
        compiled = False
        with _programs.lock:
            program = _programs.get(digest)
            if program is None:
                program = self._compile(graph) if entry is None else self._loaded(graph, entry)
                compiled = entry is None
            _programs.keep(digest, program)
        names, weights = named_weights(graph.region.graph_module(graph.traits))
        if names != program.names:
            raise CompileFailed(
                f"{graph.region.path}: expected the weights of an equal region, its names are others; report this"
            )
        return BoundRegion(program.over(weights), graph.bucket, compiled)

    def _loaded(self, graph: RegionGraph, entry: Entry) -> _Program:
        folder = entry.path / _FOLDER
        before = libraries(folder)
        with inductor_files(folder):
            program = self._compile(graph)
        if libraries(folder) != before:
            raise CompileFailed(
                f"{graph.region.path}: expected artifact {entry.digest[:12]} to hold all code, Inductor compiled more: "
                "something that it depends on is not in its key; delete it and compile again here, or use mode='jit'"
            )
        return program

    def _compile(self, graph: RegionGraph) -> _Program:
        traced = trace(graph)
        weights = named_weights(graph.region.graph_module(graph.traits))[1]
        program = self._adopted(graph, traced, weights)
        call = program.over(weights)
        with torch.no_grad():
            want = _tensors(traced.module(weights, *traced.inputs))
            for _ in range(_WARM_CALLS):
                got = _tensors(call(*traced.inputs))
        told = "" if len(got) == len(want) else f"{len(got)} tensors, expected {len(want)}"
        for one, other in zip(got, want, strict=False):
            told = told or wrong(one, other, limit_of(graph.dtype))[1]
        if told:
            raise CompileFailed(
                f"{graph.region.path}: nexfort ({self.mode}) computes something else than eager: {told}; try another "
                "mode, or backend='inductor'"
            )
        return program

    def _adopted(self, graph: RegionGraph, traced: FunctionalGraph, weights: Sequence[Tensor]) -> _Program:
        """Compiles through onediff, and takes the program over."""
        from onediff.infer_compiler import compile as onediff_compile

        made: list[tuple[Run, Sequence[Tensor]]] = []

        def adopt(module: fx.GraphModule, examples: Sequence[Tensor]) -> Run:
            given: dict[str, Any] = {"mode": self.mode, "options": dict(self.spec.options) or None}
            run: Run = torch._dynamo.lookup_backend("nexfort")(module, list(examples), **given)
            made.append((run, examples))
            return run

        given = {"mode": None, "dynamic": False, "fullgraph": True, "backend": adopt}
        flat = [*weights, *traced.inputs]
        try:
            with torch.no_grad():
                onediff_compile(traced.module, backend="nexfort", options=given)(list(weights), *traced.inputs)
        except Exception as problem:
            raise CompileFailed(
                f"{graph.region.path}: nexfort ({self.mode}) failed: {first_line(problem)}; "
                "`accel-hidiff doctor` tells whether it works here at all"
            ) from problem
        if len(made) != 1:
            raise CompileFailed(
                f"{graph.region.path}: expected nexfort to compile one graph, it compiled {len(made)}; look for "
                "TORCHDYNAMO_DISABLE, TORCH_COMPILE_DISABLE or onediff's fallback_to_eager, of which False means eager"
            )
        run, examples = made[0]
        where = {id(tensor): position for position, tensor in enumerate(flat)}
        order = [where.get(id(tensor), -1) for tensor in examples]
        if -1 in order:
            raise CompileFailed(f"{graph.region.path}: nexfort's program takes an input that is none of the region's")
        return _Program(run, order, traced)


class _Programs:
    """The programs of this process, by the digest of their graph's key; the least recently bound ones go."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._held: OrderedDict[str, _Program] = OrderedDict()

    def get(self, digest: str) -> _Program | None:
        """The program of a graph, if it is there."""
        return self._held.get(digest)

    def keep(self, digest: str, program: _Program) -> None:
        """Holds a program."""
        with self.lock:
            self._held[digest] = program
            self._held.move_to_end(digest)
            while len(self._held) > _MAX_PROGRAMS:
                self._held.popitem(last=False)


_programs = _Programs()


def _settings() -> Mapping[str, Any]:
    """What of this process's state Inductor's code depends on, and what nexfort reads from the environment."""
    text = json.dumps(torch._inductor.config.save_config_portable(), sort_keys=True, default=str)
    matmul = torch.backends.cuda.matmul
    return {
        "inductor": hashlib.sha256(text.encode()).hexdigest(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "reduced precision": [
            matmul.allow_fp16_reduced_precision_reduction,
            matmul.allow_bf16_reduced_precision_reduction,
        ],
        "variables": {name: value for name, value in os.environ.items() if name.startswith("NEXFORT_")},
    }


@lru_cache(maxsize=4)
def _environment(device: str) -> Mapping[str, Any]:
    return {
        "environment": environment_factors(device),
        "versions": {name: metadata.version(name) for name in ("onediff", "nexfort", "diffusers")},
        "accel_hidiff": accel_hidiff.__version__,
        "torch folder": str(Path(torch.__file__).parent),  # a part of the command lines that name Inductor's files
    }


class _Program:
    """A compiled graph: `order` says which of (weights, inputs) each of its arguments is."""

    def __init__(self, run: Run, order: Sequence[int], traced: FunctionalGraph) -> None:
        self.names = traced.names
        self._run = run
        self._order = order
        self._single = traced.outputs == 1

    def over(self, weights: Sequence[Tensor]) -> Run:
        """A call that takes the region's inputs."""
        run, count, single = self._run, len(self.names), self._single
        arguments: list[Any] = [weights[index] if index < count else None for index in self._order]
        holes = [(place, index - count) for place, index in enumerate(self._order) if index >= count]

        def call(*inputs: Tensor) -> Any:
            filled = arguments.copy()
            for place, index in holes:
                filled[place] = inputs[index]
            out = run(*filled)
            return out[0] if single else tuple(out)

        return call


def _tensors(out: Any) -> tuple[Tensor, ...]:
    return (out,) if isinstance(out, Tensor) else tuple(out)
