"""Tables and plots of `benchmarks.compare`, on a small content that is written by hand."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest

from accel_hidiff.benching.names import Contender
from benchmarks.compare import models
from benchmarks.compare.anchors import ANCHORS, Anchor
from benchmarks.compare.content import Content, in_order
from benchmarks.compare.plots import DRAWERS, plot
from benchmarks.compare.scenarios import SETS, RequestScenario, Scenario
from benchmarks.compare.tables import markdown
from benchmarks.compare.text import number, reason, table

VERSIONS = {"python": "3.11", "torch": "2.13.0"}
SHORT, LONG = "windowed+dilated", "windowed"  # 10 and 20 of 30 steps
MS = {  # of a call: in the one, and in the other
    "eager": (20.0, 40.0),
    "stock": (10.0, 80.0),
    "torch-compile": (16.0, 30.0),
    "repeated-blocks": (18.0, 36.0),
    "aot": (10.0, 30.0),
    "aot/exact": (8.0, 24.0),
    "aot/whole/exact": (5.0, 20.0),
}


def row(backend: str, topology: str, ms: float) -> dict[str, Any]:
    """Of a report; a fifth more or less in the other turns."""
    short = topology == SHORT
    eager = MS["eager"][0 if short else 1]
    compiled = 0 if backend in ("eager", "stock") else 4 if short else 1
    return {
        "backend": backend,
        "size": "64x64",
        "topology": topology,
        "steps": [0, 10] if short else [10, 30],
        "state": "timed",
        "reason": None,
        "setup_cpu_s": 7.0 if short else 2.0,
        "compiled": compiled,
        "loaded": 0,
        "ms": ms,
        "vs_eager": ms / eager,
        "vs_eager_range": [0.8 * ms / eager, 1.2 * ms / eager],
        "compiled_while_timed": 0,
        "dynamo_graphs_while_timed": 0,
    }


def steps(device: str = "cpu", **changes: Any) -> dict[str, Any]:
    """A record; changes are of a contender's row of the long topology."""
    rows = []
    for place, topology in enumerate((SHORT, LONG)):
        for name, ms in MS.items():
            change = changes.get(name.replace("-", "_"), {}) if topology == LONG else {}
            rows.append(row(name, topology, ms[place]) | dict(change))
    backends: list[dict[str, Any]] = [
        {
            "backend": name,
            "usable": True,
            "reason": None,
            "versions": VERSIONS | ({"torch": "2.4.0"} if name == "repeated-blocks" else {}),
            "opened": {"weights_mb": 1.5, "resident_mb": 400.0},
            "ready": {"weights_mb": 1.5, "resident_mb": 410.0 if name in ("eager", "stock") else 510.0}
            | ({"gpu_mb": 700.0, "gpu_peak_mb": 900.0} if device != "cpu" else {}),
        }
        for name in MS
    ]
    backends.append({"backend": "tensorrt", "usable": False, "reason": "torch_tensorrt is not installed"})
    report = {
        "settings": {"dtype": "float32", "device": device},
        "machine": {"torch_threads": 1},
        "versions": VERSIONS,
        "backends": backends,
        "rows": rows,
    }
    return {
        "kind": "steps",
        "name": "square",
        "model": "sdxl-tiny",
        "sizes": ["64x64"],
        "contenders": [*(name for name in MS if name != "eager"), "tensorrt"],
        "batch": 2,
        "repeats": 3,
        "steps": 30,
        "report": report,
    }


def insight() -> dict[str, Any]:
    """A record: 2 and 4 ms of arithmetic, 1 ms of traffic."""
    shares = {"convolution": 0.6, "matmul": 0.1, "idle": 0.3}
    takers = [
        {"name": f"kernel_{place}", "category": "convolution", "calls": 2, "ms": 1.0, "share": 0.1}
        for place in range(7)
    ]
    cases = [{"size": "64x64", "topology": topology} for topology in (SHORT, LONG)]
    return {
        "kind": "insight",
        "scenario": "square",
        "ceilings": {"matmul_tflop_per_s": 1.0, "copy_gb_per_s": 50.0},
        "work": [case | {"tflop": tflop, "eager_gb": 0.05} for case, tflop in zip(cases, (0.002, 0.004), strict=True)],
        "profiles": [
            {"contender": name, **case, "ms": 9.0, "shares": shares, "top": takers}
            for name in ("eager", "aot")
            for case in cases
        ],
    }


