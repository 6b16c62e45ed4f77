"""Inductor's C++ source of a package: its weights, and what it calls in which order over which tensors.

It is read, not compiled: sizes are worked out for given inputs, so that bytes can be counted. The forms that are looked
for are those of torch 2.11 to 2.15.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from accel_hidiff.errors import CompileFailed

_BITS: Final = {"float32": 32, "float16": 16, "bfloat16": 16, "int64": 64, "int32": 32, "bool": 8, "float64": 64}

_CONSTANT: Final = re.compile(r"constants_info_\[(\d+)\]\.(\w+) = (.*);")
_ARRAY: Final = re.compile(r"int64_t (int_array_\d+)\[\] = \{(.*?)\};")
_INTEGER: Final = re.compile(r"(?:int64_t |auto )?(\w+) = ([^;]*);$")
_EMPTY: Final = re.compile(
    r"aoti_torch_empty_strided\(\d+, (int_array_\d+), (int_array_\d+), cached_torch_dtype_(\w+),.*&(\w+)_handle\)"
)
_MOVED: Final = re.compile(r"auto (\w+) = std::move\((\w+)\);")
_VIEW: Final = re.compile(r"reinterpret_tensor_wrapper\((\w+), \d+, (int_array_\d+), (int_array_\d+), ")
_NAMED_VIEW: Final = re.compile(r"auto (\w+) = wrap_with_raii_handle_if_needed\((reinterpret_tensor_wrapper\(.*?\))\)")
_SAME: Final = re.compile(r"aoti_torch_new_tensor_handle\((\w+), &(\w+)\)")
_HANDLE: Final = re.compile(r"RAIIAtenTensorHandle\((\w+)\)")
_TRITON: Final = re.compile(r"call_(triton_\w+)\((.*)\);")
_EXTERN: Final = re.compile(r"aoti_torch_(?:cuda|cpu)_(\w+)\((.*)\)\);")
_SIZE_OF: Final = re.compile(r"auto (\w+)_size = \w+\.sizes\(\);")
_KERNEL: Final = re.compile(r"@triton\.jit\s+def (\w+)\((.*?)\):\n(.*?)'''", re.DOTALL)
_CAST: Final = re.compile(r"static_cast<int64_t>\(")


@dataclass(frozen=True)
class Tensor:
    """Sizes, strides and dtype of something that a package computes with.

    Attributes:
        name: of its memory; views of it have the same one.
    """

    name: str
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str

    @property
    def count(self) -> int:
        """Of its numbers."""
        return math.prod(self.sizes)

    @property
    def bytes(self) -> int:
        """That its numbers take."""
        return self.count * _BITS.get(self.dtype, 32) // 8

    @property
    def channels_last(self) -> bool:
        """Whether an image (N, C, H, W) has its channels beside each other."""
        return len(self.strides) == 4 and self.strides[1] == 1 and self.sizes[1] > 1


@dataclass(frozen=True)
class Call:
    """One call of a kernel.

    Attributes:
        kind: "triton" or "extern".
        name: the kernel's, or the operator's ("convolution").
        arguments: tensors in the order of its parameters; None for what is none.
        out: the tensor that an operator makes.
    """

    kind: str
    name: str
    arguments: tuple[Tensor | None, ...]
    out: Tensor | None = None


@dataclass(frozen=True)
class Weight:
    """A weight that the package takes from outside, or has made of others (`folded`).

    Attributes:
        name: in the region.
        kind: "Parameter", "Buffer", "TensorConstant", ...
    """

    name: str
    kind: str
    folded: bool


@dataclass(frozen=True)
class Kernel:
    """A Triton kernel.

    Attributes:
        parameters: names, in their order.
        body: its Python source.
    """

    parameters: tuple[str, ...]
    body: str


@dataclass(frozen=True)
class Wrapper:
    """What the source says.

    Attributes:
        weights: of the region.
        calls: in their order.
        kernels: Triton kernels by name.
        inputs: the region's own.
    """

    weights: tuple[Weight, ...]
    calls: tuple[Call, ...]
    kernels: Mapping[str, Kernel]
    inputs: tuple[Tensor, ...]


def read_wrapper(source: str, inputs: Sequence[tuple[Sequence[int], str, Sequence[int]]]) -> Wrapper:
    """Reads a source.

    Args:
        source: C++, of `archive.read_archive`.
        inputs: (sizes, dtype, strides) of each of the region's input tensors: what sizes are worked out for.

    Raises:
        CompileFailed: it is not in the form that is known.
    """
    start = source.rfind("AOTInductorModel::run_impl(")
    if start < 0:
        raise CompileFailed("package: expected the source of an AOTInductor model, got one without run_impl")
    kernels = {name: Kernel(_parameters(head), body) for name, head, body in _KERNEL.findall(source)}
    weights, shapes = _weights(source)
    run = _Run(inputs, shapes)
    for line in source[start:].splitlines():
        try:
            run.read(line.strip())
        except (KeyError, IndexError, ValueError, SyntaxError, TypeError) as problem:
            raise CompileFailed(
                f"package: expected Inductor's source in a known form, got {line.strip()[:120]!r} ({problem!r}); it is "
                "read as torch 2.11 to 2.15 write it"
            ) from problem
    return Wrapper(weights, tuple(run.calls), kernels, tuple(run.inputs))


def _parameters(head: str) -> tuple[str, ...]:
    return tuple(name.split(":")[0].strip() for name in head.split(","))


def _weights(source: str) -> tuple[tuple[Weight, ...], dict[str, Tensor]]:
    facts: dict[int, dict[str, str]] = {}
    for number, name, value in _CONSTANT.findall(source):
        facts.setdefault(int(number), {})[name] = value
    found, shapes = [], {}
    for fact in facts.values():
        kind = re.search(r"ConstantType::(\w+)", fact.get("type", ""))
        name = fact.get("original_fqn", fact["name"]).strip('"')
        found.append(Weight(name, kind[1] if kind else "", fact.get("from_folded") == "true"))
        sizes, strides = (_numbers(fact.get(part, "{}")) for part in ("shape", "stride"))
        inner = fact["name"].strip('"')
        shapes[inner] = Tensor(inner, sizes, strides, fact.get("dtype", "").removeprefix("cached_torch_dtype_"))
    return tuple(found), shapes


def _numbers(braces: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"-?\d+", braces))


class _Run:
    """Follows `run_impl` line by line."""

    def __init__(
        self, inputs: Sequence[tuple[Sequence[int], str, Sequence[int]]], weights: Mapping[str, Tensor]
    ) -> None:
        self.calls: list[Call] = []
        self.inputs: list[Tensor] = []
        self._given = inputs
        self._numbers: dict[str, int | list[int]] = {}
        self._arrays: dict[str, tuple[int, ...]] = {}
        self._tensors: dict[str, Tensor] = dict(weights)

    def read(self, line: str) -> None:
        """One line."""
        if (taken := re.match(r"auto (\w+) = std::move\(inputs\[(\d+)\]\);", line)) is not None:
            sizes, dtype, strides = self._given[int(taken[2])]
            tensor = Tensor(taken[1], tuple(sizes), tuple(strides), dtype.removeprefix("torch."))
            self._tensors[taken[1]] = tensor
            self.inputs.append(tensor)
        elif (sized := _SIZE_OF.match(line)) is not None:
            self._numbers[f"{sized[1]}_size"] = list(self._tensors[sized[1]].sizes)
        elif (array := _ARRAY.search(line)) is not None:
            self._arrays[array[1]] = tuple(self._value(text) for text in _split(array[2]))
        elif (empty := _EMPTY.search(line)) is not None:
            self._tensors[empty[4]] = Tensor(empty[4], self._arrays[empty[1]], self._arrays[empty[2]], empty[3])
        elif (view := _NAMED_VIEW.match(line)) is not None and (viewed := self._tensor(view[2])) is not None:
            self._tensors[view[1]] = viewed
        elif (moved := _MOVED.match(line)) is not None:
            if moved[2] in self._tensors:
                self._tensors[moved[1]] = self._tensors[moved[2]]
        elif (same := _SAME.search(line)) is not None:
            if same[1] in self._tensors:
                self._tensors[same[2]] = self._tensors[same[1]]
        elif (triton := _TRITON.match(line)) is not None:
            self.calls.append(Call("triton", triton[1], tuple(map(self._tensor, _split(triton[2])))))
        elif (extern := _EXTERN.search(line)) is not None:
            self._extern(extern[1], _split(extern[2]))
        elif (integer := _INTEGER.match(line)) is not None:
            try:
                self._numbers[integer[1]] = self._value(integer[2])
            except (SyntaxError, ValueError, KeyError, TypeError):
                return  # not a number

    def _extern(self, name: str, arguments: Sequence[str]) -> None:
        tensors = tuple(map(self._tensor, arguments))
        made = [text[1:].removesuffix("_handle") for text in arguments if re.fullmatch(r"&\w+_handle", text)]
        out = tensors[0] if name.endswith("_out") else None
        if made and (first := tensors[0]) is not None:
            result = _made(name, made[0], first, tensors[1] if len(tensors) > 1 else None)
            out = self._tensors[made[0]] = result
        self.calls.append(Call("extern", name, tensors[1:] if name.endswith("_out") else tensors, out))

    def _tensor(self, text: str) -> Tensor | None:
        if (view := _VIEW.search(text)) is not None:
            base = self._tensors.get(view[1])
            return base and Tensor(base.name, self._arrays[view[2]], self._arrays[view[3]], base.dtype)
        handle = _HANDLE.fullmatch(text.strip())
        return self._tensors.get(text.strip() if handle is None else handle[1])

    def _value(self, text: str) -> int:
        """A C++ expression over integers."""
        text = re.sub(r"(\d)LL?\b", r"\1", text).replace("c10::div_floor_integer", "floordiv").replace("&&", " and ")
        text = _CAST.sub("(", text).replace("std::max", "max").replace("std::min", "min")
        return int(self._node(ast.parse(text.strip(), mode="eval").body))

    def _node(self, node: ast.expr) -> int | Fraction:
        match node:
            case ast.Constant(value=int(number)):
                return number
            case ast.Constant(value=float(share)):  # of a size: (1.0/2.0)*height
                return Fraction(share)
            case ast.Name(id=name):
                found = self._numbers[name]
                return found if isinstance(found, int) else len(found)
            case ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=int(index))):
                sizes = self._numbers[name]
                return sizes[index] if isinstance(sizes, list) else sizes
            case ast.UnaryOp(op=ast.USub(), operand=inner):
                return -self._node(inner)
            case ast.BinOp(left=left, op=operation, right=right):
                one, other = self._node(left), self._node(right)
                match operation:
                    case ast.Add():
                        return one + other
                    case ast.Sub():
                        return one - other
                    case ast.Mult():
                        return one * other
                    case ast.Div() if isinstance(one, Fraction) or isinstance(other, Fraction):
                        return Fraction(one) / other
                    case ast.Div() | ast.FloorDiv():
                        return one // other
                    case ast.Mod():
                        return one % other
            case ast.Call(func=ast.Name(id=function), args=arguments):
                values = [self._node(argument) for argument in arguments]
                match function:
                    case "floordiv":
                        return values[0] // values[1]
                    case "max":
                        return max(values)
                    case "min":
                        return min(values)
        raise ValueError(f"expected integers, got {ast.unparse(node)}")


def _made(name: str, out: str, first: Tensor, second: Tensor | None) -> Tensor:
    """The tensor that an operator makes of its first two: an attention's is as its query; a convolution's has the
    channels of its weight, and the layout of its image."""
    if name != "convolution" or second is None or len(first.sizes) != 4:
        return Tensor(out, first.sizes, first.strides, first.dtype)
    batch, _, height, width = first.sizes
    channels = second.sizes[0]
    last = (height * width * channels, 1, width * channels, channels)
    strides = last if first.channels_last else (channels * height * width, height * width, width, 1)
    return Tensor(out, (batch, channels, height, width), strides, first.dtype)


def _split(text: str) -> list[str]:
    """Arguments of a call: commas inside of brackets do not part them."""
    parts, depth, current = [], 0, ""
    for character in text:
        if character == "," and not depth:
            parts.append(current.strip())
            current = ""
            continue
        depth += (character in "([{<") - (character in ")]}>")
        current += character
    return [*parts, current.strip()] if current.strip() else parts
