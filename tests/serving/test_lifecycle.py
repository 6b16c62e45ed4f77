"""From the first line to the exit code: loading, ready, stopped, killed, broken."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

import accel_hidiff as ah
from compile_cache import CompileCache
from tests.compiled.test_background import without
from tests.conftest import ARTIFACTS
from tests.serving.client import RunningService, asked, error_of, session, until, write_deploy_file

LONG = {"steps": 1000, "n": 4}


@pytest.fixture
def models(model_folder: Path) -> dict[str, dict[str, Any]]:
    return {"tiny": {"model": str(model_folder)}}


def later(service: RunningService, **fields: Any) -> tuple[threading.Thread, list[httpx.Response | Exception]]:
    """Asks in a thread, and waits until it is drawn."""
    answers: list[httpx.Response | Exception] = []

    def ask() -> None:
        try:
            answers.append(httpx.post(f"{service.url}/v1/images/generations", json=asked(**fields), timeout=60))
        except httpx.HTTPError as problem:
            answers.append(problem)

    thread = threading.Thread(target=ask)
    thread.start()
    until(lambda: service.metric("running") == 1)
    return thread, answers


def test_loading_ready_drained(models: Any, cache_dir: Path, tmp_path: Path) -> None:
    limits = {"max_steps": 1000, "drain": 60.0}
    with RunningService(write_deploy_file(tmp_path, cache_dir, models, limits)) as service:
        assert service.first_line.startswith("serving on http://127.0.0.1:")
        assert service.client.get("/livez").status_code == 200
        answer = service.client.get("/healthz")
        assert answer.status_code == 503 and answer.json()["status"] == "loading"
        assert answer.json()["models"]["tiny"]["why"] == ["its weights are not loaded yet"]
        early = service.draw()
        assert early.status_code == 503 and error_of(early)["code"] == "model_loading" and early.headers["retry-after"]
        told = service.wait_ready()
        assert told["models"]["tiny"] | {"seconds": None} == {
            **{"ready": True, "graphs": ARTIFACTS, "missing": 0, "why": [], "seconds": None}
        }
        right = service.draw(steps=200).json()["data"]
        thread, answers = later(service, steps=200)
        service.popen.terminate()
        until(lambda: service.client.get("/healthz").json()["status"] == "stopping")
        assert service.client.get("/healthz").status_code == 503 and service.client.get("/livez").status_code == 200
        refused = service.draw()
        assert refused.status_code == 503 and error_of(refused)["code"] == "stopping"
        thread.join()
        (drained,) = answers
        assert isinstance(drained, httpx.Response) and drained.json()["data"] == right
        assert service.popen.wait(30) == 0
        assert session(service.popen.pid) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_what_does_not_end_in_time_is_refused(models: Any, cache_dir: Path, tmp_path: Path, number: int) -> None:
    limits = {"max_steps": 1000, "drain": 0.5}
    with RunningService(write_deploy_file(tmp_path, cache_dir, models, limits)) as service:
        service.wait_ready()
        thread, answers = later(service, **LONG)
        start = time.monotonic()
        service.popen.send_signal(number)
        thread.join()
        (answer,) = answers
        assert isinstance(answer, httpx.Response) and answer.status_code == 503
        assert error_of(answer)["code"] == "stopping"
        assert service.popen.wait(30) == 0 and time.monotonic() - start < 10
        assert "Traceback" not in service.log


def test_a_signal_while_models_load_ends_it(models: Any, cache_dir: Path, tmp_path: Path) -> None:
    with RunningService(write_deploy_file(tmp_path, cache_dir, models)) as service:
        assert service.client.get("/livez").status_code == 200
        start = time.monotonic()
        assert service.stop() == 0 and time.monotonic() - start < 5


def test_killed_in_a_request_it_comes_back_ready_from_a_valid_cache(
    models: Any, own_cache: Path, tmp_path: Path
) -> None:
    limits = {"max_steps": 1000}
    file = write_deploy_file(tmp_path, own_cache, models, limits)
    with RunningService(file) as service:
        service.wait_ready()
        right = service.draw().json()["data"]
        thread, answers = later(service, **LONG)
        service.popen.kill()
        thread.join()
        assert isinstance(answers[0], httpx.HTTPError)
        assert service.popen.wait(10) == -signal.SIGKILL
        until(lambda: session(service.popen.pid) == [], 10)
    assert CompileCache(own_cache).verify().ok
    with RunningService(file) as service:
        assert service.wait_ready()["models"]["tiny"]["missing"] == 0
        assert service.draw().json()["data"] == right
        assert service.metric("compiles_total") == 0 and service.stop() == 0


class TestMissingGraphs:
    def test_strict_it_is_not_ready_until_they_are_there(
        self, models: Any, cache_dir: Path, own_cache: Path, tmp_path: Path
    ) -> None:
        without(own_cache, "decoder", shared=False)
        with RunningService(write_deploy_file(tmp_path, own_cache, models)) as service:
            until(lambda: service.client.get("/healthz").json()["models"]["tiny"]["graphs"] == ARTIFACTS, 60, service)
            until(
                lambda: service.metric("ready") == 0 and service.draw().json()["error"]["code"] == "graph_missing", 30
            )
            told = service.client.get("/healthz")
            assert told.status_code == 503 and told.json()["models"]["tiny"]["missing"] == 1
            assert told.json()["models"]["tiny"]["why"][0].startswith("vae.decoder: ")
            assert "not ready: vae.decoder: " in service.log
            answer = service.draw(stream=True)
            assert answer.status_code == 200 and "graph_missing" in answer.text
            CompileCache(own_cache).import_bundle(_bundle(cache_dir, tmp_path))  # another machine compiled it
            service.wait_ready(30)
            assert service.draw().json()["served"] == {"compiled": 4, "eager": 0}
            assert service.stop() == 0

    @pytest.mark.slow
    def test_background_it_serves_eager_and_gets_ready(self, models: Any, own_cache: Path, tmp_path: Path) -> None:
        without(own_cache, "resnet")
        models["tiny"]["on_miss"] = "background"
        with RunningService(write_deploy_file(tmp_path, own_cache, models, {"max_steps": 1000})) as service:
            until(lambda: service.client.get("/healthz").json()["models"]["tiny"]["graphs"] == ARTIFACTS, 60, service)
            eager = until(lambda: (answer := service.draw()).status_code == 200 and answer.json(), 30)
            assert eager["served"] == {"compiled": 1, "eager": 3}
            assert len(session(service.popen.pid)) == 2  # the service and one compiling process
            service.wait_ready(240)
            compiled = service.draw().json()
            assert compiled["served"] == {"compiled": 4, "eager": 0}
            assert service.metric("background_total", state="found") >= 1 and service.metric("compiles_total") == 0
            assert service.stop() == 0
            assert session(service.popen.pid) == []

    @pytest.mark.slow
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
    def test_ended_while_it_compiles_it_leaves_no_process_and_a_valid_cache(
        self, models: Any, own_cache: Path, tmp_path: Path, number: int
    ) -> None:
        without(own_cache, "resnet", "transformer", shared=False)
        models["tiny"]["on_miss"] = "background"
        with RunningService(write_deploy_file(tmp_path, own_cache, models)) as service:
            until(lambda: len(session(service.popen.pid)) >= 2, 60, service)
            time.sleep(5)  # by now it traces, or compiles
            service.popen.send_signal(number)
            assert service.popen.wait(60) == (0 if number == signal.SIGTERM else -number)
            until(lambda: session(service.popen.pid) == [], 30)
        assert CompileCache(own_cache).verify().ok

    @pytest.mark.slow
    @pytest.mark.parametrize("who", ["compiler", "service", "both"])
    def test_killed_at_work_it_comes_back_ready_from_a_valid_cache(
        self, models: Any, own_cache: Path, tmp_path: Path, who: str
    ) -> None:
        """`kill -9` of the compiling process, of the service, and of both at once."""
        without(own_cache, "decoder", shared=False)
        models["tiny"]["on_miss"] = "background"
        file = write_deploy_file(tmp_path, own_cache, models)
        with RunningService(file) as service:
            own = service.popen.pid
            until(lambda: len(session(own)) >= 2, 60, service)
            time.sleep(5)  # by now it traces, or compiles
            targets = [pid for pid in session(own) if (pid == own) != (who == "compiler") or who == "both"]
            for pid in targets:
                with suppress(ProcessLookupError):  # compilers end with the one that started them
                    os.kill(pid, signal.SIGKILL)
            if who == "compiler":
                service.wait_ready(240)  # another one took over
                assert service.draw().json()["served"]["eager"] == 0 and service.stop() == 0
            else:
                assert service.popen.wait(10) == -signal.SIGKILL
            until(lambda: session(own) == [], 60)
        assert CompileCache(own_cache).verify().ok
        with RunningService(file) as service:
            service.wait_ready(240)
            assert service.draw().json()["served"] == {"compiled": 4, "eager": 0}
            assert service.stop() == 0 and session(service.popen.pid) == []
        assert CompileCache(own_cache).verify().ok


def _bundle(cache: Path, folder: Path) -> Path:
    bundle = folder / "bundle.zip"
    CompileCache(cache).export_bundle(bundle)
    return bundle


class TestBroken:
    """Exit code 2 and one line."""

    def run(self, file: Path, *arguments: str, environment: dict[str, str] | None = None) -> tuple[int, str]:
        packages = str(Path(ah.__file__).parents[1])
        full = {**os.environ, "PYTHONPATH": packages, "OMP_NUM_THREADS": "1", **(environment or {})}
        command = [sys.executable, "-m", "accel_hidiff.cli", "serve", str(file), *arguments]
        done = subprocess.run(command, env=full, capture_output=True, text=True, check=False, timeout=120)
        lines = [line for line in done.stderr.splitlines() if line.startswith("accel-hidiff: ")]
        assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
        return done.returncode, lines[0]

    def test_no_such_model(self, models: Any, cache_dir: Path, tmp_path: Path) -> None:
        models["tiny"]["model"] = "/no/such/folder"
        code, line = self.run(write_deploy_file(tmp_path, cache_dir, models))
        assert code == 2 and "expected a diffusers folder or a hub id" in line

    def test_a_model_that_needs_an_image(self, models: Any, cache_dir: Path, tmp_path: Path) -> None:
        models["tiny"]["task"] = "inpaint"
        code, line = self.run(write_deploy_file(tmp_path, cache_dir, models))
        assert code == 2 and "expected a text-to-image model for tiny, got inpaint" in line

    def test_a_port_that_is_taken(self, models: Any, cache_dir: Path, tmp_path: Path) -> None:
        file = write_deploy_file(tmp_path, cache_dir, models)
        with socket.create_server(("127.0.0.1", 0)) as taken:
            code, line = self.run(file, "--port", str(taken.getsockname()[1]))
        assert code == 2 and "cannot bind" in line and "choose another --port" in line

    def test_a_deploy_file_that_says_what_cannot_be(self, models: Any, cache_dir: Path, tmp_path: Path) -> None:
        code, line = self.run(write_deploy_file(tmp_path, cache_dir, models, {"queue": 0}))
        assert code == 2 and "service.queue: expected an integer of at least 1" in line

    def test_without_the_extra(self, models: Any, cache_dir: Path, tmp_path: Path) -> None:
        blocked = tmp_path / "blocked" / "fastapi"
        blocked.mkdir(parents=True)
        (blocked / "__init__.py").write_text("raise ImportError('not here', name='fastapi')")
        packages = os.pathsep.join([str(blocked.parent), str(Path(ah.__file__).parents[1])])
        file = write_deploy_file(tmp_path, cache_dir, models)
        code, line = self.run(file, environment={"PYTHONPATH": packages})
        assert code == 2 and "got no fastapi; pip install accel-hidiff[serve]" in line


@pytest.mark.slow
def test_many_requests_while_it_stops_get_an_answer_each(models: Any, cache_dir: Path, tmp_path: Path) -> None:
    with RunningService(write_deploy_file(tmp_path, cache_dir, models, {"queue": 64})) as service:
        service.wait_ready()
        with ThreadPoolExecutor(8) as threads:
            answers = [threads.submit(service.draw, steps=20) for _ in range(24)]
            until(lambda: service.metric("running") == 1)
            service.popen.terminate()
            codes = [answer.result().status_code for answer in answers]
        assert set(codes) <= {200, 503} and codes.count(200) >= 1
        assert service.popen.wait(60) == 0


def test_the_command_imports_no_web_framework_and_no_torch() -> None:
    code = "import sys, accel_hidiff.cli, accel_hidiff.serving.app, accel_hidiff.serving.command, accel_hidiff.serving"
    code += ".service; print([n for n in ('torch', 'fastapi', 'uvicorn', 'diffusers') if n in sys.modules])"
    packages = str(Path(ah.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": packages}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[]"