def request(size: str, stalls: Mapping[int, float] | None = None, compiles: int = 0, **counts: Any) -> dict[str, Any]:
    """Of a process: 30 steps of 10 ms, but for those that stall."""
    told = {
        "size": size,
        "step_ms": [(stalls or {}).get(step, 10.0) for step in range(30)],
        "frames_by_step": [0] * 30,
        "compiles_by_step": [compiles, *[0] * 29],
        "graphs": 0,
        "frames": 0,
        "recompilations": 0,
        "graph_breaks": 0,
        "seconds": 0.0,
        "gave_up": 0,
        "handle": {"compiles": compiles, "loads": 0},
    }
    return told | counts


def process(contender: str, number: int, first_image_s: float, *requests: Mapping[str, Any]) -> dict[str, Any]:
    """Of a record of requests."""
    return {
        "contender": contender,
        "process": number,
        "ready_s": 2.0,
        "first_image_s": first_image_s,
        "processor_s": 3.0,
        "resident_mb": 500.0,
        "requests": list(requests),
    }


def requests(name: str, traced_only: bool, *processes: Mapping[str, Any]) -> dict[str, Any]:
    """A record of two sizes."""
    counted: dict[str, int] = {}
    for told in processes:
        counted[told["contender"]] = max(told["process"], counted.get(told["contender"], 0))
    return {
        "kind": "requests",
        "name": name,
        "model": "sdxl-tiny",
        "sizes": ["64x64", "96x64"],
        "contenders": [{"name": name, "processes": processes} for name, processes in counted.items()],
        "traced_only": traced_only,
        "steps": 30,
        "processes": list(processes),
    }


def two_sizes(traced_only: bool = False, name: str = "two-sizes") -> dict[str, Any]:
    """Eager, a peer that compiles at steps 0 and 10 of each size, and `aot`, which compiles at the first size alone."""
    frames = [int(step in (0, 10)) for step in range(30)]
    counts = {"graphs": 3, "frames": 2, "recompilations": 1, "graph_breaks": 5, "gave_up": 1, "seconds": 6.0}
    peer = [
        request(size, {0: 4030.0, 10: 2030.0}, compiles=3, frames_by_step=frames, **counts)
        for size in ("64x64", "96x64")
    ]
    return requests(
        name,
        traced_only,
        process("eager", 1, 4.0, request("64x64"), request("96x64")),
        process("torch-compile", 1, 12.0, *peer),
        process("aot", 1, 10.0, request("64x64", {0: 9030.0}, compiles=6), request("96x64", {0: 50.0})),
        process("aot", 2, 3.0, request("64x64"), request("96x64")),
    )


def content(*records: Mapping[str, Any]) -> dict[str, Any]:
    """A file."""
    return {
        "command": "python -m benchmarks.compare --out x.json",
        "date": "2026-01-01",
        "smoke_run": False,
        "commit": "abc",
        "machine": {"cpu": "A CPU", "cores": 2},
        "versions": VERSIONS,
        "records": list(records),
        "load_average": 0.5,
    }


def section(text: str, title: str) -> str:
    """From a heading of the second level to the next one."""
    found = [part for part in text.split("\n## ") if part.startswith(title)]
    assert len(found) == 1, (title, len(found))
    return found[0]


def cells(text: str, *start: str) -> list[list[str]]:
    """Of all rows of tables that begin with these cells: those that follow."""
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:1] == "|"]
    return [row[len(start) :] for row in rows if tuple(row[: len(start)]) == start]


# Tables


