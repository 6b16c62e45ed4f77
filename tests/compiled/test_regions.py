"""Each compiled graph against what it was traced from, alone: at sizes that no other test asks for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from accel_hidiff.regions import RegionGraph
from tests.compiled.conftest import SIZES, STEPS, relative_difference
from tests.conftest import ARTIFACTS, KINDS

TOLERANCE = 1e-5  # max abs / max abs, in float32


def sizes_of(graph: RegionGraph, batch: int) -> dict[str, int]:
    """Odd ones, and no square, where the graph takes them; the next even one where it does not."""
    wanted = {"batch": batch, "height": 11 + 2 * batch, "width": 31 - 2 * batch, "tokens": 70 + batch}
    return {name: -(-wanted[name] // size.multiple) * size.multiple for name, size in graph.bucket.dims.items()}


@pytest.mark.parametrize("batch", range(1, 9))
def test_a_graph_gives_what_it_was_traced_from(strict: Any, batch: int) -> None:
    """Of every kind, in every topology, with every shift of the windows."""
    graphs = strict.needed(SIZES, (STEPS,)).distinct.values()
    assert len(graphs) == ARTIFACTS and {graph.region.kind for graph in graphs} == KINDS
    windowed = 0
    for graph in graphs:
        region, sizes = graph.region, sizes_of(graph, batch)
        calls = strict._dispatcher.binder.bind_all([(graph, sizes)], compile_missing=False)
        assert isinstance(calls, dict), calls
        inputs = region.example(graph.traits, sizes, graph.dtype, graph.device)
        module = region.graph_module(graph.traits)
        for shift in range(4) if graph.traits.get("windowed") else (None,):
            if shift is not None:
                windowed += 1
                inputs = *inputs[:2], torch.full_like(inputs[2], shift), *inputs[3:]
            with torch.no_grad():
                got, want = (as_tuple(one(*inputs)) for one in (calls[region.path], module))
            assert len(got) == len(want)
            for one, other in zip(got, want, strict=True):
                assert relative_difference(one, other) < TOLERANCE, (region.path, graph.traits, sizes, shift)
    assert windowed and windowed % 4 == 0


def as_tuple(out: Any) -> tuple[torch.Tensor, ...]:
    return (out,) if isinstance(out, torch.Tensor) else tuple(out)
