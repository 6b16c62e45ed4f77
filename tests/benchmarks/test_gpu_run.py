"""The GPU benchmark: what becomes of its records, and a dry run with the tiny model on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from benchmarks import harness as h
from benchmarks.gpu import run as command
from benchmarks.gpu import served
from benchmarks.gpu.lab import Case, Figures, Lab, NotHere, Setting
from benchmarks.gpu.model import compare
from benchmarks.gpu.records import CUT, DONE, FAILED, SKIPPED, WRONG, CannotResume, Record, Records, facts_of_run
from benchmarks.gpu.runner import Clock, passed, run_alone, run_stages
from benchmarks.gpu.stages import NAMES, STAGES, Stage, chosen, stage_named
from benchmarks.gpu.table import render

MODEL = {"name": "a model", "device": "cpu", "dtype": "float32", "sizes": ["128x128"], "limits": [1e-3, 1e-3]}


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(Setting("cpu", "float32", True, ((128, 128),), str(tmp_path / "cache"), None, 3))


@pytest.fixture
def open_records(tmp_path: Path) -> Callable[..., Records]:
    def opened(resume: bool = False, **model: Any) -> Records:
        out = tmp_path / "out" / "gpu.json"
        records = Records(out, out.with_suffix(".md"), facts_of_run(MODEL | model), render)
        if resume:
            records.resume()
        records.begin()
        return records

    return opened


def stage(name: str, run: Callable[[Lab, Case], Figures], seconds: float = 0.0, **more: Any) -> Stage:
    return Stage(name, run, seconds, seconds, {}, **more)


def raising(problem: BaseException) -> Callable[[Lab, Case], Figures]:
    def run(lab: Lab, case: Case) -> Figures:
        raise problem

    return run


def states(records: Records) -> dict[str, str]:
    return {record.stage: record.status for record in records}


def test_a_stage_that_fails_takes_no_other_down(lab: Lab, open_records: Any, tmp_path: Path) -> None:
    records = open_records()
    stages = [
        stage("build", raising(RuntimeError("CUDA error: it broke\nand more"))),
        stage("attention", raising(NotHere("no such kernel"))),
        stage("load", raising(h.WrongOutput("one compilation"))),
        stage("memory", lambda lab, case: {"mb": float("nan")}),
        stage("exact", lambda lab, case: {}, seconds=3600.0),
        stage("ceilings", lambda lab, case: {"matmul_tflop_per_s": 1.0, "copy_gb_per_s": 2.0}),
    ]
    run_stages(stages, lab, records, Clock(1.0))
    wanted = {"build": FAILED, "attention": SKIPPED, "load": WRONG, "memory": FAILED, "exact": SKIPPED}
    assert states(records) == wanted | {"ceilings": DONE}
    content = json.loads((tmp_path / "out" / "gpu.json").read_text())
    reasons = {record["stage"]: record["reason"] for record in content["records"]}
    assert reasons["build"] == "RuntimeError: CUDA error: it broke" and "needs about 3600" in reasons["exact"]
    page = (tmp_path / "out" / "gpu.md").read_text()
    assert "build: failed: RuntimeError: CUDA error: it broke" in page and "| 1.0 | 2.0 |" in page
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["gpu.json", "gpu.md"]


def test_the_reason_names_what_was_raised_first(lab: Lab, open_records: Any) -> None:
    def run(lab: Lab, case: Case) -> Figures:
        try:
            raise RuntimeError("the event was captured")
        finally:
            {}["capture_end"]

    records = open_records()
    run_stages([stage("cuda_graph", run)], lab, records, Clock(1.0))
    reason = "KeyError: 'capture_end' (first: RuntimeError: the event was captured)"
    assert [record.reason for record in records] == [reason]


def test_only_stages_that_check_something_fail_the_run(lab: Lab, open_records: Any) -> None:
    records = open_records()
    failing = [stage("memory", raising(ValueError("no"))), stage("load", raising(ValueError("no")), checks=True)]
    run_stages(failing, lab, records, Clock(1.0))
    assert passed(failing[:1], records) and not passed(failing, records)
    late = [stage("whole", raising(ValueError("no")), 3600.0, checks=True)]
    run_stages(late, lab, records, Clock(1.0))
    assert passed(late, records)


def test_an_interrupted_run_keeps_its_records_and_is_taken_up(lab: Lab, open_records: Any) -> None:
    calls: list[str] = []

    def counted(name: str) -> Callable[[Lab, Case], Figures]:
        return lambda lab, case: calls.append(name) or {"n": len(calls)}

    first, last = stage("build", counted("build")), stage("memory", counted("memory"))
    broken = [first, stage("profile", raising(KeyboardInterrupt()))]
    with pytest.raises(KeyboardInterrupt):
        run_stages(broken, lab, open_records(), Clock(1.0))
    records = open_records(resume=True)
    assert states(records) == {"build": DONE}
    run_stages([first, last], lab, records, Clock(1.0))
    assert calls == ["build", "memory"] and states(records) == {"build": DONE, "memory": DONE}
    assert states(open_records(resume=False)) == {}


def test_what_failed_is_run_again(lab: Lab, open_records: Any) -> None:
    run_stages([stage("build", raising(ValueError("no")))], lab, open_records(), Clock(1.0))
    records = open_records(resume=True)
    run_stages([stage("build", lambda lab, case: {"n": 1})], lab, records, Clock(1.0))
    assert [(record.stage, record.status, record.figures) for record in records] == [("build", DONE, {"n": 1})]


def test_records_of_another_run_are_refused(open_records: Any, tmp_path: Path) -> None:
    open_records()
    with pytest.raises(CannotResume, match=r"same model, those have dtype 'float32', this run 'bfloat16'; run without"):
        open_records(resume=True, dtype="bfloat16")
    out = tmp_path / "out" / "gpu.json"
    content = json.loads(out.read_text())
    out.write_text(json.dumps(content | {"versions": content["versions"] | {"torch": "1.0"}}))
    with pytest.raises(CannotResume, match=r"same versions, those have torch '1\.0'"):
        open_records(resume=True)
    out.write_text("[]")
    with pytest.raises(CannotResume, match=r"expected the JSON file of an earlier run in gpu\.json"):
        open_records(resume=True)


def test_ceilings_of_an_earlier_run_are_used(lab: Lab, open_records: Any) -> None:
    records = open_records()
    records.add(Record("ceilings", {}, DONE, 1.0, {"matmul_tflop_per_s": 500.0, "copy_gb_per_s": 2000.0}))
    run_stages([stage("build", lambda lab, case: {"known": lab.ceilings.matmul_tflop_per_s})], lab, records, Clock(1.0))
    assert records.find("build", {}).figures == {"known": 500.0}


def test_a_case_in_a_process_of_its_own_ends_with_the_minutes(lab: Lab) -> None:
    record = run_alone(stage_named("precompile"), lab, {}, limit_s=1.0)
    assert record.status == CUT and record.took_s < 10
    assert not any("benchmarks.gpu.run" in " ".join(child.cmdline()) for child in psutil.Process().children())


@pytest.mark.slow
def test_a_process_that_dies_leaves_its_last_words(lab: Lab) -> None:
    lab.setting = replace(lab.setting, device="nowhere")
    record = run_alone(stage_named("load"), lab, {}, limit_s=100.0)
    assert record.status == FAILED and "its process ended with 1" in record.reason and "nowhere" in record.reason


def test_what_compiling_processes_leave_this_one_compiles(lab: Lab) -> None:
    asked: list[int | None] = []

    class Handle:
        def precompile(self, sizes: object, steps: int, *, batch_sizes: object, jobs: int | None) -> str:
            asked.append(jobs)
            if jobs is not None:
                raise RuntimeError("no device in that process")
            return "report"

    several: Any = Lab(replace(lab.setting, jobs=3))
    assert several.precompile(Handle(), several.sizes) == "report" and asked == [3, None]
    assert several.jobs_failed == "RuntimeError: no device in that process"


def test_a_second_process_that_would_compile_is_wrong(lab: Lab) -> None:
    with torch.no_grad(), pytest.raises(h.WrongOutput, match="no compilation in the second process"):
        served.run_load(lab, {})


def test_errors_above_the_limit_of_the_dtype_are_wrong() -> None:
    want = torch.randn(1000)
    assert compare("close", want + 1e-5, want)["relative_l2"] < 1e-4
    for far in (want + 0.01, want * float("nan")):
        with pytest.raises(h.WrongOutput):
            compare("far", far, want)
    rough = want.bfloat16()
    assert compare("rough", rough * 1.01, rough)["max_error"] < 0.1
    with pytest.raises(h.WrongOutput, match="expected"):
        compare("far", rough * 1.06, rough)


def test_stages_are_chosen_by_name_in_their_own_order() -> None:
    assert chosen(None) == STAGES and [found.name for found in chosen("steps, ceilings")] == ["ceilings", "steps"]
    assert len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize("names", ["steps,nothing", ","])
def test_an_unknown_stage_is_refused_in_one_line(
    names: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["run", "--device", "cpu", "--tiny", "--out", str(out), "--only", names])
    with pytest.raises(SystemExit) as ended:
        command.main()
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 2 and "--only: expected stages among ceilings, attention" in told and not out.exists()


@pytest.mark.slow
def test_a_dry_run_and_its_resumption(tmp_path: Path) -> None:
    out, names = (
        tmp_path / "gpu.json",
        "ceilings,attention,build,precompile,load,steps,profile,memory,float32,cuda_graph",
    )
    options = ["--device", "cpu", "--tiny", "--threads", "1", "--repeats", "3", "--out", str(out)]
    options += ["--cache", str(tmp_path / "cache"), "--only", names]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def dry_run(*more: str) -> dict[str, Any]:
        words = [sys.executable, "benchmarks/gpu/run.py", *options, *more]
        done = subprocess.run(words, cwd=h.ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr[-3000:]
        content: dict[str, Any] = json.loads(out.read_text())
        return content

    first = dry_run("--minutes", "10")
    done = [record for record in first["records"] if record["status"] == DONE]
    assert {record["stage"] for record in done} == set(names.split(",")) - {"cuda_graph"}
    assert {record["status"] for record in first["records"]} == {DONE, SKIPPED}
    figures = {record["stage"]: record["figures"] for record in done}
    assert figures["precompile"]["compiled"] == figures["precompile"]["artifacts"] == 5
    assert figures["load"]["compiles"] == 0 and figures["load"]["bindings"] == 28
    steps = [record for record in done if record["stage"] == "steps"]
    assert [record["case"]["topology"] for record in steps] == list(served.TOPOLOGIES)
    for record in steps:
        found = record["figures"]
        assert found["relative_l2"] < 1e-3 and found["max_error"] < 1e-3
        assert 0 < found["tflop"] < found["unpatched_tflop"] and found["compiled_ms"] > 0 and found["eager_gb"] > 0
    assert figures["float32"]["compiled"] == 0 and figures["memory"]["host_graphs_mb"] > 0
    shares = [record["figures"]["shares"] for record in done if record["stage"] == "profile"]
    assert len(shares) == 2 and all(0.9 < sum(share.values()) < 1.1 for share in shares)
    page = out.with_suffix(".md").read_text()
    assert "| 128x128 | windowed+pooled |" in page and str(tmp_path) not in page + out.read_text()

    again = dry_run("--minutes", "10", "--resume")
    assert len(again["runs"]) == 2
    assert [record for record in again["records"] if record["status"] == DONE] == done
