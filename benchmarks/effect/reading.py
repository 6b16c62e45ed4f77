"""What a picture shows, by plain rules: how many objects, how large, which colour and shape, how sharp, how burnt.

Every pixel gets the nearest colour of the palette that scenes are drawn with; connected areas of object colours are
objects. The rules look at a copy whose shorter side is 128 pixels, so that they ask the same of every size. How often
they are wrong about drawn scenes, whose truth is known, is the first table of every run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import numpy
from PIL import Image
from scipy import ndimage

from accel_hidiff.demo.scenes import BACKGROUNDS, COLOURS, DETAIL, SHADE, SHAPES, Thing, silhouette

Kind = tuple[str, str]  # shape and colour
Pixels = numpy.ndarray[Any, numpy.dtype[numpy.uint8]]
Mask = numpy.ndarray[Any, numpy.dtype[numpy.bool_]]

SIDE: Final = 128  # shorter side of what the rules look at, pixels
SMALLEST: Final = 0.01  # of an object's area, in squares of the shorter side: a tenth of the smallest single object
EXTENTS: Final = (0.6, 0.98)  # of single objects in the training data, 0.66 to 0.92, and what the rules may be wrong by
_TEMPLATE: Final = 32
_EDGE: Final = 3  # pixels of the small copy
_TOUCHING: Final = numpy.ones((3, 3))


@dataclass(frozen=True)
class Reading:
    """One picture. Lengths are in units of the canvas' shorter side, areas in its square.

    `objects` found and `wanted`; `extent` and `area` of the largest, 0 without one; `colours_right` and `shapes_right`:
    the objects found are just those of the caption in that respect, and so in number; `sharpness`: the 99.5th
    percentile of the difference in lightness of neighbours, 0 to 1, at full size; `saturation`: mean of (max - min)
    over the channels of object pixels, 0 to 1; `clipped`: share of all channel values at the very edge of what a file
    can hold; `mottling`: root mean square distance of a pixel's colour, each channel 0 to 1, from the mean colour of
    what it belongs to, an object or the background, away from their edges; None in records of before it was measured.
    """

    objects: int
    wanted: int
    extent: float
    area: float
    colours_right: bool
    shapes_right: bool
    sharpness: float
    saturation: float
    clipped: float
    mottling: float | None = None

    @property
    def count_right(self) -> bool:
        """As many objects as the caption names."""
        return self.objects == self.wanted

    @property
    def duplicated(self) -> bool:
        """More objects than the caption names."""
        return self.objects > self.wanted

    @property
    def scale_right(self) -> bool:
        """The largest object is as large as a single object of the training data (meant for captions with one)."""
        return EXTENTS[0] <= self.extent <= EXTENTS[1]

    @property
    def right(self) -> bool:
        """The caption's objects, and no others, in number, colour and shape."""
        return self.count_right and self.colours_right and self.shapes_right


def read(image: Pixels, kinds: Sequence[Kind]) -> Reading:
    """Read a picture, (height, width, 3) uint8, that was asked for with a caption of these objects."""
    small = _small(image)
    names, colour_of = _nearest(small)
    areas, count = ndimage.label(names, structure=_TOUCHING)
    found = []
    for number in range(1, count + 1):
        mask = areas == number
        filled = ndimage.binary_fill_holes(mask)
        area = float(filled.sum()) / SIDE**2
        if area >= SMALLEST:
            found.append((area, mask, filled))
    found.sort(key=lambda item: -item[0])
    colours = [_colour(colour_of, mask) for _, mask, _ in found]
    shapes = [_shape(mask) for _, mask, _ in found]
    extent = max(_box(found[0][1])[2:]) / SIDE if found else 0.0
    values = image.astype(numpy.float32) / 255
    spread = (small.max(-1).astype(numpy.float32) - small.min(-1)) / 255
    return Reading(
        objects=len(found),
        wanted=len(kinds),
        extent=extent,
        area=found[0][0] if found else 0.0,
        colours_right=Counter(colours) == Counter(colour for _, colour in kinds),
        shapes_right=Counter(shapes) == Counter(shape for shape, _ in kinds),
        sharpness=_sharpness(values),
        saturation=float(spread[names].mean()) if names.any() else 0.0,
        clipped=float(((image <= 1) | (image >= 254)).mean()),
        mottling=_mottling(small, [mask for _, mask, _ in found], [filled for *_, filled in found]),
    )


