"""The service over a real socket: images, events, refusals, limits, clients that go."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import jsonschema
import numpy as np
import pytest
import torch

import accel_hidiff as ah
from accel_hidiff.serving.schema import ERROR, IMAGES
from tests.conftest import ARTIFACTS, STEPS
from tests.serving.client import GENERATIONS, SIZES, RunningService, asked, error_of, events, pixels, until
from tests.serving.conftest import MAX_STEPS

LONG = MAX_STEPS  # steps of a request that takes a few seconds


@pytest.fixture(scope="module")
def eager(make_pipe: Any) -> Any:
    """Draws with a pipeline that is patched and not compiled: (height, width, 3) of 0..255."""
    pipes: dict[int, Any] = {}

    def draw(width: int, height: int, seed: int, weights: int = 0, **options: Any) -> Any:
        if weights not in pipes:
            pipes[weights] = make_pipe(weights)
            ah.apply_hidiffusion(pipes[weights])
        generator = torch.Generator().manual_seed(seed)
        options = {"num_inference_steps": STEPS, **options}
        out = pipes[weights]("a red circle", height=height, width=width, generator=generator, **options)
        return np.asarray(out.images[0]).astype(int)

    return draw


def same(got: Any, want: Any) -> bool:
    """Equal but for the rounding of a pixel."""
    return got.shape == want.shape and int(np.abs(got - want).max()) <= 1


def first(response: httpx.Response) -> Any:
    assert response.status_code == 200, response.text
    return pixels(response.json()["data"][0]["b64_json"])


class TestImages:
    @pytest.mark.parametrize("size", SIZES)
    def test_they_are_those_of_the_eager_pipeline(self, service: RunningService, eager: Any, size: str) -> None:
        answer = service.draw(size=size, seed=11, steps=STEPS)
        width, height = map(int, size.split("x"))
        assert same(first(answer), eager(width, height, 11))
        body = answer.json()
        jsonschema.validate(body, IMAGES)
        assert body["served"] == {"compiled": STEPS + 1, "eager": 0}
        assert (body["model"], body["size"], body["data"][0]["seed"]) == ("tiny", size, 11)
        assert answer.headers["x-request-id"].startswith("req-")

    def test_other_arguments_reach_the_pipeline(self, service: RunningService, eager: Any) -> None:
        options = {"guidance_scale": 2.5, "negative_prompt": "blue"}
        got = first(service.draw(steps=STEPS, **options))
        assert same(got, eager(128, 128, 3, **options)) and not same(got, eager(128, 128, 3))
        assert same(first(service.draw(steps=STEPS, guidance=1)), eager(128, 128, 3, guidance_scale=1.0))

    def test_image_i_of_n_is_that_of_seed_plus_i(self, service: RunningService, eager: Any) -> None:
        data = service.draw(seed=20, n=3, steps=STEPS).json()["data"]
        assert [image["seed"] for image in data] == [20, 21, 22]
        assert data[2]["b64_json"] == service.draw(seed=22, steps=STEPS).json()["data"][0]["b64_json"]
        assert same(pixels(data[1]["b64_json"]), eager(128, 128, 21))

    def test_a_seed_that_was_drawn_is_told_and_gives_the_image_again(self, service: RunningService) -> None:
        one, other = (service.draw(seed=None).json()["data"][0] for _ in range(2))
        assert one["seed"] != other["seed"] and one["b64_json"] != other["b64_json"]
        assert service.draw(seed=one["seed"]).json()["data"][0]["b64_json"] == one["b64_json"]

    def test_the_same_image_whatever_else_runs(self, service: RunningService) -> None:
        alone = {seed: service.draw(seed=seed).json()["data"] for seed in range(4)}
        mixed = [{"seed": n % 4, "model": name} for n in range(8) for name in ("tiny", "other")]
        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(lambda fields: service.draw(**fields).json(), mixed))
        for fields, answer in zip(mixed, answers, strict=True):
            assert (answer["data"] == alone[fields["seed"]]) == (fields["model"] == "tiny")

    def test_a_model_by_its_name(self, service: RunningService, eager: Any) -> None:
        got = first(service.draw(model="other", steps=STEPS))
        assert same(got, eager(128, 128, 3, weights=1)) and not same(got, eager(128, 128, 3))

    def test_the_models_are_listed(self, service: RunningService) -> None:
        listed = service.client.get("/v1/models").json()
        assert [model["id"] for model in listed["data"]] == ["tiny", "other", "lcm"]
        assert listed["data"][0]["sizes"] == SIZES and listed["data"][0]["ready"] is True


class TestEvents:
    def test_steps_and_then_the_images(self, service: RunningService) -> None:
        with service.client.stream("POST", GENERATIONS, json=asked(n=2, stream=True)) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            told = list(events(response))
        names = [name.removeprefix("image_generation.") for name, _ in told]
        assert names == ["queued", *["step"] * 6, "completed"]
        steps = [(data["image"], data["step"], data["total"]) for _, data in told[1:-1]]
        assert steps == [(image, step, 3) for image in (0, 1) for step in (1, 2, 3)]
        final = told[-1][1]
        jsonschema.validate(final, IMAGES)
        assert final["data"] == service.draw(n=2).json()["data"]

    def test_they_come_while_the_image_is_drawn(self, service: RunningService) -> None:
        times = []
        with service.client.stream("POST", GENERATIONS, json=asked(steps=60, stream=True)) as response:
            for name, _ in events(response):
                times.append((name, time.monotonic()))
        first_step = next(when for name, when in times if name.endswith("step"))
        assert times[-1][1] - first_step > 0.3 * (times[-1][1] - times[0][1])

    def test_a_fault_is_an_event(self, service: RunningService) -> None:
        body = asked(model="lcm", steps=60, stream=True)
        with service.client.stream("POST", GENERATIONS, json=body) as response:
            assert response.status_code == 200
            name, data = list(events(response))[-1]
        assert name == "error" and data["error"]["code"] == "pipeline_failed"

    def test_what_is_refused_before_it_begins_has_its_status(self, service: RunningService) -> None:
        assert service.draw(stream=True, steps=0).status_code == 400


class TestRefusals:
    @pytest.mark.parametrize(
        ("fields", "status", "message"),
        [
            ({"prompt": ""}, 400, "prompt: expected 1 to 2000 characters, got 0"),
            ({"prompt": "x" * 2001}, 400, "got 2001"),
            ({"size": "200x128"}, 400, "size: expected one that tiny lists, got 200x128; the nearest is 192x128"),
            ({"size": "big"}, 400, "size: expected WIDTHxHEIGHT"),
            ({"n": 5}, 400, "n: expected an integer in 1..4, got 5"),
            ({"steps": MAX_STEPS + 1}, 400, f"steps: expected an integer in 1..{MAX_STEPS}"),
            ({"seed": -1}, 400, "seed: expected"),
            ({"guidance": 99}, 400, "guidance: expected"),
            ({"quality": "hd"}, 400, "quality: expected no such field"),
            ({"response_format": "url"}, 400, "no URLs"),
            ({"model": "dall-e-3"}, 404, "model: expected one of tiny, other, lcm, got 'dall-e-3'"),
            ({"user": "x" * 70_000}, 413, "body: expected at most 65536 bytes"),
        ],
    )
    def test_what_cannot_be(self, service: RunningService, fields: dict[str, Any], status: int, message: str) -> None:
        answer = service.draw(**fields)
        assert answer.status_code == status
        error = error_of(answer)
        assert message in error["message"] and error["type"] == "invalid_request_error"

    @pytest.mark.parametrize(
        ("body", "kind", "status"),
        [
            (b"{", "application/json", 400),
            (b"", "application/json", 400),
            (b'{"prompt": "x"}', "text/plain", 415),
            (b"x" * 3_000_000, "application/json", 413),
            (b"\x00" * 70_000, "application/octet-stream", 413),
        ],
    )
    def test_bodies_that_are_none(self, service: RunningService, body: bytes, kind: str, status: int) -> None:
        answer = service.client.post(GENERATIONS, content=body, headers={"Content-Type": kind})
        assert answer.status_code == status
        jsonschema.validate(answer.json(), ERROR)
        error_of(answer)

    def test_a_body_without_a_length_that_never_ends(self, service: RunningService) -> None:
        def forever() -> Any:
            for _ in range(100):
                yield b"x" * 65536

        answer = service.client.post(GENERATIONS, content=forever(), headers={"Content-Type": "application/json"})
        assert answer.status_code == 413

    @pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nothing", 404), ("GET", GENERATIONS, 405)])
    def test_paths_and_methods(self, service: RunningService, method: str, path: str, status: int) -> None:
        answer = service.client.request(method, path)
        assert answer.status_code == status
        error_of(answer)
        assert status != 405 or answer.headers["allow"] == "POST"

    def test_bytes_that_are_no_http(self, service: RunningService) -> None:
        url = httpx.URL(service.url)
        with socket.create_connection((url.host, url.port)) as raw:
            raw.sendall(b"\x16\x03\x01 what is this\r\n\r\n")
            assert b" 400 " in raw.recv(1000).splitlines()[0]
        assert service.client.get("/livez").json() == {"status": "alive"}


class TestFaults:
    def test_a_pipeline_that_fails_is_one_line_and_the_next_request_is_right(self, service: RunningService) -> None:
        right = service.draw(model="lcm", steps=4).json()["data"]
        answer = service.draw(model="lcm", steps=60)  # more than LCM's scheduler takes: it raises
        assert answer.status_code == 500
        error = error_of(answer)
        assert error["type"] == "server_error" and "the pipeline failed with ValueError" in error["message"]
        number = answer.headers["x-request-id"]
        assert error["message"].endswith(f"under request {number}")
        until(lambda: "original_steps" in service.log or "original_inference_steps" in service.log)
        assert f"{number}: the pipeline failed" in service.log
        assert service.draw(model="lcm", steps=4).json()["data"] == right


class TestClientsThatGo:
    @pytest.mark.parametrize("stream", [False, True])
    def test_it_is_left_between_two_steps_and_the_next_is_right(self, service: RunningService, stream: bool) -> None:
        right = service.draw().json()["data"]
        before = service.metric("requests_total", model="tiny", status="499")
        with pytest.raises(httpx.ReadTimeout):
            body = asked(steps=LONG, n=4, stream=stream)
            with httpx.stream("POST", service.url + GENERATIONS, json=body, timeout=0.5) as response:
                response.read() if not stream else time.sleep(0.5)
                raise httpx.ReadTimeout("the client has waited enough")
        start = time.monotonic()
        assert service.draw().json()["data"] == right
        assert time.monotonic() - start < 5  # and not the dozens of seconds of 1,600 steps
        assert service.metric("requests_total", model="tiny", status="499") == before + 1
        assert service.metric("running", model="tiny") == 0

    def test_one_that_waits_leaves_its_place(self, service: RunningService) -> None:
        def leave(steps: int, seconds: float) -> None:
            with pytest.raises(httpx.TimeoutException):
                httpx.post(service.url + GENERATIONS, json=asked(steps=steps, n=4), timeout=seconds)

        threads = [threading.Thread(target=leave, args=(LONG, wait)) for wait in (2.0, 0.7, 0.7)]
        for thread in threads:
            thread.start()
            time.sleep(0.05)
        until(lambda: service.metric("queue_depth", model="tiny") == 2, 5)
        until(lambda: service.metric("queue_depth", model="tiny") == 0, 5)
        assert service.metric("running", model="tiny") == 1
        for thread in threads:
            thread.join()
        until(lambda: service.metric("running", model="tiny") == 0, 5)

    def test_one_that_goes_before_it_has_asked(self, service: RunningService) -> None:
        before = service.metric("requests_total", status="499", model="")
        url = httpx.URL(service.url)
        with socket.create_connection((url.host, url.port)) as raw:
            head = (
                f"POST {GENERATIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n"
            )
            raw.sendall(head.encode() + b"{")
        until(lambda: service.metric("requests_total", status="499", model="") == before + 1, 5)


class TestMetrics:
    def test_they_count_what_happened(self, service: RunningService) -> None:
        names = ["requests_total", "images_total", "hits_total", "request_seconds_count", "eager_calls_total"]
        before = [service.metric(name, model="tiny") for name in names]
        service.draw(n=2)
        bad = service.metric("requests_total", status="400")
        service.draw(n=0)
        after = [service.metric(name, model="tiny") for name in names]
        assert [new - old for new, old in zip(after, before, strict=True)] == [1, 2, 8, 1, 0]
        assert service.metric("requests_total", status="400") == bad + 1

    def test_the_graphs_and_the_cache(self, service: RunningService) -> None:
        assert service.metric("ready", model="tiny") == 1
        assert service.metric("graphs", model="tiny") == service.metric("loads_total", model="tiny") == ARTIFACTS
        assert service.metric("graphs_missing", model="tiny") == service.metric("compiles_total", model="tiny") == 0
        text = service.client.get("/metrics").text
        assert "compile_cache_hits_total{" in text

    def test_health_tells_where_the_time_went(self, service: RunningService) -> None:
        told = service.client.get("/healthz").json()
        assert told["status"] == "ready" and told["models"]["tiny"]["missing"] == 0
        seconds = told["models"]["tiny"]["seconds"]
        assert set(seconds) == {"imports", "model", "graphs"} and 0 < sum(seconds.values()) <= told["seconds"]
        assert f"ready after {told['seconds']:.2f} s" in service.log


def test_the_description_is_one_of_openapi(service: RunningService) -> None:
    from openapi_spec_validator import validate

    told = service.client.get("/openapi.json").json()
    validate(told)
    assert set(told["paths"]) == {"/livez", "/healthz", "/metrics", "/v1/models", GENERATIONS}
    operation = told["paths"][GENERATIONS]["post"]
    assert (
        operation["requestBody"]["content"]["application/json"]["schema"]["properties"]["steps"]["maximum"] == MAX_STEPS
    )
    assert {"200", "400", "404", "408", "413", "415", "429", "500", "503", "504"} == set(operation["responses"])
