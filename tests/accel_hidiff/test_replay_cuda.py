"""The order of what is asked of CUDA, and what a capture that fails leaves, told by a torch.cuda that records."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from accel_hidiff import device as device_module
from accel_hidiff.binder import not_the_artifact
from accel_hidiff.errors import CaptureFailed
from accel_hidiff.replay import cuda

DEVICE = torch.device("cuda", 0)
MIB = 1 << 20


class Stream:
    def __init__(self, log: list[str], name: str) -> None:
        self._log, self.name = log, name

    def wait_stream(self, other: Stream) -> None:
        self._log.append(f"{self.name} waits for {other.name}")

    def synchronize(self) -> None:
        self._log.append(f"wait for {self.name}")


class Graph:
    def __init__(self, log: list[str]) -> None:
        self._log = log

    def replay(self) -> None:
        self._log.append("replay")

    def reset(self) -> None:
        self._log.append("reset")


class Cuda:
    """What `torch.cuda` did, in order. `ends` is what ending a capture raises."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.here = Stream(self.log, "default")
        self.pools = 0
        self.capturing = False
        self.ends: Exception | None = None

    def install(self, patch: pytest.MonkeyPatch) -> None:
        @contextmanager
        def on_device(device: torch.device) -> Iterator[None]:
            yield

        for name in ("current_stream", "set_stream", "stream", "graph", "graph_pool_handle", "memory_snapshot"):
            patch.setattr(torch.cuda, name, getattr(self, name))
        patch.setattr(torch.cuda, "Stream", lambda device: Stream(self.log, "side"))
        patch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(self.log))
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        patch.setattr(cuda, "on_device", on_device)
        patch.setattr(cuda, "release_memory", lambda device: self.log.append("release"))
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            patch.setattr(torch._C, name, lambda *args, name=name: self.log.append(f"{name}{args}"), raising=False)

    def current_stream(self) -> Stream:
        return self.here

    def set_stream(self, stream: Stream) -> None:
        self.here = stream

    def graph_pool_handle(self) -> tuple[int, int]:
        self.pools += 1
        return 0, self.pools

    def memory_snapshot(self) -> list[dict[str, Any]]:
        pools = [(0, 0), (0, 1), (0, 1), (0, 2)]
        return [{"segment_pool_id": pool, "total_size": MIB} for pool in pools]

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        outer, self.here = self.here, stream
        yield
        self.here = outer

    @contextmanager
    def graph(self, graph: Graph, pool: Any, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        """As torch's, which leaves its stream the current one where a capture does not end."""
        outer, self.here, self.capturing = self.here, stream, True
        self.log.append(f"begin {pool} {capture_error_mode}")
        try:
            yield
        finally:
            self.capturing = False
            if self.ends is not None:
                raise self.ends
            self.here = outer
            self.log.append("end")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    fake = Cuda()
    fake.install(monkeypatch)
    return fake


def runs(fake: Cuda, out: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        fake.log.append(f"run on {fake.here.name}")
        return out

    return run


def test_a_capture_warms_up_on_its_own_stream_and_goes_into_the_pool(fake: Cuda) -> None:
    capturer = cuda.CudaCapturer(DEVICE)
    assert capturer.held_bytes() == 0 and fake.log == []
    for _ in range(2):
        capturer.capture(runs(fake, torch.zeros(1)))
        assert fake.log == [
            *("side waits for default", "run on side", "run on side", "default waits for side"),
            *("begin (0, 1) thread_local", "run on side", "end"),
        ]
        fake.log.clear()
    assert capturer.held_bytes() == 2 * MIB and fake.here.name == "default"


def test_a_replay_on_another_stream_waits_before_it_touches_the_inputs(fake: Cuda) -> None:
    capturer, out = cuda.CudaCapturer(DEVICE), torch.zeros(1)
    first, second = (capturer.capture(runs(fake, out)) for _ in range(2))
    fake.log.clear()

    def fill() -> None:
        fake.log.append("fill")
        out.fill_(7.0)

    got = first.replay(fill)
    assert got.item() == 7.0 and got.data_ptr() != out.data_ptr()
    second.replay(fill)
    assert fake.log == ["fill", "replay"] * 2
    fake.log.clear()
    with fake.stream(Stream(fake.log, "other")):
        second.replay(fill)
    assert fake.log == ["other waits for default", "fill", "replay"]


def test_the_last_graph_that_is_released_takes_the_pool_with_it(fake: Cuda) -> None:
    capturer = cuda.CudaCapturer(DEVICE)
    first, second = (capturer.capture(runs(fake, torch.zeros(1))) for _ in range(2))
    first.replay(lambda: None)
    fake.log.clear()
    first.release()
    first.release()
    assert fake.log == ["wait for default", "reset"] and capturer.held_bytes() == 2 * MIB
    second.release()
    assert capturer.held_bytes() == 0
    capturer.capture(runs(fake, torch.zeros(1)))
    assert "begin (0, 2) thread_local" in fake.log and capturer.held_bytes() == MIB


@pytest.mark.parametrize("ends", [None, RuntimeError("operation failed due to a previous error during capture")])
def test_a_capture_that_raises_leaves_nothing_behind(fake: Cuda, ends: Exception | None) -> None:
    capturer, calls = cuda.CudaCapturer(DEVICE), []
    fake.ends = ends

    def run() -> Tensor:
        calls.append(1)
        if fake.capturing:
            try:
                raise RuntimeError("cannot be captured")
            except RuntimeError as error:
                raise CaptureFailed("a region") from error
        return torch.zeros(1)

    with pytest.raises(CaptureFailed, match="a region") as caught:
        capturer.capture(run)
    assert str(caught.value.__cause__) == "cannot be captured" and len(calls) == 3
    assert fake.here.name == "default" and capturer._pool is None and not _is_held(device_module.CAPTURE)
    undone = ["_cuda_endAllocateToPool(0, (0, 1))", "_cuda_releasePool(0, (0, 1))"]
    assert [line for line in fake.log if line.startswith("_cuda")] == ([] if ends is None else undone)
    fake.ends = None
    capturer.capture(runs(fake, torch.zeros(1)))
    assert "begin (0, 2) thread_local" in fake.log


def test_a_capture_that_does_not_end_is_told(fake: Cuda) -> None:
    fake.ends = RuntimeError("invalid capture")
    with pytest.raises(RuntimeError, match="invalid capture"):
        cuda.CudaCapturer(DEVICE).capture(runs(fake, torch.zeros(1)))
    assert fake.here.name == "default"


def test_whose_fault_a_failure_is_is_not_asked_of_a_device_that_captures(
    fake: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*args: Any) -> None:
        raise AssertionError("the device was waited for, which breaks the capture")

    monkeypatch.setattr(torch.cuda, "synchronize", asked)
    fake.capturing = True
    told = not_the_artifact(RuntimeError("no such kernel"), DEVICE, "unet.mid_block")
    assert isinstance(told, CaptureFailed) and str(told) == "unet.mid_block: RuntimeError: no such kernel"


def _is_held(lock: Any) -> bool:
    free = lock.acquire(blocking=False)
    if free:
        lock.release()
    return not free or lock._is_owned()
