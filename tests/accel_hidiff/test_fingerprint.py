"""Modules with one fingerprint trace to one graph: it sees the structure, and nothing of the values of weights."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from accel_hidiff import apply_hidiffusion
from accel_hidiff.fingerprint import ModuleState, fingerprint, structure
from compile_cache import UnstableFactor
from tests.ids import without_address


class Scale:
    """A callable kept as an attribute, as attention processors are."""

    def __init__(self, public: float = 1.0, private: float = 1.0) -> None:
        self.public = public
        self._private = private

    def __call__(self, x: Any) -> Any:
        return x * self.public * self._private


class Block(nn.Module):
    def __init__(self, extra: Any = None, width: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.norm = nn.GroupNorm(2, width)
        self.extra = extra

    def forward(self, x: Any) -> Any:
        return self.norm(self.linear(x))


class SameCodeOtherClass(Block):
    pass


def test_it_is_a_whole_sha256_and_the_same_each_time() -> None:
    digest = fingerprint(Block())
    assert len(digest) == 64 and set(digest) <= set("0123456789abcdef")
    assert fingerprint(Block()) == digest


def test_values_of_weights_do_not_count() -> None:
    block = Block()
    digest = fingerprint(block)
    with torch.no_grad():
        block.linear.weight.fill_(3)
    assert fingerprint(block) == digest
    block.linear.weight = nn.Parameter(torch.zeros(4, 4))
    assert fingerprint(block) == digest


def no_bias(block: Block) -> None:
    block.linear.bias = None


def change(path: str, name: str, value: Any) -> Any:
    return lambda block: setattr(block.get_submodule(path), name, value)


@pytest.mark.parametrize(
    "edit",
    [
        no_bias,
        change("norm", "eps", 1e-6),
        change("norm", "num_groups", 4),
        change("", "training", False),
        change("linear", "training", False),
        change("", "another", 1),
        change("", "extra", "x"),
        lambda block: block.half(),
        lambda block: block.linear.double(),
        lambda block: block.register_buffer("table", torch.zeros(3)),
        lambda block: block.add_module("more", nn.Identity()),
        lambda block: setattr(block, "linear", nn.Linear(4, 5)),
        lambda block: setattr(block, "norm", nn.BatchNorm1d(4)),
        lambda block: setattr(block.linear, "weight", nn.Parameter(torch.zeros(4, 4).t().contiguous().t())),
    ],
)
def test_what_changes_the_graph_changes_the_fingerprint(edit: Any) -> None:
    block = Block()
    digest = fingerprint(block)
    edit(block)
    assert fingerprint(block) != digest


def test_another_class_is_another_fingerprint() -> None:
    assert fingerprint(SameCodeOtherClass()) != fingerprint(Block())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 2),
        (1, True),
        (1, 1.0),
        (1, "1"),
        (None, "None"),
        ([1, 2], [2, 1]),
        ({"a": 1}, {"a": 2}),
        (torch.float16, torch.bfloat16),
        (Scale(public=1.0), Scale(public=2.0)),
        (functools.partial(max, 1), functools.partial(max, 2)),
        (functools.partial(max, 1), functools.partial(min, 1)),
        (nn.ReLU, nn.SiLU),
        (torch.add, torch.mul),
    ],
    ids=without_address,
)
def test_attribute_values_are_told_apart(one: Any, other: Any) -> None:
    assert fingerprint(Block(one)) == fingerprint(Block(one))
    assert fingerprint(Block(one)) != fingerprint(Block(other))


@pytest.mark.parametrize(
    ("one", "other"), [(Scale(private=1.0), Scale(private=2.0)), ({"_a": 1}, {"_a": 2})], ids=["object", "mapping"]
)
def test_private_attributes_count(one: Any, other: Any) -> None:
    assert fingerprint(Block(one)) != fingerprint(Block(other))


@pytest.mark.parametrize(
    ("one", "other"), [(1.0, "1.0"), (torch.float32, "torch.float32"), ({1: 2}, {"1": 2})], ids=repr
)
def test_values_of_different_types_are_told_apart(one: Any, other: Any) -> None:
    assert fingerprint(Block(one)) != fingerprint(Block(other))


def cycle() -> Scale:
    scale = Scale()
    scale.me = scale  # type: ignore[attr-defined]
    return scale


def closure() -> Any:
    x = 3
    return lambda: x


@pytest.mark.parametrize(
    "value",
    [object(), torch.zeros(2), cycle(), closure(), Scale().__call__, range(3), 1j, iter([])],
    ids=without_address,
)
def test_what_has_no_stable_form_is_refused_with_its_path(value: Any) -> None:
    with pytest.raises(UnstableFactor, match=r"Block\.extra"):
        fingerprint(Block(value))


@pytest.mark.parametrize(
    "install",
    [
        lambda module: module.register_forward_hook(lambda *args: None),
        lambda module: module.register_forward_pre_hook(lambda *args: None),
        lambda module: module.register_forward_hook(lambda *args: None, with_kwargs=True),
        lambda module: module.register_full_backward_hook(lambda *args: None),
    ],
)
def test_hooks_are_refused_and_say_where(install: Any) -> None:
    block = Block()
    handle = install(block.norm)
    with pytest.raises(UnstableFactor, match=r"norm: expected a module without hooks.*backend='eager'"):
        fingerprint(block)
    handle.remove()


def test_a_foreign_forward_is_refused_and_ours_is_ignored() -> None:
    block = Block()
    digest = fingerprint(block)
    block.linear.forward = foreign = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(UnstableFactor, match=r"linear: .*own forward"):
        fingerprint(block)
    assert fingerprint(block, frozenset({id(foreign)})) == digest


def test_a_forward_that_was_set_on_a_class_of_a_library_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(nn.Linear(4, 4))
    monkeypatch.setattr(nn.Linear, "forward", forward_of_somebody)
    assert fingerprint(nn.Linear(4, 4)) != before
    inner = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: inner(self, x))
    with pytest.raises(UnstableFactor, match=r"Linear\.forward: expected a plain value, got the closure"):
        fingerprint(nn.Linear(4, 4))


def forward_of_somebody(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return x


def test_a_patched_unet_has_the_fingerprints_of_a_plain_one(build: Any) -> None:
    plain, patched = build().unet, build().unet
    patch = apply_hidiffusion(patched)
    for path in ("mid_block", "down_blocks.1.attentions.0", "up_blocks.1.resnets.0"):
        assert fingerprint(patched.get_submodule(path), patch.function_ids()) == fingerprint(plain.get_submodule(path))
    with pytest.raises(UnstableFactor, match="own forward"):
        fingerprint(patched.get_submodule("down_blocks.1.attentions.0"))


def test_identical_blocks_of_a_unet_share_a_fingerprint_and_others_do_not(build: Any) -> None:
    unet = build().unet
    first, second = (unet.get_submodule(f"down_blocks.2.attentions.{index}") for index in (0, 1))
    assert fingerprint(first) == fingerprint(second)
    assert fingerprint(first) != fingerprint(unet.get_submodule("down_blocks.2.resnets.1"))


def test_saving_and_loading_keeps_the_fingerprint(build: Any, tmp_path: Path) -> None:
    """Tuples come back as lists; the graphs that were compiled for the one serve the other."""
    unet = build().unet
    unet.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path)
    for path in ("down_blocks.1.attentions.0", "up_blocks.1.upsamplers.0", "mid_block.resnets.1"):
        assert fingerprint(loaded.get_submodule(path)) == fingerprint(unet.get_submodule(path))
    assert fingerprint(Block([1, 2])) == fingerprint(Block((1, 2)))


def test_the_structure_names_every_submodule_and_tensor() -> None:
    facts = structure(Block())
    assert set(facts["modules"]) == {".", "linear", "norm"}
    assert set(facts["tensors"]) == {"linear.weight", "linear.bias", "norm.weight", "norm.bias"}
    assert facts["tensors"]["linear.weight"] == [[4, 4], "torch.float32", [4, 1], True]


def replaced_weight(block: Block) -> None:
    block.linear.weight = nn.Parameter(block.linear.weight.detach().clone())


def moved_weight(block: Block) -> None:
    block.linear.weight.data = block.linear.weight.detach().clone()


def set_in_a_mapping(block: Block) -> None:
    block.scaling["default"] = block.scaling["default"] + 0.5


def set_on_a_processor(block: Block) -> None:
    block.processor.scale = 0.5


CHANGES: dict[str, Callable[[Block], Any]] = {
    "a parameter": replaced_weight,
    "its memory": moved_weight,
    "a buffer": lambda block: block.register_buffer("more", torch.zeros(1)),
    "an attribute": lambda block: setattr(block, "eps", block.eps * 2),
    "a value in a mapping": set_in_a_mapping,
    "a value in a list": lambda block: block.active.__setitem__(0, "other"),
    "a processor": lambda block: setattr(block, "processor", types.SimpleNamespace(scale=1.0)),
    "an attribute of a processor": set_on_a_processor,
    "a submodule": lambda block: setattr(block, "linear", nn.Linear(4, 4)),
    "a hook": lambda block: block.norm.register_forward_hook(lambda *args: None),
    "a forward": lambda block: setattr(block.norm, "forward", lambda x: x),
    "the mode": lambda block: block.eval(),
    "a class": lambda block: setattr(block.norm, "__class__", type("Other", (type(block.norm),), {})),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_the_state_of_a_module_tells_what_was_replaced(change: str) -> None:
    block = Block()
    block.eps, block.scaling, block.active = 1e-5, {"default": 1.0}, ["default"]
    block.processor = types.SimpleNamespace(scale=1.0)
    state = ModuleState(block)
    block.register_forward_hook(lambda *args: None)  # runs as before, compiled or not
    with torch.no_grad():
        block.linear.weight.add_(1)  # in place: the graphs see it
    assert ModuleState(block) == state and state != object()
    CHANGES[change](block)
    assert ModuleState(block) != state


def test_attributes_that_were_set_before_torch_set_its_own_count_too() -> None:
    class Early(nn.Module):
        def __init__(self) -> None:
            self.early = 1.5
            super().__init__()

    module = Early()
    state = ModuleState(module)
    module.early = 2.5
    assert ModuleState(module) != state


def test_the_state_keeps_what_it_saw_so_that_no_new_thing_has_its_address() -> None:
    block = Block()
    for _ in range(200):
        state = ModuleState(block)
        block.eps = 1e-5 * float(torch.rand(()))  # the old number is free, but for the state
        block.linear.weight = nn.Parameter(torch.zeros(4, 4))
        assert ModuleState(block) != state


def test_strides_of_dimensions_of_size_one_say_nothing() -> None:
    def convolution(kernel: int) -> torch.nn.Module:
        return torch.nn.Conv2d(4, 4, kernel)

    def last(module: torch.nn.Module) -> torch.nn.Module:
        return module.to(memory_format=torch.channels_last)

    assert convolution(1).weight.stride() != last(convolution(1)).weight.stride()
    assert fingerprint(convolution(1)) == fingerprint(last(convolution(1)))
    assert fingerprint(convolution(3)) != fingerprint(last(convolution(3)))
