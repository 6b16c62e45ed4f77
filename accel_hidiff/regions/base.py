"""What every region has, and what makes a graph of one: its traits, its bucket, its key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Final, NamedTuple

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, FusedAttnProcessor2_0
from torch import Tensor, nn

from accel_hidiff.call import CallScope, RegionCall, UNetCall
from accel_hidiff.families import Size
from accel_hidiff.fingerprint import fingerprint
from accel_hidiff.topology import Topology
from compile_cache import CacheKey, Range, ShapeBucket

Forward = Callable[..., Any]
Sizes = Mapping[str, int]


class Share(NamedTuple):
    """A dimension's size divided by a number: of a feature map, where the dimension is that of the latents. Where a
    size is exact, it may be another one: tables of an odd feature map are those of the next even one."""

    name: str
    divisor: int


Axes = tuple[Mapping[int, str | Share], ...]

# Symbolic ranges; 512 latent cells are 4096 pixels.
SIDE = Range(2, 512)
EVEN_SIDE = Range(2, 512, 2)
LATENT_SIDE = Range(16, 512, 8)
DECODED_SIDE = Range(8, 512)  # on a GPU
BATCH = Range(1, 8)
TOKENS = Range(1, 1024)


class Region:
    """One submodule, its eager forward, and how to export it.

    Args:
        path: unique name, a module path below the pipeline ("unet.mid_block.resnets.0").
        module: holds the weights.
        inner: the eager forward that a compiled call replaces, window patches included.
        model: what the module is a part of; None: it stands alone.
    """

    kind: ClassVar[str]

    def __init__(self, path: str, module: nn.Module, inner: Forward, model: nn.Module | None = None) -> None:
        self.path = path
        self.module: Any = module
        self.inner = inner
        self._model = module if model is None else model
        self.scope: CallScope | None = None  # where the region's forwards look for their call, if they do
        self.own_forwards: frozenset[int] = frozenset()

    @cached_property
    def structure(self) -> str:
        """Structural fingerprint of the module; UnstableFactor where it has none."""
        return fingerprint(self.module, self.own_forwards)

    @cached_property
    def memory_format(self) -> torch.memory_format:
        """How the region's images lie in memory: as the convolution weights of its model do, so that none is laid out
        anew between two regions."""
        return memory_format_of(self._model)

    @property
    def channels(self) -> int:
        """Channels of the first input image."""
        return int(self.module.in_channels)

    @property
    def images(self) -> int:
        """How many of the inputs, the first ones, are images in the region's memory format."""
        return 1

    @property
    def module_channels(self) -> int:
        """Channels of the image that the module's own forward is given."""
        return self.channels

    @property
    def weights(self) -> int:
        """Number of weight tensors: how large the region's graph is, told without tracing it."""
        return sum(1 for _ in self.module.parameters())

    def forget(self) -> None:
        """The module's weights were moved or replaced, or its structure changed."""
        for name in ("structure", "memory_format"):
            vars(self).pop(name, None)

    def image(self, sizes: Sizes, dtype: torch.dtype, device: torch.device, channels: int | None = None) -> Tensor:
        """An input image of these sizes; of the first one's channels unless others are given."""
        shape = sizes["batch"], channels or self.channels, sizes["height"], sizes["width"]
        image = torch.randn(shape, dtype=dtype, device=device)
        return image.contiguous(memory_format=self.memory_format)

    def traits(self, topology: Topology, controlled: bool = False) -> dict[str, Any]:
        """What changes inside of this region with the topology, and with ControlNet residuals (`controlled`); regions
        that are left alone share their artifacts."""
        return {}

    def axes(self, traits: Mapping[str, Any]) -> Axes:
        """For each input tensor: axis -> dimension name, or a share of one. Inputs past the end have none."""
        raise NotImplementedError

    def sizes(self, features: Mapping[str, Size], batch: int, tokens: int) -> dict[str, int]:
        """The sizes of this region's dimensions in one call."""
        height, width = features[self.path]
        return {"batch": batch, "height": height, "width": width}

    def serves(self, features: Mapping[str, Size], topology: Topology) -> bool:
        """Whether a graph is made for a call whose feature maps have these sizes; else the module runs eager in it."""
        return True

    def ranges(self, traits: Mapping[str, Any]) -> dict[str, Range]:
        """The widest symbolic range of each dimension; a dimension that is not listed is always exact."""
        return {"batch": BATCH, "height": SIDE, "width": SIDE}

    def ranges_on(self, device: str, traits: Mapping[str, Any]) -> dict[str, Range]:
        """The same in graphs for a type of device."""
        return self.ranges(traits)

    def largest(self, sizes: Sizes, traits: Mapping[str, Any]) -> int:
        """Numbers in the largest tensor of a call, or more."""
        cells = sizes["height"] * sizes["width"]
        return sizes["batch"] * max(cells * self.width, cells**2 * scored_heads(self.module))

    @property
    def width(self) -> int:
        """Numbers that the largest tensor of a call has for each cell of the input image, or more."""
        return self.channels

    def example(
        self, traits: Mapping[str, Any], sizes: Sizes, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, ...]:
        """Input tensors of these sizes."""
        raise NotImplementedError

    def graph_module(self, traits: Mapping[str, Any]) -> nn.Module:
        """What is exported: a module over the live weights that takes tensors only."""
        raise NotImplementedError

    def forward_with(self, compiled: RegionCall, call: UNetCall | None, *args: Any, **kwargs: Any) -> Any:
        """Runs `compiled` in place of the module's forward, whose arguments these are; the forward itself where the
        arguments are not those of the graph."""
        raise NotImplementedError


