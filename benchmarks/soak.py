"""A soak: mixed requests under `on_miss="background"`, failures injected, every image compared with an eager twin.

One pipeline is accelerated over a cache that holds the graphs of four sizes; its twin, patched and eager, is given the
same changes. Between requests, at random: sizes that were never seen (odd feature maps too), steps, guidance, images
per prompt; LoRA layers loaded, fused, unfused, unloaded; checkpoints loaded in place, by assignment, or as another UNet
object; other schedulers; a restart of the handle. Requests are interrupted, or raise in a step. Failures: a compiled
call that raises, a blob of the cache overwritten on the disk, `kill -9` of the compiling process.

An image is wrong if max|got - want| / max|want| is not below 5e-3. The process is looked at after each request:
resident memory (the twin's included, after glibc has given back what is free), programs that are loaded, file
descriptors. Two things grow with new sizes and not with requests: the library of a program stays in a process that
loaded it, and oneDNN keeps up to 1,024 kernels, one for each shape, eager or compiled. So memory is bounded if, without
`MB_OF_PROGRAM` for each program, its Theil-Sen slope over the second half is below `SLOPE_LIMIT` MB per 100 requests;
run it with ONEDNN_PRIMITIVE_CACHE_CAPACITY=0 to take oneDNN's part out. At the end nothing may be left: processes,
unfinished files, damage.

`--requests 30 --tiny` is the short version that the tests run; the model is the tiny one in both.
"""

from __future__ import annotations

import ctypes
import gc
import os
import random
import signal
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import psutil
import torch
from torch import Tensor

import accel_hidiff as ah
from accel_hidiff.backends import aot_package
from accel_hidiff.demo import build_pipeline, tiny_config
from benchmarks import harness as h
from benchmarks.soak_plot import KINDS, plot, theil_sen
from compile_cache import CompileCache

TOLERANCE = 5e-3
SLOPE_LIMIT = 5.0  # MB per 100 requests
MB_OF_PROGRAM = 0.38  # 10.6 MB for 28 of the tiny model
EXTRA_DESCRIPTORS = 16  # over those of the first request, and one for each cache entry in use
QUIET_S = 15.0
SIZES = ((128, 128), (128, 192), (256, 128), (192, 128))  # (height, width), most requests
SCHEDULERS = (
    "EulerDiscreteScheduler",
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "HeunDiscreteScheduler",
    "UniPCMultistepScheduler",
)
SEEDS_OF_CHECKPOINTS = (0, 1, 2)
LORA_TARGETS = ["to_q", "to_v", "conv2"]


class Cancelled(Exception):
    """The client is gone."""


@dataclass
class State:
    """What was done to both pipelines."""

    lora: str = "none"  # "none", "loaded", "fused"
    damaged: set[Path] = field(default_factory=set)
    events: Counter[str] = field(default_factory=Counter)


