"""The protocol that every backend keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from accel_hidiff.call import RegionCall
from accel_hidiff.config import OneDiffConfig
from accel_hidiff.regions import RegionGraph
from accel_hidiff.target import Target
from compile_cache import CacheKey, CompileCache, Entry, ShapeBucket


@dataclass(frozen=True)
class BoundRegion:
    """A compiled region over live weights.

    Attributes:
        call: takes the region's input tensors, returns its output tensor.
        bucket: the sizes that it may be fed with, as the compiler guarantees them.
        compiled: it was compiled for this; False: it was there.
    """

    call: RegionCall
    bucket: ShapeBucket
    compiled: bool = False


@dataclass(frozen=True)
class Prepared:
    """What `prepare` found or made: the cache entry, and whether it had to be compiled."""

    entry: Entry
    compiled: bool
    seconds: float


def served(entry: Entry) -> ShapeBucket:
    """The sizes that an artifact may be fed with: every backend that stores some notes them as `serves`."""
    serves: Any = entry.notes["serves"]
    return ShapeBucket.from_json(serves)


class Backend(Protocol):
    """How region graphs are compiled, kept and called."""

    name: str
    persistent: bool
    """True: `prepare` stores artifacts in the compile cache and `bind` needs one; False: `bind` compiles by itself."""

    shares: bool
    """True: one compilation serves all regions whose graphs are equal."""

    @property
    def target(self) -> Target | None:
        """What its GPU code is for, where that was told; None: the device that a graph is on."""

    @property
    def spec(self) -> str | OneDiffConfig:
        """What `create_backend` takes to make another one."""

    @property
    def smallest_symbolic(self) -> int | None:
        """The smallest size that stays symbolic in a compiled graph; None: every size is exact."""

    def factors(self, device: torch.device) -> Mapping[str, Any]:
        """Everything that an artifact depends on besides its region: environment, versions, every compile option."""

    def places(self, key: CacheKey) -> tuple[CacheKey, ...]:
        """The keys that a graph's artifact may be stored under, the best first: `key` itself is among them. Persistent
        backends only."""

    def prepare(self, graph: RegionGraph, cache: CompileCache) -> Prepared:
        """Compiles a graph into the cache, or finds that an equal graph is there already. Persistent backends only.

        Raises:
            CompileFailed: the region cannot be exported or compiled.
        """

    def ready(self, key: CacheKey) -> bool:
        """Whether `bind` compiles nothing for a graph of this key. Backends that are not persistent only."""

    def bind(self, graph: RegionGraph, entry: Entry | None) -> BoundRegion | None:
        """A call over the region's live weights; None: run the region eager.

        Raises:
            CompileFailed: the artifact does not fit the region.
        """
