"""Shape buckets: which sizes one artifact serves, as exact numbers or as ranges.

A compiled artifact that is fed a size outside the constraints it was traced with may compute garbage without an
error. A bucket states the constraints as plain numbers, so that they can be stored with the artifact and checked
before every call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import lcm
from types import MappingProxyType


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True, order=True)
class Range:
    """The multiples of ``multiple`` in ``[minimum, maximum]``, both ends included. Units are the caller's own.

    Ranges that hold the same numbers are equal: with ``minimum == maximum`` the field ``multiple`` is stored as 1.

    Args:
        minimum: smallest size, at least 1, a multiple of ``multiple``.
        maximum: largest size, at least ``minimum``, a multiple of ``multiple``.
        multiple: step between the sizes, at least 1.

    Raises:
        TypeError: if a value is not an int (a bool is not one here).
        ValueError: if the values do not fit together.
    """

    minimum: int
    maximum: int
    multiple: int = 1

    def __post_init__(self) -> None:
        for name in ("minimum", "maximum", "multiple"):
            value = getattr(self, name)
            if not _is_int(value):
                raise TypeError(f"{name}: expected an int, got {type(value).__name__}; pass a whole number")
        if self.multiple < 1:
            raise ValueError(f"multiple: expected at least 1, got {self.multiple}; use 1 to allow every size")
        if not 1 <= self.minimum <= self.maximum:
            got = f"minimum {self.minimum} and maximum {self.maximum}"
            raise ValueError(f"expected 1 <= minimum <= maximum, got {got}; correct the ends of the range")
        for name in ("minimum", "maximum"):
            value = getattr(self, name)
            if value % self.multiple:
                expected = f"a multiple of {self.multiple}"
                raise ValueError(f"{name}: expected {expected}, got {value}; round it to one that is meant")
        if self.minimum == self.maximum:
            object.__setattr__(self, "multiple", 1)

    @classmethod
    def exactly(cls, size: int) -> Range:
        """Return the range that holds ``size`` only."""
        return cls(size, size)

    @property
    def is_exact(self) -> bool:
        """Whether the range holds one size only."""
        return self.minimum == self.maximum

    def reject(self, value: int) -> str | None:
        """Return None if ``value`` is in the range, otherwise the reason why it is not, such as "33 is not 32"."""
        if not _is_int(value):
            return f"{value!r} is not a whole number"
        if self.is_exact:
            return None if value == self.minimum else f"{value} is not {self.minimum}"
        if value < self.minimum:
            return f"{value} is under the minimum {self.minimum}"
        if value > self.maximum:
            return f"{value} is over the maximum {self.maximum}"
        if value % self.multiple:
            return f"{value} is not a multiple of {self.multiple}"
        return None

    def intersect(self, other: Range) -> Range | None:
        """Return the range of the sizes that both hold, or None if there is no such size."""
        # An exact range has multiple 1, so its one size has to be asked of the other range.
        for one, another in ((self, other), (other, self)):
            if one.is_exact:
                return one if another.reject(one.minimum) is None else None
        step = lcm(self.multiple, other.multiple)
        minimum = -(-max(self.minimum, other.minimum) // step) * step
        maximum = min(self.maximum, other.maximum) // step * step
        return Range(minimum, maximum, step) if minimum <= maximum else None

    def to_json(self) -> dict[str, int]:
        """Return ``{"minimum": ..., "maximum": ..., "multiple": ...}``."""
        return {"minimum": self.minimum, "maximum": self.maximum, "multiple": self.multiple}

    @classmethod
    def from_json(cls, data: Mapping[str, int]) -> Range:
        """Return the range that :meth:`to_json` wrote.

        Raises:
            ValueError: if the names are not exactly those three, or the values do not fit together.
            TypeError: if a value is not an int.
        """
        expected = {"minimum", "maximum", "multiple"}
        if not isinstance(data, Mapping) or set(data) != expected:
            got = sorted(map(str, data)) if isinstance(data, Mapping) else type(data).__name__
            raise ValueError(f"range: expected the names {sorted(expected)}, got {got}; write it with to_json()")
        return cls(data["minimum"], data["maximum"], data["multiple"])

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int) and self.reject(value) is None

    def __str__(self) -> str:
        if self.is_exact:
            return str(self.minimum)
        return f"{self.minimum}..{self.maximum}" + (f" step {self.multiple}" if self.multiple > 1 else "")


@dataclass(frozen=True)
class ShapeBucket:
    """Named dimensions and the sizes that each of them may have.

    Args:
        dims: dimension name -> :class:`Range`. Kept sorted by name and read-only; a later change of the mapping that
            was passed in does not reach the bucket.

    Raises:
        TypeError: if a name is not a str or a value is not a :class:`Range`.
    """

    dims: Mapping[str, Range]

    def __post_init__(self) -> None:
        for name, allowed in self.dims.items():
            if not isinstance(name, str) or not isinstance(allowed, Range):
                got = f"{type(name).__name__} -> {type(allowed).__name__}"
                raise TypeError(f"dims: expected str -> Range, got {got}; use Range.exactly(n) for one size")
        object.__setattr__(self, "dims", MappingProxyType(dict(sorted(self.dims.items()))))

    def reject(self, sizes: Mapping[str, int]) -> str | None:
        """Return None if ``sizes`` is in the bucket, otherwise the first reason why not, which names the dimension.

        A dimension that is missing from ``sizes``, or that the bucket does not know, is a reason too.
        """
        for name, allowed in self.dims.items():
            if name not in sizes:
                return f"{name}: missing, expected {allowed}"
            reason = allowed.reject(sizes[name])
            if reason is not None:
                return f"{name}: {reason}"
        for name in sizes:
            if name not in self.dims:
                return f"{name}: unexpected, the bucket has {', '.join(self.dims) or 'no dimensions'}"
        return None

    def to_json(self) -> dict[str, dict[str, int]]:
        """Return dimension name -> range as plain JSON, for keys and notes."""
        return {name: allowed.to_json() for name, allowed in self.dims.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Mapping[str, int]]) -> ShapeBucket:
        """Return the bucket that :meth:`to_json` wrote.

        Raises:
            ValueError, TypeError: if ``data`` is not such a bucket.
        """
        if not isinstance(data, Mapping):
            raise TypeError(f"bucket: expected a mapping, got {type(data).__name__}; write it with to_json()")
        return cls({name: Range.from_json(allowed) for name, allowed in data.items()})

    def __iter__(self) -> Iterator[str]:
        return iter(self.dims)

    def __hash__(self) -> int:
        return hash(tuple(self.dims.items()))

    def __reduce__(self) -> tuple[type[ShapeBucket], tuple[dict[str, Range]]]:
        return ShapeBucket, (dict(self.dims),)

    def __str__(self) -> str:
        return ", ".join(f"{name} {allowed}" for name, allowed in self.dims.items()) or "no dimensions"
