"""The plot of a soak, and the robust slope of its memory."""

from __future__ import annotations

import statistics
from itertools import combinations
from pathlib import Path
from typing import Any

KINDS = ("compiled", "mixed", "eager", "no image")  # what served a request


def theil_sen(values: list[float]) -> float:
    """Median of the slopes between all pairs of points: outliers do not move it. Per step of x."""
    if len(values) < 2:
        return 0.0
    return statistics.median((b - a) / (j - i) for (i, a), (j, b) in combinations(enumerate(values), 2))


def plot(rows: list[dict[str, Any]], slope: float, path: Path) -> None:
    """Memory and descriptors over requests; below, what served each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    numbers = [row["request"] for row in rows]
    figure, (above, below) = plt.subplots(2, 1, figsize=(9, 5.5), sharex=True, height_ratios=(2, 1))
    above.plot(numbers, [row["rss_mb"] for row in rows], color="#1f4e79", linewidth=1.2, label="resident memory")
    half = numbers[len(numbers) // 2]
    told = f"second half, without programs: {slope:+.2f} MB per 100 requests"
    above.axvspan(half, numbers[-1], color="#1f4e79", alpha=0.06, label=told)
    above.set_ylabel("MB, the eager twin included")
    above.set_ylim(bottom=0)
    other = above.twinx()
    other.plot(numbers, [row["descriptors"] for row in rows], color="#b35900", linewidth=0.9, label="file descriptors")
    other.plot(numbers, [row["programs"] for row in rows], color="#777777", linewidth=0.9, label="programs loaded")
    other.set_ylabel("file descriptors, programs")
    other.set_ylim(0, 2.2 * max(row["programs"] for row in rows))
    lines = [*above.get_legend_handles_labels()[0], *other.get_legend_handles_labels()[0]]
    above.legend(handles=lines, loc="center", ncols=2, frameon=False, fontsize=9)
    colours = dict(zip(KINDS, ("#2e7d32", "#9ccc65", "#e0a030", "#9e9e9e"), strict=True))
    for level, kind in enumerate(reversed(KINDS)):
        at = [row["request"] for row in rows if row["kind"] == kind]
        below.scatter(at, [level] * len(at), marker="|", s=90, linewidths=1.0, color=colours[kind])
    below.set_yticks(range(len(KINDS)), reversed(KINDS))
    below.set_ylim(-0.6, len(KINDS) - 0.4)
    below.set_xlabel("request")
    below.set_ylabel("served")
    for panel in (above, below):
        panel.spines[["top"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
