"""Prometheus text, read by Prometheus' own parser."""

from __future__ import annotations

from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from accel_hidiff.serving.metrics import Metrics, counter, gauge


def samples(lines: list[str]) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    found: dict[Any, float] = {}
    for family in text_string_to_metric_families("\n".join(lines) + "\n"):
        for sample in family.samples:
            found[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
    return found


def test_requests_and_latencies() -> None:
    metrics = Metrics()
    metrics.answered("base", 200)
    metrics.answered("base", 200)
    metrics.answered(None, 400)
    metrics.drawn("base", 4, 3.0, 0.2)
    metrics.drawn("base", 1, 700.0, 0.0)
    found = samples(metrics.lines())
    assert found["accel_hidiff_requests_total", (("model", "base"), ("status", "200"))] == 2
    assert found["accel_hidiff_requests_total", (("model", ""), ("status", "400"))] == 1
    assert found["accel_hidiff_images_total", (("model", "base"),)] == 5
    bucket = "accel_hidiff_request_seconds_bucket"
    assert found[bucket, (("le", "2.5"), ("model", "base"))] == 0
    assert found[bucket, (("le", "5.0"), ("model", "base"))] == 1
    assert found[bucket, (("le", "600.0"), ("model", "base"))] == 1
    assert found[bucket, (("le", "+Inf"), ("model", "base"))] == 2
    assert found["accel_hidiff_request_seconds_sum", (("model", "base"),)] == 703
    assert found["accel_hidiff_queue_seconds_count", (("model", "base"),)] == 2


def test_labels_are_escaped() -> None:
    text = 'a "b"\\\nc'
    found = samples([*gauge("ready", "Meaning.", [({"model": text}, 0.5)]), *counter("n_total", "Meaning.", [({}, 3)])])
    assert found["accel_hidiff_ready", (("model", text),)] == 0.5
    assert found["accel_hidiff_n_total", ()] == 3
