"""Decoding within a limit of memory: what a decode takes at most, and the tiles that it is cut into.

The facts of a device (`free_memory`) are collected in one place; `choose_tiles` judges them, so that any device can be
tested anywhere.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import psutil
import torch
from torch import Tensor, nn

from accel_hidiff.config import DecodeConfig
from accel_hidiff.errors import BadInput
from accel_hidiff.forms import in_parts, rows_of_parts
from accel_hidiff.schedule import LATENT_CELL

# What a decode holds at its peak: images of the widest feature map, and bytes beside them that do not grow with the
# size. A resnet needs three such images: its input, the normalised one and the activated one; the rest is what
# convolutions put aside. CPU: measured (benchmarks/decoding.py); the bytes beside are gaps that glibc's heap keeps
# between blocks of less than 32 MiB (`man mallopt`, M_MMAP_THRESHOLD). CUDA: an H200 took 30 GB for 4096x4096 in eager
# bfloat16, 3.5 images.
_HEAP_GAPS: Final = 160 << 20
_NEEDS: Final[Mapping[tuple[str, bool], tuple[float, int]]] = {  # device type, compiled
    ("cpu", False): (4.25, _HEAP_GAPS),
    ("cpu", True): (3.0, _HEAP_GAPS),
    ("cuda", False): (4.25, 0),
    ("cuda", True): (4.25, 0),
}
# Where oneDNN has no kernels for a dtype, torch unfolds what a convolution of 3x3 reads: nine images beside its input
# and its output (measured as well).
_UNFOLDED: Final = 12.25
_RESERVE: Final = 0.9  # share of the free memory that a decode may take: allocators round up and fragment


@dataclass(frozen=True)
class Decode:
    """One decode, as numbers.

    Args:
        height, width: of the latents, in cells.
        batch: images.
        widths: the VAE's `block_out_channels`.
        itemsize: bytes of one number.
        device: type of the device, such as "cuda".
        compiled: by a compiled graph.
        unfolded: convolutions unfold their input (`unfolds`).
    """

    height: int
    width: int
    batch: int
    widths: tuple[int, ...]
    itemsize: int
    device: str
    compiled: bool
    unfolded: bool = False

    def peak_bytes(self) -> int:
        """Upper bound of what it takes at once, weights not counted.

        Attention counts in a GPU's compiled graph alone, where the scores of a part of the queries are written
        (`forms.attention_in_parts`): torch's kernels never hold its N x N matrix, and the rest of it is smaller than
        the last feature maps.

        >>> Decode(512, 512, 1, (128, 256, 512, 512), 2, "cuda", compiled=False).peak_bytes() // 10**9
        36
        """
        last = len(self.widths) - 1
        height, width = self.height << last, self.width << last
        # The feature map of a level has the channels that the level below gives it.
        widest = max(
            self.widths[min(level + 1, last)] * (height >> level) * (width >> level) for level in range(last + 1)
        )
        device = self.device if self.device == "cpu" else "cuda"
        images, beside = _NEEDS[device, self.compiled]
        images = _UNFOLDED if self.unfolded else images
        return max(int(images * widest * self.itemsize * self.batch), self._attention_bytes()) + beside

    def _attention_bytes(self) -> int:
        """What attention in parts holds at its peak: scores, and as many numbers again that they are rounded to, beside
        six maps of tokens (input, residual, query, key, value and result)."""
        tokens, width = self.height * self.width, self.widths[-1]
        if self.device == "cpu" or not self.compiled or self.itemsize != 2 or not in_parts(width, tokens):
            return 0
        return tokens * (rows_of_parts(tokens)[-1] * (4 + self.itemsize) + 6 * width * self.itemsize)


@dataclass(frozen=True)
class Tiles:
    """How latents are cut: `rows` x `columns` tiles of one size, evenly spread.

    Attributes:
        height, width: of every tile, in cells.
        tops, lefts: where they begin, in cells.
    """

    height: int
    width: int
    tops: tuple[int, ...]
    lefts: tuple[int, ...]

    @classmethod
    def of(cls, height: int, width: int, tile: int, overlap: int) -> Tiles:
        """Tiles with sides of at most `tile` that overlap by at least `overlap` cells.

        All are of one size, so that one graph serves them, and none is a narrow rest at an edge, whose group norms
        would see another picture than those of its neighbours.

        >>> Tiles.of(300, 100, 128, 16)
        Tiles(height=111, width=100, tops=(0, 94, 189), lefts=(0,))
        """
        (rows, tops), (columns, lefts) = _cut(height, tile, overlap), _cut(width, tile, overlap)
        return cls(rows, columns, tops, lefts)

    @property
    def count(self) -> int:
        """How many tiles."""
        return len(self.tops) * len(self.lefts)

    def __str__(self) -> str:
        return f"tiles of {self.width * LATENT_CELL}x{self.height * LATENT_CELL}"


def _cut(length: int, tile: int, overlap: int) -> tuple[int, tuple[int, ...]]:
    if length <= tile:
        return length, (0,)
    count = math.ceil((length - overlap) / (tile - overlap))
    side = math.ceil((length + (count - 1) * overlap) / count)
    return side, tuple(index * (length - side) // (count - 1) for index in range(count))


def tiled_peak_bytes(decode: Decode, tiles: Tiles | None) -> int:
    """Upper bound of what a decode takes at once in these tiles, the image that they are put together to included."""
    if tiles is None:
        return decode.peak_bytes()
    pixels = decode.batch * (decode.height << len(decode.widths) - 1) * (decode.width << len(decode.widths) - 1)
    one = dataclasses.replace(decode, height=tiles.height, width=tiles.width, batch=1)
    return one.peak_bytes() + 3 * pixels * (4 + decode.itemsize)


def choose_tiles(config: DecodeConfig, decode: Decode, free_bytes: int | None) -> Tiles | None:
    """The tiles that a decode is cut into; None: it is decoded as a whole.

    Args:
        free_bytes: memory that is free on its device; None: unknown, so that only `config.max_memory` counts.
    """
    if config.tiles == "never":
        return None
    if config.tiles == "auto":
        limit = config.max_memory
        if limit is None and free_bytes is not None:
            limit = int(_RESERVE * free_bytes)
        if limit is None or decode.peak_bytes() <= limit:
            return None
    tiles = Tiles.of(decode.height, decode.width, config.tile // LATENT_CELL, config.overlap // LATENT_CELL)
    return tiles if tiles.count > 1 else None


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device, what torch's allocator keeps unused included; None where nothing tells."""
    if device.type == "cuda" and torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "cpu":
        return int(psutil.virtual_memory().available)
    return None


