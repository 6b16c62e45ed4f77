"""A quarter of an hour on a GPU machine: what becomes of records, processes and luggage, and a dry run on a CPU."""

from __future__ import annotations

import json
import lzma
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import accel_hidiff as ah
from accel_hidiff.models import load_skeleton
from accel_hidiff.packages.archive import read_archive
from benchmarks import harness as h
from benchmarks.gpu import carried, journal, quarter_hour, supervisor, worker
from benchmarks.gpu.carried import BadLuggage, Package, pack, packages_of, unpack
from benchmarks.gpu.journal import BEGUN, DONE, FACTS, FAILED, LATE, SKIPPED, WRONG, Journal, Line, ends
from benchmarks.gpu.lab import Lab, NotHere, fill, packages_in, slots_of
from benchmarks.gpu.model import ARCHITECTURE, compare, make_unet, make_vae, pipeline_of
from benchmarks.gpu.native import launches
from benchmarks.gpu.page import render
from benchmarks.gpu.programme import BY_NAME, STAGES, Stage, Task, chosen, programme
from benchmarks.gpu.quarter_hour import main
from benchmarks.gpu.setting import FULL, TINY, TOPOLOGIES, Setting, Variant
from benchmarks.gpu.supervisor import Supervisor
from tests.conftest import ARTIFACTS

HEAD = Variant("head", "float32", "channels_last")


def setting(*variants: Variant, **changes: Any) -> Setting:
    return Setting.from_json({**TINY.to_json(), "variants": [vars(one) for one in variants or (HEAD,)], **changes})


@pytest.fixture
def book(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "run.jsonl", time.time())


def outcomes(book: Journal) -> dict[str, tuple[str, str]]:
    return {line.stage: (line.event, line.reason) for line in ends(journal.read(book.path))}


# Records


def test_a_line_is_whole_or_not_read(book: Journal) -> None:
    book.write(BEGUN, "steps", {"size": "128x128"})
    book.write(DONE, "steps", {"size": "128x128"}, took_s=1.5, figures={"ms": 3.0})
    whole = journal.read(book.path)
    with book.path.open("a") as file:
        file.write('{"at_s": 3.0, "event": "beg')  # a process that was killed while it wrote
    assert journal.read(book.path) == whole and [line.event for line in whole] == [BEGUN, DONE]
    assert whole[1].figures == {"ms": 3.0} and whole[1].is_of("steps", {"size": "128x128"})
    assert journal.read(book.path.with_name("none")) == []


def test_what_is_no_number_is_refused_and_not_half_written(book: Journal) -> None:
    with pytest.raises(ValueError, match="JSON"):
        book.write(DONE, "steps", figures={"ms": float("nan")})
    assert journal.read(book.path) == []


def test_of_a_case_that_ran_again_the_last_end_counts(book: Journal) -> None:
    for event, case in ((FAILED, "a"), (DONE, "b"), (DONE, "a")):
        book.write(BEGUN, "steps", {"size": case})
        book.write(event, "steps", {"size": case})
    found = [(line.event, line.case["size"]) for line in ends(journal.read(book.path))]
    assert found == [(DONE, "b"), (DONE, "a")]


# What runs


def test_every_stage_is_measured_and_comes_up() -> None:
    assert list(worker.MEASURES) == [stage.name for stage in STAGES]
    tasks = programme(
        setting(HEAD, Variant("idea", "float32", "channels_last"), Variant("half", "float16", "contiguous"))
    )
    assert {task.stage.name for task in tasks} == set(BY_NAME)
    assert len({(task.stage.name, json.dumps(task.case)) for task in tasks}) == len(tasks)
    processes = [task.stage.process for task in tasks if not task.stage.beside]
    changes = [name for number, name in enumerate(processes) if number == 0 or processes[number - 1] != name]
    assert changes == ["steps", "second", "rivals"]  # each starts torch once
    steps = [task.case for task in tasks if task.stage.name == "steps"]
    assert steps[0] == {"dtype": "float32", "size": "128x128", "topology": TOPOLOGIES[0]}
    assert [case["dtype"] for case in steps] == ["float32"] * 6 + ["float16"]


