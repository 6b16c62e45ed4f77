"""The precompiling process is killed with SIGKILL at several points; the cache stays valid and is completed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import accel_hidiff as ah
from compile_cache import CompileCache
from tests.compiled.conftest import STEPS, accelerate_strict, relative_difference, request


def command(model: Path, cache: Path) -> list[str]:
    arguments = ["precompile", str(model), "--cache", str(cache), "--size", "192x128", "--steps", str(STEPS)]
    return [sys.executable, "-m", "accel_hidiff.cli", *arguments, "--device", "cpu"]


def run_until(killed_after: float | str, model: Path, cache: Path, log: Path) -> int:
    """Starts precompiling and kills it: seconds after its first file appears, or once its log has a line."""
    with log.open("wb") as stream:
        process = subprocess.Popen(command(model, cache), stderr=stream, stdout=stream, env=environment())
        before = set(cache.rglob("*"))
        begun = None
        while process.poll() is None:
            time.sleep(0.02)
            if begun is None and set(cache.rglob("*")) - before:
                begun = time.monotonic()
            if isinstance(killed_after, str):
                due = killed_after in log.read_text(errors="replace")
            else:
                due = begun is not None and time.monotonic() - begun >= killed_after
            if due:
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
        return process.returncode


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(ah.__file__).parents[1]), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_killed_at_several_points_then_resumed(
    own_cache: Path, model_folder: Path, make_pipe: Any, tmp_path: Path
) -> None:
    cache = CompileCache(own_cache)
    for entry in list(cache.entries()):  # the two smallest artifacts have to be compiled again
        if entry.factors.get("region") == "resnet" or entry.notes["region"] == "resnet":
            next((own_cache / "v1" / "actions").rglob(f"{entry.digest}.json")).unlink()
    for directory in ("tmp", "locks"):
        for path in (own_cache / "v1" / directory).glob("*"):
            path.unlink()
    kept = len(list(cache.entries()))

    log = tmp_path / "log"
    for point in (0.0, 1.0, 4.0, "compiled"):
        code = run_until(point, model_folder, own_cache, log)
        assert code == -signal.SIGKILL, f"finished before the kill at {point}: {log.read_text()}"
        report = CompileCache(own_cache).verify()
        assert report.ok, report.damaged
    assert len(list(CompileCache(own_cache).entries())) > kept, "what was compiled before the last kill is kept"

    done = subprocess.run(
        command(model_folder, own_cache), capture_output=True, text=True, env=environment(), check=False
    )
    assert done.returncode == 0, done.stderr
    assert CompileCache(own_cache).verify().ok
    handle, eager = accelerate_strict(make_pipe(), own_cache), make_pipe()
    ah.apply_hidiffusion(eager)
    assert relative_difference(request(handle.pipe), request(eager)) < 5e-3
    assert handle.stats.hits == STEPS
