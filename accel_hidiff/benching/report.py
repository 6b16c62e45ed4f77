"""What came of a bench: a row for each backend, size and topology; as JSON, and as a table. No torch."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from accel_hidiff.benching.names import REFERENCE
from accel_hidiff.benching.options import Case, Options
from accel_hidiff.doctor import Finding
from accel_hidiff.files import whole_file


@dataclass
class Row:
    """One backend over one case.

    Attributes:
        state: "waiting", then "ready" (set up and verified), then "timed"; or "wrong output", "failed" or "died".
        reason: one line, where it is one of the last three.
        setup: what `Contestant.set_up` answered.
        times: seconds of a call in each turn.
        calls: of the UNet in each turn.
        timed: counters of what happened while it was timed, see `Contestant.turn`; sums over all turns.
    """

    backend: str
    case: Case
    state: str = "waiting"
    reason: str = ""
    setup: dict[str, Any] = field(default_factory=dict)
    times: list[float] = field(default_factory=list)
    calls: int = 0
    timed: dict[str, int] = field(default_factory=dict)

    def fail(self, state: str, reason: str) -> None:
        """It is not timed any more, and no time of it is told."""
        self.state, self.reason, self.times = state, reason, []

    def add(self, turn: Mapping[str, Any]) -> None:
        """Adds what `Contestant.turn` answered."""
        self.times.append(turn["seconds"])
        for name in ("compiles", "graphs"):
            self.timed[name] = self.timed.get(name, 0) + turn[name]

    @property
    def median(self) -> float | None:
        """Seconds of a call."""
        return statistics.median(self.times) if self.state == "timed" else None

    @property
    def quartiles(self) -> tuple[float, float] | None:
        """Seconds of a call: the first and the third quartile."""
        if self.median is None:
            return None
        if len(self.times) == 1:
            return self.times[0], self.times[0]
        low, _, high = statistics.quantiles(self.times, n=4, method="inclusive")
        return low, high

    @property
    def compiled_while_timed(self) -> int:
        """Graphs that were compiled, or that Dynamo captured, during the timed turns; they have to be none."""
        return max(self.timed.values(), default=0)

    @property
    def ok(self) -> bool:
        """Verified, timed, and nothing compiled meanwhile."""
        return self.state == "timed" and not self.compiled_while_timed

    def ratio(self, reference: Row | None) -> float | None:
        """Ratio of the medians, this over the reference's; None where one of the two has none."""
        if reference is None or self.median is None or not reference.median:
            return None
        return self.median / reference.median

    def ratio_range(self, reference: Row | None) -> tuple[float, float] | None:
        """The least and the greatest ratio of two turns of the same round."""
        if self.ratio(reference) is None or reference is None or len(self.times) != len(reference.times):
            return None
        ratios = [mine / other for mine, other in zip(self.times, reference.times, strict=True)]
        return min(ratios), max(ratios)

    def to_json(self, reference: Row | None) -> dict[str, Any]:
        """A plain JSON mapping; milliseconds with four significant digits.

        Args:
            reference: the reference's row of the same case; None: no ratio can be told.
        """
        setup, median, quartiles = self.setup, self.median, self.quartiles
        ratio_range = self.ratio_range(reference)
        return {
            "backend": self.backend,
            "size": self.case.size,
            "topology": self.case.topology,
            "steps": [self.case.start, self.case.stop],
            "state": self.state,
            "reason": self.reason or None,
            "setup_s": _rounded(setup.get("setup_s")),
            "setup_cpu_s": _rounded(setup.get("setup_cpu_s")),
            "compiled": setup.get("compiles"),
            "loaded": setup.get("loads"),
            "error": _rounded(setup.get("error"), 2),
            "error_limit": setup.get("limit") if self.backend != REFERENCE else None,
            "ms": _rounded(median, scale=1e3),
            "ms_quartiles": None if quartiles is None else [_rounded(time, scale=1e3) for time in quartiles],
            "vs_eager": _rounded(self.ratio(reference), 3),
            "vs_eager_range": None if ratio_range is None else [_rounded(ratio, 3) for ratio in ratio_range],
            "turns": len(self.times),
            "calls_per_turn": self.calls if self.times else 0,
            "compiled_while_timed": self.timed.get("compiles", 0),
            "dynamo_graphs_while_timed": self.timed.get("graphs", 0),
        }