def test_another_checkouts_variants_run_over_its_sources() -> None:
    idea = Variant("idea", "float32", "channels_last", "idea")
    ours = setting(HEAD, idea)
    assert ours.trees == ("idea",) and ours.of_tree("").variants == (HEAD,) and ours.of_tree("idea").variants == (idea,)
    tasks = programme(ours)
    processes = list(dict.fromkeys(task.process for task in tasks))
    assert processes == ["steps", "idea", "second", "native", "rivals"]
    theirs = [task for task in tasks if task.tree == "idea"]
    assert {task.stage.name for task in theirs} == {"ceilings", "load", "steps", "truth", "profile", "requests"}
    assert all(task.case["tree"] == "idea" for task in theirs)
    assert all("idea" not in task.case.values() for task in tasks if not task.tree)


def test_a_full_run_fits_its_minutes() -> None:
    """Were every case as slow as it may be, no single one would take a quarter of what there is."""
    tasks = programme(Setting.from_json({**FULL.to_json(), "variants": [vars(HEAD)]}))
    assert max(task.limit_s(False) for task in tasks if not task.stage.beside) <= 120


def test_an_unknown_stage_is_refused() -> None:
    assert [task.stage.name for task in chosen(setting(), "build, ceilings")] == ["ceilings", "build"]
    for names in ("steps,nothing", ","):
        with pytest.raises(ValueError, match="--only: expected stages among ceilings, build"):
            chosen(setting(), names)


# A case, in the process that runs it


def outcome_of(
    book: Journal, monkeypatch: pytest.MonkeyPatch, measure: Callable[[Lab, Mapping[str, str], dict[str, Any]], None]
) -> Line:
    monkeypatch.setitem(worker.MEASURES, "build", measure)  # type: ignore[arg-type]
    worker.run(Task(BY_NAME["build"], {}), Lab(setting()), book, 1.2)
    begun, ended = journal.read(book.path)
    assert begun.event == BEGUN
    return ended


