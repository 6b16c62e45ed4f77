"""`on_miss="background"`: served eager at once, compiled by another process, taken up between two steps."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import accel_hidiff as ah
from accel_hidiff.compiling.pool import CompilePool, _Process, work_folder
from compile_cache import CacheWriteError, CompileCache
from tests.accel_hidiff.test_variants import ATTENTION, CONVOLUTIONS, add_lora
from tests.compiled.conftest import STEPS, relative_difference, request

CONFIG = ah.HiDiffusionConfig()
KINDS = ("resnet", "transformer", "decoder")


def without(cache: Path, *kinds: str, shared: bool = True) -> Path:
    """Takes the artifacts of region kinds out of a cache; with `shared`, only their names: the programs stay."""
    store = CompileCache(cache)
    for entry in list(store.entries()):
        is_action = "region" in entry.factors
        if entry.notes["region"] in kinds and (is_action or not shared):
            store._store.record_path(entry.digest).unlink()
    return cache


@pytest.fixture
def pool() -> Iterator[CompilePool]:
    with CompilePool(idle=20) as pool:
        yield pool
    assert pool.pids() == []


@pytest.fixture
def serve(make_pipe: Any, pool: CompilePool) -> Iterator[Callable[..., Any]]:
    handles = []

    def make(cache: Path, **options: Any) -> Any:
        options = {"on_miss": "background", "background": pool, **options}
        handles.append(ah.accelerate(make_pipe(), hidiffusion=CONFIG, cache=CompileCache(cache), **options))
        return handles[-1]

    yield make
    for handle in handles:
        handle.remove()


@pytest.fixture(scope="module")
def right(make_pipe: Any) -> torch.Tensor:
    pipe = make_pipe()
    ah.apply_hidiffusion(pipe)
    return request(pipe)


def children() -> list[psutil.Process]:
    """Compiling processes and compilers below this process."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def until(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s")


class TestSwap:
    def test_graphs_are_taken_up_between_two_steps_of_a_request(self, serve: Any, own_cache: Path, right: Any) -> None:
        handle = serve(without(own_cache, "resnet"))
        served: list[tuple[int, int]] = []

        def after(pipe: Any, step: int, timestep: Any, kwargs: Any) -> Any:
            served.append((handle.stats.hits, handle.stats.eager_calls))
            if step == 2:
                assert handle.wait(240)
            return kwargs

        image = request(handle.pipe, callback_on_step_end=after)
        assert served[:3] == [(0, 1), (0, 2), (0, 3)]
        assert served[3:] == [(n, 3) for n in range(1, STEPS - 2)]
        assert relative_difference(image, right) < 5e-3
        stats = handle.stats
        assert stats.compiles == 0 and stats.background["found"] == stats.background["queued"] > 0
        assert stats.background["swapped"] == 3  # one for each phase: the first two wait for the next request
        with stats.expect(eager_calls=0, misses=0):
            assert relative_difference(request(handle.pipe), right) < 5e-3

    @pytest.mark.slow
    def test_the_reason_is_in_stats_and_explain_while_it_lasts(self, serve: Any, own_cache: Path) -> None:
        handle = serve(without(own_cache, "resnet"))
        request(handle.pipe, num_inference_steps=1)
        (reason,) = handle.stats.rejected
        assert "artifacts are being compiled in the background" in reason
        assert "queued" in str(handle.explain(128, 192, 1)) or "compiling" in str(handle.explain(128, 192, 1))
        assert handle.wait(240)
        assert handle.explain(128, 192, 1).rows[0].state == "loaded"

    def test_a_wider_range_serves_until_the_exact_graph_is_there(self, serve: Any, own_cache: Path, right: Any) -> None:
        handle = serve(own_cache, shapes="exact")
        with handle.stats.expect(eager_calls=0, hits=1):
            request(handle.pipe, num_inference_steps=1)
        assert handle.stats.background["queued"] > 0
        handle.remove()

    def test_graphs_that_arrive_after_a_change_are_not_bound_to_what_came_in_its_place(
        self, serve: Any, own_cache: Path, right: Any
    ) -> None:
        """Between two requests: LoRA layers are there when the graphs of the UNet without them arrive."""
        handle = serve(without(own_cache, "resnet"))
        request(handle.pipe, num_inference_steps=1)
        add_lora(handle.pipe.unet, ATTENTION + CONVOLUTIONS)
        assert handle.wait(240)
        assert handle.stats.background["found"] == handle.stats.background["queued"]
        handle.pipe.unet.unload_lora()
        with handle.stats.expect(eager_calls=0, hits=STEPS):
            assert relative_difference(request(handle.pipe), right) < 5e-3
        assert not any("artifact" in reason and "failed" in reason for reason in handle.stats.rejected)
        assert handle.verify() == {}

    def test_waiting_jobs_end_with_the_handle(self, make_pipe: Any, own_cache: Path, pool: CompilePool) -> None:
        cache = CompileCache(without(own_cache, "resnet", "transformer"))
        options = {"on_miss": "background", "background": pool}
        handle = ah.accelerate(make_pipe(), hidiffusion=CONFIG, cache=cache, **options)
        request(handle.pipe)
        handle.remove()
        until(lambda: not handle._dispatcher.background._pending(), 240)
        assert handle.stats.background["cancelled"] >= 1