# What attends with these holds no scores, (heads, tokens, tokens), in memory.
_FUSED: Final = (AttnProcessor2_0, FusedAttnProcessor2_0)


def scored_heads(module: nn.Module) -> int:
    """Heads whose attention writes its scores to memory, the most of any layer: 0 with diffusers' default processor."""
    layers = (layer for layer in module.modules() if isinstance(layer, Attention))
    return max((layer.heads for layer in layers if type(layer.processor) not in _FUSED), default=0)


class GraphModule(nn.Module):
    """Calls a function that closes over `module`, so that its weights are named `module.*`."""

    def __init__(self, module: nn.Module, function: Forward) -> None:
        super().__init__()
        self.module = module
        self._function = function

    def forward(self, *tensors: Tensor) -> Any:
        return self._function(*tensors)


class ImageGraphModule(GraphModule):
    """Also: gives the image that the function gives in a memory format."""

    def __init__(self, module: nn.Module, function: Forward, memory_format: torch.memory_format) -> None:
        super().__init__(module, function)
        self._memory_format = memory_format

    def forward(self, *tensors: Tensor) -> Any:
        return self._function(*tensors).contiguous(memory_format=self._memory_format)


def conv_channels(conv: Any) -> tuple[int, int]:
    """Channels that a 2-D convolution takes and gives, told by its weight: what wraps it (LoRA) names none.

    Raises:
        AttributeError: it is no convolution (`is_conv`).
    """
    out, into = conv.weight.shape[:2]
    return int(into), int(out)


def is_conv(module: Any) -> bool:
    """Whether a module has a weight as a 2-D convolution has."""
    return getattr(getattr(module, "weight", None), "ndim", 0) == 4


def memory_format_of(module: nn.Module) -> torch.memory_format:
    """channels_last if the module's first real convolution is, else contiguous."""
    for weight in module.parameters():
        if weight.ndim == 4 and weight.shape[1] > 1 and weight.shape[2] > 1:
            channels_last = weight.is_contiguous(memory_format=torch.channels_last)
            return torch.channels_last if channels_last else torch.contiguous_format
    return torch.contiguous_format


def scalar(value: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A number, or a tensor, on a device; a number is written there by the device itself, so that nobody waits."""
    if isinstance(value, Tensor):
        return value.to(device=device, dtype=dtype)
    return torch.full((), value, dtype=dtype, device=device)


@dataclass(frozen=True)
class RegionGraph:
    """One static or symbolic graph of one region: what a backend compiles, and what an artifact is keyed by.

    Attributes:
        wide: on a GPU, indices are worked out in 64 bits: for calls that hold tensors of 2^31 numbers or more.
    """

    region: Region
    traits: Mapping[str, Any]
    bucket: ShapeBucket
    example_sizes: Mapping[str, int]
    dtype: torch.dtype
    device: torch.device
    wide: bool = False

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
                "device": self.device.type,  # code names no index: a package runs on the device that it is loaded for
                "memory_format": str(self.region.memory_format),
                **({"index_bits": 64} if self.wide else {}),
                **backend_factors,
            }
        )

    def example(self) -> tuple[Tensor, ...]:
        """Input tensors to trace with."""
        return self.region.example(self.traits, self.example_sizes, self.dtype, self.device)


def bucket_of(
    region: Region,
    traits: Mapping[str, Any],
    sizes: Sizes,
    shapes: str,
    smallest: int | None = 1,
    device: str = "cpu",
) -> ShapeBucket:
    """The one bucket that a call falls into.

    Args:
        smallest: the smallest size that the compiler keeps symbolic; below, sizes are exact. None: all are.
        shapes: "symbolic": each dimension takes its widest range where its size is inside, its exact size elsewhere
            (odd feature maps under window attention); "exact": every dimension exact.
        device: type of the device that the graph is for.
    """
    widest = region.ranges_on(device, traits) if shapes == "symbolic" and smallest is not None else {}
    ranges = {name: Range(max(r.minimum, smallest or 1), r.maximum, r.multiple) for name, r in widest.items()}
    return ShapeBucket(
        {
            name: ranges[name] if name in ranges and ranges[name].reject(size) is None else Range.exactly(size)
            for name, size in sizes.items()
        }
    )


def example_sizes(bucket: ShapeBucket, sizes: Sizes) -> dict[str, int]:
    """Sizes to trace with: of a symbolic dimension always the same, whatever size asked first, so that keys agree.

    The symbolic dimensions differ from each other and from 0 and 1, which tracing would take for constants.
    """
    typical = {"batch": 2, "height": 32, "width": 48, "tokens": 77}
    return {name: sizes[name] if bucket.dims[name].is_exact else typical[name] for name in sizes}
