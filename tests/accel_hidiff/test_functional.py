"""Region graphs as functions of their weights: what one program for all equal regions is made of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import accel_hidiff as ah
from accel_hidiff.backends.functional import named_weights, trace
from accel_hidiff.regions import RegionGraph, ResnetRegion
from accel_hidiff.regions.base import GraphModule
from accel_hidiff.topology import Topology
from compile_cache import Range, ShapeBucket
from tests import models
from tests.compiled.conftest import relative_difference

SIZES = {"batch": 2, "height": 8, "width": 12, "tokens": 77}


@pytest.fixture(scope="module")
def handle() -> Any:
    return ah.accelerate(models.build("sdxl", "text2img"), hidiffusion=ah.HiDiffusionConfig(), backend="eager")


def graph_of(handle: Any, path: str, topology: Topology) -> RegionGraph:
    region = handle._installed.regions()[path]
    sizes = {name: size for name, size in SIZES.items() if name != "tokens" or region.kind == "transformer"}
    bucket = ShapeBucket({name: Range.exactly(size) for name, size in sizes.items()})
    return RegionGraph(region, region.traits(topology), bucket, sizes, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("topology", [Topology(), Topology(windowed=True)], ids=str)
def test_another_equal_region_runs_through_the_same_graph(handle: Any, topology: Topology) -> None:
    """The graph holds no weights: given those of another block, it computes that block."""
    first = graph_of(handle, "unet.down_blocks.1.attentions.0", topology)
    other = graph_of(handle, "unet.down_blocks.1.attentions.1", topology)
    assert first.key({}) == other.key({})
    traced = trace(first)
    module = other.region.graph_module(other.traits)
    names, weights = named_weights(module)
    inputs = other.example()
    with torch.no_grad():
        got, want = traced.module(weights, *inputs), module(*inputs)
    assert names == traced.names and traced.outputs == 1
    assert relative_difference(got, want) < 1e-5
    with torch.no_grad():
        assert (
            relative_difference(traced.module(weights, *inputs), first.region.graph_module(first.traits)(*inputs))
            > 1e-2
        )


def test_it_calls_the_operators_that_compilers_look_for(handle: Any) -> None:
    traced = trace(graph_of(handle, "unet.down_blocks.1.attentions.0", Topology(windowed=True)))
    called = {str(node.target) for node in traced.module.graph.nodes if node.op == "call_function"}
    assert {"aten.linear.default", "aten.scaled_dot_product_attention.default", "aten.layer_norm.default"} <= called
    assert not list(traced.module.parameters()) and not list(traced.module.buffers())


def test_weights_are_live(handle: Any) -> None:
    graph = graph_of(handle, "unet.mid_block.resnets.0", Topology())
    _, weights = named_weights(graph.region.graph_module(graph.traits))
    assert weights[0].data_ptr() == next(graph.region.module.parameters()).data_ptr()
    assert not any(weight.requires_grad for weight in weights)


class _Odd(nn.Module):
    """Has something in it that is neither weight nor input, or cannot be traced."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.in_channels = 4
        self.how = how
        self.constant = [torch.ones(4, 1, 1)]  # not a buffer

    def forward(self, image: Tensor) -> Tensor:
        if self.how == "constant":
            return image * self.constant[0]
        return image * 2 if float(image.sum()) > 0 else image


class _OddRegion(ResnetRegion):
    kind = "odd"

    def example(self, *args: Any) -> tuple[Tensor, ...]:
        return (torch.ones(2, 4, 8, 12),)

    def graph_module(self, traits: Any) -> nn.Module:
        return GraphModule(self.module, self.module.forward)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("constant", "odd: expected weights and inputs only, its graph also holds the tensor constant"),
        ("branch", "odd: cannot be traced with .*; backend='eager' runs it"),
    ],
)
def test_what_cannot_be_shared_is_refused(how: str, message: str) -> None:
    module = _Odd(how)
    sizes = {"batch": 2, "height": 8, "width": 12}
    bucket = ShapeBucket({name: Range.exactly(size) for name, size in sizes.items()})
    region = _OddRegion("odd", module, module.forward)
    graph = RegionGraph(region, {}, bucket, sizes, torch.float32, torch.device("cpu"))
    with pytest.raises(ah.CompileFailed, match=message):
        trace(graph)
