"""A structural fingerprint of a module: everything that its traced graph depends on but the values of its weights.

Two modules with the same fingerprint trace to the same graph. What has no stable form raises, so that nothing is keyed
by a type name or a repr alone.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import sys
import types
from collections.abc import Mapping
from enum import Enum
from itertools import islice
from operator import is_
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compile_cache import UnstableFactor

_INTERNALS = frozenset(vars(nn.Module())) - {"training"}
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_PLAIN = frozenset({int, float, bool, str, type(None), tuple})  # of which a changed value is another object
_VERSIONED = frozenset({"torch", "diffusers", "transformers", "accel_hidiff", "builtins"})  # their version is a factor
_ORIGIN = frozenset(
    {"_name_or_path", "_class_name", "_diffusers_version", "_use_default_values"}
)  # of a model's config
_MAX_DEPTH = 6


def structure(module: nn.Module, ignore: frozenset[int] = frozenset()) -> dict[str, Any]:
    """The facts, as JSON values: classes, attributes, parameters (shape, dtype, strides) and buffers by path.

    Args:
        module: the region's module.
        ignore: ids of `forward` functions that this package installed; their meaning is in the region's traits.

    Raises:
        UnstableFactor: an attribute has no stable form, a submodule has hooks, or somebody replaced a forward.
    """
    modules = {path or ".": _describe(path, sub, ignore) for path, sub in module.named_modules()}
    tensors = {
        name: [list(tensor.shape), str(tensor.dtype), _strides(tensor), isinstance(tensor, nn.Parameter)]
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
    }
    return {"modules": modules, "tensors": tensors}


def _strides(tensor: torch.Tensor) -> list[int]:
    """0 for a dimension of size 1, whose stride says nothing: weights of 1x1 convolutions are channels_last and
    contiguous at once, and which strides they have depends on who laid them out."""
    return [0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]


def fingerprint(module: nn.Module, ignore: frozenset[int] = frozenset()) -> str:
    """SHA-256 over `structure`, 64 hex digits."""
    text = json.dumps(structure(module, ignore), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class ModuleState:
    """What a module tree is made of at one moment, to see whether something of it was replaced since.

    Equal to a later one if every tensor (and its memory), submodule and its class, attribute, hook and processor is
    still the same object, those inside of an attribute's list or mapping and of a processor included; hooks on the
    module itself do not count. A weight that is changed in place makes no difference. Keeps what it holds alive, so
    that nothing new can come to lie at an old address.

    The tree is walked once, when the state is taken. Whether it still holds is told by looking again into the same
    mappings and lists: if one of them was exchanged, what holds it shows that.
    """

    __slots__ = ("_attributes", "_containers", "_empty", "_modules", "_objects", "_pointers", "_tensors")

    def __init__(self, module: nn.Module) -> None:
        attributes: list[tuple[dict[str, Any], int]] = []  # of modules that have any, and where they begin
        containers: list[Any] = []  # other mappings and lists with something in them
        empty: list[Any] = []
        tensors: list[torch.Tensor] = []
        modules: list[nn.Module] = []
        stack = [module]
        while stack:
            current = stack.pop()
            modules.append(current)
            held = vars(current)
            own = len(_INTERNALS) + 1 if next(iter(held)) == "training" else 0  # attributes come after torch's own
            attributes.append((held, own))
            inside: list[Any] = [value for value in islice(held.values(), own, None) if type(value) in (dict, list)]
            inside += [
                vars(value)
                for value in islice(held.values(), own, None)
                if type(value) not in _PLAIN and hasattr(value, "__dict__") and not isinstance(value, nn.Module)
            ]
            inside += [held[name] for name in ("_parameters", "_buffers", "_modules")]
            inside += [held[hooks] for hooks in _HOOKS if current is not module]  # its own run around its forward
            for container in inside:
                (containers if container else empty).append(container)
            for stored in (held["_parameters"], held["_buffers"]):
                tensors += [tensor for tensor in stored.values() if tensor is not None]
            stack += [submodule for submodule in held["_modules"].values() if submodule is not None]
        self._attributes, self._containers, self._empty, self._tensors = attributes, containers, empty, tensors
        self._modules = modules
        self._objects, self._pointers = self._contents(), _pointers(tensors)

    def holds(self) -> bool:
        """Whether the module tree is still what it was."""
        objects = self._contents()
        same = len(objects) == len(self._objects) and all(map(is_, objects, self._objects))
        return same and not any(self._empty) and _pointers(self._tensors) == self._pointers

    def _contents(self) -> list[Any]:
        found: list[Any] = list(map(type, self._modules))  # `__class__` can be set
        for held, own in self._attributes:
            found.append(held["training"])
            found.extend(islice(held.values(), own, None))
        for container in self._containers:
            found.extend(container if type(container) is list else container.values())
        return found

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ModuleState):
            return NotImplemented
        mine, others = self._objects, other._objects
        return len(mine) == len(others) and all(map(is_, mine, others)) and self._pointers == other._pointers

    __hash__ = None  # type: ignore[assignment]


def _pointers(tensors: list[torch.Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _describe(path: str, module: nn.Module, ignore: frozenset[int]) -> dict[str, Any]:
    where = path or type(module).__name__
    for hooks in _HOOKS:
        if any(not getattr(hook, "_accel_hidiff", False) for hook in getattr(module, hooks, {}).values()):
            raise UnstableFactor(
                f"{where}: expected a module without hooks, got {hooks.strip('_')}; a compiled region would skip them: "
                "remove the hooks (CPU offload installs some), or serve this model with backend='eager'"
            )
    attributes = {}
    for name, value in vars(module).items():
        if name in _INTERNALS or name.startswith("_accel_hidiff"):
            continue
        if name == "forward":
            if is_replaced(module) and id(value) not in ignore:
                raise UnstableFactor(
                    f"{where}: expected the class's own forward, got one that something else installed; undo that first"
                )
            continue
        if name in ("_hf_hook", "_diffusers_hook"):
            raise UnstableFactor(f"{where}: expected no offload hook, got {name}; remove it, or use backend='eager'")
        attributes[name] = _stable(value, f"{where}.{name}", 0)
    described = {"class": _code(type(module)), "attributes": attributes}
    forward = type(module).forward
    if not _is_versioned(forward) and _is_versioned(type(module)):  # somebody set it on the class
        described["forward"] = _stable(forward, f"{where}.forward", 0)
    return described


def is_replaced(module: nn.Module) -> bool:
    """Whether a module's forward is another one than its class's. Hooks that are removed leave that on the module."""
    forward = vars(module).get("forward")
    if forward is None:
        return False
    return getattr(forward, "__func__", None) is not type(module).forward or forward.__self__ is not module


def _stable(value: Any, where: str, depth: int) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return ["float", repr(value)]
    if isinstance(value, torch.dtype | torch.device | torch.memory_format):
        return [_code(type(value)), str(value)]
    if isinstance(value, Enum):
        return [_code(type(value)), _stable(value.value, where, depth + 1)]
    if depth < _MAX_DEPTH:
        if isinstance(value, list | tuple):
            return [_stable(item, where, depth + 1) for item in value]
        if isinstance(value, set | frozenset):
            return ["set", sorted((_stable(item, where, depth + 1) for item in value), key=json.dumps)]
        if isinstance(value, Mapping):
            kept = [(name, item) for name, item in value.items() if name not in _ORIGIN]
            pairs = [
                [_stable(name, where, depth + 1), _stable(item, f"{where}.{name}", depth + 1)] for name, item in kept
            ]
            return ["mapping", sorted(pairs, key=json.dumps)]
        if isinstance(value, functools.partial):
            parts = (value.func, value.args, value.keywords)
            return [_stable(part, where, depth + 1) for part in parts]
        if isinstance(value, type):
            return _code(value)
        if isinstance(value, types.FunctionType | types.BuiltinFunctionType):
            if getattr(value, "__closure__", None):
                raise UnstableFactor(f"{where}: expected a plain value, got the closure {value.__qualname__}")
            return _code(value)
        if isinstance(value, nn.Module):  # a module kept outside of the module tree
            return structure(value)
        if hasattr(value, "__dict__") and not isinstance(value, torch.Tensor | types.MethodType):
            return [_code(type(value)), _stable(vars(value), where, depth + 1)]
    raise UnstableFactor(f"{where}: expected a value with a stable form, got {type(value).__name__}")


def _code(thing: Any) -> str:
    """Qualified name, and the digest of the source file where no version of a known package covers it."""
    name = f"{thing.__module__}.{thing.__qualname__}"
    if _is_versioned(thing):
        return name
    return f"{name} {_source_digest(thing.__module__, name)}"


def _is_versioned(thing: Any) -> bool:
    return str(thing.__module__).split(".")[0] in _VERSIONED


@functools.lru_cache(maxsize=256)
def _source_digest(module_name: str, name: str) -> str:
    try:
        source = Path(inspect.getfile(sys.modules[module_name])).read_bytes()
    except (OSError, TypeError, KeyError):
        raise UnstableFactor(f"{name}: expected code from a source file, got none; move it into a module") from None
    return hashlib.sha256(source).hexdigest()
