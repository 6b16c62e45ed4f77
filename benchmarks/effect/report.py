"""Tables, contact sheets and the plot of guidance, from a record and the pictures that were kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy

from benchmarks.effect.arms import LARGE, SIZES, single
from benchmarks.effect.drawing import SHOWN, file_name, readings_of
from benchmarks.effect.sheets import sheet
from benchmarks.effect.tables import bootstrap, table, wilson
from benchmarks.harness import Size, write_whole

_TITLES: Final = {
    "real": "What the rules read in drawn scenes, and in the same through the autoencoder",
    "scale": "At the training size and above",
    "two objects": "Captions with two objects",
    "T1 and T2": "When RAU-Net ends (shares of the steps)",
    "guidance": "CFG and CFG++",
    "compiled": "Eager and compiled",
}
_COLUMNS: Final = 8
_SIZES: Final = [str(size) for size in (*SIZES, LARGE)]


def write(record: dict[str, Any], out: Path, pictures: Path) -> None:
    """Write `out` with the suffix .md, and PNG files in the folder of its name."""
    folder = out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(out.with_suffix(".md"), _text(record))
    for table_name in _TITLES:
        by_size: dict[str, list[str]] = {}
        for name, row in record["cells"].items():
            if row["table"] == table_name and (pictures / file_name(name)).is_file():
                by_size.setdefault(row["size"], []).append(name)
        for size, names in by_size.items():
            if table_name != "two objects":
                _sheet(record, names, Size.parse(size), folder / f"{_slug(table_name)}-{size}.png", pictures)
    _guidance(record, folder / "guidance.png")


def _text(record: dict[str, Any]) -> str:
    parts = [
        f"`{record['command']}`, {record['steps']} steps; shares and means with intervals at 95 %. Columns are "
        "explained in `benchmarks/effect/reading.py`; lengths are in units of the canvas' shorter side.\n"
    ]
    for name, title in _TITLES.items():
        rows = [row for row in record["cells"].values() if row["table"] == name]
        rows.sort(key=lambda row: _SIZES.index(row["size"]))
        if rows:
            parts.append(f"## {title}\n\n{table(rows)}\n")
    return "\n".join(parts)


def _sheet(record: dict[str, Any], names: list[str], size: Size, out: Path, pictures: Path) -> None:
    captions = [prompt.text for prompt in single(min(SHOWN, _COLUMNS))]
    rows = [(_label(record["cells"][name]["arm"]), pictures / file_name(name)) for name in names]
    sheet(rows, captions, 128, (size.width, size.height), out)


def _label(arm: str) -> str:
    return arm.replace(", ", ",\n")


def _slug(name: str) -> str:
    return name.replace(" ", "-").lower()


def _guidance(record: dict[str, Any], out: Path) -> None:
    """Saturation and the share of right pictures over the strength, CFG beside CFG++ at the pairs of its paper."""
    rows = [row for row in record["cells"].values() if row["table"] == "guidance"]
    if not rows:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes = [str(size) for size in (SIZES[0], SIZES[2])]
    figure, panels = plt.subplots(2, len(sizes), figsize=(4.4 * len(sizes), 6), squeeze=False, sharex=True)
    for column, size in enumerate(sizes):
        real = record["cells"].get(f"real: drawn, {size}")
        for kind, colour in (("CFG", "#d62728"), ("CFG++", "#1f77b4")):
            some = [row for row in rows if row["size"] == size and (row["lambda"] is not None) == (kind == "CFG++")]
            places = range(len(some))
            saturation = [[reading.saturation for reading in readings_of(row)] for row in some]
            right = [[reading.right for reading in readings_of(row)] for row in some]
            _curve(panels[0][column], places, [(numpy.mean(v), *bootstrap(v)) for v in saturation], colour, kind)
            shares = [(sum(v) / len(v), *wilson(sum(v), len(v))) for v in right]
            _curve(panels[1][column], places, shares, colour, kind)
        if real:
            level = numpy.mean([reading.saturation for reading in readings_of(real)])
            panels[0][column].axhline(level, color="#888888", linewidth=0.8, linestyle=":", label="drawn scenes")
        pairs = [row for row in rows if row["size"] == size]
        ticks = [f"w {a['scale']:g}\n\u03bb {b['lambda']:g}" for a, b in zip(pairs[::2], pairs[1::2], strict=False)]
        panels[1][column].set_xticks(range(len(ticks)), ticks)
        panels[0][column].set_title(size)
    panels[0][0].set_ylabel("saturation of objects")
    panels[1][0].set_ylabel("one right object, share")
    panels[0][0].legend(frameon=False)
    for panel in panels.flat:
        panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    plt.close(figure)


def _curve(panel: Any, places: Any, points: list[tuple[float, float, float]], colour: str, label: str) -> None:
    middle = [point[0] for point in points]
    spans = [[point[0] - point[1] for point in points], [point[2] - point[0] for point in points]]
    panel.errorbar(list(places), middle, yerr=spans, color=colour, marker="o", markersize=4, capsize=3, label=label)
