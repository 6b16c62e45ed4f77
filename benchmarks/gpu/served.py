"""What this project does: precompile, load in another process, steps, profiles, memory, correctness in float32."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial

import psutil
import torch

import accel_hidiff as ah
from accel_hidiff.benching.compilations import compilations
from accel_hidiff.errors import GraphMiss
from benchmarks import harness as h
from benchmarks.gpu.lab import Case, Figures, Lab, ratio, timing_fields
from benchmarks.gpu.model import compare, inputs_of, weights_mb
from benchmarks.profiling import profile
from benchmarks.roofline import Work

TOPOLOGIES = ("windowed", "windowed+dilated", "windowed+pooled")  # of a request to SDXL; most steps first


def run_build(lab: Lab, case: Case) -> Figures:
    """The weights, in place on the device."""
    start = time.perf_counter()
    _ = lab.unet
    h.synchronize()
    built_s = time.perf_counter() - start
    plan = {str(size): str(lab.eager.plan(size.height, size.width, h.NUM_STEPS)) for size in lab.sizes}
    parameters = sum(parameter.numel() for parameter in lab.unet.parameters())
    return {
        "build_s": h.rounded(built_s), "weights_mb": weights_mb(lab.unet), "parameters_m": h.rounded(parameters / 1e6),
        "plan": plan,
    }  # fmt: skip


def run_precompile(lab: Lab, case: Case) -> Figures:
    """Every graph of every size into the cache: blocks, symbolic sizes."""
    made = lab.precompile(lab.accelerate(), lab.sizes)
    return {
        "artifacts": made.artifacts, "compiled": made.compiled, "found": made.found, "graphs": made.graphs,
        "regions": made.regions, "compile_s": h.rounded(made.seconds), "artifacts_mb": h.rounded(made.bytes / 1e6),
        "jobs": lab.setting.jobs, "jobs_failed": lab.jobs_failed,
    }  # fmt: skip


def run_load(lab: Lab, case: Case) -> Figures:
    """In a new process over the filled cache: seconds until all regions of all sizes are bound, then one call of each.

    Raises:
        WrongOutput: something was compiled, or would have been.
    """
    _ = lab.unet
    h.synchronize()
    start = time.perf_counter()
    try:
        handle = _loaded(lab)
        h.synchronize()
        load_s = time.perf_counter() - start
        size, first_s = lab.sizes[0], {}
        for topology in TOPOLOGIES:
            first_s[topology] = h.rounded(h.timed(lab.call_of(handle.patch, size, topology))[0])
    except GraphMiss as miss:
        raise h.WrongOutput(f"expected no compilation in the second process, it would have had one: {miss}") from miss
    compiled = handle.stats.compiles + compilations().graphs
    if compiled or handle.stats.eager_calls:
        raise h.WrongOutput(
            f"expected no compilation and no eager call in the second process, got {compiled} graphs compiled and "
            f"{handle.stats.eager_calls} eager calls"
        )
    return {
        "load_s": h.rounded(load_s), "compiles": compiled, "loads": handle.stats.loads,
        "bindings": handle.stats.bindings, "first_call_s": first_s,
    }  # fmt: skip


def _loaded(lab: Lab) -> ah.Handle:
    handle = lab.accelerate(on_miss="error")
    pixels = [(size.height, size.width) for size in lab.sizes]
    handle.load(pixels, h.NUM_STEPS, batch_sizes=(h.GUIDANCE_BATCH,))
    return handle


def run_step(lab: Lab, case: Case) -> Figures:
    """One size and topology: the stock UNet, HiDiffusion eager, HiDiffusion compiled, in turns.

    Raises:
        WrongOutput: the compiled output is not the eager one's, within the limits of the dtype.
    """
    size, topology = h.Size.parse(case["size"]), case["topology"]
    plain = partial(inputs_of(lab.unet, size).call, lab.unet)
    eager = lab.call_of(lab.eager, size, topology)
    compiled = lab.call_of(lab.served.patch, size, topology)
    errors = compare(f"{size} {topology}", compiled(), eager())
    times = lab.interleave({"unpatched": plain, "eager": eager, "compiled": compiled})
    work = {
        "unpatched": lab.work_of(size, "unpatched", plain),
        "eager": lab.work_of(size, topology, eager),
        "compiled": lab.work_of(size, topology, eager),
    }
    if lab.served.stats.compiles or lab.served.stats.eager_calls:
        raise h.WrongOutput(f"{size} {topology}: expected compiled calls only, got {lab.served.stats}")
    figures = timing_fields(times) | timing_fields({"entrance": h.entrance(lab.served, lab.setting.repeats)})
    figures |= ratio(times, "compiled", "eager") | ratio(times, "eager", "unpatched")
    figures |= ratio(times, "compiled", "unpatched")
    figures |= {"unpatched_tflop": h.rounded(work["unpatched"].tflop), "tflop": h.rounded(work["eager"].tflop)}
    figures["eager_gb"] = h.rounded(work["eager"].eager_gb)
    for name, timing in times.items():
        figures |= _speed(lab, name, work[name], timing.median * 1e3)
    if lab.ceilings is not None:
        figures["floor_ms"] = h.rounded(lab.ceilings.floor_ms(work["eager"]))
        figures["eager_traffic_ms"] = h.rounded(lab.ceilings.traffic_ms(work["eager"]))
    return figures | errors


def _speed(lab: Lab, name: str, work: Work, ms: float) -> Figures:
    """TFLOP/s of a contestant, and its share of the matmul's speed where that is known."""
    figures: Figures = {f"{name}_tflop_per_s": h.rounded(work.tflop / ms * 1e3)}
    if lab.ceilings is not None:
        figures[f"{name}_matmul_share_ratio"] = h.rounded(lab.ceilings.share(work, ms), 3)
    return figures


