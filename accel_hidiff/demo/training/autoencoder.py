"""Training of the autoencoder (a KL VAE, factor 8): error of pixels and of their differences, and a weak prior.

It sees crops of scenes at two scales. Nothing in it looks further than its convolutions do, so it serves every size.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image

from accel_hidiff.demo.training.loop import Training
from accel_hidiff.demo.training.recipe import AutoencoderRecipe, pixels, scene_of
from accel_hidiff.demo.training.start import start_as_identity

_SCALED_ON = 256  # scenes whose latents the scaling factor is taken from
_CROP = 64  # pixels
_CROPS_OF_ONE = 2
_SIDES = (128, 192, 256)
_SCENES = 10_000_000  # number of the first scene that the autoencoder sees: none of the second training


def train_autoencoder(vae: Any, recipe: AutoencoderRecipe, folder: Path, device: torch.device) -> Training:
    """Train `vae` (an `AutoencoderKL`) in place and return what was recorded.

    Its `scaling_factor` is set so that latents of scenes have unit standard deviation.
    """

    _begin(vae, recipe)

    def loss_of(step: int) -> torch.Tensor:
        rng = numpy.random.default_rng((recipe.seed, 1, step))
        images = pixels(_crops(rng, recipe, step))
        images = images.to(device, memory_format=torch.channels_last)
        noise = torch.Generator().manual_seed(int(rng.integers(2**31)))
        with torch.autocast(device.type, torch.bfloat16):
            latents = vae.encode(images).latent_dist
            drawn = torch.randn(latents.mean.shape, generator=noise).to(device)
            decoded = vae.decode(latents.mean + latents.std * drawn).sample
        error = (decoded.float() - images).abs().mean()
        for axis in (2, 3):
            error = error + (decoded.float().diff(dim=axis) - images.diff(dim=axis)).abs().mean()
        mean, logvar = latents.mean.float(), latents.logvar.float()
        prior = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return error + recipe.prior * prior

    def pictures(step: int) -> None:
        images = pixels([scene_of(recipe.seed, _SCENES - 1 - number, (128, 128))[1] for number in range(8)]).to(device)
        decoded = vae.decode(vae.encode(images).latent_dist.mode()).sample
        save_grid(torch.cat([images, decoded]), 8, folder / "autoencoder.png")

    training = Training(
        name="autoencoder",
        folder=folder,
        modules={"vae": vae.to(memory_format=torch.channels_last)},
        loss_of=loss_of,
        steps=recipe.steps,
        rate=recipe.rate,
        warm_up=recipe.warm_up,
        settings=asdict(recipe),
        weight_decay=0.0,
        average=recipe.average,
        pictures=pictures,
    )
    training.run()
    with torch.no_grad():
        images = pixels([scene_of(recipe.seed, _SCENES - 1 - number, (128, 128))[1] for number in range(_SCALED_ON)])
        latents = vae.encode(images.to(device)).latent_dist.mode()
    vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 5))
    return training


def _begin(vae: Any, recipe: AutoencoderRecipe) -> None:
    """First weights that pass a flat colour through: blocks that add nothing yet, and all between them at unit gain.

    With torch's defaults a signal is a hundredth of itself behind the bottleneck, and colours are learned several times
    more slowly.
    """
    start_as_identity(vae)
    deviation = vae.quant_conv.bias[vae.config.latent_channels :]
    torch.nn.init.constant_(deviation, 2 * math.log(recipe.first_deviation))


def save_grid(images: torch.Tensor, columns: int, path: Path) -> None:
    """Write images, (N, 3, H, W) in [-1, 1], as one PNG with `columns` of them in a row."""
    count, _, height, width = images.shape
    whole = images.add(1).mul(127.5).round().clamp(0, 255).to("cpu", torch.uint8)
    rows = whole.reshape(count // columns, columns, 3, height, width).permute(0, 3, 1, 4, 2)
    Image.fromarray(rows.reshape(count // columns * height, columns * width, 3).numpy()).save(path)


def _crops(rng: numpy.random.Generator, recipe: AutoencoderRecipe, step: int) -> list[Any]:
    crops = []
    for number in range(recipe.batch // _CROPS_OF_ONE):
        side = int(rng.choice(_SIDES))
        _, image = scene_of(recipe.seed, _SCENES + step * recipe.batch + number, (side, side))
        for _ in range(_CROPS_OF_ONE):
            top, left = (int(rng.integers(side - _CROP + 1)) for _ in range(2))
            crops.append(image[top : top + _CROP, left : left + _CROP])
    return crops
