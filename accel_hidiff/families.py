"""Families: the UNet layouts that HiDiffusion knows, where its parts sit in them, and every feature size. No torch.

Sizes here are latent or feature sizes (height, width), never pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from accel_hidiff.config import FAMILIES, check_choice
from accel_hidiff.errors import UnknownLayout
from accel_hidiff.topology import Topology

Size = tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """The facts of a UNet2DConditionModel's config that decide its family and its feature sizes."""

    down_block_types: tuple[str, ...]
    up_block_types: tuple[str, ...]
    layers_per_block: tuple[int, ...]
    in_channels: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Layout:
        """From `unet.config`, or a ControlNet's, which has no up blocks."""
        down = tuple(config["down_block_types"])
        layers = config["layers_per_block"]
        per_block = (layers,) * len(down) if isinstance(layers, int) else tuple(layers)
        return cls(down, tuple(config.get("up_block_types", ())), per_block, int(config["in_channels"]))


@dataclass(frozen=True)
class Family:
    """Where RAU-Net and MSW-MSA sit in one UNet layout (module paths).

    `control_side` is the longer latent side at which ControlNets of this layout were trained and are run.
    """

    name: str
    down_block_types: tuple[str, ...]
    up_block_types: tuple[str, ...]
    windowed_levels: tuple[str, ...]
    pool_after: str
    resize_after: str
    dilate: str
    control_side: int

    def layout(self, in_channels: int = 4) -> Layout:
        """The layout of an ordinary UNet of this family."""
        layers = (2,) * len(self.down_block_types)
        return Layout(self.down_block_types, self.up_block_types, layers, in_channels)

    def fits(self, layout: Layout) -> bool:
        """True if the layout has this family's block types."""
        return (layout.down_block_types, layout.up_block_types) == (self.down_block_types, self.up_block_types)


_CROSS_DOWN, _CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
SD15 = Family(
    name="sd15",
    down_block_types=(_CROSS_DOWN, _CROSS_DOWN, _CROSS_DOWN, "DownBlock2D"),
    up_block_types=("UpBlock2D", _CROSS_UP, _CROSS_UP, _CROSS_UP),
    windowed_levels=("down_blocks.0", "up_blocks.3"),
    pool_after="down_blocks.1.attentions.0",
    resize_after="up_blocks.2.attentions.1",
    dilate="down_blocks.0.downsamplers.0",
    control_side=64,
)
SDXL = Family(
    name="sdxl",
    down_block_types=("DownBlock2D", _CROSS_DOWN, _CROSS_DOWN),
    up_block_types=(_CROSS_UP, _CROSS_UP, "UpBlock2D"),
    windowed_levels=("down_blocks.1", "up_blocks.1"),
    pool_after="down_blocks.1.attentions.0",
    resize_after="up_blocks.1.attentions.1",
    dilate="down_blocks.1.downsamplers.0",
    control_side=128,
)
SDXL_TURBO = Family(**{**vars(SDXL), "name": "sdxl_turbo"})
BY_NAME = {family.name: family for family in (SD15, SDXL, SDXL_TURBO)}


def identify(layout: Layout, family: str | None = None) -> Family:
    """The family of a layout: told from the block types, or the one named, if it fits.

    SDXL-Turbo has SDXL's structure and must be named, or told from its pipeline (`accel_hidiff.recognize`).

    Raises:
        UnknownLayout: with what was looked for and what was found.
    """
    if family is not None:
        check_choice("family", family, FAMILIES)
    candidates = (SD15, SDXL) if family is None else (BY_NAME[family],)
    for candidate in candidates:
        if candidate.fits(layout) and set(layout.layers_per_block) == {2}:
            return candidate
    wanted = "; or ".join(f"{c.name}: {_blocks(c)} with 2 layers per block" for c in candidates)
    raise UnknownLayout(
        f"the UNet fits no known family: expected {wanted}; got {_blocks(layout)} with {layout.layers_per_block} "
        "layers per block; HiDiffusion is defined for the families listed only"
    )


def _blocks(layout: Layout | Family) -> str:
    return f"down {', '.join(layout.down_block_types)}, up {', '.join(layout.up_block_types)}"


