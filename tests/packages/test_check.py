"""What a package must not hold: each fault is planted into the facts of a sound one, and refused with its reason.

`tests/crosscompile/test_cross_compiling.py` plants the same into packages that are really compiled.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from accel_hidiff.packages.check import SPILL_LIMIT, Expected, refusals
from accel_hidiff.packages.cubin import Usage
from accel_hidiff.packages.facts import PackageFacts
from accel_hidiff.packages.wrapper import Call, Tensor, Weight
from accel_hidiff.target import HOST_LIBRARIES
from tests.packages.conftest import Stored


def expected(stored: Stored, **changes: Any) -> Expected:
    weights = frozenset(weight.name for weight in stored.facts.wrapper.weights)
    attentions = 2 if stored.notes["region"] == "transformer" else 0
    sound = Expected(weights, False, attentions, "sm_90", "x86_64", dict(HOST_LIBRARIES))
    return replace(sound, **changes)


def changed_wrapper(facts: PackageFacts, **changes: Any) -> PackageFacts:
    return replace(facts, wrapper=replace(facts.wrapper, **changes))


def renamed(call: Call, **names: str) -> Call:
    return replace(call, name=names.get(call.name.strip("_"), call.name))


def test_sound_packages_are_taken(resnet: Stored, transformer: Stored) -> None:
    assert refusals(expected(resnet), resnet.facts) == []
    assert refusals(expected(transformer), transformer.facts) == []


def test_plain_softmax_attention(transformer: Stored) -> None:
    facts = transformer.facts
    calls = [renamed(call, scaled_dot_product_cudnn_attention="bmm_out") for call in facts.wrapper.calls]
    (line,) = refusals(expected(transformer), changed_wrapper(facts, calls=tuple(calls)))
    assert line.startswith(
        "expected 2 calls of a fused attention kernel, got 0: the others are products with a softmax"
    )


def test_convolutions_of_torchs_own(resnet: Stored) -> None:
    calls = [renamed(call, convolution="_slow_conv2d_forward") for call in resnet.facts.wrapper.calls]
    (line,) = refusals(expected(resnet), changed_wrapper(resnet.facts, calls=tuple(calls)))
    assert line == "expected convolutions by cuDNN, got torch's own _slow_conv2d_forward"


def test_convolutions_over_another_layout(resnet: Stored) -> None:
    image = resnet.facts.convolutions[0].arguments[0]
    assert isinstance(image, Tensor)
    flat = sum(not call.arguments[0].channels_last for call in resnet.facts.convolutions if call.arguments[0])
    lines = refusals(expected(resnet, channels_last=True), resnet.facts)
    assert flat and lines == [
        f"expected convolutions over channels_last images, {flat} of {len(resnet.facts.convolutions)} take NCHW"
    ]


def test_another_architecture(resnet: Stored) -> None:
    assert refusals(expected(resnet, architecture="sm_80"), resnet.facts) == ["expected GPU code for sm_80, got sm_90"]
    assert "got none" in refusals(expected(resnet), replace(resnet.facts, architectures=()))[0]


def test_no_driver(resnet: Stored) -> None:
    native = resnet.facts.native
    libraries = tuple(name for name in native.libraries if "cuda.so.1" not in name)
    (line,) = refusals(expected(resnet), replace(resnet.facts, native=replace(native, libraries=libraries)))
    assert line.startswith("expected it to ask for libcuda.so.1")


def test_spills(resnet: Stored) -> None:
    usage = {**resnet.facts.usage, "triton_k": Usage(255, SPILL_LIMIT + 8)}
    (line,) = refusals(expected(resnet), replace(resnet.facts, usage=usage))
    assert line == "expected at most 256 bytes of spilled registers in a thread, triton_k has 264"
    usage["triton_k"] = Usage(255, SPILL_LIMIT)
    assert refusals(expected(resnet), replace(resnet.facts, usage=usage)) == []


@pytest.mark.parametrize("way", ["missing", "constant"])
def test_a_baked_weight(resnet: Stored, way: str) -> None:
    weights = resnet.facts.wrapper.weights
    if way == "missing":
        weights = tuple(weight for weight in weights if weight.name != "module.conv1.bias")
    else:
        weights = (*weights, Weight("module.conv1.bias", "TensorConstant", False))
    (line,) = refusals(expected(resnet), changed_wrapper(resnet.facts, weights=weights))
    assert "module.conv1.bias is a constant of it" in line


def test_weights_that_are_made_of_others_are_the_packages_own(resnet: Stored) -> None:
    weights = (*resnet.facts.wrapper.weights, Weight("_FOLDED_CONST_qkv", "FoldedConstant", True))
    assert refusals(expected(resnet), changed_wrapper(resnet.facts, weights=weights)) == []


def test_symbols_that_nobody_has(resnet: Stored) -> None:
    (line,) = refusals(expected(resnet), resnet.facts, ["aoti_torch_gone"])
    assert line == "expected every symbol in the libraries that it asks for, aoti_torch_gone is in none"


@pytest.mark.parametrize(("library", "newest"), [("GLIBC", "2.31"), ("GLIBCXX", "3.4.29")])
def test_a_system_that_is_older(resnet: Stored, library: str, newest: str) -> None:
    (line,) = refusals(expected(resnet, versions={**HOST_LIBRARIES, library: newest}), resnet.facts)
    assert line == f"expected {library} {newest} at the most, as the target has, it needs {HOST_LIBRARIES[library]}"


def test_another_machine_and_strange_libraries(resnet: Stored) -> None:
    assert refusals(expected(resnet, machine="aarch64"), resnet.facts) == ["expected code for aarch64, got x86_64"]
    native = replace(resnet.facts.native, libraries=(*resnet.facts.native.libraries, "libpython3.12.so.1.0"))
    (line,) = refusals(expected(resnet), replace(resnet.facts, native=native))
    assert line == "expected libraries of torch and the system, it asks for libpython3.12.so.1.0"
