"""Capturing on a CUDA device: `torch.cuda.graph`, over a pool of the caching allocator's memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from accel_hidiff.device import CAPTURE, device_index, on_device, release_memory, wait_for

_BROKEN: Final[list[Any]] = []  # graphs whose capture did not end: torch's allocators may look at them ever after
# On the stream of the capture: cuBLAS's workspace of a stream, cuDNN's plans, kernels loaded late.
_WARM_RUNS: Final = 2


class CudaCapturer:
    """Captures on one device; one thread at a time captures, one replays.

    Every capture is made on the same side stream, so that what a library keeps for a stream is made once, and outside
    of the pool. Graphs of one pool share memory: replays on different streams wait for each other.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side: Any = None
        self._pool: Any = None
        self._alive = 0
        self.last: Any = None  # the stream of the last replay

    def capture(self, run: Callable[[], Tensor]) -> CudaCaptured:
        """See `Capturer.capture`."""
        with on_device(self._device):
            if self._side is None:
                self._side = torch.cuda.Stream(self._device)
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            here: Any = torch.cuda.current_stream()
            self._side.wait_stream(here)
            with torch.cuda.stream(self._side):
                for _ in range(_WARM_RUNS):
                    run()
            here.wait_stream(self._side)
            graph: Any = torch.cuda.CUDAGraph()
            self._alive += 1  # before: another thread may release the others meanwhile
            try:
                return CudaCaptured(self, graph, self._record(graph, run, here))
            except BaseException:
                self.released()
                raise

    def _record(self, graph: Any, run: Callable[[], Tensor], here: Any) -> Tensor:
        """Captures one run; whatever happens, nothing is being captured afterwards, and `here` is the current stream.

        Other threads go on allocating meanwhile. What waits for the whole device would break the capture: `CAPTURE`.
        """
        raised: BaseException | None = None
        options: Any = {"pool": self._pool, "stream": self._side, "capture_error_mode": "thread_local"}
        try:
            with CAPTURE, torch.cuda.graph(graph, **options):
                try:
                    return run()
                except BaseException as problem:
                    raised = problem
                    raise
        except BaseException as problem:
            torch.cuda.set_stream(here)
            if problem is not raised:  # the capture could not begin, or not end
                self._break_off(graph)
            raise (raised or problem) from (raised or problem).__cause__

    def _break_off(self, graph: Any) -> None:
        """Does what torch leaves undone where a capture does not end: tells the allocator that it has."""
        _BROKEN.append(graph)
        for function in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            with contextlib.suppress(RuntimeError, AttributeError):
                getattr(torch._C, function)(device_index(self._device), self._pool)

    def wait(self) -> None:
        """See `Capturer.wait`."""
        wait_for(self._device)

    def held_bytes(self) -> int:
        """See `Capturer.held_bytes`."""
        if self._pool is None:
            return 0
        pool = tuple(self._pool)
        segments = torch.cuda.memory_snapshot()
        return sum(one["total_size"] for one in segments if tuple(one.get("segment_pool_id", ())) == pool)

    def give_back(self) -> None:
        """See `Capturer.give_back`."""
        with contextlib.suppress(RuntimeError):  # the device may be lost
            release_memory(self._device)

    def replay(self, graph: Any, out: Tensor, fill: Callable[[], None]) -> Tensor:
        """See `Captured.replay`."""
        with on_device(self._device):
            here = torch.cuda.current_stream()
            if self.last is not None and self.last != here:
                here.wait_stream(self.last)
            self.last = here
            fill()
            graph.replay()
            return out.clone()

    def released(self) -> None:
        """A graph has gone."""
        self._alive -= 1
        self._forget_unused_pool()

    def _forget_unused_pool(self) -> None:
        """A pool whose last graph has gone is the allocator's to free: its name is not used again."""
        if not self._alive:
            self._pool = self.last = None


class CudaCaptured:
    """A CUDA graph."""

    def __init__(self, capturer: CudaCapturer, graph: Any, out: Tensor) -> None:
        self._capturer = capturer
        self._graph = graph
        self._out: Tensor | None = out

    @property
    def out(self) -> Tensor:
        """See `Captured.out`."""
        assert self._out is not None, "it is released"
        return self._out

    def replay(self, fill: Callable[[], None]) -> Tensor:
        """See `Captured.replay`."""
        return self._capturer.replay(self._graph, self.out, fill)

    def release(self) -> None:
        """See `Captured.release`."""
        if self._out is None:
            return
        self._out = None
        with contextlib.suppress(RuntimeError):  # the device may be lost
            if self._capturer.last is not None:
                self._capturer.last.synchronize()  # not the device: another thread may be capturing there
            self._graph.reset()
        self._capturer.released()