def test_steps_on_a_cpu_are_ratios_with_their_ranges() -> None:
    text = section(markdown(content(steps()), []), "Single steps")
    assert cells(text, "`aot`") == [["0.50 [0.40, 0.60]", "0.75 [0.60, 0.90]", "0.70"]]  # (100 + 600) / (200 + 800)
    assert cells(text, "`stock` (another function)") == [["0.50 [0.40, 0.60]", "2.00 [1.60, 2.40]", "1.70"]]
    assert cells(text, "contender") == [
        [f"{SHORT}, ratio", f"{LONG}, ratio", "request of 30 steps, ratio"],
    ]
    assert "No figures: `tensorrt` (torch_tensorrt is not installed)." in text


def test_steps_on_a_gpu_have_milliseconds_too() -> None:
    text = section(markdown(content(steps("cuda:0")), []), "Single steps")
    assert cells(text, "`aot`") == [["10.0", "0.50 [0.40, 0.60]", "30.0", "0.75 [0.60, 0.90]", "700", "0.70"]]


def test_ratios_without_a_range_stand_alone() -> None:
    text = section(markdown(content(steps(aot={"vs_eager_range": None})), []), "Single steps")
    assert cells(text, "`aot`")[0][1] == "0.75"


def test_a_topology_that_failed_has_its_reason_below_and_no_request() -> None:
    failed = {"state": "failed", "reason": "OSError: /home/someone/cache/x.so: bad", "ms": None, "vs_eager": None}
    text = section(markdown(content(steps(aot=failed)), []), "Single steps")
    assert cells(text, "`aot`") == [["0.50 [0.40, 0.60]", "failed", "-"]]
    assert f"- `aot`, {LONG}: failed: OSError: x.so: bad" in text


@pytest.mark.parametrize("counter", ["compiled_while_timed", "dynamo_graphs_while_timed"])
def test_what_compiled_while_it_was_timed_has_no_time(counter: str) -> None:
    text = section(markdown(content(steps(aot={counter: 2})), []), "Single steps")
    assert cells(text, "`aot`") == [["0.50 [0.40, 0.60]", "no time", "-"]]
    assert f"`aot`, {LONG}: 2 graphs were compiled while it was timed" in text


def test_rows_that_stand_for_fewer_steps_say_so() -> None:
    shorter: dict[str, Any] = {name.replace("-", "_"): {"steps": [10, 25]} for name in MS}
    text = section(markdown(content(steps(**shorter)), []), "Single steps")
    assert "A request has 30 steps; the rows stand for 25 of them." in text


def test_the_floor_on_a_cpu_is_told_in_shares_alone() -> None:
    text = section(markdown(content(steps(), insight()), []), "Distance")
    assert cells(text, "64x64", SHORT) == [["0.00200", "0.0500", "10.0 %", "20.0 %", "5.0 %"]]  # 2 of 20 ms, and of 10
    assert cells(text, "64x64", LONG) == [["0.00400", "0.0500", "10.0 %", "13.3 %", "2.5 %"]]
    assert "matmul 1.00 TFLOP/s, copy 50.0 GB/s" in text


def test_the_floor_on_a_gpu_has_milliseconds() -> None:
    text = section(markdown(content(steps("cuda:0"), insight()), []), "Distance")
    assert cells(text, "64x64", SHORT) == [["0.00200", "2.00", "0.0500", "1.00", "10.0 %", "20.0 %", "5.0 %"]]


def test_the_floor_without_times_has_no_shares() -> None:
    text = section(markdown(content(insight()), []), "Distance")
    assert cells(text, "64x64", SHORT) == [["0.00200", "0.0500", "-", "-", "-"]]
    assert "There is no record of this scenario's times" in text


def test_cold_start() -> None:
    text = section(markdown(content(two_sizes()), []), "Cold start")
    assert cells(text, "`torch-compile`", "1")[0] == ["2.00", "12.0", "3.00", "3.00", "500", "6", "4.03"]
    assert [row[1:3] for row in cells(text, "`aot`", "1")[:1]] == [["10.0", "2.50"]]
    assert cells(text, "`aot`", "2")[0][1:3] == ["3.00", "0.75"]


