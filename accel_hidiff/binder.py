"""The binder: from a region graph to a call over live weights, through the compile cache. The slow path."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from accel_hidiff.backends import Backend, BoundRegion
from accel_hidiff.backends.base import served
from accel_hidiff.device import fault_of, is_capturing, release_memory
from accel_hidiff.errors import AccelHiDiffError, CaptureFailed, CompileFailed, DeviceLost, OutOfMemory, first_line
from accel_hidiff.failures import Fault
from accel_hidiff.guard import Accept, Reject, judge_sizes
from accel_hidiff.regions import Region, RegionGraph, Sizes, bucket_of, example_sizes
from accel_hidiff.stats import Stats
from accel_hidiff.target import made_elsewhere
from accel_hidiff.topology import Topology
from compile_cache import CacheKey, CompileCache, CompileCacheError, Entry

LOG = logging.getLogger(__name__)

Graphs = list[tuple[RegionGraph, Sizes]]

_INDEX_LIMIT = 1 << 31  # numbers of a tensor, from which on 32 bits do not hold an index
_ALIGNMENT = 16  # bytes; compiled code may load this much at once

# What torch raises where an artifact fails. Others come from outside: a timeout that a signal handler raises, say.
FAILURES = (RuntimeError, MemoryError, TypeError, ValueError)


class ArtifactFailed(Exception):
    """A compiled call raised: an input that it cannot take, a broken artifact. The cause tells.

    Attributes:
        key: of the artifact.
        reason: one line.
    """

    def __init__(self, path: str, key: CacheKey, error: Exception) -> None:
        first = (str(error).strip().splitlines() or [""])[0]
        self.key = key
        self.reason = (
            f"{path}: artifact {key.short} failed: {type(error).__name__}: {first[:200]}; it is not used again until "
            "handle.verify() finds it sound"
        )
        super().__init__(self.reason)


class BoundCall:
    """One region's compiled call at one size: brings inputs into the form that the artifact was compiled for.

    Raises:
        ArtifactFailed: the artifact is at fault.
        OutOfMemory: the device has too little memory for this size, also after what nobody uses was given back.
        DeviceLost: nothing runs on the device any more.
    """

    __slots__ = ("_format", "_images", "_key", "_path", "_run", "shape")

    @property
    def name(self) -> tuple[str, str]:
        """Region path and key digest: what the binder remembers it by."""
        return self._path, self._key.digest

    def __init__(self, bound: BoundRegion, region: Region, key: CacheKey, sizes: Sizes) -> None:
        self._run = bound.call
        self._format, self._images = region.memory_format, region.images
        self._path, self._key = region.path, key
        self.shape = torch.Size((sizes["batch"], region.module_channels, sizes["height"], sizes["width"]))

    def __call__(self, *inputs: Tensor) -> Any:
        try:
            return self._attempt(inputs)
        except OutOfMemory as error:
            LOG.warning("%s; trying once more with what nobody uses given back", str(error))  # a record is kept
        release_memory(inputs[0].device)  # only here: the error is gone, and the tensors that its frames held
        return self._attempt(inputs)

    def _attempt(self, inputs: tuple[Tensor, ...]) -> Any:
        try:
            images = (image.contiguous(memory_format=self._format) for image in inputs[: self._images])
            rest = (tensor.contiguous() for tensor in inputs[self._images :])
            return self._run(*map(_aligned, images), *map(_aligned, rest))
        except AccelHiDiffError:
            raise
        except FAILURES as error:
            image = inputs[0]
            what = f"{self._path} with an input of {'x'.join(map(str, image.shape))}"
            raise not_the_artifact(error, image.device, what) or ArtifactFailed(self._path, self._key, error) from error


def not_the_artifact(error: Exception, device: torch.device, what: str) -> AccelHiDiffError | None:
    """What to raise where a request or the device is at fault; None where the artifact is."""
    if is_capturing(device):
        return CaptureFailed(f"{what}: {first_line(error)}")
    fault = fault_of(error, device)
    if fault is Fault.MEMORY:
        return OutOfMemory(
            f"{what}: expected enough memory on {device}, got {first_line(error)}; ask for a smaller size or fewer "
            "images at once, or leave more of its memory free"
        )
    if fault is Fault.DEVICE:
        return DeviceLost(
            f"{what}: expected {device} to answer, got {first_line(error)}; nothing runs on it any more in this "
            "process: start it anew"
        )
    return None


def _aligned(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor


@dataclass(frozen=True)
class Missing:
    """A region graph that the cache does not hold: where, and what it holds instead."""

    reason: str


class Binder:
    """Binds region graphs; remembers what it bound. Thread safe.

    Args:
        cache: where artifacts lie; None for a backend that keeps none.
        backend: compiles and loads.
        shapes: "symbolic" or "exact", see `regions.bucket_of`.
        stats: counters to keep.
    """

    def __init__(self, cache: CompileCache | None, backend: Backend, shapes: str, stats: Stats) -> None:
        self.cache = cache
        self.backend = backend
        self.shapes = shapes
        self.stats = stats
        self._bound: dict[tuple[str, str], BoundRegion | None] = {}
        self._entries: dict[str, Entry] = {}
        self._keys: dict[Any, CacheKey] = {}
        self._failed: dict[str, ArtifactFailed] = {}  # by the digest of the key
        self._lock = threading.RLock()

    def graph(
        self,
        region: Region,
        topology: Topology,
        sizes: Sizes,
        dtype: torch.dtype,
        device: torch.device,
        controlled: bool = False,
    ) -> RegionGraph:
        """The graph of a region that serves a call of these sizes: in its symbolic bucket where the artifact's own
        constraints cover them, in an exact one otherwise."""
        traits = region.traits(topology, controlled)
        for shapes in dict.fromkeys((self.shapes, "exact")):
            bucket = bucket_of(region, traits, sizes, shapes, self.backend.smallest_symbolic, device.type)
            wide = device.type == "cuda" and region.largest(sizes, traits) >= _INDEX_LIMIT
            graph = RegionGraph(region, traits, bucket, example_sizes(bucket, sizes), dtype, device, wide)
            entry = self.entry(self.key(graph))
            if entry is None or isinstance(judge_sizes(region.path, served(entry), sizes), Accept):
                break
        return graph

    def key(self, graph: RegionGraph) -> CacheKey:
        """The action key of a graph under this backend; computed once."""
        traits = tuple(sorted(graph.traits.items()))
        facts = graph.bucket, graph.dtype, graph.device.type, graph.wide
        name = graph.region.path, graph.region.structure, traits, *facts
        key = self._keys.get(name)
        if key is None:
            key = self._keys[name] = graph.key(self.backend.factors(graph.device))
        return key

    def entry(self, key: CacheKey) -> Entry | None:
        """The cache's entry for a key, remembered once found."""
        if self.cache is None or not self.backend.persistent:
            return None
        with self._lock:
            entry = self._entries.get(key.digest)
            if entry is None:
                entry = next(filter(None, map(self.cache.get, self.backend.places(key))), None)
                if entry is not None:
                    self._entries[key.digest] = entry
                    self.stats.loads += 1
            return entry

    def made_elsewhere(self, device: torch.device) -> str | None:
        """One line if artifacts that were found were made for another GPU than the device, or target, they serve."""
        if device.type != "cuda":
            return None
        target = self.backend.target
        here = str(target) if target is not None else torch.cuda.get_device_name(device)
        with self._lock:
            return made_elsewhere([str(entry.notes.get("made_for", "")) for entry in self._entries.values()], here)

    def prepare(self, graph: RegionGraph) -> bool:
        """Makes sure that a graph is compiled; True if this call compiled it."""
        if not self.backend.persistent:
            return self._bind(graph, self.key(graph), None) is not None
        assert self.cache is not None, "a persistent backend has a cache"
        key = self.key(graph)
        if self.entry(key) is not None:
            return False
        self.stats.misses += 1
        prepared = self.backend.prepare(graph, self.cache)
        with self._lock:
            self._entries[key.digest] = prepared.entry
            self.stats.compiles += prepared.compiled
        return prepared.compiled

    def bind_all(self, graphs: Graphs, compile_missing: bool) -> dict[str, BoundCall] | Missing | Reject:
        """Calls for all regions of a UNet graph, by path; or the first one that is missing or does not fit.

        Raises:
            CompileFailed: a region cannot be compiled.
        """
        if not compile_missing:
            for graph, _ in graphs:
                if reason := self._lacks(graph):
                    return Missing(f"{graph.region.path}: {reason}")
        calls = {}
        for graph, sizes in graphs:
            key = self.key(graph)
            if (known := self._failed.get(key.digest)) is not None:
                return Reject(known.reason)
            if compile_missing:
                self.prepare(graph)
            entry = self.entry(key)
            if entry is None and self.backend.persistent:  # it was there a moment ago
                return Missing(f"{graph.region.path}: artifact {key.short} is not in the cache any more")
            try:
                bound = self._bind(graph, key, entry)
            except ArtifactFailed as failed:
                self.quarantine(failed)
                return Reject(failed.reason)
            if bound is None:
                continue
            decision = judge_sizes(graph.region.path, bound.bucket, sizes)
            if isinstance(decision, Reject):
                return decision
            calls[graph.region.path] = BoundCall(bound, graph.region, key, sizes)
        return calls

    def _lacks(self, graph: RegionGraph) -> str:
        """Why a graph cannot be bound without compiling; "" where it can."""
        key = self.key(graph)
        if self.backend.persistent:
            assert self.cache is not None, "a persistent backend has a cache"
            return self.cache.explain(key) if self.entry(key) is None else ""
        bound = self.is_bound(graph) or self.backend.ready(key)
        return "" if bound else f"not compiled in this process, where backend {self.backend.name!r} compiles at start"

    def missing(self, graphs: Graphs) -> list[tuple[RegionGraph, CacheKey]]:
        """The graphs that the cache does not hold, each key once."""
        found = {(key := self.key(graph)).digest: (graph, key) for graph, _ in graphs}
        return [(graph, key) for graph, key in found.values() if self.entry(key) is None]

    def widened(self, graphs: Graphs) -> Graphs | None:
        """The same regions with a graph of a symbolic range in place of each exact one that is missing; None if the
        cache does not hold all of these, or one does not cover its sizes."""
        wider: Graphs = []
        for graph, sizes in graphs:
            chosen = graph
            if self.entry(self.key(graph)) is None:
                smallest, device = self.backend.smallest_symbolic, graph.device.type
                bucket = bucket_of(graph.region, graph.traits, sizes, "symbolic", smallest, device)
                examples = example_sizes(bucket, sizes)
                chosen = replace(graph, bucket=bucket, example_sizes=examples)
                entry = self.entry(self.key(chosen))
                if entry is None:
                    return None
                if isinstance(judge_sizes(graph.region.path, served(entry), sizes), Reject):
                    return None
            wider.append((chosen, sizes))
        return wider

    def is_bound(self, graph: RegionGraph) -> bool:
        """True if the graph is loaded and bound to its region's weights."""
        return (graph.region.path, self.key(graph).digest) in self._bound

    @property
    def held(self) -> int:
        """How many bindings are remembered."""
        return len(self._bound)

    def keep_only(self, names: set[tuple[str, str]]) -> None:
        """Gives back what else is bound, and the cache entries that it used; it is made again when it is needed.

        Args:
            names: (region path, key digest) of what stays.
        """
        digests = {digest for _, digest in names}
        with self._lock:
            self._bound = {name: bound for name, bound in self._bound.items() if name in names}
            self._entries = {digest: entry for digest, entry in self._entries.items() if digest in digests}
            self._keys.clear()

    def quarantine(self, failed: ArtifactFailed) -> None:
        """An artifact failed at run time: it is not used again until `verify` finds it sound."""
        digest = failed.key.digest
        with self._lock:
            self._failed[digest] = failed
            self._entries.pop(digest, None)
            self._bound = {name: bound for name, bound in self._bound.items() if name[1] != digest}

    def verify(self) -> dict[str, str | None]:
        """Checks every byte of the artifacts that failed; the sound ones may be used again.

        Returns:
            Key digest -> None where it is sound, else what is wrong with it.
        """
        found: dict[str, str | None] = {}
        with self._lock:
            for digest, failed in list(self._failed.items()):
                self._entries.pop(digest, None)  # read anew
                entry = self.entry(failed.key) if self.backend.persistent else None
                if entry is not None or not self.backend.persistent:
                    del self._failed[digest]
                    found[digest] = None
                else:
                    found[digest] = "missing or damaged" if self.cache is None else self.cache.explain(failed.key)
        return found

    def forget_bindings(self, path: str) -> None:
        """Weights of a region were replaced or its structure changed: nothing bound to it may be used again."""
        with self._lock:
            self._bound = {name: bound for name, bound in self._bound.items() if name[0] != path}

    def _bind(self, graph: RegionGraph, key: CacheKey, entry: Entry | None) -> BoundRegion | None:
        name = (graph.region.path, key.digest)
        with self._lock:
            if name not in self._bound:
                try:
                    self._bound[name] = self.backend.bind(graph, entry)
                except (CompileFailed, CompileCacheError, OSError) as error:
                    if entry is None or isinstance(error, TimeoutError):
                        raise
                    if (told := not_the_artifact(error, graph.device, graph.region.path)) is not None:
                        raise told from error
                    raise ArtifactFailed(graph.region.path, key, error) from error  # it was compiled; it does not load
                if (made := self._bound[name]) is not None:
                    self.stats.bindings += not made.compiled
                    self.stats.compiles += made.compiled
            return self._bound[name]
