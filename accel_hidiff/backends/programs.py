"""Programs: compiled graphs that take their weights as inputs, taken over from a Dynamo compiler and owned here.

What `torch.compile` returns calls a program through Dynamo, whose guards (thread count, inference mode, deterministic
algorithms, ...) compile again in the middle of a request when one of them changes. So a program is taken over as it is
made, and called as it is: what fits a graph is decided by this package's guard.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor, fx

from accel_hidiff.backends.functional import FunctionalGraph, named_weights, trace
from accel_hidiff.errors import CompileFailed, first_line
from accel_hidiff.parity import limit_of, wrong
from accel_hidiff.regions import RegionGraph

Run = Callable[..., Any]
Compile = Callable[[fx.GraphModule, list[Tensor]], Run]
"""What Dynamo calls a backend: makes a program of a graph with flat inputs."""

_MAX_PROGRAMS: Final = 1024
_WARM_CALLS: Final = 3  # TorchScript watches the first calls and then optimizes: not in a request


class Program:
    """A compiled graph: `order` says which of (weights, inputs) each of its arguments is."""

    def __init__(self, run: Run, order: Sequence[int], traced: FunctionalGraph) -> None:
        self.names = traced.names
        self._run = run
        self._order = order
        self._single = traced.outputs == 1

    def over(self, graph: RegionGraph) -> Run:
        """A call over the live weights of a region that takes its inputs.

        Raises:
            CompileFailed: the region is not equal to the one that it was made for.
        """
        names, weights = named_weights(graph.region.graph_module(graph.traits))
        if names != self.names:
            raise CompileFailed(
                f"{graph.region.path}: expected the weights of an equal region, its names are others; report this"
            )
        run, count, single = self._run, len(names), self._single
        arguments: list[Any] = [weights[index] if index < count else None for index in self._order]
        holes = [(place, index - count) for place, index in enumerate(self._order) if index >= count]

        def call(*inputs: Tensor) -> Any:
            filled = arguments.copy()
            for place, index in holes:
                filled[place] = inputs[index]
            out = run(*filled)
            return out[0] if single else tuple(out)

        return call


class Programs:
    """Programs by the digest of their graph's key; the least recently bound ones go. Thread safe."""

    def __init__(self) -> None:
        self._held: OrderedDict[str, Program] = OrderedDict()
        self._lock = threading.RLock()

    def __contains__(self, digest: str) -> bool:
        return digest in self._held

    def get(self, digest: str, make: Callable[[], Program]) -> tuple[Program, bool]:
        """The program of a graph, made now if it is not there; and whether it was made."""
        with self._lock:
            program = self._held.get(digest)
            made = program is None
            if program is None:
                program = make()
            self.keep(digest, program)
            return program, made

    def keep(self, digest: str, program: Program) -> None:
        """Holds a program."""
        with self._lock:
            self._held[digest] = program
            self._held.move_to_end(digest)
            while len(self._held) > _MAX_PROGRAMS:
                self._held.popitem(last=False)


def make_program(
    graph: RegionGraph, name: str, through: Callable[[fx.GraphModule, Compile], Run], how: Compile
) -> Program:
    """Traces a graph at its example sizes, compiles it, and compares what it computes with eager.

    Args:
        graph: of one size.
        name: of the compiler, for messages.
        through: what users call, `torch.compile` or the like: (module, Dynamo backend) -> callable.
        how: the Dynamo backend.

    Raises:
        CompileFailed: it cannot be traced or compiled, or computes something else.
    """
    traced = trace(graph)
    _, weights = named_weights(graph.region.graph_module(graph.traits))
    program = _adopted(graph, name, traced, weights, through, how)
    call = program.over(graph)
    with torch.no_grad():
        want = _tensors(traced.module(weights, *traced.inputs))
        for _ in range(_WARM_CALLS):
            got = _tensors(call(*traced.inputs))
    told = "" if len(got) == len(want) else f"{len(got)} tensors, expected {len(want)}"
    for one, other in zip(got, want, strict=False):
        told = told or wrong(one, other, limit_of(graph.dtype))[1]
    if told:
        raise CompileFailed(
            f"{graph.region.path}: {name} computes something else than eager: {told}; use another mode or backend"
        )
    return program


def _adopted(
    graph: RegionGraph,
    name: str,
    traced: FunctionalGraph,
    weights: list[Tensor],
    through: Callable[[fx.GraphModule, Compile], Run],
    how: Compile,
) -> Program:
    made: list[tuple[Run, list[Tensor]]] = []

    def adopt(module: fx.GraphModule, examples: list[Tensor]) -> Run:
        run = how(module, list(examples))
        made.append((run, list(examples)))
        return run

    try:
        with torch.no_grad():
            through(traced.module, adopt)(weights, *traced.inputs)
    except Exception as problem:
        raise CompileFailed(
            f"{graph.region.path}: {name} failed: {first_line(problem)}; `accel-hidiff doctor` tells whether it works "
            "here at all"
        ) from problem
    if len(made) != 1:
        raise CompileFailed(
            f"{graph.region.path}: expected {name} to compile one graph, it compiled {len(made)}; look for "
            "TORCHDYNAMO_DISABLE, TORCH_COMPILE_DISABLE or onediff's fallback_to_eager, of which False means eager"
        )
    run, examples = made[0]
    where = {id(tensor): position for position, tensor in enumerate([*weights, *traced.inputs])}
    order = [where.get(id(tensor), -1) for tensor in examples]
    if -1 in order:
        raise CompileFailed(f"{graph.region.path}: the program of {name} takes an input that is none of the region's")
    return Program(run, order, traced)


def _tensors(out: Any) -> tuple[Tensor, ...]:
    return (out,) if isinstance(out, Tensor) else tuple(out)
