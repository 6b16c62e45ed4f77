"""`accel-hidiff bench`: looks which backends are here, runs them, reports."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from accel_hidiff.benching.found import find
from accel_hidiff.benching.names import REFERENCE
from accel_hidiff.benching.options import Options
from accel_hidiff.benching.report import Report
from accel_hidiff.benching.turns import compete
from accel_hidiff.doctor import Finding
from accel_hidiff.errors import BadInput, BenchFailed


def bench(options: Options, out: Path | None, as_json: bool) -> int:
    """Runs a bench; the report goes to stdout, progress to stderr.

    Args:
        options: what to run.
        out: file for the report as JSON; None: none.
        as_json: the report on stdout is JSON.

    Returns:
        The exit code: 0; or 1 where a backend failed, died, gave a wrong output or compiled while it was timed.

    Raises:
        BadInput: the model, the output file or an option is not what it should be.
        BenchFailed: no backend that was asked for is here, or the reference does not run.
    """
    if out is not None:
        _require_writable(out)
    findings = {name: find(name, options.python_of(name)) for name in options.backends}
    unavailable = {name: finding for name, finding in findings.items() if not finding.usable}
    _require_some(options, unavailable)
    entries = [(name, options) for name in options.backends if name not in unavailable]
    console = Console(stderr=True)
    with _Shown(console) as shown, tempfile.TemporaryDirectory(prefix="accel-hidiff-bench-") as work:
        outcome = compete(entries, Path(work), shown)
    report = Report(options, unavailable, **vars(outcome))
    if out is not None:
        report.write(out)
    if as_json:
        print(json.dumps(report.to_json(), indent=1))
    else:
        screen = Console(highlight=False)
        screen.print(report.table())
        screen.print()
        for line in report.lines():
            screen.print(line, markup=False)
    return 0 if report.ok else 1


def _require_some(options: Options, unavailable: dict[str, Finding]) -> None:
    """BenchFailed if there is nothing to run: no reference, or of what was asked for nothing but the reference."""
    asked = [name for name in options.backends if name != REFERENCE or options.reference_asked]
    if REFERENCE not in unavailable and any(name not in unavailable for name in asked):
        return
    needed = [REFERENCE] if REFERENCE in unavailable else asked
    reasons = "; ".join(f"{name}: {unavailable[name].detail}" for name in needed)
    raise BenchFailed(f"--backends: expected one that is usable here, got none ({reasons})")


def _require_writable(out: Path) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
        problem = "a folder" if out.is_dir() else ""
    except OSError as error:
        problem = str(error.strerror)
    if problem:
        raise BadInput(f"--out: expected a file that can be written, got {out}: {problem}")


class _Shown:
    """Progress on a terminal, a line for each thing that was done elsewhere."""

    def __init__(self, console: Console) -> None:
        columns = (
            SpinnerColumn(),
            BarColumn(bar_width=20),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
        )
        self._progress = Progress(
            *columns,
            console=console,
            transient=True,
            disable=not console.is_terminal,
            refresh_per_second=2,  # what draws takes time from what is measured
        )
        self._task = self._progress.add_task("starting", total=0)
        self._total = 0

    def __enter__(self) -> _Shown:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def planned(self, parts: int) -> None:
        self._total += parts
        self._progress.update(self._task, total=self._total)

    def now(self, text: str) -> None:
        self._progress.update(self._task, description=text)

    def note(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def done(self, parts: int) -> None:
        self._progress.advance(self._task, parts)
