"""schemathesis asks everything that the service's description allows, and much that it does not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving.client import RunningService, write_deploy_file


@pytest.mark.slow
def test_schemathesis_finds_no_fault(model_folder: Path, cache_dir: Path, tmp_path: Path) -> None:
    cheap = {"max_steps": 1, "max_images": 1, "max_prompt": 200}
    models = {"tiny": {"model": str(model_folder)}}
    with RunningService(write_deploy_file(tmp_path, cache_dir, models, cheap)) as service:
        service.wait_ready()
        description = tmp_path / "openapi.json"
        description.write_text(service.client.get("/openapi.json").text, encoding="utf-8")
        options = ["--seed", "6", "--max-examples", "60", "--phases", "coverage,fuzzing", "--checks", "all"]
        options += ["--generation-database", "none", "--no-color", "--url", service.url]
        command = [str(Path(sys.executable).with_name("schemathesis")), "run", str(description), *options]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=600
        )
        assert done.returncode == 0, done.stdout[-5000:]
        assert "5 selected / 5 total" in done.stdout and "No issues found" in done.stdout, done.stdout[-2000:]
        assert service.metric("requests_total", status="400") > 20  # it did ask
        assert service.metric("requests_total", model="tiny", status="200") > 5
        assert service.metric("requests_total", status="500") == 0
        assert service.stop() == 0 and "Traceback" not in service.log
