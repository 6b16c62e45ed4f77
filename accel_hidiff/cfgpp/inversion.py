"""Inversion of an image to the latent that samples it, and editing by exchanging the prompt (arXiv 2406.08070).

    inversion = invert(pipe, image, "a red circle", scale=0.6)
    inversion.error                                  # of the way up and down again
    inversion.edit("a blue circle").images()         # [PIL.Image]

DDIM inversion (Song et al., arXiv 2010.02502) climbs the levels that DDIM sampling descends, with the prediction at the
sample before a step in place of the one after it, which is not known yet: the error of a round trip comes from this
alone. CFG++ guides it so that the clean estimate comes from the unconditional noise (`maths.ddim_cfgpp_inversion`).

`climb` and `descend` are the two ways over a `Grid` of levels for any predictor; `invert` runs them on a pipeline.

Deviations. From the authors' code: the levels are those of the timesteps, not shifted by one, and end where the
scheduler's do. From diffusers' `DDIMInverseScheduler`: N that does not divide the training steps climbs the levels that
sampling descends; v and x0 predictions are read at the level of the timestep that the network was told, so that a model
inverts alike whatever it predicts.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import PIL.Image
import torch
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_img2img import retrieve_latents
from torch import Tensor

from accel_hidiff.cfgpp import maths
from accel_hidiff.config import check_lambda, check_steps
from accel_hidiff.errors import BadInput, NotAPipeline
from accel_hidiff.patching import Patch, find_patch, find_unet
from accel_hidiff.schedulers import DDIMCFGPPScheduler
from accel_hidiff.shifts import window_shifts

__all__ = ["Grid", "Inversion", "ReconstructionError", "Sampled", "climb", "descend", "invert", "reconstruction_error"]

GUIDANCES = ("cfgpp", "cfg")
DEFAULT_SCALES = {"cfgpp": 0.6, "cfg": 7.5}

Predictor: TypeAlias = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""(sample, index of a timestep in the grid) -> (unconditional, conditional) outputs of the network, as the sample."""
Scale: TypeAlias = float | Sequence[float]


# --- the loops --------------------------------------------------------------------------------------------------------


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
    x, scales = _upcast(x), _scales(scale, guidance, len(grid))
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
    x, scales = _upcast(x), _scales(scale, guidance, len(grid))
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


