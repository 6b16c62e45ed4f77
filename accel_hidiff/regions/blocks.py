"""The repeated blocks of a UNet or ControlNet, and the VAE decoder.

`ResnetBlock2D` and `Transformer2DModel` repeat with image-shaped inputs, so their height and width are visible to
window attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from accel_hidiff.call import CallScope, RegionCall, UNetCall
from accel_hidiff.families import Size
from accel_hidiff.forms import in_parts, rows_of_parts
from accel_hidiff.regions.base import (
    BATCH,
    DECODED_SIDE,
    EVEN_SIDE,
    SIDE,
    TOKENS,
    Axes,
    Forward,
    GraphModule,
    ImageGraphModule,
    Region,
    Share,
    Sizes,
    conv_channels,
)
from accel_hidiff.topology import Topology
from accel_hidiff.windows import make_window_tables
from compile_cache import Range


class ResnetRegion(Region):
    """`ResnetBlock2D`: (B, C, h, w), (B, T) -> (B, C', h, w).

    In the up path with the skip connection as its second input, (B, S, h, w): the module's forward takes both beside
    each other, (B, C + S, h, w), which nobody writes to memory before.

    Args:
        path, module, inner, model: see `Region`.
        skip_channels: S; 0: it has no such input.
    """

    kind = "resnet"

    def __init__(
        self, path: str, module: nn.Module, inner: Forward, model: nn.Module | None = None, skip_channels: int = 0
    ) -> None:
        super().__init__(path, module, inner, model)
        self._skip_channels = skip_channels

    @property
    def images(self) -> int:
        return 2 if self._skip_channels else 1

    @property
    def channels(self) -> int:
        return self.module_channels - self._skip_channels

    @property
    def module_channels(self) -> int:
        return int(self.module.in_channels)

    @property
    def width(self) -> int:
        return max(self.module_channels, int(self.module.out_channels))

    def traits(self, topology: Topology, controlled: bool = False) -> dict[str, Any]:
        return {"skip_channels": self._skip_channels} if self._skip_channels else {}

    def axes(self, traits: Mapping[str, Any]) -> Axes:
        return *({0: "batch", 2: "height", 3: "width"} for _ in range(self.images)), {0: "batch"}

    def example(
        self, traits: Mapping[str, Any], sizes: Sizes, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, ...]:
        channels = [self.channels, self._skip_channels][: self.images]
        images = [self.image(sizes, dtype, device, of_image) for of_image in channels]
        embedding = self.module.time_emb_proj.in_features
        return *images, torch.randn(sizes["batch"], embedding, dtype=dtype, device=device)

    def graph_module(self, traits: Mapping[str, Any]) -> nn.Module:
        def joined(image: Tensor, skip: Tensor, embedding: Tensor) -> Any:
            return self.inner(beside(image, skip, self.memory_format), embedding)

        return ImageGraphModule(self.module, joined if self._skip_channels else self.inner, self.memory_format)

    def forward_with(self, compiled: RegionCall, call: UNetCall | None, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 2 or kwargs or args[1] is None:
            return self.inner(*args, **kwargs)
        image, embedding = args
        if self._skip_channels:
            return compiled(image[:, : self.channels], image[:, self.channels :], embedding)
        return compiled(image, embedding)


def beside(image: Tensor, other: Tensor, memory_format: torch.memory_format) -> Tensor:
    """Two images of one size, channels beside channels, written as they lie in memory."""
    if memory_format != torch.channels_last:
        return torch.cat([image, other], dim=1)
    return torch.cat([image.permute(0, 2, 3, 1), other.permute(0, 2, 3, 1)], dim=3).permute(0, 3, 1, 2)


class TransformerRegion(Region):
    """`Transformer2DModel`: (B, C, h, w), (B, L, D) -> (B, C, h, w); windowed with (n,) int64 shifts and the
    (8, B, h, w) int32 tables of the window order (h and w rounded up to even ones) as third and fourth input."""

    kind = "transformer"

    def __init__(
        self,
        path: str,
        module: nn.Module,
        inner: Forward,
        model: nn.Module,
        scope: CallScope,
        window_index: int | None,
    ) -> None:
        super().__init__(path, module, inner, model)
        self.scope = scope
        self._window_index = window_index  # number of its first windowed block among all, None: never windowed
        self._blocks = len(self.module.transformer_blocks)

    @property
    def width(self) -> int:
        return max(linear.out_features for linear in self.module.modules() if isinstance(linear, nn.Linear))

    def traits(self, topology: Topology, controlled: bool = False) -> dict[str, Any]:
        return {"windowed": topology.windowed and self._window_index is not None}

    def axes(self, traits: Mapping[str, Any]) -> Axes:
        common: Axes = ({0: "batch", 2: "height", 3: "width"}, {0: "batch", 1: "tokens"})
        tables: Mapping[int, str | Share] = {1: "batch", 2: Share("height", 1), 3: Share("width", 1)}
        return (*common, {}, tables) if traits["windowed"] else common

    def sizes(self, features: Mapping[str, Size], batch: int, tokens: int) -> dict[str, int]:
        return {**super().sizes(features, batch, tokens), "tokens": tokens}

    def ranges(self, traits: Mapping[str, Any]) -> dict[str, Range]:
        side = EVEN_SIDE if traits["windowed"] else SIDE
        return {"batch": BATCH, "height": side, "width": side, "tokens": TOKENS}

    def example(
        self, traits: Mapping[str, Any], sizes: Sizes, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, ...]:
        image = self.image(sizes, dtype, device)
        channels = self.module.transformer_blocks[0].attn2.to_k.in_features
        text = torch.randn(sizes["batch"], sizes["tokens"], channels, dtype=dtype, device=device)
        if not traits["windowed"]:
            return image, text
        tables = make_window_tables(sizes["batch"], sizes["height"], sizes["width"], device)
        return image, text, torch.arange(self._blocks, device=device) % 4, tables

    def graph_module(self, traits: Mapping[str, Any]) -> nn.Module:
        topology, scope = Topology(windowed=traits["windowed"]), self.scope
        first = self._window_index or 0
        assert scope is not None

        def function(image: Tensor, text: Tensor, shifts: Tensor | None = None, tables: Tensor | None = None) -> Tensor:
            tables_from = {} if tables is None else {first: tables}
            with scope.opened(UNetCall(topology, shifts, first_shift=first, tables_from=tables_from)):
                out: Tensor = self.inner(image, encoder_hidden_states=text, return_dict=False)[0]
            return out

        return ImageGraphModule(self.module, function, self.memory_format)

    def forward_with(self, compiled: RegionCall, call: UNetCall | None, *args: Any, **kwargs: Any) -> Any:
        text = kwargs.pop("encoder_hidden_states", None)
        as_tuple = not kwargs.pop("return_dict", True)
        if len(args) != 1 or text is None or not as_tuple or any(value is not None for value in kwargs.values()):
            return self.inner(*args, encoder_hidden_states=text, return_dict=not as_tuple, **kwargs)
        if call is None:
            return (compiled(args[0], text),)
        return (self.compute(compiled, call, args[0], text),)

    def compute(self, compiled: RegionCall, call: UNetCall, image: Tensor, text: Tensor) -> Any:
        """Runs `compiled` with its inputs, those that `call` brings along included."""
        first = self._window_index
        if first is None or call.shifts is None:
            return compiled(image, text)
        tables = call.tables_of(first, image.shape[0], (image.shape[2], image.shape[3]), image.device)
        return compiled(image, text, call.shifts_of(first, self._blocks), tables)


class DecoderRegion(Region):
    """The VAE's decoder: (B, 4, h, w) -> (B, 3, 8h, 8w)."""

    kind = "decoder"

    def axes(self, traits: Mapping[str, Any]) -> Axes:
        return ({0: "batch", 2: "height", 3: "width"},)

    def ranges_on(self, device: str, traits: Mapping[str, Any]) -> dict[str, Range]:
        # A GPU decodes one image at a time (`served.ServedDecoder`): its attention has a form for one.
        return (
            {"height": DECODED_SIDE, "width": DECODED_SIDE} if device == "cuda" else super().ranges_on(device, traits)
        )

    @property
    def channels(self) -> int:
        return conv_channels(self.module.conv_in)[0]

    @property
    def width(self) -> int:
        # Each block but the last one ends with an upsampler: its output has the block's channels at twice the side.
        widths = [int(block.resnets[-1].out_channels) for block in self.module.up_blocks]
        return max(width << 2 * min(level + 1, len(widths) - 1) for level, width in enumerate(widths))

    def largest(self, sizes: Sizes, traits: Mapping[str, Any]) -> int:
        # On a GPU attention writes the scores of a part of the queries, of all tokens each.
        tokens = sizes["height"] * sizes["width"]
        scored = any(in_parts(width, tokens) for width in head_widths(self.module))
        return max(super().largest(sizes, traits), rows_of_parts(tokens)[-1] * tokens if scored else 0)

    def example(
        self, traits: Mapping[str, Any], sizes: Sizes, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, ...]:
        return (self.image(sizes, dtype, device),)

    def graph_module(self, traits: Mapping[str, Any]) -> nn.Module:
        return GraphModule(self.module, self.inner)

    def forward_with(self, compiled: RegionCall, call: UNetCall | None, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or any(value is not None for value in kwargs.values()):
            return self.inner(*args, **kwargs)
        return compiled(args[0])


def head_widths(module: nn.Module) -> list[int]:
    """Channels of a head of each attention in a module."""
    return [
        attention.inner_dim // attention.heads for attention in module.modules() if isinstance(attention, Attention)
    ]


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The repeated blocks of a UNet or ControlNet, by path, in the order of its module tree."""
    repeated = ResnetBlock2D | Transformer2DModel
    return [(path, module) for path, module in model.named_modules() if isinstance(module, repeated)]
