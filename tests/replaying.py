"""Stand-ins for CUDA graphs and for compiled packages, so that replays are tested on a machine with neither.

`Tape` captures as a device does: it keeps the operations that a function ran, with the memory that they read and wrote,
and a replay does just these again. No Python of the captured function runs then: a number that it looked at, a tensor
that it chose, an address, is what it was at the capture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from accel_hidiff.backends.base import BoundRegion, Prepared
from accel_hidiff.regions import RegionGraph
from compile_cache import CacheKey, CompileCache, Entry

PIECE = 1 << 20  # bytes that a tape says it holds


def storage_of(tensor: Tensor) -> int:
    """What tells two memories apart while both are alive."""
    return tensor.untyped_storage()._cdata


def _alias(tensor: Tensor) -> Tensor:
    """Another tensor over the memory that one has now."""
    return tensor.detach()


class Record(TorchDispatchMode):
    """Keeps every operation, with tensors of its own over the memory that each one touches."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, Any, Any, Any]] = []
        self.foreign: dict[int, Tensor] = {}  # memory that was there before
        self._made: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in tree_flatten((args, kwargs))[0]:
            if isinstance(tensor, Tensor) and storage_of(tensor) not in self._made:
                self.foreign[storage_of(tensor)] = _alias(tensor)
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing: it reads a number of the device's")
        baked = tree_map_only(Tensor, _alias, (args, kwargs))
        out = func(*args, **kwargs)
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, Tensor) and storage_of(tensor) not in self.foreign:
                self._made[storage_of(tensor)] = _alias(tensor)
        returns = func._schema.returns
        writes = any(one.alias_info is not None and one.alias_info.is_write for one in func._schema.arguments)
        if writes or not any(one.alias_info is not None for one in returns):  # a view computes nothing
            self.steps.append((func, *baked, None if writes else tree_map_only(Tensor, _alias, out)))
        return out


class Taped:
    """What was captured."""

    def __init__(self, tape: Tape, record: Record, out: Tensor) -> None:
        self._tape, self._steps, self._out = tape, record.steps, out
        self.foreign = record.foreign
        self.is_released = False

    @property
    def out(self) -> Tensor:
        return self._out

    def replay(self, fill: Callable[[], None]) -> Tensor:
        assert not self.is_released, "a replay of what was given back"
        assert self._tape.enter() == 1, "two replays of one pool at a time"
        try:
            self._tape.replayed += 1
            self._tape.now += self._tape.replay_s
            fill()
            self._tape.fail("replay")
            for func, args, kwargs, out in self._steps:
                again = func(*args, **kwargs)
                if out is None:
                    continue
                for old, new in zip(tree_flatten(out)[0], tree_flatten(again)[0], strict=True):
                    if isinstance(old, Tensor):
                        old.copy_(new)
            return self._out.clone()
        finally:
            self._tape.leave()

    def release(self) -> None:
        if not self.is_released:
            self.is_released = True
            self._tape.alive.remove(self)


class Tape:
    """A capturer for the CPU. `fail` may raise; `now` is a clock that `replay_s`, and whoever likes, moves on."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.alive: list[Taped] = []
        self.captured = self.replayed = self.given_back = self._inside = 0
        self.fail: Callable[[str], None] = lambda what: None
        self.now, self.replay_s = 0.0, 0.0

    def enter(self) -> int:
        self._inside += 1
        return self._inside

    def leave(self) -> None:
        self._inside -= 1

    def capture(self, run: Callable[[], Tensor]) -> Taped:
        run()
        with Record() as record:
            self.fail("capture")
            out = run()
        self.captured += 1
        self.alive.append(Taped(self, record, out))
        return self.alive[-1]

    def wait(self) -> None:
        pass

    def held_bytes(self) -> int:
        return PIECE * len(self.alive)

    def give_back(self) -> None:
        self.given_back += 1


class StandInBackend:
    """Regions in the place of packages: the very module that is exported, run eager. `calls` counts them by path;
    `fail` may raise in their place."""

    name = spec = "stand-in"
    shares = persistent = False
    target = None
    smallest_symbolic = 1

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}
        self.fail: Callable[[str], None] = lambda path: None

    def factors(self, device: torch.device) -> Mapping[str, Any]:
        return {"backend": self.name}

    def places(self, key: CacheKey) -> tuple[CacheKey, ...]:
        return (key,)

    def prepare(self, graph: RegionGraph, cache: CompileCache) -> Prepared:
        raise AssertionError("it keeps nothing")

    def ready(self, key: CacheKey) -> bool:
        return True

    def bind(self, graph: RegionGraph, entry: Entry | None) -> BoundRegion:
        module, path = graph.region.graph_module(graph.traits), graph.region.path

        def call(*inputs: Tensor) -> Any:
            self.calls[path] = self.calls.get(path, 0) + 1
            self.fail(path)
            return module(*inputs)

        return BoundRegion(call, graph.bucket)
