"""The schedulers that users bring, and which step each UNet call of a request belongs to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["SCHEDULERS", "once", "warmed_up"]


def once(steps: int) -> list[int]:
    return list(range(steps))


def twice(steps: int) -> list[int]:
    """A second-order step is two calls; the last one, at the end of the schedule, is one."""
    return [step for step in range(steps) for _ in range(2)][:-1]


def warmed_up(steps: int) -> list[int]:
    """PNDM's linear multistep form makes two calls in its first step."""
    return [0, *range(steps)]


def runge_kutta(steps: int) -> list[int]:
    """PNDM's Runge-Kutta form makes four calls in each of its first three steps."""
    return [step for step in range(3) for _ in range(4)] + list(range(3, steps))


# name: (the scheduler's options, the step of each UNet call)
SCHEDULERS: dict[str, tuple[dict[str, Any], Callable[[int], list[int]]]] = {
    "EulerDiscreteScheduler": ({}, once),
    "EulerAncestralDiscreteScheduler": ({}, once),
    "DDIMScheduler": ({}, once),
    "DPMSolverMultistepScheduler": ({}, once),
    "DPMSolverMultistepScheduler sde": ({"algorithm_type": "sde-dpmsolver++"}, once),
    "DPMSolverSinglestepScheduler": ({}, once),
    "UniPCMultistepScheduler": ({}, once),
    "LCMScheduler": ({}, once),
    "EDMEulerScheduler": ({}, once),
    "EDMDPMSolverMultistepScheduler": ({}, once),
    "HeunDiscreteScheduler": ({}, twice),
    "KDPM2DiscreteScheduler": ({}, twice),
    "KDPM2AncestralDiscreteScheduler": ({}, twice),
    "DPMSolverSDEScheduler": ({}, twice),
    "PNDMScheduler": ({"skip_prk_steps": True}, warmed_up),
    "PNDMScheduler prk": ({"skip_prk_steps": False}, runge_kutta),
}
