"""UNetCall: everything that one call of a patched UNet needs to know, passed to the patches by a thread-local scope.

The state lives for one call: nothing of it stays on a module, so that an interrupted request leaves nothing behind and
threads do not see each other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from accel_hidiff.families import Size
from accel_hidiff.topology import Topology
from accel_hidiff.windows import window_tables

RegionCall = Callable[..., Any]  # tensors in, a tensor or a tuple of them out


class Window(NamedTuple):
    """The feature map of a windowed transformer, the shift of each of its blocks, (n,) int64, and the tables of the
    window order."""

    height: int
    width: int
    shifts: Tensor
    tables: Tensor


@dataclass(slots=True)
class UNetCall:
    """One call of a patched UNet.

    Attributes:
        topology: which graph runs.
        shifts: (K,) int64, one window shift per windowed block in call order, on the UNet's device.
        shifts_from: the shifts of each windowed transformer, by the number of its first windowed block; what is not in
            it is cut out of `shifts`.
        tables_from: inside of a graph, its inputs: the tables of the window order (`windows.window_tables`) of each
            windowed transformer, by the number of its first windowed block.
        tables: those of the feature maps that are windowed, by (batch, height, width).
        first_shift: index of `shifts[0]` among all windowed blocks (not 0 where a region is exported alone).
        regions: compiled region calls by module path; what is not in it runs eager.
        window: what windowed blocks need to know, inside of a windowed transformer; None outside.
        before_pool: feature size before the average pool, None where nothing was pooled.
    """

    topology: Topology
    shifts: Tensor | None = None
    first_shift: int = 0
    shifts_from: Mapping[int, Tensor] = field(default_factory=dict)
    tables_from: Mapping[int, Tensor] = field(default_factory=dict)
    tables: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)
    regions: Mapping[str, RegionCall] = field(default_factory=dict)
    window: Window | None = None
    before_pool: Size | None = None

    def shifts_of(self, first: int, count: int) -> Tensor | None:
        """The shifts of `count` windowed blocks from block `first` on."""
        if self.shifts is None:
            return None
        if (laid_out := self.shifts_from.get(first)) is not None:
            return laid_out
        return self.shifts[first - self.first_shift : first - self.first_shift + count]

    def tables_of(self, first: int, batch: int, size: Size, device: torch.device) -> Tensor:
        """The tables of the transformer whose first windowed block is number `first`, for its feature size."""
        given = self.tables_from.get(first)
        if given is not None:
            return given
        key = batch, *size
        tables = self.tables.get(key)
        if tables is None:
            tables = self.tables[key] = window_tables(*key, device)
        return tables

    def tensors(self) -> list[Tensor]:
        """All tensors that a call brings along and another one has others of, always in the same order."""
        return [] if self.shifts is None else [self.shifts, *self.shifts_from.values()]

    def over(self, tensors: Sequence[Tensor]) -> UNetCall:
        """A call that is like this one before it began, over tensors in the place of its own `tensors()`."""
        if self.shifts is None:
            return UNetCall(self.topology, first_shift=self.first_shift)
        shifts, *parts = tensors
        shifts_from = dict(zip(self.shifts_from, parts, strict=True))
        return UNetCall(self.topology, shifts, self.first_shift, shifts_from, tables=self.tables)


class CallScope(threading.local):
    """Where patches find the call that they are in: `scope.call`, None outside of a call."""

    def __init__(self) -> None:
        self.call: UNetCall | None = None  # an attribute of the instance: Dynamo guards on where it finds it

    @contextmanager
    def opened(self, call: UNetCall | None) -> Iterator[None]:
        """Makes `call` the current one for this thread; restores the outer one, also when the body raises."""
        outer, self.call = self.call, call
        try:
            yield
        finally:
            self.call = outer
