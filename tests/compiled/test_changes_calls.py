"""What a request brings with it, and what stands around the models: right images, the reason where it runs eager.

Compared with an eager twin, as in `test_changes`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.hooks import apply_group_offloading

import accel_hidiff as ah
from tests import models
from tests.compiled.conftest import CONFIG, STEPS, accelerate_strict, image, relative_difference, request

CPU = torch.device("cpu")


def assert_same(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape and relative_difference(got, want) < 5e-3


@pytest.mark.parametrize("number", [1, 3])
def test_images_per_prompt_are_served(twins: Any, number: int) -> None:
    handle, eager = twins
    with handle.stats.expect(eager_calls=0, compiles=0):
        got = image(handle.pipe, num_images_per_prompt=number)
    assert len(got) == number
    assert_same(got, image(eager, num_images_per_prompt=number))


def test_batch_sizes_are_served_one_after_the_other(twins: Any) -> None:
    """With and without guidance, 1 to 8 samples in the UNet, from the graphs of one range; larger ones run eager."""
    handle, eager = twins
    for prompts, guidance_scale in ((1, 5.0), (4, 5.0), (3, 0.0), (1, 0.0), (2, 5.0)):
        options: Any = {"num_images_per_prompt": prompts, "guidance_scale": guidance_scale}
        with handle.stats.expect(eager_calls=0, compiles=0, hits=STEPS + 1):
            got = image(handle.pipe, **options)
        assert_same(got, image(eager, **options))
    with handle.stats.expect(eager_calls=STEPS, hits=1, compiles=0):
        got = image(handle.pipe, num_images_per_prompt=5)
    assert_same(got, image(eager, num_images_per_prompt=5))
    assert any("batch" in reason for reason in handle.stats.rejected)


@pytest.mark.parametrize("tokens", [1, 76, 154, 1024])
def test_text_length_other_than_77_is_served(twins: Any, tokens: int) -> None:
    handle, eager = twins
    draw = torch.Generator().manual_seed(tokens)
    width = handle.pipe.unet.config.cross_attention_dim
    pooled = handle.pipe.text_encoder_2.config.projection_dim
    options = {
        "prompt_embeds": torch.randn(1, tokens, width, generator=draw),
        "negative_prompt_embeds": torch.randn(1, tokens, width, generator=draw),
        "pooled_prompt_embeds": torch.randn(1, pooled, generator=draw),
        "negative_pooled_prompt_embeds": torch.randn(1, pooled, generator=draw),
    }

    def run(pipe: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        size: Any = {"height": 128, "width": 192, "num_inference_steps": STEPS, "output_type": "pt"}
        return pipe(**options, **size, generator=generator).images

    image(handle.pipe)
    with handle.stats.expect(eager_calls=0, compiles=0, bindings=0):
        got = run(handle.pipe)
    assert_same(got, run(eager))


def test_autocast_on_runs_eager_with_the_reason(twins: Any) -> None:
    handle, eager = twins
    image(handle.pipe)
    with handle.stats.expect(hits=0, eager_calls=STEPS + 1), torch.autocast("cpu", torch.bfloat16):
        got = image(handle.pipe)
        assert_same(got, image(eager))
    assert {reason.split(",")[0] for reason in handle.stats.rejected} == {"autocast is on"}
    with handle.stats.expect(hits=STEPS + 1):
        assert relative_difference(image(handle.pipe), got) > 1e-4


def test_grad_mode_on_runs_eager_with_the_reason(twins: Any) -> None:
    """The pipeline's own call turns gradients off; its undecorated one is what people call to keep them."""
    handle, eager = twins
    call = type(handle.pipe).__call__.__wrapped__

    def latents(pipe: Any) -> torch.Tensor:
        return request(lambda *args, **kwargs: call(pipe, *args, **kwargs))

    image(handle.pipe)
    with torch.enable_grad(), handle.stats.expect(hits=0, eager_calls=STEPS):
        got = latents(handle.pipe)
        assert got.requires_grad
        assert_same(got.detach(), latents(eager).detach())
    assert any(reason.startswith("gradients are on") for reason in handle.stats.rejected)
    with torch.no_grad(), handle.stats.expect(hits=STEPS):
        assert_same(latents(handle.pipe), got.detach())


def test_t2i_adapter_features_are_served_and_its_scale_compiles_nothing(cache_dir: Path) -> None:
    eager, pipe = models.build_adapter(), models.build_adapter()
    ah.apply_hidiffusion(eager, config=CONFIG)
    handle = accelerate_strict(pipe, cache_dir)

    def run(pipe: Any, scale: float) -> torch.Tensor:
        chosen = models.arguments("sdxl", "controlnet", 128, 192, adapter_conditioning_scale=scale)
        return pipe(**chosen).images

    images = []
    for scale in (1.0, 0.0, 2.0):
        with handle.stats.expect(eager_calls=0, compiles=0, hits=STEPS):
            images.append(run(pipe, scale))
        assert_same(images[-1], run(eager, scale))
    assert relative_difference(images[0], images[1]) > 5e-3 and relative_difference(images[0], images[2]) > 5e-3


