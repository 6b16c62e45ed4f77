"""Replicas: pipelines with modules of their own over the weights of another one, for several threads."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from accel_hidiff.errors import BadInput
from accel_hidiff.undo import refuse_copy


def replica(pipe_or_module: Any) -> Any:
    """Another pipeline (or module) over the same weights, to be used in another thread at the same time.

    It has its own modules, scheduler and tokenizers, so that no state of a request is shared; each can be patched or
    accelerated by itself. Its parameters and buffers are tensors of its own over the same memory: a weight that is
    changed in place (`fuse_lora`, `load_state_dict`) is changed in all replicas, also in the middle of a request;
    what is moved, cast or replaced in one (`to(...)`, `load_state_dict(assign=True)`, `load_lora_weights`) is
    changed in that one alone. Takes a few milliseconds for every hundred modules, and next to no memory.

    Args:
        pipe_or_module: a diffusers pipeline, or one of its modules; not patched, not accelerated.

    Raises:
        BadInput: it is neither.
        PatchConflict: it is patched or accelerated, so that a copy would run the original's weights.
    """
    if any(name.startswith("_accel_hidiff") for name in getattr(pipe_or_module, "__dict__", ())):
        raise refuse_copy()
    if isinstance(pipe_or_module, nn.Module):
        return _copied(pipe_or_module)
    components = getattr(pipe_or_module, "components", None)
    if not isinstance(components, dict):
        raise BadInput(f"expected a diffusers pipeline or a module, got {type(pipe_or_module).__name__}")
    memo: dict[int, Any] = {}  # modules that share submodules do so in the copy, too
    made = copy.copy(pipe_or_module)
    for name, component in components.items():
        if isinstance(component, nn.Module):
            vars(made)[name] = _copied(component, memo)
        elif name in vars(made):
            vars(made)[name] = copy.deepcopy(component, memo)
    return made


def _copied(module: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    memo = {} if memo is None else memo
    for sub in module.modules():
        stores: tuple[dict[str, Tensor | None], ...] = (sub._parameters, sub._buffers)  # type: ignore[assignment]
        for held in stores:
            for tensor in held.values():
                if tensor is not None and id(tensor) not in memo:
                    memo[id(tensor)] = _over_the_same_memory(tensor)
    made: nn.Module = copy.deepcopy(module, memo)
    return made


def _over_the_same_memory(tensor: Tensor) -> Tensor:
    if type(tensor) is nn.Parameter:
        return nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)
    return tensor.detach() if type(tensor) is Tensor else tensor  # a subclass (quantized) knows better what it holds
