"""Two outputs of the same graph: how far they are apart, and how far they may be."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

_LIMIT: Final = 1e-3
_LIMIT_HALF: Final = 5e-2  # float16 and bfloat16


def limit_of(dtype: torch.dtype) -> float:
    """What `relative_error` has to stay below for a model of this dtype."""
    return _LIMIT_HALF if dtype in (torch.float16, torch.bfloat16) else _LIMIT


def relative_error(got: Tensor, want: Tensor) -> float:
    """max|got - want| / max|want|; 0 where they are equal, not a number where one of the two holds none.

    Raises:
        ValueError: the shapes differ.
    """
    if got.shape != want.shape:
        raise ValueError(f"expected shape {tuple(want.shape)}, got {tuple(got.shape)}")
    wanted = want.double()
    apart = (got.double() - wanted).abs().max()
    return float(apart / wanted.abs().max()) if apart != 0 else 0.0


def wrong(got: Tensor, want: Tensor, limit: float) -> tuple[float | None, str]:
    """(error, what is wrong in one line, "" for nothing). The error is None where there is no such number."""
    try:
        error = relative_error(got, want)
    except ValueError as problem:
        return None, str(problem)
    if not math.isfinite(error):
        return None, f"max|diff|/max|ref| is {error}, expected below {limit:g}"
    return error, "" if error < limit else f"max|diff|/max|ref| is {error:.2g}, expected below {limit:g}"
