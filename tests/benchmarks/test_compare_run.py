"""The comparison's runs over the tiny model: real processes, over the session's compile cache."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.compare import insight, requests, steps
from benchmarks.compare.scenarios import STEPS, Entry, RequestScenario, StepScenario, sizes
from tests import needs

pytestmark = pytest.mark.slow


def test_requests_count_what_each_contender_compiles(cache_dir: Path) -> None:
    needs.aot()
    scenario = RequestScenario(
        "two",
        "sdxl-tiny",
        sizes("128x128", "192x128"),
        (Entry("eager"), Entry("aot", 2), Entry("repeated-blocks")),
        True,
    )
    done = requests.run(scenario, {}, 1, 2, cache_dir)
    assert tempfile.gettempdir() not in json.dumps(done), "no place on this machine is told"
    rows = done["processes"]
    assert [(row["contender"], row["process"]) for row in rows] == [
        *[("eager", 1), ("aot", 1), ("aot", 2)],
        ("repeated-blocks", 1),
    ]
    assert all(0 < row["ready_s"] < row["first_image_s"] for row in rows)
    for row in rows:
        assert [request["size"] for request in row["requests"]] == ["128x128", "192x128"]
        for request in row["requests"]:
            assert {len(request[name]) for name in ("step_ms", "frames_by_step", "compiles_by_step")} == {STEPS}
        assert "probe" not in row["requests"][0]
    for row in rows[:3]:
        for request in row["requests"]:
            assert request["handle"]["compiles"] == request["frames"] == request["graphs"] == 0
    first = rows[3]["requests"][0]
    assert first["frames"] == sum(first["frames_by_step"]) > 0 and first["recompilations"] > 0
    assert first["handle"]["compiles"] == sum(first["compiles_by_step"]) == first["graphs"], "torch's own count"
    assert first["frames_by_step"][0] > 0, "a request pays for it"


def test_images_of_another_model_are_told_apart() -> None:
    def row(name: str, value: float) -> dict[str, Any]:
        return {"contender": name, "process": 1, "requests": [{"size": "128x128", "probe": [value, 1.0]}]}

    absent = {"contender": "onediff", "process": 1, "failed": "not installed"}
    rows = requests.verified([row("eager", 0.5), row("hidiffusion", 0.1), row("aot", 0.5), absent])
    assert all("failed" not in row and "probe" not in row["requests"][0] for row in rows[:3]) and rows[3] == absent
    assert not requests.any_wrong({"processes": rows})

    rows = requests.verified([row("eager", 0.5), row("aot", 0.6)])
    assert rows[1]["failed"].startswith("wrong output: 128x128: expected max|diff|/max|ref| < 0.01, got 0.1")
    assert rows[1]["requests"] == [] and requests.any_wrong({"processes": rows})

    rows = requests.verified([row("eager", 0.5), row("hidiffusion-compile", 0.5)])
    assert rows[1]["failed"] == "there is no image of hidiffusion at 128x128 to compare with"


def test_steps_and_what_they_are_made_of(cache_dir: Path, tmp_path: Path) -> None:
    needs.aot()
    scenario = StepScenario("small", "sdxl-tiny", sizes("128x128"), ("stock", "aot", "tensorrt"), repeats=2)
    shutil.copytree(cache_dir, tmp_path / "aot")
    done = steps.run(scenario, tmp_path, {}, 1, 2)
    assert tempfile.gettempdir() not in json.dumps(done), "no place on this machine is told"
    report = done["report"]
    absent = [backend["backend"] for backend in report["backends"] if not backend["usable"]]
    assert [row["state"] for row in report["rows"]] == ["timed"] * 3 * (4 - len(absent))
    found = insight.run(scenario, tmp_path, 1)
    topologies = ["windowed+dilated", "windowed+pooled", "windowed"]
    assert [work["topology"] for work in found["work"]] == topologies
    work = {row["topology"]: row["tflop"] for row in found["work"]}
    assert work["windowed+pooled"] < work["windowed"] and work["windowed+dilated"] < work["windowed"]
    assert [(row["contender"], row["topology"]) for row in found["profiles"]] == [
        (name, topology) for name in ("eager", "aot") for topology in topologies
    ]
    assert found["ceilings"]["matmul_tflop_per_s"] > 0 and torch.get_num_threads() == 1
