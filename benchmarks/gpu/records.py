"""The records of a run: on disk after each one, as JSON and as Markdown; a later run can take them up."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from benchmarks import harness as h
from benchmarks.gpu.lab import Case, Figures

DONE: Final = "done"
WRONG: Final = "wrong"  # an output, or a compilation where there must be none
FAILED: Final = "failed"
CUT: Final = "cut"  # the budget was used up meanwhile
SKIPPED: Final = "skipped"  # not enough time was left, or this machine cannot run it
_SAME: Final = (
    "commit",
    "source_sha256",
    "benchmarks_sha256",
    "model",
    "machine",
    "versions",
)  # what a run that is taken up must share


class CannotResume(RuntimeError):
    """The records on disk are not of this run; the message is one line."""


@dataclass(frozen=True)
class Record:
    """What came of one case of a stage.

    Attributes:
        stage, case: which.
        status: "done", "wrong", "failed", "cut" or "skipped".
        took_s: seconds, with the start of a process where it had one of its own.
        figures: what was measured; empty unless it is done.
        reason: one line; empty if it is done.
    """

    stage: str
    case: Case
    status: str
    took_s: float
    figures: Figures
    reason: str = ""


def facts_of_run(model: Mapping[str, Any]) -> dict[str, Any]:
    """What figures depend on: sources, model, machine, versions."""
    from accel_hidiff.benching.facts import machine, versions

    return {
        "commit": h.git_commit(),
        "source_sha256": h.source_digest(),
        "benchmarks_sha256": h.source_digest(["benchmarks"]),
        "model": dict(model),
        "machine": machine(),
        "versions": versions(),
    }


class Records:
    """The records of one output file.

    Args:
        out: JSON file.
        markdown: Markdown file.
        facts: of `facts_of_run`.
        render: makes Markdown of the whole content.
    """

    def __init__(self, out: Path, markdown: Path, facts: Mapping[str, Any], render: Callable[[Any], str]) -> None:
        self._out, self._markdown, self._render = out, markdown, render
        self._facts = json.loads(json.dumps(facts))
        self._runs: list[dict[str, str]] = []
        self._records: list[Record] = []

    def resume(self) -> None:
        """Takes up what is on disk and did not fail; nothing on disk is nothing to take up.

        Raises:
            CannotResume: it is of another run, or no file of this kind.
        """
        try:
            content = json.loads(self._out.read_text(encoding="utf-8"))
            records = [Record(**fields) for fields in content["records"]]
            facts = {name: content[name] for name in _SAME}
            self._runs = list(content["runs"])
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError) as problem:
            raise CannotResume(
                f"--resume: expected the JSON file of an earlier run in {self._out.name}, got {problem!r}; "
                "run without --resume"
            ) from None
        for name in _SAME:
            if facts[name] != self._facts[name]:
                raise CannotResume(
                    f"--resume: expected records of the same {name.replace('_', ' ')}, "
                    f"{_difference(facts[name], self._facts[name])}; run without --resume, or into another --out"
                )
        self._records = [record for record in records if record.status == DONE]

    def begin(self) -> None:
        """Notes this run and writes the files."""
        self._runs.append({"command": h.command_line(), "date": datetime.now(UTC).isoformat(timespec="seconds")})
        self._write()

    def find(self, stage: str, case: Case) -> Record | None:
        """The record of a case, if there is one."""
        return next((record for record in self._records if (record.stage, record.case) == (stage, case)), None)

    def add(self, record: Record) -> None:
        """Adds a record, in place of an earlier one of the same case, prints it and writes the files."""
        old = self.find(record.stage, record.case)
        self._records = [kept for kept in self._records if kept is not old] + [record]
        self._write()
        fields = {"stage": record.stage, **record.case, "status": record.status, "took_s": record.took_s}
        print(json.dumps(fields | record.figures | ({"reason": record.reason} if record.reason else {})), flush=True)

    def __iter__(self) -> Any:
        return iter(self._records)

    def _write(self) -> None:
        content = {
            "runs": self._runs,
            **self._facts,
            "load_average": h.rounded(os.getloadavg()[0], 2),
            "records": [asdict(record) for record in self._records],
        }
        h.write_whole(self._out, json.dumps(content, indent=1) + "\n")
        h.write_whole(self._markdown, self._render(content))


def _difference(there: Any, here: Any) -> str:
    """The first part in which two facts differ."""
    if isinstance(there, dict) and isinstance(here, dict):
        for name in (*there, *here):
            if there.get(name) != here.get(name):
                return f"those have {name} {there.get(name)!r}, this run {here.get(name)!r}"
    return f"those have {there!r}, this run {here!r}"
