"""Cold start: precompiling one size against three, and what a new process pays where the cache is filled already.

Every scenario runs in processes of its own. `compile`: an empty compile cache and an empty Inductor cache, for one size
and again, both empty, for all sizes; the buckets are ranges, so further sizes should cost next to nothing. `load`: new
processes over the filled cache, from `accelerate()` until the packages of every region of every topology and the VAE
decoder are loaded and bound; the UNet's own forward is a stand-in meanwhile (`harness.TrivialUNet`), so that no step's
time is in it. Importing torch and diffusers and building the model cost the same with and without this package; they
are reported beside. `_cpu_s` is processor time, compilers included.

`--size` runs one scenario, over the sizes that it names: two shorter runs in place of a long one. `--cache` takes a
cache that an earlier run filled: only loads are measured.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

STARTED = time.perf_counter()  # before torch is imported, for `import_s`

import torch  # noqa: E402

import accel_hidiff as ah  # noqa: E402
from benchmarks import harness as h  # noqa: E402
from compile_cache import CompileCache  # noqa: E402

LOADS = 3  # processes; the median is reported


def compile_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Precompiles the sizes into an empty cache; how long that took, region by region."""
    pipe = h.demo_pipeline(config["tiny"])
    handle = ah.accelerate(pipe, hidiffusion=ah.HiDiffusionConfig(), cache=CompileCache(config["cache"]))
    seconds: dict[str, float] = {}
    cpu = h.cpu_seconds()
    done = handle.precompile(
        [(height, width) for width, height in config["sizes"]],
        h.NUM_STEPS,
        progress=lambda event: seconds.__setitem__(event.region, seconds.get(event.region, 0.0) + event.seconds),
    )
    stored = sum(path.stat().st_size for path in Path(config["cache"]).rglob("*") if path.is_file())
    return {
        "compile_s": done.seconds,
        "compile_cpu_s": h.cpu_seconds() - cpu,
        "decoder_s": seconds["vae.decoder"],
        "graphs": done.graphs,
        "artifacts": done.artifacts,
        "compiled": done.compiled,
        "artifacts_mb": done.bytes / 1e6,
        "cache_mb": stored / 1e6,
    }


def load_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Loads and binds everything that requests of these sizes run."""
    imported = time.perf_counter()
    pipe = h.demo_pipeline(config["tiny"])
    pipe.unet.forward = h.TrivialUNet()
    sizes = [h.Size(*size) for size in config["sizes"]]
    inputs = [h.unet_inputs(pipe.unet, size) for size in sizes]
    built, cpu = time.perf_counter(), h.cpu_seconds()
    cache = CompileCache(config["cache"])
    handle = ah.accelerate(pipe, hidiffusion=ah.HiDiffusionConfig(), cache=cache, on_miss="error")
    with torch.no_grad():
        for size, given in zip(sizes, inputs, strict=True):
            for step in h.topology_steps(handle.patch, size).values():
                with handle.patch.phase(step=step, num_steps=h.NUM_STEPS):
                    given.call(pipe.unet)
        # The decoders too, without decoding anything.
        handle.load([(size.height, size.width) for size in sizes], h.NUM_STEPS, batch_sizes=[h.GUIDANCE_BATCH])
    bound = time.perf_counter()
    stats = handle.stats
    if stats.compiles or stats.eager_calls or not stats.bindings:
        raise h.WrongOutput(f"expected loads only, got {stats}")
    return {
        "import_s": imported - STARTED,
        "build_s": built - imported,
        "load_s": bound - built,
        "load_cpu_s": h.cpu_seconds() - cpu,
        "loads": stats.loads,
        "bindings": stats.bindings,
    }


def main() -> None:
    if (config := h.worker_config()) is not None:
        run = {"compile": compile_worker, "load": load_worker}[config["scenario"]]
        print(json.dumps(run(config)))
        return
    parser = h.arguments(__doc__)
    parser.add_argument("--cache", type=Path, help="a filled compile cache: measures loads only")
    options = h.parsed(parser)
    sizes = h.sizes_of(options)
    report = h.Report(options.out, options.tiny)
    scenarios = (sizes,) if options.size else (sizes[:1], sizes)
    with tempfile.TemporaryDirectory() as directory:
        colds = []
        for number, chosen in enumerate(scenarios):
            place = Path(directory) / str(number)
            cache = options.cache or place / "cache"
            common = {"tiny": options.tiny, "threads": options.threads, "sizes": chosen, "cache": str(cache.resolve())}
            empty = {"TORCHINDUCTOR_CACHE_DIR": str(place / "inductor")}
            fields: dict[str, Any] = {"sizes": [str(size) for size in chosen]}
            if options.cache is None:
                cold = h.worker("benchmarks.cold_start", {"scenario": "compile", **common}, empty)
                colds.append(cold)
                fields |= h.rounded_row(cold)
                fields["decoder_share_ratio"] = h.rounded(cold["decoder_s"] / cold["compile_s"], 3)
            loads = [h.worker("benchmarks.cold_start", {"scenario": "load", **common}, empty) for _ in range(LOADS)]
            fields |= {name: h.median_of(loads, name) for name in loads[0]}
            fields["load_slowest_s"] = h.rounded(max(row["load_s"] for row in loads))
            if options.cache is None:
                fields["compile_over_load_ratio"] = h.rounded(cold["compile_s"] / fields["load_s"], 3)
                fields["compile_over_load_cpu_ratio"] = h.rounded(cold["compile_cpu_s"] / fields["load_cpu_s"], 3)
            report.add(**fields)
        if len(colds) == 2:
            one, more = colds
            report.add(
                sizes=f"{len(sizes)} over 1",
                compile_ratio=h.rounded(more["compile_s"] / one["compile_s"], 3),
                compile_cpu_ratio=h.rounded(more["compile_cpu_s"] / one["compile_cpu_s"], 3),
            )


if __name__ == "__main__":
    main()
