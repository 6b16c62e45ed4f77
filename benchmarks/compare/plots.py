"""The pictures of a comparison, one for each question that its records answer: `plot`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from benchmarks.compare import request_plots, step_plots
from benchmarks.compare.content import Content

DRAWERS: Final[Mapping[str, Callable[[Any, Content], Any]]] = {
    "steps": step_plots.steps,
    "floor": step_plots.floor,
    "cold_start": request_plots.cold_start,
    "compilations": request_plots.compilations,
    "memory": step_plots.memory,
    "shapes": step_plots.shapes,
    "regions": step_plots.regions,
    "profile": step_plots.profile,
}


def plot(content: Mapping[str, Any], out: Path) -> list[Path]:
    """Draws what there is data for; a line on stderr, and no picture, where matplotlib is not installed.

    Args:
        content: what `benchmarks.compare` wrote.
        out: the JSON file; pictures are written beside it, as STEM_QUESTION.png.

    Returns:
        The files. Each is written in full or not at all.
    """
    try:
        import matplotlib
    except ImportError:
        print("no plots: expected matplotlib, got none here: pip install matplotlib", file=sys.stderr)
        return []
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    read, written = Content(content), []
    for name, draw in DRAWERS.items():
        figure = draw(plt, read)
        if figure is None:
            continue
        path = out.with_name(f"{out.stem}_{name}.png")
        try:
            _save(figure, path)
        finally:
            plt.close(figure)
        written.append(path)
    return written


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        figure.savefig(partial, dpi=110, format="png")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
