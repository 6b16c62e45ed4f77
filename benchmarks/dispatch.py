"""What guard and dispatch cost per UNet call, in microseconds, with 1, 10 and 1000 graphs in the dispatcher.

Method. The UNet's own forward is replaced by a stand-in that returns its input (`harness.TrivialUNet`) before
`accelerate` wraps it. Every size is then called once: the dispatcher resolves it for real (region graphs, action keys,
guard, binding of the compiled packages), so that it holds as many graphs as there are sizes, all of them served by the
artifacts of one symbolic range. What is timed afterwards, in shuffled order over all sizes:

- `unet_dispatch_us`: a call of the patched UNet (plan, topology, window shifts, guard facts, lookup, counters, scope)
  minus a call of the stand-in alone.
- `region_dispatch_us`: all regions of one UNet call (`accel_hidiff.flow`: lookups, skip connections, layout and
  alignment checks of the inputs), their packages replaced by a function that returns its first input, minus the same
  calls of that function alone. It does not depend on the number of graphs; PyTorch's own cost of calling a package is
  not in it (`benchmarks.host` has that).
- `request_check_us`: entering a request, which looks once whether weights were moved or replaced; paid per request.

All three are differences of medians of processor time: the code is Python on one thread and never waits.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import accel_hidiff as ah
from accel_hidiff.backends import BoundRegion
from accel_hidiff.binder import BoundCall
from accel_hidiff.demo import DemoModelConfig
from accel_hidiff.flow import Flow
from accel_hidiff.served import UNET
from benchmarks import harness as h
from compile_cache import CompileCache

GRAPHS = (1, 10, 1000)
CALLS = 2000  # of the UNet, per timed turn
REGION_CALLS = 100  # the same, where all regions are visited
REQUESTS = 50
STEP = {"step": h.NUM_STEPS - 1, "num_steps": h.NUM_STEPS}


def many_sizes(count: int) -> list[h.Size]:
    """Distinct sizes of the one symbolic range: latent sides in multiples of 8, from 16 on."""
    sides = range(128, 128 + 64 * 32, 64)
    sizes = [h.Size(width, height) for width, height in product(sides, sides)]
    random.Random(0).shuffle(sizes)
    return sizes[:count]


def trivial_handle(
    tiny: bool, cache: Path, sizes: list[h.Size], config: DemoModelConfig | None = None
) -> tuple[ah.Handle, h.TrivialUNet, list[h.UNetInputs]]:
    """Setup: a handle over a stand-in, with one graph for each size; and the inputs of each size.

    Args:
        config: of the model; None: the demo's, or the tiny one.
    """
    pipe = h.demo_pipeline(tiny, config)
    trivial = h.TrivialUNet()
    pipe.unet.forward = trivial
    options: dict[str, Any] = {"hidiffusion": ah.HiDiffusionConfig(), "cache": CompileCache(cache)}
    first = sizes[0]
    ah.accelerate(pipe, **options).precompile([(first.height, first.width)], h.NUM_STEPS)
    handle = ah.accelerate(pipe, on_miss="error", **options)
    inputs = [h.unet_inputs(pipe.unet, size) for size in sizes]
    with handle.patch.phase(**STEP):
        for given in inputs:
            given.call(pipe.unet)
    return handle, trivial, inputs


def calls(unet: Callable[..., Any], inputs: list[h.UNetInputs]) -> Callable[[], None]:
    """`CALLS` UNet calls over all sizes in turn."""
    turns = [inputs[index % len(inputs)] for index in range(CALLS)]

    def run() -> None:
        for sample, timestep, text, added in turns:
            unet(sample, timestep, text, added_cond_kwargs=added, return_dict=False)

    return run


def region_calls(handle: ah.Handle, trivial: h.TrivialUNet, size: h.Size) -> dict[str, Callable[[], None]]:
    """All regions of one UNet call over stand-ins for their packages; and the stand-ins alone."""
    patch = handle.patch
    unet = patch.unet
    topology = next(iter(patch.plan(size.height, size.width, 1))).topology
    served = handle._installed.unet
    flow = Flow(UNET, unet, {region.path: region for region in served.regions}, patch.family)
    served._flow = flow  # a UNet whose forward is a stand-in has none, and no graphs between its blocks
    graphs = handle._graphs.unet(topology, size.height, size.width, h.GUIDANCE_BATCH)
    served._flow = None
    given = h.unet_inputs(unet, size)
    bound, alone = {}, []

    def package(image: Tensor, *rest: Tensor) -> Tensor:
        return image

    def ends(sample: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return sample, sample

    for graph, sizes in graphs:
        region = graph.region
        stand_in: Any = ends if region.kind == "head" else package
        key = handle._dispatcher.binder.key(graph)
        bound[region.path] = BoundCall(BoundRegion(stand_in, graph.bucket), region, key, sizes)
        alone.append((stand_in, region.example(graph.traits, sizes, unet.dtype, unet.device)))

    def through_flow() -> None:
        call = patch.scope.call
        assert call is not None
        inputs = flow.inputs(bound, given.sample, given.timestep, given.added)
        assert inputs is not None
        flow.run(bound, call, inputs, given.text)

    def inside(run: Callable[[], None]) -> Callable[[], None]:
        def turns() -> None:
            trivial.inside = run
            with patch.phase(**STEP):
                for _ in range(REGION_CALLS):
                    given.call(unet)
            trivial.inside = None

        return turns

    return {
        "wrappers": inside(through_flow),
        "region stand-ins": inside(lambda: [stand_in(*args) for stand_in, args in alone] and None),
    }


def in_phase(patch: ah.Patch, run: Callable[[], None]) -> Callable[[], None]:
    """All calls in one request, at its last step."""

    def turn() -> None:
        with patch.phase(**STEP):
            run()

    return turn


def requests(patch: ah.Patch, given: h.UNetInputs) -> Callable[[], None]:
    """Requests of one call each."""

    def turn() -> None:
        for _ in range(REQUESTS):
            with patch.phase(**STEP):
                given.call(patch.unet)

    return turn


def main() -> None:
    parser = h.arguments(__doc__, repeats=15)
    parser.add_argument("--cache", type=Path, help="compile cache to use and fill; default: a temporary one")
    options = h.parsed(parser)
    counts = (1, 10, 100) if options.tiny else GRAPHS
    report = h.Report(options.out, options.tiny)
    with ExitStack() as stack, torch.no_grad():
        cache = options.cache or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        runs: dict[str, Callable[[], None]] = {}
        handles = {}
        for count in counts:
            handle, trivial, inputs = trivial_handle(options.tiny, cache, many_sizes(count))
            held = len(handle._dispatcher._graphs)
            if (held, handle.stats.hits, handle.stats.eager_calls) != (count, count, 0):
                raise h.WrongOutput(f"expected {count} graphs, all served compiled; got {held} and {handle.stats}")
            handles[count] = handle
            runs[f"{count} patched"] = in_phase(handle.patch, calls(handle.patch.unet, inputs))
            runs[f"{count} alone"] = calls(trivial, inputs)
            runs[f"{count} request"] = requests(handle.patch, inputs[0])
        times = h.interleave(runs, options.repeats, warmup=1)
        for count in counts:
            patched, alone = times[f"{count} patched"], times[f"{count} alone"]
            request = times[f"{count} request"]
            dispatch = (patched.cpu_median - alone.cpu_median) / CALLS * 1e6
            report.add(
                graphs=count, loads=handles[count].stats.loads, unet_dispatch_us=h.rounded(dispatch, 3),
                **patched.fields("patched_call", "us", CALLS), **alone.fields("trivial_call", "us", CALLS),
                request_check_us=h.rounded(request.cpu_median / REQUESTS * 1e6 - patched.cpu_median / CALLS * 1e6, 3),
            )  # fmt: skip
        times = h.interleave(region_calls(handle, trivial, many_sizes(1)[0]), options.repeats, warmup=1)
        regions = len(handle._installed.unet.regions)
        spent = (times["wrappers"].cpu_median - times["region stand-ins"].cpu_median) / REGION_CALLS * 1e6
        report.add(regions=regions, region_dispatch_us=h.rounded(spent, 3), per_region_us=h.rounded(spent / regions, 3))


if __name__ == "__main__":
    main()
