"""The input that a compiled step made for the next one: taken up where nothing happened in between, never elsewhere."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from accel_hidiff.cfgpp.next_input import DoubledSample, NextInput, SteppedSample, plain, ready_input

TIMESTEPS = torch.arange(5).flip(0)
SCALED = torch.full((2, 4, 2, 3), 7.0)


@pytest.fixture
def sample() -> Tensor:
    return SteppedSample.of(torch.randn(1, 4, 2, 3), NextInput(SCALED, TIMESTEPS, 3))


def test_doubling_leads_to_it_at_the_very_next_timestep(sample: Tensor) -> None:
    doubled = torch.cat([sample] * 2)
    assert ready_input(doubled, TIMESTEPS[3], TIMESTEPS) is SCALED
    assert torch.equal(doubled, torch.cat([plain(sample)] * 2)), "and is still the sample twice, not scaled"


@pytest.mark.parametrize("timestep", [TIMESTEPS[2], TIMESTEPS[3].clone(), 1])
def test_another_timestep_does_not(sample: Tensor, timestep: object) -> None:
    assert ready_input(torch.cat([sample] * 2), timestep, TIMESTEPS) is None


def test_another_schedule_does_not(sample: Tensor) -> None:
    later = TIMESTEPS.clone()
    assert ready_input(torch.cat([sample] * 2), later[3], later) is None


@pytest.mark.parametrize(
    "between",
    [
        lambda x: torch.cat([x * 1.0] * 2),
        lambda x: torch.cat([x.mul_(2)] * 2),
        lambda x: (x.mul_(2), torch.cat([x] * 2))[1],
        lambda x: torch.cat([x] * 2).mul_(2),
        lambda x: torch.cat([x] * 2)[:],
        lambda x: torch.cat([x, plain(x)]),
        lambda x: torch.cat([x, x], dim=1),
        lambda x: torch.cat([x] * 3),
        lambda x: torch.stack([x, x]),
        lambda x: x,
    ],
)
def test_anything_else_does_not(sample: Tensor, between: Callable[[Tensor], Tensor]) -> None:
    assert ready_input(between(sample), TIMESTEPS[3], TIMESTEPS) is None


def test_a_change_of_the_doubled_batch_in_place_counts(sample: Tensor) -> None:
    doubled = torch.cat([sample] * 2)
    doubled.add_(1)
    assert type(doubled) is DoubledSample and ready_input(doubled, TIMESTEPS[3], TIMESTEPS) is None


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x + 1,
        lambda x: x.to(torch.float16),
        lambda x: x.cpu(),
        lambda x: x[0],
        copy.copy,
        copy.deepcopy,
        lambda x: pickle.loads(pickle.dumps(x)),
        lambda x: torch.cat([x] * 2) + 1,
        lambda x: torch.cat([x] * 2).chunk(2)[0],
    ],
)
def test_everything_made_of_it_is_a_plain_tensor(sample: Tensor, use: Callable[[Tensor], Tensor]) -> None:
    assert type(use(sample)) is Tensor


def test_it_reads_as_a_plain_tensor(sample: Tensor) -> None:
    assert isinstance(sample, Tensor) and sample.shape == (1, 4, 2, 3) and repr(sample) == repr(plain(sample))
    assert sample.dtype == torch.float32 and plain(sample).data_ptr() == sample.data_ptr()


def test_in_inference_mode_where_changes_leave_no_trace_it_is_plain() -> None:
    with torch.inference_mode():
        assert type(SteppedSample.of(torch.ones(1, 4, 2, 3), NextInput(SCALED, TIMESTEPS, 3))) is Tensor
