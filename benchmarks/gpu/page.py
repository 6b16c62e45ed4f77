"""Markdown of a run, from its journal alone: one section for each stage that has lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from benchmarks.gpu.journal import DONE, FACTS, SKIPPED, Figures, Line, ends
from benchmarks.gpu.programme import STAGES

# Of a stage: figure -> heading. "way" is the name of one way to run, where a stage has a row for each.
_WAYS: Final = ("ways", "requests", "truth", "freezes", "huge")
_COLUMNS: Final[dict[str, dict[str, str]]] = {
    "load": {
        "variant": "variant", "packages": "packages", "same_keys": "same keys", "load_s": "load s",
        "warm_calls": "calls run", "warm_s": "s", "entrance_ms": "entrance ms",
    },
    "steps": {
        "dtype": "dtype", "size": "size", "topology": "topology", "way": "", "ms": "ms", "spread_ms": "±",
        "over_eager_ratio": "/ eager", "first_s": "first call s", "relative_l2": "rel. L2", "max_error": "max error",
        "peak_mb": "MB", "floor_ms": "floor ms",
    },
    "truth": {"dtype": "dtype", "size": "size", "way": "", "relative_l2": "rel. L2"},
    "requests": {
        "dtype": "dtype", "size": "size", "way": "", "unet_s": "UNet s", "with_vae_s": "with VAE s", "vae_ms": "VAE ms",
        "vae_peak_mb": "VAE MB", "relative_l2": "rel. L2",
    },
    "freezes": {"size": "size", "way": "", "longest_ms": "longest ms", "p99_ms": "99 % ms"},
    "huge": {
        "size": "size", "way": "", "step_ms": "step ms", "step_peak_mb": "MB", "vae_ms": "VAE ms",
        "vae_peak_mb": "VAE MB", "out_of_memory": "out of memory",
    },
    "second": {"variant": "variant", "load_s": "load s", "warm_s": "first calls s", "compiles": "compiled"},
    "graphs": {
        "size": "size", "topology": "topology", "step_ms": "step ms", "graph_ms": "graph ms",
        "graph_over_step_ratio": "/ step", "bit_equal": "bit-equal",
    },
    "memory": {
        "size": "size", "said": "said", "before_ms": "before ms", "after_ms": "after ms",
        "after_over_before_ratio": "after / before",
    },
    "native": {
        "region": "region", "path": "path", "compile_s": "compile s", "same_bytes": "same bytes",
        "carried_kernels": "kernels", "native_kernels": "native", "kernels_of_both": "both",
        "same_configurations": "same configuration", "carried_ms": "ms", "native_ms": "native ms",
        "carried_over_native_ratio": "/ native",
    },
    "repeated": {
        "size": "size", "first_s": "first call s", "eager_ms": "eager ms", "repeated_ms": "ms",
        "repeated_over_eager_ratio": "/ eager", "relative_l2": "rel. L2", "gave_up": "ran eager",
    },
}  # fmt: skip


def render(lines: Sequence[Line]) -> str:
    """The page of a journal; a run that goes on has one too."""
    return "\n".join(_lines(lines)) + "\n"


def _lines(lines: Sequence[Line]) -> Iterator[str]:
    facts = next((line.figures for line in lines if line.event == FACTS and "model" in line.figures), {})
    yield from _head(facts, lines)
    over = list(ends(lines))
    if any(line.stage == "steps" for line in over):
        yield from _overview([line for line in over if line.stage == "steps"])
    for stage in STAGES:
        if found := [line for line in over if line.stage == stage.name]:
            yield from ("", f"## {stage.name}", "", stage.about, "")
            yield from _profiles(found) if stage.name == "profile" else _section(stage.name, found)
            yield from _others(found)


def _head(facts: Mapping[str, Any], lines: Sequence[Line]) -> Iterator[str]:
    run = next((line.figures for line in lines if line.event == FACTS and "command" in line.figures), {})
    if not facts:
        yield from ("# No process began", "")
        return
    machine = facts["machine"]
    yield from (f"# {facts['model']}: {machine.get('gpu', machine['cpu'])}", "")
    yield f"{machine['cores']} cores, " + ", ".join(f"{name} {value}" for name, value in facts["versions"].items())
    yield f"`{run.get('command', '')}`, begun {run.get('date', '')}, commit {facts['commit']}."
    yield ""
    names = (f"`{one['name']}` ({one['dtype']}, {one['memory_format']})" for one in facts["variants"])
    yield f"Packages: {', '.join(names)}. Batch 2. ms: median of interleaved calls, ± the distance of the quartiles."
    yield f"Limits of errors (relative L2, max|diff|/max|ref|) against eager: {_text(facts['limits'])}."


def _overview(steps: Sequence[Line]) -> Iterator[str]:
    """Milliseconds of a step, a column for each case and a row for each way."""
    cases = [[text.removeprefix("windowed+") for text in line.case.values()] for line in steps]
    yield from ("", "Milliseconds of a step:", "")
    yield from _heads(["", *(" ".join(case) for case in cases)], [False] + [True] * len(cases))
    for way in dict.fromkeys(way for line in steps for way in line.figures.get("ways", {})):
        yield _row([way, *(line.figures.get("ways", {}).get(way, {}).get("ms") for line in steps)])


def _section(name: str, found: Sequence[Line]) -> Iterator[str]:
    rows = [{**line.case, **row} for line in found for row in _rows(name, line.figures)]
    if not rows:
        return
    if (columns := _COLUMNS.get(name)) is None:
        for row in rows:
            yield from (f"- {figure}: {_text(value)}" for figure, value in row.items())
        return
    columns = {"tree": "sources", **columns}
    shown = {figure: heading for figure, heading in columns.items() if any(row.get(figure) is not None for row in rows)}
    numbers = [all(not isinstance(row.get(figure), str) for row in rows) for figure in shown]
    yield from _heads(list(shown.values()), numbers)
    yield from (_row([row.get(figure) for figure in shown]) for row in rows)


def _rows(name: str, figures: Figures) -> list[Figures]:
    """The rows of a case: one for each way, where figures are kept by way."""
    if name == "steps":
        shared = {figure: value for figure, value in figures.items() if figure != "ways"}
        return [{"way": way, **row, **shared} for way, row in figures.get("ways", {}).items()]
    if name in _WAYS:
        return [{"way": way, **row} for way, row in figures.items()]
    return [figures] if figures else []


def _profiles(found: Sequence[Line]) -> Iterator[str]:
    for line in found:
        if line.event == DONE:
            shares = ", ".join(f"{name} {share:.1%}" for name, share in line.figures["shares"].items() if share)
            yield from ("", f"`{line.case['run']}`, {line.case['size']}, {line.figures['ms']} ms: {shares}", "")
            yield from _heads(["name", "category", "calls", "ms", "share"], [False, False, True, True, True])
            for taker in line.figures["top"]:
                name, share = taker["name"].replace("|", "\\|"), f"{taker['share']:.1%}"
                yield _row([f"`{name}`", taker["category"], taker["calls"], taker["ms"], share])


def _others(found: Sequence[Line]) -> Iterator[str]:
    """Cases that are not done, and why; those that were skipped for one reason, together."""
    skipped: dict[str, list[str]] = {}
    for line in found:
        name = " ".join(line.case.values()) or line.stage
        if line.event == SKIPPED:
            skipped.setdefault(line.reason, []).append(name)
        elif line.event != DONE:
            yield from ("", f"{name}: **{line.event}**: {line.reason}")
    for reason, names in skipped.items():
        yield from ("", f"Skipped ({reason}): {', '.join(names)}")


def _heads(names: Sequence[str], numbers: Sequence[bool]) -> Iterator[str]:
    yield _row(names)
    yield _row(["---:" if number else "---" for number in numbers])


def _row(values: Sequence[Any]) -> str:
    return "| " + " | ".join(_text(value) for value in values) + " |"


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_text(part)}" for name, part in value.items())
    return str(value)
