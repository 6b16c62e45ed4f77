"""What a precompilation shows while it runs: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from accel_hidiff.compiling.pool import Outcome
from accel_hidiff.precompiling.estimate import Cost


@dataclass
class _Row:
    """One model: its artifacts that are to be compiled, and how far they are."""

    name: str
    found: int
    waiting: dict[str, Cost]
    compiling: int = 0
    done: int = 0
    failed: int = 0
    began: float | None = None
    ended: float | None = None

    @property
    def total(self) -> int:
        return self.found + len(self.waiting) + self.compiling + self.done + self.failed


@dataclass
class _Task:
    """What one worker compiles."""

    model: str
    digest: str
    region: str
    cost: Cost
    began: float = field(default_factory=time.monotonic)

    def text(self, now: float) -> str:
        return f"{self.model}  {self.region}  {now - self.began:.0f} s"


class Board:
    """Keeps count of a precompilation, and draws it. Thread safe.

    Args:
        console: where lines go.
        models: (name, artifacts that are there, what each of the others will cost).
        jobs: workers.
        lines: print a line for each artifact that is done, and one for each that begins; failures get one always.
    """

    def __init__(
        self, console: Console, models: Sequence[tuple[str, int, Mapping[str, Cost]]], jobs: int, *, lines: bool
    ) -> None:
        self._console = console
        self._rows = {name: _Row(name, found, dict(costs)) for name, found, costs in models}
        self._costs = {digest: cost for _, _, costs in models for digest, cost in costs.items()}
        self._workers: list[_Task | None] = [None] * jobs
        self._jobs = jobs
        self._lines = lines
        self._total = len(self._costs)
        self._ended = 0
        self._spent = self._foreseen = 0.0  # seconds of what is done, and what was foreseen for it
        self._lock = threading.Lock()

    def started(self, model: str, digest: str, region: str) -> None:
        """A process begins with an artifact."""
        with self._lock:
            row = self._rows[model]
            row.waiting.pop(digest, None)
            row.began = row.began or time.monotonic()
            slot = self._slot(digest)
            if slot is None:  # else its process died, and another one begins with it again
                row.compiling += 1
                slot = self._slot(None)
            self._workers[slot or 0] = _Task(model, digest, region, self._costs[digest])
        if self._lines:
            self._say(f"  compiling            {model}  {region}")

    def ended(self, model: str, outcome: Outcome) -> None:
        """An artifact is there, or it failed."""
        with self._lock:
            row = self._rows[model]
            if (slot := self._slot(outcome.digest)) is not None:
                self._workers[slot] = None
                row.compiling -= 1
            row.waiting.pop(outcome.digest, None)
            if outcome.state == "cancelled":  # Ctrl-C
                return
            row.done += outcome.ok
            row.failed += not outcome.ok
            if outcome.ok:
                self._spent += outcome.seconds
                self._foreseen += self._costs[outcome.digest].seconds
            if not row.waiting and not row.compiling:
                row.ended = time.monotonic()
            self._ended += 1
            number = f"{self._ended:3} of {self._total}"
        if self._lines or not outcome.ok:
            error = f": {outcome.error}" if outcome.error else ""
            self._say(f"{number}  {outcome.state:8} {outcome.seconds:6.1f} s  {model}  {outcome.path}{error}")

    def left(self, model: str) -> float:
        """Seconds until the artifacts of a model are there, if all workers were its own."""
        now = time.monotonic()
        with self._lock:
            waiting = sum(cost.seconds for cost in self._rows[model].waiting.values())
            tasks = [task for task in self._workers if task is not None]
            known = self._spent / self._foreseen if self._foreseen else 1.0
            scale = max(known, *((now - task.began) / task.cost.seconds for task in tasks), 0.0)
            working = [task for task in tasks if task.model == model]
            rest = [max(task.cost.seconds * scale - (now - task.began), 1.0) for task in working]
        return max((waiting * scale + sum(rest)) / self._jobs, *rest, 0.0)

    def __rich__(self) -> Group:
        now = time.monotonic()
        table = Table(box=None, pad_edge=False)
        for column in ("model", "", "done", "compiling", "failed", "elapsed", "left"):
            table.add_column(column, justify="left" if column in ("model", "") else "right", no_wrap=True)
        for row in self._rows.values():
            elapsed = 0.0 if row.began is None else (row.ended or now) - row.began
            over = row.ended is not None or not (row.waiting or row.compiling)
            table.add_row(
                row.name,
                ProgressBar(total=max(row.total, 1), completed=row.found + row.done if row.total else 1, width=20),
                f"{row.found + row.done}/{row.total}",
                str(row.compiling or ""),
                Text(str(row.failed or ""), style="red"),
                _clock(elapsed),
                "" if over else _clock(self.left(row.name)),
            )
        with self._lock:
            tasks = list(enumerate(self._workers, 1))
        lines = [f"worker {slot}: {'waits' if task is None else task.text(now)}" for slot, task in tasks]
        return Group(table, *map(Text, lines))

    def _slot(self, digest: str | None) -> int | None:
        """The worker that compiles an artifact; of None: one that waits."""
        digests = [None if task is None else task.digest for task in self._workers]
        return digests.index(digest) if digest in digests else None

    def _say(self, line: str) -> None:
        """Without the lock: a console that prints waits for the live table, which waits for the lock."""
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def shown(console: Console, models: Sequence[tuple[str, int, Mapping[str, Cost]]], jobs: int) -> Iterator[Board]:
    """A board that is on the screen inside of the block: as a table on a terminal, as lines elsewhere."""
    if not console.is_terminal:
        yield Board(console, models, jobs, lines=True)
        return
    board = Board(console, models, jobs, lines=False)
    with Live(board, console=console, refresh_per_second=4, transient=True):
        yield board


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
