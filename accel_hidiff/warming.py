"""The first call of what is loaded, made before a request makes it.

On a GPU the first call of a package loads its kernels, and the first one of a size makes cuDNN's plans, which belong to
the thread that made them: up to a second, which the first request of each size would pay.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from accel_hidiff.binder import BoundCall, Graphs
from accel_hidiff.device import wait_for
from accel_hidiff.errors import OutOfMemory
from accel_hidiff.regions import RegionGraph, Sizes

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadReport:
    """What `Handle.load` did.

    Attributes:
        kinds: of calls (of the UNet, a ControlNet, the decoder, a CFG++ step) that requests of these sizes make.
        regions: compiled regions that serve them, each counted once.
        load_seconds: to find, load and bind them.
        warm_calls: compiled calls that were run once; 0 where none were to be.
        warm_seconds: that this took.
        too_large: what did not fit the device's memory when it was run, one line each; it stays loaded.
        captured: kinds of UNet calls that are replayed as CUDA graphs from now on.
        graph_bytes: device memory that the handle's graphs hold.
        not_captured: why other kinds are not, one line each.
    """

    kinds: int
    regions: int
    load_seconds: float
    warm_calls: int = 0
    warm_seconds: float = 0.0
    too_large: tuple[str, ...] = ()
    captured: int = 0
    graph_bytes: int = 0
    not_captured: tuple[str, ...] = ()

    def __str__(self) -> str:
        warm = f", ran {self.warm_calls} calls of them once in {self.warm_seconds:.2f} s" if self.warm_calls else ""
        large = f"; {len(self.too_large)} did not fit the memory" if self.too_large else ""
        graphs = ""
        if self.captured:
            graphs = f", {self.captured} kinds of UNet calls in CUDA graphs of {self.graph_bytes / 2**20:.0f} MiB"
        if self.not_captured:
            graphs += f", {len(self.not_captured)} in none"
        return f"loaded {self.regions} compiled regions in {self.load_seconds:.2f} s{warm}{graphs}{large}"


class WarmUp:
    """Runs each compiled call once for each size and thread, over zeros, on the thread that calls it."""

    def __init__(self) -> None:
        self._done: set[tuple[Hashable, ...]] = set()

    def run(self, graphs: Graphs, calls: Mapping[str, BoundCall]) -> tuple[int, list[str]]:
        """Runs those of one kind of call. What ran at a size already, in another region, is not run again.

        Returns:
            How many were run, and what did not fit the device's memory, one line each.

        Raises:
            ArtifactFailed, DeviceLost: as a request would.
        """
        count, too_large = 0, []
        for graph, sizes in graphs:
            call = calls.get(graph.region.path)
            if call is None:
                continue
            thread, program = threading.get_ident(), call.name[1]
            region, size = (thread, call.name), (thread, program, tuple(sizes.items()))
            if region in self._done and size in self._done:
                continue
            self._done |= {region, size}
            try:
                with torch.no_grad():
                    call(*_zeros(graph, sizes))
                count += 1
                wait_for(graph.device)
            except OutOfMemory as problem:
                LOG.warning("%s", str(problem))
                too_large.append(str(problem))
        return count, too_large


def _zeros(graph: RegionGraph, sizes: Sizes) -> list[Tensor]:
    """Inputs of these sizes, as the graph takes them; the global random generators stay as they are."""
    with torch.random.fork_rng(devices=[graph.device] if graph.device.type == "cuda" else []):
        return [tensor.zero_() for tensor in graph.region.example(graph.traits, sizes, graph.dtype, graph.device)]
