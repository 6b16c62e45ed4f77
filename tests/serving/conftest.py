"""One service for the whole session: two checkpoints of one architecture, and one with a scheduler that can fail."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving.client import RunningService, write_deploy_file

MAX_STEPS = 400
QUEUE = 16


@pytest.fixture(scope="session")
def deploy_file(model_folder: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from accel_hidiff.demo import save_model, tiny_config

    folder = tmp_path_factory.mktemp("service")
    other = save_model(folder / "other", seed=1, config=tiny_config())
    models: dict[str, dict[str, Any]] = {
        "tiny": {"model": str(model_folder)},
        "other": {"model": str(other)},
        "lcm": {"model": str(model_folder), "scheduler": "LCMScheduler", "sizes": ["128x128"]},
    }
    return write_deploy_file(folder, cache_dir, models, {"max_steps": MAX_STEPS, "queue": QUEUE})


@pytest.fixture(scope="session")
def service(deploy_file: Path) -> Iterator[RunningService]:
    with RunningService(deploy_file) as running:
        running.wait_ready()
        yield running
        assert running.stop() == 0
        assert running.log.count("Traceback") <= running.log.count(
            ": the pipeline failed"
        )  # of tests that make it fail
