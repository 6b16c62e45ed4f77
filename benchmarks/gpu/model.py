"""The model under test: SDXL's UNet in full size with random weights, or a tiny one of the same layout.

It needs no pipeline on disk: a `StableDiffusionXLPipeline` of a UNet and nothing else is what `accelerate` takes, and
`patch.phase` names the steps. All UNets of a process share one set of weights.
"""

from __future__ import annotations

from typing import Final

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor

from benchmarks import harness as h
from benchmarks.unets import SDXL, SDXL_TINY

# (relative L2, max|diff| / max|ref|) that two ways of running the same graph have to stay below. Two runs in bfloat16
# differ by the order of their roundings (2^-9 each, through some 70 transformer blocks); a wrong graph differs by 1.
LIMITS: Final = {torch.float32: (1e-3, 1e-3), torch.bfloat16: (5e-2, 1e-1)}


def model_name(tiny: bool) -> str:
    """What is written down as the model."""
    return "tiny UNet of SDXL's layout, random weights, seed 0" if tiny else "SDXL's UNet, random weights, seed 0"


def make_unet(tiny: bool, device: torch.device, dtype: torch.dtype) -> UNet2DConditionModel:
    """A UNet with random weights from a fixed seed, in channels_last."""
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(**(SDXL_TINY if tiny else SDXL))
    return unet.to(dtype=dtype, memory_format=torch.channels_last).eval().requires_grad_(False)


def twin(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Another UNet over the same weights."""
    with torch.device("meta"):
        other = UNet2DConditionModel.from_config(unet.config)
    other.load_state_dict(unet.state_dict(), assign=True)
    return other.eval().requires_grad_(False)


def pipeline_of(unet: UNet2DConditionModel) -> StableDiffusionXLPipeline:
    """A pipeline of the UNet alone: nothing but its graphs is compiled."""
    parts = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    return StableDiffusionXLPipeline(unet=unet, scheduler=EulerDiscreteScheduler(), add_watermarker=False, **parts)


def inputs_of(unet: UNet2DConditionModel, size: h.Size) -> h.UNetInputs:
    """A call's inputs, batch 2, the sample in channels_last as the UNet's weights are."""
    given = h.unet_inputs(unet, size)
    return given._replace(sample=given.sample.contiguous(memory_format=torch.channels_last))


def weights_mb(unet: UNet2DConditionModel) -> float:
    """Megabytes (10^6 bytes) of the weights."""
    return h.rounded(sum(parameter.nbytes for parameter in unet.parameters()) / 1e6)


def compare(name: str, got: Tensor, want: Tensor) -> dict[str, float]:
    """The two errors of an output, as figures.

    Raises:
        WrongOutput: one of them is not below the limit of its dtype, or not a number.
    """
    limit_l2, limit_max = LIMITS[want.dtype]
    wanted = want.double()
    relative_l2 = float((got.double() - wanted).norm() / wanted.norm())
    largest = h.verify(name, got, want, limit_max)
    if not relative_l2 < limit_l2:
        raise h.WrongOutput(f"{name}: expected |diff|/|ref| < {limit_l2:g}, got {relative_l2:.3g}; nothing was timed")
    return {"relative_l2": h.rounded(relative_l2, 3), "max_error": h.rounded(largest, 3)}
