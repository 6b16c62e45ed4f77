"""What the demo shows: milliseconds per step, coloured by topology; pictures before and after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accel_hidiff.plot import OTHER_COLOUR, TOPOLOGY_COLOURS


def contact_sheet(rows: Sequence[tuple[str, Sequence[Any]]], captions: Sequence[str]) -> Any:
    """Joins pictures: a row for each way of drawing, a column for each caption.

    Args:
        rows: a label, which may have several lines, and its pictures (PIL), all of one size; rows may differ in size.
        captions: of the columns; " on " starts a second line.

    Returns:
        One PIL picture.
    """
    from PIL import Image, ImageDraw, ImageFont

    gap, head, left, font = 6, 38, 118, ImageFont.load_default(13)
    column = max(pictures[0].width for _, pictures in rows) + gap
    heights = [pictures[0].height + gap for _, pictures in rows]
    whole = Image.new("RGB", (left + column * len(captions), head + sum(heights)), "white")
    pen = ImageDraw.Draw(whole)
    for number, caption in enumerate(captions):
        pen.multiline_text((left + number * column, 3), caption.replace(" on ", "\non "), fill="black", font=font)
    top = head
    for (label, pictures), height in zip(rows, heights, strict=True):
        pen.multiline_text((4, top + height / 2 - 16), label, fill="black", font=font)
        for number, picture in enumerate(pictures):
            whole.paste(picture, (left + number * column, top))
        top += height
    return whole


def plot_steps(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws milliseconds per step, one panel per size.

    Args:
        rows: as `accel_hidiff.demo.serve` reports them; step 0 is not among the times.
        path: a PNG file.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(rows), figsize=(4.4 * len(rows), 4.2), sharey=True, squeeze=False)
    seen: dict[str, Any] = {}
    for panel, row in zip(panels[0], rows, strict=True):
        for start, stop, topology in row["phases"]:
            steps = [step for step in range(start, stop) if step > 0]
            colour = TOPOLOGY_COLOURS.get(topology, OTHER_COLOUR)
            for kind, marker, face in (("eager", "o", "white"), ("compiled", "s", colour)):
                times = [row[f"{kind}_steps_ms"][step - 1] for step in steps]
                style = {"marker": marker, "markersize": 5, "markerfacecolor": face, "color": colour, "linewidth": 1}
                dash = "--" if kind == "eager" else "-"
                (line,) = panel.plot(steps, times, linestyle=dash, label=f"{topology}, {kind}", **style)
                seen.setdefault(f"{topology}, {kind}", line)
            if start > 0:
                panel.axvline(start - 0.5, color="#bbbbbb", linewidth=0.8, zorder=0)
        panel.set_title(f"{row['width']}x{row['height']}")
        panel.set_xlabel("step")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.set_ylim(bottom=0)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("milliseconds per step")
    figure.legend(seen.values(), seen.keys(), loc="lower center", ncols=3, frameon=False)
    figure.tight_layout(rect=(0, 0.14, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)
