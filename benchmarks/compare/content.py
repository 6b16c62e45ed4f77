"""What a comparison's JSON says, and the arithmetic on it that tables and plots share. No torch."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from accel_hidiff.benching.names import BENCHED, REFERENCE, STOCK

_ORDER: Final = (  # of rows; variants follow their base
    REFERENCE,
    STOCK,
    "hidiffusion",
    "hidiffusion-compile",
    "torch-compile",
    "repeated-blocks",
    "tensorrt",
    "onediff",
    "inductor",
    "aot",
)
EAGER: Final = (REFERENCE, STOCK, "hidiffusion")  # nothing is compiled
STALL: Final = 3.0  # a step that takes longer than so many medians of its request stalled
_COUNTED: Final = ("frames", "graphs", "recompilations", "graph_breaks", "gave_up")


def in_order(names: Sequence[str]) -> list[str]:
    """Contenders as they are listed everywhere, each once."""
    known = {name: place for place, name in enumerate(_ORDER)}
    return sorted(dict.fromkeys(names), key=lambda name: (known.get(name.partition("/")[0], len(known)), name))


def is_ours(name: str) -> bool:
    """Whether it is a backend of this project that compiles."""
    return name.partition("/")[0] in BENCHED and name != REFERENCE


@dataclass(frozen=True)
class Ratio:
    """Of medians; `low` and `high` are the least and the greatest of two turns of the same round, None if not kept."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Setup:
    """What the first calls of a contender cost, all cases of a size together.

    Attributes:
        cpu_s: processor seconds, compilers included; None: not told.
        compiled, loaded: graphs.
    """

    cpu_s: float | None
    compiled: int
    loaded: int


@dataclass(frozen=True)
class Memory:
    """Megabytes of a contender's process: when the model was loaded, and when all cases were set up.

    Attributes:
        graphs: compiled and loaded, over all cases.
        gpu, gpu_peak: allocated on the GPU when ready, and at most; None without a GPU.
    """

    weights: float
    opened: float
    ready: float
    graphs: int
    gpu: float | None = None
    gpu_peak: float | None = None

    @property
    def added(self) -> float:
        """From opened to ready."""
        return self.ready - self.opened

    def per_graph(self, eager: Memory | None) -> float | None:
        """Megabytes added for each graph, less what eager adds without any; None where nothing was compiled."""
        return (self.added - eager.added) / self.graphs if eager is not None and self.graphs else None


