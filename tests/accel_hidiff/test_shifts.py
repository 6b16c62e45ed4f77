"""Window shifts come from a seed and a step alone, uniform over 0..3."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accel_hidiff import HiDiffusionConfig, apply_hidiffusion
from accel_hidiff.errors import BadInput
from accel_hidiff.shifts import ShiftLayout, check_shifts, window_shifts
from tests import models

seeds = st.integers(0, 2**64 - 1)


@given(seeds, st.integers(0, 1000), st.integers(0, 64))
def test_one_shift_in_0_to_3_for_each_block(seed: int, step: int, blocks: int) -> None:
    shifts = window_shifts(seed, step, blocks)
    assert len(shifts) == blocks and set(shifts) <= {0, 1, 2, 3}


@given(seeds, st.integers(0, 1000), st.integers(0, 64), st.integers(0, 64))
def test_a_block_has_the_same_shift_whatever_the_number_of_blocks(seed: int, step: int, few: int, more: int) -> None:
    assert window_shifts(seed, step, few + more)[:few] == window_shifts(seed, step, few)


def test_the_numbers_are_pinned() -> None:
    """A retry, another process and a later version must draw the same windows for the same seed."""
    assert window_shifts(0, 0, 10) == (0, 2, 1, 1, 0, 0, 2, 1, 3, 1)
    assert window_shifts(123456789, 7, 10) == (2, 2, 0, 0, 0, 3, 3, 3, 3, 3)


def test_python_and_call_order_have_no_influence() -> None:
    window_shifts.cache_clear()
    random.seed(1)
    forwards = [window_shifts(3, step, 5) for step in range(50)]
    window_shifts.cache_clear()
    random.seed(2)
    backwards = [window_shifts(3, step, 5) for step in reversed(range(50))]
    assert forwards == backwards[::-1]


def chi_square(values: list[Any], cells: int) -> float:
    """Below its 1e-4 quantile it is no sign of a preference: 21.1 (4 cells), 44.3 (16 cells)."""
    expected = len(values) / cells
    counts = Counter(values)
    assert len(counts) == cells
    return sum((count - expected) ** 2 / expected for count in counts.values())


def test_shifts_are_uniform_and_independent_between_blocks_steps_and_seeds() -> None:
    table = [[window_shifts(seed, step, 10) for step in range(50)] for seed in range(10)]
    flat = [shift for steps in table for row in steps for shift in row]
    assert chi_square(flat, 4) < 21.1
    blocks = [pair for steps in table for row in steps for pair in itertools.pairwise(row)]
    steps = [pair for rows in table for a, b in itertools.pairwise(rows) for pair in zip(a, b, strict=True)]
    between = [
        pair for x, y in itertools.pairwise(table) for a, b in zip(x, y, strict=True) for pair in zip(a, b, strict=True)
    ]
    for pairs in (blocks, steps, between):
        assert chi_square(pairs, 16) < 44.3


@given(seeds, st.integers(0, 1000), st.integers(1, 64))
def test_per_step_all_blocks_share_the_first_ones_shift(seed: int, step: int, blocks: int) -> None:
    shifts = window_shifts(seed, step, blocks, "per_step")
    assert shifts == (window_shifts(seed, step, blocks)[0],) * blocks
    assert window_shifts(seed, step, blocks, mode="per_block") == window_shifts(seed, step, blocks)


def test_per_step_the_shifts_are_uniform_and_independent_between_steps() -> None:
    shared = [window_shifts(seed, step, 5, "per_step") for seed in range(10) for step in range(50)]
    assert all(len(row) == 5 and len(set(row)) == 1 for row in shared)
    shifts = [row[0] for row in shared]
    assert chi_square(shifts, 4) < 21.1
    assert chi_square(list(itertools.pairwise(shifts)), 16) < 44.3


@pytest.mark.parametrize("mode", ["per_block", "per_step"])
def test_a_patched_unet_draws_as_its_config_says(unet: Any, inputs: Any, mode: str) -> None:
    patch = apply_hidiffusion(unet, config=HiDiffusionConfig(window_shifts=mode, shift_seed=4))
    args, kwargs = inputs(height=32, width=48)  # pooled windows of 4x6: any smaller ones never roll

    def run(step: int, shifts: Any = None) -> torch.Tensor:
        with torch.no_grad(), patch.phase(step=step, num_steps=7, window_shifts=shifts):
            return unet(*args, **kwargs).sample

    other = "per_step" if mode == "per_block" else "per_block"
    blocks = len(patch.windowed_blocks)
    for step in (0, 1, 6):
        assert torch.equal(run(step), run(step, window_shifts(4, step, blocks, mode)))
        assert not torch.equal(run(step), run(step, window_shifts(4, step, blocks, other)))


@pytest.mark.parametrize("given_by_hand", [[0, 1, 2, 3, 0], (0, 1, 2, 3, 0), torch.tensor([0, 1, 2, 3, 0])])
def test_shifts_by_hand_are_taken_as_they_are(given_by_hand: Any) -> None:
    assert check_shifts(given_by_hand, 5) == (0, 1, 2, 3, 0)


def test_shifts_may_come_from_an_iterator() -> None:
    assert check_shifts(map(int, "01230"), 5) == (0, 1, 2, 3, 0)


@pytest.mark.parametrize(
    ("shifts", "message"),
    [
        ([0, 1, 2, 3], "expected 5 values.*got 4"),
        ([0] * 6, "expected 5 values.*got 6"),
        ([], "got 0"),
        ([0, 1, 2, 3, 4], "integers in 0..3, got 4"),
        ([0, 1, -1, 3, 0], "integers in 0..3, got -1"),
        (3, "expected 5 integers in 0..3, got 3"),
        (None, "expected 5 integers"),
        ([0, 1, 2, 3, "x"], "expected 5 integers"),
        ([0, 1, 2, 3, None], "expected 5 integers"),
        ([[0], [1], [2], [3], [0]], "expected 5 integers"),
    ],
)
def test_other_shifts_are_refused(shifts: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        check_shifts(shifts, 5)


@pytest.mark.parametrize("shifts", [[0, 1, 2, 3, 1.9], [True] * 5, "01230", [0, 1, 2, 3, "0"], [float("inf")] * 5])
def test_values_that_are_no_integers_are_refused(shifts: Any) -> None:
    with pytest.raises(BadInput):
        check_shifts(shifts, 5)


@given(st.lists(st.integers(1, 10), min_size=1, max_size=8), st.data())
def test_in_a_row_all_that_a_graph_takes_begins_at_an_even_place(counts: list[int], data: Any) -> None:
    layout = ShiftLayout(tuple(counts))
    shifts = tuple(data.draw(st.lists(st.integers(0, 3), min_size=layout.blocks, max_size=layout.blocks)))
    row = layout.row(shifts)
    assert len(row) == layout.width and layout.width % 2 == 0 and row[: layout.blocks] == shifts
    for (first, place), count in zip(layout.places.items(), counts, strict=True):
        assert place % 2 == 0 and row[place : place + count] == shifts[first : first + count]


@pytest.mark.parametrize("by_hand", [True, False])
def test_a_call_is_given_shifts_that_lie_where_compiled_code_can_load_them_and_are_not_copied_again(
    by_hand: bool,
) -> None:
    """SD 1.5 has one windowed block in each of five transformers: every other slice of a row would begin at 8 bytes."""
    unet = models.build("sd15", "text2img").unet
    patch = apply_hidiffusion(unet)
    shifts = (3, 1, 2, 0, 1)
    seen: list[list[torch.Tensor]] = []

    def look(*_: Any) -> None:
        call = patch.scope.call
        assert call is not None and call.shifts is not None
        seen.append([call.shifts, *(call.shifts_of(first, 1) for first in range(5))])  # type: ignore[list-item]

    unet.mid_block.register_forward_pre_hook(look)
    text = torch.zeros(1, 4, unet.config.cross_attention_dim)
    for step in (1, 1, 2):
        with patch.phase(step, 4, shifts if by_hand else None), torch.no_grad():
            unet(torch.zeros(1, 4, 16, 24), torch.tensor(1.0), text)
    for step, (whole, *parts) in zip((1, 1, 2), seen, strict=True):
        want = shifts if by_hand else window_shifts(0, step, 5)
        assert tuple(whole.tolist()) == want and [part.tolist() for part in parts] == [[shift] for shift in want]
        assert all(tensor.data_ptr() % 16 == 0 for tensor in (whole, *parts))
    first, second, other = ([tensor.data_ptr() for tensor in tensors] for tensors in seen)
    assert first == second and (first == other) == by_hand
