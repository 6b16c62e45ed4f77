"""Sections on whole requests: cold start and compilations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks.compare.content import EAGER, STALL, Content, Process, Requests
from benchmarks.compare.text import NONE, number, picture, table, times, without

_TRACED: Final = (
    "peers only traced, their code generation was left out: their seconds and their worst steps are lower bounds, "
    "while this project's include all of it; contenders may have run beside each other, so that all seconds and "
    "milliseconds are rough, and counts are not"
)


def cold_start(content: Content, plots: Sequence[Path]) -> list[str]:
    """Seconds until the first image, and what each further size costs."""
    blocks = [
        "## Cold start",
        "Seconds since the start of a process until its pipeline is ready, and until its first image. Process 1 "
        "began with empty caches, process 2 with what process 1 left on disk. Compilations are this project's by its "
        "handle's counter, and graphs that Dynamo captured otherwise; both, and the worst step, are over all "
        "requests of the process.",
        picture(plots, "cold_start", "seconds until the first image, and what each size costs"),
    ]
    cold = [one for one in content.requests if not one.traced_only]
    if not cold:
        blocks.append('Missing: the file has no record of kind "requests" in which peers generated code.')
    for one in cold:
        blocks += [
            f"### {one.name}: {one.record['model']}, {one.sizes[0]} first",
            _cold(one),
            *_missing(one),
        ]
    several = [one for one in content.requests if len(one.sizes) > 1]
    blocks += [
        "### Seconds of compiling, by the number of sizes",
        'Sums over the requests so far. "Stalls" are what a user waits, taken alike for everyone: what steps take '
        f"beyond {STALL:g} times the median step of their request, the load of text encoders and caches in a first "
        'step included, so that eager has some too. "Torch\'s records" are the seconds that '
        "`torch._dynamo.utils.get_compilation_metrics` has of each compilation; this project's `aot` exports and "
        "compiles ahead of time, without Dynamo, and is not in them.",
    ]
    if not several:
        blocks.append('Missing: the file has no record of kind "requests" with several sizes.')
    for one in several:
        hint = f" ({_TRACED})" if one.traced_only else ""
        blocks += [f"{one.name}{hint}:", _by_sizes(one), *_missing(one)]
    return blocks


def _missing(one: Requests) -> list[str]:
    """What has no figures, and what has not all of them."""
    cut = "; ".join(f"`{name}` {why}" for name, why in one.cut.items())
    return [without(dict(one.failures)), f"Cut: {cut}." if cut else ""]


def _cold(one: Requests) -> str:
    columns = ["contender", "process", "ready s", "first image s", "over eager's", "processor s", "resident MB"]
    rows = []
    eager = one.eager_first_image_s()
    for told in one.processes:
        first, worst = told.record["first_image_s"], told.worst
        cells = [_named(told), str(told.number), number(told.record["ready_s"]), number(first)]
        cells += [times(first / eager) if eager else NONE, number(told.record["processor_s"])]
        cells += [number(told.record["resident_mb"]), str(told.compilations)]
        rows.append([*cells, number(worst.ms / 1e3) if worst else NONE])
    return table([*columns, "compilations", "worst step s"], rows)


def _by_sizes(one: Requests) -> str:
    counts = range(1, len(one.sizes) + 1)
    columns = ["contender", "process", "by", *(f"{n} size{'s' * (n > 1)}, s" for n in counts)]
    rows = []
    for told in one.processes:
        taken = {"stalls": told.stalled_s()}
        if not told.ours and told.contender not in EAGER:
            taken["torch's records"] = told.torch_s()
        for name, seconds in taken.items():
            cells = [number(value) for value in seconds]
            asked = one.asked(told.contender)
            missing = ["time was up" if n <= asked else "not asked" for n in counts[len(cells) :]]
            rows.append([_named(told), str(told.number), name, *cells, *missing])
    return table(columns, rows, left=3)


def compilations(content: Content, plots: Sequence[Path]) -> list[str]:
    """What was compiled while requests ran, and what a user saw of it."""
    blocks = [
        "## Compilations while requests run",
        "One process for each row, one request for each size in it. Torch's own counters, read in that process: "
        "functions compiled (records of `torch._dynamo.utils.get_compilation_metrics`), graphs "
        '(`counters["stats"]["unique_graphs"]`), recompilations (those records whose id says that it was not the '
        'first time), graph breaks (`counters["graph_break"]`), and functions given up: Dynamo logs that one reached '
        "the limit of recompilations, and it runs eager from then on. Compiled and loaded by this project are its "
        "handle's counters; a peer has none. Steps with compiling are those in which torch or the handle counted any. "
        "Steps are counted from 0.",
        picture(plots, "compilations", "milliseconds of each step, with marks where something was compiled"),
    ]
    if not content.requests:
        return [*blocks, 'Missing: the file has no record of kind "requests".']
    for one in content.requests:
        steps, count = one.record["steps"], len(one.sizes)
        head = f"### {one.name}: {one.record['model']}, {count} size{'s' * (count != 1)}, {steps} steps each"
        hint = f"{_TRACED[0].upper()}{_TRACED[1:]}." if one.traced_only else ""
        blocks += [head, hint, _counted(one), *_missing(one)]
    return blocks


def _counted(one: Requests) -> str:
    columns = ["contender", "process", "sizes", "functions", "graphs", "recompilations", "graph breaks", "given up"]
    columns += [
        "this project: compiled + loaded",
        "steps with compiling",
        "worst step ms",
        "at",
        "over the median step",
    ]
    rows = []
    for told in one.processes:
        own = f"{told.handled('compiles')} + {told.handled('loads')}" if told.ours else NONE
        marked, steps = sum(len(told.marks(r)) for r in told.requests), sum(len(r["step_ms"]) for r in told.requests)
        worst = told.worst
        cells = [_named(told), str(told.number), f"{len(told.requests)} of {len(one.sizes)}"]
        cells += [*(str(value) for value in told.counted().values()), own]
        cells += [f"{marked} of {steps}"]
        if worst is not None:
            cells += [number(worst.ms), f"{worst.size}, step {worst.step}", times(worst.over_median)]
        rows.append(cells)
    return table(columns, rows)


def _named(told: Process) -> str:
    return f"`{told.contender}`"
