"""A service in a process of its own, and what a client does with it."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from PIL import Image

import accel_hidiff as ah

GENERATIONS = "/v1/images/generations"
SIZES = ["128x128", "192x128", "128x256"]  # WIDTHxHEIGHT; those of tests/conftest.py


def write_deploy_file(
    folder: Path, cache: Path, models: dict[str, dict[str, Any]], service: dict[str, Any] | None = None
) -> Path:
    """A deploy file on a free port; a model's settings may leave out what all have in common."""
    lines = ["[cache]", f"location = {json.dumps(str(cache))}", "[service]"]
    lines += [f"{key} = {json.dumps(value)}" for key, value in {"port": 0, **(service or {})}.items()]
    for name, settings in models.items():
        lines += ["[[models]]", f'name = "{name}"']
        full = {"sizes": SIZES, "steps": [7], "device": "cpu", "on_miss": "error", **settings}
        lines += [f"{key} = {json.dumps(value)}" for key, value in full.items()]
    file = folder / "deploy.toml"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


class RunningService:
    """`accel-hidiff serve`, from its first line on; use it as a context manager."""

    def __init__(self, deploy_file: Path, *arguments: str, environment: dict[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "accel_hidiff.cli", "serve", str(deploy_file), *arguments]
        packages = str(Path(ah.__file__).parents[1])
        full = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": packages, **(environment or {})}
        self.popen = subprocess.Popen(
            command, env=full, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        assert self.popen.stdout is not None
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.first_line = self.popen.stdout.readline().strip()
        self.url = self.first_line.removeprefix("serving on ")
        self.client = httpx.Client(base_url=self.url or "http://localhost", timeout=120)

    def _read(self) -> None:
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            self._lines.append(line.rstrip())

    @property
    def log(self) -> str:
        """What it wrote to stderr by now."""
        return "\n".join(self._lines)

    def wait_ready(self, seconds: float = 120) -> dict[str, Any]:
        until(lambda: self.client.get("/healthz").status_code == 200, seconds, self)
        told: dict[str, Any] = self.client.get("/healthz").json()
        return told

    def draw(self, **fields: Any) -> httpx.Response:
        """An answer to a request; three steps, a prompt and a seed unless told otherwise."""
        return self.client.post(GENERATIONS, json=asked(**fields))

    def metric(self, name: str, **labels: str) -> float:
        """The value of a metric; 0 if it is not there."""
        from prometheus_client.parser import text_string_to_metric_families

        for family in text_string_to_metric_families(self.client.get("/metrics").text):
            for sample in family.samples:
                if sample.name == f"accel_hidiff_{name}" and labels.items() <= sample.labels.items():
                    return float(sample.value)
        return 0.0

    def stop(self) -> int:
        """SIGTERM; its exit code."""
        self.popen.terminate()
        code = self.popen.wait(90)
        self._reader.join(10)
        return code

    def __enter__(self) -> RunningService:
        return self

    def __exit__(self, *error: object) -> None:
        group = self.popen.pid
        self.client.close()
        if self.popen.poll() is None:
            self.popen.terminate()
            try:
                self.popen.wait(90)
            except subprocess.TimeoutExpired:
                self.popen.kill()
                raise
        self.popen.wait()
        self._reader.join(10)
        if error == (None, None, None):
            until(lambda: not session(group), 20)


def session(leader: int) -> list[int]:
    """The processes that live in a session, whatever group they are in."""
    found = []
    for process in psutil.process_iter(["pid", "status"]):
        try:
            if os.getsid(process.pid) == leader and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (ProcessLookupError, PermissionError):
            continue
    return found


def asked(**fields: Any) -> dict[str, Any]:
    return {"prompt": "a red circle", "seed": 3, "steps": 3, **fields}


def until(condition: Any, seconds: float = 30.0, service: RunningService | None = None) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if service is not None and service.popen.poll() is not None:
            raise AssertionError(f"the service ended with {service.popen.returncode}: {service.log[-3000:]}")
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds} s{': ' + service.log[-3000:] if service is not None else ''}")


def pixels(b64: str) -> np.ndarray[Any, Any]:
    """(height, width, 3) of 0..255."""
    image = Image.open(io.BytesIO(base64.b64decode(b64)))
    assert image.format == "PNG"
    return np.asarray(image.convert("RGB")).astype(int)


def events(response: httpx.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, data) of each server-sent event."""
    name = ""
    for line in response.iter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            data: dict[str, Any] = json.loads(line.removeprefix("data: "))
            assert data["type"] == name or name == "error"
            yield name, data


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error of an answer that is one; its message is one line."""
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and "\n" not in error["message"] and len(error["message"]) < 400
    return error
