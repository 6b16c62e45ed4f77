"""Packages through their C interface: the same as torch's loader computes, while other threads go on."""

from __future__ import annotations

import gc
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn

from accel_hidiff import compat
from accel_hidiff.backends.aot import OPTIONS
from accel_hidiff.backends.aot_container import Container, can_load
from accel_hidiff.backends.aot_package import Package, load_package
from accel_hidiff.device import fault_of
from accel_hidiff.failures import Fault
from tests import needs

CPU = torch.device("cpu")
TELLS_WHY = compat.torch_version() >= Version("2.13")  # older ones say to stderr alone why a call failed
Load = Callable[[], Package]


class Outer(nn.Module):
    """(n,) -> (n, n): a call takes as long, and as much memory, as is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(torch.outer(x, x + self.weight))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    needs.aot()
    path = tmp_path_factory.mktemp("package") / "outer.pt2"
    with torch.no_grad():
        shapes = ({0: torch.export.Dim("n", min=2, max=1 << 24)},)
        program = torch.export.export(Outer(), (torch.zeros(16),), dynamic_shapes=shapes)
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=dict(OPTIONS))
    return path


@pytest.fixture
def package(path: Path) -> Package:
    return over(load_package("outer", path, CPU, ""))


def over(loader: Any, module: nn.Module | None = None) -> Package:
    package = Package(loader, CPU)
    package.bind(dict((Outer() if module is None else module).named_parameters()))
    return package


def test_it_computes_what_torchs_loader_does_and_sees_weights_change(path: Path) -> None:
    assert can_load(path)
    module, x = Outer(), torch.randn(100)
    ours = over(Container(path, -1), module)
    theirs = over(torch._C._aoti.AOTIModelPackageLoader(str(path), "model", True, 1, -1), module)
    assert isinstance(load_package("outer", path, CPU, ""), Container) and ours.names == theirs.names == ["weight"]
    for value in (0.5, 2.0):
        with torch.no_grad():
            module.weight.fill_(value)
            (got,), (want,) = ours.run([x]), theirs.run([x])
        assert torch.equal(got, want) and torch.allclose(got, module(x), atol=1e-6)
    given = [x]
    ours.run(given)
    assert given == []


def test_it_is_bound_to_other_weights(path: Path) -> None:
    package, x = over(Container(path, -1)), torch.randn(10)
    other = Outer()
    with torch.no_grad():
        other.weight.fill_(3.0)
    package.unbind()
    package.bind(dict(other.named_parameters()))
    assert torch.allclose(package.run([x])[0], other(x), atol=1e-6)


def test_other_threads_run_while_it_computes(package: Package) -> None:
    """With torch's loader the other thread stands still for the whole call."""
    x, pauses, done = torch.randn(8000), [], threading.Event()

    def look() -> None:
        last = time.perf_counter()
        while not done.is_set():
            time.sleep(0.001)
            now = time.perf_counter()
            pauses.append(now - last)
            last = now

    package.run([x])
    thread = threading.Thread(target=look)
    thread.start()
    start = time.perf_counter()
    package.run([x])
    took = time.perf_counter() - start
    done.set()
    thread.join()
    assert took > 0.05 and max(pauses) < took / 2


def test_two_threads_on_one_package(package: Package) -> None:
    inputs = [torch.randn(300), torch.randn(200)]
    want = [package.run([x])[0] for x in inputs]
    right: list[bool] = []

    def work(number: int) -> None:
        right.extend(torch.equal(package.run([inputs[number]])[0], want[number]) for _ in range(200))

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 400


def test_a_call_that_does_not_fit_the_memory_says_so_and_the_next_one_is_served(package: Package) -> None:
    with pytest.raises(RuntimeError, match="API call failed") as raised:
        package.run([torch.zeros(1 << 24)])  # of which the result would take 1 PiB
    assert "\n" not in str(raised.value)
    assert fault_of(raised.value, CPU) is (Fault.MEMORY if TELLS_WHY else Fault.ARTIFACT)
    x = torch.randn(10)
    assert torch.allclose(package.run([x])[0], Outer()(x), atol=1e-6)


def test_a_call_in_which_a_signals_handler_raises_keeps_no_memory(package: Package) -> None:
    def expires(*_: Any) -> None:
        raise TimeoutError("the request took too long")

    x, process = torch.randn(8000), psutil.Process()
    package.run([x])
    before, handler = process.memory_info().rss, signal.signal(signal.SIGALRM, expires)
    try:
        for _ in range(4):
            signal.setitimer(signal.ITIMER_REAL, 0.02)
            with pytest.raises(TimeoutError):
                package.run([x])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert process.memory_info().rss - before < 2 * 4 * 8000**2  # bytes of two results


def test_another_number_of_inputs_is_refused(package: Package) -> None:
    with pytest.raises(ValueError, match="expected 1 inputs, got 2"):
        package.run([torch.zeros(2), torch.zeros(2)])


def test_its_handle_on_a_weight_goes_with_it(path: Path) -> None:
    """torch keeps one of its own (see `Package`), on a slot that holds no memory then."""
    package = over(Container(path, -1))
    package.run([torch.randn(10)])
    (slot,) = package._slots.values()
    held = slot._use_count()
    del package
    gc.collect()
    assert slot._use_count() == held - 1


def test_nothing_stays_in_the_temporary_directory(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    x = torch.randn(10)
    assert torch.allclose(over(Container(path, -1)).run([x])[0], Outer()(x), atol=1e-6)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", [b"", b"no package", None])
def test_what_is_no_package_does_not_load(tmp_path: Path, path: Path, damage: bytes | None) -> None:
    broken = tmp_path / "broken.pt2"
    if damage is not None:
        broken.write_bytes(damage)
    with pytest.raises(Exception, match=r"outer: expected a package that loads, got: .+; compile it again"):
        load_package("outer", broken, CPU, "compile it again")
