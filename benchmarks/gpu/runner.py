"""Runs stages one after another within a budget; whatever becomes of one, the next one runs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any, Final

import torch

from benchmarks import harness as h
from benchmarks.gpu.lab import Case, Lab, NotHere, Setting
from benchmarks.gpu.records import CUT, DONE, FAILED, SKIPPED, WRONG, Record, Records
from benchmarks.gpu.stages import Stage, stage_named
from benchmarks.roofline import Ceilings
from compile_cache.errors import one_line

_MODULE: Final = "benchmarks.gpu.run"
_FILL: Final = "precompile"  # the stage that fills the cache


class Clock:
    """Seconds that are left of a budget in minutes."""

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes

    @property
    def left_s(self) -> float:
        """Below zero once it is used up."""
        return self._end - time.monotonic()


def run_stages(stages: Sequence[Stage], lab: Lab, records: Records, clock: Clock) -> None:
    """Runs every case that has no record yet; each has one afterwards."""
    lab.ceilings = lab.ceilings or _known_ceilings(records)
    filled = False
    for stage in stages:
        for case in stage.cases(lab.setting):
            if records.find(stage.name, case) is not None:
                continue
            if stage.gpu_only and lab.device.type != "cuda":
                records.add(Record(stage.name, case, SKIPPED, 0.0, {}, "it needs --device cuda"))
                continue
            needed = stage.seconds(lab.setting.tiny)
            if stage.needs_cache and not filled:  # by this run's own stage, or once more over what an earlier run left
                filled = True
                if clock.left_s > needed + stage_named(_FILL).seconds(lab.setting.tiny) / 2:
                    filling = run_alone(stage_named(_FILL), lab, {}, clock.left_s)
                    if filling.status != DONE:
                        print(f"filling the cache: {filling.status}: {filling.reason}", file=sys.stderr, flush=True)
            if clock.left_s < needed:
                reason = f"{max(clock.left_s, 0):.0f} s were left, it needs about {needed:.0f}"
                records.add(Record(stage.name, case, SKIPPED, 0.0, {}, reason))
                continue
            record = run_alone(stage, lab, case, clock.left_s) if stage.isolated else attempt(stage, lab, case)
            filled = filled or stage.name == _FILL
            records.add(record)


def passed(stages: Sequence[Stage], records: Records) -> bool:
    """Whether no case of a stage that checks something was wrong or failed; cut and skipped ones do not count."""
    checking = {stage.name for stage in stages if stage.checks}
    return not any(record.stage in checking and record.status in (WRONG, FAILED) for record in records)


def attempt(stage: Stage, lab: Lab, case: Case) -> Record:
    """Runs a case in this process; an exception becomes a record."""
    start = time.perf_counter()
    status, figures, reason = DONE, {}, ""
    try:
        with torch.no_grad():
            figures = stage.run(lab, case)
        json.dumps(figures, allow_nan=False)
    except NotHere as problem:
        status, reason = SKIPPED, str(problem)
    except h.WrongOutput as problem:
        status, reason = WRONG, one_line(str(problem), 500)
    except Exception as problem:
        status, reason = FAILED, _told(problem)
    if status != DONE:
        figures = {}
    with suppress(Exception):  # a device that does not answer fails the next case, which says so
        lab.tidy()
    return Record(stage.name, dict(case), status, round(time.perf_counter() - start, 2), figures, reason)


def _told(problem: BaseException) -> str:
    """One line: what was raised, and what had been raised first where that came of it."""
    lines = str(problem).strip().splitlines()
    told = f"{type(problem).__name__}: {one_line(lines[0], 300)}" if lines else type(problem).__name__
    first = problem
    while (earlier := first.__cause__ or (None if first.__suppress_context__ else first.__context__)) is not None:
        first = earlier
    return told if first is problem else f"{told} (first: {_told(first)})"


def _known_ceilings(records: Records) -> Ceilings | None:
    record = records.find("ceilings", {})
    return None if record is None or record.status != DONE else Ceilings(**record.figures)


# A process for one case


def run_alone(stage: Stage, lab: Lab, case: Case, limit_s: float) -> Record:
    """Runs a case in a process of its own, which is ended, with what it started, after `limit_s` seconds."""
    config = {
        "stage": stage.name,
        "case": dict(case),
        "setting": lab.setting.to_json(),
        "ceilings": None if lab.ceilings is None else asdict(lab.ceilings),
        "threads": torch.get_num_threads(),
    }
    start = time.perf_counter()
    status, figures, reason = FAILED, {}, ""
    try:
        answer = h.worker(_MODULE, config, limit_s=max(limit_s, 1.0))
        status, figures, reason = answer["status"], answer["figures"], answer["reason"]
    except subprocess.TimeoutExpired:
        status, reason = CUT, f"ended after {limit_s:.0f} s: the budget of --minutes was used up"
    except h.WorkerFailed as problem:
        reason = str(problem)
    return Record(stage.name, dict(case), status, round(time.perf_counter() - start, 2), figures, reason)


def work_alone(config: Mapping[str, Any]) -> Record:
    """In the process of a case: runs it."""
    ceilings = config["ceilings"]
    lab = Lab(Setting.from_json(config["setting"]), None if ceilings is None else Ceilings(**ceilings))
    return attempt(stage_named(config["stage"]), lab, config["case"])
