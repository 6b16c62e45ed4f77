"""Published figures of others, to set beside measured ones. None of them was measured here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

NOT_STATED: Final = "not stated"


@dataclass(frozen=True)
class Anchor:
    """One published figure, with what its source says of it, and no more.

    Attributes:
        system: whose figure.
        hardware, size, steps, precision: as stated there.
        before, after: with the unit; seconds and milliseconds are of one image, it/s are steps per second.
        source: where it stands.
    """

    system: str
    hardware: str
    size: str
    steps: str
    precision: str
    before: str
    after: str
    source: str


_STABLE_FAST: Final = "stable-fast README"
_ONEDIFF: Final = "onediff README"
_FAST: Final = "diffusion-fast README"
_CARD: Final = "NVIDIA's model card of SDXL for TensorRT"
_AUTHORS: Final = "HiDiffusion README and project page"
_PAPER: Final = "HiDiffusion paper, table 4"
_SDXL: Final = "SDXL 1024x1024"

ANCHORS: Final = (
    Anchor("HiDiffusion", NOT_STATED, "SDXL 2048x2048", NOT_STATED, NOT_STATED, "84 s", "53 s", _AUTHORS),
    Anchor("HiDiffusion: RAU-Net alone, then with MSW-MSA", NOT_STATED, "SD 1.5 1024x1024", NOT_STATED, NOT_STATED,
           "14.31 s", "8.26 s", _PAPER),
    Anchor("HiDiffusion: as in the row above", NOT_STATED, "SD 1.5 2048x2048", NOT_STATED, NOT_STATED, "151.6 s",
           "58.4 s", _PAPER),
    Anchor("stable-fast", "A100", _SDXL, NOT_STATED, NOT_STATED, "8.7 it/s (torch 2.1)", "11.9 it/s", _STABLE_FAST),
    Anchor("torch.compile, max-autotune", "A100", _SDXL, NOT_STATED, NOT_STATED, "8.7 it/s (torch 2.1)", "10.0 it/s",
           _STABLE_FAST),
    Anchor("stable-fast", "H100", _SDXL, NOT_STATED, NOT_STATED, "14.9 it/s (torch 2.1)", "21.6 it/s", _STABLE_FAST),
    Anchor("torch.compile, max-autotune", "H100", _SDXL, NOT_STATED, NOT_STATED, "14.9 it/s (torch 2.1)", "18.5 it/s",
           _STABLE_FAST),
    Anchor("onediff, nexfort (warm-up 251 s, from cache 116 s)", "4090", _SDXL, "20", "float16", "2.76 s",
           "1.56 s", _ONEDIFF),
    Anchor("onediff, nexfort (warm-up 309 s, from cache 73.7 s)", "A800", _SDXL, "20", "float16", "2.28 s", "1.62 s",
           _ONEDIFF),
    Anchor("onediff, OneFlow (warm-up 39.6 s, from cache 7.5 s)", "4090", "Kolors 1024x1024", "50", NOT_STATED,
           "6.55 s", "3.86 s", _ONEDIFF),
    Anchor("onediff, nexfort (warm-up 190 s, from cache 50 s)", "4090", "Kolors 1024x1024", "50", NOT_STATED,
           "6.55 s", "3.71 s", _ONEDIFF),
    Anchor("onediff", "A100-SXM", "Kolors 1024x1024", "50", NOT_STATED, "5.38 s", "3.96 s", _ONEDIFF),
    Anchor("diffusion-fast, everything", "A100-80GB", _SDXL, "30", "float32 before, int8 after", "7.36 s (eager)",
           "2.43 s", _FAST),
    Anchor("diffusion-fast, torch.compile alone", "A100-80GB", _SDXL, "30", "bfloat16", "3.32 s (SDPA)", "2.54 s",
           _FAST),
    Anchor("TensorRT", "A100", _SDXL, "30", NOT_STATED, "3,704 ms", "2,742 ms", _CARD),
    Anchor("TensorRT", "H100", _SDXL, "30", NOT_STATED, "2,496 ms", "1,471 ms", _CARD),
    Anchor("diffusers, regional compilation (compiles in 9.6 s, the whole model in 67.4 s)", "H100",
           f"Flux, size {NOT_STATED}", "28", NOT_STATED, "6.7 s", "4.5 s", "diffusers, regional compilation"),
)  # fmt: skip
