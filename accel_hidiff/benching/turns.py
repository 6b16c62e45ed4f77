"""Runs a bench: starts a process for each backend, has each set up and verified, lets them take turns. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

from accel_hidiff.benching.names import REFERENCE
from accel_hidiff.benching.options import Case, Options
from accel_hidiff.benching.report import Row
from accel_hidiff.compiling.child import Child, ChildDied
from accel_hidiff.errors import BadInput, BenchFailed

_TURN: Final = 0.2  # seconds that a turn takes at least
_MOST_CALLS: Final = 50  # of a turn
_TICK: Final = 1.0  # seconds between two looks for an interrupt


class Watcher(Protocol):
    """Is told how far a bench is."""

    def planned(self, parts: int) -> None:
        """So many more parts are to be done."""

    def now(self, text: str) -> None:
        """What is being done."""

    def note(self, text: str) -> None:
        """What was done."""

    def done(self, parts: int) -> None:
        """So many parts are done, or will not be."""


@dataclass(frozen=True)
class Outcome:
    """What came of a bench.

    Attributes:
        rows: in the order of cases and then of backends.
        model, machine, versions: what the reference's process told.
        workers: for each backend: its versions, its memory when it was open ("opened") and set up ("ready"), each as
            `Contestant.memory` tells it, without those that failed before.
    """

    rows: list[Row]
    model: dict[str, str]
    machine: dict[str, Any]
    versions: dict[str, str]
    workers: dict[str, dict[str, Any]]


def compete(entries: Sequence[tuple[str, Options]], work: Path, watcher: Watcher) -> Outcome:
    """Runs all backends. Turns are taken by one process at any time; none is left afterwards, however it ends.

    Args:
        entries: (backend, its options), the reference first. Their sizes, steps and repeats are those of the first.
        work: an empty folder for everything that is written, removed by the caller.
        watcher: is told how far it is.

    Raises:
        BadInput: the model or an option is not what it should be.
        BenchFailed: the reference does not start.
    """
    with ExitStack() as stack:
        workers: list[_Worker] = []
        pool = ThreadPoolExecutor(entries[0][1].jobs)
        stack.callback(pool.shutdown, cancel_futures=True)  # after all processes have ended
        for number, (backend, options) in enumerate(entries):
            workers.append(_Worker(backend, options, work, number))
            stack.callback(workers[-1].end)
        watcher.planned(len(workers))
        watcher.now(f"{REFERENCE}: loading the model")
        told = workers[0].open_reference()
        watcher.done(1)
        cases = [Case(**case) for case in told["cases"]]
        repeats = entries[0][1].repeats
        watcher.planned(len(workers) * len(cases) * (1 + repeats))
        workers[0].rows = {case: Row(REFERENCE, case) for case in cases}
        for worker in workers[1:]:
            worker.rows = {case: Row(worker.backend, case) for case in cases}
        references = [work / f"reference-{number}.pt" for number in range(len(cases))]
        prepare = partial(_prepare, cases=cases, references=references, wanted=workers[0].rows, watcher=watcher)
        prepare(workers[0])
        for done in [pool.submit(prepare, worker) for worker in workers[1:]]:
            done.result()
        for case in cases:
            _take_turns(case, workers, repeats, watcher)
        rows = [worker.rows[case] for case in cases for worker in workers]
        facts = {worker.backend: worker.facts for worker in workers}
        return Outcome(rows, told["model"], told["machine"], told["versions"], facts)


def _prepare(
    worker: _Worker, cases: Sequence[Case], references: Sequence[Path], wanted: dict[Case, Row], watcher: Watcher
) -> None:
    """Has one contestant load the model and set up all cases."""
    if worker.rows is not wanted:
        watcher.now(f"{worker.backend}: loading the model")
        worker.open()
        watcher.done(1)
    worker.weigh("opened")
    for case, reference in zip(cases, references, strict=True):
        watcher.now(f"{worker.backend}: {case.size} {case.topology}, setting up")
        worker.set_up(case, reference, wanted[case])
        if worker.ended:  # by an interrupt, which is told once
            return
        watcher.note(worker.told(case))
        watcher.done(1)
    worker.weigh("ready")


def _take_turns(case: Case, workers: Sequence[_Worker], repeats: int, watcher: Watcher) -> None:
    """Every other round runs in reverse order: whoever disturbs the machine disturbs all alike."""
    ready = [worker for worker in workers if worker.rows[case].state == "ready"]
    watcher.done((len(workers) - len(ready)) * repeats)
    if not ready:
        return
    call_s = workers[0].rows[case].setup["call_s"]
    calls = min(max(math.ceil(_TURN / call_s), 1), _MOST_CALLS)
    order = list(ready)
    for number in range(repeats):
        watcher.now(f"{case.size} {case.topology}: turn {number + 1} of {repeats}")
        for worker in order:
            worker.turn(case, calls)
            watcher.done(1)
        order.reverse()
    for worker in ready:
        worker.finish(case)
    times = [f"{worker.backend} {row.median * 1e3:.1f}" for worker in ready if (row := worker.rows[case]).median]
    watcher.note(f"{case.size} {case.topology}: {', '.join(times)} ms")


class _Worker:
    """The process of one backend, and what came of its cases."""

    def __init__(self, backend: str, options: Options, work: Path, number: int) -> None:
        self.backend = backend
        self.rows: dict[Case, Row] = {}
        self.facts: dict[str, Any] = {}
        self._options, self._shared = options, work
        folder = work / f"worker-{number}"
        folder.mkdir()
        threads = {} if options.threads is None else {"OMP_NUM_THREADS": str(options.threads)}
        python = options.python_of(backend)
        self._child = Child("accel_hidiff.benching.worker", [backend], folder, threads, python)
        self.ended = False

    def end(self) -> None:
        """Ends the process, whatever it does."""
        self.ended = True
        self._child.end()

    def open_reference(self) -> dict[str, Any]:
        """Loads the model of the reference, without which there is no bench; what it told."""
        try:
            answer = self._ask("open", self._options, self.backend, self._shared)
        except ChildDied as death:
            raise BenchFailed(f"{self.backend}: its process {death}") from None
        if "failed" in answer:
            raise (BadInput if answer["refused"] else BenchFailed)(answer["failed"])
        self.facts["versions"] = answer["versions"]
        return answer

    def open(self) -> None:
        """Loads the model; where that fails, all cases have failed."""
        try:
            answer = self._ask("open", self._options, self.backend, self._shared)
        except ChildDied as death:
            self._lost(death)
            return
        if "failed" in answer:
            for row in self.rows.values():
                row.fail("failed", answer["failed"])
        else:
            self.facts["versions"] = answer["versions"]

    def weigh(self, when: str) -> None:
        """Asks for its memory, unless there is nothing left of it."""
        if not any(row.state in ("waiting", "ready") for row in self.rows.values()):
            return
        try:
            answer = self._ask("memory")
        except ChildDied as death:
            self._lost(death)
            return
        if "failed" not in answer:
            self.facts[when] = answer

    def set_up(self, case: Case, reference: Path, wanted: Row) -> None:
        """Compiles or loads a case, and has its output compared with the reference's."""
        row = self.rows[case]
        if row is not wanted and row.state == "waiting" and wanted.state != "ready":
            row.fail("failed", f"there is nothing to compare with, {REFERENCE} {wanted.state}")
        answer = self._attempt(row, "set up", case, reference) if row.state == "waiting" else None
        if answer is None:
            return
        row.setup = answer
        if answer["wrong"]:
            row.fail("failed" if row is wanted else "wrong output", answer["wrong"])
        else:
            row.state = "ready"

    def turn(self, case: Case, calls: int) -> None:
        """One timed turn."""
        row = self.rows[case]
        row.calls = calls
        if row.state == "ready" and (answer := self._attempt(row, "turn", case, calls)) is not None:
            row.add(answer)

    def finish(self, case: Case) -> None:
        """All turns of a case were taken."""
        if self.rows[case].state == "ready":
            self.rows[case].state = "timed"

    def told(self, case: Case) -> str:
        """One line on the set up of a case."""
        row = self.rows[case]
        what = f"{self.backend}: {case.size} {case.topology}:"
        if row.state != "ready":
            return f"{what} {row.state}: {row.reason}"
        setup = row.setup
        if setup["error"] is None:
            return f"{what} ready in {setup['setup_s']:.1f} s"
        counts = f"{setup['compiles']} compiled, {setup['loads']} loaded"
        return f"{what} ready in {setup['setup_s']:.1f} s, {counts}, error {setup['error']:.1e}"

    def _attempt(self, row: Row, kind: str, *value: Any) -> dict[str, Any] | None:
        """The answer; None if there is none, and the row tells why."""
        try:
            answer = self._ask(kind, *value)
        except ChildDied as death:
            self._lost(death)
            return None
        if "failed" in answer:
            row.fail("failed", answer["failed"])
            return None
        return answer

    def _lost(self, death: ChildDied) -> None:
        for row in self.rows.values():
            if row.state in ("waiting", "ready"):
                row.fail("died", f"its process {death}")

    def _ask(self, kind: str, *value: Any) -> dict[str, Any]:
        self._child.send(kind, value)
        while (answer := self._child.answer(_TICK)) is None:
            pass
        return answer
