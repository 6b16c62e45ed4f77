"""Weights of convolutions in another memory format, for as long as somebody wants them so."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

_FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


class ConvertedWeights:
    """The (O, I, h, w) weights of some models, laid out anew in memory; the parameters stay the same objects.

    Args:
        models: modules; None are passed over.
        memory_format: "channels_last" or "contiguous".
    """

    def __init__(self, models: Iterable[nn.Module | None], memory_format: str) -> None:
        wanted = _FORMATS[memory_format]
        self._changed: list[tuple[nn.Parameter, tuple[int, ...]]] = []
        for weight in (weight for model in models if model is not None for weight in model.parameters()):
            if weight.ndim == 4 and not weight.is_contiguous(memory_format=wanted):
                self._changed.append((weight, weight.stride()))
                weight.data = weight.data.contiguous(memory_format=wanted)

    def undo(self) -> None:
        """Lays them out as they were; their values stay what they are by now."""
        for weight, strides in self._changed:
            weight.data = _laid_out(weight.data, strides)
        self._changed.clear()


def _laid_out(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
