"""A region graph as a function of weights and inputs, so that one compiled program serves all equal regions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from accel_hidiff.errors import CompileFailed, first_line
from accel_hidiff.regions import RegionGraph


@dataclass(frozen=True)
class FunctionalGraph:
    """What tracing made of a region graph.

    Attributes:
        module: takes (list of weights, *inputs); returns a tensor or a tuple of tensors. Holds no weights.
        names: of the weights, in order.
        inputs: the example inputs that it was traced with.
        outputs: how many tensors it returns.
    """

    module: fx.GraphModule
    names: tuple[str, ...]
    inputs: tuple[Tensor, ...]
    outputs: int


def trace(graph: RegionGraph) -> FunctionalGraph:
    """Traces a region graph at its example sizes, which become part of it.

    The operators are those that the model calls (`aten.linear`, `aten.scaled_dot_product_attention`, ...), before any
    decomposition: compilers look for these patterns.

    Raises:
        CompileFailed: the region cannot be traced, or its graph has a tensor in it that is neither weight nor input.
    """
    module = graph.region.graph_module(graph.traits)
    names, tensors = named_weights(module)
    inputs = graph.example()

    def function(weights: Sequence[Tensor], *tensors: Tensor) -> Any:
        return functional_call(module, dict(zip(names, weights, strict=True)), tensors)

    try:
        with torch.no_grad():
            traced = make_fx(function, pre_dispatch=True)(tensors, *inputs)
    except Exception as problem:
        raise CompileFailed(
            f"{graph.region.path}: cannot be traced with {graph.bucket}: {first_line(problem)}; backend='eager' runs it"
        ) from problem
    constants = [str(node.target) for node in traced.graph.nodes if node.op == "get_attr"]
    if constants:
        raise CompileFailed(
            f"{graph.region.path}: expected weights and inputs only, its graph also holds the tensor constant "
            f"{constants[0]}; use backend='inductor' for this model"
        )
    (output,) = (node for node in traced.graph.nodes if node.op == "output")
    returned = output.args[0]
    return FunctionalGraph(traced, names, inputs, len(returned) if isinstance(returned, list | tuple) else 1)


def named_weights(module: nn.Module) -> tuple[tuple[str, ...], list[Tensor]]:
    """Names of parameters and buffers, and tensors over their memory that need no gradient; shared ones count once."""
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return tuple(named), [tensor.detach() for tensor in named.values()]
