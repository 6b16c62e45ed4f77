"""Whole UNet against blocks: seconds to compile and milliseconds per step; what the default of `regions` rests on.

On a model of SDXL's layout with fewer transformer blocks than the demo model, so that a whole-UNet graph compiles in
minutes. Both choices compile for one size in processes of their own with empty caches (`compile_s` is the UNet's share;
the VAE decoder, the same for both, is left out), then they are timed in turns with eager in one process.

`--windowed-only` takes one topology in place of a request's three. With `--cache`, artifacts that the cache holds are
found and not compiled: `unet_compiled` says how many were, and `compile_s` is a cold figure only if all of them.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import accel_hidiff as ah
from accel_hidiff.demo import DemoModelConfig
from accel_hidiff.explain import PrecompileEvent
from benchmarks import harness as h
from compile_cache import CompileCache

REDUCED = DemoModelConfig(transformer_layers=(1, 1, 2))
CHOICES = ("blocks", "whole")


def hidiffusion(windowed_only: bool) -> ah.HiDiffusionConfig:
    """All three topologies of a request, or one."""
    return ah.HiDiffusionConfig(pooled=False, dilated=False) if windowed_only else ah.HiDiffusionConfig()


def make_handle(config: Mapping[str, Any], on_miss: str = "compile") -> ah.Handle:
    """An accelerated reduced pipeline."""
    return ah.accelerate(
        h.demo_pipeline(config["tiny"], REDUCED),
        hidiffusion=hidiffusion(config["windowed_only"]),
        cache=CompileCache(config["cache"]),
        regions=config["regions"],
        shapes=config["shapes"],
        on_miss=on_miss,
    )


def compile_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Compiles one choice into its empty cache."""
    seconds: Counter[str] = Counter()
    cpu: Counter[str] = Counter()

    compiled: list[str] = []

    def progress(event: PrecompileEvent) -> None:
        if event.state == "compiled":
            compiled.append(event.region)
        seconds[event.region] += event.seconds
        cpu[event.region] += h.cpu_seconds() * (-1 if event.state == "compiling" else 1)

    width, height = config["size"]
    made = make_handle(config).precompile(
        [(height, width)],
        h.NUM_STEPS,
        batch_sizes=(h.GUIDANCE_BATCH,),
        progress=progress,
    )
    decoder, _ = seconds.pop("vae.decoder"), cpu.pop("vae.decoder")
    return {
        "unet_artifacts": made.artifacts - 1,
        "unet_compiled": sum(region != "vae.decoder" for region in compiled),
        "compile_s": seconds.total(),
        "compile_cpu_s": cpu.total(),
        "decoder_s": decoder,
        "artifacts_mb": made.bytes / 1e6,
    }


def main() -> None:
    if (config := h.worker_config()) is not None:
        print(json.dumps(compile_worker(config)))
        return
    parser = h.arguments(__doc__)
    parser.add_argument("--cache", type=Path, help="compile cache to use and fill; default: temporary ones")
    parser.add_argument("--windowed-only", action="store_true", help="one topology: a shorter run")
    parser.add_argument("--exact", action="store_true", help='the whole UNet with shapes="exact"; blocks stay symbolic')
    parser.add_argument("--limit-s", type=float, default=1200.0, help="give up on a choice that compiles for longer")
    options = h.parsed(parser)
    sizes = h.sizes_of(options)
    report = h.Report(options.out, options.tiny)
    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        place = Path(directory)
        configs = {
            regions: {
                "regions": regions,
                "shapes": "exact" if options.exact and regions == "whole" else "symbolic",
                "tiny": options.tiny,
                "windowed_only": options.windowed_only,
                "cache": str((options.cache or place / regions / "cache").resolve()),
                "size": sizes[0],
            }
            for regions in CHOICES
        }
        choices: list[str] = []
        for regions, config in configs.items():
            empty = {"TORCHINDUCTOR_CACHE_DIR": str(place / regions / "inductor")}
            cpu = h.cpu_seconds()
            try:
                made = h.worker("benchmarks.regions_choice", config, empty, options.limit_s)
            except subprocess.TimeoutExpired:
                used = h.rounded(h.cpu_seconds() - cpu)
                failed = f"not compiled after {options.limit_s:g} s"
                report.add(regions=regions, size=str(sizes[0]), failed=failed, used_cpu_s=used)
                continue
            choices.append(regions)
            report.add(regions=regions, size=str(sizes[0]), **h.rounded_row(made))
        pipe = h.demo_pipeline(options.tiny, REDUCED)
        patches = {"eager": ah.apply_hidiffusion(pipe, config=hidiffusion(options.windowed_only))}
        for regions in choices:
            patches[regions] = make_handle(configs[regions], on_miss="error").patch
        for size in sizes:
            inputs = h.unet_inputs(patches["eager"].unet, size)
            for topology, step in h.topology_steps(patches["eager"], size).items():
                runs = {name: h.StepCall(patch, inputs, step, h.NUM_STEPS) for name, patch in patches.items()}
                want = runs["eager"]()
                errors = {regions: h.verify(regions, runs[regions](), want) for regions in choices}
                times = h.interleave(runs, options.repeats)
                fields: dict[str, Any] = {"size": str(size), "topology": str(topology), "batch": h.GUIDANCE_BATCH}
                for name, timing in times.items():
                    fields |= timing.fields(name)
                for regions in choices:
                    fields |= times[regions].ratios(f"{regions}_over_eager", times["eager"])
                    fields[f"{regions}_error"] = h.rounded(errors[regions], 2)
                if len(choices) == len(CHOICES):
                    fields |= times["whole"].ratios("whole_over_blocks", times["blocks"])
                report.add(**fields)


if __name__ == "__main__":
    main()
