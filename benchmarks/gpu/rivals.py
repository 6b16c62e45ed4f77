"""Other ways to run the same step: whole graphs, exact sizes, `torch.compile`, CUDA graphs. Each in its own process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

import accel_hidiff as ah
from accel_hidiff.benching.compilations import compilations, watch
from benchmarks import harness as h
from benchmarks.gpu.lab import Case, Figures, Lab, ratio, timing_fields
from benchmarks.gpu.model import compare, pipeline_of, twin

_TOPOLOGY: Final = "windowed"
LOADERS: Final = ("single threaded", "as served")


def run_torch_compile(lab: Lab, case: Case) -> Figures:
    """`torch.compile` of the whole patched UNet as its users would do it, one size, one topology."""
    watch()
    patch = ah.apply_hidiffusion(pipeline_of(twin(lab.unet)))
    patch.unet.compile()
    return _against_eager(lab, lab.setting.largest, "torch_compile", patch) | _counted()


def run_repeated(lab: Lab, case: Case) -> Figures:
    """diffusers' `compile_repeated_blocks` on the patched UNet, with Dynamo's own limits.

    Past its limit of recompilations Dynamo runs a block eager: `gave_up` counts those.
    """
    watch()
    patch = ah.apply_hidiffusion(pipeline_of(twin(lab.unet)))
    patch.unet.compile_repeated_blocks(fullgraph=False, dynamic=False)
    return _against_eager(lab, lab.setting.largest, "repeated", patch) | _counted()


def _counted() -> Figures:
    made = compilations()
    return {"dynamo_graphs": made.graphs, "graph_breaks": made.graph_breaks, "gave_up": made.gave_up}


def run_whole(lab: Lab, case: Case) -> Figures:
    """The whole UNet as one artifact, one size, one topology: compiled ahead of time at its first call."""
    handle = lab.accelerate(regions="whole", shapes="exact")
    figures = _against_eager(lab, lab.setting.largest, "whole", handle.patch)
    _require_served(handle, "whole")
    return figures


def run_exact(lab: Lab, case: Case) -> Figures:
    """Blocks compiled for one size, beside those of symbolic sizes."""
    size = lab.setting.largest
    handle = lab.accelerate(shapes="exact")
    made = lab.precompile(handle, (size,))
    symbolic = lab.call_of(lab.served.patch, size, _TOPOLOGY)
    figures = _against_eager(lab, size, "exact", handle.patch, {"symbolic": symbolic})
    _require_served(handle, "exact")
    _require_served(lab.served, "symbolic")
    return figures | {"artifacts": made.artifacts, "compile_s": h.rounded(made.seconds)}


def _require_served(handle: ah.Handle, name: str) -> None:
    """WrongOutput if calls ran eager: their times are not those of compiled ones."""
    if handle.stats.eager_calls:
        raise h.WrongOutput(f"{name}: expected compiled calls only, got {handle.stats}")


def _against_eager(
    lab: Lab, size: h.Size, name: str, patch: ah.Patch, others: dict[str, Callable[[], Tensor]] | None = None
) -> Figures:
    """First call, error and times of a contestant, in turns with the eager step.

    Raises:
        WrongOutput: its output, or another contestant's, is not eager's.
    """
    run, eager = lab.call_of(patch, size, _TOPOLOGY), lab.call_of(lab.eager, size, _TOPOLOGY)
    want = eager()
    first_s, _ = h.timed(run)
    errors = compare(name, run(), want)
    for other, call in (others or {}).items():
        compare(other, call(), want)
    times = lab.interleave({"eager": eager, name: run, **(others or {})})
    figures: Figures = {"size": str(size), "topology": _TOPOLOGY, "first_call_s": h.rounded(first_s)}
    figures |= timing_fields(times) | ratio(times, name, "eager")
    for other in others or {}:
        figures |= ratio(times, name, other)
    return figures | errors


def run_cuda_graph(lab: Lab, case: Case) -> Figures:
    """One `torch.cuda.graph` over the compiled step: naming, dispatch and launches are then not repeated.

    Replays run over the first call's inputs and shifts; a server would copy others into their place. "single threaded"
    loads packages with torch's loader option of that name, which leaves out the events by which a package otherwise
    tells that a call of it is over. "as served" keeps them; a thread that captures may not ask for an event, so that
    a failure is to be expected there, and its reason is the result.

    Raises:
        WrongOutput: a replay's output is not eager's.
    """
    if case["loader"] == "single threaded":
        _load_single_threaded()
    size = lab.setting.largest
    run, eager = lab.call_of(lab.served.patch, size, _TOPOLOGY), lab.call_of(lab.eager, size, _TOPOLOGY)
    want = eager()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = run()
    graph.replay()
    torch.cuda.synchronize()
    errors = compare("CUDA graph", out.clone(), want)
    times = lab.interleave({"eager": eager, "compiled": run, "cuda_graph": graph.replay})
    figures: Figures = {"size": str(size), "topology": _TOPOLOGY, **timing_fields(times)}
    return figures | ratio(times, "cuda_graph", "eager") | ratio(times, "cuda_graph", "compiled") | errors


def _load_single_threaded() -> None:
    """Packages that are loaded in this process from now on keep no record of calls under way."""
    loader = torch._C._aoti.AOTIModelPackageLoader

    def load(path: str, name: str, run_single_threaded: bool, runners: int, device_index: int) -> Any:
        return loader(path, name, True, runners, device_index)

    torch._C._aoti.AOTIModelPackageLoader = load  # type: ignore[misc, assignment]
