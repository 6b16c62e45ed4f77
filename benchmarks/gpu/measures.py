"""Single UNet calls: loading, steps in turns, errors, profiles, a second process, CUDA graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

import accel_hidiff as ah
from accel_hidiff.benching.compilations import compilations, watch
from accel_hidiff.errors import GraphMiss
from benchmarks import harness as h
from benchmarks.gpu.journal import Case, Figures
from benchmarks.gpu.lab import Lab, Served, ratio, timing_fields
from benchmarks.gpu.model import compare, inputs_of, relative_l2, weights_mb
from benchmarks.gpu.setting import TOPOLOGIES
from benchmarks.profiling import profile
from benchmarks.roofline import Work

STOCK: Final = "diffusers"  # without HiDiffusion
EAGER: Final = "eager"  # with it, nothing compiled


def measure_build(lab: Lab, case: Case, figures: Figures) -> None:
    """The weights, in place on the device, and which topology runs at which step."""
    figures["build_s"] = h.rounded(h.timed(lambda: lab.unet(case["dtype"]))[0])
    figures["weights_mb"] = weights_mb(lab.unet(case["dtype"]))
    eager = lab.eager(case["dtype"])
    figures["plan"] = {str(size): str(eager.plan(size.height, size.width, h.NUM_STEPS)) for size in lab.sizes}


def measure_load(lab: Lab, case: Case, figures: Figures) -> None:
    """A variant from its cache.

    Raises:
        WrongOutput: a package is missing, or something was compiled.
    """
    served = lab.served(case["variant"])
    figures |= served.figures
    entrance = h.entrance(served.handle, lab.setting.repeats)
    figures["entrance_ms"] = h.rounded(entrance.median * 1e3)  # once for each request


def measure_steps(lab: Lab, case: Case, figures: Figures) -> None:
    """One size and topology: every way to run it that this dtype has, in turns.

    Raises:
        WrongOutput: a variant's output is not eager's, within the limits of the dtype. The others are timed.
    """
    size, topology, dtype = h.Size.parse(case["size"]), case["topology"], case["dtype"]
    eager = lab.call_of(lab.eager(dtype), dtype, size, topology)
    want, served, wrong = eager(), lab.served_of(dtype), []
    contestants: dict[str, Callable[[], Tensor]] = {EAGER: eager}
    ways: Figures = {EAGER: {"peak_mb": lab.peak_mb(eager)}}
    if topology == TOPOLOGIES[0]:
        contestants = {STOCK: partial(inputs_of(lab.unet(dtype), size).call, lab.unet(dtype)), **contestants}
        ways = {STOCK: {}, **ways}
    for name, way in served.items():
        run = lab.call_of(way.handle.patch, dtype, size, topology)
        try:
            first_s = h.timed(run)[0]
            ways[name] = {"first_s": h.rounded(first_s), **compare(name, run(), want), "peak_mb": lab.peak_mb(run)}
            contestants[name] = run
        except h.WrongOutput as problem:
            wrong.append(str(problem))
    times = lab.interleave(contestants)
    for name, timing in times.items():
        ways[name] |= {key.removeprefix("_"): value for key, value in timing.fields("").items() if "cpu" not in key}
        ways[name]["over_eager_ratio"] = h.rounded(timing.median / times[EAGER].median, 3)
    figures["ways"] = ways
    _floor(lab, size, topology, eager, figures)
    for name, way in served.items():
        way.require_served(name)
    if wrong:
        raise h.WrongOutput("; ".join(wrong))


def _floor(lab: Lab, size: h.Size, topology: str, eager: Callable[[], object], figures: Figures) -> None:
    """What the step asks for, and how long that takes at the speeds of the ceilings."""
    work: Work = lab.work_of(size, topology, eager)
    figures |= {"tflop": h.rounded(work.tflop), "eager_gb": h.rounded(work.eager_gb)}
    if lab.ceilings is not None:
        figures["floor_ms"] = h.rounded(lab.ceilings.floor_ms(work))
        figures["eager_traffic_ms"] = h.rounded(lab.ceilings.traffic_ms(work))


def measure_truth(lab: Lab, case: Case, figures: Figures) -> None:
    """Eager and every variant against the same weights and inputs in float32, TF32 off."""
    size, dtype = h.Size.parse(case["size"]), case["dtype"]
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, convolution.allow_tf32
    matmul.allow_tf32 = convolution.allow_tf32 = False
    try:
        exact = lab.another(dtype)
        exact.unet = copy.deepcopy(lab.unet(dtype)).float()
        inputs = inputs_of(lab.unet(dtype), size)
        wide = h.UNetInputs(
            inputs.sample.float(), inputs.timestep, inputs.text.float(), {n: t.float() for n, t in inputs.added.items()}
        )
        step = lab.step_of(size, TOPOLOGIES[0])
        want = h.StepCall(ah.apply_hidiffusion(exact), wide, step, h.NUM_STEPS)()
    finally:
        matmul.allow_tf32, convolution.allow_tf32 = before
    patches = {EAGER: lab.eager(dtype)} | {name: way.handle.patch for name, way in lab.served_of(dtype).items()}
    for name, patch in patches.items():
        got = lab.call_of(patch, dtype, size, TOPOLOGIES[0])()
        figures[name] = {"relative_l2": h.rounded(relative_l2(got, want), 3)}


def measure_profile(lab: Lab, case: Case, figures: Figures) -> None:
    """Where the time of a step goes."""
    dtype, name = case["dtype"], case["run"]
    patch = lab.eager(dtype) if name == EAGER else lab.served(name).handle.patch
    run = lab.call_of(patch, dtype, h.Size.parse(case["size"]), TOPOLOGIES[0])
    with run.entered():
        run()
        figures |= profile(run, lab.device).to_json()


def measure_second(lab: Lab, case: Case, figures: Figures) -> None:
    """In another process than the one before: every size and topology from the cache.

    Raises:
        WrongOutput: something was compiled, or would have been.
    """
    watch()
    before, served = compilations(), lab.served(case["variant"])
    dtype, first_s = lab.variant(case["variant"]).dtype, {}
    try:
        for size in lab.sizes:
            for topology in TOPOLOGIES:
                run = lab.call_of(served.handle.patch, dtype, size, topology)
                first_s[f"{size} {topology}"] = h.rounded(h.timed(run)[0])
    except GraphMiss as miss:
        raise h.WrongOutput(f"expected no compilation in the second process, it would have had one: {miss}") from miss
    compiled = (compilations() - before).graphs + served.handle.stats.compiles
    figures |= {**served.figures, "compiles": compiled, "first_call_s": first_s}
    if compiled:
        raise h.WrongOutput(f"expected no compilation in the second process, got {compiled}")
    served.require_served(case["variant"])


def measure_graph(lab: Lab, case: Case, figures: Figures) -> None:
    """One `torch.cuda.graph` over a compiled step: naming, dispatch and launches are then not repeated.

    Replays run over the first call's inputs and shifts; a server would copy others into their place.

    Raises:
        WrongOutput: a replay's output is not the step's.
    """
    size, topology = h.Size.parse(case["size"]), case["topology"]
    served: Served = lab.served(case["variant"])
    run = lab.call_of(served.handle.patch, lab.variant(case["variant"]).dtype, size, topology)
    with run.entered():
        want = run().clone()
        side: Any = torch.cuda.Stream()
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
        figures |= compare("CUDA graph", out.clone(), want)
        figures["bit_equal"] = bool(torch.equal(out, want))
    times = lab.interleave({"step": run, "graph": graph.replay})
    figures |= timing_fields(times) | ratio(times, "graph", "step")
