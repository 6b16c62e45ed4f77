"""Schedulers with CFG++ (arXiv 2406.08070), built on diffusers': `step` also takes the unconditional prediction.

    scheduler = EulerCFGPPScheduler.from_config(pipe.scheduler.config)
    guided = uncond + lam * (cond - uncond)          # lam in 0..1
    sample = scheduler.step(guided, t, sample, uncond_output=uncond).prev_sample

Configuration, timesteps, noise levels, `add_noise`, `scale_model_input`, saving and loading are diffusers' own; the
formulas are in `accel_hidiff.cfgpp.maths`. With uncond_output=guided a step is that of plain CFG.

Arithmetic: float32 (float64 for float64 samples) with levels taken in float64 from the float32 table; the result has
the sample's dtype. Where these schedulers deliberately deviate from diffusers or from the authors' code:

- The level at timestep t is abar[t], and the last step ends at diffusers' final level; the authors' table is shifted by
  one, and their last step wraps to the noisy end.
- DDIM steps to the level of the next timestep of its grid, for every spacing and number of steps. diffusers steps to
  t - T // N, which is another level where N does not divide T (trailing) or with linspace spacing.
- Trailing spacing gives N timesteps. diffusers' gives N + 1 for some N that do not divide T (30 of Kolors' 1100), the
  last one -1, which reads the noisy end of the table.
- `sigmas` stays float32, as in diffusers; `step`, `scale_model_input` and `coefficients` use those levels in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from diffusers.schedulers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
)
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from accel_hidiff.cfgpp import maths
from accel_hidiff.cfgpp.prediction import GuidedPrediction
from accel_hidiff.errors import BadInput

__all__ = [
    "DDIMCFGPPScheduler",
    "DPMSolverMultistepCFGPPScheduler",
    "EulerAncestralCFGPPScheduler",
    "EulerCFGPPScheduler",
    "counterpart",
]

_Options = Mapping[str, tuple[object, ...]]


class _Stepped(NamedTuple):
    """What an update gives: the next sample, the guided clean estimate, and what the next step needs of this one."""

    x_next: Any
    x0: Any
    history: Any = 0.0


class _CFGPlusPlus:
    """What the four schedulers share: checks, dtypes, and the step as a linear form."""

    accepted: ClassVar[_Options] = {"prediction_type": maths.PREDICTIONS}  # option -> the values CFG++ is defined for

    # Attributes of the diffusers scheduler that is the other base.
    config: Any
    timesteps: Tensor
    num_inference_steps: int | None

    def register_to_config(self, **options: Any) -> None:
        """Called by every diffusers constructor, first of all, with all of its options."""
        for name, values in self.accepted.items():
            if name in options and options[name] not in values:
                raise BadInput(
                    f"{type(self).__name__}: {name}: expected {' or '.join(map(repr, values))}, got {options[name]!r}; "
                    f"CFG++ does not define it, pass {name}={values[0]!r} (to from_config as well)"
                )
        super().register_to_config(**options)  # type: ignore[misc]

    def coefficients(self) -> Tensor:
        """The steps as linear forms: what a compiled step takes as tensors instead of branching on the sampler.

        `maths.step_by_coefficients` says what a row means; it equals `step`. Call it after `set_timesteps`.

        Returns:
            float64 on the CPU, (N, 8), columns `maths.COLUMNS`, one row for each of `timesteps`.
        """
        raise NotImplementedError

    def coefficients_for(self, eta: float = 0.0) -> Tensor:
        """`coefficients` of a request that passes this `eta` to every step; BadInput where the sampler has none."""
        self._refuse(eta=eta)
        return self.coefficients()

    def draw_noise(self, like: Tensor, options: Mapping[str, Any]) -> Tensor | None:
        """The noise that `step` would draw with these options (`generator`, `variance_noise`, `eta`); None: none."""
        return None

    def advance_to(self, index: int) -> None:
        """The next step is that of `timesteps[index]`: for whoever takes steps by their coefficients."""

    def _rows(self, links: list[tuple[Any, ...]], scales: list[float]) -> Tensor:
        """Coefficients of `_update`, read off at the unit vectors: no second copy of a formula."""
        rows = []
        for link, scale in zip(links, scales, strict=True):
            steps = [self._update(link, *[float(i == j) for j in range(5)]) for i in range(5)]
            rows.append([*(step.x_next for step in steps), steps[0].history, steps[2].history, scale])
        return torch.tensor(rows, dtype=torch.float64)

    def _update(self, link: Any, x: Any, guided: Any, uncond: Any, history: Any, noise: Any) -> _Stepped:
        """The step itself, linear in the five values (tensors, or floats); `link` holds its levels."""
        raise NotImplementedError

    def _check_ready(self) -> None:
        if self.num_inference_steps is None:
            raise BadInput(f"{type(self).__name__}: expected set_timesteps before this call, got none; call it first")

    def _inputs(self, guided: Any, uncond: Any, sample: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The three tensors of a step, checked and upcast; a guider's prediction brings the unconditional one along."""
        if isinstance(guided, GuidedPrediction) and uncond is None:
            guided, uncond = guided.take_apart()
        if uncond is None:
            raise BadInput(
                f"{type(self).__name__}.step: expected uncond_output=, the unconditional prediction, got None; "
                "pass it next to the guided model_output (guidance must be on), or use the plain scheduler"
            )
        for name, value in (("model_output", guided), ("uncond_output", uncond)):
            if not isinstance(value, Tensor) or value.shape != sample.shape:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise BadInput(
                    f"{type(self).__name__}.step: {name}: expected the sample's shape {tuple(sample.shape)}, "
                    f"got {got}; pass the guided and the unconditional half separately"
                )
        self._check_ready()
        dtype = torch.promote_types(sample.dtype, torch.float32)
        return sample.to(dtype), guided.to(dtype), uncond.to(dtype)

    def _refuse(self, **options: float) -> None:
        """BadInput for step options that the sampler does not define; 0 means not given."""
        for name, value in options.items():
            if value != 0:
                raise BadInput(
                    f"{type(self).__name__}.step: {name}: expected 0, got {value!r}; CFG++ does not define it for this "
                    "sampler" + ("; use DDIMCFGPPScheduler for eta" if name == "eta" else "")
                )


