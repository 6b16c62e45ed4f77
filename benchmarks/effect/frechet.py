"""Frechet distance between two sets of pictures, on features of the demo model's own autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy
import torch
from PIL import Image
from scipy import linalg

from accel_hidiff.demo.training.recipe import pixels
from benchmarks.effect.reading import SIDE, Pixels

_GRID: Final = 4


def features(vae: Any, images: Sequence[Pixels]) -> numpy.ndarray[Any, Any]:
    """(N, 64) float64: means of the four latent channels over a grid of 4x4, of pictures squeezed to 128x128.

    Squeezed, so that sets of any size can be compared; latents are in the model's own units (standard deviation 1).
    """
    rows = []
    for start in range(0, len(images), 32):
        some = [
            numpy.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.LANCZOS))
            for image in images[start : start + 32]
        ]
        with torch.no_grad():
            latents = vae.encode(pixels(some)).latent_dist.mode() * vae.config.scaling_factor
        rows.append(torch.nn.functional.adaptive_avg_pool2d(latents, _GRID).flatten(1).double().numpy())
    return numpy.concatenate(rows)


def distance(one: numpy.ndarray[Any, Any], other: numpy.ndarray[Any, Any]) -> float:
    """Frechet distance of two normal distributions fitted to features, (N, D) and (M, D); N and M well above D.

    As in FID (Heusel et al., arXiv 1706.08500). It is not 0 for two samples of one distribution: compare with what two
    sets of real pictures of the same numbers give.
    """
    spread = [numpy.cov(features, rowvar=False) for features in (one, other)]
    product = linalg.sqrtm(spread[0] @ spread[1])
    apart = one.mean(0) - other.mean(0)
    return float(apart @ apart + numpy.trace(spread[0] + spread[1] - 2 * numpy.real(product)))
