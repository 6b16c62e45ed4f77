"""After a failure, an interruption or an exception, the next request is right; a failed artifact waits for a check."""

from __future__ import annotations

import signal
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import accel_hidiff as ah
from accel_hidiff import dispatch
from accel_hidiff.backends import aot, aot_package
from accel_hidiff.backends.base import BoundRegion
from accel_hidiff.binder import BoundCall
from accel_hidiff.regions import ResnetRegion
from compile_cache import CacheKey, CompileCache, Range, ShapeBucket
from tests import models
from tests.compiled.conftest import STEPS, relative_difference, request
from tests.conftest import BOUND

CONFIG = ah.HiDiffusionConfig()


class Faults:
    """Lets calls of packages fail: those of the regions whose path begins with `path`, `times` times."""

    def __init__(self) -> None:
        self.path, self.times, self.error = "nothing", 0, RuntimeError("no such kernel\nsecond line")

    def bind(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def bind(backend: Any, graph: Any, entry: Any) -> BoundRegion:
            bound = real(backend, graph, entry)

            def call(*inputs: Any) -> Any:
                if graph.region.path.startswith(self.path) and self.times > 0:
                    self.times -= 1
                    raise self.error
                return bound.call(*inputs)

            return BoundRegion(call, bound.bucket)

        return bind


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    faults = Faults()
    monkeypatch.setattr(aot.AOTBackend, "bind", faults.bind(aot.AOTBackend.bind))
    yield faults


def served(cache: Path, on_miss: str = "eager") -> Any:
    pipe = models.build("sdxl", "text2img")
    return ah.accelerate(pipe, hidiffusion=CONFIG, cache=CompileCache(cache, read_only=True), on_miss=on_miss)


def image(pipe: Any, **changes: Any) -> torch.Tensor:
    return torch.as_tensor(request(pipe, output_type="pt", **changes))


@pytest.fixture(scope="module")
def right() -> torch.Tensor:
    pipe = models.build("sdxl", "text2img")
    ah.apply_hidiffusion(pipe, config=CONFIG)
    return image(pipe)


@pytest.mark.parametrize(
    ("path", "when"),
    [("unet.mid_block", "first call"), ("unet.down_blocks.1.attentions.0", "later"), ("vae.decoder", "later")],
)
def test_an_artifact_that_fails_runs_eager_and_is_not_used_again_until_verified(
    cache_dir: Path, faults: Faults, right: torch.Tensor, path: str, when: str
) -> None:
    handle = served(cache_dir)
    if when == "later":
        image(handle.pipe)
    faults.path, faults.times = path, 1
    assert relative_difference(image(handle.pipe), right) < 5e-3  # that very request
    assert faults.times == 0
    (reason,) = handle.stats.rejected
    assert path in reason and "RuntimeError: no such kernel; it is not used again until" in reason
    ran_eager = 1 if path == "vae.decoder" else STEPS
    with handle.stats.expect(eager_calls=ran_eager, hits=STEPS + 1 - ran_eager, compiles=0):
        assert relative_difference(image(handle.pipe), right) < 5e-3
    assert set(handle.stats.rejected) == {reason}
    assert list(handle.verify().values()) == [None] and handle.verify() == {}
    with handle.stats.expect(eager_calls=0, hits=STEPS + 1, compiles=0):
        assert relative_difference(image(handle.pipe), right) < 5e-3


def test_strict_mode_refuses_with_the_reason_and_serves_again_after_a_check(cache_dir: Path, faults: Faults) -> None:
    handle = served(cache_dir, on_miss="error")
    faults.path, faults.times = "unet.mid_block", 1
    with pytest.raises(ah.GraphMiss, match=r"unet\.mid_block.* failed: RuntimeError: no such kernel"):
        image(handle.pipe)
    with pytest.raises(ah.GraphMiss, match=r"handle\.verify"):
        image(handle.pipe)
    assert list(handle.verify().values()) == [None]
    with handle.stats.expect(eager_calls=0):
        image(handle.pipe)


def test_an_artifact_that_was_damaged_meanwhile_stays_out(own_cache: Path, faults: Faults, right: torch.Tensor) -> None:
    handle = served(own_cache)
    image(handle.pipe)
    faults.path, faults.times = "unet.mid_block.resnets.0", 1
    image(handle.pipe)
    for blob in own_cache.glob("v1/blobs/*/*"):
        blob.write_bytes(b"\0" * blob.stat().st_size)
    with pytest.warns(UserWarning, match="other bytes"):
        (wrong,) = handle.verify().values()
    assert wrong is not None and "damaged" in wrong
    with handle.stats.expect(eager_calls=STEPS):
        assert relative_difference(image(handle.pipe), right) < 5e-3


@pytest.mark.usefixtures("nothing_loaded")
def test_a_package_that_does_not_load_runs_eager(cache_dir: Path, monkeypatch: Any, right: torch.Tensor) -> None:
    def fails(*arguments: Any) -> Any:
        raise ah.CompileFailed("unet: expected a package that loads, got: no such symbol")

    monkeypatch.setattr(aot_package, "load_package", fails)
    handle = served(cache_dir)
    assert relative_difference(image(handle.pipe), right) < 5e-3
    assert handle.stats.hits == 0 and any("no such symbol" in reason for reason in handle.stats.rejected)


class TestOutOfMemory:
    """Of the device or of the host: what torch raises is raised in the place of a package's call."""

    @pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), MemoryError()])
    def test_a_second_try_succeeds_where_what_nobody_uses_was_enough(
        self, cache_dir: Path, faults: Faults, right: torch.Tensor, error: Exception
    ) -> None:
        handle = served(cache_dir, on_miss="error")
        faults.path, faults.times, faults.error = "unet.mid_block", 1, error
        with handle.stats.expect(hits=STEPS + 1, eager_calls=0):
            assert relative_difference(image(handle.pipe), right) < 5e-3
        assert faults.times == 0 and not handle.stats.rejected and handle.verify() == {}

    @pytest.mark.parametrize("on_miss", ["error", "eager", "compile"])
    def test_a_request_that_does_not_fit_fails_alone(
        self, cache_dir: Path, faults: Faults, right: torch.Tensor, on_miss: str
    ) -> None:
        handle = served(cache_dir, on_miss=on_miss)
        image(handle.pipe)
        faults.path, faults.times, faults.error = "unet.up_blocks.0", 2, torch.OutOfMemoryError("CUDA out of memory")
        with pytest.raises(
            ah.OutOfMemory, match=r"unet\.up_blocks\.0.* with an input of 2x\d+x\d+x\d+: .*smaller size"
        ) as told:
            image(handle.pipe)
        assert "\n" not in str(told.value) and faults.times == 0
        with handle.stats.expect(hits=STEPS + 1, eager_calls=0, bindings=0, misses=0):  # another size: nothing is lost
            image(handle.pipe, height=128, width=128)
        assert relative_difference(image(handle.pipe), right) < 5e-3
        assert handle.stats.eager_calls == 0 and not handle.stats.rejected and handle.verify() == {}

    def test_tensors_of_the_first_try_are_gone_before_the_second(self, cache_dir: Path, monkeypatch: Any) -> None:
        """Or the memory that they take would be missing again."""
        alive: list[bool] = []
        kept: list[weakref.ref[torch.Tensor]] = []

        def attempt(*inputs: torch.Tensor) -> torch.Tensor:
            if kept:
                alive.append(kept[0]() is not None)
                return inputs[0]
            large = torch.zeros(8)
            kept.append(weakref.ref(large))
            raise torch.OutOfMemoryError("CUDA out of memory")

        region = ResnetRegion("block", torch.nn.Conv2d(4, 4, 3), lambda image: image)
        sizes = {"batch": 1, "height": 2, "width": 2}
        bucket = ShapeBucket({name: Range.exactly(size) for name, size in sizes.items()})
        call = BoundCall(BoundRegion(attempt, bucket), region, CacheKey({"a": 1}), sizes)
        call(torch.zeros(1, 4, 2, 2))
        assert alive == [False]


