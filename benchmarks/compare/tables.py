"""The Markdown of a comparison: a section for each question, and one line where a record that answers it is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.compare import request_tables, step_tables
from benchmarks.compare.anchors import ANCHORS
from benchmarks.compare.content import Content
from benchmarks.compare.text import bullets, table


def markdown(content: Mapping[str, Any], plots: Sequence[Path]) -> str:
    """All tables of a comparison.

    Args:
        content: what `benchmarks.compare` wrote; any record, and any contender of one, may be missing.
        plots: pictures beside the Markdown file, as `plots.plot` names them.

    Returns:
        Markdown, ending in a line feed.
    """
    read = Content(content)
    blocks = [
        "# Comparison",
        *_header(content, read),
        *step_tables.steps(read, plots),
        *step_tables.floor(read, plots),
        *request_tables.cold_start(read, plots),
        *request_tables.compilations(read, plots),
        *step_tables.memory(read, plots),
        *step_tables.shapes(read, plots),
        *step_tables.regions(read, plots),
        *step_tables.profile(read, plots),
        *_anchors(),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _header(content: Mapping[str, Any], read: Content) -> list[str]:
    machine, versions = content.get("machine", {}), content.get("versions", {})
    lines = [
        f"Command: `{content.get('command', 'not told')}`",
        f"Date: {content.get('date', 'not told')}; commit {content.get('commit') or 'not told'} (+: with changes)",
        "Machine: " + (", ".join(_fact(name, value) for name, value in machine.items()) or "not told"),
        "Versions: " + (_versions(versions) or "not told"),
        f"Load when the file was last written: {content.get('load_average', 'not told')}",
    ]
    lines += _other_versions(read)
    smoke = "A smoke run: its figures mean nothing." if content.get("smoke_run") else ""
    return [smoke, bullets(lines), *(f"**{name} ended early:** {why}" for name, why in read.failures.items())]


def _fact(name: str, value: Any) -> str:
    if name in ("cpu", "platform", "gpu"):
        return str(value)
    shown = ".".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"{name.replace('_', ' ')} {shown}"


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _other_versions(read: Content) -> list[str]:
    """A line for each environment that differs from the reference's."""
    told: dict[str, str] = {}
    for one in read.steps:
        usual = one.record["report"]["versions"]
        for backend in one.record["report"]["backends"]:
            differing = {k: v for k, v in backend.get("versions", usual).items() if usual.get(k) != v}
            if differing:
                told[backend["backend"]] = _versions(differing)
    return [f"`{name}` ran in another environment: {versions}" for name, versions in told.items()]


def _anchors() -> list[str]:
    columns = ["system", "hardware", "model and size", "steps", "precision", "before", "after", "source"]
    rows = [list(vars(anchor).values()) for anchor in ANCHORS]
    return [
        "## Published figures of others",
        "**Published, not measured here.** Hardware, steps and precision as the source states them. They are on "
        "other machines and other models than the tables above, so that only the kind of gain can be set beside them.",
        table(columns, rows, left=len(columns)),
    ]