def test_a_case_that_fails_keeps_the_figures_it_came_to(book: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(lab: Lab, case: Any, figures: dict[str, Any]) -> None:
        figures["ms"] = 1.0
        try:
            raise RuntimeError("the event was captured\nand more")
        finally:
            {}["capture_end"]

    line = outcome_of(book, monkeypatch, measure)
    assert line.event == FAILED and line.figures == {"ms": 1.0}
    assert line.reason == "KeyError: 'capture_end' (first: RuntimeError: the event was captured)"


@pytest.mark.parametrize(
    ("problem", "event"), [(h.WrongOutput("one compilation"), WRONG), (NotHere("no such kernel"), SKIPPED)]
)
def test_how_a_case_ends(problem: Exception, event: str, book: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(lab: Lab, case: Any, figures: dict[str, Any]) -> None:
        raise problem

    line = outcome_of(book, monkeypatch, measure)
    assert (line.event, line.reason) == (event, str(problem))


def test_a_case_that_is_late_ends_whatever_it_catches(book: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(lab: Lab, case: Any, figures: dict[str, Any]) -> None:
        figures["turns"] = 0
        while True:
            try:
                time.sleep(0.05)
                figures["turns"] += 1
            except Exception:
                continue

    line = outcome_of(book, monkeypatch, measure)
    assert line.event == LATE and line.reason == "over its limit of 1 s" and line.figures["turns"] > 5


def test_figures_that_are_no_numbers_fail_the_case(book: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    line = outcome_of(book, monkeypatch, lambda lab, case, figures: figures.update(ms=float("inf"), ways=[{"s": 1.0}]))
    assert (line.event, line.reason) == (FAILED, "a figure is no finite number")
    assert line.figures == {"ms": "inf", "ways": [{"s": 1.0}]}


def test_a_case_that_needs_a_gpu_is_skipped_without_one(book: Journal) -> None:
    worker.run(Task(BY_NAME["graphs"], {}), Lab(setting()), book, 10.0)
    assert outcomes(book) == {"graphs": (SKIPPED, "it needs a GPU")}


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


# Processes

_WORKER = """
    import json, os, signal, sys, time
    from benchmarks.gpu.journal import Journal
    work = json.loads(sys.argv[1])
    book = Journal(work["journal"], work["began"])
    for name, case in work["tasks"]:
        if name == "silent":
            time.sleep(60)
        book.write("begun", name, case)
        if name == "stuck":
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGALRM])
            time.sleep(60)
        if name == "dies":
            print("Segmentation fault", file=sys.stderr)
            os._exit(11)
        if name == "slow":
            time.sleep(1.5)
        book.write("done", name, case, figures={"process": os.getpid(), "nice": os.nice(work["niceness"])})
"""


_TELLS_WHERE = """
    import json, os, sys
    work = json.loads(sys.argv[1])
    names = [variant["name"] for variant in work["setting"]["variants"]]
    figures = {"folder": os.getcwd(), "path": os.environ["PYTHONPATH"], "variants": names}
    [[name, case]] = work["tasks"]
    with open(work["journal"], "a") as file:
        print(json.dumps({"at_s": 0.0, "event": "done", "stage": name, "case": case, "figures": figures}), file=file)
"""


@pytest.fixture
def supervise(book: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Line]]:
    """Runs stages of these names by processes that need no torch; the end of each."""
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(_WORKER))
    monkeypatch.setattr(supervisor, "GRACE_S", 0.3)
    monkeypatch.setattr(supervisor, "_LEAST_S", 0.2)

    def run(*stages: Stage, seconds: float = 60.0) -> dict[str, Line]:
        def command(work: str) -> list[str]:
            return [sys.executable, str(program), work]

        Supervisor(setting(), book, time.time() + seconds, command=command).run([Task(stage, {}) for stage in stages])
        return {line.stage: line for line in ends(journal.read(book.path))}

    return run


def stage(name: str, limit_s: float = 30.0, **more: Any) -> Stage:
    return Stage(name, "", limit_s, limit_s, **more)


def test_a_process_that_hangs_is_killed_and_another_takes_what_is_left(
    supervise: Callable[..., dict[str, Line]],
) -> None:
    found = supervise(stage("one"), stage("stuck", 1.0), stage("two"), stage("three"))
    assert found["stuck"].event == LATE
    assert found["stuck"].reason == "its process was killed: it did not answer 0 s after its limit of 1 s"
    processes = {name: found[name].figures["process"] for name in ("one", "two", "three")}
    assert processes["two"] == processes["three"] != processes["one"]


def test_a_process_that_dies_leaves_its_last_words(supervise: Callable[..., dict[str, Line]]) -> None:
    found = supervise(stage("one"), stage("dies"), stage("two"))
    assert (found["dies"].event, found["dies"].reason) == (FAILED, "its process ended with 11: Segmentation fault")
    assert found["one"].event == found["two"].event == DONE


def test_a_process_that_begins_nothing_is_killed(
    supervise: Callable[..., dict[str, Line]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "START_S", 0.8)
    found = supervise(stage("silent"), stage("two"))
    assert found["silent"].event == LATE and "began nothing for 1 s" in found["silent"].reason
    assert found["two"].event == DONE


def test_when_the_minutes_are_over_nothing_runs(supervise: Callable[..., dict[str, Line]]) -> None:
    began = time.time()
    found = supervise(stage("one"), stage("stuck"), stage("two"), seconds=1.5)
    assert time.time() - began < 10
    assert found["stuck"].reason == "its process was killed: the minutes of the run were over"
    assert (found["two"].event, found["two"].reason) == (SKIPPED, "no time was left")


def test_cases_of_another_process_get_one(supervise: Callable[..., dict[str, Line]]) -> None:
    found = supervise(stage("one"), stage("two", process="second"), stage("three", process="second"))
    pids = {name: line.figures["process"] for name, line in found.items()}
    assert pids["one"] != pids["two"] == pids["three"]


def test_a_case_of_other_sources_runs_in_their_folder(book: Journal, tmp_path: Path) -> None:
    (tmp_path / "trees" / "idea").mkdir(parents=True)
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(_TELLS_WHERE))
    ours = setting(HEAD, Variant("idea", "float32", "channels_last", "idea"), carried=str(tmp_path))

    def command(work: str) -> list[str]:
        return [sys.executable, str(program), work]

    tasks = [Task(stage("own"), {}), Task(stage("other"), {"tree": "idea"}, "idea")]
    Supervisor(ours, book, time.time() + 60, [tmp_path / "site"], command).run(tasks)
    own, other = ends(journal.read(book.path))
    sources = str(tmp_path / "trees" / "idea")
    assert other.figures["folder"] == sources and other.figures["variants"] == ["idea"]
    assert other.figures["path"].split(":")[:2] == [str(tmp_path / "site"), sources]
    assert own.figures["folder"] == str(h.ROOT) and own.figures["variants"] == ["head"]


def test_what_runs_beside_has_low_priority_and_is_waited_for(supervise: Callable[..., dict[str, Line]]) -> None:
    found = supervise(
        stage("one"), stage("two", process="second"), stage("slow", process="native", beside="second"),
        stage("three", process="rivals"),
    )  # fmt: skip
    assert {line.event for line in found.values()} == {DONE} and len(found) == 4
    assert found["slow"].figures["nice"] > found["one"].figures["nice"]
    assert found["slow"].at_s > found["three"].at_s  # it was not waited for before the others


# Luggage


def repository(folder: Path, size: int) -> Path:
    folder.mkdir()
    (folder / "file").write_bytes(b"x" * size)
    for words in (["init", "-q"], ["add", "file"]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    return folder


def package(folder: Path, slot: str, content: bytes = b"code", key: str = "k", notes: Any = None) -> Package:
    place = folder / f"{slot}.pt2"
    place.write_bytes(content)
    return Package(slot, key, {"package.pt2": place}, notes or {"serves": {}})


def test_what_is_packed_is_unpacked(tmp_path: Path) -> None:
    root, wheel = repository(tmp_path / "root", 1000), tmp_path / "some-1.0-py3-none-any.whl"
    subprocess.run([sys.executable, "-m", "zipfile", "-c", str(wheel), str(root / "file")], check=True)
    idea = Variant("idea", "bfloat16", "contiguous")
    packed = {HEAD: [package(tmp_path, "a"), package(tmp_path, "b")], idea: [package(tmp_path, "c", b"other", "key c")]}
    size = pack(tmp_path / "luggage", packed, [wheel], root)
    assert 1000 < size < 10_000
    assert unpack(tmp_path / "luggage", tmp_path / "there") == (HEAD, idea)
    assert set(packages_of(tmp_path / "there", "head")) == {"a", "b"}
    found = packages_of(tmp_path / "there", "idea")["c"]
    assert found.files["package.pt2"].read_bytes() == b"other"
    assert (found.key, found.notes) == ("key c", {"serves": {}})
    assert (tmp_path / "there" / "site" / "file").stat().st_size == 1000


def test_sources_of_another_checkout_come_along(tmp_path: Path) -> None:
    root = repository(tmp_path / "root", 10)
    for name in ("accel_hidiff/module.py", "accel_hidiff/demo/trained_model/weights", "benchmarks/results/old.json"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)  # not committed: as it is is how it was compiled
    variant = Variant("idea", "float32", "channels_last", "idea")
    pack(tmp_path / "luggage", {HEAD: [], variant: []}, [], root, {"idea": root})
    assert unpack(tmp_path / "luggage", tmp_path / "there") == (HEAD, variant)
    there = tmp_path / "there" / "trees" / "idea"
    assert [str(path.relative_to(there)) for path in there.rglob("*") if path.is_file()] == ["accel_hidiff/module.py"]


def test_too_much_is_refused_and_nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carried, "LIMIT", 2**20)
    root = repository(tmp_path / "root", 2**20 - 100)
    with pytest.raises(
        BadLuggage, match=r"expected at most 1 MiB, got 1\.0 of the repository and 0\.0 beside it; take"
    ):
        pack(tmp_path / "luggage", {HEAD: [package(tmp_path, "a")]}, [], root)
    assert not (tmp_path / "luggage").exists()


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(BadLuggage, match="--pack: expected a new or an empty folder"):
        pack(repository(tmp_path / "root", 10), {HEAD: []}, [], tmp_path)
    assert (tmp_path / "root" / "file").exists()
    with pytest.raises(BadLuggage, match="--carried: expected a folder that --pack wrote"):
        unpack(tmp_path / "root", tmp_path / "there")


@pytest.fixture
def handle(tmp_path: Path) -> ah.Handle:
    pipe = pipeline_of(*(make(True, torch.device("cpu"), torch.float32) for make in (make_unet, make_vae)))
    return ah.accelerate(pipe, hidiffusion=ah.HiDiffusionConfig(), cache=tmp_path / "cache", on_miss="error")


def test_what_a_cache_lacks_is_named(handle: ah.Handle) -> None:
    assert handle.cache is not None
    packages, lacking = packages_in(handle.cache, handle, [(128, 128)], None)
    assert not packages and "vae.decoder" in lacking and "unet.down_blocks.0.resnets.0" in lacking


def test_packages_of_other_sources_serve_the_graphs_they_are_for(handle: ah.Handle, tmp_path: Path) -> None:
    """Their keys differ, their slots do not; what is for no graph of these sizes stays out."""
    pixels = [(128, 128), (128, 192)]
    slots = slots_of(handle, pixels)
    first, *others = slots
    notes = {"serves": slots[first].bucket.to_json()}
    carry = {name: package(tmp_path, name, key="of other sources", notes=notes) for name in (first, "unknown")}
    assert fill(handle, pixels, carry) == {"packages": 1, "same_keys": 0}
    assert handle.cache is not None and len(slots) == ARTIFACTS
    packages, lacking = packages_in(handle.cache, handle, pixels, None)
    assert [found.slot for found in packages] == [first] and len(lacking) == len(others)
    assert packages[0].files["package.pt2"].read_bytes() == b"code"
    again = {first: package(tmp_path, first, key=packages[0].key, notes=notes)}
    assert fill(handle, pixels, again) == {"packages": 1, "same_keys": 1}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_models_that_are_measured_are_those_that_are_packed(dtype: str, tmp_path: Path) -> None:
    """In full size, without weights: the pipeline of a run asks for the graphs that the architecture's cache has."""
    found = []
    skeleton, device = load_skeleton(ARCHITECTURE, dtype, "cpu")
    measured = pipeline_of(
        *(make(False, torch.device("meta"), getattr(torch, dtype)) for make in (make_unet, make_vae))
    )
    for pipe, memory_format in ((skeleton, "channels_last"), (measured, None)):
        settings: dict[str, Any] = {"hidiffusion": ah.HiDiffusionConfig(), "memory_format": memory_format}
        handle = ah.accelerate(pipe, cache=tmp_path / "cache", **settings)
        handle.meant_for = device
        found.append(set(slots_of(handle, [(2048, 2048), (1536, 2688)])))
    assert found[0] == found[1] and len(found[0]) == 24


def test_a_variant_whose_package_was_not_carried_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "packages" / "head").mkdir(parents=True)
    lab = Lab(setting(carried=str(tmp_path), caches=str(tmp_path / "caches")))
    with pytest.raises(h.WrongOutput, match="head: expected every package to be carried, "):
        lab.served("head")
    assert lab.served_of("float32") == {}


def test_configurations_are_read_off_a_package(tmp_path: Path) -> None:
    package = tmp_path / "package.pt2"
    package.write_bytes(lzma.decompress((h.ROOT / "tests" / "data" / "packages" / "resnet.pt2.xz").read_bytes()))
    found = launches(read_archive(package).wrapper)
    assert len(found) == 9 and all(" warps, " in configuration for configuration in found.values())
    assert found["triton_red_fused_native_group_norm_0"] == "xnumel, 16 warps, 192 B"


# The page and the command


def test_the_page_comes_from_the_records_alone(book: Journal) -> None:
    assert "No process began" in render([])
    facts = {
        "model": "SDXL's layout", "machine": {"cpu": "a CPU", "gpu": "NVIDIA H200", "cores": 16}, "commit": "abc",
        "versions": {"torch": "2.11.0"}, "variants": [vars(HEAD)], "limits": {"float32": [1e-3, 1e-3]},
    }  # fmt: skip
    book.write(FACTS, figures={"command": "python -m it", "date": "2026-11-27"})
    book.write(FACTS, figures=facts)
    case = {"dtype": "float32", "size": "1024x1024", "topology": "windowed+pooled"}
    ways = {"eager": {"ms": 72.0}, "head": {"ms": 24.0, "over_eager_ratio": 0.333, "relative_l2": 0.01}}
    book.write(DONE, "steps", case, figures={"ways": ways, "floor_ms": 9.0})
    book.write(DONE, "freezes", {"size": "1024x1024"}, figures={"eager": {"longest_ms": 1.0}})
    book.write(LATE, "profile", {"run": "head"}, reason="over its limit of 40 s")
    for kernel in ("flash", "cudnn"):
        book.write(SKIPPED, "attention", {"kernel": kernel}, reason="no time was left")
    page = render(journal.read(book.path))
    assert "# SDXL's layout: NVIDIA H200" in page and "`python -m it`, begun 2026-11-27, commit abc." in page
    assert "| | float32 1024x1024 pooled |" in page.replace("|  |", "| |") and "| head | 24.0 |" in page
    assert "| float32 | 1024x1024 | windowed+pooled | head | 24.0 | 0.333 | 0.01 | 9.0 |" in page
    assert "head: **late**: over its limit of 40 s" in page and "Skipped (no time was left): flash, cudnn" in page


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "expected one of --pack, --carried, --dry-run and --render"),
        (["--pack", "luggage"], "expected a --variant NAME=CACHE of this checkout with it"),
        (["--pack", "luggage", "--variant", "a b=c"], "--variant: expected NAME=CACHE, a name of letters"),
        (["--carried", "nowhere", "--out", "out.jsonl"], "expected a folder that --pack wrote"),
    ],
)
def test_a_wrong_command_is_told_in_one_line(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2 and told in capsys.readouterr().err.strip().splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_what_watches_over_the_processes_needs_no_torch() -> None:
    code = "import sys, benchmarks.gpu.quarter_hour; print(sorted({'torch', 'diffusers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=h.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_without_a_gpu_nothing_is_begun(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(tmp_path / "luggage", {HEAD: [package(tmp_path, "a")]}, [], repository(tmp_path / "root", 10))
    monkeypatch.setattr(quarter_hour, "_GPU_FILES", (str(tmp_path / "none"),))
    with pytest.raises(SystemExit):
        main(["--carried", str(tmp_path / "luggage"), "--out", str(tmp_path / "out.jsonl")])
    assert "--carried: expected a GPU on this machine, found none; --dry-run" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_a_cache_that_is_not_there_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["--pack", str(tmp_path / "luggage"), "--variant", f"head={tmp_path / 'none'}"])
    assert "--variant head: expected a compile cache, found no folder" in capsys.readouterr().err
    assert not (tmp_path / "luggage").exists()


