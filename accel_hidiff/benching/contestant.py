"""One backend over one model: what a worker does when it is asked to."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accel_hidiff.benching.inputs import unet_inputs
from accel_hidiff.benching.options import REFERENCE, Case, Options
from accel_hidiff.config import HiDiffusionConfig
from accel_hidiff.errors import BadInput, CompileFailed
from accel_hidiff.models import load_pipeline
from accel_hidiff.parity import limit_of, wrong
from accel_hidiff.pipeline import accelerate
from accel_hidiff.schedule import LATENT_CELL


class Contestant:
    """A pipeline accelerated with one backend.

    Args:
        options: of the bench.
        backend: name of the backend.
        work: folder that all contestants share: the tiny model and the cache of this run, where those are asked for.

    Raises:
        BadInput: the model, its device or an option is not what it should be.
    """

    def __init__(self, options: Options, backend: str, work: Path) -> None:
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        pipe = load_pipeline(options.model or _tiny_model(work), options.dtype, options.device)
        self._options, self._backend = options, backend
        self.handle = accelerate(
            pipe,
            hidiffusion=HiDiffusionConfig(),
            cache=options.cache or work / "cache",
            backend=backend,
            regions=options.regions,
            shapes=options.shapes,
        )
        self._unet = self.handle.patch.unet

    @property
    def facts(self) -> dict[str, str]:
        """Dtype, device and family of the model."""
        dtype = str(self._unet.dtype).removeprefix("torch.")
        return {"dtype": dtype, "device": str(self._unet.device), "family": self.handle.patch.family.name}

    def cases(self) -> list[Case]:
        """The topologies of a request at each size, in the order of their first step."""
        found: dict[tuple[int, int, str], Case] = {}
        for height, width in self._options.sizes or [self._own_size()]:
            for phase in self.handle.patch.plan(height, width, self._options.steps):
                name = height, width, str(phase.topology)
                found.setdefault(name, Case(*name, phase.start, phase.stop))
        return list(found.values())

    def set_up(self, case: Case, reference: Path) -> dict[str, Any]:
        """The first call of a case, which compiles or loads, and its output beside the reference's.

        Args:
            case: what to call.
            reference: file of the reference's output; written by the reference itself.

        Returns:
            JSON values: seconds of the first call, seconds of the second one, counters, the error and its limit, what
            is wrong ("" for nothing).

        Raises:
            CompileFailed: the backend cannot serve the case.
        """
        with self._called(case) as call, self._counted() as counted:
            first_s, _ = self._timed(call)
            call_s, out = self._timed(call)
        self._require_compiled(counted)
        limit, error = limit_of(self._unet.dtype), None
        if self._backend == REFERENCE:
            problem = "" if bool(out.isfinite().all()) else "its output is not finite; try another --dtype"
            torch.save(out.cpu(), reference)
        else:
            error, problem = wrong(out.cpu(), torch.load(reference, weights_only=True), limit)
        return {"setup_s": first_s, "call_s": call_s, **counted, "error": error, "limit": limit, "wrong": problem}

    def turn(self, case: Case, calls: int) -> dict[str, Any]:
        """Calls the UNet several times, after one call that is not timed where there are several.

        Returns:
            JSON values: seconds of one call, counters.

        Raises:
            CompileFailed: a call was not served compiled.
        """
        with self._called(case) as call, self._counted() as counted:
            if calls > 1:
                call()
            seconds, _ = self._timed(call, calls)
        self._require_compiled(counted)
        return {"seconds": seconds / calls, **counted}

    @contextmanager
    def _called(self, case: Case) -> Iterator[Any]:
        inputs = unet_inputs(self._unet, case.height, case.width, self._options.batch)
        phase = self.handle.patch.phase(step=case.start, num_steps=self._options.steps)
        with torch.no_grad(), phase:
            yield lambda: inputs.call(self._unet)

    def _timed(self, call: Any, calls: int = 1) -> tuple[float, Tensor]:
        """Seconds of so many calls, and the last output."""
        self._synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            out: Tensor = call()
        self._synchronize()
        return time.perf_counter() - start, out

    def _synchronize(self) -> None:
        if self._unet.device.type == "cuda":
            torch.cuda.synchronize(self._unet.device)

    @contextmanager
    def _counted(self) -> Iterator[dict[str, Any]]:
        """By how much counters rise inside of the block: of the handle, and graphs that Dynamo captured."""
        counted: dict[str, Any] = {}
        before = self._counters()
        yield counted
        counted |= {name: value - before[name] for name, value in self._counters().items()}

    def _counters(self) -> dict[str, int]:
        names = ("compiles", "loads", "bindings", "eager_calls")
        counted = {name: int(getattr(self.handle.stats, name)) for name in names}
        dynamo = sys.modules.get("torch._dynamo.utils")  # absent: nothing was traced
        return counted | {"graphs": 0 if dynamo is None else int(dynamo.counters["stats"]["unique_graphs"])}

    def _require_compiled(self, counted: dict[str, Any]) -> None:
        if self._backend != REFERENCE and counted["eager_calls"]:
            reasons = "; ".join(self.handle.stats.rejected) or "no reason was given"
            raise CompileFailed(f"calls ran eager: {reasons}")

    def _own_size(self) -> tuple[int, int]:
        side = self._unet.config.sample_size
        if not isinstance(side, int):
            raise BadInput(f"--size: expected one for a model whose config gives no side of its images, got {side!r}")
        return side * LATENT_CELL, side * LATENT_CELL


def _tiny_model(work: Path) -> str:
    from accel_hidiff.demo import save_model, tiny_config

    return str(save_model(work / "model", config=tiny_config()))
