"""What users do to their models is right under HiDiffusion: LoRA, fused projections, slicing, T2I- and IP-Adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.downsampling import Downsample2D
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import accel_hidiff as ah
from accel_hidiff import HiDiffusionConfig
from accel_hidiff.call import CallScope, UNetCall
from accel_hidiff.forwards import dilated
from accel_hidiff.shifts import window_shifts
from accel_hidiff.topology import Topology
from tests import models

SIZE = 128, 192
# Three steps with all phases: SDXL dilates, pools, and has windows only; SD 1.5 does both, dilates, has windows only.
STEPS = 3
CONFIG = HiDiffusionConfig(t1_ratio=2 / 3, t2_ratio=1 / 3)
DILATED = {"sdxl": "down_blocks.1.downsamplers.0", "sd15": "down_blocks.0.downsamplers.0"}
FAMILIES = tuple(DILATED)


def latents(pipe: Any, family: str, **changes: Any) -> Tensor:
    """Of one request."""
    request = {"num_inference_steps": STEPS, **changes}
    return pipe(**models.arguments(family, "text2img", *SIZE, **request)).images


def unet_inputs(unet: Any, height: int = 16, width: int = 24) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of a call of a tiny UNet, seeded."""
    draw = torch.Generator().manual_seed(3)
    args = torch.randn(1, 4, height, width, generator=draw), torch.tensor(500), torch.randn(1, 7, 32, generator=draw)
    if unet.config.addition_embed_type is None:
        return args, {}
    added = {"text_embeds": torch.randn(1, 16, generator=draw), "time_ids": torch.randn(1, 6, generator=draw)}
    return args, {"added_cond_kwargs": added}


def run_step(patch: Any, step: int, size: tuple[int, int] = (16, 24), **changes: Any) -> Tensor:
    """The output of the UNet in a step of STEPS."""
    args, kwargs = unet_inputs(patch.unet, *size)
    shifts = [number % 4 for number in range(len(patch.windowed_blocks))]
    with torch.no_grad(), patch.phase(step=step, num_steps=STEPS, window_shifts=shifts):
        return patch.unet(*args, **kwargs, **changes)[0]


def assert_near(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert (got - want).abs().max() <= tolerance * want.abs().max()


def assert_far(got: Tensor, want: Tensor) -> None:
    assert (got - want).abs().max() > 1e-2 * want.abs().max()


# ---- the dilated downsampler


def convolution(channels: int, bias: bool) -> Downsample2D:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(channels)
        return Downsample2D(channels, use_conv=True, out_channels=channels + 1, padding=1, name="op", bias=bias)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 3), st.booleans())
def test_the_dilated_downsampler_is_the_dilated_convolution(height: int, width: int, batch: int, bias: bool) -> None:
    module = convolution(5, bias)
    image = torch.randn(batch, 5, height, width, generator=torch.Generator().manual_seed(height * 41 + width))
    scope = CallScope()
    forward = dilated(module.forward, scope)
    with torch.no_grad():
        wanted = F.conv2d(image, module.conv.weight, module.conv.bias, stride=4, padding=2, dilation=2)
        with scope.opened(UNetCall(Topology(dilated=True))):
            got = forward(image)
        assert got.shape == wanted.shape
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
        plain = module(image)
        with scope.opened(UNetCall(Topology(windowed=True, pooled=True))):
            assert torch.equal(forward(image), plain)
        assert torch.equal(forward(image), plain), "outside of any call"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_downsamplers_of_a_patched_unet(family: str) -> None:
    """The one of the family is dilated, in its steps only."""
    patch = ah.apply_hidiffusion(models.build(family, "text2img").unet, config=CONFIG)
    downsamplers = [module for module in patch.unet.modules() if isinstance(module, Downsample2D)]
    seen: list[tuple[Downsample2D, Tensor, Tensor]] = []
    for module in downsamplers:
        module.register_forward_hook(lambda module, args, out: seen.append((module, args[0], out)))
    for step in range(STEPS):
        seen.clear()
        run_step(patch, step, (17, 21))
        assert [module for module, _, _ in seen] == downsamplers
        for module, image, out in seen:
            ours = module is patch.unet.get_submodule(DILATED[family])
            changed = ours and patch.plan(17 * 8, 21 * 8, STEPS).at(step).dilated
            stride = {"stride": 4, "padding": 2, "dilation": 2} if changed else {"stride": 2, "padding": 1}
            assert_near(out, F.conv2d(image, module.conv.weight, module.conv.bias, **stride), 1e-5)


