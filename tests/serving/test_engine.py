"""One engine in this process: faults in the middle of a request, and requests that end while they wait."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import accel_hidiff as ah
from accel_hidiff.backends import aot
from accel_hidiff.backends.base import BoundRegion
from accel_hidiff.deploy import ModelTable
from accel_hidiff.serving.engine import Engine
from accel_hidiff.serving.jobs import Event, Finished, Job, Step, Stopped
from accel_hidiff.serving.refusal import Refusal, client_gone
from accel_hidiff.serving.requests import ImageRequest
from compile_cache import CompileCache
from tests.conftest import STEPS
from tests.serving.client import until

REQUEST = ImageRequest("tiny", "a red circle", None, 128, 192, 1, 3, STEPS, None, False)


class Asked:
    """A job, and what was told of it."""

    def __init__(self, **changes: Any) -> None:
        self.events: queue.Queue[Event] = queue.Queue()
        self.job = Job(ImageRequest(**{**vars(REQUEST), **changes}), "req-0", self.events.put)

    def end(self) -> Finished | Refusal:
        while isinstance(event := self.events.get(timeout=60), Step):
            pass
        return event


@pytest.fixture
def start(model_folder: Path, cache_dir: Path) -> Iterator[Callable[..., Engine]]:
    engines = []

    def make(**settings: Any) -> Engine:
        from accel_hidiff.deployed import open_deployed_model

        options = {"sizes": ("192x128",), "steps": (STEPS,), "device": "cpu", "on_miss": "error", **settings}
        table = ModelTable("tiny", str(model_folder), **options)
        told: queue.Queue[Exception | None] = queue.Queue()
        cache = CompileCache(cache_dir, read_only=True)
        engine = Engine(table, 2, lambda model: open_deployed_model(model, cache, on_miss=model.on_miss), told.put)
        engines.append(engine)
        engine.start()
        assert told.get(timeout=60) is None
        return engine

    yield make
    for engine in engines:
        engine.close()
        assert engine.join(20)


def ask(engine: Engine, **changes: Any) -> Finished | Refusal:
    asked = Asked(**changes)
    engine.submit(asked.job)
    return asked.end()


def image(event: Finished | Refusal) -> Any:
    assert isinstance(event, Finished), event
    return np.asarray(event.images[0][0])


def failing_calls(monkeypatch: pytest.MonkeyPatch) -> list[Exception]:
    """What a region's compiled calls raise, one after the other; they work while the list is empty."""
    failing: list[Exception] = []
    bind = aot.AOTBackend.bind

    def fragile(backend: Any, graph: Any, entry: Any) -> BoundRegion:
        bound = bind(backend, graph, entry)

        def call(*inputs: Any) -> Any:
            if failing and graph.region.path == "unet.mid_block.resnets.0":
                raise failing.pop()
            return bound.call(*inputs)

        return BoundRegion(call, bound.bucket)

    monkeypatch.setattr(aot.AOTBackend, "bind", fragile)
    return failing


def raises(error: Exception) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    return fail


