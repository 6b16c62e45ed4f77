"""Loading a user's model: a local diffusers folder or a hub id, with one clear line where it is neither."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from accel_hidiff.architectures import configs_of, is_architecture
from accel_hidiff.compat import in_dtype, multi_controlnet
from accel_hidiff.config import check_choice
from accel_hidiff.errors import BadInput, NotAPipeline
from accel_hidiff.patching import find_unet

DTYPES = ("float32", "float16", "bfloat16")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def load_pipeline(
    model: str, dtype: str | None = None, device: str | None = None, controlnets: Sequence[str] = ()
) -> Any:
    """A diffusers pipeline with a UNet, on a device.

    Args:
        model: a folder that `save_pretrained` wrote, or a hub id ("owner/name").
        dtype: "float32", "float16" or "bfloat16"; None: float16 on a GPU, float32 on a CPU.
        device: a torch device; None: the first GPU, or the CPU.
        controlnets: folders or hub ids of ControlNets; with any, the model's ControlNet pipeline.

    Raises:
        NotAPipeline: there is no such model, or it is no pipeline with a UNet.
        BadInput: the dtype or the device cannot be used here.
    """
    if is_architecture(model):
        raise NotAPipeline(
            f"model: expected one with weights, got the architecture {model!r}; name a folder or a hub id to run it"
        )
    target, chosen = _target(model, dtype, device)

    import diffusers  # it imports a class, and what that one needs, when it is asked for

    with _one_line(model):
        pipe = diffusers.DiffusionPipeline.from_pretrained(model, **in_dtype(chosen))
    find_unet(pipe)
    nets = []
    for name in controlnets:
        with _one_line(name):
            nets.append(diffusers.ControlNetModel.from_pretrained(name, **in_dtype(chosen)))
    if nets:
        with _one_line(model):
            pipe = diffusers.AutoPipelineForText2Image.from_pipe(pipe, controlnet=nets if len(nets) > 1 else nets[0])
    return pipe.to(target)


def load_skeleton(
    model: str,
    dtype: str | None = None,
    device: str | None = None,
    controlnets: Sequence[str] = (),
    *,
    elsewhere: bool = False,
) -> tuple[Any, torch.device]:
    """A pipeline without weights, from its configs alone, and the device that it is meant for.

    Its UNet, ControlNets and VAE are on torch's "meta" device: they have structure, shapes and dtypes, and take no
    memory. Text encoders and tokenizers are left out. Enough to plan, to name each graph and to look for it in a cache.

    Args:
        model, dtype, device, controlnets: as of `load_pipeline`; a model or ControlNet may also be a published
            architecture ("arch:sdxl", see `architectures`).
        elsewhere: it is meant for a GPU that this machine need not have.

    Raises: as `load_pipeline`.
    """
    import diffusers

    target, chosen = _target(model, dtype, device, elsewhere)
    with _one_line(model):
        model, controlnets = configs_of(model), [configs_of(name, "controlnet") for name in controlnets]
        index = diffusers.DiffusionPipeline.load_config(model)
        pipeline_class = getattr(diffusers, str(index["_class_name"]))
        parts: dict[str, Any] = {}
        for name, entry in index.items():
            if not name.startswith("_"):
                parts[name] = _part(model, name, entry, chosen) if isinstance(entry, list) else entry
        pipe = pipeline_class(**parts)
    find_unet(pipe)
    nets = []
    for name in controlnets:
        with _one_line(name):
            nets.append(_weightless(diffusers.ControlNetModel, name, None, chosen))
    if nets:
        with _one_line(model):
            controlnet = nets if len(nets) > 1 else nets[0]
            pipe = diffusers.AutoPipelineForText2Image.from_pipe(pipe, controlnet=controlnet)
    return pipe, target


def _part(model: str, name: str, entry: list[str | None], dtype: torch.dtype) -> Any:
    import diffusers

    library, class_name = entry
    kind = getattr(diffusers, str(class_name), None) if library == "diffusers" else None
    if name == "scheduler":
        return getattr(diffusers, str(class_name)).from_pretrained(model, subfolder=name)
    if class_name == "MultiControlNetModel":
        folders = [name, *(f"{name}_{number}" for number in range(1, 100))]
        found = [folder for folder in folders if (Path(model) / folder).is_dir()]
        return multi_controlnet()(
            [_weightless(diffusers.ControlNetModel, model, folder, dtype) for folder in found]
        ).eval()
    if isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin):
        return _weightless(kind, model, name, dtype)
    return None


def _weightless(kind: Any, model: str, subfolder: str | None, dtype: torch.dtype) -> Any:
    with torch.device("meta"):
        made = kind.from_config(kind.load_config(model, subfolder=subfolder))
    return made.to(dtype).eval()


def _target(
    model: str, dtype: str | None, device: str | None, elsewhere: bool = False
) -> tuple[torch.device, torch.dtype]:
    """The device and dtype to use; NotAPipeline where there can be no such model."""
    folder = Path(configs_of(model)) if elsewhere or is_architecture(model) else Path(model)
    if folder.exists() and not (folder / "model_index.json").is_file():
        found = "a file" if folder.is_file() else "a folder without one"
        raise NotAPipeline(f"model: expected a diffusers folder with model_index.json, got {found}: {model}")
    if not folder.exists() and not _HUB_ID.fullmatch(model):
        raise NotAPipeline(f"model: expected a diffusers folder or a hub id, got {model!r} (no such folder)")
    target = torch.device("cuda") if elsewhere else check_device(device)
    chosen = check_choice("dtype", dtype, DTYPES) if dtype else ("float16" if target.type == "cuda" else "float32")
    return target, getattr(torch, chosen)


@contextmanager
def _one_line(model: str) -> Iterator[None]:
    """What diffusers raises for a model that it cannot load, as one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, AttributeError, ImportError, RuntimeError, TypeError) as problem:
        line = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
        raise NotAPipeline(f"model: expected a diffusers pipeline, {model} cannot be loaded: {line}") from problem


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
