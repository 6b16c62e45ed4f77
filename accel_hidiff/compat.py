"""Every difference between versions of torch, diffusers and transformers that this package runs on. Imports late."""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.version import Version

from accel_hidiff.errors import BadInput

TORCH = ("2.4", "2.14")  # from, below: what this package is tested with
AOT_TORCH = "2.11"  # the oldest whose AOTInductor is tested here
STANCE_TORCH = "2.6"  # the first with `torch.compiler.set_stance`
GUIDERS_DIFFUSERS = "0.42"  # the oldest whose guiders are tested here
DTYPE_DIFFUSERS = "0.42"  # older ones may ignore `dtype`, and take `torch_dtype`


def torch_version() -> Version:
    """Of the installed torch."""
    return _version("torch")


def diffusers_version() -> Version:
    """Of the installed diffusers."""
    return _version("diffusers")


# ---- torch ------------------------------------------------------------------------------------------------------


def missing_for_aot() -> str:
    """Why backend "aot" cannot run here; "" where it can."""
    version = torch_version()
    return "" if version >= Version(AOT_TORCH) else f"needs torch >= {AOT_TORCH}, got {version}"


def require_aot() -> None:
    """BadInput where backend "aot" cannot run."""
    if missing := missing_for_aot():
        raise BadInput(f'backend: "aot" {missing}; install a newer torch, or use "inductor" or "eager"')


def dynamo_traces_regions() -> bool:
    """Whether `torch.compile` takes a region as it is, for a range of sizes, and does not split it."""
    return torch_version() >= Version(AOT_TORCH)


def set_stance(stance: str) -> None:
    """`torch.compiler.set_stance`; nothing on a torch that has none."""
    import torch

    if torch_version() >= Version(STANCE_TORCH):
        torch.compiler.set_stance(stance)


# ---- diffusers --------------------------------------------------------------------------------------------------


def controlnet_output() -> Any:
    """diffusers' `ControlNetOutput`."""
    return _first("ControlNetOutput", "diffusers.models.controlnets.controlnet", "diffusers.models.controlnet")


def multi_controlnet() -> Any:
    """diffusers' `MultiControlNetModel`."""
    return _first("MultiControlNetModel", "diffusers.models.controlnets", "diffusers.pipelines.controlnet")


def missing_for_guiders() -> str:
    """Why `CFGPlusPlusGuidance` cannot be used here; "" where it can."""
    version = diffusers_version()
    return "" if version >= Version(GUIDERS_DIFFUSERS) else f"needs diffusers >= {GUIDERS_DIFFUSERS}, got {version}"


def guider_classes() -> tuple[Any, Any]:
    """diffusers' `BaseGuidance` and `GuiderOutput`; BadInput where it has none that fit."""
    if missing := missing_for_guiders():
        raise BadInput(
            f"CFGPlusPlusGuidance: {missing}; install a newer diffusers, or use apply_cfgpp with an ordinary pipeline"
        )
    guiders = importlib.import_module("diffusers.guiders.guider_utils")
    return guiders.BaseGuidance, guiders.GuiderOutput


def in_dtype(dtype: Any) -> dict[str, Any]:
    """The argument of `from_pretrained` that makes weights of this dtype."""
    return {"dtype" if diffusers_version() >= Version(DTYPE_DIFFUSERS) else "torch_dtype": dtype}


# ---- transformers -----------------------------------------------------------------------------------------------


def clip_tokenizer(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], **options: Any) -> Any:
    """A CLIP tokenizer made of a vocabulary and merges; before transformers 5 it takes files only."""
    from transformers import CLIPTokenizer

    if _version("transformers") >= Version("5"):
        return CLIPTokenizer(vocab=dict(vocab), merges=list(merges), **options)
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        files[0].write_text(json.dumps(vocab), encoding="utf-8")
        files[1].write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]), encoding="utf-8")
        return CLIPTokenizer(*map(str, files), **options)


def _version(library: str) -> Version:
    """Without what a build adds ("+cpu")."""
    return Version(Version(metadata.version(library)).base_version)


def _first(name: str, module: str, older: str) -> Any:
    """What has this name in a module, or where that one does not exist, in an older one."""
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as missing:
        if not module.startswith(str(missing.name)):
            raise
        found = importlib.import_module(older)
    return getattr(found, name)
