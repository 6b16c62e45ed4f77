"""Time to the first image under `on_miss="background"` with an empty cache, against plain eager HiDiffusion.

Pairs, in one process, every other one in reverse order. Eager: a patched pipeline, its first request. Background: the
same pipeline (built anew) accelerated over an empty cache, its first request: keys, the look-up that finds nothing, the
description of the models for the compiling process, and its start are in that time; the process then works at the
lowest priority beside it, on the processor that `--threads 1` leaves free. It is ended before the next turn, so that
nothing compiles beside eager. The images of a pair are equal bit for bit: both are eager.

With `--busy` (the default) the compiling process was started by an earlier request of another pipeline, and is at work
when the request begins; `--no-busy` starts it within.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import accel_hidiff as ah
from benchmarks import harness as h
from compile_cache import CompileCache

TARGET_RATIO = 1.05
WORKER_START_S = 20.0  # until a compiling process that was just started has imported torch and compiles


def request(pipe: Any, size: h.Size, steps: int) -> torch.Tensor:
    """One image, as tensor."""
    generator = torch.Generator().manual_seed(1)
    options: dict[str, Any] = {"num_inference_steps": steps, "generator": generator, "output_type": "pt"}
    image: torch.Tensor = pipe("a red circle", height=size.height, width=size.width, **options).images
    return image


def eager_turn(tiny: bool, size: h.Size, steps: int) -> tuple[torch.Tensor, float]:
    """(image, seconds) of the first request of a patched pipeline."""
    pipe = h.demo_pipeline(tiny)
    ah.apply_hidiffusion(pipe, config=ah.HiDiffusionConfig())
    start = time.perf_counter()
    image = request(pipe, size, steps)
    return image, time.perf_counter() - start


def background_turn(tiny: bool, size: h.Size, steps: int, busy: bool) -> tuple[torch.Tensor, float, ah.Handle]:
    """(image, seconds, handle) of the first request of an accelerated pipeline over an empty cache."""
    pipe = h.demo_pipeline(tiny)
    with tempfile.TemporaryDirectory() as empty, ah.CompilePool() as pool:
        options: dict[str, Any] = {"on_miss": "background", "background": pool, "hidiffusion": ah.HiDiffusionConfig()}
        if busy:
            other = ah.accelerate(h.demo_pipeline(tiny), cache=CompileCache(Path(empty, "other")), **options)
            request(other.pipe, size, 1)
            time.sleep(WORKER_START_S)
        handle = ah.accelerate(pipe, cache=CompileCache(Path(empty, "cache")), **options)
        start = time.perf_counter()
        image = request(pipe, size, steps)
        seconds = time.perf_counter() - start
        if not pool.pids():
            raise h.WrongOutput("expected a compiling process beside the request, found none")
        handle.remove()
    return image, seconds, handle


def main() -> None:
    parser = h.arguments(__doc__, repeats=7)
    parser.add_argument("--steps", type=int, default=20, help="of a request")
    parser.add_argument("--busy", action=argparse.BooleanOptionalAction, default=True, help="it compiles already")
    options = h.parsed(parser)
    size = h.sizes_of(options)[0]
    report = h.Report(options.out, options.tiny)
    eager_turn(options.tiny, size, options.steps)  # torch's own first calls
    turns: list[tuple[float, float]] = []
    for number in range(options.repeats):
        made: dict[str, Any] = {}
        order = ["eager", "background"]
        for side in order if number % 2 == 0 else reversed(order):
            if side == "eager":
                made[side] = eager_turn(options.tiny, size, options.steps)
            else:
                made[side] = background_turn(options.tiny, size, options.steps, options.busy)
        eager, background = made["eager"], made["background"]
        if not torch.equal(eager[0], background[0]):
            raise h.WrongOutput("expected the same image bit for bit, got another one")
        stats = background[2].stats
        if stats.hits or not stats.background["queued"]:
            raise h.WrongOutput(f"expected eager calls and graphs queued for compilation, got {stats}")
        turns.append((eager[1], background[1]))
        report.add(turn=number, eager_s=h.rounded(eager[1]), background_s=h.rounded(background[1]))
    ratios = [background / eager for eager, background in turns]
    low, _, high = statistics.quantiles(ratios, n=4)
    medians = [statistics.median(side) for side in zip(*turns, strict=True)]
    report.add(
        size=str(size), steps=options.steps, busy=options.busy, turns=len(turns), eager_median_s=h.rounded(medians[0]),
        background_median_s=h.rounded(medians[1]), median_of_ratios=h.rounded(statistics.median(ratios)),
        ratio_of_medians=h.rounded(medians[1] / medians[0]), quartiles=[h.rounded(low), h.rounded(high)],
        queued=stats.background["queued"], target_ratio=TARGET_RATIO,
    )  # fmt: skip


if __name__ == "__main__":
    main()
