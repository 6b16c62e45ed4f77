"""How the plots look: colours that colour-blind readers can tell apart, plain axes. Imports no matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

# Okabe and Ito's palette
BLACK: Final = "#000000"
ORANGE: Final = "#e69f00"
SKY: Final = "#56b4e9"
GREEN: Final = "#009e73"
YELLOW: Final = "#f0e442"
BLUE: Final = "#0072b2"
VERMILION: Final = "#d55e00"
PURPLE: Final = "#cc79a7"
GREY: Final = "#999999"
PALE: Final = "#dddddd"

ON_WHITE: Final = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
_CONTENDERS: Final = {  # the same in all panels
    "eager": (BLACK, "X"),
    "stock": (GREY, "P"),
    "hidiffusion": (SKY, "v"),
    "hidiffusion-compile": (GREEN, "^"),
    "torch-compile": (VERMILION, "s"),
    "repeated-blocks": (PURPLE, "D"),
    "inductor": (ORANGE, "*"),
    "aot": (BLUE, "o"),
}
_TOPOLOGIES: Final = {
    "windowed+pooled+dilated": (PURPLE, "D"),
    "windowed+dilated": (VERMILION, "^"),
    "windowed+pooled": (ORANGE, "s"),
    "windowed": (BLUE, "o"),
    "plain": (BLACK, "X"),
}


def of_contender(name: str) -> tuple[str, str]:
    """Colour and marker."""
    return _CONTENDERS.get(name, (GREY, "h"))


def of_topology(name: str) -> tuple[str, str]:
    """Colour and marker."""
    return _TOPOLOGIES.get(name, (GREY, "P"))


def panels(plt: Any, heights: Sequence[float], width: float = 8.5, columns: int = 1) -> tuple[Any, list[Any]]:
    """A figure with panels of so many inches, in rows of so many, and the panels; those left over are not shown."""
    rows = [max(heights[start : start + columns]) for start in range(0, len(heights), columns)]
    size = (width * columns, sum(rows))
    figure, grid = plt.subplots(
        len(rows), columns, figsize=size, height_ratios=rows, squeeze=False, layout="constrained"
    )
    flat = list(grid.flat)
    for panel in flat[len(heights) :]:
        panel.set_axis_off()
    for panel in flat:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, flat[: len(heights)]


def lines(panel: Any, labels: Sequence[str], room: int = 0) -> None:
    """Names one line of a panel after the other, from the top; with room for so many, to match a neighbour."""
    panel.set_yticks(range(len(labels)), labels)
    panel.set_ylim(max(len(labels), room) - 0.5, -0.5)
    panel.tick_params(axis="y", length=0)


def legend(figure: Any, handles: dict[str, Any], columns: int = 4) -> None:
    """One for all panels, below them."""
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )


def plain_log(axis: Any) -> None:
    """Ticks of a logarithmic axis as plain numbers, and few of them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())