def test_a_size_that_was_not_asked_for_is_not_late() -> None:
    record = two_sizes()
    record["contenders"][1]["sizes"] = 1
    record["processes"][1]["requests"].pop()
    text = section(markdown(content(record), []), "Cold start")
    assert cells(text, "`torch-compile`", "1", "stalls") == [["6.00", "not asked"]]


def test_seconds_by_the_number_of_sizes() -> None:
    text = section(markdown(content(two_sizes(traced_only=True)), []), "Cold start")
    assert cells(text, "`torch-compile`", "1", "stalls") == [["6.00", "12.0"]]  # 4.03 + 2.03 less 2 * 0.03
    assert cells(text, "`torch-compile`", "1", "torch's records") == [["6.00", "12.0"]]
    assert cells(text, "`aot`", "1", "stalls") == [["9.00", "9.02"]]
    assert cells(text, "`aot`", "1", "torch's records") == cells(text, "`eager`", "1", "torch's records") == []
    assert "lower bounds" in text
    assert 'no record of kind "requests" in which peers generated code' in text


def test_requests_that_were_not_begun_have_no_seconds() -> None:
    record = two_sizes()
    del record["processes"][1]["requests"][1]
    text = section(markdown(content(record), []), "Cold start")
    assert cells(text, "`torch-compile`", "1", "stalls") == [["6.00", "time was up"]]


def test_compilations() -> None:
    text = section(markdown(content(two_sizes()), []), "Compilations")
    at = ["4,030", "64x64, step 0", "403"]
    assert cells(text, "`torch-compile`", "1") == [["2 of 2", "4", "6", "2", "10", "2", "-", "4 of 60", *at]]
    # 50 ms at the second size compiled nothing
    assert cells(text, "`aot`", "1")[0][6:9] == ["6 + 0", "1 of 60", "9,030"]
    assert cells(text, "`aot`", "2")[0][6:8] == ["0 + 0", "0 of 60"]
    assert "lower bounds" not in text
    assert "lower bounds" in section(markdown(content(two_sizes(traced_only=True)), []), "Compilations")


@pytest.mark.parametrize("title", ["Cold start", "Compilations"])
def test_processes_that_failed_are_told(title: str) -> None:
    record = two_sizes()
    record["processes"][1] = {"contender": "torch-compile", "process": 1, "failed": "RuntimeError: /a/b/c.cpp failed"}
    record["contenders"].append({"name": "onediff", "processes": 2})
    text = section(markdown(content(record), []), title)
    assert "`torch-compile, process 1` (RuntimeError: c.cpp failed)" in text
    assert "`onediff, process 2` (not run)" in text
    assert cells(text, "`torch-compile`") == []


def test_memory_of_a_graph_is_beyond_eagers() -> None:
    text = section(markdown(content(steps()), []), "Memory")
    assert cells(text, "`aot`") == [["1.50", "400", "510", "110", "5", "20.0"]]  # (110 - 10) / (4 + 1)
    assert cells(text, "`eager`") == [["1.50", "400", "410", "10.0", "0", "-"]]
    assert "`tensorrt` (torch_tensorrt is not installed)" in text
    assert cells(section(markdown(content(steps("cuda")), []), "Memory"), "`aot`")[0][-2:] == ["700", "900"]


def test_memory_of_a_process_that_died_is_told() -> None:
    record = steps()
    aot = next(one for one in record["report"]["backends"] if one["backend"] == "aot")
    del aot["ready"]
    text = section(markdown(content(record), []), "Memory")
    assert cells(text, "`aot`") == []
    assert "`aot` (its process did not live until then)" in text


def test_symbolic_against_exact() -> None:
    text = section(markdown(content(steps()), []), "Symbolic")
    assert cells(text, "square", "64x64", SHORT) == [["1.25", "-", "-", "-", "-"]]
    assert cells(text, "square", "64x64", "all, set up") == [["-", "9.00", "5 + 0", "9.00", "5 + 0"]]


