"""Counters, logs, Prometheus and OpenTelemetry: what happened is what they say."""

from __future__ import annotations

import logging
import sys

import pytest

from compile_cache import CacheKey, CompileCache, CompileCacheError, DamagedEntryWarning
from compile_cache.metrics import register_opentelemetry, register_prometheus

KEY, OTHER = CacheKey({"n": 1}), CacheKey({"n": 2})


def build(directory):
    (directory / "code").write_bytes(b"x" * 100)


def fails(directory):
    raise ValueError("no")


@pytest.fixture
def cache(cache):
    """A cache with one build, two hits, one failed build and, of four misses, one for damage."""
    cache.get_or_build(KEY, build)
    cache.get(KEY)
    cache.get(KEY)
    with pytest.raises(ValueError):
        cache.get_or_build(OTHER, fails)
    cache.get(OTHER)
    next(path for path in cache.location.glob("v1/blobs/*/*")).write_bytes(b"y" * 100)
    with pytest.warns(DamagedEntryWarning):
        cache.get(KEY)
    return cache


def test_counters(cache):
    stats = cache.stats
    assert (stats.hits, stats.misses, stats.builds, stats.build_failures) == (2, 4, 1, 1)
    assert stats.misses_by_reason == {"absent": 3, "damaged": 1}
    assert stats.read_bytes == 200 and stats.written_bytes == 100
    assert stats.build_seconds > 0 and stats.load_seconds > 0
    assert stats.to_json()["hits"] == 2 and "hits 2" in repr(stats)
    with pytest.raises(AttributeError, match="expected one of hits"):
        _ = stats.hit


def test_prometheus(cache):
    client = pytest.importorskip("prometheus_client")
    registry = client.CollectorRegistry()
    collector = register_prometheus(cache, registry)
    text = client.generate_latest(registry).decode()
    where = f'location="{cache.location}"'
    assert f"compile_cache_hits_total{{{where}}} 2.0" in text
    assert f'compile_cache_misses_total{{{where},reason="absent"}} 3.0' in text
    assert f'compile_cache_misses_total{{{where},reason="damaged"}} 1.0' in text
    assert "compile_cache_build_seconds_total" in text and "compile_cache_written_bytes_total" in text
    cache.get_or_build(KEY, build)
    assert f"compile_cache_builds_total{{{where}}} 2.0" in client.generate_latest(registry).decode()
    registry.unregister(collector)
    assert client.generate_latest(registry) == b""


def test_opentelemetry(cache):
    export = pytest.importorskip("opentelemetry.sdk.metrics.export")
    sdk = pytest.importorskip("opentelemetry.sdk.metrics")
    reader = export.InMemoryMetricReader()
    provider = sdk.MeterProvider([reader])
    register_opentelemetry(cache, provider.get_meter("test"))
    (resource,) = reader.get_metrics_data().resource_metrics
    found = {metric.name: metric for metric in resource.scope_metrics[0].metrics}
    (hits,) = found["compile_cache.hits"].data.data_points
    assert hits.value == 2 and hits.attributes == {"location": str(cache.location)}
    misses = {point.attributes["reason"]: point.value for point in found["compile_cache.misses"].data.data_points}
    assert misses == {"absent": 3, "damaged": 1} and found["compile_cache.read_bytes"].unit == "By"
    provider.shutdown()


@pytest.mark.parametrize(
    ("register", "package"), [(register_prometheus, "prometheus_client"), (register_opentelemetry, "opentelemetry")]
)
def test_without_the_package(cache, monkeypatch, register, package):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(CompileCacheError, match="pip install"):
        register(cache)


def test_logs_carry_fields(tmp_path, caplog):
    caplog.set_level(logging.DEBUG, "compile_cache")
    cache = CompileCache(tmp_path / "cache")
    cache.get_or_build(KEY, build)
    cache.get(KEY)
    cache.prune(max_age=1e-9)
    events = {record.event: record for record in caplog.records}
    assert events["stored"].key == KEY.digest and events["stored"].bytes == 100
    assert events["hits"].key == KEY.digest and events["removed"].key == KEY.digest
