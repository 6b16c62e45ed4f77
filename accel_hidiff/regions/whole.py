"""Whole models as one region: the UNet in one topology, and a ControlNet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn

from accel_hidiff.call import CallScope, RegionCall, UNetCall
from accel_hidiff.control import DOWN, MID
from accel_hidiff.families import Family, Layout, Size, skip_sizes, window_sizes
from accel_hidiff.regions.base import BATCH, LATENT_SIDE, Axes, Forward, GraphModule, Region, Share, Sizes, scalar
from accel_hidiff.regions.ends import added_shapes, takes_added
from accel_hidiff.schedule import LATENT_CELL
from accel_hidiff.shifts import ShiftLayout
from accel_hidiff.topology import Topology
from accel_hidiff.windows import make_window_tables
from compile_cache import Range

_IMAGE_AXES = {0: "batch", 2: "height", 3: "width"}
_BATCH_AXES = {0: "batch"}


class _Whole(Region):
    """What a UNet and a ControlNet share: latents, a timestep, text, and SDXL's added conditions."""

    @property
    def channels(self) -> int:
        return int(self.module.config.in_channels)

    @property
    def width(self) -> int:
        # A gated activation has eight times the channels of its level, and each level a quarter of the cells.
        return 8 * int(self.module.config.block_out_channels[0])

    @property
    def _added(self) -> bool:
        return takes_added(self.module)

    def _common_axes(self) -> Axes:
        added: Axes = (_BATCH_AXES, _BATCH_AXES) if self._added else ()
        return (_IMAGE_AXES, {}, _BATCH_AXES, *added)

    def _common_example(self, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        config, batch = self.module.config, sizes["batch"]
        options: Any = {"dtype": dtype, "device": device}
        text = torch.randn(batch, sizes["tokens"], config.encoder_hid_dim or config.cross_attention_dim, **options)
        common = self.image(sizes, dtype, device), torch.tensor(500.0, device=device), text
        if not self._added:
            return common
        return *common, *(torch.randn(shape, **options) for shape in added_shapes(config, batch).values())

    def _common_inputs(self, sample: Tensor, timestep: Any, text: Tensor, kwargs: Mapping[str, Any]) -> list[Tensor]:
        time = scalar(timestep, sample.device, torch.float32)
        if not self._added:
            return [sample, time, text]
        added = kwargs["added_cond_kwargs"]
        return [sample, time, text, added["text_embeds"], added["time_ids"].to(sample.dtype)]

    def _take_added(self, inputs: list[Tensor]) -> dict[str, Any]:
        """The added conditions as keyword arguments; takes them off the front of the remaining inputs."""
        if not self._added:
            return {}
        return {"added_cond_kwargs": {"text_embeds": inputs.pop(0), "time_ids": inputs.pop(0)}}

    def sizes(self, features: Mapping[str, Size], batch: int, tokens: int) -> dict[str, int]:
        height, width = features[f"{self.path}.down_blocks.0.resnets.0"]
        return {"batch": batch, "height": height, "width": width, "tokens": tokens}


class UNetRegion(_Whole):
    """The whole UNet in one topology: (B, C, h, w) sample, 0-d float32 timestep, (B, L, D) text[, (B, T) text_embeds,
    (B, 6) time_ids][, ControlNet residuals at the sizes of the skips and of the mid block][, (K,) int64 shifts, the
    tables of the window order of each windowed transformer] -> (B, 4, h, w)."""

    kind = "unet"

    def __init__(
        self,
        path: str,
        module: UNet2DConditionModel,
        inner: Forward,
        scope: CallScope,
        shift_layout: ShiftLayout,
        family: Family,
    ) -> None:
        super().__init__(path, module, inner)
        self.scope = scope
        self._shift_layout = shift_layout
        self._family = family
        self._layout = Layout.from_config(module.config)

    def traits(self, topology: Topology, controlled: bool = False) -> dict[str, Any]:
        return {"topology": str(topology), "controlled": controlled}

    def axes(self, traits: Mapping[str, Any]) -> Axes:
        topology = Topology.parse(traits["topology"])
        if traits["controlled"] or not topology.windowed:
            return self._common_axes()
        side = 2 * LATENT_SIDE.multiple
        tables: Axes = tuple(
            {1: "batch", 2: Share("height", side // height), 3: Share("width", side // width)}
            for height, width in window_sizes(self._layout, self._family, side, side, topology)
        )
        return (*self._common_axes(), {}, *tables)

    def ranges(self, traits: Mapping[str, Any]) -> dict[str, Range]:
        # Skips have sizes of their own, halved and rounded up: with residuals every size is exact.
        return {} if traits["controlled"] else {"batch": BATCH, "height": LATENT_SIDE, "width": LATENT_SIDE}

    def example(
        self, traits: Mapping[str, Any], sizes: Sizes, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, ...]:
        inputs = [*self._common_example(sizes, dtype, device)]
        topology = Topology.parse(traits["topology"])
        if traits["controlled"]:
            skips = skip_sizes(self._layout, self._family, sizes["height"], sizes["width"], topology)
            for channels, (height, width) in zip(self._skip_channels(), [*skips, skips[-1]], strict=True):
                inputs.append(torch.randn(sizes["batch"], channels, height, width, dtype=dtype, device=device))
        if topology.windowed:
            inputs.append(torch.arange(self._shift_layout.blocks, device=device) % 4)
            found = window_sizes(self._layout, self._family, sizes["height"], sizes["width"], topology)
            inputs += [make_window_tables(sizes["batch"], *size, device) for size in found]
        return tuple(inputs)

    def _skip_channels(self) -> list[int]:
        """Channels of every skip connection, then of the mid block."""
        widths = list(self.module.config.block_out_channels)
        channels = [widths[0]]
        for level, width in enumerate(widths):
            last = level == len(widths) - 1
            channels += [width] * (self._layout.layers_per_block[level] + (not last))
        return [*channels, widths[-1]]

    def graph_module(self, traits: Mapping[str, Any]) -> nn.Module:
        topology, scope = Topology.parse(traits["topology"]), self.scope
        assert scope is not None

        def function(sample: Tensor, timestep: Tensor, text: Tensor, *others: Tensor) -> Tensor:
            rest = list(others)
            kwargs = self._take_added(rest)
            shifts: Tensor | None = None
            tables: dict[int, Tensor] = {}
            if topology.windowed:
                firsts = self._shift_layout.places
                rest, (shifts, *ordered) = rest[: -1 - len(firsts)], rest[-1 - len(firsts) :]
                tables = dict(zip(firsts, ordered, strict=True))
            if traits["controlled"]:
                kwargs |= {DOWN: tuple(rest[:-1]), MID: rest[-1]}
            with scope.opened(UNetCall(topology, shifts, tables_from=tables)):
                out: Tensor = self.inner(sample, timestep, text, return_dict=False, **kwargs)[0]
            return out

        return GraphModule(self.module, function)

    def forward_with(self, compiled: RegionCall, call: UNetCall | None, *args: Any, **kwargs: Any) -> Any:
        sample, timestep, text = args
        inputs = self._common_inputs(sample, timestep, text, kwargs)
        if kwargs.get(DOWN) is not None:
            inputs += [*kwargs[DOWN], kwargs[MID]]
        if call is not None and call.shifts is not None:
            inputs.append(call.shifts)
            height, width = sample.shape[-2:]
            found = window_sizes(self._layout, self._family, height, width, call.topology)
            where = zip(self._shift_layout.places, found, strict=True)
            inputs += [call.tables_of(first, len(sample), size, sample.device) for first, size in where]
        return compiled(*inputs)


class ControlNetRegion(_Whole):
    """A ControlNet: (B, C, h, w) sample, 0-d float32 timestep, (B, L, D) text[, (B, T) text_embeds, (B, 6) time_ids],
    (B, 3, 8h, 8w) control image, 0-d conditioning scale -> residuals of the skips, then of the mid block.

    The scale is a tensor: another one needs no other graph. Sizes are exact: all sizes of an aspect ratio run at one.
    """

    kind = "controlnet"

    def axes(self, traits: Mapping[str, Any]) -> Axes:
        return self._common_axes()

    def ranges(self, traits: Mapping[str, Any]) -> dict[str, Range]:
        return {}

    def example(
        self, traits: Mapping[str, Any], sizes: Sizes, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, ...]:
        options: Any = {"dtype": dtype, "device": device}
        channels = self.module.config.conditioning_channels
        pixels = sizes["height"] * LATENT_CELL, sizes["width"] * LATENT_CELL
        image = torch.rand(sizes["batch"], channels, *pixels, **options)
        return *self._common_example(sizes, dtype, device), image, torch.tensor(0.7, **options)

    def graph_module(self, traits: Mapping[str, Any]) -> nn.Module:
        def function(sample: Tensor, timestep: Tensor, text: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
            rest = list(others)
            kwargs = self._take_added(rest)
            image, scale = rest
            down, mid = self.inner(sample, timestep, text, image, scale, return_dict=False, **kwargs)
            return (*down, mid)

        return GraphModule(self.module, function)

    def forward_with(self, compiled: RegionCall, call: UNetCall | None, *args: Any, **kwargs: Any) -> Any:
        sample, timestep, text, image = args
        scale = scalar(kwargs.get("conditioning_scale", 1.0), sample.device, sample.dtype)
        *down, mid = compiled(*self._common_inputs(sample, timestep, text, kwargs), image, scale)
        return down, mid


def is_whole_controlnet(net: nn.Module) -> bool:
    """Whether a ControlNet can be one region; others are compiled block by block."""
    return type(net) is ControlNetModel
