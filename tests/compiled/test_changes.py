"""What users change between requests: the image is right after each change, and after it is taken back.

One pipeline is served from a full cache under `on_miss="eager"`, its twin runs eager. Each change is made to both. What
changes weights alone is served compiled, without a compilation; what changes graphs runs eager, with the reason. LoRA
has a file of its own, `test_changes_lora`, and so has what a request brings with it, `test_changes_calls`.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch.multiprocessing.reductions import StorageWeakRef

import accel_hidiff as ah
from tests import models
from tests.compiled.conftest import CONFIG, STEPS, image, relative_difference, request
from tests.conftest import BOUND

Extra = dict[str, Any]  # what a request then needs besides


class Change(NamedTuple):
    """What is done to a pipeline, and what comes of it."""

    make: Callable[[Any], Extra | None]
    undo: Callable[[Any], Any] | None = None  # None: it cannot be taken back
    reason: str | None = None  # why it runs eager; None: compiled graphs serve on
    bindings: bool = False  # weights are bound anew
    neutral: bool = False  # the image stays the same
    fewer: bool = False  # not all graphs are run: diffusers' forwards are, between them


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


def state_in_place(pipe: Any) -> None:
    pipe.unet.load_state_dict(models.build("sdxl", "text2img", seed=5).unet.state_dict())


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


def put(module: Any, **where: Any) -> None:
    module.to(**where)


def forward_hook(pipe: Any) -> None:
    pipe.test_hook = pipe.unet.mid_block.resnets[0].register_forward_hook(lambda module, args, out: out * 1.5)


def other_text_encoder(pipe: Any) -> None:
    pipe.text_encoder = models.build("sdxl", "text2img", seed=5).text_encoder


NOT_IN_CACHE = "to fill the gap: accel-hidiff precompile"
CHANGES = {
    "weights changed in place": Change(weights_in_place, take_weights_back),
    "weights replaced by new Parameter objects": Change(new_parameters, bindings=True),
    "load_state_dict(assign=True)": Change(assigned_state, bindings=True),
    "load_state_dict of another checkpoint": Change(state_in_place),
    "unet replaced by the user with another checkpoint": Change(other_unet, bindings=True),
    "vae replaced by the user": Change(other_vae, bindings=True),
    "text encoder replaced by the user": Change(other_text_encoder),
    "attention processors": Change(
        plain_attention,
        lambda pipe: pipe.unet.set_attn_processor(AttnProcessor2_0()),
        reason=NOT_IN_CACHE,
        neutral=True,
    ),
    "fused qkv": Change(
        lambda pipe: pipe.fuse_qkv_projections(),
        reason=NOT_IN_CACHE,
        neutral=True,  # taken back, diffusers leaves the fused layers in place
    ),
    "attention slicing": Change(
        lambda pipe: pipe.enable_attention_slicing(),
        lambda pipe: pipe.disable_attention_slicing(),
        reason=NOT_IN_CACHE,
        neutral=True,
    ),
    "freeu": Change(freeu, lambda pipe: pipe.disable_freeu(), bindings=True, fewer=True),
    "ip-adapter": Change(ip_adapter, reason="the call passes image_embeds"),
    "channels_last": Change(
        lambda pipe: put(pipe.unet, memory_format=torch.channels_last),
        lambda pipe: put(pipe.unet, memory_format=torch.contiguous_format),
        reason=NOT_IN_CACHE,
        neutral=True,
    ),
    "dtype move": Change(
        lambda pipe: put(pipe, dtype=torch.float64),
        lambda pipe: put(pipe, dtype=torch.float32),
        reason=NOT_IN_CACHE,
    ),
    "forward hook": Change(
        forward_hook, lambda pipe: pipe.test_hook.remove(), reason="expected a module without hooks"
    ),
}


def patched_again(pipe: Any, change: str) -> None:
    """Eager HiDiffusion does not follow another UNet."""
    if change.startswith("unet replaced"):
        with pytest.raises(ah.PatchConflict, match=r"pipe\.unet: expected the UNet"):
            request(pipe)
        ah.apply_hidiffusion(pipe, config=CONFIG)


def unet_key(handle: Any) -> str:
    """The graph key of the UNet in a request's last steps."""
    return handle.explain(128, 192, STEPS).rows[-2].key


# One of each kind always; the others are slow.
KINDS = ("in place", "new Parameter", "unet replaced", "vae replaced", "freeu", "channels_last", "attention processors")


