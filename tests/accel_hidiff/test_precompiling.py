"""What a compilation costs, how many processes share it, and how it is shown: without compiling anything."""

from __future__ import annotations

import io
import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import accel_hidiff as ah
from accel_hidiff.compiling.pool import Outcome
from accel_hidiff.precompiling.estimate import (
    CUDA_FROM,
    CUDA_TABLE,
    START_SECONDS,
    TABLE,
    TABLE_FROM,
    Cost,
    Estimator,
    Line,
    Sample,
    fit,
    wall_seconds,
)
from accel_hidiff.precompiling.machine import Machine, Workers, this_machine, workers
from accel_hidiff.precompiling.table import Board, shown

GIB = 1 << 30
ROOT = Path(ah.__file__).parents[1]
LINES = {"resnet": Line(4.0, 1.0, 1e6, 0.0), "unet": Line(10.0, 0.5, 2e6, 1e3)}


class TestEstimator:
    def test_the_table_where_nothing_is_known(self) -> None:
        assert Estimator([], {"cpu": LINES}).cost("resnet", "cpu", 10) == Cost(14.0, 1e6, "table")

    def test_a_kind_that_the_table_lacks_counts_as_a_unet(self) -> None:
        assert Estimator([], {"cpu": LINES}).cost("controlnet", "cpu", 100) == Cost(60.0, 2.1e6, "table")

    def test_artifacts_of_the_kind_scale_its_line(self) -> None:
        samples = [Sample("resnet", "cpu", 10, 28.0, 500_000), Sample("unet", "cpu", 0, 100.0, 2_000_000)]
        assert Estimator(samples, {"cpu": LINES}).cost("resnet", "cpu", 16) == Cost(40.0, 5e5, "same kind")

    def test_artifacts_of_other_kinds_scale_the_table(self) -> None:
        samples = [Sample("resnet", "cpu", 10, 7.0, 2_000_000)]
        assert Estimator(samples, {"cpu": LINES}).cost("unet", "cpu", 20) == Cost(10.0, 4.04e6, "other kinds")

    def test_artifacts_for_another_device_say_nothing(self) -> None:
        samples = [Sample("resnet", "cuda", 10, 140.0, 1)]
        assert Estimator(samples, {"cpu": LINES}).cost("resnet", "cpu", 10).base == "table"

    def test_wall_time_is_shared_but_no_shorter_than_the_longest(self) -> None:
        costs = [Cost(seconds, 0, "table") for seconds in (30.0, 10.0, 20.0)]
        assert [wall_seconds(costs, jobs) - START_SECONDS for jobs in (1, 2, 9)] == [60.0, 30.0, 30.0]
        assert wall_seconds([], 4) == 0

    def test_lines_go_through_the_points(self) -> None:
        rows = [{"region": "resnet", "weights": w, "seconds": 2 + 3 * w, "bytes": 5} for w in (1, 4, 10)]
        rows += [{"region": "decoder", "weights": w, "seconds": s, "bytes": 8} for w, s in ((6, 30), (10, 10))]
        rows.append({"region": "cfgpp step", "weights": 0, "seconds": 9, "bytes": 8})
        lines = fit(rows)
        assert lines["resnet"].at(2) == (pytest.approx(8), 1e3), "least squares"
        assert lines["decoder"] == Line(0, 2.5, 0, 1), "in proportion: too close to each other for a line"
        assert lines["cfgpp step"] == Line(9, 0, 8, 0)

    def test_the_table_is_that_of_the_committed_benchmark(self) -> None:
        report = json.loads((ROOT / TABLE_FROM.partition(":")[0]).read_text())
        fitted = {row["fit"]: row for row in report["records"] if "fit" in row}
        release = report["versions"]["torch"].partition("+")[0]
        assert not report["smoke_run"] and f"torch {release}," in TABLE_FROM
        for kind, line in TABLE.items():
            assert vars(line) == {name: fitted[kind][name] for name in vars(line)}, kind
        (start,) = [row["start_s"] for row in report["records"] if "start_s" in row]
        assert start == START_SECONDS and set(fitted) == set(TABLE)

    def test_the_table_of_gpus_is_that_of_the_committed_run(self) -> None:
        report = json.loads((ROOT / CUDA_FROM.partition(":")[0]).read_text())
        fitted = {row["fit"]: row for row in report["records"] if "fit" in row}
        assert f"torch {report['versions']['torch'].partition('+')[0]}" in CUDA_FROM
        assert set(fitted) == set(CUDA_TABLE)
        for kind, line in CUDA_TABLE.items():
            assert vars(line) == {name: fitted[kind][name] for name in vars(line)}, kind

    def test_a_kind_that_was_not_measured_for_gpus_costs_what_it_costs_on_a_cpu(self) -> None:
        assert Estimator([]).cost("cfgpp step", "cuda", 0) == Estimator([]).cost("cfgpp step", "cpu", 0)
        assert Estimator([]).cost("resnet", "cuda", 10) != Estimator([]).cost("resnet", "cpu", 10)


