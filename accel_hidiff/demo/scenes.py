"""Drawn scenes with captions: what the demo model is trained on, and what its images are measured against.

A scene is one object (some have two or three) that fills most of the canvas, on a background of soft texture. It is
described in units of the canvas' shorter side, so that one scene can be drawn at any size of its aspect ratio: a
picture above the training size is the same picture, larger. Everything comes from the random generator that is given;
the same seed gives the same scenes and pixels.

>>> scene = random_scene(numpy.random.default_rng(7))
>>> draw(scene, 128, 128).shape
(128, 128, 3)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy
from PIL import Image, ImageDraw

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "DETAIL",
    "SHADE",
    "SHAPES",
    "Scene",
    "Thing",
    "caption",
    "captions",
    "draw",
    "random_scene",
    "silhouette",
    "vocabulary",
]

Colour = tuple[int, int, int]
Point = tuple[float, float]
Part = tuple[str, tuple[Point, ...], str]  # what to draw, its points in the object's unit box, and with what

# sRGB, 0 to 255. Objects are strong in colour but not at the edge of what sRGB has, so that burnt colours show as such;
# backgrounds are pale, so that an object of one colour and a background of the same word can be told apart.
COLOURS: Final[dict[str, Colour]] = {
    "red": (200, 52, 48),
    "orange": (226, 132, 40),
    "green": (52, 142, 70),
    "blue": (44, 86, 184),
    "purple": (128, 58, 158),
    "black": (44, 42, 48),
}
BACKGROUNDS: Final[dict[str, Colour]] = {
    "white": (232, 232, 228),
    "yellow": (232, 218, 150),
    "pink": (228, 178, 188),
    "blue": (158, 200, 230),
    "grey": (168, 170, 174),
}
DETAIL: Final[Colour] = (246, 240, 222)  # windows, eyes
SHADE: Final = 0.72  # of the object's colour: roofs, trunks

_ONE: Final = (0.66, 0.92)  # extent of a single object, in units of the shorter side
_SEVERAL: Final = (0.78, 0.92)  # extent of one of several, in units of its cell
_COUNTS: Final = ((1, 0.84), (2, 0.12), (3, 0.04))  # objects in a scene, and how often
_NUMBERS: Final = {2: "two", 3: "three"}


@dataclass(frozen=True)
class Thing:
    """One object: shape and colour by name; centre and extent (longer side of its box) in units of the shorter side."""

    shape: str
    colour: str
    centre: Point
    extent: float


@dataclass(frozen=True)
class Scene:
    """What is drawn: its objects, the name of the background, and the seed of texture and tints."""

    things: tuple[Thing, ...]
    background: str
    seed: int


def _circle(around: Point, radius: float, fill: str = "main") -> Part:
    (x, y) = around
    return ("ellipse", ((x - radius, y - radius), (x + radius, y + radius)), fill)


def _bar(start: Point, end: Point, width: float, fill: str = "main") -> Iterator[Part]:
    """A bar with round ends."""
    length = math.dist(start, end)
    across = ((end[1] - start[1]) / length * width / 2, (start[0] - end[0]) / length * width / 2)
    corners = [(p[0] + sign * across[0], p[1] + sign * across[1]) for p, sign in ((start, 1), (end, 1), (end, -1))]
    corners.append((start[0] - across[0], start[1] - across[1]))
    yield ("polygon", tuple(corners), fill)
    yield _circle(start, width / 2, fill)
    yield _circle(end, width / 2, fill)


def _circle_shape() -> list[Part]:
    return [_circle((0.5, 0.5), 0.5)]


def _square() -> list[Part]:
    return [("polygon", ((0.05, 0.05), (0.95, 0.05), (0.95, 0.95), (0.05, 0.95)), "main")]


def _triangle() -> list[Part]:
    return [("polygon", ((0.5, 0.02), (1.0, 0.95), (0.0, 0.95)), "main")]


def _star() -> list[Part]:
    points = []
    for corner in range(10):
        radius = 0.52 if corner % 2 == 0 else 0.22
        angle = math.pi * corner / 5
        points.append((0.5 + radius * math.sin(angle), 0.52 - radius * math.cos(angle)))
    return [("polygon", tuple(points), "main")]


def _house() -> list[Part]:
    return [
        ("polygon", ((0.1, 0.42), (0.9, 0.42), (0.9, 1.0), (0.1, 1.0)), "main"),
        ("polygon", ((0.5, 0.0), (1.0, 0.46), (0.0, 0.46)), "shade"),
        ("polygon", ((0.4, 0.68), (0.6, 0.68), (0.6, 1.0), (0.4, 1.0)), "shade"),
        ("polygon", ((0.18, 0.54), (0.34, 0.54), (0.34, 0.7), (0.18, 0.7)), "detail"),
        ("polygon", ((0.66, 0.54), (0.82, 0.54), (0.82, 0.7), (0.66, 0.7)), "detail"),
    ]


def _person() -> list[Part]:
    return [
        *_bar((0.5, 0.36), (0.5, 0.6), 0.26),
        *_bar((0.46, 0.36), (0.2, 0.56), 0.1),
        *_bar((0.54, 0.36), (0.8, 0.56), 0.1),
        *_bar((0.44, 0.62), (0.36, 0.94), 0.12),
        *_bar((0.56, 0.62), (0.64, 0.94), 0.12),
        _circle((0.5, 0.15), 0.15),
        _circle((0.44, 0.13), 0.028, "detail"),
        _circle((0.56, 0.13), 0.028, "detail"),
    ]


def _fish() -> list[Part]:
    return [
        ("polygon", ((0.66, 0.5), (1.0, 0.22), (1.0, 0.78)), "shade"),
        ("ellipse", ((0.0, 0.2), (0.78, 0.8)), "main"),
        _circle((0.2, 0.42), 0.06, "detail"),
    ]


def _tree() -> list[Part]:
    return [
        ("polygon", ((0.42, 0.6), (0.58, 0.6), (0.6, 1.0), (0.4, 1.0)), "shade"),
        _circle((0.5, 0.26), 0.26),
        _circle((0.28, 0.46), 0.22),
        _circle((0.72, 0.46), 0.22),
        _circle((0.5, 0.5), 0.22),
    ]


SHAPES: Final[dict[str, Callable[[], list[Part]]]] = {
    "circle": _circle_shape,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "house": _house,
    "person": _person,
    "fish": _fish,
    "tree": _tree,
}


def vocabulary() -> tuple[str, ...]:
    """Every word that a caption can contain."""
    plurals = [_plural(shape) for shape in SHAPES]
    return tuple(dict.fromkeys(("a", "an", "and", "on", *_NUMBERS.values(), *COLOURS, *BACKGROUNDS, *SHAPES, *plurals)))


def random_scene(rng: numpy.random.Generator, *, aspect: float = 1.0, objects: int | None = None) -> Scene:
    """Choose a scene.

    Args:
        rng: gives every choice.
        aspect: width over height of the canvas that it is for.
        objects: how many; by default one, two or three, as the training data has them.
    """
    width, height = max(aspect, 1.0), max(1 / aspect, 1.0)
    if objects is None:
        objects = int(rng.choice([count for count, _ in _COUNTS], p=[share for _, share in _COUNTS]))
    twins = objects > 1 and rng.random() < 0.5
    kinds = [(str(rng.choice(list(SHAPES))), str(rng.choice(list(COLOURS)))) for _ in range(1 if twins else objects)]
    across = width >= height
    cell_width, cell_height = (width / objects, height) if across else (width, height / objects)
    things = []
    for number in range(objects):
        shape, colour = kinds[0] if twins else kinds[number]
        extent = float(rng.uniform(*(_ONE if objects == 1 else _SEVERAL))) * min(cell_width, cell_height)
        left, top = (number * cell_width, 0.0) if across else (0.0, number * cell_height)
        x = left + extent / 2 + float(rng.random()) * (cell_width - extent)
        y = top + extent / 2 + float(rng.random()) * (cell_height - extent)
        things.append(Thing(shape, colour, (x, y), extent))
    return Scene(tuple(things), str(rng.choice(list(BACKGROUNDS))), int(rng.integers(2**31)))


def caption(scene: Scene) -> str:
    """The scene in words.

    >>> caption(Scene((Thing("house", "orange", (0.5, 0.5), 0.8),), "grey", 0))
    'an orange house on grey'
    >>> caption(Scene((Thing("fish", "red", (0.2, 0.5), 0.4), Thing("fish", "red", (0.7, 0.5), 0.4)), "blue", 0))
    'two red fish on blue'
    """
    kinds = [(thing.shape, thing.colour) for thing in scene.things]
    if len(kinds) > 1 and len(set(kinds)) == 1:
        subject = f"{_NUMBERS[len(kinds)]} {kinds[0][1]} {_plural(kinds[0][0])}"
    else:
        subject = " and ".join(f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape}" for shape, colour in kinds)
    return f"{subject} on {scene.background}"


def captions() -> list[str]:
    """Every caption of a scene with one object, in a fixed order: shapes x colours x backgrounds."""
    return [
        caption(Scene((Thing(shape, colour, (0.5, 0.5), 0.75),), background, 0))
        for shape in SHAPES
        for colour in COLOURS
        for background in BACKGROUNDS
    ]


def draw(scene: Scene, height: int, width: int) -> numpy.ndarray[Any, numpy.dtype[numpy.uint8]]:
    """Draw a scene.

    Args:
        scene: for a canvas of about this aspect ratio.
        height, width: of the canvas, in pixels.

    Returns:
        (height, width, 3), uint8, sRGB.
    """
    rng = numpy.random.default_rng(scene.seed)
    picture = Image.fromarray(_background(rng, BACKGROUNDS[scene.background], height, width))
    for thing in scene.things:
        tint = _jittered(rng, COLOURS[thing.colour])
        fills = {"main": tint, "shade": _scaled(tint, SHADE), "detail": DETAIL}
        for part in SHAPES[thing.shape]():
            _paint(picture, thing, part, fills[part[2]])
    return numpy.asarray(picture)


def silhouette(thing: Thing, height: int, width: int) -> numpy.ndarray[Any, numpy.dtype[numpy.bool_]]:
    """Which pixels of a canvas an object covers: (height, width), bool."""
    canvas = Image.new("RGB", (width, height))
    for part in SHAPES[thing.shape]():
        _paint(canvas, thing, part, (255, 255, 255))
    covered: numpy.ndarray[Any, numpy.dtype[numpy.bool_]] = numpy.asarray(canvas)[..., 0] > 127
    return covered


_SMOOTH: Final = 4  # an object's edges are drawn this many times larger, then averaged


def _paint(picture: Image.Image, thing: Thing, part: Part, fill: Colour) -> None:
    kind, points, _ = part
    unit = min(picture.size)
    left, top = thing.centre[0] - thing.extent / 2, thing.centre[1] - thing.extent / 2
    spots = [((left + x * thing.extent) * unit, (top + y * thing.extent) * unit) for x, y in points]
    # Only the box around the part is drawn large.
    x0, y0 = (max(math.floor(min(spot[axis] for spot in spots)) - 1, 0) for axis in (0, 1))
    x1, y1 = (min(math.ceil(max(spot[axis] for spot in spots)) + 1, picture.size[axis]) for axis in (0, 1))
    if x1 <= x0 or y1 <= y0:
        return
    mask = Image.new("L", ((x1 - x0) * _SMOOTH, (y1 - y0) * _SMOOTH))
    large = [((x - x0) * _SMOOTH, (y - y0) * _SMOOTH) for x, y in spots]
    pen = ImageDraw.Draw(mask)
    if kind == "ellipse":
        pen.ellipse(large, fill=255)
    else:
        pen.polygon(large, fill=255)
    picture.paste(fill, (x0, y0), mask.reduce(_SMOOTH))


def _background(
    rng: numpy.random.Generator, colour: Colour, height: int, width: int
) -> numpy.ndarray[Any, numpy.dtype[numpy.uint8]]:
    """A gradient with soft waves, faint enough never to be taken for an object."""
    unit = min(height, width)
    y, x = numpy.mgrid[0:height, 0:width].astype(numpy.float32) / unit
    angle, slope = rng.uniform(0, 2 * math.pi), rng.uniform(0, 14)
    light = slope * (math.cos(angle) * (x - 0.5) + math.sin(angle) * (y - 0.5))
    for _ in range(3):
        angle, waves, turn, height_of = (rng.uniform(*span) for span in ((0, 2 * math.pi), (1, 7), (0, 7), (1, 5)))
        light += height_of * numpy.sin(2 * math.pi * waves * (math.cos(angle) * x + math.sin(angle) * y) + turn)
    base = numpy.array(_jittered(rng, colour), numpy.float32)
    painted: numpy.ndarray[Any, numpy.dtype[numpy.uint8]]
    painted = (base + light[..., None]).clip(0, 255).round().astype(numpy.uint8)
    return painted


def _jittered(rng: numpy.random.Generator, colour: Colour) -> Colour:
    red, green, blue = (min(max(channel + int(rng.integers(-8, 9)), 0), 255) for channel in colour)
    return red, green, blue


def _scaled(colour: Colour, factor: float) -> Colour:
    red, green, blue = (round(channel * factor) for channel in colour)
    return red, green, blue


def _plural(shape: str) -> str:
    return {"person": "people", "fish": "fish"}.get(shape, shape + "s")
