"""Artifacts tuned on the device that serves them.

What was compiled without a GPU has its kernels' configurations by a rule. Here each graph is compiled once more where
it runs, with configurations that are timed; both run in turns over the same inputs, and the faster one is stored beside
the first, under the same key's variant "tuned", for this device. `accelerate(variant="tuned")` takes it where it is.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
from torch import Tensor

from accel_hidiff.backends.aot import AOTBackend, tuned_key
from accel_hidiff.binder import BoundCall
from accel_hidiff.compiling.needed import Needed
from accel_hidiff.errors import BadInput, CompileFailed
from accel_hidiff.pipeline import Handle
from accel_hidiff.regions import RegionGraph, Sizes
from compile_cache import CacheKey, CompileCache, Entry

_OPTIONS: Final[dict[str, dict[str, Any]]] = {
    "cuda": {"coordinate_descent_tuning": True}
}  # beside what Inductor times by itself
_LIMITS: Final = {torch.float32: 1e-3}  # of max |difference| / max |value|; 5e-2 in the narrower dtypes
_LIMIT: Final = 5e-2
_WARM_UP: Final = 3


@dataclass(frozen=True)
class Tuned:
    """What came of a graph.

    Attributes:
        region: its path.
        state: "tuned": the new artifact is faster, and is stored; "kept": the first one is; "known": it was tuned
            before; "missing": the cache holds no artifact to compare with.
        before_ms, after_ms: medians of a call of the first artifact, and of the new one.
    """

    region: str
    state: str
    before_ms: float = 0.0
    after_ms: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """A plain JSON mapping."""
        return asdict(self)


def tune(
    handle: Handle,
    sizes: Sequence[tuple[int, int]],
    num_inference_steps: int = 30,
    *,
    batch_sizes: Sequence[int] = (2,),
    rounds: int = 15,
    progress: Callable[[Tuned], None] = lambda tuned: None,
) -> list[Tuned]:
    """Tunes every artifact that requests of these sizes need, on the device that the pipeline is on.

    Args:
        handle: of a pipeline on its device, backend "aot".
        sizes: (height, width) in pixels: what is timed is the first of them that uses an artifact.
        num_inference_steps, batch_sizes: as in `Handle.precompile`.
        rounds: timed turns of each artifact.
        progress: is told of each.

    Raises:
        BadInput: another backend, or no rounds.
        CompileFailed: a graph cannot be compiled here, or computes something else than its first artifact.
        compile_cache.CacheWriteError: the cache cannot be written.
    """
    binder, cache = handle._dispatcher.binder, handle.cache
    backend = binder.backend
    if not isinstance(backend, AOTBackend) or cache is None:
        raise BadInput(f'tune: expected backend "aot", got {backend.name!r}; others keep nothing to tune')
    if rounds < 1:
        raise BadInput(f"tune: expected at least one round, got {rounds}")
    cache.require_writable()
    needed = handle.needed(sizes, (num_inference_steps,), batch_sizes=batch_sizes)
    found = []
    for graph, at in _each(needed, binder.key):
        found.append(_tuned(backend, cache, graph, at, binder.key(graph), rounds))
        progress(found[-1])
    return found


def _each(needed: Needed, key: Callable[[RegionGraph], CacheKey]) -> list[tuple[RegionGraph, Sizes]]:
    """Each distinct graph once, with the sizes of the first call that uses it."""
    found: dict[str, tuple[RegionGraph, Sizes]] = {}
    for call in needed.calls:
        for graph, sizes in call:
            found.setdefault(key(graph).digest, (graph, sizes))
    return list(found.values())


def _tuned(
    backend: AOTBackend, cache: CompileCache, graph: RegionGraph, sizes: Sizes, key: CacheKey, rounds: int
) -> Tuned:
    path, place = graph.region.path, tuned_key(key)
    if (first := cache.get(key)) is None:
        return Tuned(path, "missing")
    if cache.get(place) is not None:
        return Tuned(path, "known")
    other, _ = backend.compile(graph, cache, _OPTIONS.get(graph.device.type, {}))
    before, after = (_bound(backend, graph, entry, key, sizes) for entry in (first, other))
    inputs = graph.region.example(graph.traits, sizes, graph.dtype, graph.device)
    with torch.inference_mode():
        _require_same(path, before(*inputs), after(*inputs))
        milliseconds = _timed((before, after), inputs, rounds)
    faster = milliseconds[1] < milliseconds[0]
    cache.link(place, other if faster else first)
    return Tuned(path, "tuned" if faster else "kept", *(round(value, 4) for value in milliseconds))


def _bound(backend: AOTBackend, graph: RegionGraph, entry: Entry, key: CacheKey, sizes: Sizes) -> BoundCall:
    bound = backend.bind(graph, entry)
    if bound is None:
        raise CompileFailed(f"{graph.region.path}: expected an artifact that binds, got none")
    return BoundCall(bound, graph.region, key, sizes)


def _require_same(path: str, one: Any, other: Any) -> None:
    pairs = [(one, other)] if isinstance(one, Tensor) else list(zip(one, other, strict=True))
    for want, got in pairs:
        limit = _LIMITS.get(want.dtype, _LIMIT)
        error = float((got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-12))
        if not error < limit:
            raise CompileFailed(
                f"{path}: expected the same of both artifacts, within {limit:g}, they differ by {error:.3g}; nothing "
                "was stored: the first one stays in use"
            )


def _timed(calls: Sequence[BoundCall], inputs: tuple[Tensor, ...], rounds: int) -> list[float]:
    """Medians in milliseconds of calls that take turns."""
    device = inputs[0].device
    times: list[list[float]] = [[] for _ in calls]
    for number in range(_WARM_UP + rounds):
        for index, call in enumerate(calls):
            _wait(device)
            began = time.perf_counter()
            call(*inputs)
            _wait(device)
            if number >= _WARM_UP:
                times[index].append((time.perf_counter() - began) * 1e3)
    return [statistics.median(row) for row in times]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
