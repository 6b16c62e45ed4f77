"""Pieces of Markdown: tables, numbers and reasons, as a reader wants them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from benchmarks.compare.content import Ratio

NONE: Final = "-"
_PATH: Final = re.compile(r"(?<![\w.:/])/(?:[^\s/:,'\"()]+/)+([^\s/:,'\"()]+)")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table; so many columns on the left hold words, the others numbers."""
    rules = ["---" if place < left else "---:" for place in range(len(columns))]
    lines = [columns, rules, *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def bullets(lines: Sequence[str]) -> str:
    """A list, or nothing."""
    return "\n".join(f"- {line}" for line in lines)


def picture(plots: Sequence[Path], name: str, told: str) -> str:
    """The plot whose file name ends so, where there is one."""
    found = next((plot for plot in plots if plot.stem.endswith(f"_{name}")), None)
    return f"![{told}]({found.name})" if found else ""


def reason(text: str, limit: int = 200) -> str:
    """One line without places on this machine: of an absolute path the last part is left."""
    line = " ".join(_PATH.sub(r"\1", text).split())
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def without(told: Mapping[str, str]) -> str:
    """One line on contenders that have no figures."""
    return "No figures: " + "; ".join(f"`{name}` ({reason(why)})" for name, why in told.items()) + "." if told else ""


def number(value: float | None, digits: int = 3) -> str:
    """Significant digits, without an exponent unless it is tiny."""
    if value is None:
        return NONE
    if value and abs(value) < 1e-4:
        return f"{value:.1e}"
    rounded = float(f"{value:.{digits}g}")
    places = max(0, digits - 1 - _magnitude(rounded))
    return f"{rounded:,.{places}f}"


def times(value: float | None) -> str:
    """A ratio."""
    return NONE if value is None else f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def ranged(ratio: Ratio | None) -> str:
    """A ratio with its range, where that was kept."""
    if ratio is None:
        return NONE
    if ratio.low is None or ratio.high is None:
        return times(ratio.value)
    return f"{times(ratio.value)} [{times(ratio.low)}, {times(ratio.high)}]"


def percent(share: float | None) -> str:
    """A share."""
    return NONE if share is None else f"{100 * share:.1f} %"


def _magnitude(value: float) -> int:
    return len(str(int(abs(value)))) - 1 if abs(value) >= 1 else int(f"{value:e}".partition("e")[2]) if value else 0
