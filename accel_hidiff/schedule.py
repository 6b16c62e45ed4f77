"""PhasePlan: which topology runs at which step. A pure function of numbers; no torch.

The thresholds are those of the HiDiffusion release (arXiv 2311.17528, section 3.2 and the authors' code, commit
e9ec39a): T1 ends the longer RAU-Net range, T2 the shorter one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

from accel_hidiff.config import TASKS, HiDiffusionConfig, check_choice, check_pixels, check_steps, check_strength
from accel_hidiff.errors import BadInput
from accel_hidiff.families import Family, Layout
from accel_hidiff.topology import Topology

LATENT_CELL = 8  # pixels per latent cell, in each direction
INPAINTING_CHANNELS = 9


@dataclass(frozen=True)
class Phase:
    """Steps [start, stop) run with one topology."""

    start: int
    stop: int
    topology: Topology

    def __str__(self) -> str:
        return f"[{self.start}, {self.stop}) {self.topology}"


@dataclass(frozen=True)
class PhasePlan:
    """The phases of one request, gap-free and in order, from step 0 to `num_steps`."""

    phases: tuple[Phase, ...]

    @property
    def num_steps(self) -> int:
        """How many UNet steps the plan covers."""
        return self.phases[-1].stop

    @property
    def topologies(self) -> tuple[Topology, ...]:
        """The distinct topologies, in the order of their first step."""
        return tuple(dict.fromkeys(phase.topology for phase in self.phases))

    def at(self, step: int) -> Topology:
        """The topology of a step; BadInput outside of 0..num_steps - 1."""
        for phase in self.phases:
            if phase.start <= step < phase.stop:
                return phase.topology
        raise BadInput(f"step: expected 0..{self.num_steps - 1}, got {step}; the plan has {self.num_steps} steps")

    def __iter__(self) -> Iterator[Phase]:
        return iter(self.phases)

    def __str__(self) -> str:
        return ", ".join(str(phase) for phase in self.phases)


@dataclass(frozen=True)
class Mode:
    """One row of the table: the step shares that bound the two parts of RAU-Net, [start, stop) of N."""

    name: str
    pooled: tuple[float, float]
    dilated: tuple[float, float]


_DILATED_SHARE_SDXL = 8 / 50
_NEVER = (0.0, 0.0)


def choose_mode(
    family: Family, layout: Layout, height: int, width: int, config: HiDiffusionConfig, task: str = "text2img"
) -> Mode:
    """The row of the table for a request. `height` and `width` are latent sizes."""
    check_choice("task", task, TASKS)
    if family.name == "sd15":
        large = height >= 256 and width >= 256
        t1, t2 = _ratios(config, *((0.7, 0.3) if large else (0.4, 0.0)))
        return Mode("sd15 2048" if large else "sd15 1024", pooled=(0.0, t2), dilated=(0.0, t1))
    if family.name == "sdxl_turbo":
        t1, _ = _ratios(config, 0.5, 0.0)
        return Mode("sdxl_turbo", pooled=(0.0, t1), dilated=_NEVER)
    if height >= 512 and width >= 512:
        t1, t2 = _ratios(config, 0.7, 0.3)
        return Mode("sdxl 4096", pooled=(0.0, t1), dilated=(0.0, t2))
    inpainting = task == "inpaint" or layout.in_channels == INPAINTING_CHANNELS
    aggressive = (not inpainting) if config.aggressive is None else config.aggressive
    t1, t2 = _ratios(config, 0.5 if task == "controlnet" else 0.4, _DILATED_SHARE_SDXL if aggressive else 0.0)
    return Mode("sdxl 2048", pooled=(t2, t1), dilated=(0.0, t2))


def _ratios(config: HiDiffusionConfig, t1: float, t2: float) -> tuple[float, float]:
    """The user's ratios over the table's. A table T2 is lowered to a T1 that the user set below it."""
    chosen_t1 = t1 if config.t1_ratio is None else config.t1_ratio
    chosen_t2 = min(t2, chosen_t1) if config.t2_ratio is None else config.t2_ratio
    if chosen_t2 > chosen_t1:
        raise BadInput(f"expected t2_ratio <= T1, got {chosen_t2} over the table's T1 {chosen_t1}; set t1_ratio too")
    return chosen_t1, chosen_t2


@lru_cache(maxsize=4096)
def plan_latent(
    family: Family,
    layout: Layout,
    height: int,
    width: int,
    num_steps: int,
    config: HiDiffusionConfig,
    task: str = "text2img",
) -> PhasePlan:
    """The plan for a latent size; `num_steps` is what really runs (after img2img strength)."""
    check_steps(num_steps)
    mode = choose_mode(family, layout, height, width, config, task)
    pooled = range(int(mode.pooled[0] * num_steps), int(mode.pooled[1] * num_steps)) if config.pooled else range(0)
    dilated = range(int(mode.dilated[0] * num_steps), int(mode.dilated[1] * num_steps)) if config.dilated else range(0)
    edges = sorted({0, num_steps, pooled.start, pooled.stop, dilated.start, dilated.stop})
    phases: list[Phase] = []
    for start, stop in pairwise(edges):
        topology = Topology(windowed=config.windowed, pooled=start in pooled, dilated=start in dilated)
        if phases and phases[-1].topology == topology:
            phases[-1] = Phase(phases[-1].start, stop, topology)
        else:
            phases.append(Phase(start, stop, topology))
    return PhasePlan(tuple(phases))


def running_steps(num_inference_steps: int, strength: float = 1.0) -> int:
    """Steps that an image-to-image or inpainting request really runs: the last `strength` of its schedule, as diffusers
    counts them (`get_timesteps` of its pipelines).

    >>> running_steps(30, 0.6)
    18

    Raises:
        BadInput: a number that cannot be, or a strength so low that no step is left.
    """
    check_steps(num_inference_steps)
    running = min(int(num_inference_steps * check_strength(strength)), num_inference_steps)
    if running < 1:
        raise BadInput(
            f"strength: expected one that leaves a step, got {strength} of {num_inference_steps} steps; "
            f"the least is {math.ceil(1000 / num_inference_steps) / 1000}"
        )
    return running


def control_steps(num_steps: int, ratio: float) -> int:
    """How many of the first steps ControlNets run in: those below `ratio` of all (the release: i < 0.6 N).

    >>> control_steps(10, 0.6), control_steps(7, 0.6)
    (6, 5)
    """
    return sum(controls(step, num_steps, ratio) for step in range(num_steps))


def controls(step: int, num_steps: int, ratio: float) -> bool:
    """Whether ControlNets run in a step."""
    return step < ratio * num_steps


def plan_pixels(family: Family, layout: Layout, height: int, width: int, num_steps: int, *rest: Any) -> PhasePlan:
    """`plan_latent` for an image size in pixels (multiples of 8); `rest` is its config and its task."""
    check_pixels(height, width)
    check_steps(num_steps)
    return plan_latent(family, layout, height // LATENT_CELL, width // LATENT_CELL, num_steps, *rest)
