"""The next network input, made by the step that made the sample: how it reaches a stock pipeline's next step.

Between two steps a pipeline doubles the batch, `torch.cat([latents] * 2)`, and asks its scheduler to scale it for the
network. A compiled step has done both already. Its sample is a `SteppedSample`, which any code may use, change or
replace as the tensor that it is; only the doubling of the very same, unchanged sample leads to a `DoubledSample`, and
only a scheduler that is asked for the very next timestep takes the scaled input from there (`ready_input`). In every
other case, with a callback that changes the latents or a mask that is blended in, the scheduler scales as it always
does.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from accel_hidiff.clock import index_in


class NextInput(NamedTuple):
    """A network input: (2 B, C, h, w), scaled for `timesteps[position]`."""

    scaled: Tensor
    timesteps: Tensor
    position: int


class SteppedSample(Tensor):
    """(B, C, h, w): a sample that knows the network input that follows from it, while nobody changes it in place."""

    following: NextInput
    _made: int  # version of the tensor

    @classmethod
    def of(cls, sample: Tensor, following: NextInput) -> Tensor:
        """Shares the sample's memory; the plain sample where a change in place would not be noticed."""
        if sample.is_inference():  # has no version
            return sample
        stepped = sample.as_subclass(cls)
        stepped.following, stepped._made = following, sample._version
        return stepped

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():  # to everybody it is a plain tensor: copies and pickles too
            result = func(*tree_map_only(cls, plain, args), **tree_map_only(cls, plain, kwargs or {}))
            if func is torch.cat and not kwargs and len(args) == 1 and len(args[0]) == 2:
                first, second = args[0]
                if first is second and first._version == first._made:
                    doubled = result.as_subclass(DoubledSample)
                    doubled.following, doubled._made = first.following, result._version
                    return doubled
        return result


class DoubledSample(Tensor):
    """(2 B, C, h, w): an unchanged `SteppedSample`, twice; not scaled yet."""

    following: NextInput
    _made: int

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # a plain tensor otherwise


def ready_input(doubled: Any, timestep: Any, timesteps: Tensor) -> Tensor | None:
    """The scaled input that the step before made.

    Args:
        doubled: what the scheduler is asked to scale.
        timestep: for which of `timesteps`, the scheduler's.

    Returns:
        None where `doubled` is something else, was changed, or is to be scaled for another timestep.
    """
    if type(doubled) is not DoubledSample or doubled._version != doubled._made:
        return None
    following = doubled.following
    if following.timesteps is not timesteps or index_in(timestep, timesteps) != following.position:
        return None
    return following.scaled


def plain(sample: Tensor) -> Tensor:
    """The same tensor, as a plain one."""
    with torch._C.DisableTorchFunctionSubclass():
        return sample.as_subclass(Tensor)
