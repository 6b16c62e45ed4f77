"""A service with a short queue and little time, and what its clients are told."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.serving.client import GENERATIONS, RunningService, asked, error_of, events, until, write_deploy_file

TIMEOUT = 3.0
LONG = {"steps": 1000, "n": 4}  # far more than the time that there is


@pytest.fixture(scope="module")
def tight(model_folder: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    limits = {"max_steps": 1000, "queue": 2, "timeout": TIMEOUT, "max_body": 300, "any_size": True}
    limits["max_pixels"] = 128 * 256
    models = {"tiny": {"model": str(model_folder), "sizes": ["128x128"], "on_miss": "error", "shapes": "symbolic"}}
    folder = tmp_path_factory.mktemp("tight")
    with RunningService(write_deploy_file(folder, cache_dir, models, limits)) as running:
        running.wait_ready()
        yield running
        assert running.stop() == 0
        assert "Traceback" not in running.log


def test_a_full_queue_is_429_and_says_when_to_try_again(tight: RunningService) -> None:
    with ThreadPoolExecutor(8) as threads:
        first = threads.submit(tight.draw, **LONG)
        until(lambda: tight.metric("running") == 1)
        waiting = [threads.submit(tight.draw) for _ in range(2)]
        until(lambda: tight.metric("queue_depth") == 2)
        start = time.monotonic()
        answer = tight.draw()
        assert time.monotonic() - start < 1
        assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
        error = error_of(answer)
        assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
        assert "expected fewer than 2 waiting requests" in error["message"]
        assert tight.draw(stream=True).status_code == 429
        assert first.result().status_code == 504
        # Which of the two came first is open: both were sent at once.
        assert {one.result().status_code for one in waiting} <= {504, 200}
    assert tight.draw().status_code == 200
    assert tight.metric("requests_total", status="429") >= 2


def test_what_takes_too_long_is_504_and_the_next_is_right(tight: RunningService) -> None:
    right = tight.draw().json()["data"]
    start = time.monotonic()
    answer = tight.draw(**LONG)
    assert answer.status_code == 504 and TIMEOUT <= time.monotonic() - start < TIMEOUT + 1.5
    assert error_of(answer)["code"] == "timeout" and "within 3 s" in error_of(answer)["message"]
    start = time.monotonic()
    assert tight.draw().json()["data"] == right
    assert time.monotonic() - start < TIMEOUT


def test_the_time_in_the_queue_counts(tight: RunningService) -> None:
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(tight.draw(**LONG))) for _ in range(2)]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [504, 504]
    assert time.monotonic() - start < TIMEOUT + 2


def test_a_stream_that_takes_too_long_ends_with_an_error(tight: RunningService) -> None:
    with tight.client.stream("POST", GENERATIONS, json=asked(stream=True, **LONG)) as response:
        name, data = list(events(response))[-1]
    assert name == "error" and data["error"]["code"] == "timeout"


def test_the_body_limit(tight: RunningService) -> None:
    assert tight.draw(user="x" * 200).status_code == 200
    answer = tight.draw(user="x" * 250, prompt="x" * 200)
    assert answer.status_code == 413 and "at most 300 bytes" in error_of(answer)["message"]


def test_a_body_that_does_not_come(tight: RunningService) -> None:
    url = httpx.URL(tight.url)
    with socket.create_connection((url.host, url.port), timeout=30) as raw:
        head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
        raw.sendall(head.encode() + b'{"prompt":')
        start = time.monotonic()
        assert b" 408 " in raw.recv(1000).splitlines()[0]
        assert TIMEOUT - 0.1 < time.monotonic() - start < TIMEOUT + 2


@pytest.mark.parametrize(
    ("size", "status", "message"),
    [
        ("128x128", 200, ""),
        ("192x128", 200, ""),  # not listed, and the symbolic graphs serve it
        ("136x136", 503, "no compiled graph serves this call"),  # odd windows: exact graphs, which nobody compiled
        ("100x100", 400, "expected a multiple of 8 pixels, got 100; the nearest is 96"),
        ("512x512", 400, "at most 32768 pixels"),
    ],
)
def test_sizes_that_are_not_listed(tight: RunningService, size: str, status: int, message: str) -> None:
    answer = tight.draw(size=size)
    assert answer.status_code == status, answer.text
    if status == 200:
        assert answer.json()["served"] == {"compiled": 4, "eager": 0}
    else:
        error = error_of(answer)
        assert message in error["message"]
        assert "/" not in error["message"].replace("CFG++", "")  # no paths of the machine
        assert status != 503 or error["code"] == "graph_missing"


def test_eight_clients_at_once_get_answers(tight: RunningService) -> None:
    with ThreadPoolExecutor(8) as threads:
        codes = [answer.status_code for answer in threads.map(lambda _: tight.draw(steps=1), range(24))]
    assert set(codes) <= {200, 429} and codes.count(200) >= 3
    assert httpx.get(tight.url + "/livez").status_code == 200
