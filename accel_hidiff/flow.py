"""A UNet call as a list of compiled regions, called one after another in the place of diffusers' own forwards.

Between its residual blocks, transformers and samplers, a UNet of the families keeps skip connections and gives them
back, and no more: with both ends of it as regions too (`regions.ends`), nothing is left that runs eager but
HiDiffusion's pool and resize. It is told from the UNet's structure where that is as published; any other UNet, and any
call with more than the ordinary arguments, runs through diffusers' own forwards, with its regions in their places.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import (
    CrossAttnDownBlock2D,
    CrossAttnUpBlock2D,
    DownBlock2D,
    UNetMidBlock2DCrossAttn,
    UpBlock2D,
)
from torch import Tensor, nn

from accel_hidiff.call import RegionCall, UNetCall
from accel_hidiff.families import Family
from accel_hidiff.fingerprint import is_replaced
from accel_hidiff.forwards import pool, resize
from accel_hidiff.regions import (
    DownsamplerRegion,
    Region,
    UpsamplerRegion,
    added_shapes,
    conv_channels,
    is_conv,
    scalar,
    takes_added,
)

HEAD, TAIL = "head", "tail"  # below the name of the UNet, as the paths of modules are

_DOWN: Final = (DownBlock2D, CrossAttnDownBlock2D)
_UP: Final = (UpBlock2D, CrossAttnUpBlock2D)
_MID: Final = UNetMidBlock2DCrossAttn
# What these classes compute as published; one whose forward was replaced before is not among them.
_FORWARDS: Final = {
    kind: kind.forward
    for kind in (UNet2DConditionModel, *_DOWN, *_UP, _MID, ResnetBlock2D, Transformer2DModel)
    if kind.forward.__module__ == kind.__module__
}
_HOOKS: Final = ("_forward_hooks", "_forward_pre_hooks")
_FREEU: Final = ("s1", "s2", "b1", "b2")  # set by diffusers' enable_freeu


def skip_channels(unet: UNet2DConditionModel) -> dict[str, int] | None:
    """Channels of the skip connection that each residual block of the up path takes, by module path; None for a UNet
    that is not built as the published ones are."""
    if not _is_plain(unet):
        return None
    skips = [conv_channels(unet.conv_in)[1]]
    for block in unet.down_blocks:
        skips += [resnet.out_channels for resnet in block.resnets]
        skips += [sampler.out_channels for sampler in block.downsamplers or ()]
    found = {}
    for path, block in _blocks(unet, "up_blocks"):
        for index in range(len(block.resnets)):
            if not skips:
                return None
            found[f"{path}.resnets.{index}"] = skips.pop()
    return None if skips else found


def _blocks(unet: Any, kind: str) -> Iterator[tuple[str, Any]]:
    return ((f"{kind}.{level}", block) for level, block in enumerate(getattr(unet, kind)))


def _is_plain(unet: Any) -> bool:
    """Whether a UNet computes what `Flow.run` does: known blocks, and nothing between them."""
    config, down, up = unet.config, list(unet.down_blocks), list(unet.up_blocks)
    if not _is(unet, UNet2DConditionModel) or not down or not up:
        return False
    if config.center_input_sample or config.addition_embed_type not in (None, "text_time"):
        return False
    if unet.class_embedding is not None or unet.time_embed_act is not None or unet.conv_norm_out is None:
        return False
    if not (is_conv(unet.conv_in) and is_conv(unet.conv_out)):
        return False
    if unet.encoder_hid_proj is not None and config.encoder_hid_dim_type != "text_proj":
        return False
    if not _is(unet.mid_block, _MID) or len(unet.mid_block.resnets) != 2:
        return False
    samplers = [_only(block.downsamplers) for block in down[:-1]], [_only(block.upsamplers) for block in up[:-1]]
    return (
        all(_is(block, *_DOWN) for block in down)
        and all(_is(block, *_UP) for block in up)
        and all(map(_has_plain_layers, (*down, *up, unet.mid_block)))
        and all(one is not None and DownsamplerRegion.takes(one) for one in samplers[0])
        and all(one is not None and UpsamplerRegion.takes(one) for one in samplers[1])
        and not down[-1].downsamplers
        and not up[-1].upsamplers
    )


def _is(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a module is of one of these classes, and the class computes what it did when it was published."""
    kind = type(module)
    return kind in kinds and kind.forward is _FORWARDS.get(kind)


def _has_plain_layers(block: Any) -> bool:
    attentions = getattr(block, "attentions", ())
    pairs = 0 if type(block) in (DownBlock2D, UpBlock2D) else len(block.resnets) - (type(block) is _MID)
    alike = all(_is(one, ResnetBlock2D) for one in block.resnets)
    return alike and len(attentions) == pairs and all(_is(one, Transformer2DModel) for one in attentions)


def _only(modules: Any) -> Any:
    return modules[0] if modules is not None and len(modules) == 1 else None


@dataclass(frozen=True)
class Layer:
    """A residual block and the transformer after it, by the paths of their regions."""

    resnet: str
    transformer: str | None


@dataclass(frozen=True)
class Block:
    """The layers of one level, and the path of the sampler after them."""

    layers: tuple[Layer, ...]
    sampler: str | None


