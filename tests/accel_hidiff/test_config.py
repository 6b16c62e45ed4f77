"""Configurations are validated, frozen, and survive JSON; bad sizes and counts are named with what was expected."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accel_hidiff.config import WINDOW_SHIFTS, HiDiffusionConfig, check_choice, check_pixels, check_steps
from accel_hidiff.errors import AccelHiDiffError, BadInput

ratios = st.none() | st.floats(0, 1) | st.sampled_from([0, 1])


@st.composite
def configs(draw: Any) -> HiDiffusionConfig:
    t1, t2 = draw(ratios), draw(ratios)
    if t1 is not None and t2 is not None:
        t1, t2 = max(t1, t2), min(t1, t2)
    flags = {name: draw(st.booleans()) for name in ("windowed", "pooled", "dilated")}
    aggressive = draw(st.none() | st.booleans())
    return HiDiffusionConfig(
        t1,
        t2,
        aggressive,
        **flags,
        window_shifts=draw(st.sampled_from(WINDOW_SHIFTS)),
        control_ratio=draw(st.floats(0, 1) | st.sampled_from([0, 1])),
        shift_seed=draw(st.integers()),
    )


@given(configs())
def test_json_round_trip_keeps_every_field(config: HiDiffusionConfig) -> None:
    text = json.dumps(config.to_json(), allow_nan=False)
    again = HiDiffusionConfig.from_json(json.loads(text))
    assert again == config and hash(again) == hash(config)
    assert json.dumps(again.to_json(), allow_nan=False) == text
    assert set(config.to_json()) == {"type", "version", *(field.name for field in dataclasses.fields(config))}


@given(configs())
def test_json_of_before_these_fields_gives_them_as_they_then_were(config: HiDiffusionConfig) -> None:
    """Window shifts per block, and ControlNets in the first 0.6 of the steps."""
    data = config.to_json()
    del data["window_shifts"], data["control_ratio"]
    assert HiDiffusionConfig.from_json(data) == config.replace(window_shifts="per_block", control_ratio=0.6)


def test_json_of_the_first_version_loads() -> None:
    text = """{"type": "HiDiffusionConfig", "version": 1, "t1_ratio": 0.5, "t2_ratio": null, "aggressive": false,
               "windowed": true, "pooled": true, "dilated": false, "shift_seed": 7}"""
    config = HiDiffusionConfig.from_json(json.loads(text))
    assert config == HiDiffusionConfig(t1_ratio=0.5, aggressive=False, dilated=False, shift_seed=7)


def test_the_defaults_change_nothing() -> None:
    config = HiDiffusionConfig()
    assert (config.t1_ratio, config.t2_ratio, config.aggressive) == (None, None, None)
    assert config.windowed and config.pooled and config.dilated and config.shift_seed == 0
    assert (config.window_shifts, config.control_ratio) == ("per_block", 0.6)


@given(configs())
def test_a_config_is_active_if_any_part_may_be_on(config: HiDiffusionConfig) -> None:
    assert config.is_active is any([config.windowed, config.pooled, config.dilated])
    off = config.replace(windowed=False, pooled=False, dilated=False)
    assert not off.is_active
    assert all(off.replace(**{part: True}).is_active for part in ("windowed", "pooled", "dilated"))


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        HiDiffusionConfig().windowed = False  # type: ignore[misc]


@pytest.mark.parametrize("name", ["t1_ratio", "t2_ratio", "control_ratio"])
@pytest.mark.parametrize("value", [-0.01, 1.01, 2, math.nan, math.inf, -math.inf, "0.5", True, [0.5]])
def test_a_ratio_outside_of_0_to_1_is_refused(name: str, value: Any) -> None:
    with pytest.raises(BadInput, match=rf"{name}: expected a number in 0..1"):
        HiDiffusionConfig(**{name: value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"t1_ratio": 0.2, "t2_ratio": 0.3}, "t2_ratio <= t1_ratio"),
        ({"aggressive": 1}, "aggressive: expected True, False or None"),
        ({"windowed": 1}, "windowed: expected True or False"),
        ({"pooled": None}, "pooled: expected True or False"),
        ({"dilated": "yes"}, "dilated: expected True or False"),
        ({"control_ratio": None}, r"control_ratio: expected a number in 0\.\.1, got None"),
        ({"window_shifts": "per_head"}, "window_shifts: expected one of per_block, per_step; got 'per_head'"),
        ({"window_shifts": None}, "window_shifts: expected one of"),
        ({"window_shifts": ["per_step"]}, "window_shifts: expected one of"),
        ({"window_shifts": True}, "window_shifts: expected one of"),
        ({"shift_seed": 1.0}, "shift_seed: expected an integer"),
        ({"shift_seed": True}, "shift_seed: expected an integer"),
    ],
)
def test_other_bad_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        HiDiffusionConfig(**fields)


def test_replace_validates_again_and_leaves_the_original() -> None:
    config = HiDiffusionConfig(t1_ratio=0.5)
    assert config.replace(t2_ratio=0.5).t2_ratio == 0.5
    with pytest.raises(BadInput):
        config.replace(t2_ratio=0.6)
    assert config == HiDiffusionConfig(t1_ratio=0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "Other"}, "got 'Other' version 1"),
        ({"type": None}, "expected a HiDiffusionConfig"),
        ({"version": 2}, "version 2"),
        ({"version": None}, "version None"),
        ({"colour": "red"}, "no field 'colour'"),
        ({"t1_ratio": 3}, "t1_ratio"),
        ({"windowed": "true"}, "windowed"),
        ({"window_shifts": "per_head"}, "window_shifts"),
        ({"control_ratio": None}, "control_ratio"),
    ],
)
def test_from_json_refuses_other_data(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        HiDiffusionConfig.from_json({**HiDiffusionConfig().to_json(), **change})


@pytest.mark.parametrize("data", [None, [], "{}", 3])
def test_from_json_refuses_what_is_no_mapping(data: Any) -> None:
    with pytest.raises(BadInput):
        HiDiffusionConfig.from_json(data)


@given(st.integers(1, 10_000), st.integers(1, 10_000))
def test_multiples_of_8_are_sizes_and_nothing_else(height: int, width: int) -> None:
    assert check_pixels(8 * height, 8 * width) == (8 * height, 8 * width)
    if height % 8:
        with pytest.raises(BadInput, match="height: expected a multiple of 8") as raised:
            check_pixels(height, 8 * width)
        nearest = int(str(raised.value).rsplit(" ", 1)[1])
        assert nearest % 8 == 0 and nearest > 0 and abs(nearest - height) <= max(4, 8 - height)


@pytest.mark.parametrize("value", [0, -8, 1024.0, "1024", None, True])
def test_bad_sizes_are_refused_by_name(value: Any) -> None:
    with pytest.raises(BadInput, match="height"):
        check_pixels(value, 1024)
    with pytest.raises(BadInput, match="width"):
        check_pixels(1024, value)


@pytest.mark.parametrize("value", [0, -1, 2.0, "10", None, True])
def test_bad_step_counts_are_refused(value: Any) -> None:
    with pytest.raises(BadInput, match="steps: expected an integer of at least 1"):
        check_steps(value)
    assert check_steps(1) == 1


def test_a_choice_is_one_of_the_words() -> None:
    assert check_choice("mode", "a", ("a", "b")) == "a"
    for value in ("c", None, ["a"], 1):
        with pytest.raises(BadInput, match="mode: expected one of a, b"):
            check_choice("mode", value, ("a", "b"))


def test_bad_input_is_a_value_error_of_this_package() -> None:
    assert issubclass(BadInput, ValueError) and issubclass(BadInput, AccelHiDiffError)
