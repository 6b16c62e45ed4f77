"""Tables, contact sheets and the plot of guidance, from a record and the pictures that were kept."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.effect.arms import (
    BOTH,
    COMPILED,
    FOURFOLD,
    LARGE,
    PLAIN,
    RAUNET,
    SIZES,
    WINDOWS,
    guidance_pairs,
    single,
)
from benchmarks.effect.drawing import file_name
from benchmarks.effect.plot import plot_guidance
from benchmarks.effect.sheets import sheet
from benchmarks.effect.tables import differences, table
from benchmarks.harness import Size, write_whole

_TITLES: Final = {
    "real": "What the rules read in drawn scenes, and in the same through the autoencoder",
    "scale": "At the training size and above",
    "two objects": "Captions with two objects",
    "T1 and T2": "When RAU-Net ends (shares of the steps)",
    "guidance": "CFG and CFG++",
    "compiled": "Eager and compiled",
}
_COMPARED: Final = {
    "scale": [(arm.name, PLAIN.name) for arm in (RAUNET, WINDOWS, BOTH, FOURFOLD)] + [(BOTH.name, RAUNET.name)],
    "two objects": [(BOTH.name, PLAIN.name)],
    "guidance": [(cfg.name, cfgpp.name) for cfg, cfgpp in guidance_pairs()],
    "compiled": [(COMPILED.name, BOTH.name)],
}
_COLUMNS: Final = 8
_SIZES: Final = [str(size) for size in (*SIZES, LARGE)]


def write(record: dict[str, Any], out: Path, pictures: Path) -> None:
    """Write `out` with the suffix .md, and PNG files in the folder of its name."""
    folder = out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(out.with_suffix(".md"), _text(record))
    for name in _TITLES:
        if name not in ("real", "two objects"):  # of which no strips are kept, or not of the captions of `single`
            _sheets(record, name, folder, pictures)
    guidance = _rows(record, "guidance")
    if guidance:
        drawn = [row for row in _rows(record, "real") if row["arm"] == "drawn"]
        plot_guidance(guidance, drawn, folder / "guidance.png")


def _rows(record: dict[str, Any], table_name: str) -> list[dict[str, Any]]:
    """The cells of a table, smaller sizes first."""
    rows = [{"name": name, **row} for name, row in record["cells"].items() if row["table"] == table_name]
    return sorted(rows, key=lambda row: _SIZES.index(row["size"]))


def _sheets(record: dict[str, Any], table_name: str, folder: Path, pictures: Path) -> None:
    """One sheet for each size of a table, of the cells whose pictures are still there."""
    rows = [row for row in _rows(record, table_name) if (pictures / file_name(row["name"])).is_file()]
    for size, some in itertools.groupby(rows, key=lambda row: str(row["size"])):
        cells = list(some)
        captions = [prompt.text for prompt in single(min(_COLUMNS, *(len(row["readings"]) for row in cells)))]
        strips = [(row["arm"].replace(", ", ",\n"), pictures / file_name(row["name"])) for row in cells]
        sheet(strips, captions, Size.parse(size), folder / f"{table_name.replace(' ', '-').lower()}-{size}.webp")


def _text(record: dict[str, Any]) -> str:
    parts = [
        "Shares and means with intervals at 95 %. Columns are explained in `benchmarks/effect/reading.py`; lengths are "
        "in units of the canvas' shorter side, areas in its square. A Frechet distance depends on the number of "
        "pictures: compare it with that of as many drawn scenes, in the first table. The runs:\n",
        "\n".join(f"- `{run['command']}`" for run in record["runs"]) + "\n",
    ]
    for name, title in _TITLES.items():
        rows = _rows(record, name)
        if rows:
            parts.append(f"## {title}\n\n{table(rows)}\n")
        pairs = _pairs(name, rows)
        if pairs:
            parts.append(f"The same captions and noise, first less second:\n\n{differences(pairs)}\n")
    return "\n".join(parts)


def _pairs(name: str, rows: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Which cells of a table are compared picture by picture: of one size, number of steps, and captions."""
    pairs = []
    for _, some in itertools.groupby(sorted(rows, key=_alike), key=_alike):
        by_arm = {row["arm"]: row for row in some}
        pairs += [(by_arm[one], by_arm[base]) for one, base in _COMPARED.get(name, ()) if {one, base} <= set(by_arm)]
    return pairs


def _alike(row: dict[str, Any]) -> tuple[int, int, int]:
    """What cells have in common whose pictures can be compared one by one."""
    return _SIZES.index(row["size"]), len(row["readings"]), row.get("steps", 0)
