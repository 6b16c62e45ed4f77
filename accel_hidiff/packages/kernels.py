"""Triton kernels of a package as their source says: what each reads and writes, and how it works out where."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from accel_hidiff.packages.wrapper import Call, Kernel

_LOAD: Final = re.compile(r"tl\.load\((\w+) \+")
_STORE: Final = re.compile(r"tl\.store\((\w+) \+")
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
    """(bytes read, bytes written) of a call of a kernel; each load passes the whole of a tensor once."""
    tensors = dict(zip(kernel.parameters, call.arguments, strict=False))

    def total(counts: dict[str, int]) -> int:
        return sum(count * tensor.bytes for name, count in counts.items() if (tensor := tensors.get(name)) is not None)

    return total(facts.loads), total(facts.stores)


def _counted(names: list[str]) -> dict[str, int]:
    return {name: names.count(name) for name in dict.fromkeys(names)}
