"""CFG++ as pure functions, in the notation of the paper (Chung et al., arXiv 2406.08070). No state, no diffusers.

Guidance lambda in 0..1 moves the clean estimate; what renoises it is the *unconditional* noise (the paper's Algorithm
2; its Algorithm 1 is DDIM with CFG, which renoises with the guided noise). Everything else follows from that.

Symbols. A noise level is (a, s) = (sqrt(abar), sqrt(1 - abar)), with abar a cumulative alpha in 0..1 and a² + s² = 1,
in the variance-preserving (VP) state x = a x0 + s eps. In the variance-exploding (VE, "sigma space") state x / a it
is sigma = s / a. `_next` is the level after the step, `_lambda` a guided prediction, `_uncond` the unconditional
one. D and U are the clean estimates of the guided and of the unconditional prediction.

Samples and predictions are floating-point tensors of one shape and dtype, which the result keeps, or all floats. Levels
are floats (0-d tensors work as well, and bring their own precision).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from accel_hidiff.config import check_lambda
from accel_hidiff.errors import BadInput

Value: TypeAlias = Any  # a tensor, or a float
Level: TypeAlias = Any  # a float, or a 0-d tensor
Denoiser: TypeAlias = Callable[[Value, Level], tuple[Value, Value]]  # (x, sigma) -> (D, U)

PREDICTIONS = ("epsilon", "v_prediction", "sample")


# --- guidance ---------------------------------------------------------------------------------------------------------


def guided(eps_uncond: Value, eps_cond: Value, lam: Level) -> Value:
    """The guided prediction e_lambda = e_uncond + lambda (e_cond - e_uncond).

    The same line guides v and x0 predictions: both are linear in the noise at a given sample. Algorithms 1 and 2 share
    it; CFG writes w for lambda.

    >>> guided(1.0, 3.0, 0.5)
    2.0
    """
    return eps_uncond + lam * (eps_cond - eps_uncond)


def equivalent_cfg_scale(lam: float, sigmas: Sequence[float] | Tensor) -> Tensor:
    """The CFG weight of each step at which DDIM (or Euler) with CFG takes the same step as with CFG++.

    In sigma space CFG moves x by (sigma_next - sigma)(e_u + w g), CFG++ by (sigma_next - sigma) e_u - sigma lambda g,
    with g = e_cond - e_uncond; so w = lambda sigma / (sigma - sigma_next). It grows with the number of steps, is lambda
    itself where a step ends at 0, and is the same at every sample.

    Args:
        lam: 0..1.
        sigmas: N + 1 levels s / a, strictly falling, the last one >= 0.

    Returns:
        float64 of shape (N,), on the CPU.

    >>> equivalent_cfg_scale(0.6, [10.0, 5.0, 4.0, 0.0])
    tensor([1.2000, 3.0000, 0.6000], dtype=torch.float64)

    Raises:
        BadInput: lambda outside of 0..1, fewer than two levels, or levels that do not fall.
    """
    lam = check_lambda(lam)
    levels = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu")
    if levels.ndim != 1 or len(levels) < 2:
        raise BadInput(f"sigmas: expected at least two levels in one row, got shape {tuple(levels.shape)}")
    sigma, sigma_next = levels[:-1], levels[1:]
    if not bool((sigma > sigma_next).all()) or not levels[-1] >= 0:
        raise BadInput("sigmas: expected levels that fall strictly to one >= 0; pass scheduler.sigmas of one request")
    return lam * sigma / (sigma - sigma_next)


# --- levels and predictions -------------------------------------------------------------------------------------------


def level(alpha_cumprod: Level) -> tuple[Level, Level]:
    """(a, s) of a cumulative alpha."""
    return alpha_cumprod**0.5, (1 - alpha_cumprod) ** 0.5


def level_of_sigma(sigma: Level) -> tuple[Level, Level]:
    """(a, s) of a sigma: the inverse of sigma = s / a.

    >>> a, s = level_of_sigma(0.75)
    >>> round(a, 12), round(s, 12)
    (0.8, 0.6)
    """
    a = (sigma * sigma + 1) ** -0.5
    return a, sigma * a


def to_ve(x: Value, a: Level) -> Value:
    """VP state to VE state; a != 0."""
    return x / a


def to_vp(x: Value, a: Level) -> Value:
    """VE state to VP state, which is also what the network is given."""
    return x * a


def x0_of_eps(x: Value, eps: Value, a: Level, s: Level) -> Value:
    """Tweedie's clean estimate x0 = (x - s eps) / a (first line of a step of Algorithms 1 and 2); a != 0."""
    return (x - s * eps) / a


