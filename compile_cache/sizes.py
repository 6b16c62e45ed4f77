"""Families of image-size buckets: which sizes in pixels a service has compiled, and what becomes of every other size.

>>> from compile_cache.sizes import ShapeBuckets
>>> family = ShapeBuckets.aspect_ratios() + ShapeBuckets.symbolic(minimum=512, maximum=768)
>>> [str(family.find(*size).bucket) for size in ((832, 1216), (576, 768), (1000, 1500))]
['832x1216', 'symbolic (width 512..768 step 64, height 512..768 step 64)', 'None']
>>> family.snap(1000, 1500).reason
'1000x1500 is in no bucket; nearest is 832x1216 (aspect ratio 0.684 for 0.667, 67 % of the area)'

The metric of every "nearest" here is ``4 * |log(ratio / wanted ratio)| + |log(area / wanted area)|``, where the ratio
is width / height: a wrong aspect ratio counts four times as much as the same error of the area. Sums and not squares:
how far the area is off then does not change which aspect ratio wins. It is compared as an exact fraction. On a tie the
size with fewer pixels is nearer, then the one with the smaller width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import floor, inf, isqrt
from typing import Any, Final, TypeAlias

from .buckets import Range
from .errors import one_line

SDXL_TRAINING_SIZES: Final[tuple[tuple[int, int], ...]] = (
    *((2048, 512), (1984, 512), (1920, 512), (1856, 512), (1792, 576), (1728, 576), (1664, 576), (1600, 640)),
    *((1536, 640), (1472, 704), (1408, 704), (1344, 704), (1344, 768), (1280, 768), (1216, 832), (1152, 832)),
    *((1152, 896), (1088, 896), (1088, 960), (1024, 960), (1024, 1024), (960, 1024), (960, 1088), (896, 1088)),
    *((896, 1152), (832, 1152), (832, 1216), (768, 1280), (768, 1344), (704, 1408), (704, 1472), (640, 1536)),
    *((640, 1600), (576, 1664), (576, 1728), (576, 1792), (512, 1856), (512, 1920), (512, 1984), (512, 2048)),
)
"""The 40 (width, height) of SDXL's multi-aspect training, in the order of Appendix I of arXiv 2307.01952.

