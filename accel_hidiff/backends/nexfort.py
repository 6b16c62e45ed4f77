"""onediff with nexfort: one program for each graph, owned here, over weights that are inputs (see `programs`)."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
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
from accel_hidiff.backends.inductor_files import inductor_files, libraries
from accel_hidiff.backends.programs import Compile, Program, Programs, Run, make_program
from accel_hidiff.backends.sources import source_digest
from accel_hidiff.config import OneDiffConfig
from accel_hidiff.errors import CompileFailed
from accel_hidiff.regions import RegionGraph
from compile_cache import CacheKey, CompileCache, Entry
from compile_cache.environment import environment_factors

_FOLDER: Final = "inductor"
_programs = Programs()  # of this process, so that all handles share them


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
    target = None

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

    def places(self, key: CacheKey) -> tuple[CacheKey, ...]:
        return (key,)

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

    def ready(self, key: CacheKey) -> bool:
        return key.digest in _programs

    def bind(self, graph: RegionGraph, entry: Entry | None) -> BoundRegion | None:
        """The program of this graph over the region's weights; made now if no equal region had it before."""
        digest = graph.key(self.factors(graph.device)).digest if entry is None else entry.digest
        program, made = _programs.get(
            digest, lambda: self._compile(graph) if entry is None else self._loaded(graph, entry)
        )
        return BoundRegion(program.over(graph), graph.bucket, made and entry is None)

    def _loaded(self, graph: RegionGraph, entry: Entry) -> Program:
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

    def _compile(self, graph: RegionGraph) -> Program:
        return make_program(graph, f"nexfort ({self.mode})", _through_onediff, self._nexfort)

    def _nexfort(self, module: fx.GraphModule, examples: list[Tensor]) -> Run:
        given: dict[str, Any] = {"mode": self.mode, "options": dict(self.spec.options) or None}
        program: Run = torch._dynamo.lookup_backend("nexfort")(module, examples, **given)
        return program


def _through_onediff(module: fx.GraphModule, backend: Compile) -> Run:
    from onediff.infer_compiler import compile as onediff_compile

    options = {"mode": None, "dynamic": False, "fullgraph": True, "backend": backend}
    compiled: Run = onediff_compile(module, backend="nexfort", options=options)
    return compiled


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
        "accel_hidiff source": source_digest("backends/functional.py", "backends/programs.py", "backends/nexfort.py"),
        "torch folder": str(Path(torch.__file__).parent),  # a part of the command lines that name Inductor's files
    }