def _noise(given: Tensor | None, generator: Any, like: Tensor) -> Tensor:
    """Unit normal noise, drawn in the model's dtype as diffusers draws it, then upcast as the sample is."""
    if given is not None and generator is not None:
        raise BadInput("step: expected generator or variance_noise, got both; pass one of them")
    if given is None:
        given = randn_tensor(like.shape, generator=generator, device=like.device, dtype=like.dtype)
    return given.to(torch.promote_types(like.dtype, torch.float32))


class DDIMCFGPPScheduler(_CFGPlusPlus, DDIMScheduler):
    """DDIM with CFG++: Algorithm 2 of the paper; `eta` > 0 as in the A1111 sampler `ddim_cfgpp`.

    VP state. `thresholding` is refused. `clip_sample` (on by default in diffusers, off in latent models) clips the
    guided clean estimate; such a step is not linear, so it has no `coefficients`.
    """

    accepted: ClassVar[_Options] = {**_CFGPlusPlus.accepted, "thresholding": (False,)}

    _table: list[float]

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """As in diffusers; trailing spacing gives exactly `num_inference_steps` timesteps."""
        super().set_timesteps(num_inference_steps, device)
        self.timesteps = self.timesteps[:num_inference_steps]
        self._table = self.alphas_cumprod.cpu().double().tolist()

    def _link(self, timestep: int, eta: float) -> tuple[float, ...]:
        """(a, s, a_next, s_next, std) of the step from a timestep to the next one of the grid."""
        if not 0 <= timestep < len(self._table):
            raise BadInput(f"timestep: expected 0..{len(self._table) - 1}, got {timestep}; pass one of timesteps")
        if not 0 <= eta <= 1:
            raise BadInput(f"eta: expected a number in 0..1, got {eta!r}; 0 is deterministic")
        later = (self.timesteps == timestep).nonzero().flatten()
        if len(later):
            index = int(later[-1]) + 1
            following = int(self.timesteps[index]) if index < len(self.timesteps) else -1
        else:  # not of the grid: diffusers' rule
            following = timestep - self.config.num_train_timesteps // self.num_inference_steps
        alpha = self._table[timestep]
        alpha_next = self._table[following] if following >= 0 else float(self.final_alpha_cumprod)
        if alpha == 0 and self.config.prediction_type == "epsilon":
            raise BadInput(
                "rescale_betas_zero_snr: expected prediction_type='v_prediction' or 'sample', got 'epsilon', "
                "which says nothing about the clean sample at zero signal; set rescale_betas_zero_snr=False"
            )
        std = maths.ddim_std(alpha, alpha_next, eta) if eta else 0.0
        return (*maths.level(alpha), *maths.level(alpha_next), std)

    def _update(self, link: Any, x: Any, guided: Any, uncond: Any, history: Any, noise: Any) -> _Stepped:
        a, s, a_next, s_next, std = link
        x0 = maths.x0_of(self.config.prediction_type, guided, x, a, s)
        if self.config.clip_sample:
            x0 = x0.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        eps_uncond = maths.eps_of(self.config.prediction_type, uncond, x, a, s)
        return _Stepped(maths.ddim_cfgpp(x0, eps_uncond, a_next, s_next, std, noise), x0)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        *,
        uncond_output: Tensor | None = None,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """One step down.

        Args:
            model_output: guided prediction, in the model's own prediction type and the sample's shape.
            timestep: one of `timesteps`.
            sample: the current sample, any floating dtype, any shape.
            uncond_output: unconditional prediction, of the same type and shape; required.
            eta: 0 (deterministic) to 1; `generator` or `variance_noise` brings the noise.
            use_clipped_model_output: refused: the unconditional noise is never derived from a guided estimate.

        Returns:
            The next sample and the guided clean estimate, in the sample's dtype.

        Raises:
            BadInput: no `uncond_output`, shapes that differ, an option that is not defined, no `set_timesteps` before.
        """
        x, guided, uncond = self._inputs(model_output, uncond_output, sample)
        self._refuse(use_clipped_model_output=use_clipped_model_output)
        link = self._link(int(timestep), eta)
        noise = _noise(variance_noise, generator, model_output) if eta else 0.0
        done = self._update(link, x, guided, uncond, 0.0, noise)
        found = done.x_next.to(sample.dtype), done.x0.to(sample.dtype)
        return DDIMSchedulerOutput(*found) if return_dict else found

    def draw_noise(self, like: Tensor, options: Mapping[str, Any]) -> Tensor | None:
        if not options.get("eta"):
            return None
        return _noise(options.get("variance_noise"), options.get("generator"), like)

    def coefficients_for(self, eta: float = 0.0) -> Tensor:
        return self.coefficients(eta)

    def coefficients(self, eta: float = 0.0) -> Tensor:
        """See `_CFGPlusPlus.coefficients`. BadInput with `clip_sample`."""
        self._check_ready()
        if self.config.clip_sample:
            raise BadInput(
                "coefficients: expected clip_sample=False, got True, which is not linear; "
                "latent models do not clip: pass clip_sample=False to from_config"
            )
        return self._rows([self._link(int(t), eta) for t in self.timesteps], [1.0] * len(self.timesteps))


