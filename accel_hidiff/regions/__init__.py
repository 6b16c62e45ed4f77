"""Regions: submodules compiled as one unit, and everything a backend must know to export one."""

from __future__ import annotations

from accel_hidiff.regions.base import (
    Region,
    RegionGraph,
    Share,
    Sizes,
    bucket_of,
    conv_channels,
    example_sizes,
    is_conv,
    memory_format_of,
    scalar,
)
from accel_hidiff.regions.blocks import DecoderRegion, ResnetRegion, TransformerRegion, find_blocks
from accel_hidiff.regions.ends import HeadRegion, TailRegion, added_shapes, takes_added
from accel_hidiff.regions.samplers import DownsamplerRegion, UpsamplerRegion
from accel_hidiff.regions.whole import ControlNetRegion, UNetRegion, is_whole_controlnet

__all__ = [
    "ControlNetRegion",
    "DecoderRegion",
    "DownsamplerRegion",
    "HeadRegion",
    "Region",
    "RegionGraph",
    "ResnetRegion",
    "Share",
    "Sizes",
    "TailRegion",
    "TransformerRegion",
    "UNetRegion",
    "UpsamplerRegion",
    "added_shapes",
    "bucket_of",
    "conv_channels",
    "example_sizes",
    "find_blocks",
    "is_conv",
    "is_whole_controlnet",
    "memory_format_of",
    "scalar",
    "takes_added",
]