@dataclass(frozen=True)
class Report:
    """All of a bench.

    Attributes:
        options: what was asked for.
        unavailable: backends that this machine does not have, by name.
        rows: of the others, in the order of cases and, within one, of backends.
        model, machine, versions: what figures depend on, as the reference's process sees it.
        workers: more about each process, see `turns.Outcome`.
    """

    options: Options
    unavailable: Mapping[str, Finding]
    rows: Sequence[Row]
    model: Mapping[str, str]
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    workers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def ok(self) -> bool:
        """Every available backend was verified and timed, and nothing was compiled while it was timed."""
        return all(row.ok for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """A plain JSON mapping."""
        backends = []
        for name in self.options.backends:
            missing = self.unavailable.get(name)
            told = {"backend": name, "usable": missing is None, "reason": missing and missing.detail}
            backends.append(told | dict(self.workers.get(name, {})))
        return {
            "command": self.options.command(),
            "date": self.date,
            "ok": self.ok,
            "settings": {**self.options.to_json(), **self.model},
            "machine": self.machine,
            "load_average": _rounded(os.getloadavg()[0], 2),
            "versions": self.versions,
            "backends": backends,
            "rows": [row.to_json(self._reference(row)) for row in self.rows],
        }

    def write(self, out: Path) -> None:
        """Writes the JSON to a file; nobody sees half of it."""
        with whole_file(out) as part:
            part.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")

    def table(self) -> Group:
        """Rows with figures; below them, what has none, with the reason."""
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
        for column in ("backend", "size", "topology"):
            table.add_column(column, overflow="fold", no_wrap=column != "topology")
        for column in ("compile\ns", "graphs\ncompiled", "ms", "vs\neager", "error"):  # 80 characters in all
            table.add_column(column, justify="right")
        for row in self.rows:
            if row.median is not None:
                table.add_row(*self._cells(row))
        rest = Table.grid(padding=(0, 1, 0, 0))
        rest.add_column(min_width=max(map(len, self.options.backends)), no_wrap=True)
        rest.add_column(overflow="fold")
        for name, text in self._without_figures():
            rest.add_row(name, Text(text))
        return Group(*([table] if table.row_count else []), *([rest] if rest.row_count else []))

    def lines(self) -> list[str]:
        """What stands below the table."""
        options, model, versions = self.options, self.model, self.versions
        weights = ""
        if options.model is None:
            weights = " with random weights, 16 channels wide: fixed costs weigh far more than in a real model"
        calls = sorted({row.calls for row in self.rows if row.times})
        each = f" of {'-'.join(str(n) for n in dict.fromkeys((calls[0], calls[-1])))} UNet calls" if calls else ""
        threads = self.machine["torch_threads"]
        where = self.machine.get("gpu") if model["device"].startswith("cuda") else self.machine["cpu"]
        return [
            *self._warnings(),
            f"ms: median of {options.repeats} interleaved turns{each}, ± half the distance of the quartiles; "
            "vs eager: ratio of the medians, below 1 is faster",
            f"{options.model_name}{weights}",
            f"{model['dtype']} on {model['device']}, batch {options.batch}, {threads} thread{'s' * (threads > 1)}; "
            f"{where}, {self.machine['cores']} cores; torch {versions['torch']}, diffusers {versions['diffusers']}",
        ]

    def _cells(self, row: Row) -> Iterator[str]:
        fields = row.to_json(self._reference(row))
        yield from (row.backend, row.case.size, row.case.topology)
        is_reference = row.backend == REFERENCE
        yield "-" if is_reference else f"{fields['setup_s']:.1f}"
        yield "-" if is_reference else str(fields["compiled"])
        low, high = fields["ms_quartiles"]
        yield _with_spread(fields["ms"], (high - low) / 2)
        yield "-" if fields["vs_eager"] is None else f"{fields['vs_eager']:.2f}"
        yield "-" if fields["error"] is None else f"{fields['error']:.1e}"

    def _without_figures(self) -> Iterator[tuple[str, str]]:
        """(backend, what it has instead), a line for each case; one where all cases of a backend are alike."""
        names = self.options.backends
        rows = sorted((row for row in self.rows if row.median is None), key=lambda row: names.index(row.backend))
        for name, group in groupby(rows, key=lambda row: row.backend):
            failed = list(group)
            alike = len({(row.state, row.reason) for row in failed}) == 1
            if alike and len(failed) > 1 and len(failed) == sum(row.backend == name for row in self.rows):
                yield name, f"{failed[0].state}: {failed[0].reason}"
                continue
            for row in failed:
                yield name, f"{row.case.size} {row.case.topology}: {row.state}: {row.reason}"
        for name, finding in self.unavailable.items():
            yield name, f"unavailable: {finding.detail}"

    def _warnings(self) -> Iterator[str]:
        for row in self.rows:
            if row.compiled_while_timed:
                what = f"{row.backend} {row.case.size} {row.case.topology}"
                count = row.compiled_while_timed
                yield f"{what}: {count} graphs were compiled while it was timed; its time tells nothing"

    def _reference(self, row: Row) -> Row | None:
        """The reference's row of the same case."""
        return next((other for other in self.rows if (other.backend, other.case) == (REFERENCE, row.case)), None)


def _rounded(value: float | None, digits: int = 4, scale: float = 1.0) -> float | None:
    """To significant digits: more would be noise."""
    return None if value is None else float(f"{value * scale:.{digits}g}")


def _with_spread(middle: float, spread: float) -> str:
    digits = 0 if middle >= 1000 else 1 if middle >= 10 else 2
    return f"{middle:.{digits}f} ± {spread:.{digits}f}"