class _SigmaSpace(_CFGPlusPlus):
    """What the schedulers with `sigmas` share: levels in float64 and the index of the step."""

    sigmas: Tensor
    alphas_cumprod: Tensor
    step_index: int | None
    begin_index: int | None
    _step_index: int | None
    _exact: tuple[Tensor | None, list[float]] = (None, [])  # `sigmas` as diffusers set them; the same levels in float64

    def _after_set_timesteps(self, steps: int | None, given: Any = None) -> None:
        """Drops the step too many of trailing spacing; finds the float64 levels that diffusers rounded to float32."""
        if steps is not None and len(self.timesteps) > steps:
            self.timesteps = self.timesteps[:steps]
            self.sigmas = torch.cat([self.sigmas[:steps], self.sigmas[-1:]])
            self.num_inference_steps = steps
        rounded = self.sigmas.double().numpy()
        exact = self._levels_in_float64(rounded) if given is None else np.asarray(given, dtype=np.float64)
        if exact.shape != rounded.shape or not np.allclose(exact, rounded, rtol=1e-6, atol=0):
            exact = rounded  # a grid that is not spelled out below
        self._exact = (self.sigmas, exact.tolist())

    def _levels_in_float64(self, rounded: Any) -> Any:
        alphas = self.alphas_cumprod.cpu().double().numpy()
        table = ((1 - alphas) / alphas) ** 0.5
        count = len(rounded) - 1
        last = table[0] if self.config.get("final_sigmas_type") == "sigma_min" else 0.0
        for name in ("karras", "exponential", "beta"):
            if self.config.get(f"use_{name}_sigmas"):
                nearest = [table[np.abs(table - end).argmin()] for end in rounded[[0, -2]]]
                ends = np.where(np.isclose(nearest, rounded[[0, -2]], rtol=1e-6, atol=0), nearest, rounded[[0, -2]])
                levels = getattr(self, f"_convert_to_{name}")(in_sigmas=ends, num_inference_steps=count)
                return np.append(levels, last)
        return np.append(np.interp(self.timesteps.cpu().numpy(), np.arange(len(table)), table), last)

    def _levels(self) -> list[float]:
        """N + 1 levels. Levels that a caller put into `sigmas` after `set_timesteps` are taken as they are."""
        of, exact = self._exact
        return exact if of is self.sigmas else self.sigmas.double().tolist()

    def advance_to(self, index: int) -> None:
        self._step_index = index

    def _find_step(self, timestep: Any) -> int:
        """The index of this step; the first one of a request is found by `begin_index` or by its timestep."""
        self._check_ready()
        if self.step_index is None:
            try:
                self._init_step_index(timestep)  # type: ignore[attr-defined]
            except IndexError:
                raise BadInput(f"timestep: expected one of scheduler.timesteps, got {timestep!r}") from None
        index = self._step_index
        if index is None or not 0 <= index < len(self.sigmas) - 1:
            raise BadInput(
                f"{type(self).__name__}: expected step 0..{len(self.sigmas) - 2}, got {index}: all steps are done; "
                "call set_timesteps before the next request"
            )
        return index


