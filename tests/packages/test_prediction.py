"""Operations and bytes of a package's calls, and what they come to at a device's speeds."""

from __future__ import annotations

import pytest

from accel_hidiff.packages.prediction import H200, Speeds, Work, work_of
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


def test_each_kind_of_work_has_its_speed() -> None:
    work = Work(products=2e12, convolutions=3e12, attention=4e12, moved=5e12)
    found = (work + work).milliseconds(Speeds(products=2, convolutions=3, attention=4, memory=5))
    assert found == {"products": 2e3, "convolutions": 2e3, "attention": 2e3, "kernels": 2e3, "in all": 8e3}
    assert work * 2 == work + work
    assert Work(moved=4.1e9).milliseconds(H200)["in all"] == pytest.approx(1)
