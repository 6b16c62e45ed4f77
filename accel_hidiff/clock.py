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
    loop written by hand or another pipeline on the same components, runs all of them from its first call on.

    Steps are logical: the calls that a second-order scheduler makes for one of them are one step (`logical_step`).
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = weakref.ref(pipe)
        self._request = _Request()

    def begin(self, seed: int | None) -> None:
        """The pipeline begins a request on this thread; its scheduler has its timesteps already.

        Args:
            seed: of the request's generator, None where it has no single one.
        """
        self._request.begin(self._timesteps(), seed, own=True)

    @property
    def seed(self) -> int | None:
        """The seed of the running request; None where it has none, or is not one of this pipeline."""
        return self._request.seed if self._request.timesteps is self._timesteps() else None

    @property
    def request_number(self) -> int:
        """Changes whenever a request begins on this thread, this pipeline's or another's."""
        return self._request.number

    def _timesteps(self) -> Any:
        return getattr(getattr(self._pipe(), "scheduler", None), "timesteps", None)

    def owns(self, timestep: Any) -> bool:
        """Whether this timestep is a view into the schedule: a pipeline on these components runs the call."""
        timesteps = self._timesteps()
        return isinstance(timesteps, Tensor) and index_in(timestep, timesteps) is not None

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
        index = index_in(timestep, timesteps)
        if index is None:
            self._refuse_others(timestep, timesteps)
            index = self._index_by_value(timestep, timesteps, pipe.scheduler)
        request = self._request
        if request.timesteps is not timesteps or (request.first is not None and index < request.first):
            request.begin(timesteps, None, own=False)
        if request.first is None:
            request.first = index
        calls = getattr(pipe, "num_timesteps", None) if request.own else None
        calls = calls or len(timesteps) - request.first
        step = logical_step(pipe.scheduler, index - request.first)
        return StepPosition(step, max(logical_step(pipe.scheduler, calls - 1), step) + 1)

    def _refuse_others(self, timestep: Any, timesteps: Tensor) -> None:
        """NoPhase for a timestep of another schedule: that of a pipeline which shares the UNet and has a scheduler of
        its own, or this one's before somebody else set it anew. Some of its values may be in this schedule, too."""
        mine = self._request.timesteps
        if self._request.own and mine is not None and index_in(timestep, mine) is not None:
            raise NoPhase(
                "the pipeline's scheduler got another schedule while its request ran; expected one request at a time "
                "on a scheduler: give the other pipeline a scheduler, and modules, of its own (ah.replica)"
            )
        if isinstance(timestep, Tensor) and _is_of_another(timestep, timesteps):
            raise NoPhase(
                f"the UNet was called over another schedule than the {len(timesteps)} timesteps of the pipeline that "
                "it is patched for; give the other pipeline modules of its own over the same weights (ah.replica), or "
                "let the two share the scheduler and take turns"
            )

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


def index_in(timestep: Any, timesteps: Tensor) -> int | None:
    """Where a timestep that is a view into a schedule lies in it; None if it is none. Does not wait for the device."""
    if not isinstance(timestep, Tensor) or timestep.ndim != 0 or timestep.dtype != timesteps.dtype:
        return None
    if timestep.untyped_storage().data_ptr() != timesteps.untyped_storage().data_ptr():
        return None
    index = (timestep.storage_offset() - timesteps.storage_offset()) // timesteps.stride(0)
    return index if 0 <= index < len(timesteps) else None


def _is_of_another(timestep: Tensor, timesteps: Tensor) -> bool:
    """Whether a timestep is a view into a schedule that is neither these timesteps, nor a copy of a stretch of them."""
    storage = timestep.untyped_storage()
    whole = torch.empty(0, dtype=timestep.dtype, device=timestep.device).set_(storage).tolist()
    known = timesteps.tolist()
    if len(set(whole)) == 1:
        return False
    return not any(known[first : first + len(whole)] == whole for first in range(len(known)))


def logical_step(scheduler: Any, call: int) -> int:
    """The step that the call-th UNet call of a request belongs to.

    Second-order schedulers (`order` 2: Heun, KDPM2, DPM++ SDE) call the UNet twice in a step. PNDM has `order` 1 but
    warms up: twice in its first step, or, with Runge-Kutta steps, four times in each of its first three.
    """
    runge_kutta = getattr(scheduler, "prk_timesteps", None)
    if runge_kutta is None:
        return call // int(getattr(scheduler, "order", 1))
    warm_up = len(runge_kutta)
    if not warm_up:
        return max(call - 1, 0)
    return call // 4 if call < warm_up else warm_up // 4 + call - warm_up


class _Request(threading.local):
    """The request that runs on this thread: its schedule, where in it it started, and whose it is."""

    number: int = 0
    timesteps: Tensor | None = None
    first: int | None = None
    seed: int | None = None
    own: bool = False

    def begin(self, timesteps: Tensor | None, seed: int | None, own: bool) -> None:
        self.number += 1
        self.timesteps, self.first, self.seed, self.own = timesteps, None, seed, own