def _unknown(prediction: str) -> BadInput:
    return BadInput(f"prediction_type: expected one of {', '.join(PREDICTIONS)}, got {prediction!r}")


def x0_of(prediction: str, output: Value, x: Value, a: Level, s: Level) -> Value:
    """The clean estimate of a network output, VP.

    Args:
        prediction: one of `PREDICTIONS`: epsilon; v_prediction, v = a eps - s x0 (Salimans and Ho, arXiv 2202.00512);
            sample, x0 itself.
        output: what the network (or the guidance) gave for x.
        x: the VP sample at level (a, s).

    Raises:
        BadInput: an unknown prediction type.
    """
    if prediction == "epsilon":
        return x0_of_eps(x, output, a, s)
    if prediction == "v_prediction":
        return a * x - s * output
    if prediction == "sample":
        return output
    raise _unknown(prediction)


def eps_of(prediction: str, output: Value, x: Value, a: Level, s: Level) -> Value:
    """The noise of a network output, VP; arguments as for `x0_of`. A sample prediction needs s != 0."""
    if prediction == "epsilon":
        return output
    if prediction == "v_prediction":
        return s * x + a * output
    if prediction == "sample":
        return (x - a * output) / s
    raise _unknown(prediction)


def output_of(prediction: str, x0: Value, eps: Value, a: Level, s: Level) -> Value:
    """What a network of a prediction type would have said: the inverse of `x0_of` and `eps_of`.

    >>> output_of("v_prediction", 2.0, 1.0, 0.8, 0.6)
    -0.3999999999999999
    """
    if prediction == "epsilon":
        return eps
    if prediction == "v_prediction":
        return a * eps - s * x0
    if prediction == "sample":
        return x0
    raise _unknown(prediction)


def x0_of_ve(prediction: str, output: Value, x: Value, sigma: Level) -> Value:
    """The clean estimate of a network output for a VE sample x; the network was given x / sqrt(1 + sigma²)."""
    if prediction == "epsilon":
        return x - sigma * output
    a, s = level_of_sigma(sigma)
    return x0_of(prediction, output, a * x, a, s)


# --- DDIM, VP ---------------------------------------------------------------------------------------------------------


def ddim_std(alpha: Level, alpha_next: Level, eta: float) -> Level:
    """Deviation of the noise of a DDIM step, for cumulative alphas (Song et al., arXiv 2010.02502, equation 16)."""
    return eta * ((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next)) ** 0.5


def ddim_cfgpp(
    x0_lambda: Value, eps_uncond: Value, a_next: Level, s_next: Level, std: Level = 0.0, noise: Value = 0.0
) -> Value:
    """A DDIM step with CFG++ (Algorithm 2): x_next = a_next x0_lambda + sqrt(s_next² - std²) eps_uncond + std noise.

    DDIM with CFG (Algorithm 1) is the same with eps_lambda in place of eps_uncond. The paper has std = 0; with eta > 0
    (`ddim_std`) it is the step of the A1111 sampler `ddim_cfgpp`.
    """
    direction = s_next if std == 0 else (s_next * s_next - std * std) ** 0.5
    return a_next * x0_lambda + direction * eps_uncond + std * noise


def ddim_cfgpp_inversion(
    x: Value, eps_lambda: Value, eps_uncond: Value, a: Level, s: Level, a_next: Level, s_next: Level
) -> Value:
    """A DDIM inversion step with CFG++, from (a, s) up to the noisier (a_next, s_next).

    The mirror of `ddim_cfgpp`: x0 = (x - s eps_uncond) / a, x_next = a_next x0 + s_next eps_lambda. It undoes the step
    exactly if both predictions are those of the noisier sample; inversion takes them at x and the noisier timestep
    instead. DDIM inversion with CFG is the same with eps_lambda in place of eps_uncond.
    """
    return a_next * x0_of_eps(x, eps_uncond, a, s) + s_next * eps_lambda


# --- Euler, Euler ancestral and DPM++ 2M, VE --------------------------------------------------------------------------


def euler_cfgpp(x: Value, D: Value, U: Value, sigma: Level, sigma_next: Level) -> Value:
    """An Euler step with CFG++: x_next = D + sigma_next (x - U) / sigma. DDIM with CFG++ after the change of variables.

    Euler with CFG is the same with D in place of U.
    """
    return D + sigma_next / sigma * (x - U)


def ancestral(sigma: Level, sigma_next: Level) -> tuple[Level, Level]:
    """(up, down) of an ancestral step at full noise: up² + down² = sigma_next², down = sigma_next² / sigma.

    >>> ancestral(4.0, 2.0)
    (1.73205080756887..., 1.0)
    """
    ratio = sigma_next / sigma
    return sigma_next * (1 - ratio * ratio) ** 0.5, sigma_next * ratio