@pytest.mark.slow
@pytest.mark.skipif(not (h.ROOT / ".git").exists(), reason="not a checkout")
def test_a_dry_run(tmp_path: Path) -> None:
    out = tmp_path / "dry.jsonl"
    command = [sys.executable, "benchmarks/gpu/quarter_hour.py", "--dry-run", "--out", str(out)]
    done = subprocess.run(command, cwd=h.ROOT, capture_output=True, text=True, check=False, timeout=560)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    lines = list(ends(journal.read(out)))
    found = {line.stage: line.figures for line in lines if line.event == DONE}
    skipped = {line.reason for line in lines if line.event == SKIPPED}
    assert set(found) == set(BY_NAME) - {"graphs", "memory"} and len(skipped) == 3
    assert found["load"]["packages"] == found["load"]["same_keys"] == ARTIFACTS
    assert found["load"]["warm_calls"] > 20
    steps = [(line.figures, line.case.get("tree", "tiny")) for line in lines if line.stage == "steps"]
    assert [name for _, name in steps] == ["tiny"] * 6 + ["again"] * 6
    for figures, name in steps:
        ours = figures["ways"][name]
        assert ours["relative_l2"] < 1e-3 and ours["max_error"] < 1e-3 and ours["ms"] > 0 and figures["tflop"] > 0
    truths = [line.figures for line in lines if line.stage == "truth"]
    assert truths[0]["tiny"]["relative_l2"] < 1e-3 and truths[1]["again"]["relative_l2"] < 1e-3
    assert found["requests"]["again"]["relative_l2"] < 1e-3  # the last request is the other checkout's
    assert found["second"]["compiles"] == 0 and len(found["second"]["first_call_s"]) == 6
    assert found["native"]["max_error"] < 1e-5 and found["native"]["compile_s"] > 1
    page = out.with_suffix(".md").read_text()
    assert "| tiny |" in page and str(tmp_path) not in page + out.read_text()
