"""What the device can do: its ceilings, and PyTorch's attention kernels at the shapes of SDXL."""

from __future__ import annotations

from dataclasses import asdict
from typing import Final

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import harness as h
from benchmarks.gpu.journal import Case, Figures
from benchmarks.gpu.lab import Lab, NotHere
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


def measure_ceilings(lab: Lab, case: Case, figures: Figures) -> None:
    """Speeds of a large matmul and of a large copy."""
    lab.ceilings = ceilings(lab.device, getattr(torch, case["dtype"]), lab.setting.tiny)
    figures |= {name: h.rounded(value) for name, value in asdict(lab.ceilings).items()}


def measure_attention(lab: Lab, case: Case, figures: Figures) -> None:
    """One kernel at all shapes.

    Raises:
        NotHere: the kernel does not take these tensors on this device.
    """
    for name, shape in SHAPES.items():
        figures[name] = _attention(lab, case, *shape)


def _attention(lab: Lab, case: Case, batch: int, heads: int, tokens: int) -> Figures:
    tokens = _TINY_TOKENS if lab.setting.tiny else tokens
    shape, dtype = (batch, heads, tokens, _HEAD_WIDTH), getattr(torch, case["dtype"])
    query, key, value = (torch.randn(shape, device=lab.device, dtype=dtype) for _ in range(3))

    def run() -> object:
        return scaled_dot_product_attention(query, key, value)

    with sdpa_kernel(KERNELS[case["kernel"]]):
        try:
            run()
        except RuntimeError as problem:
            if not any(text in str(problem) for text in _REFUSALS):
                raise
            kernel, place = case["kernel"], lab.device.type
            raise NotHere(f"the {kernel} kernel does not take {case['dtype']} of this shape on {place}") from None
        seconds = median_seconds(run, lab.device)
    speed = 4 * batch * heads * tokens**2 * _HEAD_WIDTH / seconds / 1e12
    return {"ms": h.rounded(seconds * 1e3), "tflop_per_s": h.rounded(speed)}
