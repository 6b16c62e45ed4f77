"""Which UNet calls are replayed: captured at load, kept while they are right and worth it, given back after that.

A graph holds addresses. It belongs to one entry of the dispatcher's table and is replayed for that very one: whatever
the dispatcher forgets or makes anew takes its graph with it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn

from accel_hidiff.binder import FAILURES, not_the_artifact
from accel_hidiff.errors import AccelHiDiffError, BadInput, DeviceLost, OutOfMemory, first_line
from accel_hidiff.replay import capturer as devices
from accel_hidiff.replay.capturer import Captured, Capturer
from accel_hidiff.replay.inputs import StaticInputs, StepInputs
from accel_hidiff.replay.judge import gain, is_worth_it
from accel_hidiff.stats import Stats

if TYPE_CHECKING:
    from accel_hidiff.dispatch import Graph, Name

LOG: Final = logging.getLogger(__name__)

Compute = Callable[[StepInputs], Tensor]

_TURNS: Final = 5  # timed calls each way


@dataclass
class Captures:
    """What one `load` captured.

    Attributes:
        kept: kinds of UNet calls that are replayed from now on, those captured before included.
        skipped: why others are not, one line each.
    """

    kept: int = 0
    skipped: list[str] = field(default_factory=list)


class Recording:
    """One kind of UNet call, captured; holds everything that it has the address of. Guarded by who owns it.

    Args:
        graph: the entry of the dispatcher's table that it was captured of, with the programs that it calls.
        captured: by the device.
        static: its inputs.
        read: what else it reads: the UNet's weights, and what the call looked up.
    """

    def __init__(self, graph: Graph, captured: Captured, static: StaticInputs, read: tuple[Tensor, ...]) -> None:
        self.graph = graph
        self.is_alive = True
        self._captured = captured
        self._static = static
        self._read = read

    def takes(self, inputs: StepInputs) -> bool:
        """Whether a call's inputs fit."""
        return self._static.takes(inputs)

    def run(self, inputs: StepInputs) -> Tensor:
        """The result of a call, a tensor of its own."""
        return self._captured.replay(lambda: self._static.fill(inputs))

    def release(self) -> None:
        """Gives back what it captured; it does not run again."""
        self.is_alive = False
        self._captured.release()
        self._read = ()

    def held(self) -> list[Tensor]:
        """The tensors that it keeps alive, programs aside."""
        return [*self._static.held(), *self._read, self._captured.out]


