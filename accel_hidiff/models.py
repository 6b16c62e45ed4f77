"""Loading a user's model: a local diffusers folder or a hub id, with one clear line where it is neither."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from accel_hidiff.config import check_choice
from accel_hidiff.errors import BadInput, NotAPipeline
from accel_hidiff.patching import find_unet

DTYPES = ("float32", "float16", "bfloat16")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def load_pipeline(model: str, dtype: str | None = None, device: str | None = None) -> Any:
    """A diffusers pipeline with a UNet, on a device.

    Args:
        model: a folder that `save_pretrained` wrote, or a hub id ("owner/name").
        dtype: "float32", "float16" or "bfloat16"; None: float16 on a GPU, float32 on a CPU.
        device: a torch device; None: the first GPU, or the CPU.

    Raises:
        NotAPipeline: there is no such model, or it is no pipeline with a UNet.
        BadInput: the dtype or the device cannot be used here.
    """
    folder = Path(model)
    if folder.exists() and not (folder / "model_index.json").is_file():
        found = "a file" if folder.is_file() else "a folder without one"
        raise NotAPipeline(f"model: expected a diffusers folder with model_index.json, got {found}: {model}")
    if not folder.exists() and not _HUB_ID.fullmatch(model):
        raise NotAPipeline(f"model: expected a diffusers folder or a hub id, got {model!r} (no such folder)")
    target = check_device(device)
    chosen = check_choice("dtype", dtype, DTYPES) if dtype else ("float16" if target.type == "cuda" else "float32")

    from diffusers import DiffusionPipeline

    try:
        pipe = DiffusionPipeline.from_pretrained(model, dtype=getattr(torch, chosen))
    except (OSError, ValueError, KeyError, AttributeError, ImportError, RuntimeError) as problem:
        line = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
        raise NotAPipeline(f"model: expected a diffusers pipeline, {model} cannot be loaded: {line}") from problem
    find_unet(pipe)
    return pipe.to(target)


def check_device(device: str | None) -> torch.device:
    """The device of this name, or the best one here; BadInput if it is not usable."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise BadInput(f"device: expected cpu, cuda or cuda:N, got {device!r}") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise BadInput(f"device: expected one that is usable here, got {device}; torch finds no GPU: use cpu")
    return chosen
