"""One UNet call, eager patched against compiled regions, per topology and size; batch 2 as with guidance.

Contestants sit on pipelines of their own, which share nothing but the values of their weights: `eager` is
`apply_hidiffusion` alone, with no region layer in it; `compiled` is `accelerate(regions="blocks", shapes="symbolic")`
under `on_miss="error"` once its graphs are there, so that no call can fall back to eager unseen. `--exact` adds
`shapes="exact"` at the first size. Outputs are compared before anything is timed.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

import accel_hidiff as ah
from benchmarks import harness as h
from compile_cache import CompileCache


def compiled_handle(pipe: Any, cache: Path, sizes: tuple[h.Size, ...], shapes: str, report: h.Report) -> ah.Handle:
    """Setup: fills the cache, then serves from it strictly."""
    options: dict[str, Any] = {"hidiffusion": ah.HiDiffusionConfig(), "cache": CompileCache(cache), "shapes": shapes}
    filled = ah.accelerate(pipe, **options).precompile(
        [(size.height, size.width) for size in sizes], h.NUM_STEPS, batch_sizes=(h.GUIDANCE_BATCH,)
    )
    report.add(
        setup=shapes, artifacts=filled.artifacts, compiled=filled.compiled, found=filled.found,
        setup_s=h.rounded(filled.seconds), artifacts_mb=h.rounded(filled.bytes / 1e6),
    )  # fmt: skip
    return ah.accelerate(pipe, on_miss="error", **options)


def main() -> None:
    parser = h.arguments(__doc__)
    parser.add_argument("--cache", type=Path, help="compile cache to use and fill; default: a temporary one")
    parser.add_argument("--exact", action="store_true", help='also shapes="exact", at the first size')
    options = h.parsed(parser)
    sizes = h.sizes_of(options)
    report = h.Report(options.out, options.tiny)
    with ExitStack() as stack, torch.no_grad():
        cache = options.cache or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        eager = ah.apply_hidiffusion(h.demo_pipeline(options.tiny))
        handles = {"compiled": compiled_handle(h.demo_pipeline(options.tiny), cache, sizes, "symbolic", report)}
        if options.exact:
            handles["exact"] = compiled_handle(h.demo_pipeline(options.tiny), cache, sizes[:1], "exact", report)
        for size in sizes:
            inputs = h.unet_inputs(eager.unet, size)
            for topology, step in h.topology_steps(eager, size).items():
                runs: dict[str, h.StepCall] = {"eager": h.StepCall(eager, inputs, step, h.NUM_STEPS)}
                for name, handle in handles.items():
                    if name == "compiled" or size == sizes[0]:
                        runs[name] = h.StepCall(handle.patch, inputs, step, h.NUM_STEPS)
                want = runs["eager"]()
                errors = {f"{name}_error": h.verify(name, run(), want) for name, run in runs.items() if name != "eager"}
                times = h.interleave(runs, options.repeats)
                fields: dict[str, Any] = {"size": str(size), "topology": str(topology), "batch": h.GUIDANCE_BATCH}
                for name, timing in times.items():
                    fields |= timing.fields(name)
                for name in errors:
                    contestant = name.removesuffix("_error")
                    fields |= times[contestant].ratios(f"{contestant}_over_eager", times["eager"])
                report.add(**fields, **{name: h.rounded(error, 2) for name, error in errors.items()})
        for name, handle in handles.items():
            report.add(entrance=name, **h.entrance(handle, options.repeats).fields("entrance"))
            if handle.stats.eager_calls or handle.stats.compiles:
                raise h.WrongOutput(f"{name}: expected compiled calls only, got {handle.stats}")


if __name__ == "__main__":
    main()