class TestProcess:
    @pytest.mark.slow
    def test_it_has_the_lowest_priority_and_one_thread(self, serve: Any, own_cache: Path, pool: CompilePool) -> None:
        handle = serve(without(own_cache, "resnet"))
        request(handle.pipe, num_inference_steps=1)
        (pid,) = until(pool.pids)
        process = psutil.Process(pid)
        until(lambda: process.nice() == 19 and os.sched_getscheduler(pid) == os.SCHED_IDLE, 30)
        assert process.environ()["OMP_NUM_THREADS"] == "1"
        assert handle.wait(240)

    def test_one_that_is_killed_is_started_once_more(
        self, serve: Any, own_cache: Path, pool: CompilePool, right: Any
    ) -> None:
        handle = serve(without(own_cache, "resnet"))
        request(handle.pipe, num_inference_steps=1)
        (pid,) = until(pool.pids)
        os.kill(pid, signal.SIGKILL)
        assert handle.wait(240)
        assert handle.stats.background["found"] == handle.stats.background["queued"]
        assert relative_difference(request(handle.pipe), right) < 5e-3
        assert list((own_cache / "v1" / "tmp").glob(f"*-{pid}-*")) == []

    def test_one_that_dies_each_time_is_given_up_for_a_while(
        self, serve: Any, own_cache: Path, monkeypatch: pytest.MonkeyPatch, right: Any
    ) -> None:
        monkeypatch.setenv("PYTHONOPTIMIZE", "not a number")
        monkeypatch.setattr(sys, "executable", shutil.which("false"))
        handle = serve(without(own_cache, "decoder"))
        request(handle.pipe, output_type="np")
        assert handle.wait(60)
        request(handle.pipe, output_type="np")
        assert handle.stats.background == {"queued": 1, "died": 1}
        assert any("the compiling process ended with exit code 1" in reason for reason in handle.stats.rejected)
        assert CompileCache(own_cache).failures.digests() == []  # it says nothing of the graph

    @pytest.mark.parametrize(("limit", "message"), [({"max_memory": 10_000_000}, "of memory"), ({"timeout": 0}, "0 s")])
    def test_it_is_ended_over_its_limits(
        self, make_pipe: Any, own_cache: Path, limit: dict[str, Any], message: str
    ) -> None:
        cache = CompileCache(without(own_cache, "decoder"))
        with CompilePool(**limit) as pool:
            options = {"on_miss": "background", "background": pool}
            handle = ah.accelerate(make_pipe(), hidiffusion=CONFIG, cache=cache, **options)
            request(handle.pipe, output_type="np")
            assert handle.wait(60)
            until(lambda: not children(), 10)
        assert handle.stats.background == {"queued": 1, "failed": 1}
        (digest,) = cache.failures.digests()
        assert message in cache.failures.of(digest).error
        handle.remove()


_PARENT = """
import sys, time
import torch
import accel_hidiff as ah
from accel_hidiff.models import load_pipeline
from compile_cache import CompileCache

pipe = load_pipeline(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
handle = ah.accelerate(pipe, hidiffusion=ah.HiDiffusionConfig(), cache=CompileCache(sys.argv[2]), on_miss="background")
pipe("a red circle", height=128, width=192, num_inference_steps=1, output_type="latent")
from accel_hidiff.compiling.pool import default_pool
while not default_pool().pids():
    time.sleep(0.05)
print(*default_pool().pids(), flush=True)
time.sleep(float(sys.argv[3]))
"""


