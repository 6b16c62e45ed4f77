"""First weights: residual branches that add nothing, and convolutions between them that keep a signal's size."""

from __future__ import annotations

import math

import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel

_UNIT_GAIN = math.sqrt(3)  # torch's default for a convolution has variance 1 / (3 fan_in)
_PASSING = ("conv_in", "sampler", "shortcut", "quant_conv")  # in the names of what lies between residual branches


def start_as_identity(model: torch.nn.Module) -> None:
    """Change the first weights of a UNet or an autoencoder in place; random numbers are not drawn again.

    Zero last layers of residual branches are usual for diffusion models (Dhariwal and Nichol, arXiv 2105.05233).
    """
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Conv2d) and any(part in name for part in _PASSING):
                module.weight.mul_(_UNIT_GAIN)
            for last in _last_layers(module):
                last.weight.zero_()
                if last.bias is not None:
                    last.bias.zero_()


def _last_layers(module: torch.nn.Module) -> list[torch.nn.Conv2d | torch.nn.Linear]:
    """The layers behind which a residual branch of `module` is added."""
    if isinstance(module, ResnetBlock2D):
        return [module.conv2]
    if isinstance(module, Transformer2DModel):
        return [module.proj_out]
    return []
