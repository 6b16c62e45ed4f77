"""A process that runs cases one after another: `python -m benchmarks.gpu.worker JSON`, started by `supervisor`."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final

import torch

from benchmarks import harness as h
from benchmarks.gpu import kernels, measures, native, requests, rivals
from benchmarks.gpu.journal import BEGUN, DONE, FACTS, FAILED, LATE, SKIPPED, WRONG, Case, Figures, Journal
from benchmarks.gpu.lab import Lab, NotHere
from benchmarks.gpu.programme import BY_NAME, Task
from benchmarks.gpu.setting import Setting
from compile_cache.errors import one_line

Measure = Callable[[Lab, Case, Figures], None]
MEASURES: Final[Mapping[str, Measure]] = {
    "ceilings": kernels.measure_ceilings,
    "build": measures.measure_build,
    "load": measures.measure_load,
    "steps": measures.measure_steps,
    "truth": measures.measure_truth,
    "requests": requests.measure_request,
    "freezes": requests.measure_freezes,
    "profile": measures.measure_profile,
    "huge": requests.measure_huge,
    "second": measures.measure_second,
    "graphs": measures.measure_graph,
    "memory": requests.measure_out_of_memory,
    "native": native.measure_native,
    "attention": kernels.measure_attention,
    "repeated": rivals.measure_repeated,
}
"""Each fills in figures as it finds them: what failed keeps those."""

LOST: Final = 3  # the exit code of a process whose device does not answer any more


class Late(BaseException):
    """A case is over its limit; no `except Exception` of what it runs holds it up."""


def main() -> int:
    """Runs the cases that it is told; the exit code."""
    work = json.loads(sys.argv[1])
    os.nice(work["niceness"])
    setting = Setting.from_json(work["setting"])
    book = Journal(work["journal"], work["began"])
    lab = Lab(setting)
    if not work["niceness"]:
        book.write(FACTS, figures=_facts(setting))
    for name, case in work["tasks"]:
        task = Task(BY_NAME[name], case)
        run(task, lab, book, min(task.limit_s(setting.tiny), work["end"] - time.time()))
        try:
            lab.tidy()
        except RuntimeError as problem:
            print(f"the device does not answer any more: {problem}", file=sys.stderr)
            return LOST
    return 0


def run(task: Task, lab: Lab, book: Journal, limit_s: float) -> None:
    """Runs a case; its begin and its end are in the journal afterwards, with every figure that it came to."""
    name, case = task.stage.name, task.case
    if task.stage.gpu_only and lab.device.type != "cuda":
        book.write(SKIPPED, name, case, reason="it needs a GPU")
        return
    if limit_s < 1:
        book.write(SKIPPED, name, case, reason="no time was left")
        return
    book.write(BEGUN, name, case)
    start = time.perf_counter()
    event, reason, figures = DONE, "", Figures()
    try:
        with _limit(limit_s), torch.no_grad():
            MEASURES[name](lab, case, figures)
    except Late:
        event, reason = LATE, f"over its limit of {limit_s:.0f} s"
    except NotHere as problem:
        event, reason = SKIPPED, str(problem)
    except h.WrongOutput as problem:
        event, reason = WRONG, one_line(str(problem), 500)
    except Exception as problem:
        event, reason = FAILED, told(problem)
    took_s = round(time.perf_counter() - start, 2)
    plain = _finite(figures)
    if plain != figures and event == DONE:
        event, reason = FAILED, "a figure is no finite number"
    book.write(event, name, case, took_s=took_s, figures=plain, reason=reason)


def _finite(value: Any) -> Any:
    """The same with text in the place of numbers that JSON does not have."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """Raises `Late` in the block after so many seconds, as soon as Python runs again there."""

    def late(signum: int, frame: FrameType | None) -> None:
        raise Late

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def told(problem: BaseException) -> str:
    """One line: what was raised, and what had been raised first where that came of it."""
    lines = str(problem).strip().splitlines()
    said = f"{type(problem).__name__}: {one_line(lines[0], 300)}" if lines else type(problem).__name__
    first = problem
    while (earlier := first.__cause__ or (None if first.__suppress_context__ else first.__context__)) is not None:
        first = earlier
    return said if first is problem else f"{said} (first: {told(first)})"


def _facts(setting: Setting) -> Figures:
    """What figures depend on: sources, model, machine, versions."""
    from accel_hidiff.benching.facts import machine, versions
    from benchmarks.gpu.model import LIMITS, model_name

    limits = {dtype: LIMITS[getattr(torch, dtype)] for dtype in setting.dtypes}
    return {
        "commit": h.git_commit(),
        "source_sha256": h.source_digest(),
        "benchmarks_sha256": h.source_digest(["benchmarks"]),
        "model": model_name(setting.tiny),
        "device": setting.device,
        "variants": setting.to_json()["variants"],
        "limits": limits,
        "machine": machine(),
        "versions": versions(),
    }


if __name__ == "__main__":
    sys.exit(main())