# ---- LoRA


def add_lora(unet: Any, targets: list[str], scale: float = 2.0) -> None:
    """LoRA layers, none of them zero, on the modules whose name ends in one of the targets."""
    peft = pytest.importorskip("peft", reason="LoRA layers need peft")
    unet.add_adapter(peft.LoraConfig(r=2, lora_alpha=2 * scale, target_modules=targets))
    draw = torch.Generator().manual_seed(5)
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2, generator=draw)
    unet.eval()


def fuse_by_hand(unet: Any, path: str, layer: Any, scale: float = 2.0) -> None:
    """Adds the product of a LoRA layer's convolutions to the weight of a plain one."""
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    weight = unet.get_submodule(path).weight
    with torch.no_grad():
        weight += scale * torch.einsum("or,rihw->oihw", up[:, :, 0, 0], down)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("when", ["before", "while patched"])
def test_lora_on_the_dilated_downsampler_is_a_changed_weight(family: str, when: str) -> None:
    path = f"{DILATED[family]}.conv"
    unet, fused = (models.build(family, "text2img").unet for _ in range(2))
    if when == "before":
        add_lora(unet, [path])
    patch = ah.apply_hidiffusion(unet, config=CONFIG)
    without = [run_step(patch, step) for step in range(STEPS)]
    if when != "before":
        add_lora(unet, [path])
    fuse_by_hand(fused, path, unet.get_submodule(path))
    by_hand = ah.apply_hidiffusion(fused, config=CONFIG)
    assert [patch.plan(*SIZE, STEPS).at(step).dilated for step in range(STEPS)] == (
        [True, False, False] if family == "sdxl" else [True, True, False]
    )
    for step in range(STEPS):
        got = run_step(patch, step)
        assert_near(got, run_step(by_hand, step), 1e-5)
        if when != "before":
            assert_far(got, without[step])


