"""Whole requests: seconds, the VAE, memory, and what other threads of the process see of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from accel_hidiff.errors import OutOfMemory
from benchmarks import harness as h
from benchmarks.gpu.journal import Case, Figures
from benchmarks.gpu.lab import Lab
from benchmarks.gpu.measures import EAGER, STOCK
from benchmarks.gpu.model import inputs_of, relative_l2
from benchmarks.gpu.setting import TOPOLOGIES
from benchmarks.waiting import watched

_WARM_STEPS = 2
_LEFT_BYTES = 10**9  # free memory with which a large request is tried


def measure_request(lab: Lab, case: Case, figures: Figures) -> None:
    """A request of each way, the UNet's part alone and with the VAE: the second one of its size.

    Raises:
        WrongOutput: a variant compiled something or ran eager.
    """
    size, dtype = h.Size.parse(case["size"]), case["dtype"]
    wanted: Tensor | None = None
    for name, pipe in _ways(lab, dtype).items():
        row: Figures = {}
        figures[name] = row
        _request(lab, pipe, size, dtype, _WARM_STEPS, "pt")
        row["unet_s"], out = _request(lab, pipe, size, dtype, lab.setting.steps, "latent")
        if name == EAGER:
            wanted = out
        elif name != STOCK and wanted is not None:
            row["relative_l2"] = h.rounded(relative_l2(out, wanted), 3)
        with _timed_decode(lab, pipe) as decoding:
            row["with_vae_s"], _ = _request(lab, pipe, size, dtype, lab.setting.steps, "pt")
        row |= decoding
    for name, way in lab.served_of(dtype).items():
        way.require_served(name)


def _ways(lab: Lab, dtype: str) -> dict[str, Any]:
    """The pipelines of a dtype: as diffusers has it, HiDiffusion eager, each variant."""
    served = {name: way.pipe for name, way in lab.served_of(dtype).items()}
    return {STOCK: lab.stock(dtype), EAGER: lab.patched(dtype)[0], **served}


def _request(lab: Lab, pipe: Any, size: h.Size, dtype: str, steps: int, output: str) -> tuple[float, Tensor]:
    """Seconds of a request, and its latents or images."""
    config = lab.unet(dtype).config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    shapes = {"prompt_embeds": (1, 77, config.cross_attention_dim), "pooled_prompt_embeds": (1, pooled)}
    generator = torch.Generator().manual_seed(0)
    given = {
        f"{negative}{name}": torch.randn(shape, generator=generator).to(lab.device, getattr(torch, dtype))
        for name, shape in shapes.items()
        for negative in ("", "negative_")
    }
    lab.synchronize()
    start = time.perf_counter()
    made = pipe(
        **given, height=size.height, width=size.width, num_inference_steps=steps, output_type=output,
        generator=torch.Generator().manual_seed(1),
    ).images  # fmt: skip
    lab.synchronize()
    return h.rounded(time.perf_counter() - start), made


@contextmanager
def _timed_decode(lab: Lab, pipe: Any) -> Iterator[Figures]:
    """What decoding takes in the requests inside of the block: milliseconds, and memory at most."""
    plain, found = pipe.vae.decode, Figures()

    def decode(*args: Any, **kwargs: Any) -> Any:
        results: list[Any] = []
        lab.synchronize()
        start = time.perf_counter()
        found["vae_peak_mb"] = lab.peak_mb(lambda: results.append(plain(*args, **kwargs)))
        found["vae_ms"] = h.rounded((time.perf_counter() - start) * 1e3)
        return results[0]

    pipe.vae.decode = decode
    try:
        yield found
    finally:
        del pipe.vae.decode


def measure_huge(lab: Lab, case: Case, figures: Figures) -> None:
    """At a size where memory is short: each way's step and its VAE, once warm; a way that has no memory says so."""
    size, dtype = h.Size.parse(case["size"]), case["dtype"]
    patches = {EAGER: lab.eager(dtype)} | {name: way.handle.patch for name, way in lab.served_of(dtype).items()}
    for name, pipe in _ways(lab, dtype).items():
        row: Figures = {}
        figures[name] = row
        if name in patches:
            run: Any = lab.call_of(patches[name], dtype, size, TOPOLOGIES[0])
        else:
            run = lambda: inputs_of(lab.unet(dtype), size).call(lab.unet(dtype))  # noqa: E731
        try:
            run()
            row["step_peak_mb"] = lab.peak_mb(run)
            row["step_ms"] = h.rounded(statistics.median(h.timed(run)[0] for _ in range(3)) * 1e3)
            with _timed_decode(lab, pipe) as decoding:
                _request(lab, pipe, size, dtype, 1, "pt")
            row |= decoding
        except (torch.OutOfMemoryError, OutOfMemory) as problem:
            row["out_of_memory"] = str(problem).splitlines()[0][:200]
        lab.tidy()


def measure_freezes(lab: Lab, case: Case, figures: Figures) -> None:
    """How long a thread that wants to wake every millisecond does not, while another one runs steps."""
    size, dtype = h.Size.parse(case["size"]), case["dtype"]
    patches = {EAGER: lab.eager(dtype)} | {name: way.handle.patch for name, way in lab.served_of(dtype).items()}
    for name, patch in patches.items():
        run = lab.call_of(patch, dtype, size, TOPOLOGIES[0])
        run()
        lab.synchronize()
        with watched() as gaps:
            for _ in range(5):
                run()
            lab.synchronize()
        longest = sorted(gaps)
        figures[name] = {
            "longest_ms": h.rounded(longest[-1] * 1e3), "p99_ms": h.rounded(longest[int(0.99 * len(longest))] * 1e3)
        }  # fmt: skip


def measure_out_of_memory(lab: Lab, case: Case, figures: Figures) -> None:
    """A large request while something else holds the memory, and a small one before it and after.

    Raises:
        WrongOutput: the large one found memory, or the small one was not served from the cache afterwards.
    """
    served, dtype = lab.served(case["variant"]), lab.variant(case["variant"]).dtype
    large, small = h.Size.parse(case["size"]), min(lab.sizes, key=lambda size: size.width * size.height)
    run = lab.call_of(served.handle.patch, dtype, small, TOPOLOGIES[0])
    figures["before_ms"] = h.rounded(_median_ms(lab, run))
    lab.tidy()
    free, _ = torch.cuda.mem_get_info(lab.device)
    hog = torch.empty(max(free - _LEFT_BYTES, 0), dtype=torch.uint8, device=lab.device)
    try:
        lab.call_of(served.handle.patch, dtype, large, TOPOLOGIES[0])()
        lab.synchronize()
        said = None
    except (torch.OutOfMemoryError, OutOfMemory) as problem:
        said = f"{type(problem).__name__}: {str(problem).splitlines()[0][:200]}"
    del hog
    lab.tidy()
    figures["said"] = said
    figures["after_ms"] = h.rounded(_median_ms(lab, run))
    figures["after_over_before_ratio"] = h.rounded(figures["after_ms"] / figures["before_ms"], 3)
    if said is None:
        raise h.WrongOutput(f"expected {large} to find no memory with {_LEFT_BYTES / 1e9:g} GB free, it ran")
    served.require_served(case["variant"])


def _median_ms(lab: Lab, run: h.StepCall) -> float:
    return lab.interleave({"step": run})["step"].median * 1e3
