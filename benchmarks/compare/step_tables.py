"""Sections on single UNet calls: milliseconds, floor, memory, shapes, regions, profile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from accel_hidiff.benching.names import REFERENCE, STOCK
from benchmarks.compare.content import Content, Insight, Setup, Steps, in_order
from benchmarks.compare.text import (
    NONE,
    bullets,
    number,
    percent,
    picture,
    ranged,
    reason,
    table,
    times,
    without,
)

SYMBOLIC: Final = "aot"
EXACT: Final = "aot/exact"
WHOLE: Final = "aot/whole/exact"
REGIONS: Final = ("torch-compile", "repeated-blocks", SYMBOLIC, WHOLE)
PROFILED: Final = (REFERENCE, SYMBOLIC)
_TOP: Final = 5
_MISSING: Final = 'Missing: the file has no record of kind "steps".'


def steps(content: Content, plots: Sequence[Path]) -> list[str]:
    """Milliseconds of a step and of a request's steps, against patched eager."""
    blocks = [
        "## Single steps",
        "Ratios of one UNet call's time to that of patched eager (this project's patch, nothing compiled), from "
        "medians of turns that all contenders took one after the other; below 1 is faster. In brackets: the least "
        "and the greatest ratio of two turns of the same round. The last column adds up the UNet calls of a request, "
        f"each topology as often as it runs. `{STOCK}` is diffusers without HiDiffusion: it computes another "
        "function, and is here for scale alone. Outputs of all others were compared with eager's before they were "
        "timed.",
        picture(plots, "steps", "one UNet call over patched eager"),
    ]
    if not content.steps:
        return [*blocks, _MISSING]
    for one in content.steps:
        for size in one.sizes:
            blocks += _steps_of(one, size)
        if one.absent:
            blocks.append(without(one.absent))
    return blocks


def _steps_of(one: Steps, size: str) -> list[str]:
    record, topologies, counted = one.record, one.topologies(size), one.steps_counted(size)
    units = ("ratio",) if one.on_cpu else ("ms", "ratio")
    columns = ["contender", *(f"{name}, {unit}" for name in topologies for unit in units)]
    columns += [f"request of {counted} steps, {unit}" for unit in units]
    rows = []
    for name in one.contenders:
        cells = [f"`{name}`" + (" (another function)" if name == STOCK else "")]
        for topology in topologies:
            problem = one.problem(name, size, topology)
            short = "" if problem is None else problem.partition(":")[0] if ":" in problem else "no time"
            if not one.on_cpu:
                cells.append(short or number(one.ms(name, size, topology)))
            cells.append(short or ranged(one.ratio(name, size, topology)))
        if not one.on_cpu:
            cells.append(number(one.request_ms(name, size)))
        rows.append([*cells, times(one.request_ratio(name, size))])
    settings = one.record["report"]["settings"]
    where = f"{settings['dtype']} on {settings['device']}, batch {record['batch']}, {record['repeats']} turns"
    threads = f", {one.threads} thread{'s' * (one.threads != 1)}" if one.on_cpu and one.threads else ""
    told = []
    for name in one.contenders:
        told += _problems(name, one.problems(name, size), len(topologies))
    if counted != record["steps"]:
        told.append(f"A request has {record['steps']} steps; the rows stand for {counted} of them.")
    return [f"### {one.name}: {record['model']}, {size}", f"{where}{threads}.", table(columns, rows), bullets(told)]


def _problems(name: str, problems: Mapping[str, str], topologies: int) -> list[str]:
    """Lines on what has no time; one where all topologies are alike."""
    if len(problems) == topologies and len(set(problems.values())) == 1:
        return [f"`{name}`: {reason(next(iter(problems.values())))}"]
    return [f"`{name}`, {topology}: {reason(problem)}" for topology, problem in problems.items()]