class TestFaults:
    @pytest.mark.parametrize("step", [0, 1, STEPS - 1])
    def test_one_in_the_middle_of_a_request_leaves_the_next_one_right(
        self, start: Any, step: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        engine = start()
        right = image(ask(engine))
        scheduler = engine.handle.pipe.scheduler
        own, calls = scheduler.step, []

        def failing(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == step + 1:
                raise RuntimeError("a step\nthat fails")
            return own(*args, **kwargs)

        scheduler.step = failing
        with caplog.at_level(logging.ERROR):
            failed = ask(engine)
        del scheduler.step
        assert isinstance(failed, Refusal) and failed.status == 500
        assert "RuntimeError" in failed.message and "\n" not in failed.message
        (record,) = [record for record in caplog.records if record.name == "accel_hidiff.serving.engine"]
        assert record.getMessage() == "req-0: the pipeline failed" and record.exc_info is not None
        assert (image(ask(engine)) == right).all() and engine.idle()

    @pytest.mark.parametrize("on_miss", ["error", "eager"])
    def test_an_artifact_that_fails_is_checked_and_serves_again(
        self, start: Any, monkeypatch: pytest.MonkeyPatch, on_miss: str
    ) -> None:
        failing = failing_calls(monkeypatch)
        engine = start(on_miss=on_miss)
        right = image(ask(engine))
        failing.append(RuntimeError("no such kernel"))
        event = ask(engine)
        if on_miss == "error":
            assert isinstance(event, Refusal) and (event.status, event.code) == (503, "graph_missing")
        else:
            assert np.abs(image(event).astype(int) - right.astype(int)).max() <= 1
            assert isinstance(event, Finished) and event.eager > 0
        until(lambda: not engine.state().ready, 5)
        assert "not loaded" in engine.state().missing[0]
        until(lambda: engine.state().ready, 20)
        assert (image(ask(engine)) == right).all()

    @pytest.mark.parametrize("where", ["compiled", "eager"])
    def test_a_request_that_does_not_fit_the_memory_fails_alone(
        self, start: Any, monkeypatch: pytest.MonkeyPatch, where: str
    ) -> None:
        failing = failing_calls(monkeypatch)
        engine = start()
        right = image(ask(engine))
        error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        if where == "compiled":
            failing += [error, error]
            refused = ask(engine)
        else:
            with monkeypatch.context() as patched:
                patched.setattr(engine.handle.pipe.scheduler, "step", raises(error))
                refused = ask(engine)
        assert isinstance(refused, Refusal) and (refused.status, refused.code) == (503, "out_of_memory")
        assert "192x128" in refused.message and not failing
        assert engine.state().ready
        again = ask(engine)
        assert (image(again) == right).all() and isinstance(again, Finished) and again.eager == 0

    @pytest.mark.parametrize("where", ["compiled", "eager"])
    def test_a_lost_device_ends_everything(
        self, start: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str
    ) -> None:
        failing = failing_calls(monkeypatch)
        engine = start()
        error = RuntimeError("CUDA error: device-side assert triggered\nCUDA kernel errors might be reported later")
        with caplog.at_level(logging.WARNING), monkeypatch.context() as patched:
            if where == "compiled":
                failing.append(error)
            else:
                patched.setattr(engine.handle.pipe.scheduler, "step", raises(error))
            jobs = [Asked(), Asked()]
            for asked in jobs:
                with suppress(Refusal):
                    engine.submit(asked.job)
            first = jobs[0].end()
        assert isinstance(first, Refusal) and (first.status, first.code) == (503, "device_lost")
        with pytest.raises(Refusal, match="answers no more"):
            engine.submit(Asked().job)
        assert engine.join(10) and not engine.state().ready
        assert "device-side assert triggered" in engine.state().lost
        (record,) = [record for record in caplog.records if record.name == "accel_hidiff.serving.engine"]
        assert record.levelno == logging.CRITICAL and "\n" not in record.getMessage()
        assert engine.handle.stats.eager_calls == 0 and engine.handle.verify() == {}

    def test_input_that_the_pipeline_refuses_is_400(self, start: Any) -> None:
        engine = start(backend="eager", cfgpp=0.6)
        refused = ask(engine, guidance=1.0)  # the service refuses it before it comes here
        assert isinstance(refused, Refusal) and refused.status == 400
        assert isinstance(ask(engine, guidance=None), Finished)

    def test_a_model_that_cannot_be_loaded_is_told_and_takes_no_requests(self) -> None:
        told: queue.Queue[Exception | None] = queue.Queue()

        def fail(model: ModelTable) -> Any:
            raise ah.BadInput("model: expected another one")

        engine = Engine(ModelTable("tiny", "some/model", sizes=("128x128",)), 2, fail, told.put)
        engine.start()
        assert isinstance(told.get(timeout=60), ah.BadInput)
        with pytest.raises(Refusal, match="not loaded yet") as refused:
            engine.submit(Asked().job)
        assert refused.value.status == 503 and not engine.state().ready
        engine.close()


class TestPipelines:
    def test_cfgpp_and_the_scheduler_of_the_table(self, start: Any, make_pipe: Any) -> None:
        engine = start(backend="eager", cfgpp=0.6, scheduler="DDIMScheduler")
        assert engine.state().ready and engine.state().graphs > 0
        got = image(ask(engine))
        from diffusers import DDIMScheduler

        pipe = make_pipe()
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        ah.apply_hidiffusion(pipe)
        ah.apply_cfgpp(pipe, 0.6)
        options = {"height": 128, "width": 192, "num_inference_steps": STEPS}
        want = pipe("a red circle", generator=torch.Generator().manual_seed(3), **options).images[0]
        assert np.abs(got.astype(int) - np.asarray(want).astype(int)).max() <= 1

    def test_a_closed_engine_ends_what_waits_and_runs(self, start: Any) -> None:
        engine = start()
        jobs = [Asked(steps=400) for _ in range(3)]
        engine.submit(jobs[0].job)
        while not engine.state().running:
            time.sleep(0.01)
        assert [engine.submit(asked.job) for asked in jobs[1:]] == [1, 2]
        with pytest.raises(Refusal) as full:
            engine.submit(Asked().job)
        assert full.value.status == 429 and full.value.headers()["Retry-After"].isdigit()
        engine.close()
        assert [asked.end().status for asked in jobs] == [503, 503, 503]
        assert engine.join(10)
        with pytest.raises(Refusal, match="stopping"):
            engine.submit(Asked().job)

    def test_one_that_ended_while_it_waited_is_not_drawn_and_frees_its_place(self, start: Any) -> None:
        engine = start()
        hits = engine.handle.stats.hits
        first, second, third = (Asked(steps=60) for _ in range(3))
        for asked in (first, second, third):
            engine.submit(asked.job)
            while not engine.state().running:
                time.sleep(0.01)
        second.job.finish(client_gone())
        fourth = Asked(steps=1)
        engine.submit(fourth.job)
        assert all(isinstance(asked.end(), Finished) for asked in (first, third, fourth))
        assert engine.handle.stats.hits == hits + 61 + 61 + 2  # steps and decoders of three requests
        assert second.events.qsize() == 1


def test_a_job_ends_once_whoever_is_first() -> None:
    for _ in range(50):
        asked = Asked()
        barrier, first = threading.Barrier(8), []

        def race(asked: Asked = asked, barrier: threading.Barrier = barrier, first: list[bool] = first) -> None:
            barrier.wait()
            first.append(asked.job.finish(client_gone()))

        threads = [threading.Thread(target=race) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(first) == [False] * 7 + [True] and asked.events.qsize() == 1
        with pytest.raises(Stopped):
            asked.job.step(Step(0, 1, 1))
