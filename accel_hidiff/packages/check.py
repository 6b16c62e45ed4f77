"""What a package must not hold. Facts come from `facts`, expectations from the graph; the judgement is a pure function.

Each of these faults compiles, loads and computes the right numbers, or fails only where the package is used; nobody
would be told otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from packaging.version import Version

from accel_hidiff.packages.facts import PackageFacts

SPILL_LIMIT: Final = 256  # bytes of a thread
DRIVER: Final = "libcuda.so.1"
_ATTENTION: Final = "_scaled_dot_product_"
_OWN_CONVOLUTIONS: Final = ("slow_conv", "thnn_conv", "_slow", "conv_depthwise")
_SYSTEM: Final = ("libc.so", "libm.so", "libstdc++.so", "libgcc_s.so", "libgomp.so", "ld-")
_TORCH: Final = ("libtorch", "libc10")


@dataclass(frozen=True)
class Expected:
    """What a package of a graph should be.

    Attributes:
        weights: names that have to come from outside.
        channels_last: images have their channels beside each other.
        attentions: calls of attention that a fused kernel takes.
        architecture: of the GPU; None: it is for the CPU.
        machine: "x86_64" and the like.
        versions: the newest symbol versions, of "GLIBC" and "GLIBCXX", that the target is sure to have.
    """

    weights: frozenset[str]
    channels_last: bool
    attentions: int
    architecture: str | None
    machine: str
    versions: dict[str, str]


def refusals(expected: Expected, found: PackageFacts, unresolved: Iterable[str] = ()) -> list[str]:
    """What is wrong with a package, a line each; empty where it is sound.

    Args:
        expected: of its graph.
        found: in it.
        unresolved: symbols that no library has.
    """
    lines = [f"expected every symbol in the libraries that it asks for, {name} is in none" for name in unresolved]
    lines += _weights(expected, found)
    lines += _host(expected, found)
    if expected.architecture is not None:
        lines += _device(expected, found, expected.architecture)
    return lines


def _weights(expected: Expected, found: PackageFacts) -> list[str]:
    taken = {weight.name for weight in found.wrapper.weights if not weight.folded}
    baked = sorted(expected.weights - taken)
    baked += sorted(weight.name for weight in found.wrapper.weights if weight.kind == "TensorConstant")
    return [
        f"expected a package that takes all weights from outside, {name} is a constant of it, which no other "
        "checkpoint shares"
        for name in baked[:1]
    ]


def _host(expected: Expected, found: PackageFacts) -> list[str]:
    native = found.native
    lines = []
    if native.machine != expected.machine:
        lines.append(f"expected code for {expected.machine}, got {native.machine}")
    known = (*_SYSTEM, *_TORCH, *([DRIVER] if expected.architecture is not None else []))
    strange = [name for name in native.libraries if not name.startswith(known)]
    lines += [f"expected libraries of torch and the system, it asks for {name}" for name in strange]
    for library, version in native.versions.items():
        newest = expected.versions.get(library)
        if newest is not None and Version(version) > Version(newest):
            lines.append(f"expected {library} {newest} at the most, as the target has, it needs {version}")
    return lines


def _device(expected: Expected, found: PackageFacts, architecture: str) -> list[str]:
    lines = []
    if others := [name for name in found.architectures if name != architecture]:
        lines.append(f"expected GPU code for {architecture}, got {others[0]}")
    if found.kernels and not found.architectures:
        lines.append(f"expected GPU code for {architecture}, got none")
    if DRIVER not in found.native.libraries:
        lines.append(f"expected it to ask for {DRIVER}, it does not: the driver's functions would not be found")
    spilled = {name: usage.stack_bytes for name, usage in found.usage.items() if usage.stack_bytes > SPILL_LIMIT}
    for name, size in spilled.items():
        lines.append(f"expected at most {SPILL_LIMIT} bytes of spilled registers in a thread, {name} has {size}")
    fused = sum(count for name, count in found.externs.items() if name.startswith(_ATTENTION))
    if fused < expected.attentions:
        lines.append(
            f"expected {expected.attentions} calls of a fused attention kernel, got {fused}: the others are products "
            "with a softmax between, whose scores fill memory"
        )
    if own := [name for name in found.externs if name.startswith(_OWN_CONVOLUTIONS)]:
        lines.append(f"expected convolutions by cuDNN, got torch's own {own[0]}")
    images = [image for call in found.convolutions if (image := call.arguments[0]) is not None and image.sizes[1] > 1]
    flat = sum(not image.channels_last for image in images)
    if expected.channels_last and flat:
        lines.append(f"expected convolutions over channels_last images, {flat} of {len(images)} take NCHW")
    return lines
