"""What changes the size of a feature map between two levels of a UNet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.downsampling import Downsample2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from accel_hidiff.families import Size, upsampled
from accel_hidiff.forwards import every_other
from accel_hidiff.regions.base import BATCH, SIDE, Axes, Forward, ImageGraphModule, Region, Sizes
from accel_hidiff.topology import Topology
from compile_cache import Range


class _Sampler(Region):
    """What both have in common: one image in, one out."""

    @property
    def channels(self) -> int:
        return int(self.module.channels)

    def axes(self, traits: Mapping[str, Any]) -> Axes:
        return ({0: "batch", 2: "height", 3: "width"},)

    def example(
        self, traits: Mapping[str, Any], sizes: Sizes, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, ...]:
        return (self.image(sizes, dtype, device),)


class DownsamplerRegion(_Sampler):
    """`Downsample2D` by a convolution: (B, C, h, w) -> (B, C', h / 2, w / 2), rounded up; a quarter where it is
    dilated.

    Args:
        path, module, inner, model: see `Region`.
        can_dilate: whether a dilated topology dilates it.
    """

    kind = "downsampler"

    def __init__(self, path: str, module: nn.Module, inner: Forward, model: nn.Module, can_dilate: bool) -> None:
        super().__init__(path, module, inner, model)
        self._can_dilate = can_dilate

    @property
    def width(self) -> int:
        return max(self.channels, int(self.module.out_channels))

    def traits(self, topology: Topology, controlled: bool = False) -> dict[str, Any]:
        return {"dilated": topology.dilated and self._can_dilate}

    def ranges(self, traits: Mapping[str, Any]) -> dict[str, Range]:
        # A side of 1 is no symbolic one, neither before nor after; half of an odd side is none for torch 2.11's export.
        side = Range(6, SIDE.maximum, 2) if traits["dilated"] else Range(3, SIDE.maximum)
        return {"batch": BATCH, "height": side, "width": side}

    def graph_module(self, traits: Mapping[str, Any]) -> nn.Module:
        def dilated(image: Tensor) -> Any:
            return self.inner(every_other(image))

        return ImageGraphModule(self.module, dilated if traits["dilated"] else self.inner, self.memory_format)

    @staticmethod
    def takes(module: nn.Module) -> bool:
        """Whether a module is one."""
        return type(module) is Downsample2D and bool(module.use_conv)


def enlarged(image: Tensor, factor: int, memory_format: torch.memory_format) -> Tensor:
    """Each cell of an image `factor` times in both directions, by whole numbers: nearest neighbours."""
    if memory_format != torch.channels_last:
        return F.interpolate(image, scale_factor=float(factor), mode="nearest")
    rows, columns = (
        torch.arange(factor * side, dtype=torch.int32, device=image.device) // factor for side in image.shape[2:]
    )
    return image.permute(0, 2, 3, 1).index_select(1, rows).index_select(2, columns).permute(0, 3, 1, 2)


class UpsamplerRegion(_Sampler):
    """`Upsample2D` by nearest neighbours and a convolution, whole times as large: (B, C, h, w) -> (B, C', f h, f w).

    Args:
        path, module, inner, model: see `Region`.
        factor: f in a topology.
    """

    kind = "upsampler"

    def __init__(
        self, path: str, module: nn.Module, inner: Forward, model: nn.Module, factor: Callable[[Topology], int]
    ) -> None:
        super().__init__(path, module, inner, model)
        self._factor = factor

    @property
    def width(self) -> int:
        return max(self.channels, int(self.module.out_channels))

    def largest(self, sizes: Sizes, traits: Mapping[str, Any]) -> int:
        factor: int = traits["factor"]
        return super().largest(sizes, traits) * factor**2

    def traits(self, topology: Topology, controlled: bool = False) -> dict[str, Any]:
        return {"factor": self._factor(topology)}

    def serves(self, features: Mapping[str, Size], topology: Topology) -> bool:
        model, _, below = self.path.partition(".")
        height, width = features[self.path]
        factor = self._factor(topology)
        return features[f"{model}.{upsampled(below)}"] == (factor * height, factor * width)

    def graph_module(self, traits: Mapping[str, Any]) -> nn.Module:
        factor, memory_format = traits["factor"], self.memory_format

        def function(image: Tensor) -> Any:
            return self.module.conv(enlarged(image, factor, memory_format))

        return ImageGraphModule(self.module, function, self.memory_format)

    @staticmethod
    def takes(module: nn.Module) -> bool:
        """Whether a module is one."""
        if type(module) is not Upsample2D or module.norm is not None or module.use_conv_transpose:
            return False
        return bool(module.use_conv and module.interpolate and module.name == "conv")
