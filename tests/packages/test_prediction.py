"""Operations and bytes of a package's calls, and what they come to at a device's speeds."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from accel_hidiff.packages.prediction import H200, Speeds, Work, work_of
from accel_hidiff.packages.wrapper import Call, Tensor
from tests.packages.conftest import Stored


def test_the_operations_of_a_residual_block_are_those_of_its_layers(resnet: Stored) -> None:
    batch, channels, height, width = resnet.notes["inputs"][0][0]
    time = resnet.notes["inputs"][1][0][1]
    out = resnet.facts.convolutions[0].out
    assert out is not None
    made = out.sizes[1]
    cells, taken = batch * height * width, channels * (channels != made)
    work = work_of(resnet.facts)
    assert work.convolutions == 2 * cells * made * (9 * channels + 9 * made + taken)
    assert work.products == 2 * batch * time * made and work.attention == 0
    assert work.moved == resnet.facts.passes().triton_bytes


def test_the_operations_of_attention_are_two_products_of_all_pairs(transformer: Stored) -> None:
    batch, channels, height, width = transformer.notes["inputs"][0][0]
    text = transformer.notes["inputs"][1][0][1]
    tokens = height * width
    blocks = sum(count for name, count in transformer.facts.externs.items() if "attention" in name) // 2
    shares = 4 if len(transformer.notes["inputs"]) > 2 else 1  # each window attends to itself
    assert work_of(transformer.facts).attention == 4 * batch * channels * tokens * blocks * (tokens / shares + text)


@pytest.mark.parametrize(("width", "kind"), [(64, "attention"), (256, "attention"), (512, "wide_attention")])
def test_a_wide_head_has_a_speed_of_its_own(width: int, kind: str) -> None:
    query = Tensor("q", (1, 1, 96, width), (96 * width, width, width, 1), "bfloat16")
    call = Call("extern", "_scaled_dot_product_efficient_attention", (query, query, query), query)
    assert work_of(facts_of(call)) == Work(**{kind: 4 * 96 * 96 * width})


def test_scores_that_a_product_writes_are_bytes() -> None:
    part, keys = (Tensor("t", sizes, (512, 1), "bfloat16") for sizes in ((6, 512), (512, 96)))
    scores = Tensor("s", (6, 96), (96, 1), "float32")
    work = work_of(facts_of(Call("extern", "mm_dtype_out", (part, keys), scores)))
    assert work == Work(products=2 * 6 * 96 * 512, moved=4 * 6 * 96)


def facts_of(*calls: Call) -> Any:
    """As much of a package's facts as its work is counted from."""
    return SimpleNamespace(wrapper=SimpleNamespace(calls=calls, kernels={}), kernels={})


def test_each_kind_of_work_has_its_speed() -> None:
    work = Work(products=2e12, convolutions=3e12, attention=4e12, wide_attention=1e12, moved=5e12)
    speeds = Speeds(products=2, convolutions=3, attention=4, wide_attention=2, memory=5)
    found = (work + work).milliseconds(speeds)
    assert found == {"products": 2e3, "convolutions": 2e3, "attention": 3e3, "kernels": 2e3, "in all": 9e3}
    assert work * 2 == work + work
    assert Work(moved=4.1e9).milliseconds(H200)["in all"] == pytest.approx(1)
