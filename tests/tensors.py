"""Recorded tensors: safetensors files, packed with xz where that keeps the repository small."""

from __future__ import annotations

import lzma
from pathlib import Path

from safetensors.torch import load
from torch import Tensor


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of `path` + ".xz", by name."""
    return load(lzma.decompress(path.with_name(f"{path.name}.xz").read_bytes()))
