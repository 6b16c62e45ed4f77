"""The counters of a cache for Prometheus and OpenTelemetry. Neither is needed unless its function is called."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from .errors import CompileCacheError
from .reader import CacheReader
from .stats import COUNTERS

PREFIX = "compile_cache"


def register_prometheus(cache: CacheReader, registry: Any = None) -> Any:
    """Make the counters of a cache visible to ``prometheus_client``, as ``compile_cache_hits_total`` and so on.

    Misses carry the label ``reason``; every metric carries the label ``location``. Counters are read when they are
    scraped: counting costs nothing more.

    Args:
        cache: whose counters.
        registry: a ``prometheus_client`` registry; None: the default one.

    Returns:
        The collector, for ``registry.unregister``.

    Raises:
        CompileCacheError: if ``prometheus_client`` is not installed.
    """
    try:
        import prometheus_client.core as prometheus
    except ImportError as error:
        raise _missing("prometheus_client") from error

    class Collector:
        def collect(self) -> Iterator[Any]:
            for name, meaning in COUNTERS.items():
                labels = ["location", "reason"] if name == "misses" else ["location"]
                family = prometheus.CounterMetricFamily(f"{PREFIX}_{name}", meaning, labels=labels)
                for value, more in _values(cache, name):
                    family.add_metric([str(cache.location), *more], value)
                yield family

    collector = Collector()
    (prometheus.REGISTRY if registry is None else registry).register(collector)
    return collector


def register_opentelemetry(cache: CacheReader, meter: Any = None) -> list[Any]:
    """Make the counters of a cache visible to OpenTelemetry, as observable counters ``compile_cache.hits`` and so on.

    Args:
        cache: whose counters.
        meter: an OpenTelemetry meter; None: that of the global provider.

    Returns:
        The instruments.

    Raises:
        CompileCacheError: if ``opentelemetry-api`` is not installed.
    """
    try:
        from opentelemetry import metrics
    except ImportError as error:
        raise _missing("opentelemetry-api") from error
    chosen = metrics.get_meter(PREFIX) if meter is None else meter

    def instrument(name: str, meaning: str) -> Any:
        def observe(options: Any) -> Iterable[Any]:
            for value, reason in _values(cache, name):
                attributes = {"location": str(cache.location), **({"reason": reason[0]} if reason else {})}
                yield metrics.Observation(value, attributes)

        unit = "s" if name.endswith("_seconds") else "By" if name.endswith("_bytes") else "1"
        return chosen.create_observable_counter(f"{PREFIX}.{name}", [observe], unit, meaning)

    return [instrument(name, meaning) for name, meaning in COUNTERS.items()]


def _values(cache: CacheReader, name: str) -> list[tuple[float, list[str]]]:
    counters = cache.stats.to_json()
    if name == "misses":
        return [(count, [reason]) for reason, count in sorted(counters["misses_by_reason"].items())]
    return [(counters[name], [])]


def _missing(package: str) -> CompileCacheError:
    return CompileCacheError(f"expected the package {package}, got none; pip install {package}")
