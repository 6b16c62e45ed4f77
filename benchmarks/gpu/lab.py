"""What the stages of one process share: settings, the models, figures of earlier stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

import accel_hidiff as ah
from accel_hidiff.explain import PrecompileReport
from benchmarks import harness as h
from benchmarks.gpu.model import inputs_of, make_unet, pipeline_of, twin
from benchmarks.roofline import Ceilings, Work, count
from compile_cache import CompileCache
from compile_cache.errors import one_line

Case = Mapping[str, str]  # what tells one record of a stage from the others
Figures = dict[str, Any]  # JSON values


class NotHere(Exception):
    """A stage that this machine cannot run; the message says what it needs."""


@dataclass(frozen=True)
class Setting:
    """What a run measures; plain JSON values.

    Attributes:
        device: "cuda" or "cpu".
        dtype: name of the weights' dtype.
        tiny: a tiny model at a small size.
        sizes: (width, height) in pixels.
        cache: folder of the compile cache.
        jobs: processes that compile; None: the one that asks does it.
        repeats: timed turns of each contestant.
    """

    device: str
    dtype: str
    tiny: bool
    sizes: tuple[tuple[int, int], ...]
    cache: str
    jobs: int | None
    repeats: int

    def to_json(self) -> dict[str, Any]:
        """A plain JSON mapping."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Setting:
        """Inverse of `to_json`, after a passage through JSON too."""
        return cls(**{**fields, "sizes": tuple((width, height) for width, height in fields["sizes"])})

    @property
    def largest(self) -> h.Size:
        """The second size, or the only one: where single comparisons are made (2048x2048 by default)."""
        return h.Size(*self.sizes[min(1, len(self.sizes) - 1)])


class Lab:
    """Models are made when a stage first asks for them.

    Args:
        setting: of the run.
        ceilings: as an earlier stage, or an earlier run, measured them; None if none did.

    Attributes:
        jobs_failed: why compiling processes failed; None if they did not.
    """

    def __init__(self, setting: Setting, ceilings: Ceilings | None = None) -> None:
        self.setting, self.ceilings = setting, ceilings
        self.device = torch.device(setting.device)
        self.dtype: torch.dtype = getattr(torch, setting.dtype)
        self.jobs_failed: str | None = None
        self._work: dict[tuple[str, str], Work] = {}

    @cached_property
    def unet(self) -> UNet2DConditionModel:
        """The stock UNet; every other one has its weights."""
        return make_unet(self.setting.tiny, self.device, self.dtype)

    @cached_property
    def eager(self) -> ah.Patch:
        """HiDiffusion on a UNet, nothing compiled."""
        return ah.apply_hidiffusion(pipeline_of(twin(self.unet)))

    @cached_property
    def served(self) -> ah.Handle:
        """Compiled blocks of symbolic sizes, from the cache and from nowhere else."""
        return self.accelerate(on_miss="error")

    def accelerate(self, **options: Any) -> ah.Handle:
        """A handle over a UNet of its own."""
        if options.get("backend", "aot") == "aot":
            options = {"cache": CompileCache(Path(self.setting.cache)), **options}
        return ah.accelerate(pipeline_of(twin(self.unet)), hidiffusion=ah.HiDiffusionConfig(), **options)

    def precompile(self, handle: ah.Handle, sizes: tuple[h.Size, ...]) -> PrecompileReport:
        """Compiles what these sizes need into the cache, by the setting's number of processes.

        Where those fail, this process compiles what they left; `jobs_failed` then tells why they did.
        """
        pixels = [(size.height, size.width) for size in sizes]
        compile_all = partial(handle.precompile, pixels, h.NUM_STEPS, batch_sizes=(h.GUIDANCE_BATCH,))
        try:
            return compile_all(jobs=self.setting.jobs)
        except Exception as problem:
            if self.setting.jobs is None:
                raise
            self.jobs_failed = one_line(f"{type(problem).__name__}: {problem}", 400)
        return compile_all(jobs=None)

    @property
    def sizes(self) -> tuple[h.Size, ...]:
        """The setting's."""
        return tuple(h.Size(*size) for size in self.setting.sizes)

    def step_of(self, size: h.Size, topology: str) -> int:
        """The first step of a topology in a request.

        Raises:
            ValueError: the request has none of it.
        """
        steps = {str(found): step for found, step in h.topology_steps(self.eager, size).items()}
        if topology not in steps:
            raise ValueError(f"expected one of {', '.join(steps)} at {size}, got {topology}")
        return steps[topology]

    def call_of(self, patch: ah.Patch, size: h.Size, topology: str) -> h.StepCall:
        """The call that is timed: a topology's first step at a size, with the dispatch that belongs to it."""
        return h.StepCall(patch, inputs_of(self.unet, size), self.step_of(size, topology), h.NUM_STEPS)

    def work_of(self, size: h.Size, topology: str, run: Callable[[], object]) -> Work:
        """What an eager call asks for; counted once."""
        name = str(size), topology
        if name not in self._work:
            self._work[name] = count(run)
        return self._work[name]

    def interleave(self, contestants: Mapping[str, Callable[[], object]]) -> dict[str, h.Timing]:
        """Times contestants in turns, for some seconds at most."""
        return h.interleave(contestants, self.setting.repeats, limit_s=10.0)

    def tidy(self) -> None:
        """Gives memory back that no tensor uses.

        Raises:
            RuntimeError: the device does not answer any more.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()


def timing_fields(times: Mapping[str, h.Timing]) -> Figures:
    """Median and spread of each contestant, in milliseconds of wall time."""
    fields: Figures = {}
    for name, timing in times.items():
        fields |= {key: value for key, value in timing.fields(name).items() if "_cpu_" not in key}
    return fields


def ratio(times: Mapping[str, h.Timing], name: str, other: str) -> Figures:
    """One median over another."""
    return {f"{name}_over_{other}_ratio": h.rounded(times[name].median / times[other].median, 3)}