def test_device_move_is_refused_while_the_weights_are_elsewhere(cache_dir: Path) -> None:
    """To the one other device that every machine has, and back: bound anew, nothing is compiled."""
    pipe = models.build("sdxl", "text2img")
    handle = accelerate_strict(pipe, cache_dir)
    before = image(pipe)
    state = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    pipe.unet.to_empty(device="meta")
    with pytest.raises(ah.GraphMiss, match=r"the weights are on meta, the sample on cpu"):
        image(pipe)
    pipe.unet.to_empty(device="cpu")
    pipe.unet.load_state_dict(state)
    with handle.stats.expect(compiles=0, eager_calls=0, hits=STEPS + 1, loads=0):
        assert torch.equal(image(pipe), before)


# CPU offload. Its hooks move weights at every call; the twin has none.


def leaf_hook(pipe: Any) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(pipe.unet.mid_block.resnets[0], hooks.ModelHook())


def remove_leaf_hook(pipe: Any) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.remove_hook_from_module(pipe.unet.mid_block.resnets[0])


def sequential(pipe: Any) -> None:
    pytest.importorskip("accelerate").cpu_offload(pipe.unet, execution_device=CPU)


def remove_sequential(pipe: Any) -> None:
    pytest.importorskip("accelerate.hooks").remove_hook_from_submodules(pipe.unet)


def model_offload(pipe: Any) -> None:
    pytest.importorskip("accelerate")
    pipe.enable_model_cpu_offload(device="cpu")


def group(kind: str, **options: Any) -> Callable[[Any], None]:
    def offload(pipe: Any) -> None:
        apply_group_offloading(pipe.unet, onload_device=CPU, offload_device=CPU, offload_type=kind, **options)

    return offload


OFFLOAD: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any] | None, str, int]] = {
    "accelerate, a hook on a block": (leaf_hook, remove_leaf_hook, "the class's own forward|no offload hook", 1),
    "accelerate, sequential": (sequential, remove_sequential, "the weights are on meta", 1),
    "diffusers, enable_model_cpu_offload": (
        model_offload,
        lambda pipe: pipe.remove_all_hooks(),
        r"the model has a hook \(_hf_hook\)",
        0,
    ),
    "diffusers, group offloading, leaves": (group("leaf_level"), None, "no offload hook, got _diffusers_hook", 1),
    "diffusers, group offloading, blocks": (
        group("block_level", num_blocks_per_group=1),
        None,
        r"the model has a hook \(_diffusers_hook\)",
        1,
    ),
}


@pytest.mark.parametrize("kind", OFFLOAD)
def test_cpu_offload_hooks_run_eager_with_the_reason(twins: Any, kind: str) -> None:
    handle, eager = twins
    offload, remove, reason, decoded = OFFLOAD[kind]
    want = image(eager)
    assert_same(image(handle.pipe), want)
    offload(handle.pipe)
    for _ in range(2):  # model offload takes its hooks off and on again after each request
        with handle.stats.expect(eager_calls=STEPS + 1 - decoded, hits=decoded, compiles=0):
            assert_same(image(handle.pipe), want)
    handle_reasons = " | ".join(handle.stats.rejected)
    assert re.search(reason, handle_reasons), handle_reasons
    if remove is not None:
        remove(handle.pipe)
        with handle.stats.expect(eager_calls=0, hits=STEPS + 1, compiles=0):
            assert_same(image(handle.pipe), want)


def test_cpu_offload_that_was_there_first_is_refused(cache_dir: Path) -> None:
    """diffusers would take the patch off with its hooks after the first request."""
    pipe = models.build("sdxl", "text2img")
    model_offload(pipe)
    with pytest.raises(ah.PatchConflict, match=r"expected no CPU offload yet.*remove_all_hooks"):
        accelerate_strict(pipe, cache_dir)
    with pytest.raises(ah.PatchConflict, match="expected no CPU offload yet"):
        ah.apply_hidiffusion(pipe)
    pipe.remove_all_hooks()
    handle = accelerate_strict(pipe, cache_dir)
    with handle.stats.expect(eager_calls=0):
        image(pipe)


def test_a_patch_that_something_took_off_is_noticed(twins: Any) -> None:
    for pipe in (twins[0].pipe, twins[1]):
        del vars(pipe.unet)["forward"]
        with pytest.raises(ah.PatchConflict, match=r"pipe\.unet\.forward: expected HiDiffusion's, got the UNet's own"):
            image(pipe)