def _small(image: Pixels) -> Pixels:
    height, width = image.shape[:2]
    scale = SIDE / min(height, width)
    if scale == 1:
        return image
    size = (round(width * scale), round(height * scale))
    return numpy.asarray(
        Image.fromarray(image).resize(size, Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC)
    )


@cache
def _palette() -> tuple[numpy.ndarray[Any, Any], numpy.ndarray[Any, Any]]:
    """The colours of scenes, (N, 3), and which object colour each is; -1 for backgrounds and details."""
    entries = [(colour, number) for number, colour in enumerate(COLOURS.values())]
    entries += [(tuple(SHADE * c for c in colour), number) for number, colour in enumerate(COLOURS.values())]
    entries += [(colour, -1) for colour in (*BACKGROUNDS.values(), DETAIL)]
    return numpy.array([colour for colour, _ in entries], numpy.float32), numpy.array([number for _, number in entries])


def _nearest(image: Pixels) -> tuple[Mask, numpy.ndarray[Any, Any]]:
    """Which pixels are of an object's colour, and the number of that colour (-1: of none)."""
    palette, owners = _palette()
    flat = image.reshape(-1, 3).astype(numpy.float32)
    distances = ((flat[:, None] - palette[None]) ** 2).sum(-1)
    owner = owners[distances.argmin(1)].reshape(image.shape[:2])
    return owner >= 0, owner


def _colour(owner: numpy.ndarray[Any, Any], mask: Mask) -> str:
    return list(COLOURS)[int(numpy.bincount(owner[mask]).argmax())]


def _box(mask: Mask) -> tuple[int, int, int, int]:
    """Top, left, height and width of the box around a mask."""
    rows, columns = (numpy.flatnonzero(mask.any(axis)) for axis in (1, 0))
    return int(rows[0]), int(columns[0]), int(rows[-1] - rows[0] + 1), int(columns[-1] - columns[0] + 1)


def _normalized(mask: Mask) -> Mask:
    """A mask without holes, in the middle of a square as large as its longer side, at 32x32."""
    top, left, height, width = _box(mask)
    side = max(height, width)
    square = numpy.zeros((side, side), bool)
    down, right = (side - height) // 2, (side - width) // 2
    square[down : down + height, right : right + width] = mask[top : top + height, left : left + width]
    filled = ndimage.binary_fill_holes(square)
    image = Image.fromarray(filled.astype(numpy.uint8) * 255).resize((_TEMPLATE, _TEMPLATE), Image.Resampling.BOX)
    small: Mask = numpy.asarray(image) > 127
    return small


@cache
def _templates() -> dict[str, Mask]:
    return {name: _normalized(silhouette(Thing(name, "red", (0.5, 0.5), 0.9), SIDE, SIDE)) for name in SHAPES}


def _shape(mask: Mask) -> str:
    """The shape whose silhouette has the largest intersection over union with a mask; "none" where none has half."""
    small = _normalized(mask)
    likeness = {name: float((small & t).sum() / (small | t).sum()) for name, t in _templates().items()}
    best = max(likeness, key=lambda name: likeness[name])
    return best if likeness[best] >= 0.5 else "none"


def _mottling(image: Pixels, objects: Sequence[Mask], filled: Sequence[Mask]) -> float:
    """Details (windows, eyes) are of no area's colour, and count with the edges that are left out."""
    whole = numpy.zeros(image.shape[:2], bool)
    for mask in filled:
        whole |= mask
    errors = []
    for area in (*objects, ~whole):
        inner = image[ndimage.binary_erosion(area, iterations=_EDGE)].astype(numpy.float32) / 255
        if len(inner):
            errors.append((inner - inner.mean(0)) ** 2)
    return float(numpy.sqrt(numpy.concatenate(errors).mean())) if errors else 0.0


def _sharpness(values: numpy.ndarray[Any, Any]) -> float:
    light = values @ numpy.array([0.2126, 0.7152, 0.0722], numpy.float32)
    steps = numpy.concatenate([numpy.abs(numpy.diff(light, axis=axis)).ravel() for axis in (0, 1)])
    return float(numpy.percentile(steps, 99.5))