@pytest.mark.parametrize(
    "change",
    [name if any(k in name for k in KINDS) else pytest.param(name, marks=pytest.mark.slow) for name in CHANGES],
)
def test_the_image_is_right_after_a_change_and_after_it_is_taken_back(twins: Any, change: str) -> None:
    handle, eager = twins
    make, undo, reason, bindings, neutral, fewer = CHANGES[change]
    before = image(handle.pipe)
    assert handle.stats.hits == STEPS + 1 and handle.stats.eager_calls == 0
    key = unet_key(handle)
    extra = [make(pipe) or {} for pipe in (handle.pipe, eager)]
    patched_again(eager, change)
    seen = handle.stats.to_json()
    got = image(handle.pipe, **extra[0])
    assert relative_difference(got, image(eager, **extra[1])) < 5e-3
    assert (relative_difference(got, before) < 1e-3) == neutral
    hits, ran_eager, bound = (vars(handle.stats)[name] - seen[name] for name in ("hits", "eager_calls", "bindings"))
    assert hits + ran_eager == STEPS + 1 and handle.stats.compiles == 0
    assert (ran_eager == 0) == (reason is None) and (bound > 0) == bindings
    assert all(re.search(reason or "none", line) for line in handle.stats.rejected), handle.stats.rejected
    if reason == NOT_IN_CACHE or fewer:
        assert unet_key(handle) != key
    elif reason is None:
        assert unet_key(handle) == key
    if undo is not None:
        for pipe in (handle.pipe, eager):
            undo(pipe)
        with handle.stats.expect(hits=STEPS + 1, eager_calls=0, compiles=0):
            again = image(handle.pipe)
        assert relative_difference(again, image(eager)) < 5e-3
        assert relative_difference(again, before) < 1e-3
        assert unet_key(handle) == key


def test_nothing_is_bound_again_while_nothing_changes(twins: Any) -> None:
    handle, _ = twins
    image(handle.pipe)
    with handle.stats.expect(bindings=0, hits=3 * (STEPS + 1), eager_calls=0):
        for _ in range(3):
            image(handle.pipe)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="counts libraries in /proc/self/maps")
def test_programs_are_loaded_once_however_often_weights_are_replaced(twins: Any) -> None:
    """The library of a program stays in the process once it is loaded, so it has to serve the next weights too."""

    def libraries() -> int:
        lines = Path("/proc/self/maps").read_text().splitlines()
        return sum("wrapper.so" in line or "(deleted)" in line for line in lines)

    handle, _ = twins
    image(handle.pipe)
    loaded = libraries()
    assert loaded > 0
    for _ in range(3):
        new_parameters(handle.pipe)
        with handle.stats.expect(bindings=BOUND - 1, eager_calls=0, compiles=0):
            image(handle.pipe)
    handle.remove()
    again = ah.accelerate(handle.pipe, hidiffusion=CONFIG, cache=handle.cache, on_miss="error")
    image(again.pipe)
    assert libraries() == loaded


def test_a_checkpoint_swapped_in_place_in_the_middle_of_a_request_is_seen_at_once(twins: Any) -> None:
    """By a callback: the running request ends on graphs of one kind."""
    handle, eager = twins

    def swap(pipe: Any, step: int, timestep: Any, kwargs: Any) -> Any:
        if step == 2:
            pipe.unet.load_state_dict(models.build("sdxl", "text2img", seed=5).unet.state_dict())  # in place
        return kwargs

    got = image(handle.pipe, callback_on_step_end=swap)
    assert relative_difference(got, image(eager, callback_on_step_end=swap)) < 5e-3
    assert handle.stats.eager_calls == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda unet: unet.to(torch.float64).to(torch.float32),
        lambda unet: unet.to(memory_format=torch.channels_last),
        lambda unet: unet.load_state_dict({name: 0 * old for name, old in unet.state_dict().items()}, assign=True),
    ],
    ids=["dtype and back", "channels_last", "assign"],
)
def test_weights_that_get_other_memory_in_the_middle_of_a_request_count_from_the_next_one(
    twins: Any, change: Callable[[Any], Any]
) -> None:
    """The memory that the graphs were bound to lives until the request is over."""
    handle, eager = twins
    before = image(handle.pipe)

    def swap(pipe: Any, step: int, timestep: Any, kwargs: Any) -> Any:
        if step == 2:
            for path, module in pipe.unet.named_children():
                if path.endswith("blocks") or path == "mid_block":  # nothing outside of the regions
                    for name, block in module.named_modules():
                        if name.split(".")[-2:-1] in (["resnets"], ["attentions"]):
                            change(block)
            junk = [torch.full((64, 64, 3, 3), float("nan")) for _ in range(50)]  # over what was given back
            del junk
        return kwargs

    assert torch.equal(image(handle.pipe, callback_on_step_end=swap), before)
    image(eager, callback_on_step_end=swap)
    assert relative_difference(image(handle.pipe), image(eager)) < 5e-3


def test_following_another_unet_can_be_taken_off(twins: Any) -> None:
    handle, _ = twins
    first = handle.pipe.unet
    untouched = {path: set(vars(module)) for path, module in models.build("sdxl", "text2img").unet.named_modules()}
    image(handle.pipe)
    other_unet(handle.pipe)
    image(handle.pipe)
    for unet in (first, handle.remove().unet):
        assert {path: set(vars(module)) for path, module in unet.named_modules()} == untouched


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


@pytest.mark.parametrize("change", [assigned_state, other_unet, new_parameters])
def test_weights_that_were_exchanged_are_given_back(twins: Any, change: Callable[[Any], Any]) -> None:
    """Programs hold the weights of the model that they serve, and no other's, however many were exchanged."""
    handle, _ = twins
    seen: list[StorageWeakRef] = []
    for _ in range(3):
        image(handle.pipe)
        seen += [StorageWeakRef(weight.untyped_storage()) for weight in handle.pipe.unet.parameters()]
        change(handle.pipe)
    image(handle.pipe)
    gc.collect()
    assert handle.stats.eager_calls == 0 and not [weight for weight in seen if not weight.expired()]
