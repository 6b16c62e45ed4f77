"""Regions: submodules compiled as one unit, and everything a backend must know to export one."""

from __future__ import annotations

from accel_hidiff.regions.base import (
    Region,
    RegionGraph,
    Share,
    Sizes,
    bucket_of,
    example_sizes,
    memory_format_of,
)
from accel_hidiff.regions.blocks import DecoderRegion, ResnetRegion, TransformerRegion, find_blocks
from accel_hidiff.regions.whole import ControlNetRegion, UNetRegion, is_whole_controlnet

__all__ = [
    "ControlNetRegion",
    "DecoderRegion",
    "Region",
    "RegionGraph",
    "ResnetRegion",
    "Share",
    "Sizes",
    "TransformerRegion",
    "UNetRegion",
    "bucket_of",
    "example_sizes",
    "find_blocks",
    "is_whole_controlnet",
    "memory_format_of",
]
