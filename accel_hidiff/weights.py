"""A module's weights, replaced for a while by tensors that only look like them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def stood_in_for(module: nn.Module, make: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Other tensors in the place of a module's parameters and buffers, inside of the block.

    Args:
        module: whose weights are replaced; shared ones by one tensor.
        make: gives the tensor that stands in for one; it becomes a parameter where that one was.
    """
    made: dict[int, Tensor] = {}
    replaced: list[tuple[dict[str, Any], str, Tensor]] = []
    try:
        for sub in module.modules():
            stores: tuple[dict[str, Any], ...] = (sub._parameters, sub._buffers)
            for held in stores:
                for name, tensor in held.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in made:
                        made[id(tensor)] = _like(tensor, make(tensor))
                    replaced.append((held, name, tensor))
                    held[name] = made[id(tensor)]
        yield
    finally:
        for held, name, tensor in replaced:
            held[name] = tensor


def _like(weight: Tensor, made: Tensor) -> Tensor:
    if not isinstance(weight, nn.Parameter):
        return made
    return nn.Parameter(made, requires_grad=weight.requires_grad)


def zeros_like(weight: Tensor, device: torch.device) -> Tensor:
    """Zeros on a device, laid out as a weight is."""
    return torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device=device).zero_()
