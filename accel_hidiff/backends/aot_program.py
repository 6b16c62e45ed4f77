"""What AOTInductor compiles: a region exported with `torch.export`, and what tells two exported programs apart."""

from __future__ import annotations

import hashlib
import json
import warnings
from contextlib import AbstractContextManager, nullcontext
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from accel_hidiff.errors import CompileFailed
from accel_hidiff.forms import end_detours, forms_of
from accel_hidiff.regions import RegionGraph, Share
from compile_cache import Range, ShapeBucket


def export_region(
    graph: RegionGraph, making: AbstractContextManager[Any] | None = None
) -> tuple[torch.export.ExportedProgram, list[Any]]:
    """The exported program of a region's graph, and (shape, dtype, strides) of each of its inputs.

    Args:
        graph: of a region.
        making: what its example inputs are made in.

    Raises:
        CompileFailed: it cannot be exported.
    """
    with making or nullcontext():
        example = graph.example()
    dims = {
        name: torch.export.Dim(name, min=size.minimum // size.multiple, max=size.maximum // size.multiple)
        for name, size in graph.bucket.dims.items()
        if not size.is_exact
    }

    def symbol(share: Share) -> Any:
        multiple = graph.bucket.dims[share.name].multiple // share.divisor
        return dims[share.name] if multiple == 1 else multiple * dims[share.name]

    named = [{axis: _as_share(size) for axis, size in axes.items()} for axes in graph.region.axes(graph.traits)]
    axes = [{axis: symbol(share) for axis, share in axes.items() if share.name in dims} for axes in named]
    shapes = (tuple(axes[: len(example)]) + ({},) * (len(example) - len(axes)),) if dims else None
    try:
        with torch.no_grad(), forms_of(graph.device, graph.region.memory_format):
            module = graph.region.graph_module(graph.traits)
            program = quietly(torch.export.export, module, example, dynamic_shapes=shapes, strict=False)
    except Exception as problem:
        raise CompileFailed(
            f"{graph.region.path}: cannot be exported with {graph.bucket}: {type(problem).__name__}: "
            f"{str(problem).strip().splitlines()[0]}; backend='inductor' compiles regions without export"
        ) from problem
    end_detours(program)
    if program.constants:
        raise CompileFailed(
            f"{graph.region.path}: expected weights and inputs only, its graph also holds the tensor constant "
            f"{next(iter(program.constants))}; use backend='inductor' for this model"
        )
    return program, [[list(tensor.shape), str(tensor.dtype), list(tensor.stride())] for tensor in example]


def _as_share(size: str | Share) -> Share:
    return size if isinstance(size, Share) else Share(size, 1)


def served_bucket(graph: RegionGraph, program: torch.export.ExportedProgram) -> ShapeBucket:
    """The bucket narrowed to the range constraints that export recorded, which can be tighter than those asked for."""
    inputs = [
        node.meta["val"]
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in program.graph_signature.user_inputs
    ]
    dims = dict(graph.bucket.dims)
    for tensor, axes in zip(inputs, graph.region.axes(graph.traits), strict=False):
        for axis, name in axes.items():
            if isinstance(name, Share):
                continue  # what constrains it constrains the dimension that it is a share of
            size = tensor.shape[axis]
            if isinstance(size, int):
                if dims[name].reject(size) is not None or not dims[name].is_exact:
                    raise CompileFailed(
                        f"{graph.region.path}: asked for {name} {dims[name]}, export fixed it at {size}; "
                        "use shapes='exact' for this model"
                    )
                continue
            expression = size.node.expr
            (base,) = expression.free_symbols
            multiple = int(expression / base)
            limits = program.range_constraints[base]
            narrowed = Range(multiple * int(limits.lower), multiple * int(limits.upper), multiple)
            dims[name] = dims[name].intersect(narrowed) or narrowed
    return ShapeBucket(dims)


def used_weights(program: torch.export.ExportedProgram) -> frozenset[str]:
    """The names of the weights that a program reads."""
    signature = program.graph_signature
    named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    return frozenset(named[node.name] for node in program.graph.nodes if node.name in named and node.users)


def attention_calls(program: torch.export.ExportedProgram) -> list[tuple[Tensor, Tensor, bool, bool]]:
    """(query, value, whether a mask is given, whether heads are grouped) of each call of attention."""
    found = []
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.scaled_dot_product_attention.default:
            query, value = (node.args[index].meta["val"] for index in (0, 2))
            mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
            found.append((query, value, mask is not None, bool(node.kwargs.get("enable_gqa"))))
    return found


def program_digest(program: torch.export.ExportedProgram) -> str:
    """SHA-256 of an exported program: operators, arguments, shapes, strides, dtypes, weights' names, range constraints.

    Weights' values, source positions and stack traces are not in it.
    """
    lines = []
    for node in program.graph.nodes:
        value = node.meta.get("val")
        lines.append([node.op, node.name, _named(node.target), str(node.args), str(node.kwargs), _describe(value)])
    ranges = sorted((str(symbol), str(limits)) for symbol, limits in program.range_constraints.items())
    signature = program.graph_signature
    specs = [
        [str(spec.kind), str(spec.arg), str(spec.target)] for spec in [*signature.input_specs, *signature.output_specs]
    ]
    text = json.dumps([lines, ranges, specs], separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _named(target: Any) -> str:
    """The same in every process: the text of a plain function would have its address in it."""
    return f"{target.__module__}.{target.__qualname__}" if isinstance(target, FunctionType) else str(target)


def _describe(value: Any) -> Any:
    if isinstance(value, Tensor):
        facts = (tuple(value.shape), value.stride(), value.dtype, value.device)
        return [str(fact) for fact in facts]
    if isinstance(value, list | tuple):
        return [_describe(item) for item in value]
    return str(value)


def quietly(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls into torch's compiler without the deprecation warnings that it gives itself."""
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning):
            warnings.simplefilter("ignore", category)
        return function(*args, **kwargs)