def _halved(size: Size, times: int = 1) -> Size:
    factor = 2**times
    return -(-size[0] // factor), -(-size[1] // factor)


def feature_sizes(layout: Layout, family: Family, height: int, width: int, topology: Topology) -> dict[str, Size]:
    """The (height, width) at which each resnet and transformer of the UNet runs, by module path.

    Keys also include the output of every down and up block (`down_blocks.0`, ...) and `mid_block`. The pure
    counterpart of a UNet forward: skips included, upsamplers take their size from the next skip.

    Args:
        height, width: latent size, at least 1.
        topology: pooled and dilated move sizes, windowed does not.
    """
    return dict(_walked("module", layout, family, height, width, topology))


@lru_cache(maxsize=256)
def window_sizes(layout: Layout, family: Family, height: int, width: int, topology: Topology) -> tuple[Size, ...]:
    """The (height, width) of the feature map of each windowed transformer, in call order; asked for at every call."""
    levels = tuple(f"{level}.attentions." for level in family.windowed_levels)
    features = feature_sizes(layout, family, height, width, topology)
    return tuple(size for path, size in features.items() if path.startswith(levels))


def skip_sizes(layout: Layout, family: Family, height: int, width: int, topology: Topology) -> list[Size]:
    """The (height, width) of every skip connection, in the order in which the down path stores them."""
    return [size for _, size in _walked("skip", layout, family, height, width, topology)]


def sampler_sizes(layout: Layout, family: Family, height: int, width: int, topology: Topology) -> dict[str, Size]:
    """The (height, width) of what each down- and upsampler is given, by module path."""
    return dict(_walked("sampler", layout, family, height, width, topology))


@lru_cache(maxsize=64)
def upsampling(layout: Layout, family: Family, topology: Topology) -> Mapping[str, int]:
    """How many times as large each upsampler makes a side that every downsampler divides evenly, by module path."""
    side = 4 << len(layout.down_block_types)  # a dilated downsampler and a pool divide it twice more
    features = feature_sizes(layout, family, side, side, topology)
    given = sampler_sizes(layout, family, side, side, topology)
    return {path: features[upsampled(path)][0] // size[0] for path, size in given.items() if "upsamplers" in path}


def upsampled(path: str) -> str:
    """The path of the residual block that takes what an upsampler gives."""
    _, level, *_ = path.split(".")
    return f"up_blocks.{int(level) + 1}.resnets.0"


def adapter_sizes(layout: Layout, family: Family, height: int, width: int, topology: Topology) -> list[Size]:
    """The (height, width) of the feature maps that T2I-Adapter features are added to: one in each down block (before
    its downsampler where it has attention, after it elsewhere), then the mid block."""
    return [size for _, size in _walked("adapter", layout, family, height, width, topology)]


def _walked(
    kind: str, layout: Layout, family: Family, height: int, width: int, topology: Topology
) -> Iterator[tuple[str, Size]]:
    walk = _walk(layout, family, (height, width), topology)
    return ((path, size) for found, path, size in walk if found == kind)


def _walk(layout: Layout, family: Family, size: Size, topology: Topology) -> Iterator[tuple[str, str, Size]]:
    """(kind, module path, size): the kinds are "module", "skip", "adapter" and "sampler"."""
    skips = [size]
    before_pool = size
    yield "skip", "conv_in", size
    for level, kind in enumerate(layout.down_block_types):
        block = f"down_blocks.{level}"
        for layer in range(layout.layers_per_block[level]):
            yield "module", f"{block}.resnets.{layer}", size
            if "CrossAttn" in kind:
                yield "module", f"{block}.attentions.{layer}", size
            if topology.pooled and f"{block}.attentions.{layer}" == family.pool_after:
                before_pool, size = size, _halved(size)
            yield "skip", f"{block}.resnets.{layer}", size
            skips.append(size)
        if "CrossAttn" in kind:
            yield "adapter", block, size
        if level < len(layout.down_block_types) - 1:
            sampler = f"{block}.downsamplers.0"
            yield "sampler", sampler, size
            size = _halved(size, 2 if topology.dilated and sampler == family.dilate else 1)
            yield "skip", sampler, size
            skips.append(size)
        if "CrossAttn" not in kind:
            yield "adapter", block, size
        yield "module", block, size
    for path in ("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1", "mid_block"):
        yield "module", path, size
    yield "adapter", "mid_block", size
    for level, kind in enumerate(layout.up_block_types):
        block = f"up_blocks.{level}"
        for layer in range(layout.layers_per_block[-1 - level] + 1):
            skips.pop()
            yield "module", f"{block}.resnets.{layer}", size
            if "CrossAttn" in kind:
                yield "module", f"{block}.attentions.{layer}", size
            if topology.pooled and f"{block}.attentions.{layer}" == family.resize_after:
                size = before_pool
        if level < len(layout.up_block_types) - 1:
            yield "sampler", f"{block}.upsamplers.0", size
            size = skips[-1]
        yield "module", block, size
