"""DDIM inversion and sampling as loops over levels, for any predictor: `climb` and `descend` a `Grid`. No pipeline."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor

from accel_hidiff.cfgpp import maths
from accel_hidiff.config import check_lambda, check_steps
from accel_hidiff.errors import BadInput
from accel_hidiff.schedulers import DDIMCFGPPScheduler

GUIDANCES = ("cfgpp", "cfg")
DEFAULT_SCALES = {"cfgpp": 0.6, "cfg": 7.5}

Predictor: TypeAlias = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""(sample, index of a timestep in the grid) -> (unconditional, conditional) outputs of the network, as the sample."""
Scale: TypeAlias = float | Sequence[float]


@dataclass(frozen=True)
class Grid:
    """The levels of N DDIM steps.

    Attributes:
        timesteps: N, falling; what the network is told.
        alphas: N + 1 cumulative alphas in 0..1, rising: those of the timesteps, and the one that sampling ends at.
        prediction: what the network predicts, one of `maths.PREDICTIONS`.

    Raises:
        BadInput: no step, alphas that do not fit, or an unknown prediction type.
    """

    timesteps: tuple[int, ...]
    alphas: tuple[float, ...]
    prediction: str = "epsilon"

    def __post_init__(self) -> None:
        if not self.timesteps or len(self.alphas) != len(self.timesteps) + 1:
            raise BadInput(
                f"alphas: expected one for each of at least one timestep and a last one, got {len(self.alphas)} for "
                f"{len(self.timesteps)} timesteps"
            )
        if not (self.alphas[0] >= 0 and self.alphas[-1] <= 1) or any(a > b for a, b in pairwise(self.alphas)):
            raise BadInput("alphas: expected cumulative alphas in 0..1 that rise towards the clean end")
        if self.prediction not in maths.PREDICTIONS:
            raise BadInput(
                f"prediction_type: expected one of {', '.join(maths.PREDICTIONS)}, got {self.prediction!r}; set the "
                "scheduler's prediction_type to what the UNet predicts"
            )
        if self.alphas[0] == 0 and self.prediction == "epsilon":
            raise BadInput(
                "rescale_betas_zero_snr: expected prediction_type='v_prediction' or 'sample', got 'epsilon', which "
                "says nothing about the clean sample at zero signal; set rescale_betas_zero_snr=False"
            )

    @classmethod
    def of(cls, scheduler: Any, num_inference_steps: int) -> Grid:
        """DDIM's levels for a scheduler's config: its table, spacing and offset, in float64.

        The sample is never clipped, and unless the config has `set_alpha_to_one` the last level is the table's first
        one: as latent models have it. The scheduler itself is left alone.

        Raises:
            BadInput: no table of cumulative alphas (EDM and flow schedulers), options that DDIM has no counterpart of,
                an unknown prediction type, or steps that the table does not have.
        """
        steps, config = check_steps(num_inference_steps), getattr(scheduler, "config", {})
        table = getattr(scheduler, "alphas_cumprod", None)
        if not isinstance(table, Tensor):
            raise BadInput(
                f"scheduler: expected one with cumulative alphas (DDIM, Euler, DPM++, PNDM), got "
                f"{type(scheduler).__name__}; its noise levels are not those of DDIM inversion"
            )
        prediction = config.get("prediction_type", "epsilon")
        if prediction not in maths.PREDICTIONS:
            cls((0,), (0.5, 1.0), prediction)  # refuses it
        if steps > len(table):
            raise BadInput(f"steps: expected at most the {len(table)} training steps, got {steps}")
        last_is_one = bool(config.get("set_alpha_to_one", False))
        ddim = DDIMCFGPPScheduler.from_config(config, clip_sample=False, set_alpha_to_one=last_is_one)
        alphas = ddim.alphas_cumprod.double()
        if len(alphas) != len(table) or not torch.allclose(alphas, table.cpu().double(), rtol=1e-4, atol=1e-6):
            raise BadInput(
                f"scheduler: expected noise levels that its config gives to DDIM too, got others from "
                f"{type(scheduler).__name__}; set pipe.scheduler to a DDIMScheduler with the model's betas"
            )
        ddim.set_timesteps(steps)
        timesteps = [int(t) for t in ddim.timesteps]
        if timesteps[0] >= len(alphas):
            raise BadInput(
                f"steps: expected timesteps below {len(alphas)}, got {timesteps[0]} with {steps} steps; take fewer, or "
                "another timestep_spacing or steps_offset"
            )
        levels = [float(alphas[t]) for t in timesteps]
        return cls(tuple(timesteps), (*levels, float(ddim.final_alpha_cumprod)), prediction)

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def sigmas(self) -> Tensor:
        """The N + 1 levels s / a, falling, float64 on the CPU; infinite at zero signal."""
        alphas = torch.tensor(self.alphas, dtype=torch.float64)
        return ((1 - alphas) / alphas).sqrt()


