"""Workers of benchmarks, and what a record tells of its command."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from benchmarks import harness as h

ECHO = "tests.benchmarks.echo"


def test_the_last_object_that_a_worker_prints_is_its_answer() -> None:
    assert h.worker(ECHO, {"prints": ['{"a": 1}', '{"a": 2}', "[3]", "done."]}) == {"a": 2}
    assert h.worker(ECHO, {"prints": ['{"a": 1}'], "fails": 0, "sleeps": 0.1}, limit_s=60.0) == {"a": 1}


def test_a_worker_without_an_answer_leaves_its_last_words() -> None:
    with pytest.raises(h.WorkerFailed, match=r"^tests\.benchmarks\.echo: its process ended with 1: out of luck$"):
        h.worker(ECHO, {"prints": ["so far"], "fails": "first line\nout of luck"})
    with pytest.raises(h.WorkerFailed, match="ended with 0: it said nothing"):
        h.worker(ECHO, {"prints": []})


def test_a_late_worker_ends_with_what_it_started_and_tells_how_far_it_was(tmp_path: Path) -> None:
    config: dict[str, Any] = {"prints": ['{"done": 1}'], "sleeps": 60, "child": str(tmp_path / "child")}
    with pytest.raises(subprocess.TimeoutExpired) as late:
        h.worker(ECHO, config, limit_s=3.0)
    assert h.last_answer(late.value.output) == {"done": 1}
    with pytest.raises(psutil.NoSuchProcess):
        psutil.Process(int((tmp_path / "child").read_text())).wait(10)
        psutil.Process(int((tmp_path / "child").read_text()))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--set", "cpu", "--out", "/a/b/c.json"], "--set cpu --out c.json"),
        (["--cache=/a/b", "--tiny"], "--cache=DIR --tiny"),
        (["--python", "hidiffusion=/a/b/python", "--jobs", "2"], "--python hidiffusion=PYTHON --jobs 2"),
        (["--python=hidiffusion=/a/b/python"], "--python=hidiffusion=PYTHON"),
        (["--size", "128x128", "--plot", "/x/y.png"], "--size 128x128 --plot y.png"),
        (["/a/before", "--repeats", "1"], "DIR --repeats 1"),
    ],
)
def test_a_record_names_no_place_on_the_machine(monkeypatch: pytest.MonkeyPatch, words: list[str], told: str) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", *words])
    assert h.command_line().endswith(f" {told}") and "/" not in h.command_line().split(" ", 2)[2]


class TestStepCall:
    """Steps are timed inside of one request; what a request does once has a figure of its own."""

    def test_all_turns_are_of_one_request(self, entered: Any) -> None:
        handle, call = entered
        looks = handle.looks
        h.interleave({"step": call}, repeats=3)
        assert handle.looks == looks + 1 and call.patch.unet.calls == 5  # two to warm up

    def test_alone_each_call_is_a_request(self, entered: Any) -> None:
        handle, call = entered
        looks = handle.looks
        call(), call()
        assert handle.looks == looks + 2

    def test_the_entrance_is_timed_alone(self, entered: Any) -> None:
        handle, call = entered
        timing = h.entrance(handle, 4)
        assert handle.looks == 5 and call.patch.unet.calls == 0 and len(timing.fields("entrance")) > 0


@pytest.fixture
def entered() -> Any:
    """A handle and a step that count: requests that looked at their models, and calls of the UNet."""

    class Counted:
        looks = calls = 0
        request_number = 0

        @contextmanager
        def phase(self, step: int, num_steps: int) -> Iterator[None]:
            self.request_number += 1
            yield

        def __call__(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor]:
            handle._enter()
            self.calls += 1
            return (torch.zeros(1),)

        @property
        def unet(self) -> Any:
            return self

        @property
        def patch(self) -> Any:
            return self

    class Handle(Counted):
        seen = 0

        def _enter(self) -> None:
            if self.seen != self.request_number:
                self.seen = self.request_number
                self.looks += 1

    handle = Handle()
    inputs = h.UNetInputs(torch.zeros(1), torch.zeros(()), torch.zeros(1), {})
    return handle, h.StepCall(handle, inputs, 0, 1)
