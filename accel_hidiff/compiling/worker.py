"""A compiling process: `python -m accel_hidiff.compiling.worker`, started and fed by `pool`.

Frames come in on the standard input, JSON lines go out on the standard output. The process has the lowest priority and
one thread, keeps no weights, and ends with its parent however that ends: then it kills its own process group, compilers
included. One graph fails alone: the process goes on with the next one.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from accel_hidiff.compiling.frames import LOWEST_PRIORITY, Inbox, answers


class _Bench:
    """The regions of one blueprint."""

    def __init__(self, blueprint: Any) -> None:
        from accel_hidiff.backends import create_backend
        from accel_hidiff.binder import Binder
        from accel_hidiff.config import DecodeConfig
        from accel_hidiff.dispatch import Dispatcher
        from accel_hidiff.installed import Installed
        from accel_hidiff.regions.step import STEP, StepRegion
        from accel_hidiff.stats import Stats

        self._session = _session(blueprint.target)
        self.backend = create_backend(blueprint.backend, blueprint.target, self._session)
        parts = blueprint.parts()
        dispatcher = Dispatcher(Binder(None, create_backend("eager"), "symbolic", Stats()), "eager", "")
        settings = blueprint.config, blueprint.regions, blueprint.family, blueprint.task
        self.installed = Installed(parts, dispatcher, *settings, decode=DecodeConfig(dtype=blueprint.decode_dtype))
        self.installed.install()
        self._parts = parts  # the patch holds it weakly
        self.regions = {STEP: StepRegion(parts.unet.config.out_channels)} | self.installed.regions()

    def compile(self, job: Any, cache: Any) -> dict[str, Any]:
        """Compiles one graph; what came of it, as JSON values."""
        import torch

        from accel_hidiff.compiling.blueprint import materialized
        from accel_hidiff.errors import CompileFailed

        start = time.perf_counter()
        region = self.regions.get(job.path)
        if region is None:
            raise CompileFailed(f"{job.path}: expected a region of the blueprint, got none of this name")
        graph = job.graph(region)
        stand_in = materialized if self._session is None else self._session.weightless
        with stand_in(region.module, torch.device(job.device)):
            key = graph.key(self.backend.factors(graph.device))
            if key.digest != job.digest:
                raise CompileFailed(
                    f"{job.path}: expected to compile graph {job.digest[:12]}, its key is {key.short} in a process of "
                    "its own: something that it depends on is not the same there; precompile it in this process"
                )
            prepared = self.backend.prepare(graph, cache)
        state = "compiled" if prepared.compiled else "found"
        return {"state": state, "seconds": time.perf_counter() - start}


def _session(target: Any) -> Any:
    """What compiles for a target in this process until it ends, where it has no GPU; None: the device does."""
    import torch

    from accel_hidiff.crosscompile.session import Session

    if target is None or torch.cuda.is_available():
        return None
    folder = Path(tempfile.mkdtemp())  # in the process's own folder for files, which goes with it
    return Session(target, folder).__enter__()


def serve(inbox: Inbox, out: IO[str]) -> None:
    """Works off frames until the parent closes the pipe."""
    from accel_hidiff.compiling.instructions import find_out, hand_down
    from compile_cache import CacheWriteError, CompileCache, RemoteError, TrustError

    bench: Any = None
    cache: Any = None
    blueprint_error: Exception | None = None
    while True:
        kind, value = inbox.next()
        if kind == "find out":
            print(json.dumps({"instructions": find_out()}), file=out, flush=True)
            continue
        if kind == "instructions":
            hand_down(value)
            continue
        if kind == "cache":
            cache = CompileCache.from_handover(value)
            continue
        if kind == "blueprint":
            bench, blueprint_error = None, None
            try:
                bench = _Bench(value)
            except Exception as problem:  # told with each of its jobs
                blueprint_error = problem
            continue
        try:
            if blueprint_error is not None:
                raise blueprint_error
            answer = bench.compile(value, cache)
        except (CacheWriteError, RemoteError, TrustError) as problem:
            answer = {"state": "not stored", "error": _one_line(problem)}
        except MemoryError as problem:
            answer = {"state": "died", "error": _one_line(problem)}
        except Exception as problem:
            answer = {"state": "failed", "error": _one_line(problem)}
        print(json.dumps({"digest": value.digest, **answer}), file=out, flush=True)


def _one_line(problem: Exception) -> str:
    lines = str(problem).strip().splitlines()
    name = type(problem).__name__
    text = lines[0] if lines else ""
    return text if name == "CompileFailed" else f"{name}: {text}"


def main() -> None:
    """Entry point of the process."""
    out = answers()
    _lower_priority(int(sys.argv[1]))
    serve(Inbox(0), out)


def _lower_priority(niceness: int) -> None:
    """The lowest one leaves processor and disk to everybody else; compilers that are started inherit it."""
    with suppress(OSError):
        os.nice(niceness)
    if niceness < LOWEST_PRIORITY:
        return
    with suppress(AttributeError, OSError):  # Linux
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    import psutil

    with suppress(AttributeError, OSError, psutil.Error):
        psutil.Process().ionice(psutil.IOPRIO_CLASS_IDLE)


if __name__ == "__main__":
    main()
