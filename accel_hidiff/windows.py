"""MSW-MSA as pure tensor functions: self-attention in 2x2 shifted windows (arXiv 2311.17528, section 3.3).

Shapes: B batch, N = height * width tokens in row-major order, C channels. Where each token goes is looked up in tables
that a size has once, so that no kernel over (tokens, channels) works out an index; the shift is a tensor that chooses
among them, so one graph serves all four shifts; height and width may be symbolic.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from accel_hidiff.shifts import NUM_SHIFTS

Attention = Callable[[Tensor], Tensor]


def window_indices(height: int, width: int, shift: int) -> tuple[Tensor, Tensor]:
    """Index tensors that cut a rolled map into 2x2 windows and put it back.

    Args:
        height, width: even.
        shift: 0..3: the map is rolled by (height/2 // 4 * shift, width/2 // 4 * shift), and not at all where the
            vertical shift would be 0 (the reference's rule: windows less than 4 high never roll).

    Returns:
        (gather, scatter), int64 of shape (N,): `tokens[gather]` is window after window, `windows[scatter]` undoes it.
    """
    window_height, window_width = height // 2, width // 2
    step_y = window_height // 4
    step_x = window_width // 4 if step_y else 0
    y, x = torch.arange(height), torch.arange(width)
    rows, columns = (y + shift * step_y) % height, (x + shift * step_x) % width
    gather = rows.view(2, 1, window_height, 1) * width + columns.view(1, 2, 1, window_width)
    rows, columns = (y - shift * step_y) % height, (x - shift * step_x) % width
    window = (rows // window_height * 2).view(height, 1) + columns // window_width
    offset = (rows % window_height * window_width).view(height, 1) + columns % window_width
    scatter = window * (window_height * window_width) + offset
    return gather.reshape(height * width), scatter.reshape(height * width)


def make_window_tables(batch: int, height: int, width: int, device: torch.device) -> Tensor:
    """(8, batch, height, width) int32: the gather order of each of the four shifts, then the scatter orders.

    They number the tokens of all images: a kernel over tokens has its row, and divides nothing to find it.

    Args:
        batch: images.
        height, width: of a feature map; odd ones are rounded up, as windows are cut of even maps.
        device: where the tables lie.
    """
    even = height + height % 2, width + width % 2
    orders = [window_indices(*even, shift) for shift in range(NUM_SHIFTS)]
    tables = torch.stack([gather for gather, _ in orders] + [scatter for _, scatter in orders])
    tables = tables[:, None] + torch.arange(batch)[:, None] * (even[0] * even[1])
    return tables.to(torch.int32).view(2 * NUM_SHIFTS, batch, *even).to(device)


@lru_cache(maxsize=64)
def window_tables(batch: int, height: int, width: int, device: torch.device) -> Tensor:
    """As `make_window_tables`, made once for a size and device: 32 bytes for each cell of the feature maps."""
    with torch.inference_mode(False):
        return make_window_tables(batch, height, width, device)


def _resize(tokens: Tensor, size: tuple[int, int], to: tuple[int, int]) -> Tensor:
    batch, _, channels = tokens.shape
    image = tokens.transpose(1, 2).reshape(batch, channels, *size)
    image = F.interpolate(image, size=to, mode="bicubic", align_corners=False)
    return image.flatten(2).transpose(1, 2)


def windowed_attention(
    attention: Attention, tokens: Tensor, height: int, width: int, shift: Tensor, tables: Tensor
) -> Tensor:
    """Runs self-attention inside the four windows of a feature map.

    Args:
        attention: maps (4B, N/4, C) to the same shape.
        tokens: (B, N, C), normalised features, any floating dtype.
        height, width: N = height * width; odd ones are resized bicubically to the next even size and back, as in the
            reference.
        shift: 0-d int64 tensor, 0..3.
        tables: of this batch and size (`window_tables`).

    Returns:
        (B, N, C).
    """
    even = height + height % 2, width + width % 2
    resized = even != (height, width)
    if resized:
        tokens = _resize(tokens, (height, width), even)
    batch, count, channels = tokens.shape
    gather, scatter = (tables.index_select(0, shift.view(1) + first).flatten() for first in (0, NUM_SHIFTS))
    windows = tokens.reshape(batch * count, channels).index_select(0, gather)
    out = attention(windows.view(batch * 4, count // 4, channels))
    out = out.reshape(batch * count, channels).index_select(0, scatter).view(batch, count, channels)
    return _resize(out, even, (height, width)) if resized else out
