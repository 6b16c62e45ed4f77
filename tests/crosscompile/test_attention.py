"""Which attention kernel runs, told without a device."""

from __future__ import annotations

import pytest
import torch

from accel_hidiff.crosscompile.attention import CUDNN, EFFICIENT, FLASH, PLAIN, attention_chosen, attention_kernel

HALF = torch.bfloat16


@pytest.mark.parametrize(
    ("dtype", "width", "capability", "kernel"),
    [
        (HALF, 64, (9, 0), CUDNN),
        (torch.float16, 128, (10, 0), CUDNN),
        (HALF, 64, (8, 0), FLASH),
        (HALF, 160, (9, 0), FLASH),  # SD 1.5's lowest level
        (HALF, 256, (8, 9), FLASH),
        (HALF, 512, (9, 0), EFFICIENT),  # a VAE's one head
        (torch.float32, 512, (9, 0), EFFICIENT),
        (torch.float32, 64, (8, 0), EFFICIENT),
        (HALF, 20, (9, 0), PLAIN),
        (torch.float64, 64, (9, 0), PLAIN),
    ],
)
def test_the_kernel_of_a_head(dtype: torch.dtype, width: int, capability: tuple[int, int], kernel: str) -> None:
    assert attention_kernel(dtype, width, width, capability, masked=False, grouped=False) == kernel


def test_masks_and_grouped_heads_are_decomposed() -> None:
    assert attention_kernel(HALF, 64, 64, (9, 0), masked=True, grouped=False) == PLAIN
    assert attention_kernel(HALF, 64, 64, (9, 0), masked=False, grouped=True) == PLAIN
    assert attention_kernel(HALF, 64, 128, (9, 0), masked=False, grouped=False) == EFFICIENT


def test_what_runs_on_the_cpu_is_left_as_it_is() -> None:
    operator = torch.ops.aten.scaled_dot_product_attention.default
    query = torch.randn(1, 2, 16, 8)
    expected = torch.nn.functional.scaled_dot_product_attention(query, query, query)
    kernels = dict(operator.py_kernels)
    with attention_chosen((9, 0)):
        assert dict(operator.py_kernels) != kernels
        got = torch.nn.functional.scaled_dot_product_attention(query, query, query)
    assert torch.equal(got, expected)
    assert dict(operator.py_kernels) == kernels
