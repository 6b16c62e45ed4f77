"""The records of a run, one JSON object a line: on disk as soon as they are made, whatever becomes of who made them.

A case has a line when it begins and one when it ended. A process that is killed leaves the former alone, which tells
what it was at.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

FACTS: Final = "facts"  # of the machine and the run; it belongs to no stage
BEGUN: Final = "begun"
DONE: Final = "done"
WRONG: Final = "wrong"  # an output, or a compilation where there must be none
FAILED: Final = "failed"
LATE: Final = "late"  # it took longer than its limit
SKIPPED: Final = "skipped"  # too little time was left, or this machine cannot run it

Case = Mapping[str, str]  # what tells one record of a stage from the others
Figures = dict[str, Any]  # JSON values


@dataclass(frozen=True)
class Line:
    """One line.

    Attributes:
        at_s: seconds since the run began.
        event: `FACTS`, `BEGUN`, or how a case ended.
        stage, case: which.
        took_s: seconds of a case that ended.
        figures: what was measured, up to where it failed.
        reason: one line; empty if it is done.
    """

    at_s: float
    event: str
    stage: str = ""
    case: Case = field(default_factory=dict)
    took_s: float = 0.0
    figures: Figures = field(default_factory=dict)
    reason: str = ""

    @property
    def ended(self) -> bool:
        """Whether it tells how a case ended."""
        return self.event not in (FACTS, BEGUN)

    def is_of(self, stage: str, case: Case) -> bool:
        """Whether it belongs to a case."""
        return self.stage == stage and dict(self.case) == dict(case)


class Journal:
    """Appends lines to a file; several processes may.

    Args:
        path: the file; its folder exists.
        began: `time.time()` when the run began.
    """

    def __init__(self, path: Path, began: float) -> None:
        self.path, self.began = path, began

    def write(self, event: str, stage: str = "", case: Case | None = None, **fields: Any) -> Line:
        """Adds a line; it is on disk afterwards.

        Raises:
            ValueError: a figure is not a number that JSON has, or the like.
        """
        line = Line(round(time.time() - self.began, 2), event, stage, dict(case or {}), **fields)
        text = json.dumps({name: value for name, value in vars(line).items() if value not in ("", {})}, allow_nan=False)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, text.encode() + b"\n")  # one call: lines of two processes do not mix
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return line


def read(path: Path) -> list[Line]:
    """The lines so far; a last one that is cut off is left out. None yet: an empty list."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    whole = text[: text.rfind("\n") + 1]
    return [Line(**json.loads(line)) for line in whole.splitlines()]


def ends(lines: Sequence[Line]) -> Iterator[Line]:
    """How each case ended, in order; of a case that was run again, the last time."""
    last = {(line.stage, json.dumps(dict(line.case), sort_keys=True)): line for line in lines if line.ended}
    yield from (line for line in lines if line.ended and any(line is kept for kept in last.values()))
