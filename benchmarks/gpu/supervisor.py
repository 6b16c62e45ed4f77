"""Runs cases in as few processes as possible, each with a limit; whatever becomes of one, the next one runs.

A process ends a case that is late by itself, and goes on. One that does not even do that (it hangs in a driver, say) is
killed with all that it started, and another one takes what is left. Nothing here needs torch: it starts at once, and
outlives what breaks there.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from benchmarks.gpu import journal
from benchmarks.gpu.carried import TREES
from benchmarks.gpu.journal import FAILED, LATE, SKIPPED, Journal, Line
from benchmarks.gpu.programme import Task
from benchmarks.gpu.setting import Setting

ROOT: Final = Path(__file__).resolve().parents[2]
GRACE_S: Final = 8.0  # beyond a case's limit, before its process is killed
START_S: Final = 120.0  # a process that has begun nothing after so many seconds is killed: torch loads slowly from disk
_LEAST_S: Final = 5.0  # with less left, no case is begun
_LOW_PRIORITY: Final = 19


class Supervisor:
    """Runs the cases of one journal.

    Args:
        setting: of the run.
        journal: takes the lines.
        end: `time.time()` when nothing may run any more.
        path: folders for the processes to import from, before the sources that they run.
        command: how a process is started that is told its work as JSON; None: this package's own.
    """

    def __init__(
        self,
        setting: Setting,
        journal: Journal,
        end: float,
        path: Sequence[Path] = (),
        command: Callable[[str], list[str]] | None = None,
    ) -> None:
        self._setting, self._journal, self._end = setting, journal, end
        self._command = command or (lambda work: [sys.executable, "-m", "benchmarks.gpu.worker", work])
        self._path = path

    def run(self, tasks: Sequence[Task]) -> None:
        """Runs all of them; each has a line with its end afterwards."""
        aside = [task for task in tasks if task.stage.beside]
        others = [task for task in tasks if not task.stage.beside]
        with ExitStack() as stack:
            for process, group in groupby(others, lambda task: task.process):
                if aside and aside[0].stage.beside == process:
                    stack.enter_context(self._beside(aside))
                    aside = []
                self._in_turn(list(group))
            stack.enter_context(self._beside(aside))

    def _in_turn(self, tasks: Sequence[Task]) -> None:
        """Starts processes for the cases until each has ended."""
        while left := self._left(tasks):
            if self._end - time.time() < _LEAST_S:
                for task in left:
                    self._note(SKIPPED, task, "no time was left")
                return
            with self._process(left, 0) as process:
                self._watch(process, left)
            self._tell_of_the_end(process, left)

    @contextmanager
    def _beside(self, tasks: Sequence[Task]) -> Iterator[None]:
        """A process at low priority inside of the block, and then until it is done or the time is over."""
        if not tasks:
            yield
            return
        with self._process(tasks, _LOW_PRIORITY) as process:
            yield
            self._watch(process, tasks)
        for task in self._left(tasks):
            self._note(FAILED, task, self._last_words(process, task))

    def _tell_of_the_end(self, process: subprocess.Popen[bytes], tasks: Sequence[Task]) -> None:
        """A case that a process was at when it ended, or its first one if it began none, failed."""
        running, left = self._running(tasks), self._left(tasks)
        if running is not None or len(left) == len(tasks):
            failed = running[0] if running is not None else left[0]
            self._note(FAILED, failed, self._last_words(process, failed))

    def _watch(self, process: subprocess.Popen[bytes], tasks: Sequence[Task]) -> None:
        """Waits for a process; kills it where a case is late beyond grace, or nothing is begun, and says so."""
        started = time.time()
        while True:
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
                return
            now, running = time.time(), self._running(tasks)
            if running is None:
                late = now - max([started, *self._ended_at(tasks)]) > START_S
                reason = f"its process began nothing for {START_S:.0f} s"
            else:
                task, begun = running
                limit = task.limit_s(self._setting.tiny)
                late = now - self._journal.began - begun.at_s > limit + GRACE_S
                reason = f"its process was killed: it did not answer {GRACE_S:.0f} s after its limit of {limit:.0f} s"
            if now > self._end + GRACE_S:
                late, reason = True, "its process was killed: the minutes of the run were over"
            if late:
                _kill(process)
                stuck = running[0] if running else next(iter(self._left(tasks)), None)
                if stuck is not None:
                    self._note(LATE, stuck, reason)
                return

    def _left(self, tasks: Sequence[Task]) -> list[Task]:
        lines = self._lines()
        return [task for task in tasks if not any(line.ended and _is_of(line, task) for line in lines)]

    def _running(self, tasks: Sequence[Task]) -> tuple[Task, Line] | None:
        """The case that was begun last and has not ended, with the line of its begin."""
        for line in reversed(self._lines()):
            for task in tasks:
                if line.stage and _is_of(line, task):
                    return None if line.ended else (task, line)
        return None

    def _ended_at(self, tasks: Sequence[Task]) -> list[float]:
        lines = self._lines()
        return [self._journal.began + line.at_s for line in lines if any(_is_of(line, task) for task in tasks)]

    def _lines(self) -> list[Line]:
        return journal.read(self._journal.path)

    def _note(self, event: str, task: Task, reason: str) -> None:
        self._journal.write(event, task.stage.name, task.case, reason=reason)

    def _log(self, task: Task) -> Path:
        """What the processes of a case print."""
        return self._journal.path.with_suffix(f".{task.process}.log")

    def _last_words(self, process: subprocess.Popen[bytes], task: Task) -> str:
        log = self._log(task)
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.is_file() else []
        said = " ".join(lines[-1].split())[:300] if lines else "it said nothing"
        return f"its process ended with {process.returncode}: {said}"

    @contextmanager
    def _process(self, tasks: Sequence[Task], niceness: int) -> Iterator[subprocess.Popen[bytes]]:
        """A process over cases; it is gone after the block, with all that it started."""
        tree = tasks[0].tree
        sources = Path(self._setting.carried, TREES, tree) if tree else ROOT
        before = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
        found = os.pathsep.join([*map(str, self._path), str(sources), *before])
        work: Mapping[str, Any] = {
            "setting": self._setting.of_tree(tree).to_json(),
            "journal": str(self._journal.path),
            "began": self._journal.began,
            "end": self._end,
            "niceness": niceness,
            "tasks": [[task.stage.name, dict(task.case)] for task in tasks],
        }
        with self._log(tasks[0]).open("ab") as log:
            process = subprocess.Popen(
                self._command(json.dumps(work)),
                cwd=sources,
                env={**os.environ, "PYTHONPATH": found, "HF_HUB_OFFLINE": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,
            )
        try:
            yield process
        finally:
            _kill(process)


def _is_of(line: Line, task: Task) -> bool:
    return line.is_of(task.stage.name, task.case)


def _kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
