"""Resident memory of a serving process: eager patched against all graphs loaded, after a request of each size.

Each side runs in a process of its own (`psutil`), with the pipeline's own calls. Compiled packages are bound to the
pipeline's tensors; a second copy of the weights would show as at least `weights_mb` on top of eager. `loaded_mb` is the
growth while every package is loaded and bound, before anything runs.
"""

from __future__ import annotations

import gc
import json
import resource
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import torch

import accel_hidiff as ah
from benchmarks import harness as h
from compile_cache import CompileCache

REQUEST_STEPS = 7  # enough for all topologies of a request


def resident_mb() -> float:
    """Resident set of this process, without garbage."""
    gc.collect()
    return float(psutil.Process().memory_info().rss / 1e6)


def serve(config: dict[str, Any]) -> dict[str, Any]:
    """One side: resident memory at each point, and the latents of each request."""
    pipe = h.demo_pipeline(config["tiny"])
    sizes = [h.Size(*size) for size in config["sizes"]]
    models = [pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2]
    weights = sum(tensor.nbytes for model in models for tensor in [*model.parameters(), *model.buffers()])
    unet_weights = sum(tensor.nbytes for tensor in pipe.unet.parameters())
    rss = {"built_mb": resident_mb()}
    handle = None
    if config["side"] == "eager":
        ah.apply_hidiffusion(pipe)
    else:
        handle = load_everything(pipe, config["cache"], sizes)
        rss["loaded_mb"] = resident_mb() - rss["built_mb"]
    request_mb, probes = {}, {}
    for size in sizes:
        image = pipe(
            "a red circle", height=size.height, width=size.width, num_inference_steps=REQUEST_STEPS,
            generator=torch.Generator().manual_seed(1), output_type="np",
        ).images[0]  # fmt: skip
        probes[str(size)] = image[:: image.shape[0] // 8, :: image.shape[1] // 8].ravel().tolist()
        del image
        request_mb[str(size)] = resident_mb()
    if handle is not None and (handle.stats.eager_calls or handle.stats.compiles):
        raise h.WrongOutput(f"expected compiled calls only, got {handle.stats}")
    return {
        "weights_mb": weights / 1e6,
        "unet_weights_mb": unet_weights / 1e6,
        **rss,
        "after_mb": request_mb,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        "bindings": handle.stats.bindings if handle is not None else 0,
        "probes": probes,
    }


def load_everything(pipe: Any, cache: str, sizes: list[h.Size]) -> ah.Handle:
    """Binds every region of every topology, and the decoder; runs nothing."""
    options: dict[str, Any] = {"hidiffusion": ah.HiDiffusionConfig(), "cache": CompileCache(cache), "on_miss": "error"}
    handle = ah.accelerate(pipe, **options)
    with torch.no_grad():
        handle.load([(size.height, size.width) for size in sizes], REQUEST_STEPS, batch_sizes=[h.GUIDANCE_BATCH])
    return handle


def main() -> None:
    if (config := h.worker_config()) is not None:
        print(json.dumps(serve(config)))
        return
    parser = h.arguments(__doc__)
    parser.add_argument("--cache", type=Path, help="compile cache to use and fill; default: a temporary one")
    options = h.parsed(parser)
    sizes = h.sizes_of(options)
    report = h.Report(options.out, options.tiny)
    with ExitStack() as stack:
        cache = options.cache or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        filler = ah.accelerate(
            h.demo_pipeline(options.tiny), hidiffusion=ah.HiDiffusionConfig(), cache=CompileCache(cache)
        )
        filler.precompile([(size.height, size.width) for size in sizes], REQUEST_STEPS)
        config = {"tiny": options.tiny, "threads": options.threads, "sizes": sizes, "cache": str(cache.resolve())}
        sides = {side: h.worker("benchmarks.memory", {"side": side, **config}) for side in ("eager", "compiled")}
    eager, compiled = sides["eager"], sides["compiled"]
    for name, want in eager["probes"].items():
        h.verify(name, torch.tensor(compiled["probes"][name]), torch.tensor(want), limit=1e-2)
    fixed = ("weights_mb", "unet_weights_mb")
    report.add(**{name: h.rounded(eager[name]) for name in fixed}, bindings=compiled["bindings"])
    for side, row in sides.items():
        names = [name for name in ("built_mb", "loaded_mb", "peak_mb") if name in row]
        report.add(side=side, **{name: h.rounded(row[name]) for name in names})
    for name in eager["after_mb"]:
        added = compiled["after_mb"][name] - eager["after_mb"][name]
        report.add(
            after_request=name, eager_mb=h.rounded(eager["after_mb"][name]),
            compiled_mb=h.rounded(compiled["after_mb"][name]), added_mb=h.rounded(added),
            added_over_weights_ratio=h.rounded(added / eager["weights_mb"], 2),
        )  # fmt: skip


if __name__ == "__main__":
    main()
