"""What goes into one UNet call, and the tensors at fixed addresses that a graph takes it from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from accel_hidiff.call import UNetCall
from accel_hidiff.regions.ends import added_shapes, takes_added

ADDED: Final = ("text_embeds", "time_ids")  # the added conditions that a graph has a place for


@dataclass(slots=True)
class StepInputs:
    """The inputs of a UNet call.

    Attributes:
        call: its topology and shifts.
        sample: (B, C, h, w).
        timestep: a number or a 0-d tensor, on any device.
        text: (B, L, D).
        added: the added conditions by name.
    """

    call: UNetCall
    sample: Tensor
    timestep: Any
    text: Any
    added: Mapping[str, Any] = field(default_factory=dict)

    def tensors(self) -> list[Any]:
        """All of them but the timestep, always in the same order."""
        return [self.sample, self.text, *map(self.added.get, ADDED), *self.call.tensors()]

    def kwargs(self) -> dict[str, Any]:
        """What the UNet takes by name."""
        return {"return_dict": False, **({"added_cond_kwargs": dict(self.added)} if self.added else {})}


class StaticInputs:
    """A place for the inputs of every call that is like a given one in shapes and dtypes, on the device of its sample.

    Numbers and timesteps of every dtype become one float32 number, which is what a UNet makes of them anyway.
    """

    def __init__(self, like: StepInputs) -> None:
        with torch.inference_mode(False):
            self._tensors = [None if one is None else torch.empty_like(one) for one in like.tensors()]
            self._timestep = torch.zeros((), device=like.sample.device)
        self._facts = list(map(_facts, self._tensors))
        self._call = like.call
        self.fill(like)

    def takes(self, inputs: StepInputs) -> bool:
        """Whether a call's inputs fit in; a copy would broadcast those that do not."""
        timestep, given = inputs.timestep, inputs.tensors()
        if timestep.ndim if isinstance(timestep, Tensor) else not isinstance(timestep, int | float):
            return False
        if any(value is not None and name not in ADDED for name, value in inputs.added.items()):
            return False
        return list(map(_facts, given)) == self._facts

    def fill(self, inputs: StepInputs) -> None:
        """Copies a call's inputs into their places."""
        for place, given in zip(self._tensors, inputs.tensors(), strict=True):
            if place is not None:
                place.copy_(given)
        timestep = inputs.timestep
        if isinstance(timestep, Tensor) and timestep.device == self._timestep.device:
            self._timestep.copy_(timestep)
        else:
            self._timestep.fill_(float(timestep))

    def inputs(self) -> StepInputs:
        """The places as a call's inputs; a new `UNetCall` each time, since a call keeps its state there."""
        sample, text, *rest = self._tensors
        added = {name: one for name, one in zip(ADDED, rest, strict=False) if one is not None}
        assert sample is not None, "every call has a sample"
        carried = [one for one in rest[len(ADDED) :] if one is not None]
        return StepInputs(self._call.over(carried), sample, self._timestep, text, added)

    def held(self) -> list[Tensor]:
        """The places."""
        return [self._timestep, *(one for one in self._tensors if one is not None)]


def _facts(given: Any) -> Any:
    return (given.shape, given.dtype, given.device) if isinstance(given, Tensor) else given


def zero_inputs(unet: Any, batch: int, height: int, width: int, tokens: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a call of a UNet, zeros on its device: (sample, timestep, text), and by name the added conditions.

    Args:
        unet: a UNet2DConditionModel.
        batch, height, width: of the latents.
        tokens: length of the text.
    """
    config, options = unet.config, {"dtype": unet.dtype, "device": unet.device}
    with torch.inference_mode(False):
        sample = torch.zeros(batch, config.in_channels, height, width, **options)
        channels = config.encoder_hid_dim or config.cross_attention_dim
        text = torch.zeros(batch, tokens, channels if isinstance(channels, int) else channels[0], **options)
        kwargs: dict[str, Any] = {"return_dict": False}
        if takes_added(unet):
            shapes = added_shapes(config, batch)
            kwargs["added_cond_kwargs"] = {name: torch.zeros(shape, **options) for name, shape in shapes.items()}
        return (sample, torch.zeros((), device=unet.device), text), kwargs
