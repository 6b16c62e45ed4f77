"""The unconditional prediction on its way through code that passes on one tensor: the blocks of modular diffusers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from accel_hidiff.errors import BadInput

_METADATA = ("shape", "dtype", "device", "ndim")


class GuidedPrediction(Tensor):
    """A guided prediction, any shape, that nothing can compute with before a CFG++ scheduler has taken it apart.

    Its shape, dtype and device can be read; any operation is BadInput.
    """

    uncond_output: Tensor  # of the same shape and dtype

    @classmethod
    def join(cls, guided: Tensor, uncond: Tensor) -> GuidedPrediction:
        """Shares the memory of both."""
        joined = guided.as_subclass(cls)
        joined.uncond_output = uncond
        return joined

    def take_apart(self) -> tuple[Tensor, Tensor]:
        """The guided and the unconditional prediction, plain tensors."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor), self.uncond_output

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__repr__" or (name == "__get__" and func.__self__.__name__ in _METADATA):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise BadInput(
            f"CFGPlusPlusGuidance: expected a CFG++ scheduler to take its prediction, got {name} by something else; "
            "use pipe.update_components(scheduler=counterpart(pipe.scheduler).from_config(pipe.scheduler.config)), "
            "counterpart of accel_hidiff.schedulers"
        )
