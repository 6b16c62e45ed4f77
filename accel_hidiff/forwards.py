"""The forwards that HiDiffusion puts in the place of a diffusers module's own; each calls the one that it replaces.

They look at the `UNetCall` that they are in, and do what the replaced forward does outside of any.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from accel_hidiff.call import CallScope, Window
from accel_hidiff.errors import AccelHiDiffError, BadInput
from accel_hidiff.windows import windowed_attention

Forward = Callable[..., Any]


def require_parameters(forward: Forward, names: tuple[str, ...], what: str) -> None:
    """Looks at a signature before a forward is replaced; AccelHiDiffError if this diffusers has another one."""
    parameters = inspect.signature(forward).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    missing = [name for name in names if name not in parameters]
    if missing and not open_ended:
        raise AccelHiDiffError(
            f"cannot patch {what}: expected its forward to take {', '.join(names)}; it lacks {', '.join(missing)}; "
            "this release of diffusers is not supported"
        )


def window_attention(inner: Forward, scope: CallScope, index: int) -> Forward:
    """Self-attention inside of shifted windows; `index` is the block's number in its transformer."""
    require_parameters(inner, ("hidden_states", "encoder_hidden_states", "attention_mask"), "attention")

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        call = scope.call
        if call is None or call.window is None or kwargs.get("encoder_hidden_states") is not None:
            return inner(hidden_states, *args, **kwargs)
        if kwargs.get("attention_mask") is not None:
            raise BadInput("window attention has no use for an attention_mask; call the UNet without one")
        height, width, shifts, tables = call.window
        return windowed_attention(
            lambda windows: inner(windows, *args, **kwargs), hidden_states, height, width, shifts[index], tables
        )

    return forward


def window_frame(inner: Forward, scope: CallScope, first: int, count: int) -> Forward:
    """A transformer whose blocks are windowed: tells them the feature size and their shifts.

    `first` is the number of its first block among all windowed ones, `count` how many it has.
    """
    require_parameters(inner, ("hidden_states", "encoder_hidden_states", "return_dict"), "transformer")

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        call = scope.call
        if call is None or not call.topology.windowed:
            return inner(hidden_states, *args, **kwargs)
        height, width = hidden_states.shape[-2:]
        shifts = call.shifts_of(first, count)
        assert shifts is not None, "a windowed call has shifts"
        tables = call.tables_of(first, hidden_states.shape[0], (height, width), hidden_states.device)
        call.window = Window(height, width, shifts, tables)
        try:
            return inner(hidden_states, *args, **kwargs)
        finally:
            call.window = None

    return forward


def pool_after(inner: Forward, scope: CallScope) -> Forward:
    """A transformer whose output is average-pooled 2x2 in a pooled call; the size before is kept in the call."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = inner(*args, **kwargs)
        call = scope.call
        if call is None or not call.topology.pooled:
            return out
        call.before_pool = out[0].shape[-2:]
        return _with_sample(out, pool(out[0]))

    return forward


def pool(image: Tensor) -> Tensor:
    """Average of 2x2; an odd side is rounded up."""
    return F.avg_pool2d(image, kernel_size=2, stride=2, ceil_mode=True)


def resize(image: Tensor, size: Sequence[int]) -> Tensor:
    """Bicubic, to (height, width)."""
    return F.interpolate(image, size=tuple(size), mode="bicubic", align_corners=False)


def resize_after(inner: Forward, scope: CallScope) -> Forward:
    """A transformer whose output is resized bicubically to the size before the pool."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = inner(*args, **kwargs)
        call = scope.call
        if call is None or call.before_pool is None:
            return out
        return _with_sample(out, resize(out[0], call.before_pool))

    return forward


def _with_sample(out: Any, sample: Tensor) -> Any:
    return (sample,) if isinstance(out, tuple) else type(out)(sample=sample)


def dilated(inner: Forward, scope: CallScope) -> Forward:
    """A downsampler, a 3x3 convolution of stride 2 and padding 1, that has stride 4, padding 2, dilation 2 in a dilated
    call.

    Such a convolution sees every other row and column only: it is the ordinary one over those. So the downsampler runs
    as it is, with whatever is in it (LoRA layers above all), on a quarter of its input.
    """

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        call = scope.call
        if call is not None and call.topology.dilated:
            hidden_states = every_other(hidden_states)
        return inner(hidden_states, *args, **kwargs)

    return forward


def every_other(image: Tensor) -> Tensor:
    """The rows and columns that a downsampler sees in a dilated call."""
    return image[:, :, ::2, ::2]


def require_downsampler(module: Any, path: str) -> None:
    """AccelHiDiffError unless a module is the strided 3x3 convolution that `dilated` can dilate."""
    weight = module.conv.weight if getattr(module, "use_conv", False) else None
    if weight is None or tuple(weight.shape[-2:]) != (3, 3) or module.padding != 1:
        raise AccelHiDiffError(
            f"cannot patch {path}: expected a 3x3 convolution of stride 2 and padding 1 as downsampler, got {module}"
        )
