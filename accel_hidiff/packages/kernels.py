"""Triton kernels of a package as their source says: what each reads and writes, and how it works out where."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from accel_hidiff.packages.wrapper import Call, Kernel, Tensor

_LOAD: Final = re.compile(r"tl\.load\((\w+) \+")
_STORE: Final = re.compile(r"tl\.store\((\w+) \+")
_POINTWISE: Final = "triton_poi_"
_RUN_TIME: Final = re.compile(r"(?://|%) \(?\(*(?:ks\d|ps\d|\w+numel)\b")  # divided by what only the call knows


@dataclass(frozen=True)
class KernelFacts:
    """What the source of a kernel shows.

    Attributes:
        loads, stores: parameter -> how often the whole of it passes.
        int64: indices are worked out in 64 bits.
        divisions: by run-time values, for each number.
        transposes: it reads along one axis and writes along another.
    """

    loads: dict[str, int]
    stores: dict[str, int]
    int64: bool
    divisions: int
    transposes: bool


def read_kernel(kernel: Kernel) -> KernelFacts:
    """Reads the source of a kernel."""
    loads, stores = (_counted(pattern.findall(kernel.body)) for pattern in (_LOAD, _STORE))
    index = kernel.body.split("tl.load")[0]
    return KernelFacts(
        loads,
        stores,
        int64=".to(tl.int64)" in index,
        divisions=len(_RUN_TIME.findall(kernel.body)),
        transposes="YBLOCK" in kernel.body,
    )


def traffic(call: Call, kernel: Kernel, facts: KernelFacts) -> tuple[int, int]:
    """(bytes read, bytes written) of a call of a kernel.

    Each load passes a tensor once: the whole of it, or in a pointwise kernel as many of its numbers as are written (the
    halves of a gated activation are two loads of one tensor).
    """
    stored = tensors_of(call, kernel, facts.stores)
    written = sum(facts.stores[name] * tensor.bytes for name, tensor in stored.items())
    most = max((tensor.count for tensor in stored.values()), default=0)
    read = 0
    for name, tensor in tensors_of(call, kernel, facts.loads).items():
        share = min(1.0, most / tensor.count) if call.name.startswith(_POINTWISE) and tensor.count else 1.0
        read += round(facts.loads[name] * tensor.bytes * share)
    return read, written


def tensors_of(call: Call, kernel: Kernel, names: Iterable[str]) -> dict[str, Tensor]:
    """The tensors that a call gives to these parameters of its kernel."""
    given = dict(zip(kernel.parameters, call.arguments, strict=False))
    return {name: tensor for name in names if (tensor := given.get(name)) is not None}


def _counted(names: list[str]) -> dict[str, int]:
    return {name: names.count(name) for name in dict.fromkeys(names)}
