"""The soak in short: its benchmark raises where an image is wrong or something is left over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import accel_hidiff as ah
from benchmarks.soak_plot import theil_sen


@pytest.mark.slow
def test_thirty_mixed_requests_end_with_right_images_and_nothing_left_over(tmp_path: Path) -> None:
    root = Path(ah.__file__).parents[1]
    out, plot = tmp_path / "soak.json", tmp_path / "soak.png"
    command = [sys.executable, "-m", "benchmarks.soak", "--requests", "30", "--tiny", "--threads", "1", "--seed", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [*command, "--out", str(out), "--plot", str(plot)],
        cwd=root, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    *rows, last = json.loads(out.read_text())["records"]
    assert len(rows) == 30 and last["wrong_images"] == 0 and last["cache_ok"]
    assert last["left"]["processes"] == last["left"]["unfinished_files"] == []
    assert {row["end"] for row in rows} >= {"completed"} and any(row["events"] for row in rows)
    assert plot.stat().st_size > 10_000


def test_the_slope_does_not_follow_outliers() -> None:
    values = [10.0 + 0.5 * n for n in range(40)]
    values[7], values[30] = 500.0, 0.0
    assert abs(theil_sen(values) - 0.5) < 0.01
    assert theil_sen([3.0]) == 0.0
