"""Every number that the trained weights depend on, and the data that they are trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy
import torch

from accel_hidiff.demo.model import DemoModelConfig
from accel_hidiff.demo.scenes import caption, draw, random_scene, vocabulary

Size = tuple[int, int]

# (height, width) in pixels, and the share of the scenes. All have latents that halve twice without a remainder.
CANVASES: Final[tuple[tuple[Size, float], ...]] = (((128, 128), 0.7), ((96, 160), 0.15), ((160, 96), 0.15))


def model_config() -> DemoModelConfig:
    """The layout of the trained model: SDXL's, narrow, for latents of 16x16."""
    return DemoModelConfig(
        block_out_channels=(48, 96, 128),
        transformer_layers=(1, 1, 2),
        head_width=16,
        norm_groups=8,
        sample_size=16,
        time_ids_width=32,
        text_width=64,
        text_layers=2,
        text_width_2=96,
        text_layers_2=2,
        vae_channels=(16, 32, 64, 64),
        vae_norm_groups=1,
        vae_attention=False,  # one that was trained on 128x128 would be asked about 512x512
        prediction_type="v_prediction",
        words=vocabulary(),
    )


@dataclass(frozen=True)
class AutoencoderRecipe:
    """Length and settings of the first training. `prior` weighs the KL divergence, per element, against the errors;
    `first_deviation` is the standard deviation of the posterior where training begins."""

    seed: int = 0
    steps: int = 3000
    batch: int = 16
    rate: float = 2e-3
    warm_up: int = 50
    prior: float = 1e-4
    first_deviation: float = 0.1
    average: float = 0.99


@dataclass(frozen=True)
class DiffusionRecipe:
    """Length and settings of the second training. `scenes` are drawn and encoded once; `average` is the decay of the
    running average of weights; captions are left out at the rate `without_caption`, for guidance."""

    seed: int = 0
    scenes: int = 32_000
    steps: int = 2000
    batch: int = 48
    rate: float = 1e-3
    warm_up: int = 100
    weight_decay: float = 0.01
    average: float = 0.998
    without_caption: float = 0.1


def scene_of(seed: int, number: int, size: Size) -> tuple[str, numpy.ndarray[Any, numpy.dtype[numpy.uint8]]]:
    """Scene `number` of the training data with this seed, on a canvas of `size`: its caption and its pixels."""
    height, width = size
    scene = random_scene(numpy.random.default_rng((seed, number)), aspect=width / height)
    return caption(scene), draw(scene, height, width)


def pixels(images: list[numpy.ndarray[Any, numpy.dtype[numpy.uint8]]]) -> torch.Tensor:
    """Images as a batch: (N, 3, H, W), float32 in [-1, 1]."""
    batch = torch.from_numpy(numpy.stack(images)).permute(0, 3, 1, 2)
    return batch.float().div_(127.5).sub_(1)