class Replays:
    """The graphs of one handle. Thread safe: one replay at a time, from the copy of its inputs to that of its output.

    Args:
        mode: "auto": keeps a graph that saves at least 5 % of a call's time; "on": keeps all.
        stats: counters to keep.
        serves: what serves the calls of a name now.

    Attributes:
        clock: tells seconds.
    """

    def __init__(self, mode: str, stats: Stats, serves: Callable[[Name], Graph | None]) -> None:
        self.clock: Callable[[], float] = time.perf_counter
        self._mode = mode
        self._stats = stats
        self._serves = serves
        self._device: torch.device | None = None
        self._capturer: Capturer | None = None
        self._recordings: dict[Name, Recording] = {}
        self._slower: dict[Name, Graph] = {}
        self._lock = threading.RLock()
        self._one_capture = threading.Lock()
        self._load = _Load()

    def require(self, device: torch.device) -> None:
        """BadInput if graphs are asked for on a device that has none."""
        if self._mode == "on" and devices.capturer_for(device) is None:
            raise BadInput(
                f'cuda_graphs: expected "auto" or "off" for a pipeline on {device}, got "on"; move the pipeline to a '
                "CUDA device first"
            )

    # In a request

    def run(self, name: Name, graph: Graph, inputs: StepInputs) -> Tensor | None:
        """The result of a call by its graph; None where it has none, or its inputs do not fit.

        Raises:
            DeviceLost: nothing runs on the device any more.
        """
        recording = self._recordings.get(name)
        if recording is None or recording.graph is not graph or not recording.takes(inputs):
            return None
        try:
            with self._lock:
                if not recording.is_alive:
                    return None
                out = recording.run(inputs)
                self._stats.replays += 1
                return out
        except FAILURES as error:
            what = "a UNet call in a CUDA graph"
            told = not_the_artifact(error, inputs.sample.device, what)
            LOG.warning("%s failed: %s; such calls run without one until the next load", what, first_line(error))
            if isinstance(told, DeviceLost):
                self._drop(list(self._recordings))
                raise told from error
            in_the_way = isinstance(told, OutOfMemory)
        self._drop(list(self._recordings) if in_the_way else [name])  # here: the error's frames held tensors
        return None

    # At load

    @contextmanager
    def capturing(self, device: torch.device) -> Iterator[Captures]:
        """UNet calls of this thread are captured inside of the block, and not answered.

        Raises:
            BadInput: the device cannot capture, and "on" asks for it.
        """
        self.require(device)
        with self._one_capture:
            if self._device != device:
                self._drop(list(self._recordings))
                self._device, self._capturer = device, devices.capturer_for(device)
            self._load.captures = Captures()
            try:
                yield self._load.captures
            finally:
                self._load.captures = None

    @property
    def is_possible(self) -> bool:
        """Whether the device of the last `capturing` can capture."""
        return self._capturer is not None

    @property
    def is_capturing(self) -> bool:
        """Whether this thread is in `capturing`."""
        return self._load.captures is not None

    def capture(self, name: Name, graph: Graph, inputs: StepInputs, module: nn.Module, compute: Compute) -> None:
        """Captures the calls of a name, unless they are already or it has shown not to be worth it.

        Args:
            name, graph: as in `run`.
            inputs: of such a call.
            module: the UNet.
            compute: runs such a call.

        Raises:
            DeviceLost: nothing runs on the device any more.
        """
        captures, capturer = self._load.captures, self._capturer
        if capturer is None or captures is None:
            return
        what = f"{name[1]}, {'x'.join(map(str, inputs.sample.shape))}"
        if not graph.calls:
            self.skip(f"{what}: {graph.reason or 'runs eager'}")
            return
        known = self._recordings.get(name)
        if known is not None and known.graph is graph:
            captures.kept += 1
            return
        if self._slower.get(name) is graph:
            return
        try:
            reason = self._try(name, graph, inputs, module, compute, capturer)
        except (AccelHiDiffError, *FAILURES) as error:
            told = not_the_artifact(error, inputs.sample.device, f"a UNet call in a CUDA graph ({what})")
            if isinstance(told, DeviceLost):
                raise told from error
            reason = first_line(error)
        if reason:
            LOG.info("not in a CUDA graph: %s: %s", what, reason)
            self.skip(f"{what}: {reason}")
            capturer.give_back()
        else:
            captures.kept += 1
        self._stats.graph_bytes = capturer.held_bytes()

    def skip(self, reason: str) -> None:
        """Something of what is to be captured on this thread is not."""
        if self._load.captures is not None:
            self._load.captures.skipped.append(reason)

    def _try(
        self, name: Name, graph: Graph, inputs: StepInputs, module: nn.Module, compute: Compute, capturer: Capturer
    ) -> str:
        """Captures a call and keeps it; "", or why it is not kept."""
        static = StaticInputs(inputs)
        captured = capturer.capture(lambda: compute(static.inputs()))
        weights = [one.detach() for one in (*module.parameters(), *module.buffers())]
        recording = Recording(graph, captured, static, (*weights, *inputs.call.tables.values()))
        kept = False
        try:
            if self._mode == "auto":
                plain, replayed = self._times(inputs, recording, compute, capturer)
                if not is_worth_it(plain, replayed):
                    self._slower[name] = graph
                    return f"it saves {gain(plain, replayed):.1%} of the time"
            with self._lock:
                if self._serves(name) is not graph:  # something failed, or was replaced, meanwhile
                    return "what it was captured of is not used any more"
                self._recordings[name] = recording
                self._stats.captures += 1
                kept = True
                return ""
        finally:
            if not kept:
                recording.release()

    def _times(
        self, inputs: StepInputs, recording: Recording, compute: Compute, capturer: Capturer
    ) -> tuple[list[float], list[float]]:
        """Seconds of some calls without the graph and with it, in turns, after one of each that does not count."""

        def plain() -> None:
            compute(replace(inputs, call=inputs.call.over(inputs.call.tensors())))

        def replay() -> None:
            with self._lock:
                recording.run(inputs)

        times: tuple[list[float], list[float]] = ([], [])
        for turn in range(_TURNS + 1):
            for way, seconds in zip((plain, replay), times, strict=True):
                capturer.wait()
                began = self.clock()
                way()
                capturer.wait()
                if turn:
                    seconds.append(self.clock() - began)
        return times

    # Whenever something changes

    def prune(self) -> None:
        """Gives back the graphs of what the dispatcher does not serve any more, or serves by something else."""

        def stale(graphs: Mapping[Name, Graph]) -> list[Name]:
            return [name for name, graph in graphs.items() if self._serves(name) is not graph]

        for name in stale(self._slower.copy()):
            self._slower.pop(name, None)
        self._drop(stale({name: one.graph for name, one in self._recordings.copy().items()}))

    def _drop(self, names: Iterable[Name]) -> None:
        with self._lock:
            dropped = [found for name in names if (found := self._recordings.pop(name, None)) is not None]
            if not dropped or self._capturer is None:
                return
            while dropped:
                dropped.pop().release()
            self._capturer.give_back()
            self._stats.graph_bytes = self._capturer.held_bytes() if self._recordings else 0

    def held(self) -> dict[Name, Recording]:
        """What is replayed now."""
        return self._recordings.copy()


class _Load(threading.local):
    captures: Captures | None = None
