"""The facts of one package, for `check` to judge and `report` to show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from accel_hidiff.packages.archive import read_archive
from accel_hidiff.packages.cubin import Usage, architecture_of, usage_of
from accel_hidiff.packages.kernels import KernelFacts, read_kernel, tensors_of, traffic
from accel_hidiff.packages.native import NativeFacts, read_native
from accel_hidiff.packages.wrapper import Call, Tensor, Wrapper, read_wrapper

_SMALL: Final = 16  # a tensor so many times smaller than the largest one does not count as a pass over memory


@dataclass(frozen=True)
class PackageFacts:
    """What is in a package.

    Attributes:
        native: of its shared library.
        wrapper: of its source, for the inputs that it was compiled with.
        kernels: Triton kernel -> what its source shows.
        architectures: of the GPU's code in it, each once.
        usage: kernel -> registers and stack.
        code_bytes, size: of the GPU's code; of the file.
    """

    native: NativeFacts
    wrapper: Wrapper
    kernels: dict[str, KernelFacts]
    architectures: tuple[str, ...]
    usage: dict[str, Usage]
    code_bytes: int
    size: int

    @property
    def externs(self) -> Counter[str]:
        """How often each operator is called that is no kernel of Triton's."""
        return Counter(call.name for call in self.wrapper.calls if call.kind == "extern")

    @property
    def convolutions(self) -> list[Call]:
        """The calls of convolutions over images."""
        calls = [call for call in self.wrapper.calls if call.name == "convolution" and call.arguments]
        return [call for call in calls if call.arguments[0] is not None and len(call.arguments[0].sizes) == 4]

    def passes(self) -> Passes:
        """The bytes that pass memory, and the least that could."""
        return _passes(self)

    @property
    def registers(self) -> int:
        """The most that a thread of a kernel has."""
        return max((usage.registers for usage in self.usage.values()), default=0)

    @property
    def stack_bytes(self) -> int:
        """The most that a thread of a kernel spills."""
        return max((usage.stack_bytes for usage in self.usage.values()), default=0)


@dataclass(frozen=True)
class Passes:
    """Memory traffic of the activations of one call of a package.

    Attributes:
        triton_bytes: that Triton's kernels read and write.
        extern_bytes: that operators (products, convolutions, attention) take and give.
        least_bytes: that Triton's kernels would read and write if whatever lies between two operators were one pass:
            each tensor that an operator gives, or the region takes, read once, each that an operator takes, or the
            region gives, written once.
        transposed_bytes: that kernels which read along one axis and write along another read and write.
    """

    triton_bytes: int
    extern_bytes: int
    least_bytes: int
    transposed_bytes: int

    @property
    def over_least(self) -> float:
        """How many times the least; 1.0 where nothing is wasted."""
        return round(self.triton_bytes / self.least_bytes, 2) if self.least_bytes else 0.0


def read_package(path: Path, inputs: Sequence[Any]) -> PackageFacts:
    """Reads a package.

    Args:
        path: of the `.pt2` file.
        inputs: [sizes, dtype, strides] of each input, as the artifact notes them; or other sizes.

    Raises:
        CompileFailed: it is not a package, or its source has another form than the known ones.
    """
    archive = read_archive(path)
    native = read_native(archive.library)
    cubins = native.cubins or archive.cubins
    usage: dict[str, Usage] = {}
    for code in cubins.values():
        usage |= usage_of(code)
    wrapper = read_wrapper(archive.wrapper, [(sizes, dtype, strides) for sizes, dtype, strides in inputs])
    return PackageFacts(
        native=native,
        wrapper=wrapper,
        kernels={name: read_kernel(kernel) for name, kernel in wrapper.kernels.items()},
        architectures=tuple(sorted({architecture_of(code) for code in cubins.values()})),
        usage=usage,
        code_bytes=sum(map(len, cubins.values())),
        size=archive.size,
    )


def _passes(facts: PackageFacts) -> Passes:
    calls = facts.wrapper.calls
    tensors = [tensor for call in calls for tensor in (*call.arguments, call.out) if tensor is not None]
    largest = max((tensor.bytes for tensor in tensors), default=0)

    def counts(tensor: Tensor | None) -> bool:
        return tensor is not None and tensor.bytes * _SMALL > largest and tensor.name not in weights

    weights = {weight.name.replace(".", "_") for weight in facts.wrapper.weights}
    triton = extern = transposed = 0
    for call in calls:
        if call.kind == "triton":
            if (kernel := facts.wrapper.kernels.get(call.name)) is not None:
                moved = sum(traffic(call, kernel, facts.kernels[call.name]))
                triton += moved
                transposed += moved if facts.kernels[call.name].transposes else 0
        else:
            extern += sum(
                tensor.bytes for tensor in (*call.arguments, call.out) if tensor is not None and counts(tensor)
            )
    return Passes(triton, extern, _least(facts, counts), transposed)


def _least(facts: PackageFacts, counts: Callable[[Tensor | None], bool]) -> int:
    """`Passes.least_bytes`. Memory is used again and again under one name: what counts is who wrote it last."""
    given = {tensor.name for tensor in facts.wrapper.inputs}  # by an operator or the caller, and not read yet
    made: set[str] = set()  # by a Triton kernel, and not taken yet
    least = result = 0
    for call in facts.wrapper.calls:
        if call.kind != "triton":
            for tensor in call.arguments:
                if tensor is not None and counts(tensor) and tensor.name in made:
                    least += tensor.bytes
                    made.remove(tensor.name)
            if call.out is not None:
                given.add(call.out.name)
                made.discard(call.out.name)
            result = 0
        elif (kernel := facts.wrapper.kernels.get(call.name)) is not None:
            found = facts.kernels[call.name]
            for tensor in tensors_of(call, kernel, found.loads).values():
                if counts(tensor) and tensor.name in given:
                    least += tensor.bytes
                    given.remove(tensor.name)
            stored = [tensor for tensor in tensors_of(call, kernel, found.stores).values() if counts(tensor)]
            made |= {tensor.name for tensor in stored}
            given -= made
            result = sum(tensor.bytes for tensor in stored)  # of the last call: what the region gives
    return least + result