def unfolds(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's convolutions unfold their input here: on a CPU, in a dtype that oneDNN has no kernels for on it.

    bfloat16 needs AVX-512 (or Arm's), float16 AMX or AVX512_FP16.
    """
    if device.type != "cpu":
        return False
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return True
    if dtype == torch.bfloat16:
        return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported()


def decode_in_tiles(decode: Callable[[Tensor], Tensor], latents: Tensor, tiles: Tiles) -> Tensor:
    """(B, C, h, w) -> (B, 3, f h, f w): every tile by itself, one image at a time, overlaps blended linearly.

    Args:
        decode: decodes (1, C, tiles.height, tiles.width).
    """
    batch, _, height, width = latents.shape
    image: Tensor | None = None
    ramps: tuple[Tensor, Tensor] | None = None
    for number in range(batch):
        for row, top in enumerate(tiles.tops):
            for column, left in enumerate(tiles.lefts):
                cells = latents[number : number + 1, :, top : top + tiles.height, left : left + tiles.width]
                decoded = decode(_dense_like(cells, latents))
                factor = decoded.shape[2] // tiles.height
                if image is None or ramps is None:
                    shape = batch, decoded.shape[1], height * factor, width * factor
                    image = torch.zeros(shape, dtype=torch.float32, device=decoded.device)
                    down = _ramps(tiles.tops, tiles.height, height, factor, decoded.device)
                    ramps = down, _ramps(tiles.lefts, tiles.width, width, factor, decoded.device)
                    dtype = decoded.dtype
                y = slice(top * factor, (top + tiles.height) * factor)
                x = slice(left * factor, (left + tiles.width) * factor)
                image[number, :, y, x] += decoded[0] * (ramps[0][row, y, None] * ramps[1][column, None, x])
    assert image is not None, "latents without an image"
    return image.to(dtype)


def decode_one_by_one(decode: Callable[[Tensor], Tensor], latents: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, 3, f h, f w): one image after the other.

    Args:
        decode: decodes (1, C, h, w).
    """
    return torch.cat([decode(_dense_like(cells, latents)) for cells in latents.split(1)])


def _dense_like(cells: Tensor, latents: Tensor) -> Tensor:
    """A copy without gaps, in the layout that the latents have: graphs are compiled for that."""
    channels_last = latents.is_contiguous(memory_format=torch.channels_last) and not latents.is_contiguous()
    return cells.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _ramps(starts: Sequence[int], side: int, length: int, factor: int, device: torch.device) -> Tensor:
    """(tiles, pixels) float32: the weight of every tile along one axis; those of one pixel sum to 1."""
    weights = torch.zeros(len(starts), length * factor)
    pixels = torch.arange(side * factor)
    for index, start in enumerate(starts):
        ramp = torch.ones(side * factor)
        if index > 0:
            ramp = ramp.minimum((pixels + 0.5) / ((starts[index - 1] + side - start) * factor))
        if index < len(starts) - 1:
            ramp = ramp.minimum((side * factor - pixels - 0.5) / ((start + side - starts[index + 1]) * factor))
        weights[index, start * factor : (start + side) * factor] = ramp
    return (weights / weights.sum(0)).to(device)


class InDtype:
    """A decoder in another dtype: a copy of the module, whose weights follow those of the user's own at every decode.

    The user's module is never touched: nothing has to be undone, and a weight that is changed or replaced between
    decodes counts from the next one on. The copy's tensors stay where they are, so that what was bound to them stays
    bound, also while a pipeline casts its VAE back and forth.
    """

    def __init__(self, source: nn.Module, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._source = source
        self.module = copy.deepcopy(source).to(dtype).requires_grad_(False)

    def follow(self, device: torch.device) -> None:
        """Takes over the weights as they are now, on the device of a decode.

        Raises:
            BadInput: the module has other tensors than when it was copied, or keeps its weights elsewhere.
        """
        source, ours = _tensors(self._source), _tensors(self.module)
        if [tensor.shape for tensor in source] != [tensor.shape for tensor in ours]:
            raise BadInput("decode.dtype: expected a VAE decoder of the same structure as before; accelerate it again")
        if any(tensor.device.type == "meta" for tensor in source):
            raise BadInput("decode.dtype: expected the VAE's weights on a device, got offloaded ones; use dtype=None")
        if any(tensor.device != device for tensor in ours):
            self.module.to(device)
            ours = _tensors(self.module)
        with torch.no_grad():
            for tensor, follower in zip(source, ours, strict=True):
                follower.copy_(tensor)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def require_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """BadInput where a device does not compute in a dtype by itself."""
    if device.type != "cuda" or dtype != torch.bfloat16 or not torch.cuda.is_available():
        return
    if reason := lacks_bfloat16(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)):
        raise BadInput(reason)


def lacks_bfloat16(name: str, capability: tuple[int, int]) -> str:
    """Why a CUDA device does not compute in bfloat16; "" where it does.

    >>> lacks_bfloat16("NVIDIA H100", (9, 0)), lacks_bfloat16("Tesla T4", (7, 5))[:55]
    ('', 'decode.dtype: expected a device of compute capability 8')
    """
    if capability >= (8, 0):
        return ""
    found = f"{name} of {capability[0]}.{capability[1]}"
    return f"decode.dtype: expected a device of compute capability 8.0 for bfloat16, got {found}; use dtype=None"
