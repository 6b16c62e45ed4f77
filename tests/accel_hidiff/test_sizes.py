"""The size that is suggested is the nearest one whose windows need no resize, and a request at another one says so."""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import accel_hidiff as ah
from accel_hidiff import BadInput, HiDiffusionConfig, SizeWarning, Topology, suggest_size, windows
from accel_hidiff.config import FAMILIES, TASKS
from accel_hidiff.families import BY_NAME, SD15, SDXL
from accel_hidiff.schedule import plan_pixels
from accel_hidiff.sizes import control_size, odd_window_notice, odd_windows
from tests import models

CONFIGS = (
    HiDiffusionConfig(),
    HiDiffusionConfig(aggressive=False),
    HiDiffusionConfig(t1_ratio=0.0),
    HiDiffusionConfig(t1_ratio=1.0, t2_ratio=0.5),
    HiDiffusionConfig(pooled=False),
    HiDiffusionConfig(windowed=False),
)
pixels = st.integers(32, 512).map(lambda cells: 8 * cells)  # 256..4096, step 8
edge_pixels = st.sampled_from([256, 2040, 2048, 2056, 4080, 4088, 4096])
requests = st.fixed_dictionaries(
    {
        "family": st.sampled_from(FAMILIES),
        "num_inference_steps": st.integers(1, 5) | st.integers(1, 150),
        "config": st.sampled_from(CONFIGS),
        "task": st.sampled_from(TASKS),
    }
)
sides = pixels | edge_pixels


def halvings_of_windows(family: str, topologies: tuple[Topology, ...]) -> set[int]:
    """How often the latents were halved, rounded up, where windows are cut: SD 1.5 cuts them at full size, SDXL at half
    and, between the pool and its resize, at a quarter."""
    windowed = [topology for topology in topologies if topology.windowed]
    if family == "sd15":
        return {0 for _ in windowed}
    return {halved for topology in windowed for halved in ((1, 2) if topology.pooled else (1,))}


def is_even(request: dict[str, Any], height: int, width: int) -> bool:
    """Whether every feature map that is cut into windows in any phase has even sides. Sizes are in pixels."""
    family = BY_NAME[request["family"]]
    options = request["num_inference_steps"], request["config"], request["task"]
    plan = plan_pixels(family, family.layout(), height, width, *options)
    return all(
        math.ceil(side // 8 / 2**halved) % 2 == 0
        for halved in halvings_of_windows(family.name, plan.topologies)
        for side in (height, width)
    )


def distance(one: tuple[int, int], other: tuple[int, int]) -> int:
    """In latent cells."""
    return sum(abs(a - b) // 8 for a, b in zip(one, other, strict=True))


# ---- the nearest even size


@settings(max_examples=400, deadline=None)
@given(requests, sides, sides)
def test_the_suggestion_is_even_in_every_phase_and_suggests_itself(
    request: dict[str, Any], height: int, width: int
) -> None:
    suggested = suggest_size(height, width, **request)
    assert is_even(request, *suggested)
    assert suggest_size(*suggested, **request) == suggested


@settings(max_examples=300, deadline=None)
@given(requests, sides, sides)
def test_an_even_size_and_only_such_a_one_suggests_itself(request: dict[str, Any], height: int, width: int) -> None:
    assert (suggest_size(height, width, **request) == (height, width)) == is_even(request, height, width)


@settings(max_examples=100, deadline=None)
@given(requests, sides, sides)
def test_no_nearer_size_is_even(request: dict[str, Any], height: int, width: int) -> None:
    far = distance(suggest_size(height, width, **request), (height, width))
    assert far <= 6, "SDXL with a pool: at most 3 cells to each side"
    nearer = [
        (height + 8 * dy, width + 8 * dx)
        for dy in range(-far, far + 1)
        for dx in range(-far, far + 1)
        if abs(dy) + abs(dx) < far
    ]
    assert not [size for size in nearer if is_even(request, *size)]


@given(sides, sides)
def test_of_two_nearest_sizes_the_larger_is_suggested(height: int, width: int) -> None:
    """The SD 1.5 layout: an odd number of cells has an even one on both sides."""
    assert suggest_size(height, width, family="sd15") == (height + height % 16, width + width % 16)


def test_the_steps_decide_which_phases_count() -> None:
    """Two steps of SDXL have no pooled phase, in which 1056 pixels are a map of 33 rows."""
    assert suggest_size(1056, 1056, num_inference_steps=2) == (1056, 1056)
    assert suggest_size(1056, 1056, num_inference_steps=3) == (1080, 1080)
    assert suggest_size(1056, 1056, num_inference_steps=2, task="controlnet") == (1080, 1080)


def test_the_smallest_sizes_have_a_suggestion_of_at_least_one_cell() -> None:
    for family in FAMILIES:
        for height in range(8, 80, 8):
            suggested = suggest_size(height, 8, family=family)
            assert min(suggested) >= 8 and is_even(
                {"family": family, "num_inference_steps": 50, "config": HiDiffusionConfig(), "task": "text2img"},
                *suggested,
            )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": 1020}, "height: expected a multiple of 8 pixels, got 1020"),
        ({"width": 1025}, "width: expected a multiple of 8 pixels, got 1025"),
        ({"height": 0}, "height: expected a positive"),
        ({"width": -8}, "width: expected a positive"),
        ({"height": 1024.0}, "height: expected an integer"),
        ({"width": "1024"}, "width: expected an integer"),
        ({"num_inference_steps": 0}, "steps: expected an integer of at least 1"),
        ({"num_inference_steps": 50.0}, "steps: expected an integer of at least 1"),
        ({"num_inference_steps": [50]}, "steps: expected an integer of at least 1"),
        ({"family": "sd3"}, "family: expected one of sd15, sdxl, sdxl_turbo; got 'sd3'"),
        ({"family": None}, "family: expected one of"),
        ({"task": "upscale"}, "task: expected one of text2img"),
        ({"config": HiDiffusionConfig(t2_ratio=0.9)}, "expected t2_ratio <= T1"),
    ],
)
def test_bad_requests_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        suggest_size(**{"height": 1024, "width": 1024, **arguments})


