"""What is added to a UNet's features from outside: ControlNets, run at their trained scale, and T2I-Adapters.

A ControlNet was trained at the base model's size. HiDiffusion runs it there, for the first steps only, and resizes what
it gives to the feature maps of the call (the authors' release of arXiv 2311.17528, its ControlNet pipelines).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from accel_hidiff import compat
from accel_hidiff.clock import StepPosition
from accel_hidiff.families import Family, Layout, Size, adapter_sizes, skip_sizes
from accel_hidiff.forwards import Forward, require_parameters
from accel_hidiff.schedule import LATENT_CELL
from accel_hidiff.topology import PLAIN, Topology

ControlNetOutput = compat.controlnet_output()

DOWN, MID, ADAPTER = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
)


def find_controlnets(pipe: Any) -> dict[str, nn.Module]:
    """A pipeline's distinct ControlNets by module path: one, or the several of a MultiControlNetModel."""
    controlnet = getattr(pipe, "controlnet", None)
    if not isinstance(controlnet, nn.Module):
        return {}
    nets = getattr(controlnet, "nets", None)
    if nets is None:
        return {"controlnet": controlnet}
    return {f"controlnet.nets.{list(nets).index(net)}": net for net in dict.fromkeys(nets)}


class Schedule(Protocol):
    """What a ControlNet needs to know of the patch that it belongs to."""

    layout: Layout
    family: Family

    def owns(self, timestep: Any) -> bool:
        """Whether a call with this timestep belongs to the patched pipeline's schedule."""

    def position(self, timestep: Any) -> StepPosition:
        """The step of a call with this timestep."""

    def controls(self, position: StepPosition) -> bool:
        """Whether ControlNets run in a step."""

    def control_size(self, height: int, width: int) -> Size:
        """The latent size at which they run for a request of a latent size."""


def at_trained_scale(inner: Forward, schedule: Schedule) -> Forward:
    """A ControlNet's forward on inputs of its trained size, and not at all in steps where it has no part.

    Latents and control images are resized as in the release (nearest neighbour), and only downwards. In a step without
    ControlNet it gives zeros of one pixel, which the patched UNet does not look at. Called by a pipeline with another
    schedule (which shares the ControlNet and has a UNet of its own), it runs as if it were not patched.

    Args:
        inner: the forward, or whoever runs it compiled.
        schedule: the patch.
    """
    require_parameters(inner, ("sample", "timestep", "encoder_hidden_states", "controlnet_cond"), "ControlNet")

    def forward(
        sample: Tensor, timestep: Any, encoder_hidden_states: Any, controlnet_cond: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if not schedule.owns(timestep):
            return inner(sample, timestep, encoder_hidden_states, controlnet_cond, *args, **kwargs)
        if not schedule.controls(schedule.position(timestep)):
            nothing = sample.new_zeros(sample.shape[0], 1, 1, 1)
            count = len(skip_sizes(schedule.layout, schedule.family, 1, 1, PLAIN))
            if kwargs.get("return_dict", True):
                return ControlNetOutput(down_block_res_samples=(nothing,) * count, mid_block_res_sample=nothing)
            return [nothing] * count, nothing
        height, width = schedule.control_size(*sample.shape[-2:])
        if (height, width) != tuple(sample.shape[-2:]):
            sample = F.interpolate(sample, (height, width))
            pixels = height * LATENT_CELL, width * LATENT_CELL
            controlnet_cond = _each(controlnet_cond, lambda image: F.interpolate(image, pixels))
        return inner(sample, timestep, encoder_hidden_states, controlnet_cond, *args, **kwargs)

    return forward


def _each(images: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """ControlNetUnion takes a list of control images, of which some may be missing."""
    if isinstance(images, Tensor):
        return change(images)
    return [change(image) if isinstance(image, Tensor) else image for image in images]


def fitted(
    kwargs: Mapping[str, Any], layout: Layout, family: Family, size: Size, topology: Topology, controlled: bool
) -> dict[str, Any]:
    """The arguments of a UNet call with every residual at the size of the feature map that it is added to (bicubic).

    Args:
        kwargs: the UNet's arguments by name.
        size: latent (height, width).
        controlled: False drops ControlNet residuals.
    """
    changed = dict(kwargs)
    down, mid, adapter = kwargs.get(DOWN), kwargs.get(MID), kwargs.get(ADAPTER)
    if down is not None and mid is not None:
        changed[DOWN], changed[MID] = None, None
        if controlled:
            sizes = skip_sizes(layout, family, *size, topology)
            changed[DOWN] = tuple(_fit(residual, skip) for residual, skip in zip(down, sizes, strict=True))
            changed[MID] = _fit(mid, sizes[-1])
    if adapter is not None:
        changed[ADAPTER] = _fit_all(adapter, adapter_sizes(layout, family, *size, topology))
    elif down is not None and mid is None:  # the old way to pass adapter features, which diffusers still takes
        changed[DOWN] = _fit_all(down, adapter_sizes(layout, family, *size, topology))
    return changed


def _fit_all(features: Sequence[Tensor], sizes: Sequence[Size]) -> list[Tensor]:
    return [_fit(feature, size) for feature, size in zip(features, sizes, strict=False)]


def _fit(residual: Tensor, size: Size) -> Tensor:
    if tuple(residual.shape[-2:]) == tuple(size):
        return residual
    return F.interpolate(residual, size=size, mode="bicubic", align_corners=False)
