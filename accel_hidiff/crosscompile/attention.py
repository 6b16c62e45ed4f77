"""Which attention kernel runs, told without a device.

torch asks the device which of its kernels takes a call of `scaled_dot_product_attention`. Without one, the call is
decomposed into two products and a softmax, silently: the N x N matrix of scores is then written to memory. The choice
here is torch's own on these architectures (`aten/src/ATen/native/transformers/cuda/sdp_utils.cpp`): cuDNN's kernel up
to heads 128 wide, flash attention up to 256, and the memory-efficient kernel above, and for float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch

CUDNN, FLASH, EFFICIENT, PLAIN = "cudnn", "flash", "efficient", "plain"
_CUDNN_FROM: Final = (9, 0)  # where torch prefers it to flash attention


def attention_kernel(
    dtype: torch.dtype, head_width: int, value_width: int, capability: tuple[int, int], *, masked: bool, grouped: bool
) -> str:
    """The kernel for a call: "cudnn", "flash", "efficient" or "plain".

    Args:
        dtype: of query, key and value.
        head_width, value_width: channels of a head.
        capability: of the device, (9, 0) for sm_90.
        masked: an attention mask is given.
        grouped: several query heads share a key's.

    >>> attention_kernel(torch.bfloat16, 64, 64, (9, 0), masked=False, grouped=False)
    'cudnn'
    """
    half = dtype in (torch.float16, torch.bfloat16)
    step = 8 if half else 4  # 16 bytes at once
    if masked or grouped or head_width % step or value_width % step or not (half or dtype == torch.float32):
        return PLAIN
    if not half or head_width > 256 or head_width != value_width:
        return EFFICIENT
    return CUDNN if head_width <= 128 and capability >= _CUDNN_FROM else FLASH


@contextmanager
def attention_chosen(capability: tuple[int, int]) -> Iterator[None]:
    """`scaled_dot_product_attention` decomposes into the kernel of a device of this compute capability."""
    aten = torch.ops.aten
    operator, composite = aten.scaled_dot_product_attention.default, torch._C.DispatchKey.CompositeImplicitAutograd

    def chosen(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        widths = int(query.shape[-1]), int(value.shape[-1])
        flags = {"masked": attn_mask is not None, "grouped": enable_gqa}
        kernel = attention_kernel(query.dtype, *widths, capability, **flags) if query.device.type == "cuda" else PLAIN
        options = dropout_p, is_causal
        if kernel == CUDNN:
            run = aten._scaled_dot_product_cudnn_attention
            return run(query, key, value, None, False, *options, False, scale=scale)[0]
        if kernel == FLASH:
            return aten._scaled_dot_product_flash_attention(query, key, value, *options, False, scale=scale)[0]
        if kernel == EFFICIENT:
            run = aten._scaled_dot_product_efficient_attention
            return run(query, key, value, None, False, *options, scale=scale)[0]
        plain: Callable[..., Any] = operator._op_dk
        rest = {"scale": scale, "enable_gqa": enable_gqa}
        return plain(composite, query, key, value, attn_mask, *options, **rest)

    operator.py_impl(composite)(chosen)
    try:
        yield
    finally:
        del operator.py_kernels[composite]
        operator._dispatch_cache.clear()
