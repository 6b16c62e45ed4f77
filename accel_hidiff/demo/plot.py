"""What the demo shows: milliseconds per step, coloured by topology; pictures before and after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accel_hidiff.plot import OTHER_COLOUR, TOPOLOGY_COLOURS


def before_and_after(sizes: list[tuple[str, list[list[Any]]]], captions: Sequence[str], path: Path) -> None:
    """Joins pictures: two rows for each size, the model as it was and HiDiffusion, a column for each caption.

    Args:
        sizes: a name, then for each of the two rows the pictures, (height, width, 3), float in [0, 1].
        captions: of the columns.
        path: a PNG file.
    """
    import numpy
    from PIL import Image, ImageDraw, ImageFont

    gap, head, font = 6, 22, ImageFont.load_default(13)
    widths = [rows[0][0].shape[1] for _, rows in sizes]
    heights = [rows[0][0].shape[0] for _, rows in sizes]
    left, column = 110, max(widths) + gap
    whole = Image.new("RGB", (left + column * len(captions), head + sum(2 * (h + gap) for h in heights)), "white")
    pen = ImageDraw.Draw(whole)
    for number, caption in enumerate(captions):
        pen.text((left + number * column, 4), caption, fill="black", font=font)
    top = head
    for (name, rows), height in zip(sizes, heights, strict=True):
        for label, row in zip(("as it was", "HiDiffusion"), rows, strict=True):
            pen.multiline_text((4, top + height / 2 - 14), f"{name}\n{label}", fill="black", font=font)
            for number, picture in enumerate(row):
                pixels = (numpy.asarray(picture) * 255).round().astype("uint8")
                whole.paste(Image.fromarray(pixels), (left + number * column, top))
            top += height + gap
    whole.save(path)


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
