"""The two ends of a UNet: what comes before its first block, and after its last one.

Neither is one module of diffusers, so each is put together here of the UNet's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from accel_hidiff.families import Size
from accel_hidiff.regions.base import (
    BATCH,
    SIDE,
    TOKENS,
    Axes,
    GraphModule,
    ImageGraphModule,
    Region,
    Sizes,
    conv_channels,
)
from compile_cache import Range

TIME_IDS = 6  # original size, crop, target size (SDXL, arXiv 2307.01952, section 2.2)
_IMAGE: dict[int, str] = {0: "batch", 2: "height", 3: "width"}
_BATCH: dict[int, str] = {0: "batch"}


class _Part(nn.Module):
    """A part of a UNet, over modules of its own."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.training = unet.training  # its modules have theirs


class Head(_Part):
    """The first convolution, the embedding of time and of SDXL's added conditions, and the projection of the text
    where there is one (Kolors)."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__(unet)
        self.conv_in = unet.conv_in
        self.time_proj = unet.time_proj
        self.time_embedding = unet.time_embedding
        self.add_time_proj: Any = unet.add_time_proj if takes_added(unet) else None
        self.add_embedding: Any = unet.add_embedding if takes_added(unet) else None
        self.text_proj: Any = unet.encoder_hid_proj

    def forward(self, sample: Tensor, timestep: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """(image, embedding[, text]) of (sample, 0-d float32 timestep[, text_embeds, time_ids][, text])."""
        batch, rest = sample.shape[0], list(others)
        embedding = self.time_embedding(self.time_proj(timestep.expand(batch)).to(sample.dtype))
        if self.add_embedding is not None:
            text_embeds, time_ids = rest.pop(0), rest.pop(0)
            ids = self.add_time_proj(time_ids.flatten()).reshape(batch, -1)
            embedding = embedding + self.add_embedding(torch.cat([text_embeds, ids], dim=-1).to(embedding.dtype))
        projected = [] if self.text_proj is None else [self.text_proj(rest.pop(0))]
        return self.conv_in(sample), embedding, *projected


class Tail(_Part):
    """The last norm, activation and convolution."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__(unet)
        self.conv_norm_out: Any = unet.conv_norm_out
        self.conv_act: Any = unet.conv_act
        self.conv_out: Any = unet.conv_out

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 4, h, w)."""
        return self.conv_out(self.conv_act(self.conv_norm_out(image)))


def added_shapes(config: Any, batch: int) -> dict[str, tuple[int, int]]:
    """The shapes of SDXL's added conditions by name."""
    width = config.projection_class_embeddings_input_dim - TIME_IDS * config.addition_time_embed_dim
    return {"text_embeds": (batch, width), "time_ids": (batch, TIME_IDS)}


def takes_added(unet: UNet2DConditionModel) -> bool:
    """Whether a UNet has SDXL's added conditions."""
    return unet.config.addition_embed_type == "text_time"


class _End(Region):
    """What both have in common: they are put together anew when a part of the UNet was replaced."""

    _made_of: type[Head] | type[Tail]

    def __init__(self, path: str, unet: UNet2DConditionModel, features_of: str) -> None:
        module = self._made_of(unet)
        super().__init__(path, module, module.forward, unet)
        self._features_of = features_of  # the path of a block whose feature map has the latents' size

    def forget(self) -> None:
        super().forget()
        self.module = self._made_of(self._model)
        self.inner = self.module.forward

    def sizes(self, features: Mapping[str, Size], batch: int, tokens: int) -> dict[str, int]:
        height, width = features[self._features_of]
        return {"batch": batch, "height": height, "width": width}


class HeadRegion(_End):
    """(B, 4, h, w) sample, 0-d float32 timestep[, (B, T) text_embeds, (B, 6) time_ids][, (B, L, D) text] ->
    (B, C, h, w) image, (B, E) embedding[, (B, L, D') text]."""

    kind = "head"
    _made_of = Head

    @property
    def channels(self) -> int:
        return conv_channels(self.module.conv_in)[0]

    @property
    def width(self) -> int:
        return max(conv_channels(self.module.conv_in))

    @property
    def projects_text(self) -> bool:
        """Whether the text is one of its inputs, and what becomes of it one of its outputs."""
        return self.module.text_proj is not None

    @property
    def takes_added(self) -> bool:
        """Whether SDXL's added conditions are among its inputs."""
        return self.module.add_embedding is not None

    def sizes(self, features: Mapping[str, Size], batch: int, tokens: int) -> dict[str, int]:
        return {**super().sizes(features, batch, tokens), **({"tokens": tokens} if self.projects_text else {})}

    def ranges(self, traits: Mapping[str, Any]) -> dict[str, Range]:
        return {"batch": BATCH, "height": SIDE, "width": SIDE, "tokens": TOKENS}

    def axes(self, traits: Mapping[str, Any]) -> Axes:
        added: Axes = (_BATCH, _BATCH) if self.takes_added else ()
        return (_IMAGE, {}, *added, *([{0: "batch", 1: "tokens"}] if self.projects_text else []))

    def example(
        self, traits: Mapping[str, Any], sizes: Sizes, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, ...]:
        options: Any = {"dtype": dtype, "device": device}
        config: Any = self._model.config
        inputs = [self.image(sizes, dtype, device), torch.tensor(500.0, device=device)]
        if self.takes_added:
            inputs += [torch.randn(shape, **options) for shape in added_shapes(config, sizes["batch"]).values()]
        if self.projects_text:
            inputs.append(torch.randn(sizes["batch"], sizes["tokens"], config.encoder_hid_dim, **options))
        return tuple(inputs)

    def graph_module(self, traits: Mapping[str, Any]) -> nn.Module:
        def function(*inputs: Tensor) -> tuple[Tensor, ...]:
            image, *rest = self.inner(*inputs)
            return image.contiguous(memory_format=self.memory_format), *rest

        return GraphModule(self.module, function)


class TailRegion(_End):
    """(B, C, h, w) image -> (B, 4, h, w) prediction."""

    kind = "tail"
    _made_of = Tail

    @property
    def channels(self) -> int:
        return conv_channels(self.module.conv_out)[0]

    def axes(self, traits: Mapping[str, Any]) -> Axes:
        return (_IMAGE,)

    def example(
        self, traits: Mapping[str, Any], sizes: Sizes, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, ...]:
        return (self.image(sizes, dtype, device),)

    def graph_module(self, traits: Mapping[str, Any]) -> nn.Module:
        return ImageGraphModule(self.module, self.inner, self.memory_format)