class TestParent:
    """No orphans, whatever happens to the process that serves."""

    def start(self, model: Path, cache: Path, seconds: float = 600) -> tuple[subprocess.Popen[str], int]:
        command = [sys.executable, "-c", _PARENT, str(model), str(cache), str(seconds)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(ah.__file__).parents[1])}
        parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert parent.stdout is not None
        return parent, int(parent.stdout.readline())

    @staticmethod
    def gone(group: int) -> bool:
        """Whether no process of a process group lives."""
        for process in psutil.process_iter(["pid", "status"]):
            try:
                if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                    return False
            except ProcessLookupError:
                continue
        return True

    @pytest.mark.slow
    @pytest.mark.parametrize("seconds", [0.5, 15.0])  # importing, compiling
    def test_compilers_end_with_a_parent_that_is_killed(
        self, model_folder: Path, own_cache: Path, seconds: float
    ) -> None:
        parent, worker = self.start(model_folder, without(own_cache, "resnet", shared=False))
        time.sleep(seconds)
        parent.kill()
        parent.wait()
        until(lambda: self.gone(worker), 15)
        assert CompileCache(own_cache).verify().ok

    def test_compilers_end_with_a_parent_that_ends(self, model_folder: Path, own_cache: Path) -> None:
        parent, worker = self.start(model_folder, without(own_cache, "resnet", shared=False), 0.1)
        assert parent.wait(60) == 0
        until(lambda: self.gone(worker), 5)
        assert list((own_cache / "v1" / "tmp").iterdir()) == []

    @pytest.mark.slow
    def test_parent_and_compiler_killed_at_once(self, model_folder: Path, own_cache: Path) -> None:
        parent, worker = self.start(model_folder, without(own_cache, "resnet", shared=False))
        time.sleep(12)
        os.kill(worker, signal.SIGKILL)
        parent.kill()
        parent.wait()
        until(lambda: self.gone(worker), 60)  # a C++ compiler that is at work ends with its file
        assert CompileCache(own_cache).verify().ok
        parent, worker = self.start(model_folder, own_cache, 0.1)  # it comes back
        assert parent.wait(60) == 0