class TestWorkers:
    @pytest.mark.parametrize(
        ("machine", "jobs", "memory", "want"),
        [
            (Machine(2, 24 * GIB), None, None, Workers(2, 12 * GIB)),
            (Machine(64, 32 * GIB), None, None, Workers(8, 4 * GIB)),
            (Machine(8, 2 * GIB), None, None, Workers(1, 2 * GIB)),
            (Machine(8, 32 * GIB), 3, None, Workers(3, 32 * GIB // 3)),
            (Machine(8, 32 * GIB), None, 8 * GIB, Workers(4, 8 * GIB)),
            (Machine(8, 32 * GIB), 16, 8 * GIB, Workers(16, 8 * GIB)),
        ],
    )
    def test_defaults(self, machine: Machine, jobs: int | None, memory: int | None, want: Workers) -> None:
        assert workers(machine, jobs, memory) == want

    @pytest.mark.parametrize("jobs", [0, -1, 129])
    def test_jobs_that_cannot_be(self, jobs: int) -> None:
        with pytest.raises(ah.BadInput, match=r"--jobs: expected 1 to 128 processes on 2 cores"):
            workers(Machine(2, GIB), jobs, None)

    def test_a_container_may_have_less_than_the_machine(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = this_machine()
        assert whole.cores >= 1 and whole.memory > GIB // 8
        monkeypatch.setattr("accel_hidiff.precompiling.machine._CGROUP", tmp_path)
        (tmp_path / "memory.max").write_text("1073741824\n")
        (tmp_path / "cpu.max").write_text("150000 100000\n")
        assert this_machine() == Machine(min(2, whole.cores), GIB)
        (tmp_path / "memory.max").write_text("max\n")
        (tmp_path / "cpu.max").write_text("max 100000\n")
        assert this_machine().memory == this_machine().memory > GIB


def outcome(digest: str, state: str, error: str = "") -> Outcome:
    return Outcome(digest, f"unet.{digest}", state, 20.0, error)


class TestBoard:
    MODELS: Any = (("base", 3, {"a": Cost(10, 0, "table"), "b": Cost(30, 0, "table")}), ("turbo", 1, {}))

    def drawn(self, board: Board) -> str:
        out = io.StringIO()
        Console(file=out, width=100).print(board)
        return out.getvalue()

    def row(self, board: Board, model: str) -> list[str]:
        (line,) = [line for line in self.drawn(board).splitlines() if line.startswith(model)]
        return re.sub("[^ -~]+", "", line).split()[1:]

    def test_it_counts_what_happens(self) -> None:
        out = io.StringIO()
        board = Board(Console(file=out, width=200), self.MODELS, 2, lines=False)
        assert self.row(board, "base") == ["3/5", "0:00", "0:20"] and self.row(board, "turbo") == ["1/1", "0:00"]
        board.started("base", "a", "unet.a")
        assert "worker 1: base  unet.a  0 s" in self.drawn(board) and "worker 2: waits" in self.drawn(board)
        board.started("base", "b", "unet.b")
        assert self.row(board, "base") == ["3/5", "2", "0:00", "0:30"]
        board.ended("base", outcome("a", "compiled"))
        assert self.row(board, "base") == ["4/5", "1", "0:00", "1:00"], "it took twice what was foreseen"
        board.ended("base", outcome("b", "failed", "no compiler"))
        assert self.row(board, "base") == ["4/5", "1", "0:00"], "one failed, nothing is left"
        assert out.getvalue().splitlines() == ["  2 of 2  failed     20.0 s  base  unet.b: no compiler"]

    def test_what_takes_longer_than_foreseen_counts_for_the_rest(self) -> None:
        board = Board(Console(file=io.StringIO()), self.MODELS, 2, lines=False)
        board.started("base", "a", "unet.a")
        assert board.left("base") == pytest.approx(20, abs=1)
        task = board._workers[0]
        assert task is not None
        task.began -= 50  # five times the ten seconds that were foreseen
        assert board.left("base") == pytest.approx(75, abs=2)

    def test_one_that_died_begins_again(self) -> None:
        board = Board(Console(file=io.StringIO()), self.MODELS, 1, lines=False)
        for _ in range(2):
            board.started("base", "a", "unet.a")
        board.ended("base", outcome("a", "compiled"))
        assert self.row(board, "base")[0] == "4/5" and "worker 1: waits" in self.drawn(board)

    def test_it_is_drawn_while_it_prints(self) -> None:
        """The live table is drawn by a thread of its own, which a line that is printed has to wait for."""
        board: Board
        drawn: list[bool] = []

        class Screen(io.StringIO):
            def write(self, text: str) -> int:
                thread = threading.Thread(target=lambda: board.__rich__(), daemon=True)
                thread.start()
                thread.join(10)
                drawn.append(not thread.is_alive())
                return super().write(text)

        board = Board(Console(file=Screen(), width=200), self.MODELS, 1, lines=True)
        board.started("base", "a", "unet.a")
        board.ended("base", outcome("a", "failed", "no compiler"))
        assert len(drawn) >= 2 and all(drawn)

    def test_what_ctrl_c_cancels_is_no_failure(self) -> None:
        out = io.StringIO()
        board = Board(Console(file=out), self.MODELS, 1, lines=False)
        board.started("base", "a", "unet.a")
        for digest in "ab":
            board.ended("base", outcome(digest, "cancelled", "the pool was closed"))
        assert out.getvalue() == "" and self.row(board, "base")[:2] == ["3/3", "0:00"]

    def test_plain_lines_where_there_is_no_terminal(self) -> None:
        out = io.StringIO()
        with shown(Console(file=out, width=60), self.MODELS, 1) as board:
            board.started("base", "a", "unet.a")
            board.ended("base", outcome("a", "compiled"))
        assert out.getvalue().splitlines() == [
            "  compiling            base  unet.a",
            "  1 of 2  compiled   20.0 s  base  unet.a",
        ]

    def test_a_table_on_a_terminal(self) -> None:
        out = io.StringIO()
        with shown(Console(file=out, width=100, force_terminal=True), self.MODELS, 1) as board:
            board.started("base", "a", "unet.a")
        assert "worker 1: base" in out.getvalue() and "3/5" in out.getvalue() and "\x1b[" in out.getvalue()
