"""The tables: shares with Wilson's intervals, means with bootstrap intervals, all at 95 %."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy

from benchmarks.effect.drawing import readings_of
from benchmarks.effect.reading import Reading

_Z = 1.96


def wilson(hits: int, count: int) -> tuple[float, float]:
    """95 % interval of a share.

    >>> low, high = wilson(50, 100)
    >>> round(low, 3), round(high, 3)
    (0.404, 0.596)
    """
    if count == 0:
        return 0.0, 1.0
    share, square = hits / count, _Z**2
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = _Z / (1 + square / count) * math.sqrt(share * (1 - share) / count + square / (4 * count**2))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def bootstrap(values: Sequence[float], rounds: int = 2000) -> tuple[float, float]:
    """95 % percentile interval of a mean; the same numbers give the same interval."""
    array = numpy.asarray(values, float)
    picks = numpy.random.default_rng(0).integers(len(array), size=(rounds, len(array)))
    low, high = numpy.percentile(array[picks].mean(1), [2.5, 97.5])
    return float(low), float(high)


def share(readings: Sequence[Reading], of: Callable[[Reading], bool]) -> str:
    """A share in percent with its interval; of nothing, nothing."""
    if not readings:
        return ""
    hits = sum(map(of, readings))
    low, high = wilson(hits, len(readings))
    return f"{100 * hits / len(readings):.0f} ({100 * low:.0f}-{100 * high:.0f})"


def mean(values: Sequence[float], digits: int = 2) -> str:
    """A mean with its interval; of nothing, nothing."""
    if not len(values):
        return ""
    low, high = bootstrap(values)
    between = "-" if low >= 0 else " to "
    return f"{numpy.mean(values):.{digits}f} ({low:.{digits}f}{between}{high:.{digits}f})"


_COLUMNS = (
    "size",
    "model",
    "pictures",
    "objects",
    "several, %",
    "right, %",
    "count, %",
    "of these colour, %",
    "of these shape, %",
    "scale, %",
    "extent",
    "area",
    "Frechet",
    "sharpness",
    "saturation",
    "clipped, %",
    "mottling",
)


def row(record: dict[str, Any]) -> str:
    """One cell as a row of a table. Colour and shape are looked at where the number is right; lengths, areas and
    saturation where there is an object."""
    readings = readings_of(record)
    counted = [r for r in readings if r.count_right]
    found = [r for r in readings if r.objects]
    cells = [
        record["size"],
        _name(record),
        str(len(readings)),
        mean([r.objects for r in readings], 1),
        share(readings, lambda r: r.duplicated),
        share(readings, lambda r: r.right),
        share(readings, lambda r: r.count_right),
        share(counted, lambda r: r.colours_right),
        share(counted, lambda r: r.shapes_right),
        share(readings, lambda r: r.scale_right),
        mean([r.extent for r in found]),
        mean([r.area for r in found]),
        "" if record.get("frechet") is None else f"{record['frechet']:.2f}",
        mean([r.sharpness for r in readings]),
        mean([r.saturation for r in found]),
        mean([100 * r.clipped for r in readings]),
        mean([r.mottling for r in readings if r.mottling is not None], 3),
    ]
    return "| " + " | ".join(cells) + " |"


def table(records: Sequence[dict[str, Any]]) -> str:
    """A Markdown table."""
    return "\n".join([*_head(_COLUMNS), *map(row, records)])


_Measure = Callable[[Reading], float | None]
_COMPARED: Final[dict[str, tuple[_Measure, int]]] = {  # with the digits that are shown
    "objects": (lambda r: r.objects, 1),
    "several, points": (lambda r: 100.0 * r.duplicated, 0),
    "right, points": (lambda r: 100.0 * r.right, 0),
    "scale, points": (lambda r: 100.0 * r.scale_right, 0),
    "extent": (lambda r: r.extent, 3),
    "sharpness": (lambda r: r.sharpness, 3),
    "saturation": (lambda r: r.saturation, 3),
    "clipped, points": (lambda r: 100.0 * r.clipped, 2),
    "mottling": (lambda r: r.mottling, 4),
}
_OF_OBJECTS: Final = ("extent", "saturation")  # need one


def differences(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> str:
    """A Markdown table of first less second, picture by picture: cells of the same captions and noise.

    Pictures in which either way of drawing shows no object do not count for what needs one.
    """
    lines = []
    for one, other in pairs:
        both = list(zip(readings_of(one), readings_of(other), strict=True))
        found = [pair for pair in both if pair[0].objects and pair[1].objects]
        cells = [one["size"], f"{_name(one)} - {_name(other)}", str(len(both))]
        for name, (of, digits) in _COMPARED.items():
            some = found if name in _OF_OBJECTS else both
            values = [(of(a), of(b)) for a, b in some]
            cells.append(mean([a - b for a, b in values if a is not None and b is not None], digits))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*_head(("size", "compared", "pictures", *_COMPARED)), *lines])


def _name(record: dict[str, Any]) -> str:
    """Of the way of drawing; with what CFG++ is worth in CFG, where it is on."""
    name: str = record["arm"]
    return name if record.get("lambda") is None else f"{name} (mean w {record['mean_weight']:.1f})"


def _head(columns: Sequence[str]) -> list[str]:
    return ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