class TestFailure:
    @pytest.mark.slow
    def test_it_is_remembered_with_its_error_and_not_tried_again(
        self, serve: Any, own_cache: Path, monkeypatch: pytest.MonkeyPatch, right: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        without(own_cache, "decoder", shared=False)
        monkeypatch.setenv("CXX", "/no/such/compiler")
        handle = serve(own_cache)
        eager = request(handle.pipe, output_type="np")
        assert handle.wait(240)
        assert handle.stats.background == {"queued": 1, "failed": 1}
        assert any("vae.decoder: failed in" in record.message for record in caplog.records)
        with handle.stats.expect(eager_calls=1, hits=STEPS):
            assert (request(handle.pipe, output_type="np") == eager).all()
        assert handle.stats.background["queued"] == 1
        assert any("it stays eager" in reason and "AOTInductor failed" in reason for reason in handle.stats.rejected)
        row = handle.explain(128, 192, STEPS).rows[-1]
        assert "1 failed" in row.state and "its build failed at" in row.reason

        other = serve(own_cache)  # another process would find the same
        request(other.pipe, output_type="np")
        assert other.wait(10) and other.stats.background == {}

        monkeypatch.undo()
        other.precompile([(128, 192)], STEPS)
        with other.stats.expect(eager_calls=0):
            request(other.pipe, output_type="np")

    def test_models_that_cannot_be_described_stay_eager(self, serve: Any, own_cache: Path) -> None:
        handle = serve(without(own_cache, "decoder"))
        handle.pipe.vae.encoder.note = lambda: None
        request(handle.pipe, output_type="np")
        assert handle.wait(10)
        assert any("cannot be described to a compiling process" in reason for reason in handle.stats.rejected)


class TestBadInput:
    def test_a_backend_that_keeps_nothing(self, make_pipe: Any, own_cache: Path) -> None:
        with pytest.raises(ah.BadInput, match="compiles in every process anew"):
            ah.accelerate(make_pipe(), cache=own_cache, backend="inductor", on_miss="background")

    def test_a_read_only_cache(self, make_pipe: Any, own_cache: Path) -> None:
        with pytest.raises(CacheWriteError, match="read_only=True"):
            ah.accelerate(make_pipe(), cache=CompileCache(own_cache, read_only=True), on_miss="background")

    @pytest.mark.parametrize("options", [{"workers": 0}, {"max_memory": 0}, {"timeout": -1}, {"idle": "1"}])
    def test_a_pool_that_cannot_be(self, options: dict[str, Any]) -> None:
        with pytest.raises(ah.BadInput, match="expected"):
            CompilePool(**options)


@pytest.mark.slow
def test_two_replicas_compile_a_graph_once(make_pipe: Any, own_cache: Path) -> None:
    """In a cache whose path has a space, which torch does not quote where it calls the compiler."""
    own_cache = own_cache.rename(own_cache.with_name("a cache"))
    without(own_cache, "decoder", shared=False)
    handles = []
    with CompilePool() as first, CompilePool() as second:
        for pool in (first, second):
            options = {"cache": CompileCache(own_cache), "on_miss": "background", "background": pool}
            handles.append(ah.accelerate(make_pipe(), hidiffusion=CONFIG, **options))
        for handle in handles:
            request(handle.pipe, output_type="np", num_inference_steps=1)
        assert all(handle.wait(240) for handle in handles)
    outcomes = [handle.stats.background for handle in handles]
    assert sorted(key for counts in outcomes for key in counts if key in ("compiled", "found")) == ["compiled", "found"]
    assert children() == []


def test_closing_waits_for_a_process_that_was_ending_by_itself(
    make_pipe: Any, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end, ending = _Process.end, threading.Event()

    def slowly(process: _Process) -> None:
        ending.set()
        time.sleep(1)
        end(process)

    monkeypatch.setattr(_Process, "end", slowly)
    with CompilePool(idle=0) as pool:
        options = {"cache": CompileCache(without(own_cache, "decoder")), "on_miss": "background", "background": pool}
        handle = ah.accelerate(make_pipe(), hidiffusion=CONFIG, **options)
        request(handle.pipe, output_type="np", num_inference_steps=1)
        assert ending.wait(60)
        handle.remove()
    assert pool.pids() == []


def test_compilers_work_in_the_cache_unless_they_could_not_read_its_path(tmp_path: Path) -> None:
    for name, inside in (("plain-1.0_a", True), ("a cache", False), ("caf\u00e9's", False)):
        with work_folder(CompileCache(tmp_path / name)) as work:
            assert work.is_dir() and (tmp_path / name in work.parents) == inside and " " not in str(work)
        assert not work.exists()


class TestPrecompileInProcesses:
    def test_it_makes_the_same_keys_and_is_resumable(self, make_pipe: Any, cache_dir: Path, own_cache: Path) -> None:
        without(own_cache, "decoder", "resnet")
        handle = ah.accelerate(make_pipe(), hidiffusion=CONFIG, cache=own_cache)
        events = []
        report = handle.precompile([(128, 192)], STEPS, jobs=2, progress=events.append)
        assert report.compiled == 0 and report.artifacts == len({event.number for event in events})
        assert [event.state for event in events].count("compiling") > 0
        whole = set(CompileCache(cache_dir).digests())
        assert {entry.digest for entry in CompileCache(own_cache).entries()} <= whole
        strict = ah.accelerate(handle.pipe, hidiffusion=CONFIG, cache=own_cache, on_miss="error")
        request(strict.pipe, output_type="np")
        assert children() == []

    def test_one_that_fails_leaves_the_others(
        self, make_pipe: Any, own_cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        without(own_cache, "resnet")
        without(own_cache, "decoder", shared=False)
        monkeypatch.setenv("CXX", "/no/such/compiler")
        handle = ah.accelerate(make_pipe(), hidiffusion=CONFIG, cache=own_cache)
        with pytest.raises(ah.CompileFailed, match=r"vae.decoder: AOTInductor failed.*\(1 of \d+ graphs failed"):
            handle.precompile([(128, 192)], STEPS, jobs=1)
        missing = handle.missing(handle.needed([(128, 192)], [STEPS]))
        assert len(missing) == 1