class Soak:
    """Both pipelines, and everything that may happen to them.

    Args:
        cache: directory of the compile cache.
        seed: of all choices.
    """

    def __init__(self, cache: Path, seed: int) -> None:
        self.cache = cache
        self.random = random.Random(seed)
        self.state = State()
        # At the usual lowest priority, a machine with other work to do would leave it nothing, and the soak all eager.
        self.pool = ah.CompilePool(idle=10, niceness=0)
        self.checkpoints = [build_pipeline(seed, config=tiny_config()).unet for seed in SEEDS_OF_CHECKPOINTS]
        self.served, self.eager = (h.demo_pipeline(True) for _ in range(2))
        self.handle = self.accelerate()
        self.handle.precompile(SIZES, 8, jobs=1)
        ah.apply_hidiffusion(self.eager, config=ah.HiDiffusionConfig())

    def accelerate(self) -> ah.Handle:
        """A handle over the cache as it is on the disk."""
        options: dict[str, Any] = {"on_miss": "background", "background": self.pool}
        return ah.accelerate(self.served, hidiffusion=ah.HiDiffusionConfig(), cache=CompileCache(self.cache), **options)

    def both(self, change: Callable[[Any], Any]) -> None:
        """The same for the pipeline and its twin."""
        for pipe in (self.served, self.eager):
            change(pipe)

    # What happens between requests

    def happen(self) -> list[str]:
        """Changes and failures before one request, by name."""
        choices: list[tuple[float, Callable[[], str | None]]] = [
            (0.06 if self.state.lora == "none" else 0.3, self.change_lora),
            (0.08, self.change_checkpoint),
            (0.06, self.change_scheduler),
            (0.01, self.restart),
            (0.04, self.fail_a_call),
            (0.01, self.damage_a_blob),
            (0.03, self.kill_the_compiler),
            (0.25, self.verify),
            (0.05, self.quiet),
        ]
        happened = [name for chance, event in choices if self.random.random() < chance and (name := event())]
        self.state.events.update(happened)
        return happened

    def change_lora(self) -> str:
        """The next stage of a LoRA's life."""
        lora = self.state.lora
        if lora == "none":
            scale, seed = self.random.choice((0.5, -0.5, 1.0)), self.random.randrange(100)
            self.both(lambda pipe: load_lora(pipe.unet, scale, seed))
            self.state.lora = "loaded"
            return "lora loaded"
        if lora == "fused":
            if self.random.random() < 0.5:
                self.both(lambda pipe: pipe.unet.unfuse_lora())
                self.state.lora = "loaded"
                return "lora unfused"
            self.both(lambda pipe: pipe.unet.unload_lora())  # stays in the weights
            self.state.lora = "none"
            return "lora fused and unloaded"
        if self.random.random() < 0.5:
            self.both(lambda pipe: pipe.unet.fuse_lora())
            self.state.lora = "fused"
            return "lora fused"
        self.both(lambda pipe: pipe.unet.unload_lora())
        self.state.lora = "none"
        return "lora unloaded"

    def change_checkpoint(self) -> str | None:
        """Other weights, in one of three ways."""
        if self.state.lora != "none":
            return None
        source = self.random.choice(self.checkpoints)
        weights = {name: tensor.clone() for name, tensor in source.state_dict().items()}
        way = self.random.choice(("in place", "assigned", "another unet"))
        if way == "another unet":
            for pipe in (self.served, self.eager):
                unet = type(source)(**source.config)
                unet.load_state_dict(weights)
                pipe.unet = unet.eval()
            ah.apply_hidiffusion(self.eager, config=ah.HiDiffusionConfig())
        else:
            copies = iter([weights, {name: tensor.clone() for name, tensor in weights.items()}])
            self.both(lambda pipe: pipe.unet.load_state_dict(next(copies), assign=way == "assigned"))
        return f"checkpoint {way}"

    def change_scheduler(self) -> str:
        """Another sampler."""
        kind = getattr(diffusers, self.random.choice(SCHEDULERS))
        self.both(lambda pipe: setattr(pipe, "scheduler", kind.from_config(pipe.scheduler.config)))
        return "scheduler"

    def restart(self) -> str:
        """Another handle: it reads what the disk holds now."""
        self.handle.remove()
        self.handle = self.accelerate()
        return "restart"

    def fail_a_call(self) -> str | None:
        """One compiled call raises the next time that it is called."""
        graphs = [graph for graph in self.handle._dispatcher._graphs.values() if graph.calls]
        if not graphs:
            return None
        calls = self.random.choice(graphs).calls
        call = calls[self.random.choice(sorted(calls))]
        run = call._run

        def fails(*inputs: Any) -> Any:
            call._run = run
            raise RuntimeError("out of memory (injected)")

        call._run = fails
        return "a call that fails"

    def damage_a_blob(self) -> str | None:
        """Other bytes in the place of an artifact."""
        blobs = sorted(path for path in self.cache.glob("v1/blobs/*/*") if path not in self.state.damaged)
        if not blobs:
            return None
        blob = self.random.choice(blobs)
        partial = blob.with_name(blob.name + ".damage")
        partial.write_bytes(b"\0" * blob.stat().st_size)
        partial.replace(blob)
        self.state.damaged.add(blob)
        return "a damaged blob"

    def kill_the_compiler(self) -> str | None:
        """`kill -9`."""
        pids = self.pool.pids()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        return "compiler killed" if pids else None

    def verify(self) -> str | None:
        """Artifacts that failed are checked, and serve again."""
        return "verified" if self.handle.verify() else None

    def quiet(self) -> str | None:
        """No requests for a while, in which the background gets on."""
        if self.handle.wait(0):
            return None
        self.handle.wait(QUIET_S)
        return "quiet"

    # A request

    def request(self, number: int) -> dict[str, Any]:
        """One request to both; whether its image is the twin's."""
        draw = self.random
        height, width = draw.choice(SIZES)
        if unknown := draw.random() < 0.25:
            height, width = (8 * draw.randrange(12, 33) for _ in range(2))
        steps = draw.randrange(2, 9)
        options: dict[str, Any] = {
            "height": height,
            "width": width,
            "num_inference_steps": steps,
            "guidance_scale": draw.choice((0.0, 5.0)),
            "num_images_per_prompt": draw.choice((1, 1, 1, 2)),
            "output_type": draw.choice(("latent", "latent", "pt")),
        }
        end = draw.choices(("completed", "interrupted", "raised"), (0.85, 0.08, 0.07))[0]
        if end != "completed":
            options["callback_on_step_end"] = ending(end, draw.randrange(steps))
        seed = draw.randrange(1 << 31)
        stats = self.handle.stats
        before = stats.hits, stats.eager_calls
        start = time.perf_counter()
        got = run(self.served, seed, options)
        seconds = time.perf_counter() - start
        hits, ran_eager = stats.hits - before[0], stats.eager_calls - before[1]
        want = run(self.eager, seed, options)
        kind = KINDS[3 if got is None else 2 if not hits else 1 if ran_eager else 0]
        row = {"request": number, "size": f"{width}x{height}", "unknown_size": unknown, "steps": steps, "end": end}
        error = difference(got, want)
        found = {"kind": kind, "error": h.rounded(error, 2), "wrong": not error < TOLERANCE}
        return {**row, **found, "served_ms": h.rounded(1e3 * seconds)}


