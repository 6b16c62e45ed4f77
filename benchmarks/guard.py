"""Guard and dispatch per UNet call against the guards that `torch.compile` evaluates on the same UNet, in one process.

The UNet has SDXL's real depth (transformers of 2 and 10 blocks) and tiny widths; neither side's cost depends on widths.
One thread, processor time, contestants in turns.

- `ours_us`: a call of the patched, accelerated UNet (plan, topology, shifts, guard facts, lookup, counters) minus a
  call of the stand-in that takes the place of its own forward; as in `benchmarks.dispatch`, which also tells what the
  wrappers of all regions add (`ours_regions_us`) and what a request pays once (`ours_request_us`). With
  `--request-steps` steps to a request, `ours_all_us` is the sum per UNet call.
- `torch_guards_us`: one evaluation of the guards that Dynamo made for the stock, unpatched UNet, compiled whole with
  `fullgraph=True` for one size: the C++ guard tree of its one cache entry, called by hand
  (`guard_manager.check(frame's locals)`). Every call of the compiled UNet evaluates them.
- `torch_call_us`: a whole call of that compiled UNet, with a backend whose graphs compute nothing and return an output
  that was made before; so what is left is guards, and what Dynamo does to call the graph. For comparison only.

The stock UNet is the favourable case for `torch.compile`: one size and one topology, one cache entry. Patched, it would
have an entry for each topology and each kind of size, looked at one after the other.
"""

from __future__ import annotations

import dataclasses
import inspect
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from accel_hidiff.demo import DemoModelConfig, tiny_config
from benchmarks import dispatch
from benchmarks import harness as h

DEPTHS = (1, 2, 10)  # SDXL's
CALLS = 200  # of compiled UNets and of their guards, per timed turn
TARGET = 10.0


def model_config(tiny: bool) -> DemoModelConfig:
    """SDXL's depth at the tiny model's widths; a smoke run takes the tiny model's depth, too."""
    return tiny_config() if tiny else dataclasses.replace(tiny_config(), transformer_layers=DEPTHS)


def compiled_for_nothing(unet: Any, given: h.UNetInputs) -> Callable[..., Any]:
    """`torch.compile` of the UNet with a backend that returns a stored output."""
    out = given.call(unet)

    def backend(graph: Any, example: Sequence[Any]) -> Callable[..., Any]:
        return lambda *inputs: (out,)

    compiled: Callable[..., Any] = torch.compile(unet, backend=backend, fullgraph=True, dynamic=False)
    got = given.call(compiled)
    if got is not out:
        raise h.WrongOutput("expected one graph that returns the stored output, got another one")
    return compiled


def guard_evaluation(unet: Any, given: h.UNetInputs) -> tuple[Callable[[], None], int]:
    """`CALLS` evaluations of the guards of a compiled UNet, and how many guards they are."""
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    forward = type(unet).forward
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    entries = _debug_get_cache_entry_list(forward.__code__)
    if len(entries) != 1:
        raise h.WrongOutput(f"expected one cache entry, got {len(entries)}")
    manager = entries[0].guard_manager
    bound = inspect.signature(forward).bind(
        unet, given.sample, given.timestep, given.text, added_cond_kwargs=given.added, return_dict=False
    )
    bound.apply_defaults()
    frame = dict(bound.arguments)
    if not manager.check(frame):
        raise h.WrongOutput("expected guards that hold for the inputs that were compiled for")
    if manager.check({**frame, "sample": given.sample[:, :, :-8]}):
        raise h.WrongOutput("expected guards that fail for another size")

    def run() -> None:
        for _ in range(CALLS):
            manager.check(frame)

    return run, len(str(manager).splitlines())


def compiled_calls(compiled: Callable[..., Any], given: h.UNetInputs) -> Callable[[], None]:
    """`CALLS` calls of the compiled UNet."""

    def run() -> None:
        for _ in range(CALLS):
            given.call(compiled)

    return run


def main() -> None:
    parser = h.arguments(__doc__, repeats=15)
    parser.add_argument("--cache", type=Path, help="compile cache to use and fill; default: a temporary one")
    parser.add_argument("--request-steps", type=int, default=30, help="UNet calls of a request")
    options = h.parsed(parser)
    report = h.Report(options.out, options.tiny)
    config = model_config(options.tiny)
    with ExitStack() as stack, torch.no_grad():
        cache = options.cache or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sizes = dispatch.many_sizes(1)
        handle, trivial, inputs = dispatch.trivial_handle(options.tiny, cache, sizes, config)
        stock = h.demo_pipeline(options.tiny, config).unet
        compiled = compiled_for_nothing(stock, inputs[0])
        guards, lines = guard_evaluation(stock, inputs[0])
        runs = {
            "patched": dispatch.in_phase(handle.patch, dispatch.calls(handle.patch.unet, inputs)),
            "alone": dispatch.calls(trivial, inputs),
            "request": dispatch.requests(handle.patch, inputs[0]),
            "guards": guards,
            "compiled": compiled_calls(compiled, inputs[0]),
            **dispatch.region_calls(handle, trivial, sizes[0]),
        }
        times = h.interleave(runs, options.repeats, warmup=1)
    per_call = {name: 1e6 * times[name].cpu_median / dispatch.CALLS for name in ("patched", "alone")}
    ours = per_call["patched"] - per_call["alone"]
    spent = times["wrappers"].cpu_median - times["region stand-ins"].cpu_median
    regions = 1e6 * spent / dispatch.REGION_CALLS
    request = 1e6 * times["request"].cpu_median / dispatch.REQUESTS - per_call["patched"]
    everything = ours + regions + request / options.request_steps
    torch_guards = 1e6 * times["guards"].cpu_median / CALLS
    torch_call = 1e6 * times["compiled"].cpu_median / CALLS
    report.add(
        modules=len(list(stock.modules())), parameters=len(list(stock.parameters())), guard_lines=lines,
        regions=len(handle._installed.unet.regions), request_steps=options.request_steps,
        ours_us=h.rounded(ours, 3), ours_regions_us=h.rounded(regions, 3), ours_request_us=h.rounded(request, 3),
        ours_all_us=h.rounded(everything, 3), torch_guards_us=h.rounded(torch_guards, 3),
        torch_call_us=h.rounded(torch_call, 3), guards_over_ours_ratio=h.rounded(torch_guards / ours, 3),
        guards_over_all_ratio=h.rounded(torch_guards / everything, 3), target_ratio=TARGET,
    )  # fmt: skip


if __name__ == "__main__":
    main()