class TestDeviceLost:
    ERROR = RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be reported")

    @pytest.mark.parametrize("on_miss", ["error", "eager"])
    def test_nothing_is_tried_again_and_nothing_runs_eager(self, cache_dir: Path, faults: Faults, on_miss: str) -> None:
        handle = served(cache_dir, on_miss=on_miss)
        faults.path, faults.times, faults.error = "unet.mid_block", 2, self.ERROR
        with pytest.raises(
            ah.DeviceLost, match=r"unet\.mid_block.* cpu .*illegal memory access.*start it anew"
        ) as told:
            image(handle.pipe)
        assert faults.times == 1 and "\n" not in str(told.value)
        assert handle.stats.eager_calls == 0 and not handle.stats.rejected and handle.verify() == {}


@pytest.mark.parametrize("when", [0, 1, STEPS - 1])  # in each phase
def test_a_request_that_raises_leaves_the_next_one_right(cache_dir: Path, right: torch.Tensor, when: int) -> None:
    handle = served(cache_dir, on_miss="error")

    def fails(pipe: Any, step: int, timestep: Any, kwargs: Any) -> Any:
        if step == when:
            raise TimeoutError("the client is gone")
        return kwargs

    with pytest.raises(TimeoutError):
        image(handle.pipe, callback_on_step_end=fails)
    assert relative_difference(image(handle.pipe), right) < 5e-3


