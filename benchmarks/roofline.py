"""What a device can do at most, and what a call asks of it: TFLOP and bytes, as times no call can beat."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count

# Sides of the matmul and bytes of the copy: as large as a device answers quickly, and far larger than its caches.
_SIZES: Final = {"cuda": (8192, 2**31), "cpu": (2048, 2**28)}
_TINY_SIZES: Final = (256, 2**22)
_aten = torch.ops.aten
_WRITE_ONLY: Final = ("copy_", "fill_", "zero_")  # their first argument is written and not read
_ALLOCATIONS: Final = ("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "empty_permuted")


@dataclass(frozen=True)
class Ceilings:
    """Speeds that were measured on a device.

    Attributes:
        matmul_tflop_per_s: of a large square matmul.
        copy_gb_per_s: of a large copy within the device's memory, bytes read and bytes written.
    """

    matmul_tflop_per_s: float
    copy_gb_per_s: float

    def floor_ms(self, work: Work) -> float:
        """Milliseconds that the arithmetic takes at the matmul's speed."""
        return work.tflop / self.matmul_tflop_per_s * 1e3

    def traffic_ms(self, work: Work) -> float:
        """Milliseconds that eager's operands take at the copy's speed."""
        return work.eager_gb / self.copy_gb_per_s * 1e3

    def share(self, work: Work, ms: float) -> float:
        """Share of the matmul's speed that a call of so many milliseconds reaches, 0..1 but for noise."""
        return self.floor_ms(work) / ms


@dataclass(frozen=True)
class Work:
    """What one eager call asks for.

    Attributes:
        tflop: of convolutions, matmuls and attention, a multiply-add counted as two; nothing else is counted.
        eager_gb: gigabytes (10^9) that operators read and write if each takes every operand from memory once and
            brings every result back once. It is what eager's operators exchange, a cause for fusing them. It is not
            what the memory chips see: caches serve a part of it, and what a kernel reads twice, pads, converts or
            keeps in a workspace is not in it. Views and allocations count nothing.
    """

    tflop: float
    eager_gb: float


def ceilings(device: torch.device, dtype: torch.dtype, tiny: bool = False, repeats: int = 10) -> Ceilings:
    """Measures a device: medians of single calls over random data (zeros run faster than any real data).

    Args:
        device: where.
        dtype: of the matmul.
        tiny: small operands, for a smoke run; the figures mean nothing then.
        repeats: timed calls of each.
    """
    side, size = _TINY_SIZES if tiny else _SIZES[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(a)
    matmul_s = median_seconds(partial(torch.mm, a, b, out=product), device, repeats)
    source = torch.randint(0, 2**31 - 1, (size // 4,), device=device, dtype=torch.int32)
    copy_s = median_seconds(partial(torch.empty_like(source).copy_, source), device, repeats)
    return Ceilings(2 * side**3 / matmul_s / 1e12, 2 * size / copy_s / 1e9)


def median_seconds(call: Callable[[], object], device: torch.device, repeats: int = 10, warmup: int = 3) -> float:
    """Median seconds of a call: between two events on a GPU's stream, by the wall clock elsewhere."""
    for _ in range(warmup):
        call()
    if device.type != "cuda":
        return statistics.median(_wall_seconds(call) for _ in range(repeats))
    torch.cuda.synchronize(device)
    pairs = []
    for _ in range(repeats):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        call()
        last.record()
        pairs.append((first, last))
    torch.cuda.synchronize(device)
    return statistics.median(first.elapsed_time(last) for first, last in pairs) / 1e3


def _wall_seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def count(call: Callable[[], object]) -> Work:
    """What a call asks for; it runs once. Only operators of PyTorch are seen: count eager calls, not compiled ones."""
    traffic = _Traffic()
    with FlopCounterMode(display=False, custom_mapping=_missing_formulas()) as flops, traffic:
        call()
    return Work(flops.get_total_flops() / 1e12, traffic.bytes / 1e9)


def _missing_formulas() -> dict[Any, Any]:
    """Attention kernels that torch's own table of formulas does not know (on a CPU it knows none)."""
    name = "_scaled_dot_product_flash_attention_for_cpu"
    operator = getattr(_aten, name, None)
    return {} if operator is None or operator in flop_registry else {operator: _attention_flop}


def _attention_flop(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Of two products over (B, heads, N, width) shapes; a mask saves nothing."""
    return int(sdpa_flop_count(query, key, value))


class _Traffic(TorchDispatchMode):
    """Sums the bytes of the operands and results of all operators that move data."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if isinstance(func, torch._ops.OpOverload):
            self.bytes += _moved(func, args, kwargs, out)
        return out


def _moved(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> int:
    """Bytes that one operator reads and writes."""
    name = func._schema.name.partition("::")[2]
    results = {id(tensor): tensor for tensor in _tensors(out)}
    if name in _ALLOCATIONS or not results:
        return 0
    taken = args[1:] if name in _WRITE_ONLY else args
    operands = {id(tensor): tensor for tensor in _tensors((taken, kwargs))}
    if not func._schema.is_mutable and _same_memory(operands.values(), results.values()):
        return 0  # a view
    return sum(_bytes(tensor) for tensor in (*operands.values(), *results.values()))


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _same_memory(operands: Any, results: Any) -> bool:
    held = {tensor.untyped_storage().data_ptr() for tensor in operands}
    return all(tensor.numel() and tensor.untyped_storage().data_ptr() in held for tensor in results)


def _bytes(tensor: Tensor) -> int:
    """Of distinct elements: an expanded dimension is stored once."""
    stored = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        stored *= size if stride else min(size, 1)
    return stored * tensor.element_size()
