"""The clock reads the step off the pipeline's timesteps, and says so when it cannot."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accel_hidiff.clock import PipelineClock
from accel_hidiff.errors import NoPhase


class Scheduler:
    def __init__(self, timesteps: Any, **facts: Any) -> None:
        self.timesteps = timesteps
        vars(self).update(facts)


class Pipe:
    def __init__(self, timesteps: Any, *, facts: dict[str, Any] | None = None, **attributes: Any) -> None:
        self.scheduler = Scheduler(timesteps, **(facts or {}))
        vars(self).update(attributes)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.data())
def test_views_are_found_exactly_even_where_timesteps_repeat(values: list[int], data: Any) -> None:
    """Image-to-image runs the last `running` of the timesteps; second-order schedulers repeat them."""
    timesteps = torch.tensor(values)
    running = data.draw(st.integers(1, len(values)))
    first = len(values) - running
    facts = {"begin_index": first} if data.draw(st.booleans()) else {"begin_index": None}
    pipe = Pipe(timesteps, facts=facts, num_timesteps=running)
    clock = PipelineClock(pipe)
    clock.begin(None)
    found = [tuple(clock.position(t)) for t in timesteps[first:]]
    assert found == [(step, running) for step in range(running)]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 60), st.data())
def test_a_request_that_ends_early_counts_the_steps_that_run(count: int, data: Any) -> None:
    timesteps = torch.arange(count, 0, -1).float()
    running = data.draw(st.integers(1, count))
    facts = {"begin_index": 0} if data.draw(st.booleans()) else {}
    pipe = Pipe(timesteps, facts=facts, num_timesteps=running, denoising_end=0.5)
    clock = PipelineClock(pipe)
    clock.begin(None)
    assert [tuple(clock.position(t)) for t in timesteps[:running]] == [(step, running) for step in range(running)]


def test_a_strided_timestep_tensor_is_counted_in_its_own_elements() -> None:
    timesteps = torch.tensor([9, 0, 9, 0, 9, 0])[::2]
    pipe = Pipe(timesteps)
    clock = PipelineClock(pipe)
    assert [clock.position(t).step for t in timesteps] == [0, 1, 2]


@pytest.mark.parametrize(
    "convert", [lambda t: t.clone(), lambda t: t.double(), float, int, lambda t: t.clone().expand(2), lambda t: t[None]]
)
def test_copies_are_found_by_value(convert: Any) -> None:
    timesteps = torch.tensor([801.0, 601.0, 401.0, 201.0])
    pipe = Pipe(timesteps)
    clock = PipelineClock(pipe)
    assert [tuple(clock.position(convert(t))) for t in timesteps] == [(0, 4), (1, 4), (2, 4), (3, 4)]


def test_a_repeated_value_is_resolved_by_the_schedulers_own_index() -> None:
    timesteps = torch.tensor([9, 5, 5, 1])
    pipe = Pipe(timesteps)
    clock = PipelineClock(pipe)
    for index, value in enumerate([9, 5, 5, 1]):
        pipe.scheduler.step_index = index
        assert clock.position(value).step == index


def test_steps_may_be_asked_for_in_any_order_and_of_a_new_scheduler() -> None:
    pipe = Pipe(torch.arange(5))
    clock = PipelineClock(pipe)
    positions = [clock.position(pipe.scheduler.timesteps[index]).step for index in (0, 3, 4, 4, 1)]
    assert positions == [0, 3, 4, 4, 1]
    pipe.scheduler = Scheduler(torch.arange(100, 92, -1))
    assert [tuple(clock.position(t)) for t in pipe.scheduler.timesteps[:2]] == [(0, 8), (1, 8)]


def test_somebody_elses_request_starts_at_its_first_call() -> None:
    """An image-to-image pipeline on the same components enters a new schedule in its middle; a loop, at its start."""
    pipe = Pipe(torch.arange(10), num_timesteps=4)
    clock = PipelineClock(pipe)
    clock.begin(3)
    assert tuple(clock.position(pipe.scheduler.timesteps[0])) == (0, 4)
    pipe.scheduler.timesteps = torch.arange(20)
    assert [tuple(clock.position(t)) for t in pipe.scheduler.timesteps[12:]] == [(step, 8) for step in range(8)]
    assert clock.seed is None
    assert [tuple(clock.position(t)) for t in pipe.scheduler.timesteps] == [(step, 20) for step in range(20)]


def test_every_request_has_another_number() -> None:
    pipe = Pipe(torch.arange(10), num_timesteps=4)
    clock = PipelineClock(pipe)
    numbers = [clock.request_number]
    clock.begin(None)
    numbers.append(clock.request_number)
    clock.position(pipe.scheduler.timesteps[0])
    assert clock.request_number == numbers[-1]
    pipe.scheduler.timesteps = torch.arange(20)
    clock.position(pipe.scheduler.timesteps[0])
    numbers.append(clock.request_number)
    assert len(set(numbers)) == 3


def test_an_abandoned_request_does_not_move_the_next_one() -> None:
    """The first request starts at index 6 and stops after two calls; the second starts at index 2."""
    pipe = Pipe(torch.arange(10), num_timesteps=4)
    clock = PipelineClock(pipe)
    clock.begin(None)
    assert [tuple(clock.position(pipe.scheduler.timesteps[index])) for index in (6, 7)] == [(0, 4), (1, 4)]
    pipe.scheduler.timesteps, pipe.num_timesteps = torch.arange(10), 8
    clock.begin(None)
    found = [tuple(clock.position(t)) for t in pipe.scheduler.timesteps[2:]]
    assert found == [(step, 8) for step in range(8)]


def test_a_request_of_another_thread_has_no_influence() -> None:
    """A thread that never began a request counts by the schedule alone."""
    pipe = Pipe(torch.arange(10), num_timesteps=5)
    clock = PipelineClock(pipe)
    clock.begin(None)
    assert tuple(clock.position(pipe.scheduler.timesteps[2])) == (0, 5)
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(tuple(clock.position(pipe.scheduler.timesteps[6]))))
    thread.start()
    thread.join(timeout=60)
    assert found == [(0, 4)], "its own first call, and what is left of the schedule from there"


def test_a_foreign_timestep_is_refused() -> None:
    pipe = Pipe(torch.tensor([9, 5, 1]))
    with pytest.raises(NoPhase, match=r"timestep 7,.* none of its pipeline's 3 timesteps.*patch\.phase"):
        PipelineClock(pipe).position(torch.tensor(7))


@pytest.mark.parametrize("timesteps", [None, torch.tensor([]), [3, 2, 1], torch.tensor(3)])
def test_a_scheduler_without_timesteps_is_refused(timesteps: Any) -> None:
    pipe = Pipe(timesteps)
    with pytest.raises(NoPhase, match="before its pipeline's scheduler has timesteps"):
        PipelineClock(pipe).position(torch.tensor(3))


def test_the_clock_does_not_keep_its_pipeline_alive() -> None:
    pipe = Pipe(torch.arange(3))
    clock = PipelineClock(pipe)
    del pipe
    gc.collect()
    with pytest.raises(NoPhase):
        clock.position(torch.tensor(0))


@pytest.mark.parametrize("last_request", [3, 5])
def test_a_loop_written_by_hand_is_not_measured_by_the_last_request(last_request: int) -> None:
    """`scheduler.set_timesteps(8)` and a loop over `scheduler.timesteps`, after a pipe() call with fewer steps."""
    timesteps = torch.arange(8)
    pipe = Pipe(timesteps, facts={"begin_index": None}, num_timesteps=last_request)
    clock = PipelineClock(pipe)
    assert [tuple(clock.position(t)) for t in timesteps] == [(step, 8) for step in range(8)]
