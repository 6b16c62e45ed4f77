"""MSW-MSA as pure tensor functions: self-attention in 2x2 shifted windows (arXiv 2311.17528, section 3.3).

Shapes: B batch, N = height * width tokens in row-major order, C channels. The shift is a tensor, so one graph serves
all four shifts; height and width may be symbolic.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Attention = Callable[[Tensor], Tensor]


def window_indices(height: int, width: int, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Index tensors that cut a rolled map into 2x2 windows and put it back.

    Args:
        height, width: even.
        shift: 0-d int64 tensor, 0..3: the map is rolled by (height/2 // 4 * shift, width/2 // 4 * shift), and not at
            all where the vertical shift would be 0 (the reference's rule: windows less than 4 high never roll).

    Returns:
        (gather, scatter), int64 of shape (N,): `tokens[gather]` is window after window, `windows[scatter]` undoes it.
    """
    window_height, window_width = height // 2, width // 2
    step_y = window_height // 4
    step_x = (window_width // 4) * torch.sym_min(step_y, 1)
    y, x = torch.arange(height, device=shift.device), torch.arange(width, device=shift.device)
    rows, columns = (y + shift * step_y) % height, (x + shift * step_x) % width
    gather = rows.view(2, 1, window_height, 1) * width + columns.view(1, 2, 1, window_width)
    rows, columns = (y - shift * step_y) % height, (x - shift * step_x) % width
    window = (rows // window_height * 2).view(height, 1) + columns // window_width
    offset = (rows % window_height * window_width).view(height, 1) + columns % window_width
    scatter = window * (window_height * window_width) + offset
    return gather.reshape(height * width), scatter.reshape(height * width)


def _resize(tokens: Tensor, size: tuple[int, int], to: tuple[int, int]) -> Tensor:
    batch, _, channels = tokens.shape
    image = tokens.transpose(1, 2).reshape(batch, channels, *size)
    image = F.interpolate(image, size=to, mode="bicubic", align_corners=False)
    return image.flatten(2).transpose(1, 2)


def windowed_attention(attention: Attention, tokens: Tensor, height: int, width: int, shift: Tensor) -> Tensor:
    """Runs self-attention inside the four windows of a feature map.

    Args:
        attention: maps (4B, N/4, C) to the same shape.
        tokens: (B, N, C), normalised features, any floating dtype.
        height, width: N = height * width; odd ones are resized bicubically to the next even size and back, as in the
            reference.
        shift: 0-d int64 tensor, 0..3.

    Returns:
        (B, N, C).
    """
    even = height + height % 2, width + width % 2
    resized = even != (height, width)
    if resized:
        tokens = _resize(tokens, (height, width), even)
    batch, count, channels = tokens.shape
    gather, scatter = window_indices(*even, shift)
    windows = tokens.index_select(1, gather).reshape(batch * 4, count // 4, channels)
    out = attention(windows).reshape(batch, count, channels).index_select(1, scatter)
    return _resize(out, even, (height, width)) if resized else out
