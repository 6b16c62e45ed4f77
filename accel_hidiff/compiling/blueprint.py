"""Blueprints: the served models of a pipeline without their weights, to be built again in a compiling process.

A blueprint is a pickle that goes from a process to its own child over a private pipe, and nowhere else. Tensors go as
shape, strides and dtype; forwards that patches installed and hooks stay behind. So it is small (SDXL: under 2 MB), and
has whatever changed the models' structure: LoRA layers, fused projections, other attention processors. Whether it is
the same structure is not trusted but checked: a job names its graph's key, and the worker computes it anew.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn

from accel_hidiff.config import HiDiffusionConfig, OneDiffConfig
from accel_hidiff.errors import CompileFailed
from accel_hidiff.regions import Region, RegionGraph
from accel_hidiff.target import Target
from accel_hidiff.undo import is_installed
from accel_hidiff.weights import stood_in_for, zeros_like
from compile_cache import ShapeBucket

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_OFFLOAD = ("_hf_hook", "_diffusers_hook")


class Parts:
    """What stands in for a pipeline in a compiling process: its models alone."""

    def __init__(self, unet: Any, vae: Any, controlnet: Any) -> None:
        self.unet = unet
        self.vae = vae
        self.controlnet = controlnet


@dataclass(frozen=True)
class Blueprint:
    """The served models of a pipeline, without weights.

    Attributes:
        models: pickle of `Parts`; tensors are on torch's "meta" device.
        config, regions, family, task: what they are patched with.
        backend: compiles them.
        target: what GPU code is for; None: the device of a job.
        decode_dtype: as in `DecodeConfig`.
    """

    models: bytes
    config: HiDiffusionConfig
    regions: str
    family: str
    task: str
    backend: str | OneDiffConfig
    target: Target | None = None
    decode_dtype: str | None = None

    @classmethod
    def of(
        cls,
        pipe: Any,
        *,
        config: HiDiffusionConfig,
        regions: str,
        family: str,
        task: str,
        backend: str | OneDiffConfig,
        target: Target | None = None,
        decode_dtype: str | None = None,
    ) -> Blueprint:
        """The blueprint of a pipeline; what is patched in it stays as it is.

        Raises:
            CompileFailed: something in the models cannot go to another process.
        """
        parts = Parts(pipe.unet, getattr(pipe, "vae", None), getattr(pipe, "controlnet", None))
        stream = io.BytesIO()
        try:
            _WeightlessPickler(stream, protocol=pickle.HIGHEST_PROTOCOL).dump(parts)
        except (pickle.PicklingError, AttributeError, TypeError, RecursionError) as problem:
            first = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
            raise CompileFailed(
                f"the models cannot be described to a compiling process: {first}; compile them in this process "
                "(handle.precompile) or keep what they hold in an importable module"
            ) from problem
        return cls(stream.getvalue(), config, regions, family, task, backend, target, decode_dtype)

    def digest(self) -> str:
        """SHA-256, 64 hex digits."""
        told = self.config, self.regions, self.family, self.task, self.backend, self.target, self.decode_dtype
        return hashlib.sha256(self.models + repr(told).encode()).hexdigest()

    def parts(self) -> Parts:
        """The models, in a compiling process."""
        parts: Parts = pickle.loads(self.models)
        return parts


@dataclass(frozen=True)
class CompileJob:
    """One graph of one region, by name; everything else is in the blueprint.

    Attributes:
        digest: of the graph's key, which the worker has to find again.
        path: of the region.
        traits, bucket, example_sizes, dtype, device, wide: as in `RegionGraph`.
    """

    digest: str
    path: str
    traits: Mapping[str, Any]
    bucket: ShapeBucket
    example_sizes: Mapping[str, int]
    dtype: str
    device: str
    wide: bool = False

    @classmethod
    def of(cls, graph: RegionGraph, digest: str) -> CompileJob:
        """The job that compiles a graph."""
        dtype, device = str(graph.dtype).removeprefix("torch."), str(graph.device)
        sizes = dict(graph.example_sizes)
        return cls(digest, graph.region.path, dict(graph.traits), graph.bucket, sizes, dtype, device, graph.wide)

    def graph(self, region: Region) -> RegionGraph:
        """The graph again, of the region in this process."""
        dtype, device = getattr(torch, self.dtype), torch.device(self.device)
        return RegionGraph(region, self.traits, self.bucket, self.example_sizes, dtype, device, self.wide)


@contextmanager
def materialized(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Zeros on a device in the place of a module's meta tensors, inside of the block.

    Compilers look at weights' shapes, strides and dtypes only; memory is taken for one region at a time.
    """
    with stood_in_for(module, lambda weight: zeros_like(weight, device)):
        yield


class _WeightlessPickler(pickle.Pickler):
    """Pickles modules without the values of their tensors, without installed forwards and without hooks."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            facts = tuple(value.shape), tuple(value.stride()), value.dtype, value.requires_grad
            return _meta_tensor, (isinstance(value, nn.Parameter), *facts)
        if isinstance(value, nn.Module):
            return _new, (type(value),), _state(value)
        if isinstance(value, FrozenDict):  # its own pickle cannot be read again: it refuses to be filled
            return FrozenDict, (dict(value),)
        return NotImplemented


def _state(module: nn.Module) -> dict[str, Any]:
    state = {}
    for name, value in vars(module).items():
        if name.startswith("_accel_hidiff") or name in _OFFLOAD or is_installed(value):
            continue
        state[name] = type(value)() if name in _HOOKS else value
    return state


def _new(kind: type[nn.Module]) -> nn.Module:
    return kind.__new__(kind)


def _meta_tensor(
    parameter: bool, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, requires_grad: bool
) -> Tensor:
    tensor = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    if parameter:
        return nn.Parameter(tensor, requires_grad=requires_grad)
    return tensor.requires_grad_(requires_grad)
