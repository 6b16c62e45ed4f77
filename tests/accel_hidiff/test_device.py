"""Several devices of a kind in one process: one key for all, and the current device stays what it was."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from accel_hidiff.backends import aot_package
from accel_hidiff.device import current_device
from accel_hidiff.errors import CompileFailed
from accel_hidiff.regions import RegionGraph
from accel_hidiff.regions.step import StepRegion
from compile_cache import Range, ShapeBucket


class Devices:
    """The current device of a machine that has several."""

    def __init__(self) -> None:
        self.current = 0
        self.made_current: list[int] = []

    def get(self) -> int:
        return self.current

    def put(self, index: int) -> None:
        self.current = index
        self.made_current.append(index)


class TestCurrentDevice:
    def test_it_is_the_one_asked_for_inside_and_the_one_before_afterwards(self) -> None:
        devices = Devices()
        with current_device(1, devices.get, devices.put):
            assert devices.current == 1
        assert devices.current == 0 and devices.made_current == [1, 0]

    @pytest.mark.parametrize("index", [0, 1])
    def test_what_the_block_makes_current_does_not_stay(self, index: int) -> None:
        devices = Devices()
        with pytest.raises(RuntimeError, match="the block fails"), current_device(index, devices.get, devices.put):
            devices.put(2)  # as torch's loader does
            raise RuntimeError("the block fails")
        assert devices.current == 0

    def test_nothing_is_asked_of_cuda_where_it_is_current_already(self) -> None:
        devices = Devices()
        with current_device(0, devices.get, devices.put):
            pass
        assert devices.made_current == []


@pytest.mark.parametrize(
    ("one", "other", "same"), [("cuda:0", "cuda:1", True), ("cuda", "cuda:1", True), ("cpu", "cuda", False)]
)
def test_a_graph_has_one_key_on_all_devices_of_a_kind(one: str, other: str, same: bool) -> None:
    region = StepRegion(4)
    bucket = ShapeBucket({"batch": Range(1, 8), "height": Range(2, 512), "width": Range(2, 512)})
    sizes = {"batch": 2, "height": 32, "width": 48}
    keys = [RegionGraph(region, {}, bucket, sizes, torch.float16, torch.device(name)).key({}) for name in (one, other)]
    assert (keys[0] == keys[1]) is same


class FakeLoader:
    """torch's loader on a machine with two devices: it makes the device current that it loads for."""

    def __init__(self, devices: Devices) -> None:
        self.devices = devices
        self.ran_on: list[int] = []

    def get_constant_fqns(self) -> list[str]:
        return []

    def load_constants(self, *args: Any, **kwargs: Any) -> None:
        pass

    def boxed_run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        self.ran_on.append(self.devices.current)
        return [torch.zeros(())]


@pytest.fixture
def two_devices(monkeypatch: pytest.MonkeyPatch) -> Devices:
    devices = Devices()
    replaced: dict[str, Callable[..., Any]] = {"current_device": devices.get, "set_device": devices.put}
    for name, function in {**replaced, "device_count": lambda: 2}.items():
        monkeypatch.setattr(torch.cuda, name, function)
    return devices


@pytest.mark.parametrize("through", ["C interface", "torch's loader"])
def test_a_package_is_loaded_for_and_runs_on_its_own_device_whichever_is_current(
    two_devices: Devices, monkeypatch: pytest.MonkeyPatch, tmp_path: Any, through: str
) -> None:
    loaded: list[tuple[Any, ...]] = []

    def load(path: Any, *options: Any) -> FakeLoader:
        two_devices.put(options[-1])
        loaded.append(options)
        return FakeLoader(two_devices)

    monkeypatch.setattr(aot_package, "can_load", lambda path: through == "C interface")
    monkeypatch.setattr(aot_package, "Container", load)
    monkeypatch.setattr(torch._C._aoti, "AOTIModelPackageLoader", load)
    loader = aot_package.load_package("unet", tmp_path, torch.device("cuda:1"), "")
    single_threaded, runners = True, 1
    assert loaded == [(1,) if through == "C interface" else ("model", single_threaded, runners, 1)]
    assert two_devices.current == 0
    package = aot_package.Package(loader, torch.device("cuda:1"))
    package.run([])
    assert loader.ran_on == [1] and two_devices.current == 0


def test_programs_that_nobody_uses_are_kept_for_each_device(two_devices: Devices, tmp_path: Any) -> None:
    digest = "0" * 64
    entry: Any = SimpleNamespace(files={"package.pt2": SimpleNamespace(sha256=digest)}, path=tmp_path, digest=digest)
    kept = aot_package.Package(FakeLoader(two_devices), torch.device("cuda:1"))
    aot_package._idle[digest, 1].append(kept)
    try:
        with pytest.raises(CompileFailed, match="expected a package that loads"):
            aot_package.bound_call("unet", entry, "package.pt2", nn.Identity(), torch.device("cuda:0"))
        assert list(aot_package._idle[digest, 1]) == [kept]
        call = aot_package.bound_call("unet", entry, "package.pt2", nn.Identity(), torch.device("cuda:1"))
        assert not aot_package._idle[digest, 1]
        del call
        assert list(aot_package._idle[digest, 1]) == [kept]
    finally:
        aot_package._idle.pop((digest, 0), None)
        aot_package._idle.pop((digest, 1), None)