def test_a_request_that_is_interrupted_leaves_the_next_one_right(cache_dir: Path, right: torch.Tensor) -> None:
    handle = served(cache_dir, on_miss="error")

    def interrupts(pipe: Any, step: int, timestep: Any, kwargs: Any) -> Any:
        pipe._interrupt = step >= 2
        return kwargs

    with handle.stats.expect(hits=3 + 1):  # three steps, and the decoder
        image(handle.pipe, callback_on_step_end=interrupts)
    assert relative_difference(image(handle.pipe), right) < 5e-3


class TestSeal:
    def test_it_needs_strict_mode(self, cache_dir: Path) -> None:
        with pytest.raises(ah.BadInput, match=r'expected on_miss="error", got \'eager\''):
            served(cache_dir).seal()

    def test_a_sealed_process_serves_and_neither_compiles_nor_writes(self, own_cache: Path, right: Any) -> None:
        pipe = models.build("sdxl", "text2img")
        handle = ah.accelerate(pipe, hidiffusion=CONFIG, cache=own_cache, on_miss="error")
        handle.load([(128, 192)], STEPS)
        handle.seal()
        try:
            before = {path: path.stat().st_mtime_ns for path in own_cache.rglob("*")}
            with handle.stats.expect(compiles=0, eager_calls=0, misses=0):
                assert relative_difference(image(pipe), right) < 5e-3
            assert {path: path.stat().st_mtime_ns for path in own_cache.rglob("*")} == before
            with pytest.raises(ah.GraphMiss, match="missing"):
                request(pipe, 72, 128)
            assert {path: path.stat().st_mtime_ns for path in own_cache.rglob("*")} == before
            with pytest.raises(RuntimeError, match="fail_on_recompile"):
                torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(2))
        finally:
            handle.remove()
        assert torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(2)).sum() == 2


def test_a_request_that_times_out_inside_of_a_compiled_call_is_no_failure_of_its_artifact(
    cache_dir: Path, faults: Faults, right: torch.Tensor
) -> None:
    handle = served(cache_dir)
    image(handle.pipe)
    faults.path, faults.times, faults.error = "unet.mid_block", 1, TimeoutError("by a signal handler")
    with pytest.raises(TimeoutError):
        image(handle.pipe)
    with handle.stats.expect(hits=STEPS + 1, eager_calls=0, bindings=0):
        assert relative_difference(image(handle.pipe), right) < 5e-3
    assert not handle.stats.rejected and handle.verify() == {}


def test_a_request_that_times_out_anywhere_leaves_the_next_one_right(cache_dir: Path, right: torch.Tensor) -> None:
    """By a timer whose signal handler raises, at moments all over the request: between bytecodes of whatever runs.

    Some of that turns every error into one of its own: a tokenizer's TimeoutError arrives as a ValueError.
    """
    rung = []

    def expires(*_: Any) -> None:
        rung.append(share)
        raise TimeoutError("the request took too long")

    handle = served(cache_dir)
    want, start = image(handle.pipe), time.perf_counter()
    image(handle.pipe)
    whole = time.perf_counter() - start
    before, expired = signal.signal(signal.SIGALRM, expires), 0
    try:
        for share in range(1, 16):
            signal.setitimer(signal.ITIMER_REAL, whole * share / 16)
            try:
                image(handle.pipe)
            except (TimeoutError, ValueError):
                assert rung[-1:] == [share], "what was raised is not of the timer"
                expired += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert torch.equal(image(handle.pipe), want), share
    finally:
        signal.signal(signal.SIGALRM, before)
    assert expired > 5 and not handle.stats.rejected and handle.stats.eager_calls == 0


def test_illegal_input_runs_eager_once_with_the_reason(cache_dir: Path, faults: Faults, right: torch.Tensor) -> None:
    handle = served(cache_dir)
    faults.path, faults.times, faults.error = "unet.up_blocks.0", 1, ValueError("expected 4 dimensions, got 3")
    with handle.stats.expect(compiles=0):
        assert relative_difference(image(handle.pipe), right) < 5e-3
    (reason,) = handle.stats.rejected
    assert "ValueError: expected 4 dimensions, got 3; it is not used again until" in reason


def test_what_is_bound_is_bounded(cache_dir: Path, monkeypatch: pytest.MonkeyPatch, right: torch.Tensor) -> None:
    """Of the calls of ever new sizes, the older half is forgotten, with its programs and cache entries."""
    monkeypatch.setattr(dispatch, "_MAX_NAMES", 12)
    handle = served(cache_dir)
    held = set()
    for height, width in [(128, 128 + 64 * n) for n in range(8)]:
        request(handle.pipe, height, width)
        held.add(len(handle._dispatcher._graphs))
    assert max(held) <= 12 and handle.stats.eager_calls == 0
    monkeypatch.setattr(dispatch, "_MAX_BOUND", 5)
    for size in ((128, 192), (256, 128), (128, 128)):
        request(handle.pipe, *size)
    assert handle._dispatcher.binder.held <= BOUND + 5
    assert relative_difference(image(handle.pipe), right) < 5e-3
    assert handle.stats.eager_calls == 0
