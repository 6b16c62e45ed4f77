"""Error of an inversion round trip, CFG++ against CFG at matched strengths (a claim of arXiv 2406.08070).

Up DDIM's levels and down again with the same prompt, guidance and levels; the error is the RMSE of the latents over
their standard deviation. Contestants at each lambda: `cfgpp`; `cfg_mean`, CFG with one weight, the mean over the steps
of the weight that CFG++ is equivalent to (`maths.equivalent_cfg_scale`); `cfg_12.5`, CFG with w = 12.5 lambda, the
authors' mapping. CFG with the equivalent weight of each step is CFG++ itself, both ways: that is verified first.

Predictors: `closed_form`, of `tests/data/golden_cfgpp`; `mixture`, the exact noise of data with two modes, of which the
prompt names one and the image is a draw; `tiny_sdxl` and `tiny_sdxl_hidiffusion`, the UNet of the tiny demo pipeline
through `invert`, which has random weights and is no denoiser.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import accel_hidiff as ah
from accel_hidiff.cfgpp import maths
from accel_hidiff.cfgpp.climbing import Grid, Predictor, climb, descend
from accel_hidiff.cfgpp.inversion import invert, reconstruction_error
from benchmarks import harness as h

STEPS = (10, 30, 50)
LAMBDAS = (0.2, 0.4, 0.6, 0.8, 1.0)
SHAPE = (1, 4, 6, 4)
MODE, SPREAD = 0.3, 0.5  # of each of the mixture's 96 numbers: distance of a mode from 0, deviation around it
PIPELINE_SIZE = h.Size(128, 64)
RoundTrip = Callable[[Tensor, Any, str], Tensor]  # (latents, scale, guidance) -> the latents again


def normal(seed: int, *shape: int) -> Tensor:
    """Unit normal, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def closed_form(grid: Grid) -> Predictor:
    """The predictor of the reference trajectories."""

    def predict(x: Tensor, step: int) -> tuple[Tensor, Tensor]:
        t = grid.timesteps[step]
        uncond = torch.tanh(0.7 * x + 0.3 * math.sin(t / 100))
        return uncond, uncond + 0.25 * torch.cos(1.3 * x + t / 250)

    return predict


def modes() -> Tensor:
    """(2, *SHAPE[1:]): the means of the mixture."""
    mean = MODE * normal(1_000_000, *SHAPE[1:]).sign()
    return torch.stack([mean, -mean])


def mixture(grid: Grid) -> Predictor:
    """E[eps | x] of the mixture, and of its first mode alone."""
    means = modes()

    def predict(x: Tensor, step: int) -> tuple[Tensor, Tensor]:
        a, s = maths.level(grid.alphas[step])
        variance = a * a * SPREAD * SPREAD + s * s
        noises = s * (x - a * means) / variance
        distance = (x - a * means).square().flatten(1).sum(1) / (2 * variance)
        weights = torch.softmax(-distance, 0).view(2, 1, 1, 1)
        return (weights * noises).sum(0, keepdim=True), noises[:1]

    return predict


def by_loop(predictor: Callable[[Grid], Predictor], grid: Grid) -> RoundTrip:
    """A round trip through the loops alone, float64."""
    predict = predictor(grid)

    def run(latents: Tensor, scale: Any, guidance: str) -> Tensor:
        return descend(predict, climb(predict, latents, grid, scale, guidance), grid, scale, guidance)

    return run


def by_pipeline(pipe: Any, grid: Grid) -> RoundTrip:
    """A round trip through `invert`, float32."""

    def run(latents: Tensor, scale: Any, guidance: str) -> Tensor:
        options = {"guidance": guidance, "scale": scale, "num_inference_steps": len(grid)}
        return invert(pipe, latents.float(), "a red circle", **options).reconstruct().latents

    return run


def picture_latents(pipe: Any, seed: int) -> Tensor:
    """Latents of a picture of soft blobs, brought to unit variance: an untrained VAE's are of any."""
    coarse = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    picture = torch.nn.functional.interpolate(coarse, PIPELINE_SIZE[::-1], mode="bilinear")
    clean = invert(pipe, picture, "a red circle", num_inference_steps=1).clean
    return (clean - clean.mean()) / clean.std()


def verify(name: str, run: RoundTrip, grid: Grid, latents: Tensor) -> None:
    """CFG++ is CFG with the equivalent weight of each step, up and down."""
    weights = maths.equivalent_cfg_scale(0.6, grid.sigmas).tolist()
    h.verify(name, run(latents, weights, "cfg"), run(latents, 0.6, "cfgpp"), 1e-9)


def compare(run: RoundTrip, grid: Grid, lam: float, samples: Sequence[Tensor]) -> dict[str, float | int]:
    """Record fields: mean and standard deviation over the samples of the errors, and of CFG's over CFG++'s."""
    mean_weight = float(maths.equivalent_cfg_scale(lam, grid.sigmas).mean())
    contestants = {"cfgpp": (lam, "cfgpp"), "cfg_mean": (mean_weight, "cfg"), "cfg_12.5": (12.5 * lam, "cfg")}
    errors = {
        name: [reconstruction_error(run(x, *guidance), x).rmse / float(x.std()) for x in samples]
        for name, guidance in contestants.items()
    }
    fields: dict[str, float | int] = {"mean_weight": mean_weight, "samples": len(samples)}
    for name, values in errors.items():
        fields |= {f"{name}_rmse": statistics.fmean(values), f"{name}_rmse_std": statistics.stdev(values)}
    for name in ("cfg_mean", "cfg_12.5"):
        ratios = [cfg / cfgpp for cfg, cfgpp in zip(errors[name], errors["cfgpp"], strict=True)]
        fields |= {f"{name}_over_cfgpp_ratio": statistics.fmean(ratios)}
        fields |= {f"{name}_over_cfgpp_ratio_std": statistics.stdev(ratios)}
        fields |= {f"{name}_worse": sum(ratio > 1 for ratio in ratios)}
    return fields


def main() -> None:
    parser = h.arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=32, help="samples of each closed-form predictor, at least 2")
    parser.add_argument("--pictures", type=int, default=4, help="samples through the pipeline, at least 2")
    options = h.parsed(parser)
    seeds, pictures = (2, 2) if options.tiny else (options.seeds, options.pictures)
    steps, lambdas = ((5,), (0.6,)) if options.tiny else (STEPS, LAMBDAS)
    report = h.Report(options.out, options.tiny)
    plain, patched = h.demo_pipeline(True), h.demo_pipeline(True)
    ah.apply_hidiffusion(patched)
    unit = [normal(seed, *SHAPE) for seed in range(seeds)]
    drawn = [modes()[:1] + SPREAD * sample for sample in unit]
    images = [picture_latents(plain, seed) for seed in range(pictures)]
    predictors: dict[str, tuple[Callable[[Grid], RoundTrip], Sequence[Tensor]]] = {
        "closed_form": (partial(by_loop, closed_form), unit),
        "mixture": (partial(by_loop, mixture), drawn),
        "tiny_sdxl": (partial(by_pipeline, plain), images),
        "tiny_sdxl_hidiffusion": (partial(by_pipeline, patched), images),
    }
    for name, (make, samples) in predictors.items():
        for count in steps:
            grid = Grid.of(plain.scheduler, count)
            run = make(grid)
            if not name.startswith("tiny"):
                verify(name, run, grid, samples[0])
            for lam in lambdas:
                fields = compare(run, grid, lam, samples)
                report.add(predictor=name, steps=count, lam=lam, **h.rounded_row(fields))


if __name__ == "__main__":
    main()
