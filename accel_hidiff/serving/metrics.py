"""The service's own metrics, and their Prometheus text. Needs no package; thread safe.

Where `prometheus_client` is installed, the service tells the compile cache's counters beside them.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

PREFIX: Final = "accel_hidiff"
BUCKETS_S: Final = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0, 600.0)

Labels = Mapping[str, str]
Sample = tuple[Labels, float]


class Histogram:
    """How many observations were at most so large, with their sum. Not thread safe.

    >>> histogram = Histogram((1.0, 2.0))
    >>> histogram.observe(1.5)
    >>> histogram.cumulative(), histogram.sum
    ([0, 1, 1], 1.5)
    """

    def __init__(self, buckets: Sequence[float] = BUCKETS_S) -> None:
        self.buckets = tuple(buckets)
        self.sum = 0.0
        self._counts = [0] * (len(self.buckets) + 1)

    def observe(self, value: float) -> None:
        """Counts a value."""
        self._counts[bisect_left(self.buckets, value)] += 1
        self.sum += value

    def cumulative(self) -> list[int]:
        """Observations up to each bound, the last of which is infinity."""
        total, counts = 0, []
        for count in self._counts:
            total += count
            counts.append(total)
        return counts


class Metrics:
    """What became of requests, by model and status, and how long they took."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._images: Counter[str] = Counter()
        self._seconds: dict[str, Histogram] = {}
        self._waited: dict[str, Histogram] = {}

    def answered(self, model: str | None, status: int) -> None:
        """Counts a request. `model` is one of the deploy file, None where the request names none that is there."""
        with self._lock:
            self._requests[model or "", status] += 1

    def drawn(self, model: str, images: int, seconds: float, waited: float) -> None:
        """A request was served: its images, the seconds from its arrival to its end, and those in the queue."""
        with self._lock:
            self._images[model] += images
            self._seconds.setdefault(model, Histogram()).observe(seconds)
            self._waited.setdefault(model, Histogram()).observe(waited)

    def lines(self) -> list[str]:
        """Prometheus text."""
        with self._lock:
            requests = [({"model": m, "status": str(s)}, n) for (m, s), n in sorted(self._requests.items())]
            images = [({"model": model}, float(n)) for model, n in sorted(self._images.items())]
            lines = counter("requests_total", "Requests by status; 499: the client went.", requests)
            lines += counter("images_total", "Images of requests that were served.", images)
            lines += _histogram("request_seconds", "From arrival to the last image.", self._seconds)
            lines += _histogram("queue_seconds", "From arrival to the first step.", self._waited)
        return lines


def counter(name: str, meaning: str, samples: Iterable[Sample]) -> list[str]:
    """Lines of a counter."""
    return _family(name, meaning, "counter", [_sample(name, labels, value) for labels, value in samples])


def gauge(name: str, meaning: str, samples: Iterable[Sample]) -> list[str]:
    """Lines of a gauge.

    >>> gauge("ready", "1 or 0.", [({"model": "base"}, 1)])[-1]
    'accel_hidiff_ready{model="base"} 1'
    """
    return _family(name, meaning, "gauge", [_sample(name, labels, value) for labels, value in samples])


def _histogram(name: str, meaning: str, found: Mapping[str, Histogram]) -> list[str]:
    lines = []
    for model, histogram in sorted(found.items()):
        counts = histogram.cumulative()
        for bound, count in zip([*map(str, histogram.buckets), "+Inf"], counts, strict=True):
            lines.append(_sample(f"{name}_bucket", {"model": model, "le": bound}, count))
        lines.append(_sample(f"{name}_sum", {"model": model}, histogram.sum))
        lines.append(_sample(f"{name}_count", {"model": model}, counts[-1]))
    return _family(name, meaning, "histogram", lines)


def _family(name: str, meaning: str, kind: str, samples: list[str]) -> list[str]:
    return [f"# HELP {PREFIX}_{name} {meaning}", f"# TYPE {PREFIX}_{name} {kind}", *samples]


def _sample(name: str, labels: Labels, value: float) -> str:
    told = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
    number = str(int(value)) if value == int(value) else repr(float(value))
    return f"{PREFIX}_{name}{{{told}}} {number}" if told else f"{PREFIX}_{name} {number}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
