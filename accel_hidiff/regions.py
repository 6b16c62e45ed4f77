"""Regions: submodules compiled as one unit, and everything a backend must know to export one.

`ResnetBlock2D` and `Transformer2DModel` repeat over the UNet with image-shaped inputs, so their height and width are
visible to window attention; the whole UNet and the VAE decoder are regions too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from accel_hidiff.call import CallScope, RegionCall, UNetCall
from accel_hidiff.families import Size
from accel_hidiff.fingerprint import fingerprint
from accel_hidiff.topology import Topology
from compile_cache import CacheKey, Range, ShapeBucket

Forward = Callable[..., Any]
Sizes = Mapping[str, int]
Axes = tuple[dict[int, str], ...]

# Symbolic ranges. 512 latent cells are 4096 pixels; up to batch 8 every tensor index still fits 32 bits there, which
# keeps the generated index arithmetic cheap.
_SIDE = Range(2, 512)
_EVEN_SIDE = Range(2, 512, 2)
_LATENT_SIDE = Range(16, 512, 8)
_BATCH = Range(1, 8)


class Region:
    """One submodule, its eager forward, and how to export it.

    Args:
        path: unique name, a module path below the pipeline ("unet.mid_block.resnets.0").
        module: holds the weights.
        inner: the eager forward that a compiled call replaces, window patches included.
    """

    kind: ClassVar[str]
    axes: ClassVar[Axes]  # for each input tensor: axis -> dimension name

    def __init__(self, path: str, module: nn.Module, inner: Forward) -> None:
        self.path = path
        self.module: Any = module
        self.inner = inner
        self.scope: CallScope | None = None  # where the region's forwards look for their call, if they do
        self.own_forwards: frozenset[int] = frozenset()

    @cached_property
    def structure(self) -> str:
        """Structural fingerprint of the module; UnstableFactor where it has none."""
        return fingerprint(self.module, self.own_forwards)

    @cached_property
    def memory_format(self) -> torch.memory_format:
        """How the region's images lie in memory: as its convolution weights do."""
        return memory_format_of(self.module)

    @property
    def channels(self) -> int:
        """Channels of the input image."""
        return int(self.module.in_channels)

    def forget(self) -> None:
        """The module's weights were moved or replaced, or its structure changed."""
        for name in ("structure", "memory_format"):
            vars(self).pop(name, None)

    def image(self, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Tensor:
        """An input image of these sizes."""
        image = torch.randn(sizes["batch"], self.channels, sizes["height"], sizes["width"], dtype=dtype, device=device)
        return image.contiguous(memory_format=self.memory_format)

    def traits(self, topology: Topology) -> dict[str, Any]:
        """What a topology changes inside of this region; regions that it leaves alone share their artifacts."""
        return {}

    def sizes(self, features: Mapping[str, Size], batch: int, tokens: int) -> dict[str, int]:
        """The sizes of this region's dimensions in one call."""
        height, width = features[self.path]
        return {"batch": batch, "height": height, "width": width}

    def ranges(self, traits: Mapping[str, Any]) -> dict[str, Range]:
        """The widest symbolic range of each dimension; a dimension that is not listed is always exact."""
        return {"batch": _BATCH, "height": _SIDE, "width": _SIDE}

    def example(
        self, traits: Mapping[str, Any], sizes: Sizes, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, ...]:
        """Input tensors of these sizes."""
        raise NotImplementedError

    def graph_module(self, traits: Mapping[str, Any]) -> nn.Module:
        """What is exported: a module over the live weights that takes tensors only."""
        raise NotImplementedError

    def forward_with(self, compiled: RegionCall, call: UNetCall | None, *args: Any, **kwargs: Any) -> Any:
        """Runs `compiled` in place of the module's forward, whose arguments these are."""
        raise NotImplementedError


class _GraphModule(nn.Module):
    """Calls a function that closes over `module`, so that its weights are named `module.*`."""

    def __init__(self, module: nn.Module, function: Forward) -> None:
        super().__init__()
        self.module = module
        self._function = function

    def forward(self, *tensors: Tensor) -> Tensor:
        out: Tensor = self._function(*tensors)
        return out


class ResnetRegion(Region):
    """`ResnetBlock2D`: (B, C, h, w), (B, T) -> (B, C', h, w)."""

    kind = "resnet"
    axes = ({0: "batch", 2: "height", 3: "width"}, {0: "batch"})

    def example(
        self, traits: Mapping[str, Any], sizes: Sizes, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, ...]:
        image = self.image(sizes, dtype, device)
        embedding = self.module.time_emb_proj.in_features
        return image, torch.randn(sizes["batch"], embedding, dtype=dtype, device=device)

    def graph_module(self, traits: Mapping[str, Any]) -> nn.Module:
        return _GraphModule(self.module, self.inner)

    def forward_with(self, compiled: RegionCall, call: UNetCall | None, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 2 or kwargs or args[1] is None:
            return self.inner(*args, **kwargs)
        return compiled(*args)


class TransformerRegion(Region):
    """`Transformer2DModel`: (B, C, h, w), (B, L, D) -> (B, C, h, w); windowed with (n,) int64 shifts as third input."""

    kind = "transformer"
    axes = ({0: "batch", 2: "height", 3: "width"}, {0: "batch"})

    def __init__(
        self, path: str, module: nn.Module, inner: Forward, scope: CallScope, window_index: int | None
    ) -> None:
        super().__init__(path, module, inner)
        self.scope = scope
        self._window_index = window_index  # number of its first windowed block among all, None: never windowed
        self._blocks = len(self.module.transformer_blocks)

    def traits(self, topology: Topology) -> dict[str, Any]:
        return {"windowed": topology.windowed and self._window_index is not None}

    def sizes(self, features: Mapping[str, Size], batch: int, tokens: int) -> dict[str, int]:
        return {**super().sizes(features, batch, tokens), "tokens": tokens}

    def ranges(self, traits: Mapping[str, Any]) -> dict[str, Range]:
        side = _EVEN_SIDE if traits["windowed"] else _SIDE
        return {"batch": _BATCH, "height": side, "width": side}

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

        return _GraphModule(self.module, function)

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
    axes = ({0: "batch", 2: "height", 3: "width"},)

    @property
    def channels(self) -> int:
        return int(self.module.conv_in.in_channels)

    def example(
        self, traits: Mapping[str, Any], sizes: Sizes, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, ...]:
        return (self.image(sizes, dtype, device),)

    def graph_module(self, traits: Mapping[str, Any]) -> nn.Module:
        return _GraphModule(self.module, self.inner)

    def forward_with(self, compiled: RegionCall, call: UNetCall | None, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or any(value is not None for value in kwargs.values()):
            return self.inner(*args, **kwargs)
        return compiled(args[0])


class UNetRegion(Region):
    """The whole UNet in one topology: sample, timestep, text[, text_embeds, time_ids], (K,) shifts -> sample."""

    kind = "unet"
    axes = ({0: "batch", 2: "height", 3: "width"}, {}, {0: "batch"}, {0: "batch"}, {0: "batch"}, {})

    def __init__(self, path: str, module: UNet2DConditionModel, inner: Forward, scope: CallScope, shifts: int) -> None:
        super().__init__(path, module, inner)
        self.scope = scope
        self._shifts = shifts

    @property
    def channels(self) -> int:
        return int(self.module.config.in_channels)

    def traits(self, topology: Topology) -> dict[str, Any]:
        return {"topology": str(topology)}

    def sizes(self, features: Mapping[str, Size], batch: int, tokens: int) -> dict[str, int]:
        height, width = features["unet.down_blocks.0.resnets.0"]
        return {"batch": batch, "height": height, "width": width, "tokens": tokens}

    def ranges(self, traits: Mapping[str, Any]) -> dict[str, Range]:
        return {"batch": _BATCH, "height": _LATENT_SIDE, "width": _LATENT_SIDE}

    def example(
        self, traits: Mapping[str, Any], sizes: Sizes, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, ...]:
        config, batch = self.module.config, sizes["batch"]
        image = self.image(sizes, dtype, device)
        channels = self.module.get_submodule("mid_block.attentions.0").transformer_blocks[0].attn2.to_k.in_features
        options: Any = {"dtype": dtype, "device": device}
        ids = 6
        text_embeds = config.projection_class_embeddings_input_dim - ids * config.addition_time_embed_dim
        return (
            image,
            torch.tensor(500.0, device=device),
            torch.randn(batch, sizes["tokens"], channels, **options),
            torch.randn(batch, text_embeds, **options),
            torch.randn(batch, ids, **options),
            torch.arange(self._shifts, device=device) % 4,
        )

    def graph_module(self, traits: Mapping[str, Any]) -> nn.Module:
        topology, scope = Topology.parse(traits["topology"]), self.scope
        assert scope is not None

        def function(
            sample: Tensor, timestep: Tensor, text: Tensor, text_embeds: Tensor, time_ids: Tensor, shifts: Tensor
        ) -> Tensor:
            added = {"text_embeds": text_embeds, "time_ids": time_ids}
            with scope.opened(UNetCall(topology, shifts)):
                out: Tensor = self.inner(sample, timestep, text, added_cond_kwargs=added, return_dict=False)[0]
            return out

        return _GraphModule(self.module, function)

    def forward_with(self, compiled: RegionCall, call: UNetCall | None, *args: Any, **kwargs: Any) -> Any:
        sample, timestep, text = args
        added = kwargs["added_cond_kwargs"]
        time = torch.as_tensor(timestep, device=sample.device).to(torch.float32)
        assert call is not None
        shifts = call.shifts
        if shifts is None:
            shifts = torch.zeros(self._shifts, dtype=torch.int64, device=sample.device)
        return compiled(sample, time, text, added["text_embeds"], added["time_ids"].to(sample.dtype), shifts)


def memory_format_of(module: nn.Module) -> torch.memory_format:
    """channels_last if the module's first real convolution is, else contiguous."""
    for weight in module.parameters():
        if weight.ndim == 4 and weight.shape[1] > 1 and weight.shape[2] > 1:
            channels_last = weight.is_contiguous(memory_format=torch.channels_last)
            return torch.channels_last if channels_last else torch.contiguous_format
    return torch.contiguous_format


@dataclass(frozen=True)
class RegionGraph:
    """One static or symbolic graph of one region: what a backend compiles, and what an artifact is keyed by."""

    region: Region
    traits: Mapping[str, Any]
    bucket: ShapeBucket
    example_sizes: Mapping[str, int]
    dtype: torch.dtype
    device: torch.device

    def key(self, backend_factors: Mapping[str, Any]) -> CacheKey:
        """The action key: everything that the artifact depends on, from cheap facts, without tracing.

        Raises:
            UnstableFactor: the region's module has something that cannot be keyed.
        """
        return CacheKey(
            {
                "region": self.region.kind,
                "structure": self.region.structure,
                "traits": dict(self.traits),
                "bucket": self.bucket.to_json(),
                "dtype": str(self.dtype),
                "device": str(self.device) if self.device.index else self.device.type,  # code may name a device index
                "memory_format": str(self.region.memory_format),
                **backend_factors,
            }
        )

    def example(self) -> tuple[Tensor, ...]:
        """Input tensors to trace with."""
        return self.region.example(self.traits, self.example_sizes, self.dtype, self.device)


def bucket_of(region: Region, traits: Mapping[str, Any], sizes: Sizes, shapes: str, smallest: int = 1) -> ShapeBucket:
    """The one bucket that a call falls into.

    Args:
        smallest: the smallest size that the compiler keeps symbolic; below, sizes are exact.
        shapes: "symbolic": each dimension takes its widest range where its size is inside, its exact size elsewhere
            (odd feature maps under window attention); "exact": every dimension exact.
    """
    widest = region.ranges(traits) if shapes == "symbolic" else {}
    ranges = {name: Range(max(r.minimum, smallest), r.maximum, r.multiple) for name, r in widest.items()}
    return ShapeBucket(
        {
            name: ranges[name] if name in ranges and ranges[name].reject(size) is None else Range.exactly(size)
            for name, size in sizes.items()
        }
    )


def example_sizes(bucket: ShapeBucket, sizes: Sizes) -> dict[str, int]:
    """Sizes to trace with: of a symbolic dimension always the same, whatever size asked first, so that keys agree.

    The three symbolic dimensions differ from each other and from 0 and 1, which tracing would take for constants.
    """
    typical = {"batch": 2, "height": 32, "width": 48}
    return {name: sizes[name] if bucket.dims[name].is_exact else typical[name] for name in sizes}


def find_regions(unet: UNet2DConditionModel) -> list[tuple[str, nn.Module]]:
    """The repeated blocks of a UNet, by path, in the order of its module tree."""
    repeated = ResnetBlock2D | Transformer2DModel
    return [(path, module) for path, module in unet.named_modules() if isinstance(module, repeated)]
