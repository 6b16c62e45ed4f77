"""The model under test: SDXL's UNet and VAE in full size with random weights, or tiny ones of the same layout.

It needs no pipeline on disk, no text encoder and no tokenizer: `patch.phase` names single steps, and whole requests are
given embeddings. All UNets of a process share one set of weights, and so do all VAEs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor

from accel_hidiff.architectures import configs_of
from benchmarks import harness as h
from benchmarks.unets import SDXL_TINY

# (relative L2, max|diff| / max|ref|) that two ways of running the same graph have to stay below. Two runs in bfloat16
# differ by the order of their roundings (2^-9 each, in float16 2^-12, through some 70 transformer blocks); a wrong
# graph differs by 1.
LIMITS: Final = {torch.float32: (1e-3, 1e-3), torch.bfloat16: (5e-2, 1e-1), torch.float16: (1e-2, 5e-2)}
ARCHITECTURE: Final = "arch:sdxl"


def model_name(tiny: bool) -> str:
    """What is written down as the model."""
    return f"{'tiny models of SDXL' if tiny else 'SDXL'}'s layout, random weights, seed 0"


def make_unet(tiny: bool, device: torch.device, dtype: torch.dtype) -> UNet2DConditionModel:
    """A UNet with random weights from a fixed seed, in channels_last."""
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(**(SDXL_TINY if tiny else _config("unet")))
    return unet.to(dtype=dtype, memory_format=torch.channels_last).eval().requires_grad_(False)


def make_vae(tiny: bool, device: torch.device, dtype: torch.dtype) -> AutoencoderKL:
    """A VAE with random weights from a fixed seed, in channels_last."""
    config = _config("vae")
    if tiny:
        config |= {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        vae = AutoencoderKL(**config)
    return vae.to(dtype=dtype, memory_format=torch.channels_last).eval().requires_grad_(False)


def _config(part: str) -> dict[str, Any]:
    """The published config of a part of the architecture, as its class takes it."""
    config = json.loads((Path(configs_of(ARCHITECTURE, part)) / "config.json").read_text(encoding="utf-8"))
    return {name: value for name, value in config.items() if not name.startswith("_")}


def twin(model: Any) -> Any:
    """Another UNet or VAE over the same weights."""
    with torch.device("meta"):
        other = type(model).from_config(model.config)
    other.load_state_dict(model.state_dict(), assign=True)
    return other.eval().requires_grad_(False)


def pipeline_of(unet: UNet2DConditionModel, vae: AutoencoderKL) -> StableDiffusionXLPipeline:
    """A pipeline without text encoders, silent."""
    parts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    scheduler = EulerDiscreteScheduler.from_pretrained(configs_of(ARCHITECTURE), subfolder="scheduler")
    pipe = StableDiffusionXLPipeline(vae=vae, unet=unet, scheduler=scheduler, add_watermarker=False, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inputs_of(unet: UNet2DConditionModel, size: h.Size) -> h.UNetInputs:
    """A call's inputs, batch 2, the sample in channels_last as the UNet's weights are."""
    given = h.unet_inputs(unet, size)
    return given._replace(sample=given.sample.contiguous(memory_format=torch.channels_last))


def weights_mb(unet: UNet2DConditionModel) -> float:
    """Megabytes (10^6 bytes) of the weights."""
    return h.rounded(sum(parameter.nbytes for parameter in unet.parameters()) / 1e6)


def relative_l2(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|, in the L2 norm."""
    wanted = want.double()
    return float((got.double() - wanted).norm() / wanted.norm())


def compare(name: str, got: Tensor, want: Tensor) -> dict[str, float]:
    """The two errors of an output, as figures.

    Raises:
        WrongOutput: one of them is not below the limit of its dtype, or not a number.
    """
    limit_l2, limit_max = LIMITS[want.dtype]
    apart = relative_l2(got, want)
    largest = h.verify(name, got, want, limit_max)
    if not apart < limit_l2:
        raise h.WrongOutput(f"{name}: expected |diff|/|ref| < {limit_l2:g}, got {apart:.3g}; nothing was timed")
    return {"relative_l2": h.rounded(apart, 3), "max_error": h.rounded(largest, 3)}