def run_profile(lab: Lab, case: Case) -> Figures:
    """Where the time of a step goes."""
    patch = lab.eager if case["run"] == "eager" else lab.served.patch
    run = lab.call_of(patch, h.Size.parse(case["size"]), case["topology"])
    run()
    return profile(run, lab.device).to_json()


def run_memory(lab: Lab, case: Case) -> Figures:
    """In a new process: what weights and graphs take, and the most that a call takes beside the weights."""
    before = _held(lab)
    weights = weights_mb(lab.unet)
    h.synchronize()
    built = _held(lab)
    handle = _loaded(lab)
    h.synchronize()
    loaded = _held(lab)
    graphs = max(handle.stats.loads, 1)
    figures: Figures = {"weights_mb": weights, "loads": handle.stats.loads, "bindings": handle.stats.bindings}
    for place, value in loaded.items():
        figures[f"{place}_weights_mb"] = h.rounded(built[place] - before[place])
        figures[f"{place}_graphs_mb"] = h.rounded(value - built[place])
        figures[f"{place}_mb_per_graph"] = h.rounded((value - built[place]) / graphs)
    if lab.device.type == "cuda":
        for size in lab.sizes:
            for name, patch in (("eager", lab.eager), ("compiled", handle.patch)):
                run = lab.call_of(patch, size, TOPOLOGIES[0])
                run()  # libraries take their workspaces at the first call
                h.synchronize()
                torch.cuda.reset_peak_memory_stats()
                start = torch.cuda.memory_allocated()
                run()
                h.synchronize()
                peak = torch.cuda.max_memory_allocated() - start
                figures[f"{name}_peak_{size}_mb"] = h.rounded(peak / 1e6)
    return figures


def _held(lab: Lab) -> dict[str, float]:
    """Megabytes in use: resident of this process; of the whole GPU, as its driver counts."""
    held = {"host": psutil.Process().memory_info().rss / 1e6}
    if lab.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(lab.device)
        held["gpu"] = (total - free) / 1e6
    return held


def run_float32(lab: Lab, case: Case) -> Figures:
    """Every topology compiled against eager in float32, TF32 off; and how far eager's bfloat16 is from that, on a GPU.

    Raises:
        WrongOutput: a topology is not within 1e-3.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    size = lab.sizes[0]
    strict = Lab(replace(lab.setting, dtype="float32"))
    handle = strict.accelerate()
    made = strict.precompile(handle, (size,))
    figures: Figures = {"size": str(size), "limit": 1e-3, "compiled": made.compiled}
    wants = {}
    for topology in TOPOLOGIES:
        want = wants[topology] = strict.call_of(strict.eager, size, topology)()
        got = strict.call_of(handle.patch, size, topology)()
        figures |= {f"{topology} {name}": value for name, value in compare(topology, got, want).items()}
    if handle.stats.eager_calls:
        raise h.WrongOutput(f"expected compiled calls only, got {handle.stats}")
    if lab.dtype != torch.float32:  # the same seed: weights differ by their rounding alone
        del handle, got, strict
        topology = TOPOLOGIES[0]
        rough = lab.call_of(lab.eager, size, topology)().double()
        apart = (rough - wants[topology].double()).norm() / wants[topology].double().norm()
        figures["eager_bfloat16_relative_l2"] = h.rounded(float(apart), 3)
    return figures