def floor(content: Content, plots: Sequence[Path]) -> list[str]:
    """How far from what the machine could do."""
    blocks = [
        "## Distance from the floor",
        "TFLOP are those of convolutions, matmuls and attention in one call; eager's traffic is what its operators "
        "read and write if each takes every operand from memory once. The floor is the arithmetic at the speed of a "
        "large matmul, and the share is the floor over the measured time: 100 % would be a call that does nothing "
        "but matmuls at full speed. The last column is the share of eager's time in which its traffic could be copied.",
        picture(plots, "floor", "share of the matmul's speed that a call reaches"),
    ]
    if not content.insights:
        return [*blocks, 'Missing: the file has no record of kind "insight".']
    for one in content.insights:
        ceilings = one.record["ceilings"]
        told = f"matmul {number(ceilings['matmul_tflop_per_s'])} TFLOP/s, copy {number(ceilings['copy_gb_per_s'])} GB/s"
        hint = " Both from small operands on a shared CPU: only orders of magnitude count." if one.on_cpu else ""
        timed = "" if one.steps else " There is no record of this scenario's times, so that there are no shares."
        blocks += [f"### {one.name}", f"Measured ceilings: {told}.{hint}{timed}", _floor_of(one)]
    return blocks


def _floor_of(one: Insight) -> str:
    columns = ["size", "topology", "TFLOP", *([] if one.on_cpu else ["floor ms"]), "eager's traffic GB"]
    columns += [
        *([] if one.on_cpu else ["traffic ms"]),
        *(f"share, {name}" for name in PROFILED),
        "traffic, of eager's",
    ]
    rows = []
    for share in one.shares(PROFILED):
        cells = [share.size, share.topology, number(share.tflop)]
        cells += [*([] if one.on_cpu else [number(share.floor_ms)]), number(share.eager_gb)]
        cells += [] if one.on_cpu else [number(share.traffic_ms)]
        rows.append([*cells, *(percent(share.reached[name]) for name in PROFILED), percent(share.moving)])
    return table(columns, rows, left=2)


def memory(content: Content, plots: Sequence[Path]) -> list[str]:
    """Resident memory of each contender's process."""
    blocks = [
        "## Memory",
        "Resident megabytes of a contender's process when the model was loaded, and when all topologies of all sizes "
        "were set up. Graphs are those that it compiled or loaded. Per graph: what it added, less what eager added "
        "without any, over the graphs; a contender that compiles in its own process has the compiler in it too, and "
        "one that finds its graphs in a cache has not.",
        picture(plots, "memory", "resident memory of each contender"),
    ]
    if not content.steps:
        return [*blocks, _MISSING]
    for one in content.steps:
        found = {name: told for name in one.contenders if (told := one.memory(name)) is not None}
        on_gpu = any(told.gpu is not None for told in found.values())
        columns = ["contender", "weights MB", "opened MB", "ready MB", "added MB", "graphs", "added per graph MB"]
        columns += ["GPU, ready MB", "GPU, at most MB"] if on_gpu else []
        rows = []
        for name, told in found.items():
            cells = [f"`{name}`", *(number(value) for value in (told.weights, told.opened, told.ready, told.added))]
            cells += [str(told.graphs), number(told.per_graph(found.get(REFERENCE)))]
            rows.append([*cells, *((number(told.gpu), number(told.gpu_peak)) if on_gpu else ())])
        absent = {name: "its process did not live until then" for name in one.contenders if name not in found}
        sizes = ", ".join(one.sizes)
        blocks += [f"### {one.name}: {sizes}", table(columns, rows), without(one.absent | absent)]
    return blocks


def shapes(content: Content, plots: Sequence[Path]) -> list[str]:
    """One graph for a range of sizes against one for each."""
    blocks = [
        "## Symbolic against exact shapes",
        f"`{SYMBOLIC}` compiles a graph for a range of sizes, `{EXACT}` one for a single size. Ratio: symbolic over "
        "exact, below 1 means that the symbolic graph is faster. Processor seconds are those of the first call with "
        "compilers, and tell the cost of compiling only where nothing was loaded.",
        picture(plots, "shapes", "symbolic against exact shapes"),
    ]
    rows = []
    for one in content.steps:
        if not {SYMBOLIC, EXACT} <= set(one.contenders):
            continue
        for size in one.sizes:
            for topology in one.topologies(size):
                ratio = times(one.over(SYMBOLIC, EXACT, size, topology))
                rows.append([one.name, size, topology, ratio, *[NONE] * 4])
            cost = [cell for name in (SYMBOLIC, EXACT) for cell in _setup(one.setup(name, size))]
            rows.append([one.name, size, "all, set up", NONE, *cost])
    columns = ["scenario", "size", "topology", "symbolic / exact"]
    columns += [f"{name}, {what}" for name in ("symbolic", "exact") for what in ("processor s", "compiled + loaded")]
    missing = f"Missing: no scenario of the file has both `{SYMBOLIC}` and `{EXACT}`."
    return [*blocks, table(columns, rows, left=3) if rows else missing, _without(content, (SYMBOLIC, EXACT))]


