"""The dispatcher: names the graph of every call before it runs.

It holds the table from the name of a call to its graph, asks the guard and the binder for what is not in it, and
applies the user's `on_miss`. The hot path is one dictionary lookup; which calls there are is told by `served`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

from accel_hidiff.binder import ArtifactFailed, Binder, BoundCall, Graphs, Missing
from accel_hidiff.compiling.background import Background
from accel_hidiff.errors import BadInput, GraphMiss
from accel_hidiff.fingerprint import ModuleState
from accel_hidiff.guard import CallFacts, Reject, judge_call
from accel_hidiff.regions import Region
from compile_cache import UnstableFactor

if TYPE_CHECKING:
    from accel_hidiff.replay import Replays

ON_MISS = ("compile", "background", "eager", "error")

_MAX_NAMES = 1024  # kinds of calls that the table holds
_MAX_BOUND = 1024  # region calls that are bound: each holds a program, some 0.7 MB, and its entry a file descriptor

Name = tuple[Hashable, ...]  # of a call; the name of the model comes first


@dataclass(frozen=True, slots=True)
class Graph:
    """What serves one kind of call: compiled region calls, or the reason why it runs eager."""

    calls: Mapping[str, BoundCall] = field(default_factory=dict)
    reason: str | None = None
    missing: bool = False


class Dispatcher:
    """From the name of a call to what serves it. Thread safe.

    Args:
        binder: makes calls out of region graphs.
        on_miss: "compile", "background", "eager" or "error".
        hint: a command that fills a gap.

    Attributes:
        background: has missing graphs compiled under `on_miss="background"`.
        replays: replays calls of this table; None: all are run.
    """

    def __init__(self, binder: Binder, on_miss: str, hint: str) -> None:
        self.binder = binder
        self.on_miss = on_miss
        self.background: Background | None = None
        self.replays: Replays | None = None
        self._hint = hint
        self._sealed = False
        self._models: dict[str, tuple[nn.Module, list[Region]]] = {}
        self._graphs: dict[Name, Graph] = {}
        self._states: dict[str, ModuleState] = {}
        self._checked = _Checked()
        self._lock = threading.RLock()

    def register(self, name: str, model: nn.Module, regions: list[Region]) -> None:
        """A model whose calls are served from now on."""
        self._models[name] = (model, regions)

    def forget_models(self) -> None:
        """Others are registered in their place; what has no weights of its own stays."""
        self._forget(list(self._models))
        self._states.clear()
        self._models = {name: held for name, held in self._models.items() if not list(held[0].parameters())}

    # Hot path

    def begin(self, request_number: int) -> None:
        """Called at each call: what is checked once per request is checked at the first call of one."""
        if self._checked.request == request_number:
            return
        self._checked.request = request_number
        self.refresh()
        with self._lock:
            self._graphs = {name: graph for name, graph in self._graphs.items() if not graph.missing}

    def graph(self, name: Name, facts: Callable[[], CallFacts], graphs: Callable[[], Graphs]) -> Graph:
        """What serves a call of this name; `facts` and `graphs` are asked for when it is new."""
        found = self._graphs.get(name) or self.find(name, facts, graphs)
        stats = self.binder.stats
        if found.calls:
            stats.hits += 1
        else:
            stats.eager_calls += 1
            if found.reason is not None:
                stats.reject(found.reason)
        return found

    def find(self, name: Name, facts: Callable[[], CallFacts], graphs: Callable[[], Graphs]) -> Graph:
        """As `graph`, for nobody's call: none is counted."""
        found = self._graphs.get(name)
        if found is None:
            found = self._graphs.setdefault(name, self._resolve(name, facts(), graphs))  # it may have arrived already
            if len(self._graphs) > _MAX_NAMES or (self.binder.held > _MAX_BOUND and self._can_bind_again):
                self._shed()
        return found

    def serves(self, name: Name) -> Graph | None:
        """What the table holds for this name."""
        return self._graphs.get(name)

    def _keep(self, graphs: dict[Name, Graph]) -> None:
        """The table from now on; what was captured of anything else is given back."""
        self._graphs = graphs
        if self.replays is not None:
            self.replays.prune()

    def _shed(self) -> None:
        """Forgets the older half of the calls, and what they alone had bound; they are made again when they come."""
        with self._lock:
            kept = list(self._graphs.items())[len(self._graphs) // 2 :]
            self._keep(dict(kept))
            if self._can_bind_again:
                self.binder.keep_only({call.name for _, graph in kept for call in graph.calls.values()})

    @property
    def _can_bind_again(self) -> bool:
        """Whether a request gets back what was given up; else all of it was put there by `load`, to stay."""
        return self.binder.backend.persistent or self.on_miss == "compile"

    # Once per request

    def refresh(self, *names: str) -> None:
        """Looks whether anything of the models was replaced since the last time; what was bound is forgotten then.

        Args:
            names: models to look at; none: all.
        """
        changed = [name for name in names or self._models if self._changed(name)]
        if changed:
            self._forget(changed)

    def forget_missing(self, name: Name) -> None:
        """The next call of this name looks again whether its graph is there."""
        if (graph := self._graphs.get(name)) is not None and graph.missing:
            self._graphs.pop(name, None)

    def state(self, name: str) -> object:
        """What a model was when this was last looked at: the same object until something of it is replaced."""
        return self._states.get(name)

    def _changed(self, name: str) -> bool:
        previous = self._states.get(name)
        if previous is not None and previous.holds():
            return False
        self._states[name] = ModuleState(self._models[name][0])
        return previous is not None

    def _forget(self, models: Sequence[str]) -> None:
        """Something of these models was replaced: whatever was bound or keyed of them may be another thing now."""
        with self._lock:
            for model in models:
                for region in self._models[model][1]:
                    region.forget()
                    self.binder.forget_bindings(region.path)
            self._keep({name: graph for name, graph in self._graphs.items() if name[0] not in models})
            if self.background is not None:
                self.background.forget_models(models)

    # Slow path

    def load(self, graphs: Graphs) -> Graph:
        """Binds graphs before a call asks for them; GraphMiss under `on_miss="error"`. A backend that keeps nothing
        compiles now, whatever `on_miss` says: that is what a request will find."""
        if self.binder.backend.name == "eager":
            return Graph()
        compiles = self.on_miss == "compile" or not (self.binder.backend.persistent or self._sealed)
        return self._bind(None, lambda: graphs, compiles)

    def refuse(self, reason: str, missing: bool = False) -> Graph:
        """A graph that runs eager for a reason; GraphMiss under `on_miss="error"`."""
        if self.on_miss == "error":
            self.binder.stats.reject(reason)
            raise GraphMiss(f"no compiled graph serves this call: {reason}")
        return Graph(reason=reason, missing=missing)

    def fall_back(self, reason: str, *, whole_call: bool = False) -> None:
        """A call, or a part of one, that has its graph and cannot use it runs eager; GraphMiss under "error"."""
        self.refuse(reason)
        stats = self.binder.stats
        stats.reject(reason)
        if whole_call:
            stats.hits -= 1
            stats.eager_calls += 1

    def seal(self) -> None:
        """Nothing is compiled, fetched or written from now on.

        Raises:
            BadInput: `on_miss` is not "error".
        """
        if self.on_miss != "error":
            raise BadInput(f'seal: expected on_miss="error", got {self.on_miss!r}; accelerate with that first')
        self._sealed = True
        if self.binder.cache is not None:
            self.binder.cache = self.binder.cache.as_read_only()

    def close(self) -> None:
        """Nothing is served any more: what waits in the background is cancelled, programs and cache entries go."""
        if self.background is not None:
            self.background.close()
        with self._lock:
            self._keep({})
            self.binder.keep_only(set())

    def quarantine(self, failed: ArtifactFailed) -> None:
        """A compiled call raised: what it was to compute runs eager; GraphMiss under "error"."""
        self.binder.quarantine(failed)
        with self._lock:
            self._keep({})
        self.fall_back(failed.reason)

    def verify(self) -> dict[str, str | None]:
        """See `Binder.verify`."""
        with self._lock:
            found = self.binder.verify()
            if found:
                self._keep({})
            return found

    def _resolve(self, name: Name, facts: CallFacts, graphs: Callable[[], Graphs]) -> Graph:
        decision = judge_call(facts)
        if isinstance(decision, Reject):
            return self.refuse(decision.reason)
        if self.binder.backend.name == "eager":
            return Graph()
        return self._bind(name, graphs, self.on_miss == "compile")

    def _bind(self, name: Name | None, graphs: Callable[[], Graphs], compiles: bool) -> Graph:
        with self._lock:
            try:
                wanted = graphs()
                found = self.binder.bind_all(wanted, compile_missing=compiles)
            except UnstableFactor as problem:
                return self.refuse(str(problem))
            if isinstance(found, Missing):
                self.binder.stats.misses += 1
                if self.background is not None:
                    return self._meanwhile(name, graphs, wanted, found)
        if isinstance(found, Missing):
            return self.refuse(f"{found.reason}; to fill the gap: {self._hint}", missing=True)
        if isinstance(found, Reject):
            return self.refuse(found.reason)
        return Graph(found)

    def _meanwhile(self, name: Name | None, graphs: Callable[[], Graphs], wanted: Graphs, missing: Missing) -> Graph:
        """Has what is missing compiled in the background; the call is served by wider graphs until then, or eager."""
        assert self.background is not None
        wider = self.binder.widened(wanted)
        found = self.binder.bind_all(wider, compile_missing=False) if wider is not None else None
        told = self.background.ask(name, self.binder.missing(wanted), lambda: self._arrived(name, graphs))
        if isinstance(found, dict):
            return Graph(found)
        return self.refuse(f"{missing.reason}; {told}", missing=True)

    def _arrived(self, name: Name | None, graphs: Callable[[], Graphs]) -> None:
        """All graphs of a call are in the cache: the next call of this name runs them, never one under way."""
        with self._lock:
            changed = [model for model in ([name[0]] if name else self._models) if self._changed(str(model))]
            if changed:  # since the request that asked: these graphs are not what the next one needs
                self._forget([str(model) for model in changed])
                return
            found = self.binder.bind_all(graphs(), compile_missing=False)
            if isinstance(found, dict) and name is not None:
                self._keep({**self._graphs, name: Graph(found)})
                self.binder.stats.background["swapped"] += 1


class _Checked(threading.local):
    request: int = -1