@dataclass(frozen=True)
class Steps:
    """A record of kind "steps"."""

    record: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Of the scenario."""
        return str(self.record["name"])

    @property
    def rows(self) -> Sequence[Mapping[str, Any]]:
        """Of the report, one for each contender, size and topology."""
        return self.record["report"]["rows"]

    @property
    def on_cpu(self) -> bool:
        """Whether it ran on a CPU: shared machines, so that only ratios count."""
        return str(self.record["report"]["settings"]["device"]).startswith("cpu")

    @property
    def threads(self) -> int | None:
        """Of torch on the CPU; None: not told."""
        return self.record["report"].get("machine", {}).get("torch_threads")

    @property
    def sizes(self) -> list[str]:
        """Of images, as the rows have them."""
        return list(dict.fromkeys(row["size"] for row in self.rows))

    @property
    def contenders(self) -> list[str]:
        """Those that ran, or tried to."""
        return in_order([row["backend"] for row in self.rows])

    @property
    def absent(self) -> dict[str, str]:
        """Contenders that this machine does not have, with the reason."""
        found = {one["backend"]: one for one in self.record["report"]["backends"]}
        names = in_order([*self.record.get("contenders", ()), *found])
        told: dict[str, Mapping[str, Any]] = {
            name: found.get(name, {}) for name in names if name not in self.contenders
        }
        return {name: str(one.get("reason") or "it has no row in the report") for name, one in told.items()}

    @cached_property
    def _by_case(self) -> dict[tuple[str, str, str], Mapping[str, Any]]:
        return {(row["backend"], row["size"], row["topology"]): row for row in self.rows}

    def topologies(self, size: str) -> list[str]:
        """Of a request at a size, by first step."""
        first = {row["topology"]: row["steps"][0] for row in self.rows if row["size"] == size}
        return sorted(first, key=lambda name: first[name])

    def row(self, contender: str, size: str, topology: str) -> Mapping[str, Any] | None:
        """A case of a contender."""
        return self._by_case.get((contender, size, topology))

    def problem(self, contender: str, size: str, topology: str) -> str | None:
        """Why a case has no time; None if it has one."""
        row = self.row(contender, size, topology)
        if row is None:
            return "not run"
        if row["state"] != "timed" or row["ms"] is None:
            return f"{row['state']}: {row['reason']}" if row["reason"] else str(row["state"])
        compiled = max(row["compiled_while_timed"], row["dynamo_graphs_while_timed"])
        return (
            f"{compiled} graphs were compiled while it was timed, so that its time tells nothing" if compiled else None
        )

    def problems(self, contender: str, size: str) -> dict[str, str]:
        """Topologies of a size without a time, with the reason."""
        told = {topology: self.problem(contender, size, topology) for topology in self.topologies(size)}
        return {topology: problem for topology, problem in told.items() if problem is not None}

    def ms(self, contender: str, size: str, topology: str) -> float | None:
        """Median milliseconds of a call."""
        if self.problem(contender, size, topology) is not None:
            return None
        row = self.row(contender, size, topology)
        return None if row is None else float(row["ms"])

    def over(self, contender: str, other: str, size: str, topology: str) -> float | None:
        """Ratio of the milliseconds of two contenders."""
        mine, others = self.ms(contender, size, topology), self.ms(other, size, topology)
        return None if mine is None or not others else mine / others

    def ratio(self, contender: str, size: str, topology: str) -> Ratio | None:
        """To patched eager."""
        row, value = self.row(contender, size, topology), self.over(contender, REFERENCE, size, topology)
        if row is None or value is None:
            return None
        low, high = row.get("vs_eager_range") or (None, None)
        return Ratio(value, low, high)

    def request_ms(self, contender: str, size: str) -> float | None:
        """Milliseconds of a request's UNet calls: those of each topology, as often as it runs."""
        total = 0.0
        for topology in self.topologies(size):
            ms, row = self.ms(contender, size, topology), self.row(contender, size, topology)
            if ms is None or row is None:
                return None
            total += ms * (row["steps"][1] - row["steps"][0])
        return total or None

    def request_ratio(self, contender: str, size: str) -> float | None:
        """The same over eager's."""
        mine, eager = self.request_ms(contender, size), self.request_ms(REFERENCE, size)
        return None if mine is None or eager is None else mine / eager

    def steps_counted(self, size: str) -> int:
        """Steps of a request that the rows stand for."""
        spans = {row["topology"]: row["steps"] for row in self.rows if row["size"] == size}
        return sum(stop - start for start, stop in spans.values())

    def setup(self, contender: str, size: str | None = None) -> Setup:
        """The cost of the first calls; of all sizes, or one. Seconds are told where no case is missing."""
        rows = [row for row in self.rows if row["backend"] == contender and size in (None, row["size"])]
        seconds = [row.get("setup_cpu_s") for row in rows]
        told = [value for value in seconds if value is not None]
        compiled, loaded = (sum(row.get(name) or 0 for row in rows) for name in ("compiled", "loaded"))
        return Setup(sum(told) if told and len(told) == len(seconds) else None, compiled, loaded)

    def memory(self, contender: str) -> Memory | None:
        """Of a contender; None where it did not live until all cases were set up."""
        backends = self.record["report"]["backends"]
        told: Mapping[str, Any] = next((one for one in backends if one["backend"] == contender), {})
        if "opened" not in told or "ready" not in told:
            return None
        opened, ready, setup = told["opened"], told["ready"], self.setup(contender)
        graphs = setup.compiled + setup.loaded
        gpu = (ready.get("gpu_mb"), ready.get("gpu_peak_mb"))
        return Memory(ready["weights_mb"], opened["resident_mb"], ready["resident_mb"], graphs, *gpu)


