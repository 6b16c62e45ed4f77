"""Models of the scenarios: stock diffusers pipelines with random weights, saved as ordinary folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers import UNet2DConditionModel as UNet

from accel_hidiff.demo import build_pipeline, tiny_config
from benchmarks.unets import SD15, SD15_TINY, SDXL

_BETAS: Final = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
NAMES: Final = ("sdxl-tiny", "sd15-tiny", "sdxl", "sd15")


def save(name: str, folder: Path, dtype: str = "float32") -> Path:
    """Makes a model of `NAMES` and saves it; the full-size ones have a UNet and a small VAE, and no text encoders.

    Args:
        name: the published layout in its published size, or with "-tiny" at 16 channels, all parts with it.
        folder: to write.
        dtype: of the weights, its name.

    Returns:
        The folder.
    """
    pipe = {"sdxl-tiny": _sdxl_tiny, "sd15-tiny": _sd15_tiny, "sdxl": _sdxl, "sd15": _sd15}[name]()
    pipe.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def _sdxl_tiny() -> Any:
    return build_pipeline(config=tiny_config())


def _sd15_tiny() -> Any:
    like = _sdxl_tiny()
    return _sd15_of(_unet(SD15_TINY), like.vae, like.text_encoder, like.tokenizer)


def _sd15() -> Any:
    return _sd15_of(_unet(SD15), _small_vae(), None, None)


def _sdxl() -> Any:
    absent = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    scheduler = DDIMScheduler(**_BETAS, clip_sample=False, set_alpha_to_one=False)
    return StableDiffusionXLPipeline(
        vae=_small_vae(), unet=_unet(SDXL), scheduler=scheduler, add_watermarker=False, **absent
    )


def _sd15_of(unet: Any, vae: Any, text_encoder: Any, tokenizer: Any) -> Any:
    scheduler = DDIMScheduler(**_BETAS, clip_sample=False, set_alpha_to_one=False)
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _unet(config: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return UNet(**config).eval()


def _small_vae() -> Any:
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        norm_num_groups=4,
        force_upcast=False,
    ).eval()
