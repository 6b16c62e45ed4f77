"""`load` runs what it loads once at each size, on the thread that calls it: no request makes a first call."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import accel_hidiff as ah
from accel_hidiff.backends import aot
from accel_hidiff.backends.base import BoundRegion
from tests.compiled.conftest import accelerate_strict, request
from tests.conftest import BOUND, SIZES, STEPS

Call = tuple[str, tuple[tuple[int, ...], ...]]  # key of the program, shapes of its inputs


class Calls:
    """Records the calls of compiled regions; `fail` may raise in their place."""

    def __init__(self) -> None:
        self.made: list[tuple[str, Call, int]] = []
        self.fail: Callable[[str], None] = lambda path: None

    def bind(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def bind(backend: Any, graph: Any, entry: Any) -> BoundRegion:
            bound, path = real(backend, graph, entry), graph.region.path

            def call(*inputs: torch.Tensor) -> Any:
                self.fail(path)
                shapes = tuple(tuple(tensor.shape) for tensor in inputs)
                self.made.append((path, (entry.digest, shapes), threading.get_ident()))
                return bound.call(*inputs)

            return BoundRegion(call, bound.bucket)

        return bind


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls = Calls()
    monkeypatch.setattr(aot.AOTBackend, "bind", calls.bind(aot.AOTBackend.bind))
    return calls


@pytest.fixture
def handle(calls: Calls, make_pipe: Any, cache_dir: Path) -> Any:
    return accelerate_strict(make_pipe(), cache_dir)


def test_every_region_and_every_size_of_a_program_was_called_before_the_first_request(
    handle: Any, calls: Calls, caplog: pytest.LogCaptureFixture
) -> None:
    seed = torch.get_rng_state()
    with caplog.at_level(logging.INFO), handle.stats.expect(bindings=BOUND, hits=0, eager_calls=0):
        report = handle.load(SIZES, STEPS, warm=True)
    assert torch.equal(torch.get_rng_state(), seed)
    assert (report.regions, report.warm_calls, report.too_large) == (BOUND, len(calls.made), ())
    assert report.load_seconds > 0 and report.warm_seconds > 0
    assert str(report) in caplog.text and f"ran {len(calls.made)} calls of them once" in str(report)
    warmed = {path for path, _, _ in calls.made}, {call for _, call, _ in calls.made}
    assert len(calls.made) < BOUND * len(SIZES) * 2  # a program that many regions share runs once at each size
    assert {thread for _, _, thread in calls.made} == {threading.get_ident()}
    calls.made.clear()
    for height, width in SIZES:
        request(handle.pipe, height, width, output_type="np")
    assert {path for path, _, _ in calls.made} <= warmed[0] and len(
        warmed[0]
    ) == BOUND - 2  # two samplers have two forms
    assert {call for _, call, _ in calls.made} <= warmed[1]


def test_on_the_cpu_nothing_is_run_unless_it_is_asked_for(handle: Any, calls: Calls) -> None:
    report = handle.load(SIZES, STEPS)
    assert (report.regions, report.warm_calls, report.warm_seconds) == (BOUND, 0, pytest.approx(0, abs=0.05))
    assert calls.made == [] and "ran" not in str(report)


def test_a_size_that_does_not_fit_the_memory_is_told_and_the_others_are_ready(handle: Any, calls: Calls) -> None:
    def fail(path: str) -> None:
        if path == "vae.decoder":
            raise torch.OutOfMemoryError("CUDA out of memory")

    calls.fail = fail
    report = handle.load([(128, 192)], STEPS, warm=True)
    (told,) = report.too_large
    assert "vae.decoder with an input of 1x4x16x24" in told and "did not fit" in str(report)
    calls.fail = lambda path: None
    with handle.stats.expect(hits=STEPS + 1, eager_calls=0, bindings=0):
        request(handle.pipe, 128, 192, output_type="np")


def test_an_artifact_that_fails_is_out_of_service_before_a_request_comes(handle: Any, calls: Calls) -> None:
    def fail(path: str) -> None:
        if path == "unet.mid_block.resnets.0":
            raise RuntimeError("no such kernel")

    calls.fail = fail
    with pytest.raises(ah.GraphMiss, match="no such kernel; it is not used again"):
        handle.load([(128, 192)], STEPS, warm=True)
    assert list(handle.verify().values()) == [None]