class _VarianceExploding(_SigmaSpace):
    """Euler and Euler ancestral: VE state, which is scaled down for the network."""

    is_scale_input_called: bool

    @property
    def init_noise_sigma(self) -> float:
        """What unit noise is multiplied by to make the first sample: diffusers' rule."""
        top = max(self._levels())
        return top if self.config.timestep_spacing in ("linspace", "trailing") else float((top * top + 1) ** 0.5)

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """The network's input, sample / sqrt(sigma² + 1), in the sample's dtype."""
        sigma = self._levels()[self._find_step(timestep)]
        self.is_scale_input_called = True
        return sample / (sigma * sigma + 1) ** 0.5

    def coefficients(self) -> Tensor:
        """See `_CFGPlusPlus.coefficients`."""
        self._check_ready()
        levels = self._levels()
        links = list(pairwise(levels))[: len(self.timesteps)]
        return self._rows(links, [maths.level_of_sigma(sigma)[0] for sigma, _ in links])

    def _advance(self, guided: Any, uncond: Any, timestep: Any, sample: Tensor, noise: Any) -> tuple[Tensor, Tensor]:
        x, guided, uncond = self._inputs(guided, uncond, sample)
        index = self._find_step(timestep)
        levels = self._levels()
        done = self._update((levels[index], levels[index + 1]), x, guided, uncond, 0.0, noise)
        self._step_index = index + 1
        return done.x_next.to(sample.dtype), done.x0.to(sample.dtype)