@dataclass(frozen=True)
class Worst:
    """The longest step of a process."""

    ms: float
    size: str
    step: int
    over_median: float


@dataclass(frozen=True)
class Process:
    """What one process of a contender answered."""

    record: Mapping[str, Any]

    @property
    def contender(self) -> str:
        """Who."""
        return str(self.record["contender"])

    @property
    def number(self) -> int:
        """1 began with empty caches, 2 with what 1 left."""
        return int(self.record["process"])

    @property
    def failed(self) -> str | None:
        """Why there are no figures."""
        return self.record.get("failed")

    @property
    def requests(self) -> Sequence[Mapping[str, Any]]:
        """One for each size."""
        return self.record.get("requests", ())

    @property
    def ours(self) -> bool:
        """As in `is_ours`."""
        return is_ours(self.contender)

    def counted(self) -> dict[str, int]:
        """Torch's own counters, over all requests."""
        return {name: sum(request[name] for request in self.requests) for name in _COUNTED}

    def handled(self, name: str) -> int:
        """A counter of this project's handle, over all requests; of a peer, what stands in for it."""
        return sum(request["handle"].get(name, 0) for request in self.requests)

    @property
    def compilations(self) -> int:
        """Graphs: this project's by its handle, a peer's by Dynamo."""
        return self.handled("compiles") if self.ours else self.counted()["graphs"]

    def marks(self, request: Mapping[str, Any]) -> list[int]:
        """Steps of a request in which anything was compiled, by torch's records or the handle's counter."""
        counted = zip(request["frames_by_step"], request["compiles_by_step"], strict=True)
        return [step for step, counts in enumerate(counted) if any(counts)]

    @property
    def worst(self) -> Worst | None:
        """The longest step; None without a request."""
        found: Worst | None = None
        for request in self.requests:
            ms = max(request["step_ms"])
            if found is None or ms > found.ms:
                median = statistics.median(request["step_ms"])
                found = Worst(ms, request["size"], request["step_ms"].index(ms), ms / median)
        return found

    def torch_s(self) -> list[float]:
        """Seconds of torch's records, after each request, cumulative."""
        return _running([float(request["seconds"]) for request in self.requests])

    def stalled_s(self) -> list[float]:
        """Seconds of steps beyond `STALL` medians of their request, after each request, cumulative."""
        return _running([_stalled_s(request["step_ms"]) for request in self.requests])


def _stalled_s(step_ms: Sequence[float]) -> float:
    limit = STALL * statistics.median(step_ms)
    return sum(max(0.0, ms - limit) for ms in step_ms) / 1e3


def _running(values: Sequence[float]) -> list[float]:
    return [sum(values[: end + 1]) for end in range(len(values))]


@dataclass(frozen=True)
class Requests:
    """A record of kind "requests"."""

    record: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Of the scenario."""
        return str(self.record["name"])

    @property
    def sizes(self) -> list[str]:
        """In the order of the requests."""
        return [str(size) for size in self.record["sizes"]]

    @property
    def traced_only(self) -> bool:
        """Whether peers generated no code."""
        return bool(self.record["traced_only"])

    @property
    def processes(self) -> list[Process]:
        """Those that have figures, in the order of contenders."""
        found = [Process(row) for row in self.record["processes"]]
        names = in_order([one.contender for one in found])
        usable = [one for one in found if one.failed is None and one.requests]
        return sorted(usable, key=lambda one: (names.index(one.contender), one.number))

    @property
    def failures(self) -> list[tuple[str, str]]:
        """Processes without figures, and why."""
        rows = {(row["contender"], row["process"]): Process(row) for row in self.record["processes"]}
        told = []
        for entry in self.record["contenders"]:
            name = entry["name"]
            for number in range(1, entry["processes"] + 1):
                one = rows.get((name, number))
                if one is None:
                    told.append((f"{name}, process {number}", "not run"))
                elif one.failed is not None:
                    told.append((f"{name}, process {number}", one.failed))
        return told

    def asked(self, contender: str) -> int:
        """How many sizes a contender was to serve."""
        entry = next((one for one in self.record["contenders"] if one["name"] == contender), {})
        return int(entry.get("sizes") or len(self.sizes))

    @property
    def cut(self) -> dict[str, str]:
        """Processes that were ended before they had done all, and how far they were."""
        return {
            f"{one.contender}, process {one.number}": one.record["cut"]
            for one in self.processes
            if one.record.get("cut")
        }

    def eager_first_image_s(self) -> float | None:
        """Seconds until eager's first image."""
        found = (one.record["first_image_s"] for one in self.processes if one.contender == REFERENCE)
        return next(found, None)


