"""What a compilation will cost, before it: from what this cache has measured, else from a table. No torch.

An artifact's notes say how many seconds it took and how many weight tensors its region has. The table is one line for
each kind of region, cost against weight tensors; where a cache holds artifacts, it is scaled by what those have cost.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from compile_cache import CompileCache

_LOOK_SECONDS: Final = 2.0  # for reading what a cache has measured


@dataclass(frozen=True)
class Line:
    """Cost of an artifact of one kind against the number of its region's weight tensors.

    Attributes:
        seconds, seconds_per_weight: one core's time is seconds + seconds_per_weight * weights.
        bytes, bytes_per_weight: the same of its size.
    """

    seconds: float
    seconds_per_weight: float
    bytes: float
    bytes_per_weight: float

    def at(self, weights: int) -> tuple[float, float]:
        """(seconds, bytes) at a number of weight tensors; at least a second and a kilobyte."""
        seconds = self.seconds + self.seconds_per_weight * weights
        return max(seconds, 1.0), max(self.bytes + self.bytes_per_weight * weights, 1e3)


TABLE_FROM: Final = "benchmarks/results/compile.json: one core of an Intel Xeon, torch 2.13.0, float32 on a CPU"
WHOLE: Final = ("unet", "controlnet")  # kinds that the table knows at one exact size only
START_SECONDS: Final = 18.0
"""Until a compiling process has begun, and what its first artifact takes longer than the next ones."""

TABLE: Final[Mapping[str, Line]] = {
    "cfgpp step": Line(5.28, 0.0, 1.6e6, 0.0),
    "decoder": Line(0.0, 0.142, 0.0, 22700.0),
    "resnet": Line(0.0, 0.621, 0.0, 1.56e5),
    "transformer": Line(10.4, 0.0523, 1.79e6, 5100.0),
    "unet": Line(0.0, 0.0704, 0.0, 9420.0),
}
CUDA_FROM: Final = (
    "benchmarks/results/fill_sm_90.json: for sm_90 without a GPU, two processes on two cores, torch 2.11.0"
)
CUDA_TABLE: Final[Mapping[str, Line]] = {
    "decoder": Line(0.0, 0.6142, 0.0, 11060.0),
    "resnet": Line(0.0, 1.135, 0.0, 40280.0),
    "transformer": Line(16.11, 0.07714, 490500.0, 2223.0),
}
TABLES: Final = {"cpu": TABLE, "cuda": CUDA_TABLE}


@dataclass(frozen=True)
class Sample:
    """An artifact that was compiled once.

    Attributes:
        region: its kind.
        device: type of the device that it is for.
        weights: weight tensors of its region.
        seconds: that exporting and compiling took, alone on one core.
        bytes: its size.
    """

    region: str
    device: str
    weights: int
    seconds: float
    bytes: int


@dataclass(frozen=True)
class Cost:
    """What one artifact will cost.

    Attributes:
        seconds: of one core.
        bytes: in the cache.
        base: "same kind": from artifacts of this kind in this cache; "other kinds": from the table, scaled by the other
            artifacts in this cache; "table".
    """

    seconds: float
    bytes: float
    base: str


class Estimator:
    """Estimates costs.

    Args:
        samples: what is known of artifacts that exist.
        tables: for each type of device, cost by kind of region, where nothing is known.
    """

    def __init__(self, samples: Iterable[Sample], tables: Mapping[str, Mapping[str, Line]] = TABLES) -> None:
        self._tables = tables
        self._by_device: dict[str, list[Sample]] = {}
        for sample in samples:
            self._by_device.setdefault(sample.device, []).append(sample)

    def cost(self, region: str, device: str, weights: int) -> Cost:
        """The cost of an artifact.

        Args:
            region: kind of its region.
            device: type of the device that it is for.
            weights: weight tensors of its region.
        """
        seconds, size = self._line(region, device).at(weights)
        samples = self._by_device.get(device, [])
        same = [sample for sample in samples if sample.region == region]
        scales = self._scales(same or samples)
        base = "same kind" if same else "other kinds" if samples else "table"
        return Cost(seconds * scales[0], size * scales[1], base)

    def _line(self, region: str, device: str) -> Line:
        known = self._tables["cpu"]
        table = self._tables.get(device, known)
        # A whole ControlNet is half a UNet; a UNet's ends and samplers are small, as a step is.
        return table.get(region) or known.get(region) or known["unet" if region in WHOLE else "cfgpp step"]

    def _scales(self, samples: Sequence[Sample]) -> tuple[float, float]:
        if not samples:
            return 1.0, 1.0
        told = [self._line(sample.region, sample.device).at(sample.weights) for sample in samples]
        seconds = sum(sample.seconds for sample in samples) / sum(each[0] for each in told)
        return seconds, sum(sample.bytes for sample in samples) / sum(each[1] for each in told)


def samples_of(cache: CompileCache) -> list[Sample]:
    """What a cache has measured; of a very large one a part, so that it takes a bounded time."""
    found: dict[str, Sample] = {}
    end = time.monotonic() + _LOOK_SECONDS
    for entry in cache.entries():
        notes: Mapping[str, Any] = entry.notes
        device = str(entry.factors.get("device", "")).split(":")[0]
        numbers = [notes.get("weights"), notes.get("seconds")]
        if device and all(isinstance(number, int | float) and number >= 0 for number in numbers):
            name = " ".join(ref.sha256 for ref in entry.files.values())  # several keys may name one artifact
            found[name] = Sample(str(notes["region"]), device, int(notes["weights"]), notes["seconds"], entry.size)
        if time.monotonic() > end:
            break
    return list(found.values())


def wall_seconds(costs: Sequence[Cost], jobs: int) -> float:
    """Seconds that so many workers need, each with a core of its own; none of them is faster than its longest graph."""
    if not costs:
        return 0.0
    total = sum(cost.seconds for cost in costs)
    return START_SECONDS + max(total / jobs, *(cost.seconds for cost in costs))


def fit(rows: Iterable[Mapping[str, Any]]) -> dict[str, Line]:
    """The lines through measured points, for each kind of region.

    By least squares where their weight tensors differ by a factor of two at least, else in proportion to them.

    Args:
        rows: with region, weights, seconds and bytes.
    """
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        kinds.setdefault(row["region"], []).append(row)
    return {kind: Line(*_line(points, "seconds"), *_line(points, "bytes")) for kind, points in sorted(kinds.items())}


def _line(points: Sequence[Mapping[str, Any]], name: str) -> tuple[float, float]:
    weights, values = [point["weights"] for point in points], [point[name] for point in points]
    if max(weights) == 0:
        return statistics.fmean(values), 0.0
    if max(weights) < 2 * min(weights):
        return 0.0, statistics.fmean(values) / statistics.fmean(weights)
    slope, intercept = statistics.linear_regression(weights, values)
    return intercept, slope