def euler_ancestral_cfgpp(x: Value, D: Value, U: Value, sigma: Level, sigma_next: Level, noise: Value) -> Value:
    """An ancestral Euler step with CFG++: Euler down to `down`, then noise of deviation `up` (see `ancestral`)."""
    up, down = ancestral(sigma, sigma_next)
    return euler_cfgpp(x, D, U, sigma, down) + up * noise


def dpmpp_2m_cfgpp(
    x: Value,
    D: Value,
    U: Value,
    U_prev: Value | None,
    sigma_prev: Level | None,
    sigma: Level,
    sigma_next: Level,
    difference: str = "guided",
) -> Value:
    """A DPM-Solver++(2M) step (Lu et al., arXiv 2211.01095; midpoint) with CFG++.

    x_next = D + r (x - U) + (1 - r) E / (2 q) with r = sigma_next / sigma and
    q = ln(sigma_prev / sigma) / ln(sigma / sigma_next).

    Args:
        U_prev, sigma_prev: the step before; None at the first one, which then is an Euler step (E = 0), as is one that
            ends at sigma_next = 0.
        difference: "guided", E = D - U_prev, as in the authors' SD code and in ComfyUI; "uncond", E = U - U_prev, as in
            the authors' SDXL code. They differ by the guidance that the extrapolation adds, and agree at lambda = 0.

    Raises:
        BadInput: another `difference`.
    """
    if difference not in ("guided", "uncond"):
        raise BadInput(f"difference: expected 'guided' or 'uncond', got {difference!r}")
    first_order = euler_cfgpp(x, D, U, sigma, sigma_next)
    if U_prev is None or sigma_prev is None or sigma_next == 0:
        return first_order
    q = _log(sigma_prev / sigma) / _log(sigma / sigma_next)
    E = (D if difference == "guided" else U) - U_prev
    return first_order + (1 - sigma_next / sigma) / (2 * q) * E


def _log(value: Level) -> Level:
    return value.log() if isinstance(value, Tensor) else math.log(value)


def dpmpp_2s_ancestral_cfgpp(
    x: Value, denoise: Denoiser, sigma: Level, sigma_next: Level, noise: Value, form: str = "authors"
) -> tuple[Value, Value]:
    """A DPM-Solver++(2S) ancestral step with CFG++, which calls the network twice (once where it ends at 0).

    No scheduler uses it: diffusers' schedulers call the network once per step.

    Args:
        denoise: (x, sigma) -> (D, U), x in VE.
        form: "authors": the authors' SD code; "comfy": ComfyUI at commit 850e8b42, whose last line takes U of the
            second call (a later release changed it).

    Returns:
        (x_next, D of the first call).

    Raises:
        BadInput: another `form`.
    """
    if form not in ("authors", "comfy"):
        raise BadInput(f"form: expected 'authors' or 'comfy', got {form!r}")
    up, down = ancestral(sigma, sigma_next)
    D, U = denoise(x, sigma)
    if down == 0:
        return D, D
    middle = (sigma * down) ** 0.5
    m, r = middle / sigma, down / sigma
    if form == "authors":
        D2, U2 = denoise(m * x + (1 - m) * U, middle)
        return D2 + r * (x - U2) + up * noise, D
    D2, U2 = denoise(m * (x + D - U) + (1 - m) * D, middle)
    return r * (x + D - U2) + (1 - r) * D2 + up * noise, D


# --- a step as a linear form ------------------------------------------------------------------------------------------

COLUMNS = ("x", "guided", "uncond", "history", "noise", "history_x", "history_uncond", "scale")


def step_by_coefficients(
    row: Tensor, x: Tensor, guided: Tensor, uncond: Tensor, history: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """One step of any sampler of `accel_hidiff.schedulers` from its row of coefficients.

    x_next = c_x x + c_guided guided + c_uncond uncond + c_history history + c_noise noise, and
    history_next = c_history_x x + c_history_uncond uncond.

    Args:
        row: (8,), the columns `COLUMNS`, in the dtype and on the device of the samples. `scale` is not used here: it is
            what x is multiplied by before the network sees it, at the start of this step.
        x: the sample in the scheduler's own state, float32 or float64 (upcast half precision first).
        guided, uncond: predictions in the model's own prediction type.
        history: zeros at the first step; then what the step before returned.
        noise: unit normal; anything finite where the sampler adds none.

    Returns:
        (x_next, history_next).
    """
    x_next = row[0] * x + row[1] * guided + row[2] * uncond + row[3] * history + row[4] * noise
    return x_next, row[5] * x + row[6] * uncond
