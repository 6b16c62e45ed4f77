"""Every family and task in its stock diffusers pipeline: precompiled, served strictly, and equal to patched eager."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import accel_hidiff as ah
from compile_cache import CompileCache
from tests import models
from tests.compiled.conftest import accelerate_strict, relative_difference

# (height, width), not square. The SD 1.5 layout has a level more, whose feature maps would be one cell at SDXL's size.
SIZES = {"sd15": (256, 320), "sd21": (256, 320)}
SIZE = 128, 192
PER_CALL, FINAL = 1e-3, 5e-3


@contextmanager
def outputs_of(*modules: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """The first output tensor of every call of the modules."""
    seen: list[torch.Tensor] = []
    hooks = [module.register_forward_hook(lambda _, __, out: seen.append(out[0].clone())) for module in modules]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def run(pipe: Any, family: str, task: str, **changes: Any) -> tuple[list[torch.Tensor], torch.Tensor]:
    """(output of every UNet call, final latents) of one request."""
    height, width = changes.pop("size", SIZES.get(family, SIZE))
    with outputs_of(pipe.unet) as calls:
        latents = pipe(**models.arguments(family, task, height, width, **changes)).images
    return calls, latents


def precompile(family: str, task: str, cache: Path, **options: Any) -> Any:
    """Precompiles a request of the pair; returns the report."""
    height, width = options.pop("size", SIZES.get(family, SIZE))
    asked = models.arguments(family, task, height, width)
    handle = ah.accelerate(models.build(family, task), hidiffusion=ah.HiDiffusionConfig(), cache=cache, **options)
    strength = asked.get("strength", 1.0)
    return handle.precompile([(height, width)], asked["num_inference_steps"], strength=strength)


def assert_agree(got: tuple[list[torch.Tensor], torch.Tensor], want: tuple[list[torch.Tensor], torch.Tensor]) -> None:
    assert len(got[0]) == len(want[0]) > 0
    for call, (one, other) in enumerate(zip(got[0], want[0], strict=True)):
        assert relative_difference(one, other) < PER_CALL, call
    assert relative_difference(got[1], want[1]) < FINAL


@pytest.mark.parametrize(("family", "task"), models.PAIRS)
def test_a_stock_pipeline_is_served_as_patched_eager(family: str, task: str, families_cache: Path) -> None:
    precompile(family, task, families_cache)
    plain = models.build(family, task)
    unpatched = run(plain, family, task)
    ah.apply_hidiffusion(plain)
    want = run(plain, family, task)
    assert relative_difference(want[1], unpatched[1]) > 5 * FINAL, "the patch is seen in the image"
    handle = accelerate_strict(models.build(family, task), families_cache)
    with handle.stats.expect(compiles=0, eager_calls=0, misses=0):
        got = run(handle.pipe, family, task)
    assert_agree(got, want)


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sdxl_turbo"])
def test_batches_with_and_without_guidance_are_served(family: str, families_cache: Path) -> None:
    precompile(family, "text2img", families_cache)
    eager, handle = models.build(family, "text2img"), None
    ah.apply_hidiffusion(eager)
    handle = accelerate_strict(models.build(family, "text2img"), families_cache)
    for scale in (0.0, 5.0):
        with handle.stats.expect(compiles=0, eager_calls=0):
            got = run(handle.pipe, family, "text2img", guidance_scale=scale)
        want = run(eager, family, "text2img", guidance_scale=scale)
        assert {call.shape[0] for call in got[0]} == {2 if scale else 1}
        assert_agree(got, want)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_the_conditioning_scale_of_a_controlnet_compiles_nothing(family: str, families_cache: Path) -> None:
    precompile(family, "controlnet", families_cache)
    eager = models.build(family, "controlnet")
    ah.apply_hidiffusion(eager)
    handle = accelerate_strict(models.build(family, "controlnet"), families_cache)
    images = []
    for scale in (0.3, 1.0):
        with handle.stats.expect(compiles=0, eager_calls=0):
            got = run(handle.pipe, family, "controlnet", controlnet_conditioning_scale=scale)
        assert_agree(got, run(eager, family, "controlnet", controlnet_conditioning_scale=scale))
        images.append(got[1])
    assert relative_difference(images[0], images[1]) > 10 * FINAL


def test_controlnet_blocks_share_artifacts_with_the_unet(families_cache: Path, tmp_path: Path) -> None:
    """At its trained scale, which is smaller than the request: 576 x 640 pixels are 72 x 80 cells, run at 56 x 64."""
    size = 576, 640
    precompile("sd15", "text2img", families_cache)
    assert precompile("sd15", "controlnet", families_cache, size=size).compiled == 0
    handle = accelerate_strict(models.build("sd15", "controlnet"), families_cache)
    eager = models.build("sd15", "controlnet")
    ah.apply_hidiffusion(eager)
    seen: list[torch.Size] = []
    for pipe in (handle.pipe, eager):
        with outputs_of(pipe.controlnet.conv_in) as calls:
            run(pipe, "sd15", "controlnet", size=size, num_inference_steps=5)
        seen.append(calls[0].shape[-2:])
        assert len(calls) == 3 + 1, "the first 60 % of five steps, of which PNDM's first is two calls"
    assert seen == [(56, 64), (56, 64)]


def test_two_ratios_share_all_artifacts(families_cache: Path) -> None:
    for ratios in ({"t1_ratio": 0.9, "t2_ratio": 0.5}, {"window_shifts": "per_step"}, {"aggressive": False}):
        config = ah.HiDiffusionConfig(**ratios)
        handle = ah.accelerate(models.build("sdxl", "text2img"), hidiffusion=config, cache=families_cache)
        assert handle.precompile([SIZE], 7).compiled == 0


def test_adapter_features_are_resized_and_served(families_cache: Path) -> None:
    """T2I-Adapter features enter between the blocks."""
    precompile("sdxl", "text2img", families_cache)
    eager, pipe = models.build_adapter(), models.build_adapter()
    patch = ah.apply_hidiffusion(eager)
    assert (patch.family.name, patch.task) == ("sdxl", "text2img")
    handle = accelerate_strict(pipe, families_cache)
    with handle.stats.expect(compiles=0, eager_calls=0):
        got = run(pipe, "sdxl", "controlnet")
    want = run(eager, "sdxl", "controlnet")
    assert_agree(got, want)
    without = run(eager, "sdxl", "controlnet", adapter_conditioning_scale=0.0)
    assert relative_difference(want[1], without[1]) > FINAL


def test_ip_adapter_images_reach_the_patched_unet_and_run_eager(families_cache: Path) -> None:
    """Its attention has weights of its own, which no graph has: served eager with the reason, or refused."""
    precompile("sdxl", "text2img", families_cache)
    pipe = models.with_ip_adapter(models.build("sdxl", "text2img"))
    asked = models.ip_adapter_arguments(0, guided=True)
    ah.apply_hidiffusion(pipe)
    want = run(pipe, "sdxl", "text2img", **asked)
    ah.remove_hidiffusion(pipe)
    cache = CompileCache(families_cache, read_only=True)
    handle = ah.accelerate(pipe, hidiffusion=ah.HiDiffusionConfig(), cache=cache, on_miss="eager")
    got = run(pipe, "sdxl", "text2img", **asked)
    assert_agree(got, want)
    (reason,) = handle.stats.rejected
    assert "image_embeds" in reason and handle.stats.hits == 0
