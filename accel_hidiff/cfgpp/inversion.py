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
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from accel_hidiff.cfgpp.climbing import DEFAULT_SCALES, Grid, check_guidance, check_scale, climb, descend
from accel_hidiff.cfgpp.images import decode, load_image
from accel_hidiff.errors import BadInput, NotAPipeline
from accel_hidiff.patching import Patch, find_patch, find_unet
from accel_hidiff.shifts import window_shifts

__all__ = ["Inversion", "ReconstructionError", "Sampled", "invert", "reconstruction_error"]


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
        pipe, pixels = self.pipe, decode(self.pipe, self.latents)
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
            decode(self.pipe, latents).float().add(1).div(2).clamp(0, 1) for latents in (found, self.clean)
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
    guidance = check_guidance(guidance)
    strength = check_scale(DEFAULT_SCALES[guidance] if scale is None else scale, guidance)
    _check_pipeline(pipe)
    grid, patch = Grid.of(pipe.scheduler, num_inference_steps), find_patch(pipe.unet)
    seed = _shift_seed(shift_seed, generator, patch)
    clean, pixels = load_image(pipe, image, height, width, generator)
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