@dataclass(frozen=True)
class Share:
    """What one topology asks for, and how much of the matmul's speed a contender reaches there (None: not timed).

    `moving` is the share of eager's time in which its traffic could be copied.
    """

    size: str
    topology: str
    tflop: float
    eager_gb: float
    floor_ms: float
    traffic_ms: float
    reached: Mapping[str, float | None]
    moving: float | None


@dataclass(frozen=True)
class Insight:
    """A record of kind "insight", beside the steps of the same scenario."""

    record: Mapping[str, Any]
    steps: Steps | None

    @property
    def name(self) -> str:
        """Of the scenario."""
        return str(self.record["scenario"])

    @property
    def on_cpu(self) -> bool:
        """As in `Steps`; so, too, where there are no steps: shares claim less."""
        return self.steps is None or self.steps.on_cpu

    @property
    def profiles(self) -> Sequence[Mapping[str, Any]]:
        """One for each contender, size and topology."""
        return self.record["profiles"]

    def shares(self, contenders: Sequence[str] = (REFERENCE, "aot")) -> list[Share]:
        """Of each size and topology."""
        matmul, copy = self.record["ceilings"]["matmul_tflop_per_s"], self.record["ceilings"]["copy_gb_per_s"]
        found = []
        for work in self.record["work"]:
            size, topology = work["size"], work["topology"]
            floor_ms = 1e3 * work["tflop"] / matmul
            reached: dict[str, float | None] = {}
            for name in contenders:
                ms = None if self.steps is None else self.steps.ms(name, size, topology)
                reached[name] = floor_ms / ms if ms else None
            traffic_ms = 1e3 * work["eager_gb"] / copy
            eager_ms = None if self.steps is None else self.steps.ms(REFERENCE, size, topology)
            moving = traffic_ms / eager_ms if eager_ms else None
            found.append(Share(size, topology, work["tflop"], work["eager_gb"], floor_ms, traffic_ms, reached, moving))
        return found

    def profile(self, contender: str, size: str, topology: str) -> Mapping[str, Any] | None:
        """One of `profiles`."""
        keys = {"contender": contender, "size": size, "topology": topology}
        return next((one for one in self.profiles if all(one[key] == keys[key] for key in keys)), None)


@dataclass(frozen=True)
class Content:
    """A whole file."""

    json: Mapping[str, Any]

    @cached_property
    def steps(self) -> list[Steps]:
        """In the order of the file."""
        return [Steps(record) for record in self._of_kind("steps")]

    @cached_property
    def requests(self) -> list[Requests]:
        """In the order of the file."""
        return [Requests(record) for record in self._of_kind("requests")]

    @cached_property
    def insights(self) -> list[Insight]:
        """In the order of the file."""
        steps = {one.name: one for one in self.steps}
        return [Insight(record, steps.get(record["scenario"])) for record in self._of_kind("insight")]

    @property
    def failures(self) -> dict[str, str]:
        """Scenarios that ended early, with the reason."""
        return {record["name"]: record["failed"] for record in self._of_kind("failed")}

    def _of_kind(self, kind: str) -> list[Mapping[str, Any]]:
        return [record for record in self.json.get("records", ()) if record["kind"] == kind]
