"""Every difference between versions of torch, diffusers and transformers that this package runs on. Imports late."""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from packaging.version import Version

from accel_hidiff.errors import BadInput

TORCH = ("2.4", "2.14")  # from, below: what this package is tested with
AOT_TORCH = "2.11"  # the oldest whose AOTInductor is tested here
STANCE_TORCH = "2.6"  # the first with `torch.compiler.set_stance`
GUIDERS_DIFFUSERS = "0.42"  # the oldest whose guiders are tested here
DTYPE_DIFFUSERS = "0.42"  # older ones may ignore `dtype`, and take `torch_dtype`

_Kind = TypeVar("_Kind")


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


def require_stance(backend: str) -> None:
    """BadInput where torch cannot refuse to compile and this backend leaves programs to `torch.compile`."""
    version = torch_version()
    if backend == "inductor" and version < Version(STANCE_TORCH):
        raise BadInput(
            f"seal: expected torch >= {STANCE_TORCH} for backend {backend!r}, got {version}, which cannot be kept from "
            "compiling; install a newer torch, or do without"
        )


def at_most_one() -> Callable[[int], int]:
    """A function: the smaller of a size, maybe a symbolic one, and 1, without a branch. Dynamo of an old torch does not
    know `torch.sym_min`."""
    import torch

    return (lambda size: 2 * size // (size + 1)) if _old_dynamo() else (lambda size: torch.sym_min(size, 1))


def thread_local(kind: type[_Kind]) -> type[_Kind]:
    """For a subclass of `threading.local` that traced code reads: Dynamo of an old torch looks up its attributes as
    Python does only if the class says that it has slots."""
    if _old_dynamo():
        setattr(kind, "__slots__", ())  # noqa: B010  # mypy knows no such attribute of a type
    return kind


def _old_dynamo() -> bool:
    return torch_version() < Version(AOT_TORCH)


def many_graphs() -> AbstractContextManager[Any]:
    """While this is open, `torch.compile` makes any number of graphs of one code object.

    Dynamo of an old torch splits a region where its `UNetCall` is opened; the parts behind that are code which all
    regions share, and past its limit Dynamo would run them eager without a word.
    """
    if not _old_dynamo():
        return nullcontext()
    import torch._dynamo

    limits: Any = {"cache_size_limit": 1 << 20, "accumulated_cache_size_limit": 1 << 20}
    return torch._dynamo.config.patch(limits)


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
