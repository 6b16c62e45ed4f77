"""ControlNets run at their trained scale, in the first steps only, and what they give reaches every skip resized."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import accel_hidiff as ah
from accel_hidiff import AccelHiDiffError, HiDiffusionConfig, compat
from accel_hidiff.shifts import window_shifts
from tests import models, needs
from tests.schedulers import SCHEDULERS, once, warmed_up

SMALL = 128, 192  # pixels; below every trained scale
# Image size in pixels, and the latent size at which its ControlNets run: long and narrow, to be fast.
LARGE = {"sd15": ((128, 640), (8, 64)), "sdxl": ((128, 1088), (8, 128))}
TASKS = ("controlnet", "controlnet_img2img", "multi_controlnet")
# The steps of `models.arguments` that run: SDXL's requests dilate, pool, and have windows only; SD 1.5's dilate, and
# have windows only. Image-to-image has a strength of 0.6 of 10 steps.
STEPS = {"controlnet": 7, "multi_controlnet": 7, "controlnet_img2img": 6}


@dataclass
class ControlCall:
    """What a pipeline passed to a ControlNet, what it got, and what the network itself ran on (None: it did not)."""

    kwargs: dict[str, Any]
    out: Any = None
    latents: Tensor | None = None
    images: list[Tensor] = field(default_factory=list)


@dataclass
class Call:
    """One UNet call of a pipeline, and the ControlNet calls before it, one for each ControlNet."""

    control: list[ControlCall]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    out: Any = None

    @property
    def controlled(self) -> bool:
        return all(control.latents is not None for control in self.control)


def controlnets(pipe: Any) -> list[Any]:
    return list(getattr(pipe.controlnet, "nets", [pipe.controlnet]))


@contextmanager
def recorded(pipe: Any) -> Iterator[list[Call]]:
    """Every UNet call inside, as the pipeline makes it."""
    calls: list[Call] = []
    pending: list[ControlCall] = []

    def control_begins(net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = ("sample", "timestep")
        pending.append(ControlCall({**dict(zip(names, args, strict=False)), **kwargs}))

    def control_runs(module: nn.Module, args: tuple[Any, ...]) -> None:
        assert pending[-1].latents is None, "once in a call"
        pending[-1].latents = args[0].clone()

    def control_ends(net: nn.Module, args: Any, out: Any) -> None:
        pending[-1].out = out

    def unet_ends(unet: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        calls.append(Call(list(pending), args, kwargs, out[0].clone()))
        pending.clear()

    handles = [pipe.unet.register_forward_hook(unet_ends, with_kwargs=True)]
    for net in dict.fromkeys(controlnets(pipe)):
        handles.append(net.register_forward_pre_hook(control_begins, with_kwargs=True))
        handles.append(net.conv_in.register_forward_pre_hook(control_runs))
        image = net.controlnet_cond_embedding
        handles.append(image.register_forward_pre_hook(lambda _, args: pending[-1].images.append(args[0].clone())))
        handles.append(net.register_forward_hook(control_ends))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def run(pipe: Any, family: str, task: str, size: tuple[int, int] = SMALL, **changes: Any) -> tuple[list[Call], Tensor]:
    """(UNet calls, latents) of one request."""
    with recorded(pipe) as calls:
        latents = pipe(**models.arguments(family, task, *size, **changes)).images
    return calls, latents


def controlled(calls: list[Call]) -> list[bool]:
    """For every UNet call whether its ControlNets ran: each did, or none."""
    for call in calls:
        assert call.control and len({control.latents is not None for control in call.control}) == 1
    return [call.controlled for call in calls]


# ---- by hand


def nearest(image: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(image, size, mode="nearest")


def by_hand(net: Any, control: ControlCall, cells: tuple[int, int]) -> tuple[list[Tensor], Tensor]:
    """The residuals of an unpatched ControlNet for what a pipeline passed, resized as in the release."""
    pixels = 8 * cells[0], 8 * cells[1]
    kwargs = dict(control.kwargs)
    image = kwargs["controlnet_cond"]
    kwargs["sample"] = nearest(kwargs["sample"], cells)
    kwargs["controlnet_cond"] = (
        nearest(image, pixels) if isinstance(image, Tensor) else [nearest(each, pixels) for each in image]
    )
    with torch.no_grad():
        down, mid = net(**kwargs)
    return list(down), mid


def resized(residual: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(residual, like.shape[-2:], mode="bicubic", align_corners=False)


@contextmanager
def adding(unet: Any, down: list[Tensor], mid: Tensor) -> Iterator[None]:
    """Adds residuals to a UNet's skips and middle block by hooks, each resized to what it is added to."""
    left = list(down)

    def up(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        skips = kwargs["res_hidden_states_tuple"]
        own = left[-len(skips) :]
        del left[-len(skips) :]
        added = tuple(skip + resized(residual, skip) for skip, residual in zip(skips, own, strict=True))
        return args, {**kwargs, "res_hidden_states_tuple": added}

    handles = [block.register_forward_pre_hook(up, with_kwargs=True) for block in unet.up_blocks]
    handles.append(unet.mid_block.register_forward_hook(lambda _, __, out: out + resized(mid, out)))
    try:
        yield
        assert not left, "every residual has its skip"
    finally:
        for handle in handles:
            handle.remove()


RESIDUALS = ("down_block_additional_residuals", "mid_block_additional_residual")


def without_residuals(call: Call) -> dict[str, Any]:
    return {name: value for name, value in call.kwargs.items() if name not in RESIDUALS}


def replay(patch: Any, call: Call, step: int, steps: int) -> Tensor:
    """The UNet call on a bare patched UNet, without any residual."""
    shifts = window_shifts(0, step, len(patch.windowed_blocks))
    with torch.no_grad(), patch.phase(step=step, num_steps=steps, window_shifts=shifts):
        return patch.unet(*call.args, **without_residuals(call))[0]


def check_request(
    family: str, task: str, size: tuple[int, int], cells: tuple[int, int], steps: int, **changes: Any
) -> set[str]:
    """The calls of a request against the same by hand; returns the phases in which ControlNets ran."""
    pipe = models.build(family, task)
    patch = ah.apply_hidiffusion(pipe)
    calls, _ = run(pipe, family, task, size, **changes)
    order = list(range(steps)) if len(calls) == steps else [0, *range(steps)]  # PNDM makes two calls in its first step
    assert controlled(calls) == [step < 0.6 * steps for step in order]

    fresh = models.build(family, task)
    nets = controlnets(fresh)
    bare = ah.apply_hidiffusion(fresh.unet, task=patch.task)
    last = order[sum(controlled(calls)) - 1]
    phases: set[str] = set()
    for step, call in zip(order, calls, strict=True):
        phase = str(patch.plan(*size, steps).at(step))
        if call.controlled and phase in phases and step != last:
            continue
        plain = replay(bare, call, step, steps)
        if not call.controlled:
            assert torch.equal(call.out, plain), step
            continue
        phases.add(phase)
        assert_trained_scale(call, cells)
        down, mid = total([by_hand(net, control, cells) for net, control in zip(nets, call.control, strict=True)])
        if changes.get("guess_mode"):
            down, mid = [torch.cat([torch.zeros_like(r), r]) for r in down], torch.cat([torch.zeros_like(mid), mid])
        with adding(bare.unet, down, mid):
            wanted = replay(bare, call, step, steps)
        assert torch.equal(call.out, wanted), step
        assert (wanted - plain).abs().max() > 1e-2 * plain.abs().max(), "otherwise this shows nothing"
    return phases


def total(found: list[tuple[list[Tensor], Tensor]]) -> tuple[list[Tensor], Tensor]:
    """The residuals of several ControlNets."""
    down, mid = found[0]
    for more, more_mid in found[1:]:
        down, mid = [a + b for a, b in zip(down, more, strict=True)], mid + more_mid
    return down, mid


def assert_trained_scale(call: Call, cells: tuple[int, int]) -> None:
    """The ControlNets ran on what the pipeline passed, resized to a latent size."""
    for control in call.control:
        assert control.latents is not None
        assert tuple(control.latents.shape[-2:]) == cells
        assert torch.equal(control.latents, nearest(control.kwargs["sample"], cells))
        passed = control.kwargs["controlnet_cond"]
        images = [passed] if isinstance(passed, Tensor) else passed
        assert len(control.images) == len(images)
        for seen, image in zip(control.images, images, strict=True):
            assert torch.equal(seen, nearest(image, (8 * cells[0], 8 * cells[1])))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", LARGE)
def test_a_large_request_equals_the_same_by_hand(family: str, task: str) -> None:
    phases = check_request(family, task, *LARGE[family], STEPS[task])
    wanted = {"sd15": {"windowed+dilated", "windowed"}, "sdxl": {"windowed+dilated", "windowed+pooled", "windowed"}}
    few = {"windowed+dilated"} if (family, task) == ("sdxl", "controlnet_img2img") else set()  # 6 steps have none
    assert phases == wanted[family] - few


def test_both_sides_above_the_trained_scale() -> None:
    """576x640 pixels: the longer side, 80 cells, is brought down to 64, and the other, 57.6, to a multiple of 8."""
    check_request("sd15", "controlnet", (576, 640), (56, 64), steps=1, num_inference_steps=1)


@pytest.mark.parametrize(
    ("family", "size"),
    [("sd15", (128, 512)), ("sdxl", SMALL), ("sdxl", (128, 1024)), ("sdxl", (72, 200))],
    ids=str,
)
def test_nothing_is_scaled_up(family: str, size: tuple[int, int]) -> None:
    check_request(family, "controlnet", size, (size[0] // 8, size[1] // 8), steps=7)


@pytest.mark.parametrize(("family", "task"), [("sd15", "controlnet"), ("sdxl", "multi_controlnet")])
def test_guess_mode(family: str, task: str) -> None:
    """The ControlNet sees the prompted half of the batch only, and weighs its residuals; the other half gets zeros."""
    check_request(family, task, *LARGE[family], STEPS[task], guess_mode=True)


def test_turned_pictures_and_other_scales() -> None:
    """Higher than wide, another weight, and another batch."""
    changes = {"controlnet_conditioning_scale": [0.3, 1.7], "num_images_per_prompt": 2, "num_inference_steps": 2}
    check_request("sd15", "multi_controlnet", (640, 128), (64, 8), steps=2, **changes)


# ---- in which steps


@pytest.fixture(scope="module")
def patched(one_thread: None) -> Callable[[str, str], Any]:
    """A patched pipeline of a family and task; its scheduler may be swapped."""
    made: dict[tuple[str, str], Any] = {}

    def get(family: str, task: str) -> Any:
        if (family, task) not in made:
            made[family, task] = models.build(family, task)
            ah.apply_hidiffusion(made[family, task])
        return made[family, task]

    return get


@pytest.mark.parametrize(("task", "asked"), [("controlnet", 5), ("controlnet", 7), ("controlnet_img2img", 10)])
@pytest.mark.parametrize(
    "name",
    ["EulerDiscreteScheduler", "DDIMScheduler", "PNDMScheduler", "PNDMScheduler prk", "HeunDiscreteScheduler"],
)
def test_controlnets_run_in_the_first_steps_of_those_that_run(patched: Any, name: str, task: str, asked: int) -> None:
    """In all calls of a step, or in none."""
    options, steps_of_calls = SCHEDULERS[name]
    pipe = patched("sdxl", task)
    pipe.scheduler = getattr(diffusers, name.split(maxsplit=1)[0]).from_config(pipe.scheduler.config, **options)
    calls, _ = run(pipe, "sdxl", task, num_inference_steps=asked)
    running = 6 if task == "controlnet_img2img" else asked
    assert controlled(calls) == [step < 0.6 * running for step in steps_of_calls(running)]


@pytest.mark.parametrize(("strength", "running"), [(0.2, 2), (0.55, 5), (1.0, 10)])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_the_share_is_of_the_steps_that_strength_leaves(
    patched: Any, family: str, strength: float, running: int
) -> None:
    pipe = patched(family, "controlnet_img2img")
    pipe.scheduler = models.build(family, "text2img").scheduler
    calls, _ = run(pipe, family, "controlnet_img2img", strength=strength)
    steps = warmed_up(running) if family == "sd15" else once(running)
    assert controlled(calls) == [step < 0.6 * running for step in steps]


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_inpainting_with_a_controlnet(family: str) -> None:
    prefix = {"sd15": "StableDiffusion", "sdxl": "StableDiffusionXL"}[family]
    pipe = other_pipeline(f"{prefix}ControlNetInpaintPipeline", models.build(family, "controlnet"))
    ah.apply_hidiffusion(pipe)
    request = models.arguments(family, "inpaint", *SMALL)
    with recorded(pipe) as calls:
        pipe(**request, control_image=request["image"])
    assert controlled(calls) == [step < 3.6 for step in (warmed_up(6) if family == "sd15" else once(6))]


def other_pipeline(name: str, pipe: Any) -> Any:
    """A pipeline of another class on the same components."""
    extra = {"requires_safety_checker": False} if "XL" not in name else {"add_watermarker": False}
    other = getattr(diffusers, name)(**pipe.components, **extra)
    other.set_progress_bar_config(disable=True)
    return other


def test_another_pipeline_on_the_same_components_is_counted_rightly() -> None:
    """The usual second pass, patched through the text-to-image pipeline."""
    pipe = models.build("sdxl", "controlnet")
    ah.apply_hidiffusion(pipe)
    run(pipe, "sdxl", "controlnet")
    second = other_pipeline("StableDiffusionXLControlNetImg2ImgPipeline", pipe)
    calls, _ = run(second, "sdxl", "controlnet_img2img")
    assert controlled(calls) == [step < 3.6 for step in range(6)]


def latents_of(family: str, task: str, ratio: float, size: tuple[int, int] = SMALL, **changes: Any) -> Any:
    pipe = models.build(family, task)
    ah.apply_hidiffusion(pipe, config=HiDiffusionConfig(control_ratio=ratio))
    return run(pipe, family, task, size, **changes)


@pytest.mark.parametrize("task", TASKS)
def test_a_ratio_of_zero_is_the_pipeline_without_controlnet(task: str) -> None:
    calls, latents = latents_of("sdxl", task, 0.0)
    assert not any(controlled(calls))
    scale = [0.0, 0.0] if task == "multi_controlnet" else 0.0
    _, without = latents_of("sdxl", task, 1.0, controlnet_conditioning_scale=scale)
    assert torch.equal(latents, without)
    if task == "controlnet":
        plain = models.build("sdxl", "text2img")
        ah.apply_hidiffusion(plain, task="controlnet")
        assert torch.equal(latents, plain(**models.arguments("sdxl", "text2img", *SMALL)).images)


@pytest.mark.parametrize("task", TASKS)
def test_a_ratio_of_one_runs_them_in_all_steps(task: str) -> None:
    calls, latents = latents_of("sdxl", task, 1.0)
    assert controlled(calls) == [True] * STEPS[task]
    calls, some = latents_of("sdxl", task, 0.6)
    assert controlled(calls) == [step < 0.6 * STEPS[task] for step in range(STEPS[task])]
    assert not torch.equal(latents, some)


def test_control_guidance_ends_earlier_but_not_later() -> None:
    """The pipeline's own range weighs the residuals; beyond the trained share there are none to weigh."""
    _, whole = latents_of("sdxl", "controlnet", 0.6)
    _, later = latents_of("sdxl", "controlnet", 0.6, control_guidance_end=0.8)
    assert torch.equal(later, whole)
    calls, earlier = latents_of("sdxl", "controlnet", 0.6, control_guidance_end=0.3)
    assert not torch.equal(earlier, whole)
    bare = ah.apply_hidiffusion(models.build("sdxl", "text2img").unet, task="controlnet")
    for step, call in enumerate(calls):
        assert torch.equal(replay(bare, call, step, 7), call.out) == (step >= 2), step  # (step + 1) / 7 > 0.3


def test_control_guidance_starts_later() -> None:
    calls, _ = latents_of("sdxl", "controlnet", 0.6, control_guidance_start=0.3)
    bare = ah.apply_hidiffusion(models.build("sdxl", "text2img").unet, task="controlnet")
    for step, call in enumerate(calls):
        assert torch.equal(replay(bare, call, step, 7), call.out) == (step not in (3, 4)), step


@pytest.mark.parametrize(("family", "task"), [("sd15", "controlnet"), ("sdxl", "multi_controlnet")])
def test_with_all_parts_off_controlnets_are_left_alone(family: str, task: str) -> None:
    size, cells = LARGE[family]
    pipe = models.build(family, task)
    _, plain = run(pipe, family, task, size, num_inference_steps=3)
    ah.apply_hidiffusion(pipe, config=HiDiffusionConfig(windowed=False, pooled=False, dilated=False))
    calls, latents = run(pipe, family, task, size, num_inference_steps=3)
    assert torch.equal(latents, plain)
    assert all(controlled(calls))
    for call in calls:
        assert_trained_scale(call, (size[0] // 8, size[1] // 8))
    ah.apply_hidiffusion(pipe)
    calls, latents = run(pipe, family, task, size, num_inference_steps=3)
    assert not torch.equal(latents, plain)
    assert_trained_scale(calls[0], cells)


# ---- driven by hand


def tiny_inputs(width: int = 136) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of a call of the tiny SDXL UNet; with a control image, of its ControlNet."""
    draw = torch.Generator().manual_seed(7)
    added = {"text_embeds": torch.randn(1, 16, generator=draw), "time_ids": torch.randn(1, 6, generator=draw)}
    args = torch.randn(1, 4, 16, width, generator=draw), torch.tensor(500), torch.randn(1, 7, 32, generator=draw)
    return args, {"added_cond_kwargs": added}


@pytest.mark.parametrize("step", [0, 5, 6, 9])
def test_a_controlnet_gives_both_kinds_of_output(step: int) -> None:
    """In a step with ControlNet and in one without, and the UNet takes both."""
    pipe = models.build("sdxl", "controlnet")
    stock = models.build("sdxl", "controlnet").controlnet
    patch = ah.apply_hidiffusion(pipe)
    args, kwargs = tiny_inputs()
    image = torch.rand(1, 3, 128, 1088, generator=torch.Generator().manual_seed(8))
    with torch.no_grad():
        small = F.interpolate(args[0], (8, 128)), *args[1:], F.interpolate(image, (64, 1024))
        wanted = stock(*small, **kwargs)
        with patch.phase(step=step, num_steps=10):
            named = pipe.controlnet(*args, controlnet_cond=image, **kwargs)
            down, mid = pipe.controlnet(*args, image, **kwargs, return_dict=False)
            assert isinstance(named, compat.controlnet_output())
            residuals = {RESIDUALS[0]: named.down_block_res_samples, RESIDUALS[1]: named.mid_block_res_sample}
            out, plain = pipe.unet(*args, **kwargs, **residuals)[0], pipe.unet(*args, **kwargs)[0]
    assert len(named.down_block_res_samples) == len(down) == len(wanted.down_block_res_samples) == 9
    for one, other, stock_one in zip(named.down_block_res_samples, down, wanted.down_block_res_samples, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, stock_one) if step < 6 else not one.any()
    assert torch.equal(named.mid_block_res_sample, mid)
    assert torch.equal(mid, wanted.mid_block_res_sample) if step < 6 else not mid.any()
    assert torch.equal(out, plain) == (step >= 6)


def test_a_controlnet_that_is_called_alone_is_as_unpatched() -> None:
    """Neither in a request nor in a phase."""
    pipe = models.build("sdxl", "controlnet")
    (sample, _, text), kwargs = tiny_inputs(24)
    image = torch.zeros(1, 3, 128, 192)
    with torch.no_grad():
        want = pipe.controlnet(sample, 1234, text, image, **kwargs)
        ah.apply_hidiffusion(pipe)
        got = pipe.controlnet(sample, 1234, text, image, **kwargs)
    assert torch.equal(got.mid_block_res_sample, want.mid_block_res_sample) and want.mid_block_res_sample.any()


# ---- one ControlNet for several kinds of control


def union(pipe: Any) -> Any:
    """A ControlNetUnion of the UNet of a pipeline, whose last convolutions are not zero."""
    parameters = inspect.signature(diffusers.ControlNetUnionModel.__init__).parameters
    config = {name: value for name, value in pipe.unet.config.items() if name in parameters}
    width = config["block_out_channels"][0]
    sizes = {"num_trans_channel": width, "num_proj_channel": width, "num_trans_head": 2, "num_control_type": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = diffusers.ControlNetUnionModel(**config | sizes, conditioning_embedding_out_channels=(8, 8, 8, 8))
        last = [net.controlnet_cond_embedding.conv_out, net.controlnet_mid_block, *net.controlnet_down_blocks]
        for convolution in last:
            nn.init.normal_(convolution.weight, std=0.1)
    return net.eval()


def union_pipeline(several: bool) -> Any:
    base = models.build("sdxl", "text2img")
    nets = [union(base), union(base)] if several else union(base)
    pipe = diffusers.StableDiffusionXLControlNetUnionPipeline(**base.components, controlnet=nets, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("several", [False, True])
def test_controlnet_union(several: bool) -> None:
    """One network with two control images, or two networks with one each."""
    needs.diffusers_class("ControlNetUnionModel")
    size, cells = LARGE["sdxl"]
    request = models.arguments("sdxl", "multi_controlnet", *size)
    request |= {"control_image": request.pop("image"), "control_mode": [0, 1]}
    pipe = union_pipeline(several)
    patch = ah.apply_hidiffusion(pipe)
    assert patch.task == "controlnet" and len(patch.controlnets) == (2 if several else 1)
    with recorded(pipe) as calls:
        pipe(**request)
    assert controlled(calls) == [step < 4.2 for step in range(7)]
    fresh = union_pipeline(several)
    bare = ah.apply_hidiffusion(fresh.unet, task="controlnet")
    for step, call in enumerate(calls):
        plain = replay(bare, call, step, 7)
        if step < 5:
            assert_trained_scale(call, cells)
            nets = zip(controlnets(fresh), call.control, strict=True)
            with adding(bare.unet, *total([by_hand(net, control, cells) for net, control in nets])):
                assert torch.equal(call.out, replay(bare, call, step, 7))
        assert torch.equal(call.out, plain) == (step >= 5)


# ---- whose ControlNet it is


@pytest.mark.parametrize("task", ["controlnet", "multi_controlnet"])
def test_a_controlnet_of_two_pipelines_can_be_patched_with_one_unet_only(
    task: str, snapshot: Any, assert_identical: Any
) -> None:
    first, second = models.build("sdxl", "controlnet"), models.build("sdxl", task, seed=1)
    _, alone = run(second, "sdxl", task)
    if task == "controlnet":
        second.controlnet = first.controlnet
    else:
        second.controlnet.nets[1] = first.controlnet
    parts = (second, second.unet, second.controlnet, first.controlnet)
    clean = [snapshot(part) for part in parts]
    patch = ah.apply_hidiffusion(first)
    _, wanted = run(first, "sdxl", "controlnet")
    before = [snapshot(part) for part in parts]
    for _ in range(2):
        with pytest.raises(AccelHiDiffError, match=r"^controlnet(\.nets\.1)?: this ControlNet is patched[^\n]*$"):
            ah.apply_hidiffusion(second)
        for part, earlier in zip(parts, before, strict=True):
            assert_identical(earlier, snapshot(part))
    assert torch.equal(run(first, "sdxl", "controlnet")[1], wanted)
    patch.remove()
    for part, earlier in zip(parts, clean, strict=True):
        assert_identical(earlier, snapshot(part))
    ah.apply_hidiffusion(second)
    assert not torch.equal(run(second, "sdxl", task)[1], alone)


def test_the_same_pipeline_can_be_patched_again(snapshot: Any, assert_identical: Any) -> None:
    pipe = models.build("sdxl", "multi_controlnet")
    before = snapshot(pipe.unet), snapshot(pipe.controlnet)
    ah.apply_hidiffusion(pipe)
    _, wanted = run(pipe, "sdxl", "multi_controlnet")
    patch = ah.apply_hidiffusion(pipe)
    assert torch.equal(run(pipe, "sdxl", "multi_controlnet")[1], wanted)
    ah.apply_hidiffusion(pipe, config=HiDiffusionConfig(control_ratio=0.0))
    assert not any(controlled(run(pipe, "sdxl", "multi_controlnet")[0]))
    patch.remove()
    ah.remove_hidiffusion(pipe)
    assert_identical(before[0], snapshot(pipe.unet))
    assert_identical(before[1], snapshot(pipe.controlnet))


def test_one_controlnet_may_be_there_twice() -> None:
    """The same network on two control images, as in a stock pipeline."""
    parts = models.build("sdxl", "controlnet").components
    net = parts.pop("controlnet")
    pipe = diffusers.StableDiffusionXLControlNetPipeline(**parts, controlnet=[net, net], add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    ah.apply_hidiffusion(pipe)
    calls, _ = run(pipe, "sdxl", "multi_controlnet")
    assert controlled(calls) == [step < 4.2 for step in range(7)]


def test_an_unpatched_pipeline_that_shares_a_controlnet_is_left_alone() -> None:
    """Another UNet, another scheduler object, the same ControlNet: before and after a request of the patched one."""
    patched, plain = models.build("sdxl", "controlnet"), models.build("sdxl", "controlnet", seed=1)
    plain.controlnet = patched.controlnet
    want = plain(**models.arguments("sdxl", "controlnet", *SMALL)).images
    ah.apply_hidiffusion(patched)
    for _ in range(2):
        assert torch.equal(plain(**models.arguments("sdxl", "controlnet", *SMALL)).images, want)
        run(patched, "sdxl", "controlnet")


def test_an_exchanged_controlnet_is_refused_until_it_is_applied_again() -> None:
    pipe = models.build("sdxl", "controlnet")
    ah.apply_hidiffusion(pipe)
    pipe.controlnet = models.build("sdxl", "controlnet", seed=1).controlnet
    with pytest.raises(ah.PatchConflict, match=r"pipe\.controlnet: .* apply \(or accelerate\) again"):
        run(pipe, "sdxl", "controlnet")
    ah.apply_hidiffusion(pipe)
    run(pipe, "sdxl", "controlnet")


@pytest.mark.filterwarnings("ignore:Passing intrablock residual connections:FutureWarning")
def test_adapter_features_passed_the_old_way_are_resized_too(unet: Any, inputs: Any) -> None:
    """As `down_block_additional_residuals` without one for the mid block."""
    args, kwargs = inputs()
    features = [
        torch.randn(1, 16, 8, 12),
        torch.randn(1, 16, 8, 12),
        torch.randn(1, 16, 4, 6),
        torch.randn(1, 16, 4, 6),
    ]
    patch = ah.apply_hidiffusion(unet)
    for step in (0, 1, 6):
        with torch.no_grad(), patch.phase(step=step, num_steps=7):
            new = unet(*args, **kwargs, down_intrablock_additional_residuals=[f.clone() for f in features]).sample
            old = unet(*args, **kwargs, down_block_additional_residuals=[f.clone() for f in features]).sample
        assert torch.equal(new, old), step
