"""CFG++ steps through the dispatcher: one compiled graph for all samplers, steps, strengths and sizes.

It combines the predictions, takes the sampler's step, and scales the input of the next one.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from accel_hidiff.binder import ArtifactFailed, Graphs
from accel_hidiff.cfgpp import maths
from accel_hidiff.cfgpp.guidance import Predictions, Step, eager_step
from accel_hidiff.cfgpp.next_input import NextInput, SteppedSample, plain
from accel_hidiff.clock import index_in
from accel_hidiff.dispatch import Dispatcher
from accel_hidiff.errors import BadInput
from accel_hidiff.facts import call_facts, call_name
from accel_hidiff.regions.step import STEP, StepRegion
from accel_hidiff.topology import PLAIN

_SCALE = maths.COLUMNS.index("scale")
_NUMBERS = 4  # of at least 4 bytes: a row of so many begins where compiled code can load it as it is


class CompiledStep:
    """Runs the steps of CFG++ schedulers on a pipeline (a stepper of `cfgpp.guidance`).

    Args:
        dispatcher: finds the graph.
        channels: of the latents.
    """

    def __init__(self, dispatcher: Dispatcher, channels: int) -> None:
        self.dispatcher = dispatcher
        self.region = StepRegion(channels)
        self._state = _State()
        dispatcher.register(STEP, self.region.module, [self.region])

    def __call__(
        self, scheduler: Any, inner: Step, said: Predictions, timestep: Any, sample: Tensor, options: dict[str, Any]
    ) -> Any:
        """One step; the scheduler is afterwards where its own `step` would have left it."""
        sample = plain(sample)
        batch, _, height, width = sample.shape
        graph = self.dispatcher.graph(
            (STEP, *call_name(sample)),
            lambda: call_facts(PLAIN, sample),
            lambda: self.graphs(height, width, batch, dtype=sample.dtype, device=sample.device),
        )
        compiled = graph.calls.get(STEP)
        if compiled is None:
            return eager_step(scheduler, inner, said, timestep, sample, options)
        rows, index = self._rows(scheduler, sample, options), index_in(timestep, scheduler.timesteps)
        if rows is None or index is None:
            reason = self._state.reason or f"{STEP}: {timestep} is no timestep of this request"
            self.dispatcher.fall_back(reason, whole_call=True)
            return eager_step(scheduler, inner, said, timestep, sample, options)
        state, wide = self._state, rows.dtype
        noise = scheduler.draw_noise(sample.to(wide), options)
        if state.history is None or state.history.shape != sample.shape:
            state.history = torch.zeros_like(sample, dtype=wide)
        strength = torch.full((), said.strength, device=sample.device)
        nothing = state.history if noise is None else noise  # its coefficient is 0
        more = index + 1 < len(rows)
        next_scale = state.scales[index + more, 0]
        inputs = sample, said.uncond, said.cond, state.history, nothing, rows[index], strength, next_scale
        try:
            x_next, state.history, scaled = compiled(*inputs)
        except ArtifactFailed as failed:
            self.dispatcher.quarantine(failed)
            x_next, state.history, scaled = self.region.module(*inputs)
        scheduler.advance_to(index + 1)
        if more:
            x_next = SteppedSample.of(x_next, NextInput(scaled, scheduler.timesteps, index + 1))
        return SchedulerOutput(prev_sample=x_next) if options.get("return_dict", True) else (x_next,)

    def graphs(self, height: int, width: int, batch: int, *, dtype: torch.dtype, device: torch.device) -> Graphs:
        """The graph and the sizes of a step; `batch` is the number of samples, guidance not counted."""
        sizes = {"batch": batch, "height": height, "width": width}
        return [(self.dispatcher.binder.graph(self.region, PLAIN, sizes, dtype, device), sizes)]

    def _rows(self, scheduler: Any, sample: Tensor, options: dict[str, Any]) -> Tensor | None:
        """The coefficients of the running request, made at its first step; None where a step is not linear."""
        eta = float(options.get("eta", 0.0))
        state, request = self._state, (id(scheduler), eta, sample.device, sample.dtype)
        if state.timesteps is not scheduler.timesteps or state.request != request:
            state.rows, state.reason = None, None
            try:
                rows = scheduler.coefficients_for(eta)
            except BadInput as problem:
                state.reason = f"{STEP}: {problem}"
                return None
            wide = torch.promote_types(sample.dtype, torch.float32)
            state.timesteps, state.request, state.history = scheduler.timesteps, request, None
            state.rows = rows.to(device=sample.device, dtype=wide)
            state.scales = torch.nn.functional.pad(state.rows[:, _SCALE, None], (0, _NUMBERS - 1))
        return state.rows


class _State(threading.local):
    """The request that runs on this thread."""

    timesteps: Tensor | None = None
    request: Any = None
    rows: Tensor | None = None
    scales: Tensor  # the rows' scales, each at the beginning of a row of its own; made with them
    reason: str | None = None  # why there are none
    history: Tensor | None = None
