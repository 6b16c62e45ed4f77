"""`accel-hidiff bench`: real processes over the tiny model, whose graphs the session's cache holds."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from rich.console import Console

import accel_hidiff as ah
from accel_hidiff.benching.found import find
from accel_hidiff.benching.inputs import unet_inputs
from accel_hidiff.benching.names import BENCHED
from accel_hidiff.benching.options import Case, Options
from accel_hidiff.benching.report import Report, Row
from accel_hidiff.benching.turns import Outcome, compete
from accel_hidiff.cli import run
from accel_hidiff.demo import save_model, tiny_config
from accel_hidiff.doctor import Finding, examine_backend
from accel_hidiff.parity import limit_of, wrong
from tests import models
from tests.compiled.conftest import STEPS

TOPOLOGIES = ["windowed+dilated", "windowed+pooled", "windowed"]


def workers(parent: int | None = None) -> list[psutil.Process]:
    """Processes of contestants that live, of this process or of another one."""
    found = []
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(parent).children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # it ended meanwhile, as compilers do
                if "accel_hidiff.benching.worker" in child.cmdline():
                    found.append(child)
    return found


class Watched:
    """Keeps what a bench tells of itself; `on_note` may interfere."""

    def __init__(self, on_note: Callable[[str], None] = lambda text: None) -> None:
        self.parts = [0, 0]
        self.on_note = on_note

    def planned(self, parts: int) -> None:
        self.parts[1] += parts

    def now(self, text: str) -> None:
        pass

    def note(self, text: str) -> None:
        self.on_note(text)

    def done(self, parts: int) -> None:
        self.parts[0] += parts


def test_backends_are_verified_timed_and_reported(
    capsys: pytest.CaptureFixture[str], model_folder: Path, cache_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "bench.json"
    here = ["eager", "stock", "aot"]
    backends = [*here, *(name for name in ["onediff", "tensorrt", "hidiffusion"] if not find(name).usable)]
    asked = ["--size", "128x128", "--steps", str(STEPS), "--cache", str(cache_dir), "--threads", "1", "--repeats", "3"]
    asked += ["--jobs", "2", "--python", f"stock={sys.executable}"]
    code = run(["bench", str(model_folder), *asked, "--backends", ",".join(backends), "--out", str(out), "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    report = json.loads(captured.out)
    assert report == json.loads(out.read_text()) and list(out.parent.iterdir()) == [out]
    assert workers() == []

    assert report["ok"] is True and report["command"].startswith("accel-hidiff bench tiny --size 128x128")
    assert str(tmp_path) not in json.dumps(report) and str(cache_dir) not in json.dumps(report)
    assert report["settings"] == {
        **{"model": "tiny", "random_weights": False, "steps": STEPS, "batch": 2, "repeats": 3, "regions": "blocks"},
        **{"shapes": "symbolic", "dtype": "float32", "device": "cpu", "family": "sdxl"},
    }
    assert report["machine"]["torch_threads"] == 1 and report["versions"]["torch"] == torch.__version__
    found = {backend["backend"]: backend for backend in report["backends"]}
    assert list(found) == backends
    for name in here:
        told = found[name]
        assert told["usable"] is True and told["versions"] == report["versions"]
        assert 0 < told["opened"]["weights_mb"] == told["ready"]["weights_mb"] < told["opened"]["resident_mb"]
    for name in backends[3:]:
        assert found[name] == {"backend": name, "usable": False, "reason": find(name).detail}

    rows = report["rows"]
    assert [(row["topology"], row["backend"]) for row in rows] == [(t, b) for t in TOPOLOGIES for b in here]
    for row in rows:
        assert (row["size"], row["state"], row["reason"], row["turns"]) == ("128x128", "timed", None, 3)
        assert (row["compiled"], row["compiled_while_timed"], row["dynamo_graphs_while_timed"]) == (0, 0, 0)
        low, high = row["ms_quartiles"]
        assert 0 < low <= row["ms"] <= high and row["calls_per_turn"] >= 1
    for eager, stock, aot in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        assert stock["error"] is None and stock["compiled"] == 0, "it computes something else"
        assert eager["vs_eager"] == 1 and eager["error"] is None and eager["steps"] == aot["steps"]
        assert aot["vs_eager"] == pytest.approx(aot["ms"] / eager["ms"], rel=1e-2)
        assert eager["vs_eager_range"] == [1, 1] and 0 < aot["vs_eager_range"][0] <= aot["vs_eager_range"][1]
        assert 0 < aot["error"] < aot["error_limit"] == 1e-3
    assert rows[2]["loaded"] > 0, "the graphs come from the cache"


@pytest.fixture(scope="module")
def troubled(model_folder: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Any]:
    """A bench in which one backend has the weights of another model, one cannot be set up, and one is killed."""
    folder = tmp_path_factory.mktemp("troubled")
    other = save_model(folder / "other", seed=1, config=tiny_config())
    (folder / "cache").mkdir()
    (folder / "cache" / "v1").write_text("in the way")
    sound = Options(str(model_folder), ((128, 128),), STEPS, repeats=2, cache=cache_dir, threads=1)
    entries = [
        ("eager", sound),
        ("aot", replace(sound, model=str(other))),
        ("aot", replace(sound, cache=folder / "cache")),
        ("aot", sound),
    ]

    def kill_the_last(text: str) -> None:
        if text.startswith("128x128 windowed+dilated: eager"):
            workers()[-1].kill()

    work = folder / "work"
    work.mkdir()
    watched = Watched(kill_the_last)
    outcome = compete(entries, work, watched)
    assert workers() == []
    assert watched.parts[0] == watched.parts[1] > 0, "all that was planned is done"
    return outcome, sound


def test_other_weights_give_a_wrong_output_that_is_not_timed(troubled: Any) -> None:
    for row in troubled[0].rows[1::4]:
        assert row.state == "wrong output" and "expected below 0.001" in row.reason
        assert row.setup["error"] > 1e-3 and row.times == [] and row.median is None


def test_a_set_up_that_fails_is_told_in_one_line(troubled: Any) -> None:
    for row in troubled[0].rows[2::4]:
        assert row.state == "failed" and row.reason and "\n" not in row.reason and row.times == []


def test_a_killed_process_is_told_and_the_others_go_on(troubled: Any) -> None:
    rows = troubled[0].rows
    assert [row.state for row in rows[3::4]] == ["timed", "died", "died"]
    assert "SIGKILL" in rows[7].reason
    assert [row.state for row in rows[0::4]] == ["timed"] * 3 and all(len(row.times) == 2 for row in rows[0::4])


def test_the_table_fits_80_columns_and_tells_all_troubles(troubled: Any) -> None:
    outcome, options = troubled
    unavailable = {"onediff": Finding("backend onediff", False, "onediff is not installed; " + "a long reason " * 9)}
    report = Report(options, unavailable, **vars(outcome))
    assert not report.ok
    text = rendered(report)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    (first, *_) = [line for line in lines if line.startswith("eager")]
    assert first.split()[1:3] == ["128x128", "windowed+dilated"] and "±" in first
    flat = " ".join(text.split())
    assert "onediff unavailable: onediff is not installed" in flat
    for row in outcome.rows:
        if row.reason:
            assert " ".join(f"{row.case.size} {row.case.topology}: {row.state}: {row.reason}".split()) in flat
    (ratios, *_) = [line for line in report.lines() if line.startswith("ms: ")]
    assert "median of 2 interleaved turns" in ratios and "ratio of the medians" in ratios


def rendered(report: Report) -> str:
    stream = io.StringIO()
    Console(file=stream, width=80, highlight=False).print(report.table())
    return stream.getvalue()


@contextmanager
def interrupts_taken() -> Iterator[None]:
    """Processes that are started inside take SIGINT, also where this one ignores it as a background job of a shell."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=str)
