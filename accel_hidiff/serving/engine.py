"""One model of a deploy file: a thread that owns its pipeline, and the requests that wait for it.

A pipeline serves one request at a time, so everything that touches it happens in this one thread: loading its weights,
loading its graphs, drawing. A request that ended meanwhile (its client went, its time is over) is left between two
steps, by an exception from the pipeline's `callback_on_step_end`: the decoder is not run for nobody.

A request that does not fit the device's memory fails alone. After an error from which a device does not recover, an
illegal memory access, say, the engine serves nothing any more and is not ready: the process has to be started anew.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, Final

from accel_hidiff.deploy import ModelTable
from accel_hidiff.errors import BadInput, DeviceLost, GraphMiss, OutOfMemory, first_line
from accel_hidiff.failures import Fault
from accel_hidiff.serving.jobs import Finished, Job, Step, Stopped
from accel_hidiff.serving.refusal import (
    Refusal,
    device_lost,
    failed,
    invalid,
    out_of_memory,
    queue_full,
    stopping,
    unavailable,
)
from accel_hidiff.serving.requests import size_text

LOG = logging.getLogger(__name__)
_LOOK_AGAIN: Final = 1.0  # seconds between looks for graphs that were missing
_NO_WEIGHTS: Final = "its weights are not loaded yet"
_SHOWN: Final = 3  # missing graphs that are told
_opening = threading.Lock()  # modules are imported and weights read by one engine after the other


@dataclass(frozen=True)
class EngineState:
    """What is known of an engine at one moment.

    Attributes:
        opened: whether the pipeline is there, so that requests can be served.
        graphs: distinct graphs that the deploy file needs; 0 until that is known.
        missing: what of it is not loaded, one line each; empty once everything is.
        waiting: requests in the queue.
        running: requests that are drawn now, 0 or 1.
        seconds: what start-up took: "imports", "model" (building it and reading its weights), "graphs".
        lost: why its device serves nothing any more, one line; "" while it does.
    """

    opened: bool
    graphs: int
    missing: tuple[str, ...]
    waiting: int
    running: int
    seconds: dict[str, float]
    lost: str = ""

    @property
    def ready(self) -> bool:
        """Whether every graph is loaded, and the device there."""
        return self.opened and not self.missing and not self.lost


class Engine:
    """Serves one model.

    Args:
        model: its table.
        capacity: requests that may wait.
        open_model: loads and accelerates the pipeline; called once, in the engine's thread.
        changed: called when the engine became ready, or failed with an exception.
    """

    def __init__(
        self,
        model: ModelTable,
        capacity: int,
        open_model: Callable[[ModelTable], Any],
        changed: Callable[[Exception | None], None],
    ) -> None:
        self.model = model
        self.capacity = capacity
        self._open_model = open_model
        self._changed = changed
        self._handle: Any = None
        self._needed = 0
        self._missing: tuple[str, ...] = (_NO_WEIGHTS,)
        self._seconds: dict[str, float] = {}
        self._jobs: deque[Job] = deque()
        self._running: Job | None = None
        self._closed = False
        self._lost = ""
        self._mean = 1.0  # seconds of a request, over the last few
        self._work = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=f"accel_hidiff-{model.name}", daemon=True)

    def start(self) -> None:
        """Begins to load the model."""
        self._thread.start()

    @property
    def handle(self) -> Any:
        """The accelerated pipeline; None until it is loaded. Its counters may be read, nothing else."""
        return self._handle

    def state(self) -> EngineState:
        """What is known now."""
        with self._work:
            waiting, running = sum(not job.ended for job in self._jobs), int(self._running is not None)
        opened = self._handle is not None
        seconds = dict(self._seconds)
        return EngineState(opened, self._needed, self._missing, waiting, running, seconds, self._lost)

    def submit(self, job: Job) -> int:
        """Queues a request; returns how many are before it.

        Raises:
            Refusal: 429 where the queue is full, 503 where the model is not loaded yet, its device was lost or the
                engine was closed.
        """
        with self._work:
            if self._lost:
                raise device_lost()
            if self._closed:
                raise stopping()
            if self._handle is None:
                raise unavailable(f"{self.model.name} is not loaded yet; GET /healthz tells when", "model_loading", 5)
            self._jobs = deque(waiting for waiting in self._jobs if not waiting.ended)
            before = len(self._jobs) + (self._running is not None)
            if len(self._jobs) >= self.capacity:
                raise queue_full(self.capacity, max(1, ceil(self._mean * before)))
            self._jobs.append(job)
            self._work.notify()
            return before

    def idle(self) -> bool:
        """Whether nothing waits and nothing is drawn."""
        with self._work:
            return self._running is None and all(job.ended for job in self._jobs)

    def close(self) -> None:
        """Takes no more requests; those that wait or run are refused, and the thread ends between two steps."""
        self._end(stopping())

    def _end(self, refusal: Refusal) -> None:
        with self._work:
            self._closed = True
            left = [*self._jobs, *([self._running] if self._running is not None else [])]
            self._jobs.clear()
            self._work.notify_all()
        for job in left:
            job.finish(refusal)

    def join(self, timeout: float, loading: bool = False) -> bool:
        """Waits for the thread to end, after `close`; False if that takes longer than `timeout` seconds.

        A thread that still loads its model is waited for only with `loading`: it has nothing to lose.
        """
        if self._thread.ident is not None:
            self._thread.join(timeout if loading or self._handle is not None else 0.0)
        return not self._thread.is_alive()

    # ---- in the thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            graphs = self._open()
        except Stopped:
            return
        except Exception as problem:
            self._changed(problem)
            return
        look = 0.0
        while not self._closed:
            if self._missing and time.monotonic() >= look:
                try:
                    self._load(graphs)
                except Exception as problem:  # of the cache or a remote: requests are served all the same
                    if self._fault_of(problem) is Fault.DEVICE:
                        self._lose_device(problem)
                        break
                    LOG.exception("%s: cannot look for graphs", self.model.name)
                look = time.monotonic() + _LOOK_AGAIN
            if (job := self._next(_LOOK_AGAIN if self._missing else None)) is None:
                continue
            try:
                compiled = self._serve(job)
            finally:
                with self._work:
                    self._running = None
            if not compiled and not self._missing and self._handle.unbound(graphs):  # an artifact failed
                self._missing = tuple(self._unusable(self._handle))
                self._ready_or_not()
                look = time.monotonic() + _LOOK_AGAIN

    def _next(self, timeout: float | None) -> Job | None:
        with self._work:
            self._work.wait_for(lambda: self._jobs or self._closed, timeout)
            while self._jobs:
                job = self._jobs.popleft()
                if not job.ended:
                    self._running = job
                    return job
            return None

    def _open(self) -> Any:
        """Loads the pipeline; the graphs that the deploy file needs."""
        with _opening:
            began = time.monotonic()
            import diffusers

            import accel_hidiff.deployed  # noqa: F401  (torch, for the most part)

            diffusers.utils.logging.disable_progress_bar()
            if self._closed:
                raise Stopped
            imported = time.monotonic()
            handle = self._open_model(self.model)
        if handle.patch.task != "text2img":
            raise BadInput(
                f"models.task: expected a text-to-image model for {self.model.name}, got {handle.patch.task}; the "
                "service draws from text alone"
            )
        handle.pipe.set_progress_bar_config(disable=True)
        built = time.monotonic()
        model = self.model
        sizes = model.pixel_sizes()
        needed = handle.needed(sizes, model.steps, batch_sizes=model.batch_sizes, strengths=model.strengths)
        self._needed = len(needed.distinct)
        self._load(needed, handle)
        self._seconds = {"imports": imported - began, "model": built - imported, "graphs": time.monotonic() - built}
        self._handle = handle
        self._ready_or_not()
        return needed

    def _load(self, needed: Any, handle: Any = None) -> None:
        """Loads what the cache holds by now, and what failed and is sound."""
        opened, handle = handle is None, handle or self._handle
        for digest, wrong in handle.verify().items():
            LOG.warning("%s: artifact %s failed: %s", self.model.name, digest[:12], wrong or "sound, used again")
        missing = handle.missing(needed)
        model = self.model
        if not missing or handle.stats.misses == 0:  # later: nothing new to ask for until everything is there
            try:
                for steps in model.steps:
                    for strength in model.strengths:
                        options = {"batch_sizes": model.batch_sizes, "strength": strength}
                        handle.load(model.pixel_sizes(), steps, **options)
            except GraphMiss as problem:
                missing = missing or {"": str(problem)}
        lines = list(missing.values()) or (self._unusable(handle) if handle.unbound(needed) else [])
        previous, self._missing = self._missing, tuple(lines)
        if opened and self._missing != previous:
            self._ready_or_not()

    def _unusable(self, handle: Any) -> list[str]:
        """Rows of the plan whose graphs are there and yet not loaded: what a broken artifact leads to."""
        lines = []
        for height, width in self.model.pixel_sizes():
            for steps in self.model.steps:
                for batch in self.model.batch_sizes:
                    for row in handle.explain(height, width, steps, batch=batch).rows:
                        if row.state not in ("loaded", "eager", "compiles at start"):
                            where = f"{size_text((height, width))} {row.topology}"
                            lines.append(f"{where}: {row.state}, not loaded {row.reason}".strip())
        return list(dict.fromkeys(lines))

    def _ready_or_not(self) -> None:
        if not self._missing:
            self._changed(None)
            return
        more = f" and {len(self._missing) - _SHOWN} more" if len(self._missing) > _SHOWN else ""
        LOG.warning("%s: not ready: %s%s", self.model.name, "; ".join(self._missing[:_SHOWN]), more)

    def _serve(self, job: Job) -> bool:
        """False if a call of it was not served by compiled graphs."""
        began = time.monotonic()
        stats = self._handle.stats
        before, missed = (stats.hits, stats.eager_calls), False
        try:
            images = self._draw(job)
        except Stopped:
            LOG.info("%s: left after %.2f s", job.number, time.monotonic() - began)
        except GraphMiss as problem:  # nothing is wrong with the request: another replica may have the graph
            LOG.warning("%s: %s", job.number, problem)
            missed = True
            reason = str(problem).partition("; to fill the gap:")[0]
            job.finish(unavailable(f"{reason}; the service must not run it otherwise", "graph_missing", None))
        except BadInput as problem:
            job.finish(invalid(None, str(problem)))
        except Exception as problem:
            self._fail(job, problem)
        else:
            seconds = time.monotonic() - began
            self._mean += (seconds - self._mean) / 4
            served = stats.hits - before[0], stats.eager_calls - before[1]
            job.finish(Finished(tuple(images), *served, waited=began - job.arrived, drawn=seconds))
        return stats.eager_calls == before[1] and not missed

    def _fail(self, job: Job, problem: Exception) -> None:
        """The pipeline raised: the request fails, alone where the device is still there."""
        fault = self._fault_of(problem)
        if fault is Fault.DEVICE:
            self._lose_device(problem)
        elif fault is Fault.MEMORY:
            LOG.warning("%s: %s", job.number, first_line(problem))
            job.finish(out_of_memory(size_text((job.request.height, job.request.width))))
        else:
            LOG.exception("%s: the pipeline failed", job.number)
            job.finish(failed(type(problem).__name__, job.number))

    def _fault_of(self, problem: Exception) -> Fault:
        """Whose fault an error of the pipeline is, in compiled code or anywhere else."""
        if isinstance(problem, OutOfMemory):
            return Fault.MEMORY
        if isinstance(problem, DeviceLost):
            return Fault.DEVICE
        from accel_hidiff.device import fault_of

        return fault_of(problem, self._handle.pipe.device)

    def _lose_device(self, problem: Exception) -> None:
        """Nothing runs on the device any more: no request is taken, and none that waits is served."""
        self._lost = first_line(problem)
        LOG.critical("%s: its device is lost, start the process anew: %s", self.model.name, self._lost)
        self._end(device_lost())

    def _draw(self, job: Job) -> Sequence[tuple[Any, int]]:
        """(PIL image, seed) of each image. One after the other, so that each depends on its own seed alone."""
        import torch

        request, pipe = job.request, self._handle.pipe
        options = {} if request.guidance is None else {"guidance_scale": request.guidance}
        images = []
        for number in range(request.n):
            job.check()

            def after(pipe: Any, step: int, timestep: Any, kwargs: Any, number: int = number) -> Any:
                total = getattr(pipe, "num_timesteps", request.steps)
                job.step(Step(number, step + 1, total))
                return kwargs

            seed = request.seed_of(number)
            out = pipe(
                request.prompt,
                negative_prompt=request.negative_prompt,
                height=request.height,
                width=request.width,
                num_inference_steps=request.steps,
                generator=torch.Generator("cpu").manual_seed(seed),
                callback_on_step_end=after,
                **options,
            )
            images.append((out.images[0], seed))
        return images
