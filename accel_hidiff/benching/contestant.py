"""One contestant over one model: what a worker does when it is asked to."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from accel_hidiff.benching.compilations import watch
from accel_hidiff.benching.inputs import unet_inputs
from accel_hidiff.benching.names import REFERENCE, STOCK, Contender
from accel_hidiff.benching.options import Case, Options
from accel_hidiff.benching.subjects import subject_of
from accel_hidiff.errors import BadInput
from accel_hidiff.models import load_pipeline
from accel_hidiff.parity import limit_of, wrong
from accel_hidiff.schedule import LATENT_CELL


class Contestant:
    """A pipeline that a contestant runs.

    Args:
        options: of the bench.
        name: of the contestant, as in `Contender.parse`.
        work: folder that all contestants share: the tiny model and the cache of this run, where those are asked for.

    Raises:
        BadInput: the model, its device or an option is not what it should be.
    """

    def __init__(self, options: Options, name: str, work: Path) -> None:
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        contender = Contender.parse(name)
        if not contender.ours:
            watch()
        pipe = load_pipeline(options.model or _tiny_model(work), options.dtype, options.device)
        self._options, self._name = options, name
        self.subject = subject_of(contender, pipe, options, work)
        self._unet = pipe.unet

    @property
    def facts(self) -> dict[str, str]:
        """Dtype, device and, where HiDiffusion is this project's, family of the model."""
        dtype = str(self._unet.dtype).removeprefix("torch.")
        patch = self.subject.patch
        return {"dtype": dtype, "device": str(self._unet.device), "family": patch.family.name if patch else ""}

    def cases(self) -> list[Case]:
        """The topologies of a request at each size, in the order of their first step; none without a patch."""
        found: dict[tuple[int, int, str], Case] = {}
        if self.subject.patch is None:
            return []
        for height, width in self._options.sizes or [self._own_size()]:
            for phase in self.subject.patch.plan(height, width, self._options.steps):
                name = height, width, str(phase.topology)
                found.setdefault(name, Case(*name, phase.start, phase.stop))
        return list(found.values())

    def set_up(self, case: Case, reference: Path) -> dict[str, Any]:
        """The first call of a case, which compiles or loads, and its output beside the reference's.

        Args:
            case: what to call.
            reference: file of the reference's output; written by the reference itself.

        Returns:
            JSON values: seconds of the first call, processor seconds of it (compilers included), seconds of the second
            one, counters, the error and its limit (None where nothing is compared), what is wrong ("" for nothing).

        Raises:
            CompileFailed: the contestant cannot serve the case.
        """
        with self.called(case) as call, self._counted() as counted:
            before = _processor_seconds()
            first_s, _ = self._timed(call)
            first_cpu_s = _processor_seconds() - before
            call_s, out = self._timed(call)
        self._give_memory_back()
        self.subject.require_served(counted)
        limit, error = limit_of(self._unet.dtype), None
        if self._name in (REFERENCE, STOCK):
            problem = "" if bool(out.isfinite().all()) else "its output is not finite; try another --dtype"
            if self._name == REFERENCE:
                torch.save(out.cpu(), reference)
        else:
            error, problem = wrong(out.cpu(), torch.load(reference, weights_only=True), limit)
        return {
            "setup_s": first_s,
            "setup_cpu_s": first_cpu_s,
            "call_s": call_s,
            **counted,
            "error": error,
            "limit": limit,
            "wrong": problem,
        }

    def turn(self, case: Case, calls: int) -> dict[str, Any]:
        """Calls the UNet several times, after one call that is not timed where there are several, and on a GPU.

        Returns:
            JSON values: seconds of one call, counters.

        Raises:
            CompileFailed: a call was not served compiled.
        """
        with self.called(case) as call, self._counted() as counted:
            if calls > 1 or self._on_gpu:
                call()
            seconds, _ = self._timed(call, calls)
        self._give_memory_back()
        self.subject.require_served(counted)
        return {"seconds": seconds / calls, **counted}

    def memory(self) -> dict[str, Any]:
        """JSON values: megabytes of the weights of all models, resident now and at the most; on a GPU, allocated."""
        models = [part for part in self.subject.pipe.components.values() if isinstance(part, torch.nn.Module)]
        weights = {id(weight): weight.nbytes for model in models for weight in (*model.parameters(), *model.buffers())}
        resident, peak = psutil.Process().memory_info().rss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        told = {"weights_mb": sum(weights.values()) / 1e6, "resident_mb": resident / 1e6, "peak_mb": peak / 1e6}
        if self._on_gpu:
            told["gpu_mb"] = torch.cuda.memory_allocated(self._unet.device) / 1e6
            told["gpu_peak_mb"] = torch.cuda.max_memory_allocated(self._unet.device) / 1e6
        return told

    @contextmanager
    def called(self, case: Case) -> Iterator[Any]:
        """A context that gives the UNet call of a case, without arguments; it returns the output."""
        inputs = unet_inputs(self._unet, case.height, case.width, self._options.batch)
        with torch.no_grad(), self.subject.standing(case, self._options.steps) as call:
            yield partial(call, inputs)

    def _timed(self, call: Any, calls: int = 1) -> tuple[float, Tensor]:
        """Seconds of so many calls, and the last output."""
        self._synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            out: Tensor = call()
        self._synchronize()
        return time.perf_counter() - start, out

    @property
    def _on_gpu(self) -> bool:
        return bool(self._unet.device.type == "cuda")

    def _synchronize(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize(self._unet.device)

    def _give_memory_back(self) -> None:
        """What torch keeps for the next call is another contestant's while that one works."""
        if self._on_gpu:
            torch.cuda.empty_cache()

    @contextmanager
    def _counted(self) -> Iterator[dict[str, Any]]:
        """By how much counters rise inside of the block: of the subject, and graphs that Dynamo captured."""
        counted: dict[str, Any] = {}
        before = self._counters()
        yield counted
        counted |= {name: value - before[name] for name, value in self._counters().items()}

    def _counters(self) -> dict[str, int]:
        dynamo = sys.modules.get("torch._dynamo.utils")  # absent: nothing was traced
        graphs = 0 if dynamo is None else int(dynamo.counters["stats"]["unique_graphs"])
        return self.subject.counters() | {"graphs": graphs}

    def _own_size(self) -> tuple[int, int]:
        side = self._unet.config.sample_size
        if not isinstance(side, int):
            raise BadInput(f"--size: expected one for a model whose config gives no side of its images, got {side!r}")
        return side * LATENT_CELL, side * LATENT_CELL


def _processor_seconds() -> float:
    """Of this process, and of the compilers that it started."""
    process = psutil.Process()
    seconds = 0.0
    for one in (process, *process.children(recursive=True)):
        try:
            times = one.cpu_times()
        except psutil.NoSuchProcess:  # its parent has its seconds now
            continue
        seconds += times.user + times.system + times.children_user + times.children_system
    return seconds


def _tiny_model(work: Path) -> str:
    from accel_hidiff.demo import save_model, tiny_config

    return str(save_model(work / "model", config=tiny_config()))