class EulerCFGPPScheduler(_VarianceExploding, EulerDiscreteScheduler):
    """Euler with CFG++: DDIM with CFG++ in sigma space. All of diffusers' grids (Karras, exponential, beta, custom)."""

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
    ) -> None:
        """As in diffusers; custom `sigmas` keep their precision."""
        super().set_timesteps(num_inference_steps, device, timesteps, sigmas)
        self._after_set_timesteps(num_inference_steps, sigmas)

    def _update(self, link: Any, x: Any, guided: Any, uncond: Any, history: Any, noise: Any) -> _Stepped:
        sigma, sigma_next = link
        D, U = (maths.x0_of_ve(self.config.prediction_type, output, x, sigma) for output in (guided, uncond))
        return _Stepped(maths.euler_cfgpp(x, D, U, sigma, sigma_next), D)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        *,
        uncond_output: Tensor | None = None,
        eta: float = 0.0,
        s_churn: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> EulerDiscreteSchedulerOutput | tuple[Tensor, Tensor]:
        """One step down; arguments, result and errors as for `DDIMCFGPPScheduler.step`.

        `s_churn` and `eta` other than 0 are refused; `generator` is accepted and not used.
        """
        self._refuse(s_churn=s_churn, eta=eta)
        found = self._advance(model_output, uncond_output, timestep, sample, 0.0)
        return EulerDiscreteSchedulerOutput(*found) if return_dict else found


class EulerAncestralCFGPPScheduler(_VarianceExploding, EulerAncestralDiscreteScheduler):
    """Euler ancestral with CFG++, at full noise. Predicts from x0 as well, which diffusers' plain one does not."""

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """As in diffusers."""
        super().set_timesteps(num_inference_steps, device)
        self._after_set_timesteps(num_inference_steps)

    def _update(self, link: Any, x: Any, guided: Any, uncond: Any, history: Any, noise: Any) -> _Stepped:
        sigma, sigma_next = link
        D, U = (maths.x0_of_ve(self.config.prediction_type, output, x, sigma) for output in (guided, uncond))
        return _Stepped(maths.euler_ancestral_cfgpp(x, D, U, sigma, sigma_next, noise), D)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        *,
        uncond_output: Tensor | None = None,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> EulerAncestralDiscreteSchedulerOutput | tuple[Tensor, Tensor]:
        """One step down; arguments, result and errors as for `DDIMCFGPPScheduler.step`.

        Noise is drawn at every step, the last one (which adds none) included: a generator is left where the plain
        scheduler leaves it. `eta` other than 0 is refused: it is not this sampler's.
        """
        self._refuse(eta=eta)
        self._inputs(model_output, uncond_output, sample)  # a refused step draws nothing
        noise = _noise(variance_noise, generator, model_output)
        found = self._advance(model_output, uncond_output, timestep, sample, noise)
        return EulerAncestralDiscreteSchedulerOutput(*found) if return_dict else found

    def draw_noise(self, like: Tensor, options: Mapping[str, Any]) -> Tensor | None:
        return _noise(options.get("variance_noise"), options.get("generator"), like)


