"""Whether a graph is worth its memory: a pure function of times."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Final

GAIN: Final = 0.05  # of the time of a call


def gain(plain: Sequence[float], replayed: Sequence[float]) -> float:
    """The share of a call's time that a replay saves, by medians; negative where it takes longer.

    >>> gain([8.0, 32.0, 8.0], [6.0, 6.0, 50.0])
    0.25
    """
    usual = median(plain)
    return 1 - median(replayed) / usual if usual > 0 else 0.0


def is_worth_it(plain: Sequence[float], replayed: Sequence[float]) -> bool:
    """Whether a replay saves at least `GAIN` of a call's time.

    >>> is_worth_it([100.0], [95.0]), is_worth_it([100.0], [95.1])
    (True, False)
    """
    return median(replayed) <= (1 - GAIN) * median(plain)