def _upcast(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check_guidance(guidance: object) -> str:
    if not isinstance(guidance, str) or guidance not in GUIDANCES:
        raise BadInput(
            f"guidance: expected one of {', '.join(GUIDANCES)}, got {guidance!r}; to go without guidance pass scale=0, "
            "which is unconditional, or guidance='cfg' with scale=1"
        )
    return guidance


def _scales(scale: Scale, guidance: object, steps: int) -> list[float]:
    guidance = _check_guidance(guidance)
    each = list(scale) if isinstance(scale, Sequence) and not isinstance(scale, str) else [scale] * steps
    if len(each) != steps:
        raise BadInput(f"scale: expected a number, or one for each of {steps} steps, got {len(each)}")
    return [_check_scale(one, guidance) for one in each]


def _check_scale(scale: object, guidance: str) -> float:
    if guidance == "cfgpp":
        return check_lambda(scale)
    number = isinstance(scale, int | float) and not isinstance(scale, bool)
    if not number or not 0 <= scale < math.inf:  # type: ignore[operator]
        raise BadInput(f"scale: expected a CFG weight of at least 0, got {scale!r}; 1 is the conditional model alone")
    return float(scale)  # type: ignore[arg-type]


# --- errors of a round trip -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReconstructionError:
    """How far a reconstruction is from what was inverted; over a whole batch.

    Attributes:
        relative: max|found - latents| / max|latents|, in latent space; 0 is exact.
        rmse: root of the mean square of found - latents, in latent space.
        psnr: of the pixels, dB, against the VAE's own decoding of the latents that were inverted: the error of the
            inversion alone. Infinite where they are equal; None without a VAE.
        psnr_image: the same against the image that was given, so with the loss of the VAE; None if latents were given.
    """

    relative: float
    rmse: float
    psnr: float | None = None
    psnr_image: float | None = None


def reconstruction_error(found: Tensor, latents: Tensor) -> ReconstructionError:
    """The errors in latent space of two tensors of one shape; non-finite ones give NaN or infinity."""
    difference = found.double() - latents.double()
    relative = difference.abs().max() / latents.double().abs().max()
    return ReconstructionError(float(relative), float(difference.square().mean().sqrt()))


def _psnr(pixels: Tensor, reference: Tensor) -> float:
    square = float((pixels.double() - reference.double()).square().mean())
    return -10 * math.log10(square) if square > 0 else math.inf


# --- pipelines --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Sampled:
    """What sampling from an inverted latent gave.

    Attributes:
        latents: (B, C, h, w), float32 (float64 of such a model), as a pipeline's with output_type="latent".
        prompt: one for each image.
    """

    latents: Tensor = field(repr=False)
    prompt: tuple[str, ...]
    pipe: Any = field(repr=False)

    def images(self, output_type: str = "pil") -> Any:
        """The decoded images, as the pipeline gives them: its safety checker and its watermark included.

        Args:
            output_type: "pil", "np" or "pt".

        Raises:
            BadInput: the pipeline has no VAE.
        """
        pipe, pixels = self.pipe, _decode(self.pipe, self.latents)
        flagged = None
        if getattr(pipe, "safety_checker", None) is not None:
            pixels, flagged = pipe.run_safety_checker(pixels, pixels.device, pipe.unet.dtype)
        if getattr(pipe, "watermark", None) is not None:
            pixels = pipe.watermark.apply_watermark(pixels)
        normalized = [True] * len(pixels) if flagged is None else [not one for one in flagged]
        found = pipe.image_processor.postprocess(pixels, output_type=output_type, do_denormalize=normalized)
        _free(pipe)
        return found


@dataclass(frozen=True, eq=False)
class Inversion:
    """An inverted image. Made by `invert`.

    Attributes:
        latents: (B, C, h, w), float32 (float64 of such a model): the latent at the first timestep of `grid`, of about
            unit variance. It is what a pipeline takes as `latents` with a DDIM scheduler (or Euler, leading) and the
            same number of steps; cast it to the pipeline's dtype for half precision.
        clean: what was inverted: the image's latents, same shape and dtype.
        image: (B, 3, H, W), float32 in 0..1; None where latents were given.
        prompt, negative_prompt: one for each image; negative_prompt None is the pipeline's own default.
        guidance, scale, grid, shift_seed: what it was inverted with; sampling uses the same.
    """

    latents: Tensor = field(repr=False)
    clean: Tensor = field(repr=False)
    image: Tensor | None = field(repr=False)
    prompt: tuple[str, ...]
    negative_prompt: tuple[str, ...] | None
    guidance: str
    scale: float
    grid: Grid = field(repr=False)
    shift_seed: int | None
    pipe: Any = field(repr=False)
    _patch: Patch | None = field(repr=False)

    def reconstruct(self) -> Sampled:
        """Samples from the inverted latent with the prompt of the inversion."""
        return self.edit(list(self.prompt))

    @torch.no_grad()
    def edit(self, prompt: str | Sequence[str], negative_prompt: str | Sequence[str] | None = None) -> Sampled:
        """Samples from the inverted latent with another prompt, the same guidance, levels, phases and window shifts.

        Args:
            prompt: one, or one for each image.
            negative_prompt: the same; None: that of the inversion.

        Raises:
            BadInput: prompts that do not fit, or HiDiffusion was applied, changed or removed since the inversion.
        """
        if find_patch(self.pipe.unet) is not self._patch:
            raise BadInput(
                "pipe.unet: expected HiDiffusion as it was at the inversion, got it applied, exchanged or removed "
                "since; invert again"
            )
        negative = self.negative_prompt if negative_prompt is None else negative_prompt
        request = _Request(self.pipe, self.grid, self.shift_seed)
        x = request.run(descend, self.latents, prompt, negative, self.scale, self.guidance)
        return Sampled(x, _prompts("prompt", prompt, len(x)), self.pipe)

    @cached_property
    def error(self) -> ReconstructionError:
        """The error of `reconstruct`, which runs at the first look: N steps, two decodings."""
        found = self.reconstruct().latents
        error = reconstruction_error(found, self.clean)
        if getattr(self.pipe, "vae", None) is None:
            return error
        pixels, clean = (
            _decode(self.pipe, latents).float().add(1).div(2).clamp(0, 1) for latents in (found, self.clean)
        )
        _free(self.pipe)
        against_image = None if self.image is None else _psnr(pixels, self.image)
        return ReconstructionError(error.relative, error.rmse, _psnr(pixels, clean), against_image)


@torch.no_grad()
def invert(
    pipe: Any,
    image: Any,
    prompt: str | Sequence[str],
    *,
    guidance: str = "cfgpp",
    scale: float | None = None,
    num_inference_steps: int = 50,
    negative_prompt: str | Sequence[str] | None = None,
    height: int | None = None,
    width: int | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    shift_seed: int | None = None,
) -> Inversion:
    """Inverts images through a text-to-image pipeline of the SD 1.x/2.x, SDXL or Kolors kind; see the module.

    The UNet may be patched with HiDiffusion, eager or compiled: a step up to a timestep runs in the phase, with the
    topology and the window shifts, of the step that samples down from it. The pipeline and its scheduler stay as they
    are; the levels are DDIM's for the scheduler's config, whatever sampler it is. IP-Adapters and ControlNets have no
    part in it.

    Args:
        pipe: a `StableDiffusionPipeline`, `StableDiffusionXLPipeline` or `KolorsPipeline`.
        image: PIL image, tensor (3, H, W) or (B, 3, H, W) in 0..1, array (H, W, 3) or (B, H, W, 3) of floats in 0..1,
            or a list of one kind and size; a tensor with the VAE's number of latent channels is taken as latents,
            scaled as the UNet's.
        prompt: what the images show; one, or one for each image.
        guidance: "cfgpp" (arXiv 2406.08070) or "cfg".
        scale: lambda in 0..1 for "cfgpp" (None: 0.6), the CFG weight for "cfg" (None: 7.5).
        num_inference_steps: N, of the inversion and of the sampling after it.
        negative_prompt: as for the pipeline; None is its default.
        height, width: the images are resized to this; None: their own size. Multiples of 8 (one latent cell).
        generator: draws the image's latents from the VAE's posterior; None: its mode. A single generator's seed also
            seeds the window shifts, as when the pipeline is called with it.
        shift_seed: of the window shifts; None: the generator's, or the config's `shift_seed`.

    Raises:
        NotAPipeline: no diffusers pipeline with a UNet.
        BadInput: a pipeline of another task or another conditioning, no VAE, or a value that is not what it should be.
    """
    guidance = _check_guidance(guidance)
    strength = _check_scale(DEFAULT_SCALES[guidance] if scale is None else scale, guidance)
    _check_pipeline(pipe)
    grid, patch = Grid.of(pipe.scheduler, num_inference_steps), find_patch(pipe.unet)
    seed = _shift_seed(shift_seed, generator, patch)
    clean, pixels = _load(pipe, image, height, width, generator)
    request = _Request(pipe, grid, seed)
    latents = request.run(climb, clean, prompt, negative_prompt, strength, guidance)
    negative = None if negative_prompt is None else _prompts("negative_prompt", negative_prompt, len(clean))
    names = _prompts("prompt", prompt, len(clean))
    return Inversion(latents, clean, pixels, names, negative, guidance, strength, grid, seed, pipe, patch)


@dataclass(frozen=True)
class _Request:
    """The UNet of a pipeline as a `Predictor`."""

    pipe: Any
    grid: Grid
    shift_seed: int | None

    def run(
        self, loop: Callable[..., Tensor], x: Tensor, prompt: Any, negative_prompt: Any, scale: float, guidance: str
    ) -> Tensor:
        """`climb` or `descend` from x (B, C, h, w) with the pipeline's progress bar."""
        conditions = self._conditions(x, prompt, negative_prompt)
        with self.pipe.progress_bar(total=len(self.grid)) as bar:

            def predict(sample: Tensor, step: int) -> tuple[Tensor, Tensor]:
                outputs = self._call(sample, step, conditions)
                bar.update()
                return outputs

            found = loop(predict, x, self.grid, scale, guidance)
        _free(self.pipe)
        return found

    def _call(self, x: Tensor, step: int, conditions: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Both predictions in one call of batch 2 B, as the pipelines make it."""
        unet = self.pipe.unet
        timestep = torch.tensor(self.grid.timesteps[step], device=x.device)
        with self._phase(step):
            both = unet(torch.cat([x, x]).to(unet.dtype), timestep, **conditions, return_dict=False)[0]
        uncond, cond = both.to(x.dtype).chunk(2)
        return uncond, cond

    def _phase(self, step: int) -> Any:
        patch = find_patch(self.pipe.unet)
        if patch is None or self.shift_seed is None:
            return nullcontext()
        shifts = window_shifts(self.shift_seed, step, len(patch.windowed_blocks), patch.config.window_shifts)
        return patch.phase(step, len(self.grid), shifts)

    def _conditions(self, x: Tensor, prompt: Any, negative_prompt: Any) -> dict[str, Any]:
        """The UNet's arguments that do not change from step to step."""
        pipe, count = self.pipe, len(x)
        negative = None if negative_prompt is None else list(_prompts("negative_prompt", negative_prompt, count))
        encoded = pipe.encode_prompt(
            prompt=list(_prompts("prompt", prompt, count)),
            device=x.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
            negative_prompt=negative,
        )
        text = torch.cat([encoded[1], encoded[0]]).to(x.device)
        conditions: dict[str, Any] = {"encoder_hidden_states": text, "timestep_cond": None}
        conditions |= {"cross_attention_kwargs": None, "added_cond_kwargs": None}
        if pipe.unet.config.addition_embed_type == "text_time":
            pooled = torch.cat([encoded[3], encoded[2]]).to(x.device)
            size = tuple(int(side) * pipe.vae_scale_factor for side in x.shape[-2:])
            ids = pipe._get_add_time_ids(size, (0, 0), size, text.dtype, int(pooled.shape[-1]))
            ids = ids.to(x.device).repeat(2 * count, 1)
            conditions["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids}
        return conditions


def _prompts(name: str, prompt: Any, count: int) -> tuple[str, ...]:
    found = (prompt,) * count if isinstance(prompt, str) else tuple(prompt) if isinstance(prompt, list | tuple) else ()
    if len(found) != count or not all(isinstance(one, str) for one in found):
        got = f"{len(found)}" if isinstance(prompt, list | tuple) else type(prompt).__name__
        raise BadInput(f"{name}: expected a string, or a list of {count} strings, one for each image; got {got}")
    return found


def _shift_seed(given: object, generator: Any, patch: Patch | None) -> int | None:
    """The seed of the window shifts of a patched UNet; by the pipeline's rule where none is given."""
    if given is not None and (isinstance(given, bool) or not isinstance(given, int)):
        raise BadInput(f"shift_seed: expected an integer, got {given!r}")
    if patch is None:
        return None
    if isinstance(given, int):
        return given
    return generator.initial_seed() if isinstance(generator, torch.Generator) else patch.config.shift_seed


def _check_pipeline(pipe: Any) -> None:
    owner, unet = find_unet(pipe)
    if owner is None or not hasattr(pipe, "encode_prompt") or not hasattr(pipe, "image_processor"):
        kind = type(pipe).__name__
        raise NotAPipeline(
            f"expected a StableDiffusionPipeline, StableDiffusionXLPipeline or KolorsPipeline, got {kind}"
        )
    channels, vae, config = unet.config.in_channels, getattr(pipe, "vae", None), unet.config
    wanted = channels if vae is None else vae.config.latent_channels
    if channels != wanted or config.out_channels != channels:
        raise BadInput(
            f"unet: expected as many input and output channels as the VAE's latents have ({wanted}), got {channels} "
            f"and {config.out_channels}; inpainting and upscaling UNets cannot be inverted"
        )
    takes = inspect.signature(type(pipe).__call__).parameters
    if getattr(pipe, "controlnet", None) is not None or {"image", "mask_image", "strength"} & set(takes):
        raise BadInput(
            f"pipe: expected a text-to-image pipeline, got {type(pipe).__name__}; make one of the same parts, for "
            "example StableDiffusionXLPipeline.from_pipe(pipe)"
        )
    if config.get("time_cond_proj_dim") is not None:
        raise BadInput(
            "unet: expected one with an unconditional prediction, got one that takes the guidance as an embedding "
            "(guidance is off in it); use the model that it was distilled from"
        )
    if getattr(config, "encoder_hid_dim_type", None) == "ip_image_proj":
        raise BadInput("unet: expected none with an IP-Adapter, got one; call pipe.unload_ip_adapter() first")
    if config.get("addition_embed_type") not in (None, "text_time") or config.get("class_embed_type") is not None:
        raise BadInput(
            f"unet: expected SD's or SDXL's conditioning, got addition_embed_type={config.addition_embed_type!r}, "
            f"class_embed_type={config.class_embed_type!r}"
        )


def _free(pipe: Any) -> None:
    pipe.maybe_free_model_hooks()


# --- images -----------------------------------------------------------------------------------------------------------


def _load(pipe: Any, image: Any, height: Any, width: Any, generator: Any) -> tuple[Tensor, Tensor | None]:
    """(latents, pixels in 0..1, or None where latents were given), on the pipeline's device."""
    images = list(image) if isinstance(image, list | tuple) else [image]
    if not images or not all(isinstance(one, PIL.Image.Image | Tensor | np.ndarray) for one in images):
        raise BadInput(
            f"image: expected PIL images, tensors or arrays, got {type(images[0] if images else image).__name__}"
        )
    if len({(_kind(one), _size(one)) for one in images}) > 1:
        raise BadInput("image: expected images of one kind and size, got several; invert them one by one")
    images = [one.convert("RGB") if isinstance(one, PIL.Image.Image) else one for one in images]
    channels, dtype = pipe.unet.config.in_channels, torch.promote_types(pipe.unet.dtype, torch.float32)
    device, cell = pipe._execution_device, int(pipe.vae_scale_factor)
    first = images[0]
    if isinstance(first, Tensor) and first.ndim in (3, 4) and first.shape[-3] == channels:
        latents = torch.cat(images) if first.ndim == 4 else torch.stack(images)
        _check_finite(latents, "latents", math.inf)
        for name, asked, side in (("height", height, latents.shape[-2]), ("width", width, latents.shape[-1])):
            if asked is not None and asked != side * cell:
                raise BadInput(f"{name}: expected {side * cell}, that of the latents given as image, got {asked!r}")
        return latents.to(device, dtype), None
    if getattr(pipe, "vae", None) is None:
        raise BadInput(
            "pipe.vae: expected a VAE to encode the image with, got None; load one, or pass latents as image"
        )
    own = _size(first)
    size = tuple(
        _check_side(name, side if asked is None else asked, cell)
        for name, asked, side in zip(("height", "width"), (height, width), own, strict=True)
    )
    if not isinstance(first, PIL.Image.Image):
        for one in images:
            _check_array(one)
    batched = not isinstance(first, PIL.Image.Image) and first.ndim == 4
    joined = (torch.cat(images) if isinstance(first, Tensor) else np.concatenate(images)) if batched else images
    pixels = pipe.image_processor.preprocess(joined, *size).float()
    if pixels.shape[1] != 3:
        raise BadInput(f"image: expected 3 channels, got {pixels.shape[1]}; arrays have them last, tensors first")
    _check_finite(pixels, "image", 1.001)
    return _encode(pipe, pixels.to(device), generator).to(dtype), pixels.to(device).add(1).div(2).clamp(0, 1)


def _kind(image: Any) -> tuple[type, int]:
    return (PIL.Image.Image, 0) if isinstance(image, PIL.Image.Image) else (type(image), image.ndim)


def _size(image: Any) -> tuple[int, int]:
    """(height, width) of a picture."""
    if isinstance(image, PIL.Image.Image):
        return image.height, image.width
    if image.ndim not in (3, 4):
        raise BadInput(f"image: expected 3 or 4 dimensions, got {image.ndim}: shape {tuple(image.shape)}")
    sides = image.shape[-2:] if isinstance(image, Tensor) else image.shape[-3:-1]
    return int(sides[0]), int(sides[1])


def _check_side(name: str, side: Any, cell: int) -> int:
    if isinstance(side, bool) or not isinstance(side, int) or side <= 0 or side % cell:
        nearest = max(cell, round(side / cell) * cell) if isinstance(side, int) else cell
        raise BadInput(
            f"{name}: expected a positive multiple of {cell} pixels, got {side!r}; the nearest is {nearest}, pass "
            f"{name}={nearest} to resize"
        )
    return side


def _check_array(image: Any) -> None:
    floating = image.is_floating_point() if isinstance(image, Tensor) else np.issubdtype(image.dtype, np.floating)
    if not floating:
        raise BadInput(f"image: expected floating-point values in 0..1, got {image.dtype}; divide by 255")


def _check_finite(values: Tensor, name: str, limit: float) -> None:
    if not bool(torch.isfinite(values).all()) or float(values.abs().max()) > limit:
        expected = "finite values" if limit == math.inf else "values in 0..1"
        raise BadInput(f"{name}: expected {expected}, got {float(values.min()):g} to {float(values.max()):g}")


@contextmanager
def _float32_vae(vae: Any) -> Iterator[torch.dtype]:
    """The VAE's dtype inside: float32 for a half-precision one that overflows, as in the image-to-image pipelines."""
    dtype = vae.dtype
    if not vae.config.get("force_upcast") or dtype not in (torch.float16, torch.bfloat16):
        yield dtype
        return
    vae.to(dtype=torch.float32)
    try:
        yield torch.float32
    finally:
        vae.to(dtype=dtype)


def _statistics(vae: Any, like: Tensor) -> tuple[Any, Any]:
    """(mean, std) of the latents, (1, C, 1, 1), or 0 and 1 where the config has none; std over the scaling factor."""
    mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
    factor = vae.config.scaling_factor
    if mean is None or std is None:
        return 0.0, 1 / factor
    rows = [torch.tensor(values, device=like.device, dtype=like.dtype).view(1, -1, 1, 1) for values in (mean, std)]
    return rows[0], rows[1] / factor


def _encode(pipe: Any, pixels: Tensor, generator: Any) -> Tensor:
    """(B, 3, H, W) in -1..1 to scaled latents, at least float32."""
    with _float32_vae(pipe.vae) as dtype:
        encoded = pipe.vae.encode(pixels.to(dtype))
        drawn = retrieve_latents(encoded, generator, "argmax" if generator is None else "sample")
    latents = _upcast(drawn)
    mean, std = _statistics(pipe.vae, latents)
    return (latents - mean) / std


@torch.no_grad()
def _decode(pipe: Any, latents: Tensor) -> Tensor:
    """Scaled latents to (B, 3, H, W) in about -1..1, in the dtype that the VAE computed in."""
    if getattr(pipe, "vae", None) is None:
        raise BadInput("pipe.vae: expected a VAE to decode with, got None; load one, or use .latents")
    mean, std = _statistics(pipe.vae, latents)
    with _float32_vae(pipe.vae) as dtype:
        return pipe.vae.decode((latents * std + mean).to(dtype), return_dict=False)[0]