def test_no_process_outlives_an_interrupted_bench(how: signal.Signals, tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(ah.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "accel_hidiff.cli", "bench", "--backends", "eager,aot"]
    started: list[psutil.Process] = []
    with interrupts_taken(), subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as bench:
        try:
            while len(started) < 2 and bench.poll() is None:
                time.sleep(0.02)
                started = workers(bench.pid)
            bench.send_signal(how)
            _, errors = bench.communicate(timeout=30)
        finally:
            bench.kill()
    if how == signal.SIGINT:
        assert bench.returncode == 1 and errors.strip() == "accel-hidiff: interrupted"
        assert list(tmp_path.iterdir()) == []
    _, alive = psutil.wait_procs(started, timeout=30)
    assert len(started) == 2 and alive == []


def test_an_interrupt_while_backends_compile_is_told_once(tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(ah.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "accel_hidiff.cli", "bench", "--backends", "eager,aot,inductor", "--jobs", "2"]
    with interrupts_taken(), subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as bench:
        try:
            assert bench.stderr is not None
            while not bench.stderr.readline().startswith("eager: 128x128 windowed: ready"):
                assert bench.poll() is None
            time.sleep(3)  # the others load the model, or compile
            started = workers(bench.pid)
            bench.send_signal(signal.SIGINT)
            _, errors = bench.communicate(timeout=60)
        finally:
            bench.kill()
    assert bench.returncode == 1 and errors.strip().splitlines()[-1] == "accel-hidiff: interrupted"
    assert "died" not in errors and "Traceback" not in errors
    _, alive = psutil.wait_procs(started, timeout=30)
    assert len(started) == 3 and alive == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--backends", "eager,vllm"], "expected names among eager,inductor,aot,onediff"),
        (["--backends", ""], "expected names among"),
        (["--size", "100x128"], "multiple of 8"),
        (["--size", "axb"], "WIDTHxHEIGHT"),
        (["--repeats", "0"], "--repeats: expected an integer of at least 1, got 0"),
        (["--batch", "-1"], "--batch: expected an integer of at least 1, got -1"),
        (["--python", "aot=/no/python"], "--python: expected NAME=PATH"),
        (["--jobs", "0"], "--jobs: expected an integer of at least 1, got 0"),
        (["--threads", "0"], "--threads: expected an integer of at least 1, got 0"),
        (["--steps", "0"], "steps: expected an integer of at least 1"),
        (["--out", "/proc/bench.json"], "--out: expected a file that can be written"),
        (["--out", "/"], "a folder"),
        (["--cache", "/proc/version"], "expected a directory"),
    ],
    ids=str,
)
def test_bad_input_is_refused_at_once(capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str) -> None:
    assert run(["bench", *arguments]) == 2
    refused_in_one_line(capsys, expected)


