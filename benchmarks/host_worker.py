"""The process of `host`: what an earlier checkout has too is all that it imports. CACHE is its argument."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from against_worker import DEEP  # beside this file: `benchmarks` itself is the other checkout's
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import accel_hidiff as ah
from accel_hidiff.backends import BoundRegion
from accel_hidiff.backends.aot import AOTBackend
from accel_hidiff.binder import BoundCall
from accel_hidiff.dispatch import Graph
from compile_cache import CacheKey, CompileCache

STEPS = 30
SIDE = 256  # pixels: as many calls as at any other size
CALLS, TURNS = 50, 9


class Empty(nn.Module):
    """Gives images and vectors of a region's shapes, zeros, of whatever it is given."""

    def __init__(self, given: tuple[int, ...], shapes: list[tuple[int, ...]]) -> None:
        super().__init__()
        self._given, self._shapes = given, shapes

    def forward(self, *inputs: Tensor) -> Any:
        image = inputs[0]
        outs = []
        for shape in self._shapes:
            if len(shape) < 4:
                outs.append(image.new_zeros(image.shape[0], *shape[1:]))
                continue
            larger, smaller = max(shape[2] // self._given[2], 1), max(self._given[2] // shape[2], 1)
            height, width = (-(-side // smaller) * larger for side in image.shape[2:])
            outs.append(image.new_zeros(image.shape[0], shape[1], height, width))
        return outs[0] if len(outs) == 1 else tuple(outs)


class EmptyRegion:
    """A region whose graph computes nothing."""

    def __init__(self, region: Any, sizes: Any) -> None:
        self._region, self._sizes = region, sizes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._region, name)

    def graph_module(self, traits: Any) -> nn.Module:
        """What it gives in place of the region's own."""
        example = self._region.example(traits, self._sizes, torch.float32, torch.device("cpu"))
        outs = self._region.graph_module(traits)(*example)
        outs = [outs] if isinstance(outs, Tensor) else outs
        return Empty(tuple(example[0].shape), [tuple(out.shape) for out in outs])


class Counted(TorchDispatchMode):
    """Counts PyTorch's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))


def handle_of(unet: UNet2DConditionModel) -> Any:
    """A pipeline around a UNet, served."""
    parts = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipe = StableDiffusionXLPipeline(unet=unet, scheduler=EulerDiscreteScheduler(), add_watermarker=False, **parts)
    return ah.accelerate(pipe, hidiffusion=ah.HiDiffusionConfig(), backend="eager")


def empty_regions(handle: Any, topology: Any, cache: CompileCache) -> list[tuple[BoundRegion, Any, Any]]:
    """For each region of a call: a package that computes nothing, the region's graph, and its sizes."""
    backend, found = AOTBackend(), []
    for graph, sizes in handle._graphs.unet(topology, SIDE, SIDE, 2):
        empty = replace(graph, region=EmptyRegion(graph.region, sizes))
        entry, _ = backend.compile(empty, cache)
        bound = backend.bind(empty, entry)
        assert bound is not None, "it compiles"
        found.append((bound, graph, sizes))
    return found


def bound_calls(
    empty: list[tuple[BoundRegion, Any, Any]], over: Callable[[Any], Any] = lambda call: call
) -> dict[str, BoundCall]:
    """The calls that the dispatcher would make of packages; `over` wraps each package's own."""
    key = CacheKey({})
    return {
        graph.region.path: BoundCall(replace(bound, call=over(bound.call)), graph.region, key, sizes)
        for bound, graph, sizes in empty
    }


def measured(handle: Any, topology: Any, step: int, cache: CompileCache) -> dict[str, float]:
    """Of one call of a UNet in a topology: packages called, operators of PyTorch and Python functions beside them, and
    microseconds of processor time."""
    unet, table = handle.pipe.unet, handle._dispatcher
    sample, text = torch.zeros(2, 4, SIDE // 8, SIDE // 8), torch.zeros(2, 77, unet.config.cross_attention_dim)
    added = {"text_embeds": torch.zeros(2, 16), "time_ids": torch.zeros(2, 6)}
    empty, packages = empty_regions(handle, topology, cache), Counter[str]()

    def counting(call: Any) -> Any:
        def run(*inputs: Tensor) -> Any:
            packages["called"] += 1
            return call(*inputs)

        return run

    def call() -> None:
        unet(sample, timestep, text, added_cond_kwargs=added, return_dict=False)

    def serve(calls: dict[str, BoundCall]) -> None:
        for name in list(table._graphs):
            table._graphs[name] = Graph(calls)

    timestep = torch.tensor(500)
    functions = Counter[str]()
    with handle.patch.phase(step=step, num_steps=STEPS), torch.no_grad():
        call()  # the table has its entry now
        serve(bound_calls(empty, counting))
        call()
        serve(bound_calls(empty))
        call()
        with Counted() as operators:
            call()
        sys.setprofile(lambda frame, event, argument: functions.update((event,)))
        call()
        sys.setprofile(None)
        turns = []
        for _ in range(TURNS):
            start = time.process_time()
            for _ in range(CALLS):
                call()
            turns.append((time.process_time() - start) / CALLS * 1e6)
    return {
        "packages": packages["called"],
        "operators": sum(operators.found.values()),
        "functions": functions["call"],
        "cpu_us": round(statistics.median(turns), 1),
    }


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    handle = handle_of(UNet2DConditionModel(**DEEP).eval().requires_grad_(False))
    cache, found = CompileCache(Path(sys.argv[1])), {}
    for phase in handle.patch.plan(SIDE, SIDE, STEPS):
        figures = measured(handle, phase.topology, phase.start, cache)
        found |= {f"{phase.topology}_{name}": value for name, value in figures.items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
