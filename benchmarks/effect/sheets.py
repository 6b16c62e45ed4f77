"""Contact sheets: rows are ways of drawing, columns are captions; one look tells what a table says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from PIL import Image

from accel_hidiff.demo.plot import contact_sheet
from benchmarks.harness import Size

_WIDTH: Final = 128  # of one picture in a sheet


def sheet(rows: Sequence[tuple[str, Path]], captions: Sequence[str], size: Size, out: Path) -> None:
    """Join the strips that `drawing.kept` wrote, of pictures of one size, and write a WebP file.

    Args:
        rows: a label and a strip of pictures each.
        captions: of the columns; as many pictures of each strip are shown.
        size: of one picture in a strip.
        out: file to write.
    """
    shown = (_WIDTH, round(_WIDTH * size.height / size.width))
    pictures = []
    for label, path in rows:
        with Image.open(path) as strip:
            boxes = [
                (column * size.width, 0, (column + 1) * size.width, size.height) for column in range(len(captions))
            ]
            pictures.append((label, [strip.crop(box).resize(shown, Image.Resampling.LANCZOS) for box in boxes]))
    contact_sheet(pictures, captions).convert("RGB").save(out, quality=85, method=6)
