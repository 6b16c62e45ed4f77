"""The stages in the order of their value: what a cut run leaves is the most that its minutes could buy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any, Final

from benchmarks.gpu import kernels, rivals, served
from benchmarks.gpu.lab import Case, Figures, Lab, Setting

Run = Callable[[Lab, Case], Figures]
Cases = Callable[[Setting], list[dict[str, str]]]


def _one(setting: Setting) -> list[dict[str, str]]:
    return [{}]


@dataclass(frozen=True)
class Stage:
    """One scenario.

    Attributes:
        name: on the command line and in records.
        run: measures one case.
        gpu_s: estimate: seconds that a case takes at full size; it is not begun if less is left.
        tiny_s: the same for the tiny model.
        columns: of the Markdown table: figure (or key of the case) -> heading; empty: one line for each figure.
        cases: its cases; each has a record of its own.
        isolated: each case runs in a process of its own, which is ended when the minutes are over. For what compiles,
            what can spoil a process, and what only a new process shows.
        needs_cache: it serves from the filled cache.
        checks: a case of it that fails, or whose output is wrong, fails the run.
        gpu_only: it needs CUDA.
    """

    name: str
    run: Run
    gpu_s: float
    tiny_s: float
    columns: dict[str, str]
    cases: Cases = _one
    isolated: bool = False
    needs_cache: bool = False
    checks: bool = False
    gpu_only: bool = False

    def seconds(self, tiny: bool) -> float:
        """The estimate for a case."""
        return self.tiny_s if tiny else self.gpu_s


def _attention_cases(setting: Setting) -> list[dict[str, str]]:
    return [{"shape": shape, "kernel": kernel} for shape, kernel in product(kernels.SHAPES, kernels.KERNELS)]


def _step_cases(setting: Setting) -> list[dict[str, str]]:
    sizes = [f"{width}x{height}" for width, height in setting.sizes]
    return [{"size": size, "topology": topology} for size, topology in product(sizes, served.TOPOLOGIES)]


def _profile_cases(setting: Setting) -> list[dict[str, str]]:
    where = {"size": str(setting.largest), "topology": served.TOPOLOGIES[0]}
    return [{**where, "run": run} for run in ("compiled", "eager")]


def _loader_cases(setting: Setting) -> list[dict[str, str]]:
    return [{"loader": loader} for loader in rivals.LOADERS]


def _rival(name: str, run: Run, gpu_s: float, tiny_s: float, **more: Any) -> Stage:
    columns = {
        "size": "size", "topology": "topology", "first_call_s": "first call s", "eager_ms": "eager ms",
        f"{name}_ms": "ms", f"{name}_spread_ms": "±", f"{name}_over_eager_ratio": "/ eager", "relative_l2": "rel. L2",
        "max_error": "max error",
    }  # fmt: skip
    return Stage(name, run, gpu_s, tiny_s, columns | more.pop("columns", {}), isolated=True, **more)


_STEP_COLUMNS: Final = {
    "size": "size", "topology": "topology", "unpatched_ms": "unpatched ms", "eager_ms": "eager ms",
    "compiled_ms": "compiled ms", "compiled_spread_ms": "±", "compiled_over_eager_ratio": "compiled / eager",
    "compiled_over_unpatched_ratio": "compiled / unpatched", "tflop": "TFLOP", "compiled_tflop_per_s": "TFLOP/s",
    "compiled_matmul_share_ratio": "of matmul", "floor_ms": "floor ms", "eager_traffic_ms": "eager traffic ms",
    "relative_l2": "rel. L2", "max_error": "max error",
}  # fmt: skip

_DYNAMO: Final = {"dynamo_graphs": "graphs", "graph_breaks": "breaks", "gave_up": "ran eager"}

STAGES: Final = (
    Stage("ceilings", kernels.run_ceilings, 10, 1, {"matmul_tflop_per_s": "matmul TFLOP/s", "copy_gb_per_s": "GB/s"}),
    Stage(
        "attention", kernels.run_attention, 4, 1,
        {"shape": "B x heads x N", "kernel": "kernel", "ms": "ms", "tflop_per_s": "TFLOP/s",
         "matmul_share_ratio": "of matmul"},
        _attention_cases,
    ),
    Stage("build", served.run_build, 25, 3, {}),
    Stage("precompile", served.run_precompile, 60, 20, {}, isolated=True),
    Stage("load", served.run_load, 30, 8, {}, isolated=True, needs_cache=True, checks=True),
    Stage("steps", served.run_step, 15, 2, _STEP_COLUMNS, _step_cases, needs_cache=True, checks=True),
    Stage("profile", served.run_profile, 10, 2, {}, _profile_cases, needs_cache=True),
    Stage("memory", served.run_memory, 35, 8, {}, isolated=True, needs_cache=True),
    Stage("float32", served.run_float32, 90, 10, {}, isolated=True, checks=True),
    _rival("torch_compile", rivals.run_torch_compile, 100, 90, columns=_DYNAMO),
    _rival("repeated", rivals.run_repeated, 60, 15, columns=_DYNAMO),
    _rival(
        "exact", rivals.run_exact, 80, 60, needs_cache=True, checks=True,
        columns={"symbolic_ms": "symbolic ms", "exact_over_symbolic_ratio": "/ symbolic", "compile_s": "compile s"},
    ),
    Stage(
        "cuda_graph", rivals.run_cuda_graph, 35, 8,
        {"loader": "loader", "size": "size", "topology": "topology", "eager_ms": "eager ms",
         "compiled_ms": "compiled ms", "cuda_graph_ms": "graph ms", "cuda_graph_over_compiled_ratio": "/ compiled",
         "relative_l2": "rel. L2", "max_error": "max error"},
        _loader_cases, isolated=True, needs_cache=True, gpu_only=True,
    ),
    _rival("whole", rivals.run_whole, 150, 60, checks=True),
)  # fmt: skip
NAMES: Final = tuple(stage.name for stage in STAGES)


def chosen(text: str | None) -> tuple[Stage, ...]:
    """The stages of a comma list, in their own order; None: all.

    Raises:
        ValueError: there is no stage of a name; the message is one line.
    """
    if text is None:
        return STAGES
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in NAMES] or ([] if names else [text]):
        raise ValueError(f"--only: expected stages among {', '.join(NAMES)}, got {', '.join(unknown) or 'none'}")
    return tuple(stage for stage in STAGES if stage.name in names)


def stage_named(name: str) -> Stage:
    """The stage of a name; KeyError if there is none."""
    return {stage.name: stage for stage in STAGES}[name]
