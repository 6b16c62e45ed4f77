"""What the device can do: its ceilings, and PyTorch's attention kernels at the shapes of SDXL."""

from __future__ import annotations

from dataclasses import asdict
from typing import Final

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import harness as h
from benchmarks.gpu.lab import Case, Figures, Lab, NotHere
from benchmarks.roofline import ceilings, median_seconds

_HEAD_WIDTH: Final = 64
# (B, heads, N) of self-attention in a batch of 2 at 2048x2048: level 1 whole and in four windows, level 2.
SHAPES: Final = {
    "2x10x16384": (2, 10, 16384),
    "8x10x4096": (8, 10, 4096),
    "2x20x4096": (2, 20, 4096),
}
KERNELS: Final = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
_TINY_TOKENS: Final = 64
_REFUSALS: Final = ("No available kernel", "No viable backend")  # on a GPU; on a CPU


def run_ceilings(lab: Lab, case: Case) -> Figures:
    """Speeds of a large matmul and of a large copy."""
    lab.ceilings = ceilings(lab.device, lab.dtype, lab.setting.tiny)
    return {name: h.rounded(value) for name, value in asdict(lab.ceilings).items()}


def run_attention(lab: Lab, case: Case) -> Figures:
    """One kernel at one shape, against the device's matmul.

    Raises:
        NotHere: the kernel does not take these tensors on this device.
    """
    batch, heads, tokens = SHAPES[case["shape"]]
    tokens = _TINY_TOKENS if lab.setting.tiny else tokens
    shape = batch, heads, tokens, _HEAD_WIDTH
    query, key, value = (torch.randn(shape, device=lab.device, dtype=lab.dtype) for _ in range(3))

    def run() -> object:
        return scaled_dot_product_attention(query, key, value)

    with sdpa_kernel(KERNELS[case["kernel"]]):
        try:
            run()
        except RuntimeError as problem:
            if not any(text in str(problem) for text in _REFUSALS):
                raise
            kernel, dtype = case["kernel"], lab.setting.dtype
            raise NotHere(f"the {kernel} kernel does not take {dtype} of this shape on {lab.device.type}") from None
        seconds = median_seconds(run, lab.device)
    speed = 4 * batch * heads * tokens**2 * _HEAD_WIDTH / seconds / 1e12
    share = None if lab.ceilings is None else h.rounded(speed / lab.ceilings.matmul_tflop_per_s, 3)
    return {"ms": h.rounded(seconds * 1e3), "tflop_per_s": h.rounded(speed), "matmul_share_ratio": share}