ATTENTION, CONVOLUTIONS = ["to_q", "to_k", "to_v", "to_out.0"], ["conv1", "conv2", "conv"]


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_everywhere_is_changed_weights(family: str) -> None:
    """peft adds the layers to the weights themselves, while patched, and takes them out again."""
    pipe = models.build(family, "text2img")
    pipe.unet.requires_grad_(False)  # as LoRA layers do: torch chooses a convolution's kernel by it
    ah.apply_hidiffusion(pipe, config=CONFIG)
    without = latents(pipe, family)
    add_lora(pipe.unet, ATTENTION + CONVOLUTIONS, scale=0.5)
    layers = latents(pipe, family)
    assert_far(layers, without)
    pipe.unet.disable_adapters()
    assert torch.equal(latents(pipe, family), without)
    pipe.unet.enable_adapters()
    assert torch.equal(latents(pipe, family), layers)
    pipe.unet.fuse_lora()
    assert_near(latents(pipe, family), layers, 1e-4)
    pipe.unet.unfuse_lora()
    assert_near(latents(pipe, family), layers, 1e-4)
    pipe.unet.unload_lora()
    assert_near(latents(pipe, family), without, 1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_request_may_weigh_the_lora(family: str) -> None:
    """`cross_attention_kwargs={"scale": ...}`, which a UNet's forward handles itself."""
    strong, weak = models.build(family, "text2img"), models.build(family, "text2img")
    add_lora(strong.unet, ATTENTION + CONVOLUTIONS, scale=2.0)
    add_lora(weak.unet, ATTENTION + CONVOLUTIONS, scale=1.0)
    for pipe in (strong, weak):
        ah.apply_hidiffusion(pipe, config=CONFIG)
    wanted = latents(weak, family)
    assert_near(latents(strong, family, cross_attention_kwargs={"scale": 0.5}), wanted, 1e-5)
    assert_far(latents(strong, family), wanted)


# ---- other variants of the whole model


def with_lora(pipe: Any) -> dict[str, Any]:
    add_lora(pipe.unet, ATTENTION + CONVOLUTIONS)
    return {}


def with_fused_qkv(pipe: Any) -> dict[str, Any]:
    pipe.fuse_qkv_projections()
    return {}


def with_slicing(pipe: Any) -> dict[str, Any]:
    pipe.enable_attention_slicing()
    return {}


def with_ip_adapter(pipe: Any) -> dict[str, Any]:
    models.with_ip_adapter(pipe)
    return models.ip_adapter_arguments()


Change = Callable[[Any], dict[str, Any]]  # gives what a request then needs besides
NEUTRAL: dict[str, Change] = {"fused qkv": with_fused_qkv, "attention slicing": with_slicing}
CHANGES: dict[str, Change] = {**NEUTRAL, "lora": with_lora, "ip-adapter": with_ip_adapter}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_while_patched_is_the_change_before(family: str, change: str) -> None:
    """And where a change should not change the image, it does not."""
    first = models.build(family, "text2img")
    extra = CHANGES[change](first)
    ah.apply_hidiffusion(first, config=CONFIG)
    before = latents(first, family, **extra)
    second = models.build(family, "text2img")
    ah.apply_hidiffusion(second, config=CONFIG)
    without = latents(second, family)
    CHANGES[change](second)
    assert torch.equal(latents(second, family, **extra), before)
    if change in NEUTRAL:
        assert_near(before, without, 1e-4)
    else:
        assert_far(before, without)


def test_the_neutral_changes_took_place() -> None:
    """Otherwise equal images would show nothing."""
    pipe = models.build("sdxl", "text2img")
    attention = pipe.unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1
    processors = {type(attention.processor)}
    for change in NEUTRAL.values():
        change(pipe)
        processors.add(type(attention.processor))
    assert len(processors) == 1 + len(NEUTRAL)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_ip_adapter_of_no_weight_changes_nothing(family: str) -> None:
    pipe = models.build(family, "text2img")
    ah.apply_hidiffusion(pipe, config=CONFIG)
    without = latents(pipe, family)
    extra = with_ip_adapter(pipe)
    pipe.set_ip_adapter_scale(0.0)
    assert_near(latents(pipe, family, **extra), without, 1e-4)
    pipe.set_ip_adapter_scale(1.0)
    assert_far(latents(pipe, family, **extra), without)


# ---- T2I-Adapters

FEATURES = "down_intrablock_additional_residuals"


@contextmanager
def adding(unet: Any, features: list[Tensor]) -> Iterator[None]:
    """Adds an adapter's features by hooks, each resized to what it is added to, where diffusers adds them: behind the
    last attention of a down block, or behind a block without any, then behind the middle block."""

    def resized(feature: Tensor, like: Tensor) -> Tensor:
        return F.interpolate(feature, like.shape[-2:], mode="bicubic", align_corners=False)

    left = list(features)

    def behind_attention(module: Any, args: Any, out: tuple[Tensor]) -> tuple[Tensor]:
        return (out[0] + resized(left.pop(0), out[0]),)

    def behind_block(module: Any, args: Any, out: tuple[Tensor, Any]) -> None:
        out[0].add_(resized(left.pop(0), out[0]))  # in place: the skip has it too

    def behind_middle(module: Any, args: Any, out: Tensor) -> Tensor:
        return out + resized(left.pop(0), out) if left else out

    handles = [unet.mid_block.register_forward_hook(behind_middle)]
    for block in unet.down_blocks:
        if getattr(block, "has_cross_attention", False):
            handles.append(block.attentions[-1].register_forward_hook(behind_attention))
        else:
            handles.append(block.register_forward_hook(behind_block))
    try:
        yield
        assert not left, "every feature is added"
    finally:
        for handle in handles:
            handle.remove()


def adapter_features(family: str, height: int, width: int) -> list[Tensor]:
    """Of the sizes that a full T2I-Adapter of the family gives for a latent size, which are those of the stock UNet."""
    divisors = {"sdxl": (2, 2, 4, 4), "sd15": (1, 2, 4, 8)}[family]
    draw = torch.Generator().manual_seed(9)
    return [torch.randn(1, 16, -(-height // d), -(-width // d), generator=draw) for d in divisors]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("windowed", [True, False])
@pytest.mark.parametrize("size", [(16, 24), (18, 26), (17, 21)])
def test_adapter_features_are_resized_to_what_they_are_added_to(
    family: str, windowed: bool, size: tuple[int, int]
) -> None:
    """In every topology."""
    config = CONFIG.replace(windowed=windowed)
    patch = ah.apply_hidiffusion(models.build(family, "text2img").unet, config=config)
    features = adapter_features(family, *size)
    plan = patch.plan(8 * size[0], 8 * size[1], STEPS)
    seen = [str(plan.at(step)).replace("windowed+", "") for step in range(STEPS)]
    last = "windowed" if windowed else "plain"
    assert seen == {"sdxl": ["dilated", "pooled", last], "sd15": ["pooled+dilated", "dilated", last]}[family]
    for step in range(STEPS):
        given = [feature.clone() for feature in features]
        got = run_step(patch, step, size, **{FEATURES: given})
        assert len(given) == len(features) and all(map(torch.equal, given, features)), "they are the caller's"
        plain = run_step(patch, step, size)
        with adding(patch.unet, features):
            assert torch.equal(got, run_step(patch, step, size)), step
        assert_far(got, plain)


@pytest.mark.parametrize("size", [(128, 192), (144, 208)])
def test_a_pipeline_with_an_adapter_runs_in_all_phases(size: tuple[int, int]) -> None:
    pipe = models.build_adapter()
    patch = ah.apply_hidiffusion(pipe, config=CONFIG)
    calls: list[tuple[Any, dict[str, Any], Tensor]] = []
    pipe.unet.register_forward_hook(
        lambda _, args, kwargs, out: calls.append((args, kwargs, out[0].clone())), with_kwargs=True
    )
    request = models.arguments("sdxl", "controlnet", *size, num_inference_steps=4)
    found = pipe(**request, adapter_conditioning_factor=0.75, adapter_conditioning_scale=5.0).images
    assert found.isfinite().all() and len(calls) == 4
    bare = ah.apply_hidiffusion(models.build_adapter().unet, config=CONFIG)
    with torch.no_grad():
        features = pipe.adapter(pixels(request["image"]))
    phases = set()
    for step, (args, kwargs, out) in enumerate(calls):
        phases.add(str(patch.plan(*size, 4).at(step)))
        passed = kwargs.pop(FEATURES)
        with torch.no_grad(), bare.phase(step=step, num_steps=4, window_shifts=window_shifts(0, step, 5)):
            plain = bare.unet(*args, **kwargs)[0]
            if step == 3:
                assert passed is None and torch.equal(out, plain)
                continue
            for one, feature in zip(passed, features, strict=True):
                torch.testing.assert_close(one[-1:], 5 * feature, rtol=1e-5, atol=1e-5)
            with adding(bare.unet, passed):
                assert torch.equal(out, bare.unet(*args, **kwargs)[0])
        assert_far(out, plain)
    assert phases == {"windowed+dilated", "windowed+pooled", "windowed"}


def pixels(image: Any) -> Tensor:
    """A picture as the pipelines give it to an adapter."""
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return values.reshape(1, image.height, image.width, 3).permute(0, 3, 1, 2) / 255


def test_an_adapter_of_sd15_runs_in_all_phases() -> None:
    """One that sees the picture at the latents' own size."""
    base = models.build("sd15", "text2img")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapter = diffusers.T2IAdapter(channels=[16] * 4, num_res_blocks=1, downscale_factor=8)
    parts = {name: part for name, part in base.components.items() if name != "image_encoder"}
    pipe = diffusers.StableDiffusionAdapterPipeline(**parts, adapter=adapter.eval(), requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)

    def run(scale: float) -> Tensor:
        request = models.arguments("sd15", "controlnet", *SIZE, num_inference_steps=STEPS)
        return pipe(**request, adapter_conditioning_scale=scale).images

    plain = run(5.0)
    patch = ah.apply_hidiffusion(pipe, config=CONFIG)
    assert len(patch.plan(*SIZE, STEPS).topologies) == 3
    adapted, without = run(5.0), run(0.0)
    ah.apply_hidiffusion(base, config=CONFIG)
    assert torch.equal(without, latents(base, "sd15"))
    assert_far(adapted, without)
    assert_far(adapted, plain)
