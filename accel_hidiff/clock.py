"""Which step is this UNet call? Read off the pipeline's own timesteps; nothing is counted."""

from __future__ import annotations

import threading
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from accel_hidiff.errors import NoPhase


class StepPosition(NamedTuple):
    """Step 0..num_steps - 1 of a request."""

    step: int
    num_steps: int


class PipelineClock:
    """Finds the step of a UNet call in `pipe.scheduler.timesteps`.

    A pipeline iterates over its scheduler's timestep tensor, so the `t` that the UNet gets is a view into it: its
    storage offset is its index, exact also where a scheduler repeats a timestep, and read without waiting for the
    device. A copy of the timestep (another dtype or device) is looked up by value.

    Where a request starts in the schedule (image-to-image drops steps at the start) is the index of its first call;
    how long it is, the pipeline's own `num_timesteps`. Whoever else runs the UNet over the scheduler's timesteps, a
    loop written by hand or another pipeline on the same components, runs all of them from `begin_index` on.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = weakref.ref(pipe)
        self._request = _Request()

    def begin(self, seed: int | None) -> None:
        """The pipeline begins a request on this thread; its scheduler has its timesteps already.

        Args:
            seed: of the request's generator, None where it has no single one.
        """
        self._request.timesteps = self._timesteps()
        self._request.first = None
        self._request.seed = seed

    @property
    def seed(self) -> int | None:
        """The seed of the running request; None where it has none, or is not one of this pipeline."""
        return self._request.seed if self._request.timesteps is self._timesteps() else None

    def _timesteps(self) -> Any:
        return getattr(getattr(self._pipe(), "scheduler", None), "timesteps", None)

    def position(self, timestep: Any) -> StepPosition:
        """The step of a UNet call with this timestep.

        Raises:
            NoPhase: the timestep is none of the pipeline's, so another caller runs this UNet.
        """
        pipe: Any = self._pipe()
        timesteps = self._timesteps()
        if not isinstance(timesteps, Tensor) or timesteps.ndim != 1 or len(timesteps) == 0:
            raise NoPhase(
                "the UNet was called before its pipeline's scheduler has timesteps; "
                "to drive it by hand, use `with patch.phase(step=..., num_steps=...)`"
            )
        index = self._index_by_storage(timestep, timesteps)
        if index is None:
            index = self._index_by_value(timestep, timesteps, pipe.scheduler)
        request = self._request
        if request.timesteps is timesteps and index >= (request.first or 0):
            request.first = first = index if request.first is None else request.first
            count = getattr(pipe, "num_timesteps", None) or len(timesteps) - first
        else:
            first = getattr(pipe.scheduler, "begin_index", None) or 0
            count = len(timesteps) - first
        step = max(index - first, 0)
        return StepPosition(step, max(count, step + 1))

    @staticmethod
    def _index_by_storage(timestep: Any, timesteps: Tensor) -> int | None:
        if not isinstance(timestep, Tensor) or timestep.ndim != 0 or timestep.dtype != timesteps.dtype:
            return None
        if timestep.untyped_storage().data_ptr() != timesteps.untyped_storage().data_ptr():
            return None
        index = (timestep.storage_offset() - timesteps.storage_offset()) // timesteps.stride(0)
        return index if 0 <= index < len(timesteps) else None

    @staticmethod
    def _index_by_value(timestep: Any, timesteps: Tensor, scheduler: Any) -> int:
        value = torch.as_tensor(timestep).flatten()[0].item()
        found = [index for index, other in enumerate(timesteps.tolist()) if other == value]
        if not found:
            raise NoPhase(
                f"the UNet was called with timestep {value}, none of its pipeline's {len(timesteps)} timesteps; "
                "apply to the pipeline that calls it, or drive it by hand with `patch.phase(step=..., num_steps=...)`"
            )
        current = getattr(scheduler, "step_index", None)
        return min(found, key=lambda index: abs(index - current)) if current is not None else found[0]


class _Request(threading.local):
    timesteps: Tensor | None = None
    first: int | None = None
    seed: int | None = None