def regions(content: Content, plots: Sequence[Path]) -> list[str]:
    """Blocks as graphs of their own against the whole UNet as one."""
    blocks = [
        "## Blocks against the whole UNet",
        f"`{SYMBOLIC}` compiles blocks that repeat once, `{WHOLE}` the UNet as one graph for each topology and size. "
        "Beside them, the same two choices by torch: `repeated-blocks` and `torch-compile`. Ratios are to the time "
        f"of `{SYMBOLIC}`; processor seconds and graphs are sums over the first calls of all topologies.",
        picture(plots, "regions", "blocks against the whole UNet"),
    ]
    found = False
    for one in content.steps:
        names = [name for name in in_order(REGIONS) if name in one.contenders]
        if not {SYMBOLIC, WHOLE} <= set(names):
            continue
        found = True
        for size in one.sizes:
            topologies = one.topologies(size)
            rows = []
            for name in names:
                ratios = [times(one.over(name, SYMBOLIC, size, topology)) for topology in topologies]
                rows.append([f"`{name}`", *_setup(one.setup(name, size)), *ratios])
            columns = ["contender", "processor s", "compiled + loaded", *(f"{name}, ratio" for name in topologies)]
            blocks += [f"### {one.name}: {size}", table(columns, rows)]
    if not found:
        blocks.append(f"Missing: no scenario of the file has both `{SYMBOLIC}` and `{WHOLE}`.")
    return [*blocks, _without(content, REGIONS)]


def _setup(told: Setup) -> tuple[str, str]:
    return number(told.cpu_s), f"{told.compiled} + {told.loaded}"


def _without(content: Content, names: Sequence[str]) -> str:
    """Those among some contenders that a scenario asked for and has no figures of."""
    told: dict[str, str] = {}
    for one in content.steps:
        problems = {name: why for name, why in one.absent.items() if name in names}
        for name in names:
            for size in one.sizes:
                found = one.problems(name, size) if name in one.contenders else {}
                if len(found) == len(one.topologies(size)):
                    problems[name] = next(iter(found.values()))
        told |= {f"{one.name}: {name}": why for name, why in problems.items()}
    return without(told)


def profile(content: Content, plots: Sequence[Path]) -> list[str]:
    """Where the time of a call goes."""
    blocks = [
        "## Profile",
        "Shares of one call's time by torch's profiler. On a CPU, the profiler itself slows operators down, and what "
        "no operator accounts for is compiled code and Python; on a GPU, shares are of kernels, and what is left is "
        "idle.",
        picture(plots, "profile", "shares of a call's time by category"),
    ]
    told = [one for one in content.insights if one.profiles]
    if not told:
        return [*blocks, 'Missing: the file has no record of kind "insight" with profiles.']
    for one in told:
        categories = list(dict.fromkeys(name for found in one.profiles for name in found["shares"]))
        rows = []
        for share in one.shares(PROFILED):
            for name in PROFILED:
                if (found := one.profile(name, share.size, share.topology)) is not None:
                    cells = [percent(found["shares"].get(category, 0.0)) for category in categories]
                    rows.append([share.size, share.topology, f"`{name}`", *cells])
        blocks += [f"### {one.name}", table(["size", "topology", "contender", *categories], rows, left=3)]
        blocks += [_top_of(one, name) for name in PROFILED]
    return blocks


def _top_of(one: Insight, contender: str) -> str:
    """What takes most of the first case that is windowed and nothing else."""
    found = next((p for p in one.profiles if p["contender"] == contender and p["topology"] == "windowed"), None)
    if found is None:
        return f"`{contender}` has no profile of the topology windowed."
    rows = [
        [f"`{taker['name']}`", taker["category"], str(taker["calls"]), percent(taker["share"])]
        for taker in found["top"][:_TOP]
    ]
    head = f"What takes most in `{contender}`, {found['size']}, windowed:"
    return f"{head}\n\n{table(['name', 'category', 'calls', 'share'], rows, left=2)}"
