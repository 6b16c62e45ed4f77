"""Inputs of one UNet call, the same in every process."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from accel_hidiff.errors import BadInput
from accel_hidiff.schedule import LATENT_CELL

_TIMESTEP: Final = 500
_TOKENS: Final = 77  # of CLIP


@dataclass(frozen=True)
class UNetInputs:
    """Arguments of one UNet call.

    Attributes:
        sample: (B, C, H/8, W/8).
        timestep: ().
        text: (B, 77, D).
        added: SDXL's conditions: text_embeds (B, E), time_ids (B, 6); empty for a UNet without them.
    """

    sample: Tensor
    timestep: Tensor
    text: Tensor
    added: dict[str, Tensor] = field(default_factory=dict)

    def call(self, unet: Any) -> Tensor:
        """Runs the UNet; (B, C, H/8, W/8)."""
        more = {"added_cond_kwargs": self.added} if self.added else {}
        out: Tensor = unet(self.sample, self.timestep, self.text, return_dict=False, **more)[0]
        return out


def unet_inputs(unet: Any, height: int, width: int, batch: int) -> UNetInputs:
    """Random inputs from a fixed seed, on the UNet's device and in its dtype.

    Args:
        unet: a `UNet2DConditionModel`.
        height, width: of the image, in pixels.
        batch: of the call, guidance counted.

    Raises:
        BadInput: the UNet takes conditions other than text and SDXL's.
    """
    config, generator = unet.config, torch.Generator().manual_seed(width * 100_000 + height)

    def placed(tensor: Tensor) -> Tensor:
        return tensor.to(device=unet.device, dtype=unet.dtype)

    def randn(*shape: int) -> Tensor:
        return placed(torch.randn(*shape, generator=generator))

    sample = randn(batch, config.in_channels, height // LATENT_CELL, width // LATENT_CELL)
    projected = getattr(config, "encoder_hid_dim_type", None) == "text_proj"
    text = randn(batch, _TOKENS, config.encoder_hid_dim if projected else _one(config.cross_attention_dim))
    timestep = torch.tensor(_TIMESTEP, device=unet.device)
    if config.addition_embed_type is None:
        return UNetInputs(sample, timestep, text)
    if config.addition_embed_type != "text_time":
        raise BadInput(
            "model: expected a UNet that takes text alone, or SDXL's conditions with it, got addition_embed_type "
            f"{config.addition_embed_type!r}"
        )
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    time_ids = torch.tensor([[height, width, 0, 0, height, width]]).repeat(batch, 1)
    return UNetInputs(sample, timestep, text, {"text_embeds": randn(batch, pooled), "time_ids": placed(time_ids)})


def _one(width: Any) -> int:
    """The width of the text, which a config may give for each level."""
    return int(width[0] if isinstance(width, list | tuple) else width)
