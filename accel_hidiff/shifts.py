"""Window shifts: one of 0..3 per windowed block and step, from a seed alone. No torch, no state."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from accel_hidiff.errors import BadInput

NUM_SHIFTS = 4


@lru_cache(maxsize=4096)
def window_shifts(seed: int, step: int, blocks: int, mode: str = "per_block") -> tuple[int, ...]:
    """The shifts of one step, uniform over 0..3 and independent between steps.

    `mode` "per_block": independent between blocks too, as in the paper (section 3.3); "per_step": all blocks share one.

    Counter-based (a SHAKE-256 stream): any step can be asked for alone, in any order, on any device, so that an
    interrupted request, a retry and another backend see the same shifts. The reference draws `torch.rand(1)` per block
    from the global generator instead; the distribution is the same, the numbers are not.

    >>> window_shifts(0, 0, 5) == window_shifts(0, 0, 10)[:5]
    True
    """
    if mode == "per_step":
        return window_shifts(seed, step, 1) * blocks
    stream = hashlib.shake_256(f"window shifts {seed} {step}".encode()).digest(blocks)
    return tuple(byte % NUM_SHIFTS for byte in stream)


@dataclass(frozen=True)
class ShiftLayout:
    """Where the shifts of a step lie in a row of int64 numbers: first all of them, then those of each transformer.

    Compiled code loads up to 16 bytes at once, so that everything it is given begins at an even place, and rows are of
    even length: nothing has to be copied to where it may begin.

    Attributes:
        counts: how many windowed blocks each windowed transformer has, in call order.

    >>> layout = ShiftLayout((1, 2))
    >>> layout.row((3, 1, 2)), layout.places, layout.width
    ((3, 1, 2, 0, 3, 0, 1, 2), {0: 4, 1: 6}, 8)
    """

    counts: tuple[int, ...]

    @cached_property
    def blocks(self) -> int:
        """Windowed blocks of all transformers."""
        return sum(self.counts)

    @cached_property
    def places(self) -> dict[int, int]:
        """Number of a transformer's first windowed block -> where its shifts begin."""
        found, first, place = {}, 0, _even(self.blocks)
        for count in self.counts:
            found[first] = place
            first, place = first + count, place + _even(count)
        return found

    @cached_property
    def width(self) -> int:
        """Numbers of a row."""
        return _even(self.blocks) + sum(_even(count) for count in self.counts)

    def row(self, shifts: Sequence[int]) -> tuple[int, ...]:
        """The row of a step."""
        row = [*shifts, *[0] * (self.width - len(shifts))]
        for (first, place), count in zip(self.places.items(), self.counts, strict=True):
            row[place : place + count] = shifts[first : first + count]
        return tuple(row)


def _even(number: int) -> int:
    return number + number % 2


def check_shifts(shifts: object, blocks: int) -> tuple[int, ...]:
    """Validates shifts given by hand: one int in 0..3 per windowed block, in call order."""
    try:
        given = tuple(shifts)  # type: ignore[arg-type, var-annotated]
        values = tuple(-1 if isinstance(value, bool) else operator.index(value) for value in given)
    except (TypeError, ValueError):
        got = " ".join(repr(shifts).split())
        raise BadInput(f"window_shifts: expected {blocks} integers in 0..3, got {got}") from None
    if len(values) != blocks:
        raise BadInput(
            f"window_shifts: expected {blocks} values, one per windowed block in call order, got {len(values)}"
        )
    if wrong := [given[index] for index, value in enumerate(values) if not 0 <= value < NUM_SHIFTS]:
        raise BadInput(f"window_shifts: expected integers in 0..3, got {wrong[0]}")
    return values
