"""Over HTTP, in this process: a request that does not fit the memory, and a device that is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi")
from starlette.testclient import TestClient

from accel_hidiff.deploy import Deployment, ModelTable
from accel_hidiff.serving.app import GENERATIONS, create_app
from accel_hidiff.serving.service import Service
from tests.serving.client import until

ASKED = {"prompt": "a red circle", "size": "128x128", "steps": 2, "seed": 1}


@pytest.fixture
def service(model_folder: Path) -> Iterator[Service]:
    table: dict[str, Any] = {"sizes": ("128x128",), "steps": (2,), "device": "cpu", "backend": "eager"}
    table["on_miss"] = "eager"
    models = tuple(ModelTable(name, str(model_folder), **table) for name in ("tiny", "other"))
    broken: list[Exception] = []
    service = Service(Deployment(models), broken.append)
    service.start()
    until(lambda: broken or service.health()[0], 120)
    assert not broken
    yield service
    assert service.close(20)


def raises(error: Exception) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    return fail


def test_out_of_memory_is_of_one_request_and_a_lost_device_of_all(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, scheduler = TestClient(create_app(service)), service.engines["tiny"].handle.pipe.scheduler

    def ask(model: str) -> tuple[int, str | None]:
        response = client.post(GENERATIONS, json={"model": model, **ASKED})
        return response.status_code, response.json().get("error", {}).get("code")

    assert ask("tiny") == (200, None)
    with monkeypatch.context() as patched:
        patched.setattr(scheduler, "step", raises(torch.OutOfMemoryError("CUDA out of memory")))
        assert ask("tiny") == (503, "out_of_memory")
    assert client.get("/healthz").status_code == 200
    assert ask("tiny") == ask("other") == (200, None)
    with monkeypatch.context() as patched:
        patched.setattr(scheduler, "step", raises(RuntimeError("CUDA error: misaligned address\nCUDA kernel errors")))
        assert ask("tiny") == (503, "device_lost")
    assert ask("tiny") == ask("other") == (503, "device_lost")
    health = client.get("/healthz")
    assert (health.status_code, health.json()["status"]) == (503, "device lost")
    assert health.json()["models"]["tiny"]["why"] == ["RuntimeError: CUDA error: misaligned address"]