def test_blocks_against_whole() -> None:
    text = section(markdown(content(steps()), []), "Blocks")
    assert cells(text, "`aot`") == [["9.00", "5 + 0", "1.00", "1.00"]]
    assert cells(text, "`aot/whole/exact`") == [["9.00", "5 + 0", "0.50", "0.67"]]
    assert cells(text, "`torch-compile`") == [["9.00", "5 + 0", "1.60", "1.00"]]


def test_profiles_have_shares_and_the_top_five() -> None:
    text = section(markdown(content(steps(), insight()), []), "Profile")
    assert cells(text, "64x64", LONG, "`aot`") == [["60.0 %", "10.0 %", "30.0 %"]]
    assert cells(text, "`kernel_4`") == [["convolution", "2", "10.0 %"]] * 2
    assert cells(text, "`kernel_5`") == []


@pytest.mark.parametrize(
    "title",
    ["Single steps", "Distance", "Cold start", "Compilations", "Memory", "Symbolic", "Blocks", "Profile"],
)
def test_missing_records_are_told(title: str) -> None:
    assert "Missing: " in section(markdown(content(), []), title)
    assert "Missing: " not in section(markdown(content(steps(), insight(), two_sizes()), []), title)


def test_missing_contenders_are_told() -> None:
    record = steps()
    record["report"]["rows"] = [row for row in record["report"]["rows"] if row["backend"] != "aot/exact"]
    record["report"]["backends"] = [one for one in record["report"]["backends"] if one["backend"] != "aot/exact"]
    text = markdown(content(record), [])
    assert "Missing: no scenario of the file has both `aot` and `aot/exact`." in section(text, "Symbolic")
    assert "`square: aot/exact` (it has no row in the report)" in section(text, "Symbolic")
    assert "`aot/exact` (it has no row in the report)" in section(text, "Single steps")


def test_the_header() -> None:
    text = markdown(content(steps()), [])
    assert "Command: `python -m benchmarks.compare --out x.json`" in text
    assert "Machine: A CPU, cores 2" in text
    assert "- `repeated-blocks` ran in another environment: torch 2.4.0" in text
    assert "smoke run" not in text
    assert "smoke run" in markdown({**content(), "smoke_run": True}, [])


def test_anchors_are_marked_as_published() -> None:
    text = section(markdown(content(), []), "Published")
    assert "**Published, not measured here.**" in text
    assert len(cells(text)) == len(ANCHORS) + 2  # with the head and the rule
    assert cells(text, "TensorRT", "H100") == [
        ["SDXL 1024x1024", "30", "not stated", "2,496 ms", "1,471 ms", "NVIDIA's model card of SDXL for TensorRT"]
    ]
    assert all(all(vars(anchor).values()) for anchor in ANCHORS)
    assert len(set(ANCHORS)) == len(ANCHORS)
    with pytest.raises(FrozenInstanceError):
        Anchor.__setattr__(ANCHORS[0], "before", "1 s")


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0.0, "0.00"), (0.01165, "0.0117"), (9.996, "10.0"), (65600.0, "65,600"), (6.04e-5, "6.0e-05")],
)
def test_numbers_have_three_digits(value: float | None, text: str) -> None:
    assert number(value) == text


def test_reasons_are_one_line_without_places_of_the_machine() -> None:
    assert reason("a:\n '/home/x/lib/y.py'  not 2/3, see https://a.b/c/d") == "a: 'y.py' not 2/3, see https://a.b/c/d"
    assert len(reason("word " * 100)) == 200


def test_a_cell_does_not_end_at_a_bar() -> None:
    assert table(["a"], [["x|y"]]).splitlines()[-1] == "| x\\|y |"


def test_contenders_are_in_one_order() -> None:
    assert in_order(["aot/exact", "what", "aot", "eager", "stock", "aot"]) == [
        "eager", "stock", "aot", "aot/exact", "what",
    ]  # fmt: skip


# Plots


