"""What a device has to offer so that a whole UNet call can be captured there and replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Captured(Protocol):
    """What a function gave a device to do, at the addresses that it did it at."""

    @property
    def out(self) -> Tensor:
        """Where a replay leaves its result; the next one, of any graph of the same pool, may overwrite it."""

    def replay(self, fill: Callable[[], None]) -> Tensor:
        """Fills the inputs, does it again, and returns a copy of the result: all of it behind whatever was replayed of
        the pool before, on any stream. One thread at a time."""

    def release(self) -> None:
        """Waits for the last replay, and gives its part of the pool up; it is not replayed again."""


class Capturer(Protocol):
    """One device, and one pool of memory for all that is captured there."""

    def capture(self, run: Callable[[], Tensor]) -> Captured:
        """Runs a function, and captures another run of it.

        Whatever the function raises comes out of here, once nothing is captured any more.
        """

    def wait(self) -> None:
        """Waits until the device has done what it was given."""

    def held_bytes(self) -> int:
        """Bytes of the pool."""

    def give_back(self) -> None:
        """Returns memory of what was released to the device."""


def capturer_for(device: torch.device) -> Capturer | None:
    """A capturer with a pool of its own; None for a device that cannot capture."""
    if device.type != "cuda":
        return None
    from accel_hidiff.replay.cuda import CudaCapturer

    return CudaCapturer(device)
