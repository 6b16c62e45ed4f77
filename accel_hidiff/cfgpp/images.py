"""Images to latents and back, with a pipeline's own VAE and its conventions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_img2img import retrieve_latents
from torch import Tensor

from accel_hidiff.cfgpp.climbing import upcast
from accel_hidiff.errors import BadInput


def load_image(pipe: Any, image: Any, height: Any, width: Any, generator: Any) -> tuple[Tensor, Tensor | None]:
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
    latents = upcast(drawn)
    mean, std = _statistics(pipe.vae, latents)
    return (latents - mean) / std


@torch.no_grad()
def decode(pipe: Any, latents: Tensor) -> Tensor:
    """Scaled latents to (B, 3, H, W) in about -1..1, in the dtype that the VAE computed in."""
    if getattr(pipe, "vae", None) is None:
        raise BadInput("pipe.vae: expected a VAE to decode with, got None; load one, or use .latents")
    mean, std = _statistics(pipe.vae, latents)
    with _float32_vae(pipe.vae) as dtype:
        return pipe.vae.decode((latents * std + mean).to(dtype), return_dict=False)[0]