def test_a_model_without_a_unet_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """By the process of the reference, which is the first to look at it."""
    assert run(["bench", str(tmp_path), "--backends", "eager"]) == 2
    refused_in_one_line(capsys, "expected a diffusers folder with model_index.json")
    assert workers() == []


def test_nothing_but_what_is_unavailable(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert run(["bench", "--backends", "inductor,aot"]) == 1
    refused_in_one_line(capsys, "expected no-such-compiler on PATH")


def refused_in_one_line(capsys: pytest.CaptureFixture[str], expected: str) -> None:
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    (line,) = captured.err.splitlines()
    assert line.startswith("accel-hidiff: ") and expected in line


def test_outputs_are_compared() -> None:
    want = torch.tensor([[1.0, -2.0], [0.5, 0.0]])
    assert wrong(want.clone(), want, 1e-3) == (0.0, "")
    error, problem = wrong(want + 0.01, want, 1e-3)
    assert error == pytest.approx(0.005, rel=1e-3) and "expected below 0.001" in problem
    assert wrong(want + 0.01, want, 5e-2)[1] == ""
    assert "expected shape (2, 2), got (1, 2)" in wrong(want[:1], want, 1e-3)[1]
    for value in (float("nan"), float("inf")):
        damaged = want.clone()
        damaged[0, 0] = value
        assert wrong(damaged, want, 1e-3)[1] and wrong(want, damaged, 1e-3)[1]
    assert wrong(want, torch.zeros_like(want), 1e-3)[1], "a reference of zeros proves nothing"
    assert (limit_of(torch.float32), limit_of(torch.float16), limit_of(torch.bfloat16)) == (1e-3, 5e-2, 5e-2)


@pytest.mark.parametrize("family", ["sd15", "sdxl", "kolors"])
def test_inputs_fit_the_unets_of_all_kinds(family: str) -> None:
    unet = models.build(family, "text2img").unet
    first, second = (unet_inputs(unet, 64, 96, 3) for _ in range(2))
    assert torch.equal(first.sample, second.sample) and torch.equal(first.text, second.text)
    with torch.no_grad():
        assert first.call(unet).shape == (3, 4, 8, 12)


def test_what_compiles_while_it_is_timed_is_told() -> None:
    row = Row("aot", Case(128, 128, "windowed", 0, 7), state="timed", setup={"setup_s": 1.0, "compiles": 0})
    for graphs in (0, 2):
        row.add({"seconds": 0.01, "compiles": 0, "graphs": graphs})
    machine, versions = {"torch_threads": 1, "cpu": "one", "cores": 1}, {"torch": "2", "diffusers": "0"}
    report = Report(Options(), {}, [row], {"dtype": "float32", "device": "cpu"}, machine, versions)
    assert not report.ok and "2 graphs were compiled while it was timed" in report.lines()[0]
    assert report.to_json()["rows"][0]["dynamo_graphs_while_timed"] == 2


@pytest.mark.slow
def test_every_backend_here_over_the_projects_own_model(capsys: pytest.CaptureFixture[str], cache_dir: Path) -> None:
    """The defaults: inductor compiles."""
    code = run(["bench", "--cache", str(cache_dir), "--threads", "1", "--repeats", "2", "--steps", "2"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    for name in BENCHED:
        finding = examine_backend(name)
        lines = [line for line in captured.out.splitlines() if line.startswith(name)]
        assert lines and ("±" in lines[0]) == finding.usable
    assert "random weights" in captured.out and "128x128" in captured.out
    inductor = next(line for line in captured.err.splitlines() if line.startswith("inductor: "))
    assert "ready" in inductor and ", 0 compiled" not in inductor