@pytest.mark.parametrize("arguments", [{"config": {"windowed": True}}, {"config": "default"}, {"task": ["text2img"]}])
def test_an_option_of_another_type_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        suggest_size(1024, 1024, **arguments)


# ---- what is told of an odd size


MODELS = (
    ("sd15", "text2img"),
    ("sdxl", "inpaint9"),
    ("sdxl", "controlnet"),
    ("sdxl_turbo", "img2img"),
    ("playground", "text2img"),
)


@functools.cache
def patch_of(family: str, task: str) -> Any:
    return ah.apply_hidiffusion(models.build(family, task))


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(MODELS), sides, sides, st.integers(1, 150))
def test_a_patch_suggests_what_the_function_does(model: tuple[str, str], height: int, width: int, steps: int) -> None:
    patch = patch_of(*model)
    options: dict[str, Any] = {"family": patch.family.name, "config": patch.config, "task": patch.task}
    suggested = patch.suggest_size(height, width, num_inference_steps=steps)
    assert suggested == ah.suggest_size(height, width, num_inference_steps=steps, **options)


@pytest.mark.parametrize("arguments", [(1020, 1024), (1024, 1020), (0, 8), (1024, 1024, 0), (1024, 1024, 2.0)])
def test_a_patch_refuses_what_cannot_be(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(BadInput, match="expected"):
        patch_of("sdxl", "controlnet").suggest_size(*arguments)


def test_the_windows_of_an_odd_size() -> None:
    """By hand. SDXL, 18x27 cells: half of it is 9x14; a quarter, which the pool leaves, 5x7, until its resize."""
    levels = SDXL.layout(), 18, 27
    late = [f"{path}.attentions.{index}" for path, index in (("down_blocks.1", 0), ("up_blocks.1", 2))]
    pooled = [f"{path}.attentions.{index}" for path, index in (("down_blocks.1", 1), ("up_blocks.1", 0))]
    pooled.append("up_blocks.1.attentions.1")
    everywhere = dict.fromkeys(late, (9, 14))
    assert odd_windows(SDXL, *levels, Topology(True)) == everywhere | dict.fromkeys(pooled, (9, 14))
    assert odd_windows(SDXL, *levels, Topology(True, dilated=True)) == odd_windows(SDXL, *levels, Topology(True))
    assert odd_windows(SDXL, *levels, Topology(True, pooled=True)) == everywhere | dict.fromkeys(pooled, (5, 7))
    assert odd_windows(SDXL, *levels, Topology(False, pooled=True)) == {}
    assert odd_windows(SDXL, SDXL.layout(), 16, 24, Topology(True, pooled=True)) == {}
    paths = [f"down_blocks.0.attentions.{index}" for index in range(2)]
    paths += [f"up_blocks.3.attentions.{index}" for index in range(3)]
    every = Topology(True, True, True)
    assert odd_windows(SD15, SD15.layout(), 32, 41, every) == dict.fromkeys(paths, (32, 41))
    assert odd_windows(SD15, SD15.layout(), 34, 42, every) == {}


@pytest.mark.parametrize(
    ("family", "size"),
    [("sdxl", (136, 200)), ("sdxl", (120, 216)), ("sdxl", (160, 192)), ("sdxl", (120, 184)), ("sd15", (264, 328))],
)
def test_the_odd_windows_are_those_that_a_live_unet_resizes(
    monkeypatch: pytest.MonkeyPatch, family: str, size: tuple[int, int]
) -> None:
    pipe = models.build(family, "text2img")
    patch = ah.apply_hidiffusion(pipe)
    resized: set[tuple[str, tuple[int, int]]] = set()
    inside = ""

    def enter(path: str) -> Any:
        def hook(module: Any, args: Any) -> None:
            nonlocal inside
            inside = path

        return hook

    def watched(tokens: torch.Tensor, at: tuple[int, int], to: tuple[int, int]) -> torch.Tensor:
        resized.update((inside, side) for side in (at, to) if side[0] % 2 or side[1] % 2)
        return resize(tokens, at, to)

    for path, transformer in patch.windowed_transformers:
        transformer.register_forward_pre_hook(enter(path))
    resize = windows._resize
    monkeypatch.setattr(windows, "_resize", watched)
    request = models.arguments(family, "text2img", *size)
    pipe(**request)
    cells = size[0] // 8, size[1] // 8
    topologies = patch.plan(*size, request["num_inference_steps"]).topologies
    odd = [odd_windows(patch.family, patch.layout, *cells, topology).items() for topology in topologies]
    assert resized == set(itertools.chain(*odd))


@settings(max_examples=200, deadline=None)
@given(requests, sides, sides)
def test_a_notice_is_given_of_odd_sizes_only_and_names_the_suggestion(
    request: dict[str, Any], height: int, width: int
) -> None:
    family, config, task = BY_NAME[request["family"]], request["config"], request["task"]
    layout = family.layout()
    plan = plan_pixels(family, layout, height, width, request["num_inference_steps"], config, task)
    notice = odd_window_notice(family, layout, height // 8, width // 8, plan, config, task)
    if is_even(request, height, width):
        assert notice is None
    else:
        y, x = suggest_size(height, width, **request)
        assert notice is not None and notice.startswith(f"{width}x{height}: the windowed")
        assert notice.endswith(f"; {x}x{y} avoids that") and "\n" not in notice


# family, task: an odd size and an even one, in pixels
SIZES = {
    ("sd15", "text2img"): ((264, 320), (256, 336)),
    ("sdxl", "text2img"): ((136, 192), (120, 184)),  # 15 and 23 cells: halved and halved again, 8, 12, 4, 6
    ("sdxl", "controlnet"): ((128, 160), (128, 192)),
    ("sdxl_turbo", "text2img"): ((160, 128), (120, 192)),
    ("playground", "inpaint"): ((160, 192), (192, 128)),
}


def warnings_of(pipe: Any, request: dict[str, Any]) -> list[str]:
    """What a request says of its size."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        pipe(**request)
    return [str(warning.message) for warning in seen if issubclass(warning.category, SizeWarning)]


@pytest.mark.parametrize(("model", "sizes"), SIZES.items(), ids=map("-".join, SIZES))
def test_an_odd_size_warns_once_and_an_even_one_never(
    model: tuple[str, str], sizes: tuple[tuple[int, int], tuple[int, int]]
) -> None:
    pipe = models.build(*model)
    patch = ah.apply_hidiffusion(pipe)
    odd, even = sizes
    request = models.arguments(*model, *odd)
    assert warnings_of(pipe, models.arguments(*model, *even)) == []
    plan = patch.plan(*odd, request["num_inference_steps"], request.get("strength", 1.0))
    y, x = patch.suggest_size(*odd, plan.num_steps)
    with pytest.warns(SizeWarning, match=rf"^{odd[1]}x{odd[0]}: .*; {x}x{y} avoids that$") as seen:
        pipe(**request)
    assert len([warning for warning in seen if issubclass(warning.category, SizeWarning)]) == 1, "in many steps, once"
    assert warnings_of(pipe, models.arguments(*model, *odd)) == [], "nor again for the same size"
    assert warnings_of(pipe, models.arguments(*model, y, x)) == [], "the named size is as good as it says"
    other = odd[0], odd[1] + 80
    assert len(warnings_of(pipe, models.arguments(*model, *other))) == 1, "another size is another matter"


def test_only_the_steps_that_run_are_looked_at() -> None:
    """Two steps have no pooled phase, the only one in which 20 cells, halved twice, are an odd number."""
    pipe = models.build("sdxl", "img2img")
    ah.apply_hidiffusion(pipe)
    assert warnings_of(pipe, models.arguments("sdxl", "img2img", 160, 160, strength=0.2)) == []
    assert len(warnings_of(pipe, models.arguments("sdxl", "img2img", 160, 160, strength=0.6))) == 1


def test_without_windows_no_size_is_odd() -> None:
    pipe = models.build("sdxl", "text2img")
    patch = ah.apply_hidiffusion(pipe, apply_window_attn=False)
    assert warnings_of(pipe, models.arguments("sdxl", "text2img", 136, 200)) == []
    assert patch.suggest_size(136, 200) == (136, 200)


# ---- where ControlNets run

cells = st.integers(32, 512)  # of 256..4096 pixels


@given(st.sampled_from([64, 128]), cells, cells)
def test_a_controlnet_runs_at_the_trained_side_or_below(side: int, height: int, width: int) -> None:
    found = control_size(side, height, width)
    if max(height, width) <= side:
        assert found == (height, width)
        return
    assert max(found) == side and all(part % 8 == 0 for part in found)
    assert all(0 < part <= asked for part, asked in zip(found, (height, width), strict=True))
    release = [int(part // (max(height, width) / side)) // 8 * 8 for part in (height, width)]
    assert list(found) == [max(part, 8) for part in release], "a side of 64 brings 32 of 512 cells to 4: one step of 8"


@given(cells, cells)
def test_sdxls_controlnets_run_at_the_size_of_the_release(height: int, width: int) -> None:
    longest = max(height, width)
    release = tuple(int(part // (longest / 128)) // 8 * 8 for part in (height, width))
    assert control_size(SDXL.control_side, height, width) == (release if longest > 128 else (height, width))


def test_control_sizes_of_well_known_requests() -> None:
    assert control_size(SDXL.control_side, 256, 256) == (128, 128)
    assert control_size(SDXL.control_side, 192, 336) == (72, 128)
    assert control_size(SDXL.control_side, 336, 192) == (128, 72)
    assert control_size(SDXL.control_side, 128, 96) == (128, 96)
    assert control_size(SDXL.control_side, 129, 129) == (128, 128)
    assert control_size(SD15.control_side, 128, 96) == (64, 48)


def test_a_patch_runs_its_controlnets_at_its_familys_side_and_only_where_it_is_active() -> None:
    assert patch_of("sd15", "controlnet").control_size(128, 96) == (64, 48)
    assert patch_of("sdxl", "controlnet").control_size(256, 192) == (128, 96)
    off = HiDiffusionConfig(windowed=False, pooled=False, dilated=False)
    patch = ah.apply_hidiffusion(models.build("sdxl", "controlnet"), config=off)
    assert patch.control_size(256, 192) == (256, 192)
