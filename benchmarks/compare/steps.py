"""Single UNet calls: all contenders of a scenario, verified and timed in turns as `accel-hidiff bench` does it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from accel_hidiff.benching.found import find
from accel_hidiff.benching.options import Options
from accel_hidiff.benching.report import Report
from accel_hidiff.benching.turns import compete
from benchmarks.compare import models
from benchmarks.compare.scenarios import STEPS, StepScenario, dtype_of


class Told:
    """Prints what a bench tells of itself."""

    def planned(self, parts: int) -> None:
        """Not told."""

    def now(self, text: str) -> None:
        """Not told."""

    def note(self, text: str) -> None:
        """A line."""
        print(text, flush=True)

    def done(self, parts: int) -> None:
        """Not told."""


def run(
    scenario: StepScenario, cache: Path, pythons: Mapping[str, Path], threads: int | None, jobs: int
) -> dict[str, Any]:
    """One scenario.

    Args:
        scenario: what to run.
        cache: a folder with a compile cache for each contender; what an earlier scenario left there is loaded.
        pythons: executables with environments of their own, by contender.
        threads: of torch; None: its own choice.
        jobs: contenders that compile at the same time.

    Returns:
        JSON values: the scenario's fields; "report" as of `accel-hidiff bench --json`.

    Raises:
        BenchFailed: the reference does not run.
    """
    with tempfile.TemporaryDirectory(prefix="compare-") as directory:
        place = Path(directory)
        model = models.save(scenario.model, place / "model", dtype_of(scenario))
        work = place / "work"
        work.mkdir()
        options = Options(
            model=str(model),
            sizes=tuple((size.height, size.width) for size in scenario.sizes),
            steps=STEPS,
            backends=scenario.contenders,
            repeats=scenario.repeats,
            batch=scenario.batch,
            dtype=scenario.dtype,
            device=scenario.device,
            threads=threads,
            pythons=tuple(pythons.items()),
            jobs=1 if scenario.device == "cuda" else jobs,  # compilers of one GPU tune on it
        )
        findings = {name: find(name, options.python_of(name)) for name in options.backends}
        absent = {name: finding for name, finding in findings.items() if not finding.usable}
        entries = [
            (name, replace(options, cache=cache_of(cache, name))) for name in options.backends if name not in absent
        ]
        outcome = compete(entries, work, Told())
        return {**scenario.to_json(), "report": Report(options, absent, **vars(outcome)).to_json()}


def cache_of(folder: Path, contender: str) -> Path:
    """The compile cache of a contender: with one for all, who compiles what two of them need would be chance."""
    return folder / contender.replace("/", "-")
