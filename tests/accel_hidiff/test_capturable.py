"""A whole UNet call gives the device work and asks it nothing: what a CUDA graph can capture, told without a GPU.

The UNet and its inputs are on torch's "meta" device, in the place of the GPU. So whatever is on the CPU is the host's,
and no operation of a call may make, read or copy such a tensor, or wait for a number of the device's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import accel_hidiff as ah
from accel_hidiff import pipeline
from accel_hidiff.replay import capturer
from tests import models
from tests.conftest import STEPS
from tests.replaying import StandInBackend

SIZES = [(128, 128), (136, 200)]  # the second one has odd windows, which are resized
KINDS = {"sdxl": 3, "sd15": 2}  # topologies


class NoHost(TorchDispatchMode):
    """Fails where a call needs the host; counts the operations that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("the call waits for a number of the device")
        if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags):
            raise RuntimeError(f"the call waits for the device to say how large the result of {func} is")
        if (device := (kwargs or {}).get("device")) is not None and torch.device(device).type == "cpu":
            raise RuntimeError(f"the call makes a tensor of the host in {func}")
        out = func(*args, **(kwargs or {}))
        for tensor in tree_flatten((args, kwargs or {}, out))[0]:
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                raise RuntimeError(f"the call has a tensor of the host in {func}")
        self.operations += 1
        return out


class NoNumbers(TorchFunctionMode):
    """Fails where a call makes a tensor of Python numbers: made on the host, and copied, whatever its device is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy):
            raise RuntimeError("the call makes a tensor of numbers of the host")
        return func(*args, **(kwargs or {}))


class OnMeta:
    """A capturer that runs a call once, without host."""

    def __init__(self, device: torch.device) -> None:
        self.operations: list[int] = []

    def capture(self, run: Callable[[], Tensor]) -> Any:
        with NoNumbers(), NoHost() as watched:
            self.out = run()
        self.operations.append(watched.operations)
        return self

    def replay(self, fill: Callable[[], None]) -> Tensor:
        raise AssertionError("nothing to replay")

    def wait(self) -> None: ...

    def release(self) -> None: ...

    def give_back(self) -> None: ...

    def held_bytes(self) -> int:
        return 0


@pytest.fixture
def capturers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[OnMeta]]:
    made: list[OnMeta] = []

    def make(device: torch.device) -> OnMeta:
        made.append(OnMeta(device))
        return made[-1]

    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)  # it knows no "meta"
    monkeypatch.setattr(capturer, "capturer_for", make)
    monkeypatch.setattr(pipeline, "create_backend", lambda *args, **kwargs: StandInBackend())
    yield made


def skeleton(cache: Path, family: str, **options: Any) -> Any:
    """A pipeline whose UNet is on the device."""
    pipe = models.build(family, "text2img")
    pipe.unet.to("meta")
    settings = {"hidiffusion": ah.HiDiffusionConfig(), "cache": cache, "on_miss": "error", "cuda_graphs": "on"}
    return ah.accelerate(pipe, **{**settings, **options})


@pytest.mark.parametrize("regions", ["blocks", "whole"])
@pytest.mark.parametrize("family", ["sdxl", "sd15"])
def test_every_kind_of_call_can_be_captured(tmp_path: Path, capturers: list[OnMeta], family: str, regions: str) -> None:
    handle = skeleton(tmp_path, family, regions=regions)
    sizes = SIZES if regions == "blocks" else SIZES[:1]
    report = handle.load(sizes, STEPS, batch_sizes=[2], warm=False)
    assert report.not_captured == ()
    operations = [count for one in capturers for count in one.operations]
    assert report.captured == len(operations) == KINDS[family] * len(sizes)
    assert min(operations) > 300, "the whole UNet ran"


def _item(hidden: Tensor) -> Tensor:
    return hidden * hidden.flatten()[0].item()


def _host_tensor(hidden: Tensor) -> Tensor:
    return hidden * torch.tensor(2.0)


def _upload(hidden: Tensor) -> Tensor:
    return hidden * torch.tensor(2.0, device=hidden.device)


def _download(hidden: Tensor) -> Tensor:
    return hidden * torch.empty_like(hidden, device="cpu").copy_(hidden).to(hidden.device)


def _to_cpu(hidden: Tensor) -> Tensor:
    hidden.cpu()
    return hidden


def _full(hidden: Tensor) -> Tensor:
    return hidden * torch.full((), 2.0)


def _mask(hidden: Tensor) -> Tensor:
    hidden[hidden > 0].sum()
    return hidden


@pytest.mark.parametrize(
    ("plant", "told"),
    [
        (_item, "waits for a number"),
        (_host_tensor, "tensor of numbers of the host"),
        (_upload, "tensor of numbers of the host"),
        (_download, "tensor of the host"),
        (_to_cpu, "tensor of the host"),
        (_mask, "waits for the device to say how large"),
        (_full, "tensor of the host"),
    ],
)
@pytest.mark.parametrize("where", ["mid_block", "time_embedding"])
def test_what_is_planted_is_found(
    tmp_path: Path, capturers: list[OnMeta], plant: Callable[[Tensor], Tensor], told: str, where: str
) -> None:
    handle = skeleton(tmp_path, "sdxl")
    module = handle.pipe.unet.get_submodule(where)
    module.register_forward_hook(lambda module, args, out: plant(out))
    report = handle.load([(128, 128)], STEPS, batch_sizes=[2], warm=False)
    assert report.captured == 0 and len(report.not_captured) == KINDS["sdxl"]
    assert all(told in line for line in report.not_captured), report.not_captured
