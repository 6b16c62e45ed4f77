"""How long a call of a package takes on a device, counted from its source: bytes and operations at measured speeds.

It is a prediction to be proven wrong by a measurement: kernels that wait for each other, launches and caches are not in
it. Products, convolutions and attention take as long as their operations, Triton's kernels as long as their bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from accel_hidiff.packages.facts import PackageFacts
from accel_hidiff.packages.kernels import traffic
from accel_hidiff.packages.wrapper import Call, Tensor

_WIDENING: Final = "mm_dtype_out"  # its result is wider than its factors: float32 scores
_PRODUCTS: Final = ("mm_out", "addmm_out", "bmm_out", "baddbmm_out", _WIDENING)
_ATTENTION: Final = "_scaled_dot_product_"
_WIDE_HEAD: Final = 256  # wider ones no kernel is made for


@dataclass(frozen=True)
class Speeds:
    """What a device reaches: 10^12 operations a second, and 10^12 bytes a second.

    A multiplication and an addition are two operations.
    """

    products: float
    convolutions: float
    attention: float
    wide_attention: float
    memory: float


# In bfloat16, inside of a UNet step (benchmarks/results/gpu/h200-prototype-2026-11-27.jsonl): attention by cuDNN from
# 430 to 470; of a head of 512, in a VAE, 140. Single convolutions reached 430 to 670; all 13.3e12 operations of those
# of a step at 2048x2048 took 17.0 ms, 12.2 % of 139.9, so the upper end counts.
H200: Final = Speeds(products=690, convolutions=670, attention=450, wide_attention=140, memory=4.1)


@dataclass(frozen=True)
class Work:
    """What one call does.

    Attributes:
        products, convolutions, attention: operations.
        wide_attention: operations of attention by heads of more than 256 channels.
        moved: bytes that Triton's kernels read and write, and scores that products write.
    """

    products: float = 0.0
    convolutions: float = 0.0
    attention: float = 0.0
    wide_attention: float = 0.0
    moved: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(one + two for one, two in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __mul__(self, times: int) -> Work:
        return Work(*(value * times for value in vars(self).values()))

    def milliseconds(self, speeds: Speeds) -> dict[str, float]:
        """Of each kind of work, and in all.

        >>> Work(products=690e9, moved=4.1e9).milliseconds(H200)["in all"]
        2.0
        """
        given = {
            "products": self.products / speeds.products,
            "convolutions": self.convolutions / speeds.convolutions,
            "attention": self.attention / speeds.attention + self.wide_attention / speeds.wide_attention,
            "kernels": self.moved / speeds.memory,
        }
        found = {name: value / 1e9 for name, value in given.items()}
        return {**found, "in all": sum(found.values())}


def work_of(facts: PackageFacts) -> Work:
    """The work of a call with the inputs that the package was read for."""
    total = Work()
    for call in facts.wrapper.calls:
        if call.kind == "triton":
            if (kernel := facts.wrapper.kernels.get(call.name)) is not None:
                total += Work(moved=sum(traffic(call, kernel, facts.kernels[call.name])))
        else:
            total += _of_operator(call)
    return total


def _of_operator(call: Call) -> Work:
    tensors = [tensor for tensor in call.arguments if tensor is not None]
    if call.name in _PRODUCTS:
        left, right = [tensor for tensor in tensors if len(tensor.sizes) > 1][-2:]
        written = 0 if call.name != _WIDENING or call.out is None else call.out.bytes
        return Work(products=2 * left.count * right.sizes[-1], moved=written)
    if call.name == "convolution" and call.out is not None:
        weight: Tensor = tensors[1]
        return Work(convolutions=2 * call.out.count * math.prod(weight.sizes[1:]))
    if call.name.startswith(_ATTENTION):
        query, key = tensors[:2]
        operations = 4 * query.count * key.sizes[-2]
        return Work(wide_attention=operations) if query.sizes[-1] > _WIDE_HEAD else Work(attention=operations)
    return Work()
