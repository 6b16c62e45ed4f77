"""All models of a deploy file, behind one door: what may come in, what is ready, and how it ends. No web framework."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import psutil

from accel_hidiff.deploy import Deployment, ModelTable
from accel_hidiff.serving.engine import Engine
from accel_hidiff.serving.jobs import Job
from accel_hidiff.serving.metrics import Metrics, counter, gauge
from accel_hidiff.serving.refusal import device_lost, stopping
from accel_hidiff.serving.requests import size_text

LOG = logging.getLogger(__name__)
_SHOWN: Final = 10  # missing graphs of a model in /healthz
_STATS: Final = {
    "compiles": "Graphs compiled by this process.",
    "loads": "Distinct artifacts loaded from the cache.",
    "bindings": "Artifacts bound to the weights of a region.",
    "hits": "Calls of UNet and decoder that compiled graphs served.",
    "misses": "Look-ups that found a graph missing.",
    "eager_calls": "Calls of UNet and decoder that ran eager.",
    "captures": "Kinds of UNet calls that were captured in CUDA graphs.",
    "replays": "UNet calls that a CUDA graph served.",
}


class Service:
    """Serves a deploy file.

    Args:
        deployment: what to serve.
        broken: called once with the exception where a model cannot be loaded; the service is of no use then.

    Attributes:
        deployment, engines, metrics: what it serves, by model name, and how that went.
        draining: no new requests are taken any more.
    """

    def __init__(self, deployment: Deployment, broken: Callable[[Exception], None]) -> None:
        self.deployment = deployment
        self.metrics = Metrics()
        self.draining = False
        self.ready_seconds: float | None = None
        self._broken = broken
        self._cache: Any = None
        self._pool: Any = None
        self._counted: Any = None  # a prometheus_client registry with the cache's counters
        self._lock = threading.Lock()
        self._opening = threading.Lock()
        capacity = deployment.service.queue
        self.engines = {model.name: Engine(model, capacity, self._open, self._changed) for model in deployment.models}

    def start(self) -> None:
        """Begins to load the models, one after the other."""
        for engine in self.engines.values():
            engine.start()

    def submit(self, job: Job) -> int:
        """Queues a request; see `Engine.submit`. Once the device of a model is lost, none is taken for any."""
        if self.draining:
            raise stopping()
        if any(engine.state().lost for engine in self.engines.values()):
            raise device_lost()
        return self.engines[job.request.model].submit(job)

    def idle(self) -> bool:
        """Whether no request waits or runs."""
        return all(engine.idle() for engine in self.engines.values())

    def close(self, timeout: float, loading: bool = False) -> bool:
        """Refuses what is left, ends compiling processes and threads.

        Args:
            timeout: seconds that threads get to come to the end of a step.
            loading: wait as long for models that are being loaded, too.

        Returns:
            False if a thread is still at work.
        """
        self.draining = True
        for engine in self.engines.values():
            engine.close()
        end = time.monotonic() + timeout
        ended = [engine.join(max(0.0, end - time.monotonic()), loading) for engine in self.engines.values()]
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()
        return all(ended)

    def health(self) -> tuple[bool, dict[str, Any]]:
        """Whether it is ready, and what is known: status, seconds until ready, and the models with what they miss."""
        states = {name: engine.state() for name, engine in self.engines.items()}
        ready = not self.draining and all(state.ready for state in states.values())
        models = {
            name: {
                "ready": state.ready,
                "graphs": state.graphs,
                "missing": len(state.missing),
                "why": [state.lost] if state.lost else list(state.missing[:_SHOWN]),
                "seconds": {part: round(seconds, 3) for part, seconds in state.seconds.items()},
            }
            for name, state in states.items()
        }
        lost = any(state.lost for state in states.values())
        status = "stopping" if self.draining else "device lost" if lost else "ready" if ready else "loading"
        return ready, {"status": status, "seconds": self.ready_seconds, "models": models}

    def models(self) -> dict[str, Any]:
        """The models as OpenAI's API lists them, with what may be asked of each."""
        created = int(psutil.Process().create_time())
        data = [
            {
                "id": model.name,
                "object": "model",
                "created": created,
                "owned_by": "accel-hidiff",
                "sizes": [size_text(size) for size in model.pixel_sizes()],
                "any_size": self.deployment.service.any_size,
                "steps": list(model.steps),
                "ready": self.engines[model.name].state().ready,
            }
            for model in self.deployment.models
        ]
        return {"object": "list", "data": data}

    def prometheus(self) -> str:
        """All metrics as Prometheus text."""
        states = [({"model": name}, engine.state()) for name, engine in self.engines.items()]
        lines = self.metrics.lines()
        lines += gauge("ready", "1 once every graph is loaded.", [(label, s.ready) for label, s in states])
        lines += gauge("queue_depth", "Requests that wait.", [(label, s.waiting) for label, s in states])
        lines += gauge("queue_capacity", "Requests that may wait.", [({}, self.deployment.service.queue)])
        lines += gauge("running", "Requests that are drawn now.", [(label, s.running) for label, s in states])
        lines += gauge("graphs", "Graphs that the deploy file needs.", [(label, s.graphs) for label, s in states])
        lines += gauge("graphs_missing", "Of those, not loaded.", [(label, len(s.missing)) for label, s in states])
        if self.ready_seconds is not None:
            lines += gauge("ready_seconds", "From the start of the process.", [({}, self.ready_seconds)])
        stats = [(name, engine.handle.stats) for name, engine in self.engines.items() if engine.handle is not None]
        for field, meaning in _STATS.items():
            lines += counter(f"{field}_total", meaning, [({"model": n}, getattr(s, field)) for n, s in stats])
        held = [({"model": name}, s.graph_bytes) for name, s in stats]
        lines += gauge("graph_bytes", "Device memory that CUDA graphs hold.", held)
        rejected = [({"model": name}, sum(dict(s.rejected).values())) for name, s in stats]
        lines += counter("rejected_total", "Calls that a reason kept from compiled graphs.", rejected)
        background = [({"model": n, "state": k}, v) for n, s in stats for k, v in sorted(dict(s.background).items())]
        lines += counter("background_total", "Graphs compiled in the background, by what came of them.", background)
        return "\n".join(lines) + "\n" + self._cache_metrics()

    # ---- in the engines' threads -----------------------------------------------------------------------------------

    def _open(self, model: ModelTable) -> Any:
        from accel_hidiff.compiling.pool import CompilePool
        from accel_hidiff.deployed import open_deployed_cache, open_deployed_model

        options = {}
        with self._opening:
            if self._cache is None and model.backend not in ("inductor", "eager"):
                self._cache = open_deployed_cache(self.deployment.cache)
            if model.on_miss == "background":
                with self._lock:
                    if self._pool is None and not self.draining:
                        self._pool = CompilePool()
                    options["background"] = self._pool
        return open_deployed_model(model, self._cache, on_miss=model.on_miss, **options)

    def _changed(self, problem: Exception | None) -> None:
        if problem is not None:
            if not self.draining:
                self._broken(problem)
            return
        with self._lock:
            states = [engine.state() for engine in self.engines.values()]
            if self.ready_seconds is not None or not all(state.ready for state in states):
                return
            self.ready_seconds = round(time.time() - psutil.Process().create_time(), 3)
        parts = {part: sum(state.seconds.get(part, 0.0) for state in states) for part in ("imports", "model", "graphs")}
        told = ", ".join(f"{part} {seconds:.2f} s" for part, seconds in parts.items())
        graphs = sum(state.graphs for state in states)
        LOG.info("ready after %.2f s: %d graphs of %d models (%s)", self.ready_seconds, graphs, len(states), told)

    def _cache_metrics(self) -> str:
        """The compile cache's counters; nothing without `prometheus_client`."""
        if self._cache is None:
            return ""
        try:
            import prometheus_client
        except ImportError:
            return ""
        from compile_cache.metrics import register_prometheus

        with self._lock:
            if self._counted is None:
                self._counted = prometheus_client.CollectorRegistry()
                register_prometheus(self._cache, self._counted)
        text: bytes = prometheus_client.generate_latest(self._counted)
        return text.decode()