def climb(predict: Predictor, x: Tensor, grid: Grid, scale: Scale, guidance: str = "cfgpp") -> Tensor:
    """DDIM inversion: from the grid's clean end to its noisy end.

    A step ends at the level of a timestep, and the network is asked with that timestep at the sample before the step.

    Args:
        predict: the network; asked once a step, with steps from the last to the first.
        x: the clean sample in the VP state, any shape, floating point.
        grid: the levels.
        scale: lambda in 0..1, or the CFG weight; one number, or one for each timestep of the grid.
        guidance: "cfgpp" (Algorithm 2 backwards) or "cfg" (Algorithm 1 backwards).

    Returns:
        The inverted sample, of x's shape, in float32 or float64.

    Raises:
        BadInput: scale or guidance is not what it should be.
    """
    x, scales = upcast(x), _scales(scale, guidance, len(grid))
    for step in reversed(range(len(grid))):
        here, there = maths.level(grid.alphas[step + 1]), maths.level(grid.alphas[step])
        guided, uncond = _guided(predict, x, step, scales[step])
        noise, noise_uncond = (maths.eps_of(grid.prediction, output, x, *there) for output in (guided, uncond))
        x = maths.ddim_cfgpp_inversion(x, noise, noise_uncond if guidance == "cfgpp" else noise, *here, *there)
    return x


def descend(predict: Predictor, x: Tensor, grid: Grid, scale: Scale, guidance: str = "cfgpp") -> Tensor:
    """DDIM sampling: from the grid's noisy end to its clean end; arguments, result and errors as for `climb`.

    The steps are those of `DDIMCFGPPScheduler.step`, for "cfg" with uncond_output=guided.
    """
    x, scales = upcast(x), _scales(scale, guidance, len(grid))
    for step in range(len(grid)):
        here, there = maths.level(grid.alphas[step]), maths.level(grid.alphas[step + 1])
        guided, uncond = _guided(predict, x, step, scales[step])
        clean = maths.x0_of(grid.prediction, guided, x, *here)
        noise = maths.eps_of(grid.prediction, uncond if guidance == "cfgpp" else guided, x, *here)
        x = maths.ddim_cfgpp(clean, noise, *there)
    return x


def _guided(predict: Predictor, x: Tensor, step: int, scale: float) -> tuple[Tensor, Tensor]:
    uncond, cond = predict(x, step)
    return maths.guided(uncond, cond, scale), uncond


def upcast(x: Tensor) -> Tensor:
    """A sample in float32, or in float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_guidance(guidance: object) -> str:
    """One of `GUIDANCES`; BadInput otherwise."""
    if not isinstance(guidance, str) or guidance not in GUIDANCES:
        raise BadInput(
            f"guidance: expected one of {', '.join(GUIDANCES)}, got {guidance!r}; to go without guidance pass scale=0, "
            "which is unconditional, or guidance='cfg' with scale=1"
        )
    return guidance


def _scales(scale: Scale, guidance: object, steps: int) -> list[float]:
    guidance = check_guidance(guidance)
    each = list(scale) if isinstance(scale, Sequence) and not isinstance(scale, str) else [scale] * steps
    if len(each) != steps:
        raise BadInput(f"scale: expected a number, or one for each of {steps} steps, got {len(each)}")
    return [check_scale(one, guidance) for one in each]


def check_scale(scale: object, guidance: str) -> float:
    """A lambda in 0..1, or a CFG weight of at least 0, by the guidance; BadInput otherwise."""
    if guidance == "cfgpp":
        return check_lambda(scale)
    number = isinstance(scale, int | float) and not isinstance(scale, bool)
    if not number or not 0 <= scale < math.inf:  # type: ignore[operator]
        raise BadInput(f"scale: expected a CFG weight of at least 0, got {scale!r}; 1 is the conditional model alone")
    return float(scale)  # type: ignore[arg-type]
