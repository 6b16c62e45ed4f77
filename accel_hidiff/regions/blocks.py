"""The repeated blocks of a UNet or ControlNet, and the VAE decoder.

`ResnetBlock2D` and `Transformer2DModel` repeat with image-shaped inputs, so their height and width are visible to
window attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from accel_hidiff.call import CallScope, RegionCall, UNetCall
from accel_hidiff.families import Size
from accel_hidiff.regions.base import BATCH, EVEN_SIDE, SIDE, TOKENS, Axes, Forward, GraphModule, Region, Sizes
from accel_hidiff.topology import Topology
from compile_cache import Range


class ResnetRegion(Region):
    """`ResnetBlock2D`: (B, C, h, w), (B, T) -> (B, C', h, w)."""

    kind = "resnet"

    def axes(self, traits: Mapping[str, Any]) -> Axes:
        return ({0: "batch", 2: "height", 3: "width"}, {0: "batch"})

    def example(
        self, traits: Mapping[str, Any], sizes: Sizes, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, ...]:
        image = self.image(sizes, dtype, device)
        embedding = self.module.time_emb_proj.in_features
        return image, torch.randn(sizes["batch"], embedding, dtype=dtype, device=device)

    def graph_module(self, traits: Mapping[str, Any]) -> nn.Module:
        return GraphModule(self.module, self.inner)

    def forward_with(self, compiled: RegionCall, call: UNetCall | None, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 2 or kwargs or args[1] is None:
            return self.inner(*args, **kwargs)
        return compiled(*args)


class TransformerRegion(Region):
    """`Transformer2DModel`: (B, C, h, w), (B, L, D) -> (B, C, h, w); windowed with (n,) int64 shifts as third input."""

    kind = "transformer"

    def __init__(
        self, path: str, module: nn.Module, inner: Forward, scope: CallScope, window_index: int | None
    ) -> None:
        super().__init__(path, module, inner)
        self.scope = scope
        self._window_index = window_index  # number of its first windowed block among all, None: never windowed
        self._blocks = len(self.module.transformer_blocks)

    def traits(self, topology: Topology, controlled: bool = False) -> dict[str, Any]:
        return {"windowed": topology.windowed and self._window_index is not None}

    def axes(self, traits: Mapping[str, Any]) -> Axes:
        return ({0: "batch", 2: "height", 3: "width"}, {0: "batch", 1: "tokens"})

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
        return (image, text, torch.arange(self._blocks, device=device) % 4) if traits["windowed"] else (image, text)

    def graph_module(self, traits: Mapping[str, Any]) -> nn.Module:
        topology, scope = Topology(windowed=traits["windowed"]), self.scope
        first = self._window_index or 0
        assert scope is not None

        def function(image: Tensor, text: Tensor, shifts: Tensor | None = None) -> Tensor:
            with scope.opened(UNetCall(topology, shifts, first_shift=first)):
                out: Tensor = self.inner(image, encoder_hidden_states=text, return_dict=False)[0]
            return out

        return GraphModule(self.module, function)

    def forward_with(self, compiled: RegionCall, call: UNetCall | None, *args: Any, **kwargs: Any) -> Any:
        text = kwargs.pop("encoder_hidden_states", None)
        as_tuple = not kwargs.pop("return_dict", True)
        if len(args) != 1 or text is None or not as_tuple or any(value is not None for value in kwargs.values()):
            return self.inner(*args, encoder_hidden_states=text, return_dict=not as_tuple, **kwargs)
        if self._window_index is None or call is None or call.shifts is None:
            return (compiled(args[0], text),)
        return (compiled(args[0], text, call.shifts_of(self._window_index, self._blocks)),)


class DecoderRegion(Region):
    """The VAE's decoder: (B, 4, h, w) -> (B, 3, 8h, 8w)."""

    kind = "decoder"

    def axes(self, traits: Mapping[str, Any]) -> Axes:
        return ({0: "batch", 2: "height", 3: "width"},)

    @property
    def channels(self) -> int:
        return int(self.module.conv_in.in_channels)

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


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The repeated blocks of a UNet or ControlNet, by path, in the order of its module tree."""
    repeated = ResnetBlock2D | Transformer2DModel
    return [(path, module) for path, module in model.named_modules() if isinstance(module, repeated)]