def load_lora(unet: Any, scale: float, seed: int) -> None:
    """LoRA layers, none of them zero."""
    import peft

    unet.add_adapter(peft.LoraConfig(r=2, lora_alpha=2 * scale, target_modules=LORA_TARGETS))
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.15, generator=draw)
    unet.eval()


def ending(end: str, when: int) -> Callable[..., Any]:
    """A callback that ends a request in a step."""

    def callback(pipe: Any, step: int, timestep: Any, kwargs: Any) -> Any:
        if step >= when and end == "raised":
            raise Cancelled
        pipe._interrupt = step >= when
        return kwargs

    return callback


def run(pipe: Any, seed: int, options: dict[str, Any]) -> Tensor | None:
    """The image or the latents of one request; None where it was cancelled by an exception."""
    try:
        return pipe("a red circle", generator=torch.Generator().manual_seed(seed), **options).images
    except Cancelled:
        return None


def difference(got: Tensor | None, want: Tensor | None) -> float:
    """max|got - want| / max|want|; 0 where neither made an image, infinite where one alone did."""
    if got is None or want is None or got.shape != want.shape:
        return 0.0 if got is want else float("inf")
    return ((got - want).abs().max() / want.abs().max()).item()


def children() -> list[str]:
    """Processes below this one that live."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()[:4]))
        except psutil.NoSuchProcess:
            continue
    return found


def give_back_free_memory() -> None:
    """glibc keeps what is freed between blocks that are in use; how much of that there is tells nothing of leaks."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def soak(report: h.Report, cache: Path, requests: int, seed: int) -> tuple[list[dict[str, Any]], float]:
    """All requests, then what is left over.

    Raises:
        WrongOutput: an image differs from the twin's, or something is left over.
    """
    process, rows = psutil.Process(), []
    test = Soak(cache, seed)
    try:
        for number in range(requests):
            happened = test.happen()
            row = test.request(number)
            binder = test.handle._dispatcher.binder
            give_back_free_memory()
            row["rss_mb"] = h.rounded(process.memory_info().rss / 1e6, 5)
            row["programs"] = binder.held + sum(map(len, aot_package._idle.values()))
            row["descriptors"] = process.num_fds() - len(binder._entries)  # one for each entry in use is meant to be
            rows.append(row)
            report.add(**rows[-1], events=happened)
    finally:
        stats = test.handle.stats.to_json()
        test.handle.remove()
        test.pool.close()
    half = rows[len(rows) // 2 :]
    slope = 100 * theil_sen([row["rss_mb"] - MB_OF_PROGRAM * row["programs"] for row in half])
    whole_slope = 100 * theil_sen([row["rss_mb"] for row in half])
    store = CompileCache(cache)
    repaired = len(store.verify(repair=True).damaged)
    left = {
        "processes": children(),
        "unfinished_files": [path.name for path in cache.glob("v1/tmp/*")],
        "descriptors": max(row["descriptors"] for row in rows[requests // 2 :]) - rows[0]["descriptors"],
    }
    wrong = sum(row["wrong"] for row in rows)
    report.add(
        requests=requests, images=sum(row["kind"] != "no image" for row in rows), wrong_images=wrong,
        largest_error=max(row["error"] for row in rows), served=dict(Counter(row["kind"] for row in rows)),
        events=dict(test.state.events), rss_first_mb=rows[0]["rss_mb"], rss_last_mb=rows[-1]["rss_mb"],
        rss_slope_mb_per_100=h.rounded(whole_slope, 3), rss_slope_without_programs_mb_per_100=h.rounded(slope, 3),
        programs_last=rows[-1]["programs"], programs_most=max(row["programs"] for row in rows),
        slope_limit=SLOPE_LIMIT, left=left, background_of_last_handle=stats["background"], repaired_at_the_end=repaired,
        onednn_cache=os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "default"),
        cache_ok=store.verify().ok, artifacts=len(list(store.entries())),
    )  # fmt: skip
    if wrong:
        raise h.WrongOutput(f"expected images like the twin's, {wrong} of {len(rows)} requests gave others")
    if left["processes"] or left["unfinished_files"] or not store.verify().ok:
        raise h.WrongOutput(f"expected nothing left over and a sound cache, got {left}")
    if left["descriptors"] > EXTRA_DESCRIPTORS:
        raise h.WrongOutput(f"expected at most {EXTRA_DESCRIPTORS} more descriptors, got {left['descriptors']}")
    return rows, slope


def main() -> None:
    parser = h.arguments(__doc__)
    parser.add_argument("--requests", type=int, default=500, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="of all choices")
    parser.add_argument("--plot", type=Path, help="PNG file to write")
    parser.add_argument("--cache", type=Path, help="compile cache to use and fill; default: a temporary, empty one")
    options = h.parsed(parser)
    warnings.simplefilter("ignore")  # damage and sizes are told in the records
    report = h.Report(options.out, options.tiny)
    with tempfile.TemporaryDirectory() as temporary:
        rows, slope = soak(report, options.cache or Path(temporary), options.requests, options.seed)
    if options.plot is not None:
        plot(rows, slope, options.plot)
    if slope > SLOPE_LIMIT and not options.tiny:  # a smoke run is too short to tell
        raise h.WrongOutput(f"expected memory to grow by less than {SLOPE_LIMIT} MB per 100 requests, got {slope:.2f}")


if __name__ == "__main__":
    main()