class DPMSolverMultistepCFGPPScheduler(_SigmaSpace, DPMSolverMultistepScheduler):
    """DPM-Solver++(2M) with CFG++: second order, midpoint, deterministic; other variants are refused.

    VP state. The extrapolation uses `difference` (see `maths.dpmpp_2m_cfgpp`); a subclass may set "uncond". Steps are
    first order where diffusers' are: the first of a request, one that ends at 0, and the last under `euler_at_final`
    or, below 15 steps, `lower_order_final`.
    """

    difference: ClassVar[str] = "guided"
    accepted: ClassVar[_Options] = {
        **_CFGPlusPlus.accepted,
        "solver_order": (2,),
        "algorithm_type": ("dpmsolver++",),
        "solver_type": ("midpoint",),
        "thresholding": (False,),
        "use_flow_sigmas": (False,),
        "variance_type": (None,),
    }

    model_outputs: list[Any]
    lower_order_nums: int

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        mu: float | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """As in diffusers. Forgets the history of the request before."""
        shift = {} if mu is None else {"mu": mu}  # which older ones do not have
        super().set_timesteps(num_inference_steps, device, timesteps=timesteps, **shift)
        self._after_set_timesteps(num_inference_steps)

    def _link(self, index: int, first: bool) -> tuple[float | None, float, float]:
        """(sigma_prev, sigma, sigma_next); sigma_prev is None where the step is of first order."""
        levels, count = self._levels(), len(self.timesteps)
        forced = self.config.euler_at_final or (self.config.lower_order_final and count < 15)
        first_order = first or (index == count - 1 and forced) or levels[index + 1] == 0
        return (None if first_order else levels[index - 1], levels[index], levels[index + 1])

    def _update(self, link: Any, x: Any, guided: Any, uncond: Any, history: Any, noise: Any) -> _Stepped:
        sigma_prev, sigma, sigma_next = link
        a, s = maths.level_of_sigma(sigma)
        D, U = (maths.x0_of(self.config.prediction_type, output, x, a, s) for output in (guided, uncond))
        ve = maths.dpmpp_2m_cfgpp(
            maths.to_ve(x, a), D, U, history, sigma_prev, sigma, sigma_next, difference=self.difference
        )
        return _Stepped(maths.to_vp(ve, maths.level_of_sigma(sigma_next)[0]), D, U)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        *,
        uncond_output: Tensor | None = None,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """One step down; arguments and errors as for `DDIMCFGPPScheduler.step`; returns the next sample alone.

        `eta` other than 0 is refused; `generator` and `variance_noise` are accepted and not used.
        """
        self._refuse(eta=eta)
        x, guided, uncond = self._inputs(model_output, uncond_output, sample)
        index = self._find_step(timestep)
        first = self.lower_order_nums < 1
        done = self._update(self._link(index, first), x, guided, uncond, self.model_outputs[-1], 0.0)
        self.model_outputs = [self.model_outputs[-1], done.history]
        self.lower_order_nums = min(self.lower_order_nums + 1, 2)
        self._step_index = index + 1
        x_next = done.x_next.to(sample.dtype)
        return SchedulerOutput(prev_sample=x_next) if return_dict else (x_next,)

    def coefficients(self, begin: int | None = None) -> Tensor:
        """See `_CFGPlusPlus.coefficients`.

        Args:
            begin: the step that a request starts at, which is of first order; None: `begin_index`, or 0.
        """
        self._check_ready()
        begin = (self.begin_index or 0) if begin is None else begin
        count = len(self.timesteps)
        if not 0 <= begin < count:
            raise BadInput(f"begin: expected 0..{count - 1}, got {begin}; it is the first step of the request")
        return self._rows([self._link(i, first=i <= begin) for i in range(count)], [1.0] * count)


_COUNTERPARTS: dict[type, type[_CFGPlusPlus]] = {
    DDIMScheduler: DDIMCFGPPScheduler,
    EulerDiscreteScheduler: EulerCFGPPScheduler,
    EulerAncestralDiscreteScheduler: EulerAncestralCFGPPScheduler,
    DPMSolverMultistepScheduler: DPMSolverMultistepCFGPPScheduler,
}


def counterpart(scheduler: Any) -> Any:
    """The class of the CFG++ scheduler for a plain one; a CFG++ scheduler's own class for itself.

    `counterpart(s).from_config(s.config)` is the scheduler; its constructor refuses options that CFG++ does not define.
    A subclass of a plain scheduler has none: what it changes is unknown.

    >>> counterpart(EulerDiscreteScheduler()).__name__
    'EulerCFGPPScheduler'

    Raises:
        BadInput: a scheduler without a counterpart; the message lists those that have one.
    """
    if isinstance(scheduler, _CFGPlusPlus):
        return type(scheduler)
    found = _COUNTERPARTS.get(type(scheduler))
    if found is None:
        names = ", ".join(plain.__name__ for plain in _COUNTERPARTS)
        raise BadInput(
            f"scheduler: expected one with a CFG++ counterpart ({names}), got {type(scheduler).__name__}; "
            "for example pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)"
        )
    return found