class Flow:
    """The regions of a UNet in the order in which a call runs them.

    Args:
        name: of the UNet, which the paths of its regions begin with.
        unet: as published (`skip_channels` gives something for it).
        regions: by path; `is_whole` tells whether there is one for every part of the UNet.
        family: where a pooled call pools and resizes.
    """

    def __init__(self, name: str, unet: UNet2DConditionModel, regions: Mapping[str, Region], family: Family) -> None:
        self._unet: Any = unet
        self._name = name
        self._regions = regions
        self._head, self._tail = f"{name}.{HEAD}", f"{name}.{TAIL}"
        self._down = [self._block(path, block, block.downsamplers) for path, block in _blocks(unet, "down_blocks")]
        self._mid = self._block("mid_block", unet.mid_block).layers
        self._up = [self._block(path, block, block.upsamplers) for path, block in _blocks(unet, "up_blocks")]
        layers = [*self._mid, *(layer for block in (*self._down, *self._up) for layer in block.layers)]
        parts = [self._head, self._tail, *(part for layer in layers for part in (layer.resnet, layer.transformer))]
        self._required = {part for part in (*parts, *(block.sampler for block in self._down)) if part is not None}
        self._optional = {block.sampler for block in self._up if block.sampler is not None}
        self._pool_after, self._resize_after = f"{name}.{family.pool_after}", f"{name}.{family.resize_after}"

    def _block(self, path: str, block: Any, samplers: Any = None) -> Block:
        layers, attentions = [], getattr(block, "attentions", ())
        for index in range(len(block.resnets)):
            transformer = f"{self._name}.{path}.attentions.{index}" if index < len(attentions) else None
            layers.append(Layer(f"{self._name}.{path}.resnets.{index}", transformer))
        kind = "downsamplers" if path.startswith("down") else "upsamplers"
        return Block(tuple(layers), f"{self._name}.{path}.{kind}.0" if samplers else None)

    @property
    def is_whole(self) -> bool:
        """Whether every part of the UNet is a region."""
        return self._required | self._optional <= self._regions.keys()

    def is_clear(self) -> bool:
        """Whether the UNet is still what it was, and nothing is to happen between its regions: no hook on a block, no
        other forward, no FreeU."""
        unet = self._unet
        if skip_channels(unet) is None:
            return False
        between = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
        if any(is_replaced(one) or any(vars(one)[hooks] for hooks in _HOOKS) for one in between):
            return False
        if any(getattr(block, name, None) for block in unet.up_blocks for name in _FREEU):
            return False
        modules = (self._required | self._optional) - {self._head, self._tail}
        return all(self._module(path) is self._regions[path].module for path in modules)

    def _module(self, path: str) -> nn.Module | None:
        try:
            module: nn.Module = self._unet.get_submodule(path.removeprefix(f"{self._name}."))
        except AttributeError:
            return None
        return module

    def inputs(self, calls: Mapping[str, RegionCall], sample: Tensor, timestep: Any, added: Any) -> list[Tensor] | None:
        """What the first region takes, text aside; None where a call is to run through diffusers' own forwards.

        Args:
            calls: what is compiled, by region path.
            sample, timestep, added: the UNet's arguments, `added` that by the name of added_cond_kwargs.
        """
        if not calls.keys() >= self._required:
            return None
        if isinstance(timestep, Tensor):
            if timestep.numel() != 1:
                return None
            timestep = timestep.reshape(())
        elif not isinstance(timestep, int | float):
            return None
        found = [sample, scalar(timestep, sample.device, torch.float32)]
        if takes_added(self._unet):
            shapes = added_shapes(self._unet.config, sample.shape[0])
            for name, shape in shapes.items():
                given = (added or {}).get(name)
                if not isinstance(given, Tensor) or given.shape != shape:
                    return None
                if (given.dtype, given.device) != (sample.dtype, sample.device):
                    return None
                found.append(given)
        return found

    def run(
        self,
        calls: Mapping[str, RegionCall],
        call: UNetCall,
        inputs: Sequence[Tensor],
        text: Tensor,
        down: Sequence[Tensor] | None = None,
        mid: Tensor | None = None,
    ) -> Tensor:
        """One call.

        Args:
            calls: what is compiled, by region path.
            call: its topology, shifts and tables.
            inputs: what `inputs` gave.
            text: (B, L, D).
            down, mid: residuals of a ControlNet: (B, C, h, w) of each skip connection and of the middle.

        Returns:
            The prediction, (B, 4, h, w).
        """
        projects = self._unet.encoder_hid_proj is not None
        image, embedding, *projected = calls[self._head](*inputs, *([text] if projects else []))
        if projects:
            (text,) = projected

        def run_layer(layer: Layer, *images: Tensor) -> Tensor:
            out: Tensor = calls[layer.resnet](*images, embedding)
            if layer.transformer is None:
                return out
            transformer: Any = self._regions[layer.transformer]
            return transformer.compute(calls[layer.transformer], call, out, text)

        skips: list[Tensor] = [image]
        before_pool: Sequence[int] | None = None
        for block in self._down:
            for layer in block.layers:
                image = run_layer(layer, image)
                if call.topology.pooled and layer.transformer == self._pool_after:
                    before_pool, image = image.shape[-2:], pool(image)
                skips.append(image)
            if block.sampler is not None:
                image = calls[block.sampler](image)
                skips.append(image)
        if down is not None:
            skips = [skip + residual for skip, residual in zip(skips, down, strict=True)]
        for layer in self._mid:
            image = run_layer(layer, image)
        if mid is not None:
            image = image + mid
        for block in self._up:
            for layer in block.layers:
                image = run_layer(layer, image, skips.pop())
                if before_pool is not None and layer.transformer == self._resize_after:
                    image = resize(image, before_pool)
            if block.sampler is not None:
                compiled, size = calls.get(block.sampler), skips[-1].shape[-2:]
                image = compiled(image) if compiled is not None else self._regions[block.sampler].inner(image, size)
        out: Tensor = calls[self._tail](image)
        return out
