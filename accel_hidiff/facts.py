"""What one call says of itself: its name in the dispatcher's table, and the facts that the guard judges."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from accel_hidiff.guard import CallFacts
from accel_hidiff.regions import conv_channels, is_conv
from accel_hidiff.topology import Topology

_HOOKS = ("_hf_hook", "_diffusers_hook")


def call_name(sample: Tensor, text: Any = None) -> tuple[Hashable, ...]:
    """What, beside the model and the topology, decides which graph serves a call. Cheap: built at every call."""
    return (
        sample.shape,
        sample.dtype,
        sample.device,
        text.shape if isinstance(text, Tensor) else None,
        getattr(text, "dtype", None),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled(sample.device.type),
    )


def call_facts(
    topology: Topology,
    sample: Tensor,
    text: Any = None,
    *,
    extras: tuple[str, ...] = (),
    residuals: tuple[str, ...] = (),
    model: nn.Module | None = None,
    whole: bool = False,
    hook: str = "",
) -> CallFacts:
    """The facts of a call.

    Args:
        topology: of the graph that it needs.
        sample: (B, C, h, w).
        text: (B, L, D), or what came in its place.
        extras: names of optional arguments that were given.
        residuals: what `mixed_residuals` tells of the call.
        model: whose weights serve it; None: it has none.
        whole: one graph for the whole model.
        hook: around something that holds the model, see `hook_of`.
    """
    batch, channels, height, width = sample.shape
    first = getattr(model, "conv_in", None)
    takes = conv_channels(first)[0] if is_conv(first) else channels
    fits = isinstance(text, Tensor) and text.ndim == 3 and text.shape[0] == batch and text.dtype == sample.dtype
    return CallFacts(
        topology=topology,
        height=height,
        width=width,
        batch=batch,
        tokens=text.shape[1] if fits else 0,
        dtype=str(sample.dtype),
        device=str(sample.device),
        extras=extras,
        whole=whole,
        grad=torch.is_grad_enabled(),
        autocast=torch.is_autocast_enabled(sample.device.type),
        tensor_text=text is None or fits,
        channels=(channels, takes),
        residuals=residuals,
        weights=str(sample.device if model is None else next(model.parameters()).device),
        hook=hook or hook_of(model),
    )


def mixed_residuals(sample: Tensor, down: Sequence[Tensor] | None, mid: Tensor | None) -> tuple[str, ...]:
    """The dtypes and devices of a ControlNet's residuals where they are not the sample's. Cheap, as `call_name`."""
    given = [*(down or ()), *(() if mid is None else (mid,))]
    others = {(one.dtype, one.device) for one in given} - {(sample.dtype, sample.device)}
    return tuple(sorted(f"{dtype} on {device}" for dtype, device in others))


def hook_of(module: Any) -> str:
    """The attribute in which a module has a hook of accelerate or diffusers around its forward; "" for none."""
    return next((name for name in _HOOKS if name in vars(module)), "") if module is not None else ""
