"""Contact sheets: rows are ways of drawing, columns are captions; one look tells what a table says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

_LABEL = 150  # pixels, left of a row
_GAP = 4


def sheet(
    rows: Sequence[tuple[str, Path]], columns: Sequence[str], width: int, side: tuple[int, int], out: Path
) -> None:
    """Join the strips that `drawing.kept` wrote.

    Args:
        rows: a label and a strip of pictures each.
        columns: captions; as many pictures of each strip are shown.
        width: of one shown picture in pixels.
        side: width and height of one picture in a strip.
        out: PNG file.
    """
    height = round(width * side[1] / side[0])
    font, head = ImageFont.load_default(13), 34
    whole = Image.new("RGB", (_LABEL + len(columns) * (width + _GAP), head + len(rows) * (height + _GAP)), "white")
    pen = ImageDraw.Draw(whole)
    for column, caption in enumerate(columns):
        words = caption.split(" on ")
        lines = f"{words[0]}\non {words[1]}" if len(words) == 2 else caption
        pen.multiline_text((_LABEL + column * (width + _GAP) + 2, 2), lines, fill="black", font=font, spacing=1)
    for number, (label, path) in enumerate(rows):
        top = head + number * (height + _GAP)
        pen.multiline_text((4, top + height / 2 - 12), label, fill="black", font=font)
        with Image.open(path) as strip:
            for column in range(len(columns)):
                box = (column * side[0], 0, (column + 1) * side[0], side[1])
                picture = strip.crop(box).resize((width, height), Image.Resampling.LANCZOS)
                whole.paste(picture, (_LABEL + column * (width + _GAP), top))
    whole.quantize(192, dither=Image.Dither.NONE).save(out, optimize=True)
