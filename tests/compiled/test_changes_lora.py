"""LoRA on a live accelerated pipeline: loaded, scaled, fused, unfused, unloaded, hot-swapped; never a stale graph.

Layers that are loaded change the structure of the UNet: other keys, eager until they are compiled. A LoRA that is fused
and unloaded has changed weights in place: nothing is compiled or bound. Each image is compared with an eager twin's.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import accel_hidiff as ah
from tests import models
from tests.accel_hidiff.test_variants import ATTENTION, CONVOLUTIONS, add_lora
from tests.compiled.conftest import CONFIG, STEPS, image, relative_difference

EAGER, SERVED = {"eager_calls": STEPS, "hits": 1}, {"eager_calls": 0, "hits": STEPS + 1}  # the decoder has no LoRA


class Pair:
    """A handle and its eager twin, to which the same is done."""

    def __init__(self, twins: Any) -> None:
        self.handle, self.eager = twins

    def do(self, change: Callable[[Any], Any]) -> None:
        for pipe in (self.handle.pipe, self.eager):
            change(pipe)

    def image(self, counts: dict[str, int], **options: Any) -> torch.Tensor:
        """The served image; it is the twin's, and was made as counted, without a compilation."""
        with self.handle.stats.expect(compiles=0, **counts):
            got = image(self.handle.pipe, **options)
        assert relative_difference(got, image(self.eager, **options)) < 5e-3
        return got

    def key(self) -> str:
        return self.handle.explain(128, 192, STEPS).rows[0].key


@pytest.fixture
def pair(twins: Any) -> Pair:
    return Pair(twins)


def load(pipe: Any) -> None:
    add_lora(pipe.unet, ATTENTION + CONVOLUTIONS, scale=0.5)


def unload(pipe: Any) -> None:
    pipe.unet.unload_lora()


def differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    return relative_difference(one, other) > 5e-3


def test_lora_loaded_has_other_keys_and_runs_eager_until_it_is_unloaded(pair: Pair) -> None:
    before, key = pair.image(SERVED), pair.key()
    pair.do(load)
    loaded = pair.image(EAGER)
    assert differ(loaded, before) and pair.key() != key
    assert len(pair.handle.stats.rejected) == 1 and "structure" in next(iter(pair.handle.stats.rejected))
    pair.do(unload)
    assert relative_difference(pair.image(SERVED), before) < 1e-3 and pair.key() == key


def test_lora_fused_and_unloaded_is_served_with_nothing_bound_or_compiled(pair: Pair) -> None:
    before = pair.image(SERVED)
    pair.do(lambda pipe: (load(pipe), pipe.unet.fuse_lora(), unload(pipe)))
    assert differ(pair.image({**SERVED, "loads": 0}), before)


def test_lora_fused_with_its_layers_still_loaded_runs_eager(pair: Pair) -> None:
    before, key = pair.image(SERVED), pair.key()
    pair.do(lambda pipe: (load(pipe), pipe.unet.fuse_lora()))
    assert differ(pair.image(EAGER), before) and pair.key() != key


def test_lora_unfused_gives_the_first_image_back(pair: Pair) -> None:
    before = pair.image(SERVED)
    pair.do(lambda pipe: (load(pipe), pipe.unet.fuse_lora()))
    fused = pair.image(EAGER)
    pair.do(lambda pipe: pipe.unet.unfuse_lora())
    assert relative_difference(pair.image(EAGER), fused) < 1e-3  # its layers do the same
    pair.do(unload)
    assert relative_difference(pair.image(SERVED), before) < 1e-3


def test_lora_scaled_before_it_is_fused(pair: Pair) -> None:
    images = [pair.image(SERVED)]
    for scale in (0.5, 1.5):
        pair.do(lambda pipe, scale=scale: (load(pipe), pipe.unet.fuse_lora(lora_scale=scale), unload(pipe)))
        images.append(pair.image(SERVED))
    assert differ(images[0], images[1]) and differ(images[1], images[2])


