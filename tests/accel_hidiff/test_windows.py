"""Windows are cut and put back exactly as `torch.roll` and reshape would, for every shift and size."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from accel_hidiff.windows import Attention, window_indices, window_tables, windowed_attention

even = st.integers(1, 40).map(lambda half: 2 * half)
shifts = st.integers(0, 3)


def cut(image: Tensor, shift: int) -> Tensor:
    """(B, H, W, C), even -> (4B, H/2 * W/2, C): rolled where the vertical shift is not 0, then cut into four."""
    batch, height, width, channels = image.shape
    half_height, half_width = height // 2, width // 2
    down, right = half_height // 4 * shift, half_width // 4 * shift
    if down > 0:
        image = torch.roll(image, shifts=(-down, -right), dims=(1, 2))
    windows = image.view(batch, 2, half_height, 2, half_width, channels).permute(0, 1, 3, 2, 4, 5)
    return windows.reshape(4 * batch, half_height * half_width, channels)


def put_back(windows: Tensor, height: int, width: int, shift: int) -> Tensor:
    """Inverse of `cut`: (4B, N/4, C) -> (B, H, W, C)."""
    half_height, half_width = height // 2, width // 2
    batch, channels = len(windows) // 4, windows.shape[-1]
    image = windows.view(batch, 2, 2, half_height, half_width, channels).permute(0, 1, 3, 2, 4, 5)
    image = image.reshape(batch, height, width, channels)
    down, right = half_height // 4 * shift, half_width // 4 * shift
    return torch.roll(image, shifts=(down, right), dims=(1, 2)) if down > 0 else image


@settings(max_examples=400, deadline=None)
@given(even, even, shifts)
def test_gather_is_roll_and_reshape(height: int, width: int, shift: int) -> None:
    tokens = torch.arange(height * width)
    gather, _ = window_indices(height, width, shift)
    assert torch.equal(tokens[gather], cut(tokens.view(1, height, width, 1), shift).flatten())


@settings(max_examples=400, deadline=None)
@given(even, even, shifts)
def test_scatter_undoes_gather(height: int, width: int, shift: int) -> None:
    tokens = torch.arange(height * width)
    gather, scatter = window_indices(height, width, shift)
    assert torch.equal(tokens[gather][scatter], tokens)
    assert torch.equal(gather.sort().values, tokens), "every token is in one window"


@pytest.mark.parametrize(("height", "width"), [(2, 2), (4, 64), (6, 40), (6, 8)])
@pytest.mark.parametrize("shift", [0, 1, 2, 3])
def test_windows_lower_than_4_never_roll(height: int, width: int, shift: int) -> None:
    still = window_indices(height, width, 0)
    moved = window_indices(height, width, shift)
    assert all(torch.equal(a, b) for a, b in zip(still, moved, strict=True))


@pytest.mark.parametrize(("height", "width"), [(8, 4), (8, 8), (16, 24)])
def test_higher_windows_roll_at_every_shift(height: int, width: int) -> None:
    indices = {tuple(window_indices(height, width, shift)[0].tolist()) for shift in range(4)}
    assert len(indices) == 4


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 41), st.integers(1, 41))
def test_tables_hold_the_orders_of_all_shifts_of_the_next_even_size(batch: int, height: int, width: int) -> None:
    tables = window_tables(batch, height, width, torch.device("cpu"))
    even = height + height % 2, width + width % 2
    assert tables.shape == (8, batch, *even) and tables.dtype == torch.int32
    for shift, image in product(range(4), range(batch)):
        first = image * even[0] * even[1]
        gather, scatter = window_indices(*even, shift)
        assert torch.equal(tables[shift, image].flatten().long(), first + gather)
        assert torch.equal(tables[4 + shift, image].flatten().long(), first + scatter)


def test_a_size_has_one_table() -> None:
    cpu = torch.device("cpu")
    with torch.inference_mode():
        first = window_tables(2, 6, 8, cpu)
    assert window_tables(2, 6, 8, cpu) is first
    assert not first.is_inference(), "a graph that is traced later takes it"


def mean_of_window(windows: Tensor) -> Tensor:
    """An attention that mixes all tokens of a window, unevenly, and nothing else."""
    weights = torch.linspace(1, 2, windows.shape[1], dtype=windows.dtype)[:, None]
    return windows + (windows * weights).mean(dim=1, keepdim=True)


def attended(attention: Attention, tokens: Tensor, height: int, width: int, shift: int) -> Tensor:
    tables = window_tables(len(tokens), height, width, torch.device("cpu"))
    return windowed_attention(attention, tokens, height, width, torch.tensor(shift), tables)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 21), st.integers(2, 21), shifts, st.integers(1, 2))
def test_windowed_attention_is_resize_roll_attend_and_back(height: int, width: int, shift: int, batch: int) -> None:
    draw = torch.Generator().manual_seed(height * 100 + width)
    tokens = torch.randn(batch, height * width, 3, generator=draw, dtype=torch.float64)
    image = tokens.view(batch, height, width, 3).permute(0, 3, 1, 2)
    even_height, even_width = 2 * -(-height // 2), 2 * -(-width // 2)
    odd = (even_height, even_width) != (height, width)
    if odd:
        image = F.interpolate(image, size=(even_height, even_width), mode="bicubic", align_corners=False)
    windows = mean_of_window(cut(image.permute(0, 2, 3, 1).contiguous(), shift))
    expected = put_back(windows, even_height, even_width, shift).permute(0, 3, 1, 2)
    if odd:
        expected = F.interpolate(expected, size=(height, width), mode="bicubic", align_corners=False)
    expected = expected.permute(0, 2, 3, 1).reshape(batch, height * width, 3)
    got = attended(mean_of_window, tokens, height, width, shift)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_nothing_leaks_from_one_window_or_image_to_another() -> None:
    tokens = torch.zeros(2, 16 * 8, 1)
    tokens[0, 0] = 1.0
    out = attended(mean_of_window, tokens, 16, 8, 0).view(2, 16, 8)
    assert (out[0, :8, :4] != 0).all()
    assert (out[0, 8:] == 0).all() and (out[0, :, 4:] == 0).all() and (out[1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(16, 24), (9, 11)])
def test_shape_and_dtype_are_kept(dtype: torch.dtype, size: tuple[int, int]) -> None:
    tokens = torch.ones(1, size[0] * size[1], 4, dtype=dtype)
    out = attended(lambda windows: windows, tokens, *size, 2)
    assert out.shape == tokens.shape and out.dtype == dtype
    torch.testing.assert_close(out, tokens, rtol=1e-2, atol=1e-2)
