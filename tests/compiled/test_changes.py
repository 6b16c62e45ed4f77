"""What users change between requests: the image is right after each change, and after it is taken back.

One pipeline is served from a full cache under `on_miss="eager"`, its twin runs eager. Each change is made to both. What
changes weights alone is served compiled, without a compilation; what changes graphs runs eager, with the reason.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

import accel_hidiff as ah
from compile_cache import CompileCache
from tests import models
from tests.accel_hidiff.test_variants import ATTENTION, CONVOLUTIONS, add_lora
from tests.compiled.conftest import STEPS, relative_difference, request

CONFIG = ah.HiDiffusionConfig()
Extra = dict[str, Any]  # what a request then needs besides


class Change(NamedTuple):
    """What is done to a pipeline, how that is taken back (None: not at all), whether compiled graphs still serve."""

    make: Callable[[Any], Extra | None]
    undo: Callable[[Any], Any] | None = None
    served: bool = False
    neutral: bool = False  # the image stays the same


def fuse_lora(pipe: Any) -> None:
    add_lora(pipe.unet, ATTENTION + CONVOLUTIONS, scale=0.5)
    pipe.unet.fuse_lora()


def weights_in_place(pipe: Any) -> None:
    with torch.no_grad():
        pipe.unet.mid_block.attentions[0].proj_out.weight.mul_(3.0)


def take_weights_back(pipe: Any) -> None:
    with torch.no_grad():
        pipe.unet.mid_block.attentions[0].proj_out.weight.div_(3.0)


def new_parameters(pipe: Any) -> None:
    for name, parameter in list(pipe.unet.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        setattr(pipe.unet.get_submodule(owner), leaf, torch.nn.Parameter(parameter.detach() * 1.25))


def assigned_state(pipe: Any) -> None:
    pipe.unet.load_state_dict(models.build("sdxl", "text2img", seed=5).unet.state_dict(), assign=True)


def other_unet(pipe: Any) -> None:
    pipe.unet = models.build("sdxl", "text2img", seed=5).unet


def other_vae(pipe: Any) -> None:
    pipe.vae = models.build("sdxl", "text2img", seed=5).vae


def freeu(pipe: Any) -> None:
    pipe.enable_freeu(s1=0.6, s2=0.4, b1=1.4, b2=1.6)


def ip_adapter(pipe: Any) -> Extra:
    models.with_ip_adapter(pipe)
    return models.ip_adapter_arguments()


def plain_attention(pipe: Any) -> None:
    pipe.unet.set_attn_processor(AttnProcessor())


def offload_hook(pipe: Any) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(pipe.unet.mid_block.resnets[0], hooks.ModelHook())


def remove_offload_hook(pipe: Any) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.remove_hook_from_module(pipe.unet.mid_block.resnets[0])


def put(module: Any, **where: Any) -> None:
    module.to(**where)


def forward_hook(pipe: Any) -> None:
    pipe.test_hook = pipe.unet.mid_block.resnets[0].register_forward_hook(lambda module, args, out: out * 1.5)


CHANGES = {
    "lora loaded": Change(
        lambda pipe: add_lora(pipe.unet, ATTENTION + CONVOLUTIONS), lambda pipe: pipe.unet.unload_lora()
    ),
    "lora fused": Change(fuse_lora, lambda pipe: (pipe.unet.unfuse_lora(), pipe.unet.unload_lora())),
    "weights in place": Change(weights_in_place, take_weights_back, served=True),
    "new parameters": Change(new_parameters, served=True),
    "load_state_dict(assign=True)": Change(assigned_state, served=True),
    "another checkpoint's unet": Change(other_unet, served=True),
    "another vae": Change(other_vae, served=True),
    "attention processors": Change(
        plain_attention, lambda pipe: pipe.unet.set_attn_processor(AttnProcessor2_0()), neutral=True
    ),
    "fused qkv": Change(
        lambda pipe: pipe.fuse_qkv_projections(),
        neutral=True,  # taken back, diffusers leaves the fused layers in place
    ),
    "attention slicing": Change(
        lambda pipe: pipe.enable_attention_slicing(), lambda pipe: pipe.disable_attention_slicing(), neutral=True
    ),
    "freeu": Change(freeu, lambda pipe: pipe.disable_freeu(), served=True),  # it changes features between blocks
    "ip-adapter": Change(ip_adapter),
    "channels_last": Change(
        lambda pipe: put(pipe.unet, memory_format=torch.channels_last),
        lambda pipe: put(pipe.unet, memory_format=torch.contiguous_format),
        neutral=True,
    ),
    "another dtype": Change(lambda pipe: put(pipe, dtype=torch.float64), lambda pipe: put(pipe, dtype=torch.float32)),
    "offload hook": Change(offload_hook, remove_offload_hook, neutral=True),
    "forward hook": Change(forward_hook, lambda pipe: pipe.test_hook.remove()),
}


def image(pipe: Any, **changes: Any) -> torch.Tensor:
    return torch.as_tensor(request(pipe, output_type="pt", **changes)).float()


@pytest.fixture
def twins(cache_dir: Path) -> tuple[Any, Any]:
    """(handle, patched eager pipeline) of the same weights."""
    served, eager = models.build("sdxl", "text2img"), models.build("sdxl", "text2img")
    cache = CompileCache(cache_dir, read_only=True)
    handle = ah.accelerate(served, hidiffusion=CONFIG, cache=cache, on_miss="eager")
    ah.apply_hidiffusion(eager, config=CONFIG)
    return handle, eager


def patched_again(pipe: Any, change: str) -> None:
    """Eager HiDiffusion does not follow another UNet."""
    if change == "another checkpoint's unet":
        with pytest.raises(ah.PatchConflict, match=r"pipe\.unet: expected the UNet"):
            request(pipe)
        ah.apply_hidiffusion(pipe, config=CONFIG)


# One of each kind always; the others are slow.
KINDS = ("lora loaded", "weights in place", "new parameters", "another checkpoint's unet", "another vae", "freeu")


@pytest.mark.parametrize(
    "change", [name if name in KINDS else pytest.param(name, marks=pytest.mark.slow) for name in CHANGES]
)
def test_the_image_is_right_after_a_change_and_after_it_is_taken_back(twins: Any, change: str) -> None:
    handle, eager = twins
    make, undo, served, neutral = CHANGES[change]
    before = image(handle.pipe)
    assert handle.stats.hits == STEPS + 1 and handle.stats.eager_calls == 0
    extra = [make(pipe) or {} for pipe in (handle.pipe, eager)]
    patched_again(eager, change)
    calls = handle.stats.hits, handle.stats.eager_calls
    got = image(handle.pipe, **extra[0])
    assert relative_difference(got, image(eager, **extra[1])) < 5e-3
    assert (relative_difference(got, before) < 1e-3) == neutral
    hits, ran_eager = handle.stats.hits - calls[0], handle.stats.eager_calls - calls[1]
    assert (ran_eager == 0) == served and hits + ran_eager == STEPS + 1 and handle.stats.compiles == 0
    assert served or handle.stats.rejected
    if undo is not None:
        for pipe in (handle.pipe, eager):
            undo(pipe)
        with handle.stats.expect(hits=STEPS + 1, eager_calls=0, compiles=0):
            again = image(handle.pipe)
        assert relative_difference(again, image(eager)) < 5e-3
        assert relative_difference(again, before) < 1e-3


def test_nothing_is_bound_again_while_nothing_changes(twins: Any) -> None:
    handle, _ = twins
    image(handle.pipe)
    with handle.stats.expect(bindings=0, hits=3 * (STEPS + 1), eager_calls=0):
        for _ in range(3):
            image(handle.pipe)


@pytest.mark.parametrize("number", [1, 3])
def test_images_per_prompt_are_served(twins: Any, number: int) -> None:
    handle, eager = twins
    with handle.stats.expect(eager_calls=0, compiles=0):
        got = image(handle.pipe, num_images_per_prompt=number)
    assert len(got) == number and relative_difference(got, image(eager, num_images_per_prompt=number)) < 5e-3


def test_autocast_and_gradients_run_eager_with_the_reason(twins: Any) -> None:
    handle, eager = twins
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_difference(image(handle.pipe), image(eager)) < 5e-3
    assert any("autocast" in reason for reason in handle.stats.rejected) and handle.stats.hits == 0
    with torch.autograd.graph.save_on_cpu():  # the pipeline itself turns gradients off: nothing to refuse
        assert relative_difference(image(handle.pipe), image(eager)) < 5e-3
    assert handle.stats.hits == STEPS + 1


def test_a_change_in_the_middle_of_a_request_waits_for_the_next_one(twins: Any) -> None:
    """A checkpoint that is swapped in by a callback: the running request ends on graphs of one kind."""
    handle, eager = twins

    def swap(pipe: Any, step: int, timestep: Any, kwargs: Any) -> Any:
        if step == 2:
            pipe.unet.load_state_dict(models.build("sdxl", "text2img", seed=5).unet.state_dict())  # in place
        return kwargs

    got = image(handle.pipe, callback_on_step_end=swap)
    assert relative_difference(got, image(eager, callback_on_step_end=swap)) < 5e-3
    assert handle.stats.eager_calls == 0


def test_following_another_unet_can_be_taken_off(twins: Any) -> None:
    handle, _ = twins
    first = handle.pipe.unet
    untouched = {path: set(vars(module)) for path, module in models.build("sdxl", "text2img").unet.named_modules()}
    image(handle.pipe)
    other_unet(handle.pipe)
    image(handle.pipe)
    for unet in (first, handle.remove().unet):
        assert {path: set(vars(module)) for path, module in unet.named_modules()} == untouched


@pytest.mark.slow
def test_lora_graphs_are_never_stale(cache_dir: Path, tmp_path: Path) -> None:
    """With LoRA layers loaded and compiled, their scale is a constant of the graphs, their weights are not."""
    served, eager = models.build("sdxl", "text2img"), models.build("sdxl", "text2img")
    for pipe in (served, eager):
        add_lora(pipe.unet, ATTENTION, scale=2.0)
    handle = ah.accelerate(served, hidiffusion=CONFIG, cache=tmp_path / "cache")
    ah.apply_hidiffusion(eager, config=CONFIG)
    handle.precompile([(128, 192)], STEPS)
    handle._dispatcher.on_miss = "eager"
    with handle.stats.expect(eager_calls=0, compiles=0):
        first = image(served)
    assert relative_difference(first, image(eager)) < 5e-3
    for pipe in (served, eager):  # hot swap: other values in the same layers
        with torch.no_grad():
            for name, parameter in pipe.unet.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(-1.0)
    with handle.stats.expect(eager_calls=0, compiles=0, bindings=0):
        swapped = image(served)
    assert relative_difference(swapped, image(eager)) < 5e-3 and relative_difference(swapped, first) > 5e-3
    for pipe in (served, eager):
        pipe.unet.set_adapters("default", weights=0.25)
    scaled = image(served)
    assert relative_difference(scaled, image(eager)) < 5e-3 and relative_difference(scaled, swapped) > 5e-3
    for pipe in (served, eager):
        pipe.unet.disable_adapters()
    assert relative_difference(image(served), image(eager)) < 5e-3
    for pipe in (served, eager):
        pipe.unet.enable_adapters()
        pipe.unet.set_adapters("default", weights=1.0)
    with handle.stats.expect(eager_calls=0, compiles=0):
        assert relative_difference(image(served), swapped) < 1e-3
    assert copy.copy(handle.stats.rejected)


def test_every_weight_of_the_decoder_counts(twins: Any) -> None:
    """Of up to 8 numbers too: Inductor would make constants of those, a bias of the checkpoint that was compiled."""
    handle, eager = twins
    draw = torch.Generator().manual_seed(2)
    latents = torch.randn(1, 4, 16, 24, generator=draw)
    decoders = handle.pipe.vae.decoder, eager.vae.decoder
    with torch.no_grad(), handle.stats.expect(eager_calls=0):
        for ours, theirs in zip(*(decoder.parameters() for decoder in decoders), strict=True):
            for weight in (ours, theirs):
                weight.mul_(1.1).add_(0.01)
            got, want = (pipe.vae.decode(latents).sample for pipe in (handle.pipe, eager))
            assert relative_difference(got, want) < 1e-3, ours.shape


@pytest.mark.slow
def test_an_artifact_with_weights_in_it_is_not_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accel_hidiff.backends import aot

    monkeypatch.delitem(aot.OPTIONS, "always_keep_tensor_constants")
    aot._factors.cache_clear()
    pipe = models.build("sdxl", "text2img")
    handle = ah.accelerate(pipe, hidiffusion=CONFIG, cache=tmp_path / "cache")
    with torch.no_grad(), pytest.raises(ah.CompileFailed, match=r"vae\.decoder: expected a package that takes all w"):
        pipe.vae.decode(torch.randn(1, 4, 16, 24))
    assert not list(handle.cache.digests())
    monkeypatch.undo()
    aot._factors.cache_clear()
