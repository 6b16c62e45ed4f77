"""The plot of guidance: what CFG and CFG++ over their strength do to colours and to what is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy

from benchmarks.effect.drawing import readings_of
from benchmarks.effect.reading import Reading
from benchmarks.effect.tables import bootstrap, wilson

Point = tuple[float, float, float]  # a mean or a share, and its 95 % interval
_COLOURS: Final = {"CFG": "#d62728", "CFG++": "#1f77b4"}


def plot_guidance(rows: Sequence[dict[str, Any]], real: Sequence[dict[str, Any]], out: Path) -> None:
    """Draw saturation, clipped values and right pictures over the mean CFG weight, one column for each size.

    Args:
        rows: cells of the table of guidance, smaller sizes first.
        real: the cells of drawn scenes.
        out: PNG file.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes = list(dict.fromkeys((row["size"], len(row["readings"])) for row in rows))
    measures = {
        "saturation of objects": _saturation,
        "clipped values, %": _clipped,
        "mottling": _mottling,
        "one right object": _right,
    }
    figure, panels = plt.subplots(
        len(measures), len(sizes), figsize=(4.4 * len(sizes), 10), squeeze=False, sharex=True, sharey="row"
    )
    for column, (size, count) in zip(panels.T, sizes, strict=True):
        alike = [row for row in rows if row["size"] == size and len(row["readings"]) == count]
        for panel, measure in zip(column, measures.values(), strict=True):
            for kind, colour in _COLOURS.items():
                some = [row for row in alike if (row["lambda"] is not None) == (kind == "CFG++")]
                points = [measure(readings_of(row)) for row in some]
                panel.errorbar(
                    [row["mean_weight"] for row in some],
                    [point[0] for point in points],
                    yerr=[[point[0] - point[1] for point in points], [point[2] - point[0] for point in points]],
                    color=colour,
                    marker="o",
                    markersize=4,
                    capsize=3,
                    label=kind,
                )
            panel.spines[["top", "right"]].set_visible(False)
        for row in real:
            if row["size"] == size and len(row["readings"]) == count:
                for panel, measure in zip(column, measures.values(), strict=True):
                    level, *_ = measure(readings_of(row))
                    panel.axhline(level, color="#888888", linewidth=0.8, linestyle=":", label="drawn scenes")
        column[0].set_title(f"{size}, {count} pictures each")
        column[-1].set_xlabel("CFG weight; of CFG++ the mean that it is worth")
    for panel, name in zip(panels[:, 0], measures, strict=True):
        panel.set_ylabel(name)
    panels[-1][0].legend(*panels[0][0].get_legend_handles_labels(), frameon=False, loc="lower left")
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    plt.close(figure)


def _saturation(readings: Sequence[Reading]) -> Point:
    return _mean([reading.saturation for reading in readings if reading.objects])


def _clipped(readings: Sequence[Reading]) -> Point:
    return _mean([100 * reading.clipped for reading in readings])


def _mottling(readings: Sequence[Reading]) -> Point:
    return _mean([reading.mottling for reading in readings if reading.mottling is not None])


def _right(readings: Sequence[Reading]) -> Point:
    hits = sum(reading.right for reading in readings)
    return hits / len(readings), *wilson(hits, len(readings))


def _mean(values: Sequence[float]) -> Point:
    return float(numpy.mean(values)), *bootstrap(values)
