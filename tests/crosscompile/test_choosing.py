"""Which configuration of a kernel is taken where none can be timed."""

from __future__ import annotations

import pytest

from accel_hidiff.crosscompile.choosing import Candidate, choose
from accel_hidiff.target import LIMITS

H100, L4 = LIMITS["sm_90"], LIMITS["sm_89"]


def candidate(warps: int = 4, registers: int = 32, spilled: int = 0, shared: int = 0) -> Candidate:
    return Candidate("", warps, registers, spilled, shared)


@pytest.mark.parametrize(
    ("one", "warps"),
    [
        (candidate(warps=4, registers=32), 64),  # all that it holds: 2048 threads
        (candidate(warps=4, registers=255), 8),  # 65536 registers / (255 * 32 -> 8192) = 8 warps
        (candidate(warps=8, registers=168), 8),  # 12 warps by registers, of which one block of 8
        (candidate(warps=1, registers=16), 32),  # 32 blocks at the most
        (candidate(warps=4, shared=100 * 1024), 8),  # two blocks by shared memory
        (candidate(warps=32, registers=255), 0),  # a block that does not fit at all
    ],
)
def test_resident_warps(one: Candidate, warps: int) -> None:
    assert one.resident_warps(H100) == warps
    assert one.occupancy(H100) == warps / 64


def test_inductors_first_choice_where_nothing_speaks_against_it() -> None:
    assert choose("k", [candidate(registers=64), candidate(registers=32)], H100).taken == 0


def test_what_spills_is_passed_over() -> None:
    assert choose("k", [candidate(spilled=40), candidate(spilled=200), candidate(spilled=16)], H100).taken == 2
    assert choose("k", [candidate(spilled=40), candidate(spilled=200)], H100).taken == 0  # the least, where all do


def test_what_holds_too_few_warps_is_passed_over() -> None:
    few, enough = candidate(registers=255), candidate(registers=60)
    assert few.occupancy(H100) == 0.125 and enough.occupancy(H100) == 0.5
    assert choose("k", [few, enough, candidate(registers=16)], H100).taken == 1
    assert choose("k", [few, candidate(registers=200)], H100).taken == 0  # half of the best there is


def test_a_block_has_to_fit_into_shared_memory() -> None:
    large = candidate(warps=32, shared=120 * 1024)
    assert choose("k", [large, candidate()], H100).taken == 0
    assert choose("k", [large, candidate()], L4).taken == 1
    with pytest.raises(ValueError, match="k: expected a configuration within 101376 bytes of shared memory"):
        choose("k", [large], L4)


def test_all_candidates_are_noted() -> None:
    noted = choose("k", [candidate(), candidate(registers=255, spilled=300)], H100).to_json(H100)
    assert noted["kernel"] == "k" and noted["taken"] == 0
    assert [one["occupancy"] for one in noted["candidates"]] == [1.0, 0.125]
    assert noted["candidates"][1]["spilled"] == 300