def test_lora_scaled_while_it_is_loaded(pair: Pair) -> None:
    pair.do(load)
    images, keys = [pair.image(EAGER)], [pair.key()]
    for scale in (0.25, 0.5):
        pair.do(lambda pipe, scale=scale: pipe.unet.set_adapters("default", weights=scale))
        images.append(pair.image(EAGER))
        keys.append(pair.key())
    assert differ(images[0], images[1]) and differ(images[1], images[2]) and len(set(keys)) == 3


def test_lora_scaled_by_the_request_runs_eager_with_the_reason(pair: Pair) -> None:
    pair.do(load)
    whole = pair.image(EAGER)
    half = pair.image(EAGER, cross_attention_kwargs={"scale": 0.5})
    assert differ(half, whole)
    assert any("passes cross_attention_kwargs" in reason for reason in pair.handle.stats.rejected)


def test_lora_hot_swapped_between_requests_fused(pair: Pair) -> None:
    """Take one off, put another on, without a compilation; then the first again."""
    before = pair.image(SERVED)

    def weights(pipe: Any) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}

    base = {id(pipe): weights(pipe) for pipe in (pair.handle.pipe, pair.eager)}
    images = []
    for scale in (0.5, -0.5, 0.5):
        pair.do(lambda pipe: pipe.unet.load_state_dict(base[id(pipe)]))
        pair.do(lambda pipe, scale=scale: (load(pipe), pipe.unet.fuse_lora(lora_scale=scale), unload(pipe)))
        images.append(pair.image(SERVED))
    assert differ(images[0], images[1]) and differ(images[0], before)
    assert relative_difference(images[2], images[0]) < 1e-3


def swap_in(pipe: Any, factor: float) -> None:
    """diffusers' own hot swap: other values into the layers that are there."""
    peft = pytest.importorskip("peft", reason="LoRA layers need peft")
    state = peft.get_peft_model_state_dict(pipe.unet)
    other = {name: factor * tensor if "lora_B" in name else tensor.clone() for name, tensor in state.items()}
    pipe.unet.load_lora_adapter(other, prefix=None, adapter_name="default", hotswap=True)


def test_lora_hot_swapped_while_it_is_loaded(pair: Pair) -> None:
    pair.do(lambda pipe: add_lora(pipe.unet, ATTENTION, scale=1.0))  # what a state without an alpha is read as
    first, key = pair.image(EAGER), pair.key()
    pair.do(lambda pipe: swap_in(pipe, -1.0))
    assert differ(pair.image(EAGER), first) and pair.key() == key


@pytest.mark.slow
def test_lora_compiled_with_its_layers_is_hot_swapped_without_a_compilation(tmp_path: Path) -> None:
    """With LoRA layers loaded and compiled, their scale is a constant of the graphs, their weights are not."""
    served, eager = models.build("sdxl", "text2img"), models.build("sdxl", "text2img")
    for pipe in (served, eager):
        add_lora(pipe.unet, ATTENTION, scale=1.0)
    handle = ah.accelerate(served, hidiffusion=CONFIG, cache=tmp_path / "cache")
    ah.apply_hidiffusion(eager, config=CONFIG)
    handle.precompile([(128, 192)], STEPS)
    handle._dispatcher.on_miss = "eager"
    pair = Pair((handle, eager))
    first = pair.image(SERVED)
    pair.do(lambda pipe: swap_in(pipe, -1.0))
    swapped = pair.image(SERVED)
    assert differ(swapped, first)
    pair.do(lambda pipe: pipe.unet.set_adapters("default", weights=0.25))
    assert differ(pair.image(EAGER), swapped)
    pair.do(lambda pipe: pipe.unet.disable_adapters())
    pair.image(EAGER)
    pair.do(lambda pipe: (pipe.unet.enable_adapters(), pipe.unet.set_adapters("default", weights=1.0)))
    assert relative_difference(pair.image(SERVED), swapped) < 1e-3