The table of the paper lists height before width. It is not symmetric: 1344x704 is in it, 704x1344 is not.
"""

_RATIO_WEIGHT: Final = 4
_SHOWN: Final = 4  # buckets that the text of a family names
_Rank: TypeAlias = tuple[Fraction, int | Fraction, int]


def _check(**values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__}; pass a whole number of pixels")
        if not 1 <= value < 2**63:
            got = value if value.bit_length() <= 64 else f"a number of {value.bit_length()} bits"
            raise ValueError(f"{name}: expected 1 to 2**63 - 1, got {got}; pass a whole number of pixels")


def _rank(width: int, height: int, to_width: int, to_height: int | Fraction) -> _Rank:
    """Return the sort key of a size for the request ``width`` x ``height``; its first item is exp(metric)."""
    area = to_width * to_height
    wider, larger = Fraction(to_width * height, width * to_height), Fraction(area, width * height)
    cost: Fraction = max(wider, 1 / wider) ** _RATIO_WEIGHT * max(larger, 1 / larger)
    return cost, area, to_width


@dataclass(frozen=True)
class SizeBucket:
    """The image sizes that one artifact serves, in pixels.

    Args:
        name: what messages and JSON call it: printable, not empty.
        width: the widths.
        height: the heights.
        max_area: the most pixels of one image, at least those of the smallest size; None for no limit.

    Raises:
        TypeError, ValueError: if a value is of another type, the name is not as said, or no size is in the bucket.
    """

    name: str
    width: Range
    height: Range
    max_area: int | None = None

    def __post_init__(self) -> None:
        for name, kind in (("name", str), ("width", Range), ("height", Range)):
            if not isinstance(value := getattr(self, name), kind):
                got = type(value).__name__
                raise TypeError(f"{name}: expected {kind.__name__}, got {got}; for one size use Range.exactly(n)")
        if not self.name or not self.name.isprintable():
            raise ValueError(f"name: expected printable text, got {one_line(repr(self.name))}; give the bucket a name")
        if self.max_area is not None:
            _check(max_area=self.max_area)
            least = self.width.minimum * self.height.minimum
            if self.max_area < least:
                raise ValueError(f"max_area: expected at least {least}, got {self.max_area}; else no size is served")

    @property
    def is_exact(self) -> bool:
        """Whether the width and the height are one size each."""
        return self.width.is_exact and self.height.is_exact

    @property
    def count(self) -> int:
        """How many sizes the bucket holds, at least 1."""
        wide, high = self.width, self.height
        rows = (high.maximum - high.minimum) // high.multiple + 1
        if self.max_area is None:
            return ((wide.maximum - wide.minimum) // wide.multiple + 1) * rows
        columns = range(wide.minimum, min(wide.maximum, self.max_area // high.minimum) + 1, wide.multiple)
        return sum(min(rows, (self.max_area // column - high.minimum) // high.multiple + 1) for column in columns)

    def reject(self, width: int, height: int) -> str | None:
        """Return None if the size is in the bucket, otherwise why it is not, such as "width: 1000 is not 832"."""
        for name, allowed, value in (("width", self.width, width), ("height", self.height, height)):
            if (reason := allowed.reject(value)) is not None:
                return f"{name}: {reason}"
        if self.max_area is not None and width * height > self.max_area:
            return f"area: {width}x{height} is {width * height} pixels, over the maximum {self.max_area}"
        return None

    def nearest(self, width: int, height: int) -> tuple[int, int]:
        """Return the (width, height) in the bucket that is nearest by the metric of the module; errors as ``find``."""
        _check(width=width, height=height)
        wide, high = self.width, self.height
        limit = self.max_area or wide.maximum * high.maximum
        last = min(wide.maximum, limit // high.minimum // wide.multiple * wide.multiple)

        # With heights between the steps allowed, the least cost at a width falls to one minimum and rises after it
        # (the metric is convex in the logarithms, and so are the limits). So the columns are searched from a start near
        # that minimum, in each direction until this bound is over the best that was found.
        guess = height if width * height <= limit else isqrt(limit * height // width)
        guess = width * min(max(guess, high.minimum), high.maximum) // height
        start = min(max(guess // wide.multiple * wide.multiple, wide.minimum), last)
        found: list[tuple[_Rank, int]] = []
        for columns in (range(start, wide.minimum - 1, -wide.multiple), range(start, last + 1, wide.multiple)):
            for column in columns:
                ideal, most = Fraction(height * column, width), min(Fraction(high.maximum), Fraction(limit, column))
                bound = min(max(ideal, Fraction(high.minimum)), most)
                if found and _rank(width, height, column, bound)[0] > found[0][0][0]:
                    break
                below, top = (floor(side) // high.multiple * high.multiple for side in (ideal, most))
                rows = {min(max(row, high.minimum), top) for row in (below, below + high.multiple)}
                found = [min(found + [(_rank(width, height, column, row), row) for row in rows])]
        return found[0][0][2], found[0][1]

    def to_json(self) -> dict[str, object]:
        """Return the four fields as plain JSON."""
        sides = {"width": self.width.to_json(), "height": self.height.to_json()}
        return {"name": self.name, **sides, "max_area": self.max_area}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SizeBucket:
        """Return the bucket that :meth:`to_json` wrote; ValueError or TypeError if ``data`` is not one."""
        expected = {"name", "width", "height", "max_area"}
        if not isinstance(data, Mapping) or set(data) != expected:
            got = one_line(sorted(map(str, data)) if isinstance(data, Mapping) else type(data).__name__)
            raise ValueError(f"bucket: expected the names {sorted(expected)}, got {got}; write it with to_json()")
        width, height = Range.from_json(data["width"]), Range.from_json(data["height"])
        return cls(data["name"], width, height, data["max_area"])

    def __str__(self) -> str:
        text = f"{self.width}x{self.height}" if self.is_exact else f"width {self.width}, height {self.height}"
        text += "" if self.max_area is None else f", area up to {self.max_area}"
        return text if self.name == text else f"{self.name} ({text})"


@dataclass(frozen=True)
class Match:
    """What :meth:`ShapeBuckets.find` found; true if there is a bucket. ``reason`` is one line in both cases."""

    bucket: SizeBucket | None
    reason: str

    def __bool__(self) -> bool:
        return self.bucket is not None


@dataclass(frozen=True)
class Snapped:
    """A size in pixels that ``bucket`` serves, and one line that says what became of the size that was asked for."""

    width: int
    height: int
    bucket: SizeBucket
    reason: str


@dataclass(frozen=True)
class ShapeBuckets:
    """An ordered family of size buckets, at least one, with unique names.

    Raises:
        TypeError, ValueError: if an item is not a :class:`SizeBucket`, there is none, or a name occurs twice.
    """

    buckets: Sequence[SizeBucket]
    _exact: dict[tuple[int, int], SizeBucket] = field(init=False, repr=False, compare=False)
    _ranges: tuple[SizeBucket, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        buckets, names = tuple(self.buckets), set()
        for bucket in buckets:
            if not isinstance(bucket, SizeBucket):
                raise TypeError(f"buckets: expected SizeBucket, got {type(bucket).__name__}; see ShapeBuckets.exact()")
            if bucket.name in names:
                raise ValueError(f"buckets: expected unique names, got {one_line(bucket.name)!r} twice; rename one")
            names.add(bucket.name)
        if not buckets:
            raise ValueError("buckets: expected at least one, got none; name a size that is compiled")
        exact = {(one.width.minimum, one.height.minimum): one for one in reversed(buckets) if one.is_exact}
        ranges = sorted((bucket for bucket in buckets if not bucket.is_exact), key=lambda bucket: bucket.count)
        for name, value in (("buckets", buckets), ("_exact", exact), ("_ranges", tuple(ranges))):
            object.__setattr__(self, name, value)

    @classmethod
    def exact(cls, sizes: Iterable[tuple[int, int]]) -> ShapeBuckets:
        """Return one bucket, named such as "832x1216", for each (width, height) in pixels; repeats are merged."""
        buckets: dict[str, SizeBucket] = {}
        for size in sizes:
            if not isinstance(size, Sequence) or len(size) != 2:
                raise TypeError(f"sizes: expected (width, height), got {one_line(repr(size))}; pass pairs of ints")
            _check(width=size[0], height=size[1])
            name = f"{size[0]}x{size[1]}"
            buckets[name] = SizeBucket(name, Range.exactly(size[0]), Range.exactly(size[1]))
        return cls(tuple(buckets.values()))

    @classmethod
    def symbolic(
        cls, *, minimum: int, maximum: int, multiple: int = 64, max_area: int | None = None, name: str = "symbolic"
    ) -> ShapeBuckets:
        """Return one bucket with ``Range(minimum, maximum, multiple)`` for both sides, and ``max_area``; in pixels.

        TypeError and ValueError as from :class:`Range` and :class:`SizeBucket`.
        """
        sides = Range(minimum, maximum, multiple)
        return cls([SizeBucket(name, sides, sides, max_area)])

    @classmethod
    def aspect_ratios(
        cls, scale: float = 1.0, multiple: int = 64, sizes: Iterable[tuple[int, int]] = SDXL_TRAINING_SIZES
    ) -> ShapeBuckets:
        """Return exact buckets for ``sizes`` times ``scale``, each side rounded to ``multiple``; repeats are merged.

        Args:
            scale: factor of both sides, positive and finite.
            multiple: step of the sides in pixels, at least 1. Halves round up, and no side becomes 0.
            sizes: (width, height) in pixels.

        Raises:
            TypeError, ValueError: if an argument is not as said.
        """
        if not isinstance(scale, (int, float)) or isinstance(scale, bool):
            raise TypeError(f"scale: expected a number, got {type(scale).__name__}; 1.0 keeps the sizes")
        if not 0 < scale < inf:
            raise ValueError(f"scale: expected a positive finite number, got {scale}; 1.0 keeps the sizes")
        _check(multiple=multiple)

        def scaled(side: Range) -> int:
            return max(1, floor(side.minimum * Fraction(scale) / multiple + Fraction(1, 2))) * multiple

        return cls.exact((scaled(bucket.width), scaled(bucket.height)) for bucket in cls.exact(sizes))

    def find(self, width: int, height: int) -> Match:
        """Return the one bucket that serves the size in pixels, or none and the reason.

        Exact buckets win over ranges; among ranges the one with the fewest sizes wins, and on a tie the earlier one.

        Raises:
            TypeError: if a side is not an int (a bool is not one here).
            ValueError: if a side is under 1, or 2**63 and more.
        """
        if (bucket := self._find(width, height)) is not None:
            return Match(bucket, f"{width}x{height} is in bucket {bucket}")
        near = self.snap(width, height)
        return Match(None, f"{near.reason}; bucket {near.bucket.name}: {near.bucket.reject(width, height)}")

    def snap(self, width: int, height: int) -> Snapped:
        """Return the served size in pixels that is nearest by the metric of the module: itself if it is served.

        ``bucket`` is the one that :meth:`find` gives for the result. TypeError and ValueError as from :meth:`find`.
        """
        if (bucket := self._find(width, height)) is not None:
            return Snapped(width, height, bucket, f"{width}x{height} is in bucket {bucket}")
        sizes = [*self._exact, *(bucket.nearest(width, height) for bucket in self._ranges)]
        wide, high = min(sizes, key=lambda size: _rank(width, height, *size))
        ratios = f"aspect ratio {wide / high:.3f} for {width / height:.3f}"
        near = f"{wide}x{high} ({ratios}, {100 * wide * high / (width * height):.0f} % of the area)"
        bucket = self._find(wide, high)
        assert bucket is not None
        return Snapped(wide, high, bucket, f"{width}x{height} is in no bucket; nearest is {near}")

    def _find(self, width: int, height: int) -> SizeBucket | None:
        _check(width=width, height=height)
        found = self._exact.get((width, height))
        return found or next((bucket for bucket in self._ranges if bucket.reject(width, height) is None), None)

    def to_json(self) -> list[dict[str, object]]:
        """Return the buckets in order as plain JSON."""
        return [bucket.to_json() for bucket in self.buckets]

    @classmethod
    def from_json(cls, data: Sequence[Mapping[str, Any]]) -> ShapeBuckets:
        """Return the family that :meth:`to_json` wrote; ValueError or TypeError if ``data`` is not one."""
        if not isinstance(data, Sequence):
            raise TypeError(f"buckets: expected a list, got {type(data).__name__}; write it with to_json()")
        return cls([SizeBucket.from_json(bucket) for bucket in data])

    def __add__(self, other: ShapeBuckets) -> ShapeBuckets:
        """Join two families in order. A bucket in both counts once; two that share only the name: ValueError."""
        if not isinstance(other, ShapeBuckets):
            return NotImplemented
        return ShapeBuckets(tuple(dict.fromkeys((*self.buckets, *other.buckets))))

    def __iter__(self) -> Iterator[SizeBucket]:
        return iter(self.buckets)

    def __len__(self) -> int:
        return len(self.buckets)

    def __str__(self) -> str:
        more = f"; and {len(self) - _SHOWN} more" if len(self) > _SHOWN else ""
        return f"size buckets: {'; '.join(map(str, self.buckets[:_SHOWN]))}{more}"