def test_every_plot_is_written_and_shown(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "run.json"
    full = content(steps(), insight(), two_sizes(), two_sizes(traced_only=True, name="counted"))
    plots = plot(full, out)
    assert [path.name for path in plots] == [f"run_{name}.png" for name in DRAWERS]
    assert sorted(tmp_path.iterdir()) == sorted(plots)
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000 for path in plots)
    text = markdown(full, plots)
    assert all(text.count(f"]({path.name})") == 1 for path in plots)


@pytest.mark.parametrize(
    ("records", "names"),
    [
        ([], []),
        ([steps(aot={"state": "died", "ms": None})], ["steps", "memory", "shapes", "regions"]),
        ([insight()], ["profile"]),
        ([two_sizes()], ["cold_start", "compilations"]),
    ],
)
def test_plots_are_of_what_there_is(records: Sequence[Mapping[str, Any]], names: list[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert [path.stem for path in plot(content(*records), tmp_path / "x.json")] == [f"x_{name}" for name in names]


def test_a_plot_that_is_cut_short_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure
    before = tmp_path / "x_profile.png"
    before.write_bytes(b"earlier")

    def cut(self: Any, path: Path, **options: Any) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(figure, "savefig", cut)
    with pytest.raises(KeyboardInterrupt):
        plot(content(insight()), tmp_path / "x.json")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x_profile.png", b"earlier")]


def test_without_matplotlib_a_line_tells_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plot(content(insight()), tmp_path / "x.json") == []
    assert capsys.readouterr().err == "no plots: expected matplotlib, got none here: pip install matplotlib\n"
    assert list(tmp_path.iterdir()) == []


# Scenarios

FROZEN = {  # of the JSON of each
    "five-sizes": "587c4e420ea2",
    "five-sizes-peers": "f51d173b7457",
    "square": "3b5e2be54503",
    "landscape": "9363b4036322",
    "batch-1": "f2b05070aee7",
    "sd15": "a7cc130736aa",
    "square-slow-compilers": "065f9b64794a",
    "five-sizes-peers-compiled": "ba067bc23a24",
    "sdxl-gpu": "e0a48e200e4d",
    "sdxl-gpu-batch-1": "3388f82f92c2",
    "sd15-gpu": "c27d4ccf23dd",
    "sd15-gpu-batch-1": "734f30982c11",
    "smoke-requests": "bb838db410a5",
    "smoke-steps": "580d497cde40",
}
ALL: list[Scenario] = [scenario for scenarios in SETS.values() for scenario in scenarios]


def test_every_scenario_has_a_name_of_its_own() -> None:
    assert list(FROZEN) == [scenario.name for scenario in ALL]
    assert len({scenario.name for scenario in ALL}) == len(ALL)


@pytest.mark.parametrize("scenario", ALL, ids=lambda scenario: scenario.name)
def test_a_scenario_does_not_change(scenario: Scenario) -> None:
    with pytest.raises(FrozenInstanceError):
        setattr(scenario, "name", "other")  # noqa: B010  a plain assignment is what mypy refuses
    assert hash(scenario) == hash(replace(scenario))  # nothing in it can change either
    digest = hashlib.sha256(json.dumps(scenario.to_json(), sort_keys=True).encode()).hexdigest()
    assert FROZEN[scenario.name] == digest[:12], "a scenario that changes gets a new name: its figures are others"
    assert all(isinstance(scenarios, tuple) for scenarios in SETS.values())


@pytest.mark.parametrize("scenario", ALL, ids=lambda scenario: scenario.name)
def test_a_scenario_can_be_run(scenario: Scenario) -> None:
    if isinstance(scenario, RequestScenario):
        names = [entry.name for entry in scenario.contenders]
        assert all(entry.processes >= 1 for entry in scenario.contenders)
    else:
        names = list(scenario.contenders)
    assert [Contender.parse(name).name for name in names] == list(dict.fromkeys(names))
    assert scenario.model in models.NAMES
    assert all(side % 64 == 0 for size in scenario.sizes for side in size)


def test_a_record_finds_its_times_by_the_scenarios_name() -> None:
    other = {**insight(), "scenario": "another"}
    read = Content(content(insight(), steps(), other))
    assert [one.steps and one.steps.name for one in read.insights] == ["square", None]
