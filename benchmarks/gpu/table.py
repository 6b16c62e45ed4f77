"""Markdown of a run: one section for each stage that has records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.gpu.records import DONE
from benchmarks.gpu.stages import STAGES, Stage


def render(content: Mapping[str, Any]) -> str:
    """The page of a JSON file's content."""
    return "\n".join(_lines(content)) + "\n"


def _lines(content: Mapping[str, Any]) -> Iterator[str]:
    machine, versions, model = content["machine"], content["versions"], content["model"]
    where = machine.get("gpu") if model["device"] == "cuda" else machine["cpu"]
    yield f"# {model['name']}: {where}"
    yield ""
    yield f"{model['dtype']}, batch 2; {machine['cores']} cores, " + ", ".join(f"{n} {v}" for n, v in versions.items())
    yield (
        f"Commit {content['commit'] or '(none)'}, sources {content['source_sha256'][:12]}; begun "
        + content["runs"][0]["date"]
    )
    yield ""
    yield (
        "ms: median of interleaved calls, ± the distance of the quartiles. Limits of errors (relative L2, "
        f"max|diff|/max|ref|): {model['limits']}; float32 is checked to 1e-3 by the stage of that name."
    )
    for stage in STAGES:
        records = [record for record in content["records"] if record["stage"] == stage.name]
        if records:
            yield from _section(stage, records)


def _section(stage: Stage, records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield from ("", f"## {stage.name}", "", stage.run.__doc__.splitlines()[0] if stage.run.__doc__ else "", "")
    done = [record for record in records if record["status"] == DONE]
    if stage.columns and done:
        yield from _row(stage.columns.values())
        rows = [[{**record["case"], **record["figures"]}.get(name) for name in stage.columns] for record in done]
        numbers = [all(not isinstance(row[index], str) for row in rows) for index in range(len(stage.columns))]
        yield from _row("---:" if number else "---" for number in numbers)
        for row in rows:
            yield from _row(row)
    elif stage.name == "profile":
        for record in done:
            yield from _profile(record)
    else:
        for record in done:
            yield from (f"- {name}: {_text(value)}" for name, value in record["figures"].items())
    for record in records:
        if record["status"] != DONE:
            yield ""
            yield f"{' '.join(record['case'].values()) or stage.name}: {record['status']}: {record['reason']}"


def _profile(record: Mapping[str, Any]) -> Iterator[str]:
    figures = record["figures"]
    shares = ", ".join(f"{name} {share:.1%}" for name, share in figures["shares"].items() if share)
    yield from ("", f"{' '.join(record['case'].values())}, {figures['ms']} ms: {shares}", "")
    yield from _row(("name", "category", "calls", "ms", "share"))
    yield from _row(("---", "---", "---:", "---:", "---:"))
    for taker in figures["top"]:
        name = taker["name"].replace("|", "\\|")
        yield from _row((f"`{name}`", taker["category"], taker["calls"], taker["ms"], f"{taker['share']:.1%}"))


def _row(values: Any) -> Iterator[str]:
    yield "| " + " | ".join(_text(value) for value in values) + " |"


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_text(part)}" for name, part in value.items())
    return str(value)
