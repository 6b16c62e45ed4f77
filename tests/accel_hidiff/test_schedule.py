"""Plans are a pure function of numbers: gap-free, ordered, and equal to the published thresholds stated per step."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import diffusers
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accel_hidiff.clock import StepPosition
from accel_hidiff.config import TASKS, HiDiffusionConfig
from accel_hidiff.errors import BadInput
from accel_hidiff.families import SD15, SDXL, SDXL_TURBO, Family, Layout
from accel_hidiff.patching import Patch
from accel_hidiff.recognize import recognize
from accel_hidiff.schedule import (
    Phase,
    PhasePlan,
    choose_mode,
    control_steps,
    plan_latent,
    plan_pixels,
    running_steps,
)
from accel_hidiff.topology import Topology
from tests import models

FAMILIES = (SD15, SDXL, SDXL_TURBO)


def layout_of(family: Family, channels: int = 4) -> Layout:
    levels = len(family.down_block_types)
    return Layout(family.down_block_types, family.up_block_types, (2,) * levels, channels)


def stated(
    family: Family, channels: int, height: int, width: int, steps: int, config: HiDiffusionConfig, task: str
) -> list[tuple[bool, bool, bool]]:
    """(windowed, pooled, dilated) of each step, from the table of the release, written without the package's code.

    Sizes are in pixels; the release compares latent sizes with 256 and 512.
    """
    pool_from = 0.0
    if family is SD15:
        dilate_to, pool_to = (0.7, 0.3) if min(height, width) >= 2048 else (0.4, 0.0)
    elif family is SDXL_TURBO:
        dilate_to, pool_to = 0.0, 0.5
    elif min(height, width) >= 4096:
        dilate_to, pool_to = 0.3, 0.7
    else:
        aggressive = config.aggressive
        if aggressive is None:
            aggressive = channels != 9 and task != "inpaint"
        dilate_to = pool_from = 8 / 50 if aggressive else 0.0
        pool_to = 0.5 if task == "controlnet" else 0.4
    return [
        (
            config.windowed,
            config.pooled and int(pool_from * steps) <= step < int(pool_to * steps),
            config.dilated and step < int(dilate_to * steps),
        )
        for step in range(steps)
    ]


@functools.cache
def unet_of(family: str, channels: int) -> Any:
    return models.build(family, "inpaint9" if channels == 9 else "text2img").unet


def patch_of(family: Family, channels: int, config: HiDiffusionConfig, task: str) -> Patch:
    """A patch with what its plan needs, not installed."""
    unet = unet_of("sd15" if family is SD15 else "sdxl", channels)
    return Patch(None, unet, recognize(None, unet.config, config, family.name, task))


@functools.cache
def image_to_image(family: str, scheduler: str) -> Any:
    pipe = models.build(family, "img2img")
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    return pipe


def steps_left(pipe: Any, steps: int, strength: float) -> int:
    """How many steps a stock image-to-image pipeline leaves: a second call of a step has a timestep of another one."""
    pipe.scheduler.set_timesteps(steps)
    timesteps, _ = pipe.get_timesteps(steps, strength, "cpu")
    return len(timesteps.unique())


def steps_of(family: Family, run: tuple[int, float]) -> int:
    """The steps that run, from diffusers."""
    return steps_left(image_to_image("sd15" if family is SD15 else "sdxl", "DDIMScheduler"), *run)


def with_strength(steps: int) -> st.SearchStrategy[tuple[int, float]]:
    """(steps, strength), among them the shares of whole steps and of whole percents, which floats only come near."""
    shares = st.integers(0, steps).map(lambda kept: kept / steps) | st.integers(0, 100).map(lambda part: part / 100)
    return st.tuples(st.just(steps), st.just(1.0) | st.floats(0, 1) | shares)


runs = st.integers(1, 150).flatmap(with_strength)
sizes = st.integers(32, 512).map(lambda cells: 8 * cells)  # 256..4096 pixels, step 8
edge_sizes = st.sampled_from([256, 2040, 2048, 2056, 4088, 4096])
pixels = sizes | edge_sizes
configs = st.builds(
    HiDiffusionConfig,
    aggressive=st.none() | st.booleans(),
    windowed=st.booleans(),
    pooled=st.booleans(),
    dilated=st.booleans(),
)
requests = st.tuples(
    st.sampled_from(FAMILIES),
    st.sampled_from([4, 9]),
    pixels,
    pixels,
    runs.filter(lambda run: int(run[0] * run[1]) > 0),
    st.just(HiDiffusionConfig()) | configs,
    st.sampled_from(TASKS),
)


def plan_of(request: tuple[Any, ...]) -> PhasePlan:
    family, channels, height, width, run, *options = request
    return patch_of(family, channels, *options).plan(height, width, *run)


@settings(max_examples=400, deadline=None)
@given(requests)
def test_a_plan_states_the_published_thresholds_step_by_step(request: tuple[Any, ...]) -> None:
    family, channels, height, width, run, *options = request
    plan, steps = plan_of(request), steps_of(family, run)
    got = [(t.windowed, t.pooled, t.dilated) for t in map(plan.at, range(steps))]
    assert got == stated(family, channels, height, width, steps, *options)


@settings(max_examples=300, deadline=None)
@given(requests)
def test_phases_are_ordered_gap_free_and_cover_all_steps(request: tuple[Any, ...]) -> None:
    plan, steps = plan_of(request), steps_of(request[0], request[4])
    phases = list(plan)
    assert phases[0].start == 0 and phases[-1].stop == steps == plan.num_steps
    assert all(phase.start < phase.stop for phase in phases)
    for left, right in itertools.pairwise(phases):
        assert left.stop == right.start
        assert left.topology != right.topology, "neighbours with the same topology are one phase"
    assert plan.topologies == tuple(dict.fromkeys(phase.topology for phase in phases))
    for outside in (-1, steps, steps + 1):
        with pytest.raises(BadInput, match=rf"expected 0\.\.{steps - 1}, got {outside}"):
            plan.at(outside)


@settings(max_examples=100, deadline=None)
@given(st.lists(requests, min_size=1, max_size=6), requests)
def test_a_plan_does_not_depend_on_earlier_calls(earlier: list[tuple[Any, ...]], request: tuple[Any, ...]) -> None:
    plan_latent.cache_clear()
    alone = plan_of(request)
    plan_latent.cache_clear()
    for other in earlier:
        plan_of(other)
    assert plan_of(request) == alone


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(FAMILIES), pixels, pixels, st.integers(1, 150), st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_the_users_ratios_replace_the_tables(
    family: Family, height: int, width: int, steps: int, a: float, b: float, aggressive: bool
) -> None:
    t1, t2 = max(a, b), min(a, b)
    config = HiDiffusionConfig(t1_ratio=t1, t2_ratio=t2, aggressive=aggressive)
    plan = plan_pixels(family, layout_of(family), height, width, steps, config)
    pooled = {step for step in range(steps) if plan.at(step).pooled}
    dilated = {step for step in range(steps) if plan.at(step).dilated}
    long, short = set(range(int(t1 * steps))), set(range(int(t2 * steps)))
    if family is SD15:
        assert (dilated, pooled) == (long, short)
    elif family is SDXL_TURBO:
        assert (dilated, pooled) == (set(), long)
    elif min(height, width) >= 4096:
        assert (dilated, pooled) == (short, long)
    else:
        assert (dilated, pooled) == (short, long - short)


def test_the_shorter_range_follows_a_lower_t1() -> None:
    """T1 set below the table's T2: the table's T2 is lowered to it, so the plan stays valid."""
    plan = plan_pixels(SDXL, layout_of(SDXL), 4096, 4096, 10, HiDiffusionConfig(t1_ratio=0.1))
    assert str(plan) == "[0, 1) windowed+pooled+dilated, [1, 10) windowed"


def test_t2_over_the_tables_t1_is_refused() -> None:
    with pytest.raises(BadInput, match=r"got 0\.9 over the table's T1 0\.4; set t1_ratio"):
        plan_pixels(SDXL, layout_of(SDXL), 1024, 1024, 10, HiDiffusionConfig(t2_ratio=0.9))


def test_plans_of_well_known_requests() -> None:
    default = HiDiffusionConfig()
    xl, sd = layout_of(SDXL), layout_of(SD15)
    windowed = Topology(windowed=True)
    assert plan_pixels(SDXL, xl, 2048, 2048, 50, default).phases == (
        Phase(0, 8, Topology(True, dilated=True)),
        Phase(8, 20, Topology(True, pooled=True)),
        Phase(20, 50, windowed),
    )
    assert str(plan_pixels(SDXL, xl, 1536, 2688, 30, default)) == (
        "[0, 4) windowed+dilated, [4, 12) windowed+pooled, [12, 30) windowed"
    )
    assert plan_pixels(SD15, sd, 1024, 1024, 1, default).phases == (Phase(0, 1, windowed),)
    both = plan_pixels(SD15, sd, 2048, 2048, 10, default)
    assert str(both) == "[0, 3) windowed+pooled+dilated, [3, 7) windowed+dilated, [7, 10) windowed"
    off = HiDiffusionConfig(windowed=False, pooled=False, dilated=False)
    assert str(plan_pixels(SDXL, xl, 2048, 2048, 50, off)) == "[0, 50) plain"


def test_one_short_side_keeps_the_smaller_mode() -> None:
    default = HiDiffusionConfig()
    names = [choose_mode(SDXL, layout_of(SDXL), *size, default).name for size in ((512, 512), (511, 512), (512, 511))]
    assert names == ["sdxl 4096", "sdxl 2048", "sdxl 2048"]
    names = [choose_mode(SD15, layout_of(SD15), *size, default).name for size in ((256, 256), (255, 900), (900, 255))]
    assert names == ["sd15 2048", "sd15 1024", "sd15 1024"]


@pytest.mark.parametrize(
    ("height", "width", "steps", "message"),
    [
        (1020, 1024, 10, "height: expected a multiple of 8"),
        (1024, 1020, 10, "width: expected a multiple of 8"),
        (0, 1024, 10, "height: expected a positive"),
        (1024, 1024, 0, "steps"),
        (1024, 1024, 10.0, "steps"),
        (1024, 1024, True, "steps"),
        (1024, 1024, [10], "steps"),
    ],
)
def test_bad_requests_are_refused(height: Any, width: Any, steps: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        plan_pixels(SDXL, layout_of(SDXL), height, width, steps, HiDiffusionConfig())


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(BadInput, match="task: expected one of text2img"):
        plan_pixels(SDXL, layout_of(SDXL), 1024, 1024, 10, HiDiffusionConfig(), "upscale")


# ---- the steps that run


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "HeunDiscreteScheduler"])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@settings(max_examples=200, deadline=None)
@given(run=runs)
def test_as_many_steps_run_as_the_stock_pipelines_leave(family: str, scheduler: str, run: tuple[int, float]) -> None:
    left = steps_left(image_to_image(family, scheduler), *run)
    if left:
        assert running_steps(*run) == left
        return
    with pytest.raises(BadInput, match=rf"^strength: expected one that leaves a step, .* of {run[0]} steps"):
        running_steps(*run)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 30, 50])
def test_a_strength_that_leaves_no_step_is_refused(steps: int) -> None:
    patch = patch_of(SDXL, 4, HiDiffusionConfig(), "img2img")
    for strength in (0.0, 0, 0.9 / steps):
        with pytest.raises(BadInput, match=rf"leaves a step, got {strength} of {steps} steps"):
            running_steps(steps, strength)
        with pytest.raises(BadInput, match="leaves a step"):
            patch.plan(1024, 1024, steps, strength)


@pytest.mark.parametrize("steps", range(1, 151))
def test_the_least_strength_that_is_named_leaves_a_step(steps: int) -> None:
    with pytest.raises(BadInput) as raised:
        running_steps(steps, 0.0)
    assert running_steps(steps, float(str(raised.value).rsplit(" ", 1)[1])) == 1


@pytest.mark.parametrize("strength", [-0.1, 1.001, math.nan, math.inf, "0.5", None, True, [0.5]])
def test_what_is_no_strength_is_refused(strength: Any) -> None:
    with pytest.raises(BadInput, match=r"strength: expected a number in 0\.\.1"):
        running_steps(10, strength)
    with pytest.raises(BadInput, match="strength"):
        patch_of(SDXL, 4, HiDiffusionConfig(), "img2img").plan(1024, 1024, 10, strength)


@pytest.mark.parametrize("steps", [0, -1, 10.0, True, [10], None])
def test_what_is_no_number_of_steps_is_refused(steps: Any) -> None:
    with pytest.raises(BadInput, match="steps: expected an integer of at least 1"):
        running_steps(steps, 0.5)


def test_without_a_strength_all_steps_run() -> None:
    patch = patch_of(SDXL, 4, HiDiffusionConfig(), "text2img")
    assert [running_steps(steps) for steps in (1, 50)] == [1, 50]
    assert patch.plan(2048, 2048, 50) == patch.plan(2048, 2048, 50, 1.0) == patch.plan(2048, 2048, 50, 1)


def test_plans_of_well_known_strengths() -> None:
    patch = patch_of(SDXL, 4, HiDiffusionConfig(), "img2img")
    shorter = "[0, 2) windowed+dilated, [2, 7) windowed+pooled, [7, 18) windowed"
    assert str(patch.plan(1536, 2688, 30, 0.6)) == str(patch.plan(1536, 2688, 18)) == shorter


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 150), st.sampled_from([0, 0.3, 0.6, 1]) | st.floats(0, 1))
def test_controlnets_run_in_the_steps_below_their_share(steps: int, ratio: float) -> None:
    """The release: step < ratio * N."""
    running = [step for step in range(steps) if step < ratio * steps]
    assert control_steps(steps, ratio) == len(running) == min(math.ceil(ratio * steps), steps)
    patch = patch_of(SDXL, 4, HiDiffusionConfig(control_ratio=ratio), "controlnet")
    assert [step for step in range(steps) if patch.controls(StepPosition(step, steps))] == running


def test_control_steps_of_well_known_requests() -> None:
    assert [control_steps(steps, 0.6) for steps in (1, 2, 3, 5, 7, 30, 50)] == [1, 2, 2, 3, 5, 18, 30]
    assert (control_steps(10, 0.0), control_steps(10, 1.0)) == (0, 10)


def test_without_hidiffusion_controlnets_run_in_every_step() -> None:
    off = HiDiffusionConfig(windowed=False, pooled=False, dilated=False, control_ratio=0.2)
    patch = patch_of(SDXL, 4, off, "controlnet")
    assert all(patch.controls(StepPosition(step, 10)) for step in range(10))
