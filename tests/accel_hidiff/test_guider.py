"""CFG++ as a guider: stock modular SDXL blocks give what a loop over the UNet gives, and nothing runs without CFG++."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

import accel_hidiff as ah
from accel_hidiff.cfgpp import maths
from accel_hidiff.cfgpp.prediction import GuidedPrediction
from accel_hidiff.errors import BadInput
from accel_hidiff.schedulers import (
    DDIMCFGPPScheduler,
    DPMSolverMultistepCFGPPScheduler,
    EulerAncestralCFGPPScheduler,
    EulerCFGPPScheduler,
)
from tests.models import arguments, build
from tests.needs import needs_guiders

pytestmark = needs_guiders

PLAIN = {
    EulerCFGPPScheduler: EulerDiscreteScheduler,
    DDIMCFGPPScheduler: DDIMScheduler,
    EulerAncestralCFGPPScheduler: EulerAncestralDiscreteScheduler,
    DPMSolverMultistepCFGPPScheduler: DPMSolverMultistepScheduler,
}
STEPS, HEIGHT, WIDTH = 4, 128, 192
NEGATIVE = "a blue square"


@pytest.fixture(scope="module")
def stock(one_thread: None) -> Any:
    return build("sdxl", "text2img")


def scheduler_of(kind: Any, stock: Any, **options: Any) -> Any:
    extra = {"clip_sample": False, "set_alpha_to_one": False} if issubclass(kind, DDIMScheduler) else {}
    return kind.from_config(stock.scheduler.config, **extra, **options)


def assemble(stock: Any, scheduler: Any, guider: Any) -> Any:
    """A modular pipeline of the stock blocks and the weights of `stock`."""
    modular = diffusers.StableDiffusionXLAutoBlocks().init_pipeline()
    parts = {k: v for k, v in stock.components.items() if v is not None and k in modular._component_specs}
    modular.update_components(**{**parts, "scheduler": scheduler, "guider": guider})
    modular.set_progress_bar_config(disable=True)
    return modular


def with_cfgpp(stock: Any, kind: Any, scale: float = 0.6, **options: Any) -> Any:
    return assemble(stock, scheduler_of(kind, stock), ah.CFGPlusPlusGuidance(scale, **options))


def generate(modular: Any, seed: int = 0, **options: Any) -> Tensor:
    request = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": STEPS, "negative_prompt": NEGATIVE}
    generator = torch.Generator().manual_seed(seed)
    return modular(prompt="a red circle", output="latents", generator=generator, **{**request, **options})


@torch.no_grad()
def by_hand(stock: Any, scheduler: Any, scale: float, seed: int = 0, images: int = 1, **window: float) -> Tensor:
    """The same request as a loop over the UNet; a step outside of the window is the conditional prediction's."""
    embeds, negative, pooled, negative_pooled = stock.encode_prompt(
        "a red circle", negative_prompt=NEGATIVE, num_images_per_prompt=images
    )
    sizes = torch.tensor([[HEIGHT, WIDTH, 0, 0, HEIGHT, WIDTH]], dtype=torch.float32).repeat(images, 1)
    generator = torch.Generator().manual_seed(seed)
    scheduler.set_timesteps(STEPS)
    x = torch.randn(images, 4, HEIGHT // 8, WIDTH // 8, generator=generator) * scheduler.init_noise_sigma
    noise = {"generator": generator}
    for i, t in enumerate(scheduler.timesteps):
        seen = scheduler.scale_model_input(x, t)
        cond, uncond = (
            stock.unet(seen, t, text, added_cond_kwargs={"text_embeds": pool, "time_ids": sizes}).sample
            for text, pool in ((embeds, pooled), (negative, negative_pooled))
        )
        if not int(window.get("start", 0) * STEPS) <= i < int(window.get("stop", 1) * STEPS):
            uncond = cond
        guided = uncond + scale * (cond - uncond)
        x = scheduler.step(guided, t, x, uncond_output=uncond, **noise).prev_sample
    return x


def assert_close(found: Tensor, expected: Tensor, relative: bool = False) -> None:
    """1e-5, or 1e-5 of the largest latent."""
    top = float(expected.abs().max())
    assert top > 1
    assert (found - expected).abs().max() <= 1e-5 * (top if relative else 1)


# --- what it computes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PLAIN)
def test_stock_blocks_give_what_the_loop_by_hand_gives(stock: Any, kind: Any) -> None:
    assert_close(generate(with_cfgpp(stock, kind)), by_hand(stock, scheduler_of(kind, stock), 0.6))


def test_the_scale_and_the_scheduler_matter(stock: Any) -> None:
    """The comparison above would notice a lambda or an unconditional prediction that is lost."""
    found = generate(with_cfgpp(stock, EulerCFGPPScheduler))
    assert (found - generate(with_cfgpp(stock, EulerCFGPPScheduler, 0.5))).abs().max() > 1e-2
    plain = assemble(stock, scheduler_of(EulerDiscreteScheduler, stock), diffusers.ClassifierFreeGuidance(0.6))
    assert (found - generate(plain)).abs().max() > 1e-2


def test_several_images(stock: Any) -> None:
    found = generate(with_cfgpp(stock, EulerCFGPPScheduler), num_images_per_prompt=3)
    assert found.shape[0] == 3
    assert_close(found, by_hand(stock, scheduler_of(EulerCFGPPScheduler, stock), 0.6, images=3))


@pytest.mark.parametrize("task", ["text2img", "img2img", "inpaint"])
@pytest.mark.parametrize("kind", [EulerCFGPPScheduler, DDIMCFGPPScheduler])
def test_lambda_0_is_unconditional(stock: Any, kind: Any, task: str) -> None:
    """The unconditional run is diffusers' own: its scheduler, and its guider with a weight of 0."""
    request = arguments("sdxl", task, HEIGHT, WIDTH)
    options = {name: request[name] for name in ("image", "mask_image", "strength") if name in request}
    plain = assemble(stock, scheduler_of(PLAIN[kind], stock), diffusers.ClassifierFreeGuidance(0.0))
    found = generate(with_cfgpp(stock, kind, 0.0), num_inference_steps=5, **options)
    assert_close(found, generate(plain, num_inference_steps=5, **options), relative=True)


@pytest.mark.parametrize("window", [{"start": 0.5}, {"stop": 0.5}, {"start": 0.25, "stop": 0.75}])
def test_outside_of_the_window_a_step_is_conditional(stock: Any, window: dict[str, float]) -> None:
    modular = with_cfgpp(stock, DDIMCFGPPScheduler, **window)
    expected = by_hand(stock, scheduler_of(DDIMCFGPPScheduler, stock), 0.6, **window)
    assert_close(generate(modular), expected)
    assert_close(generate(modular), expected)  # diffusers' own guiders fail here for stop < 1: no negative prompt


def test_the_unet_runs_twice_a_step_and_once_outside_of_the_window(stock: Any) -> None:
    modular = with_cfgpp(stock, EulerCFGPPScheduler, stop=0.5)
    calls = []
    hook = modular.unet.register_forward_pre_hook(lambda *_: calls.append(modular.guider.is_conditional))
    generate(modular)
    hook.remove()
    assert calls == [True, False] * 2 + [True] * 2


def test_requests_one_after_the_other(stock: Any) -> None:
    modular = with_cfgpp(stock, EulerCFGPPScheduler)
    expected = generate(modular)
    by_hand(stock, modular.scheduler, 0.6)
    assert torch.equal(generate(modular), expected)


def test_one_guider_for_pipelines_with_different_samplers(stock: Any) -> None:
    guider = ah.CFGPlusPlusGuidance(0.6)
    for kind in (EulerCFGPPScheduler, DDIMCFGPPScheduler):
        found = generate(assemble(stock, scheduler_of(kind, stock), guider))
        assert_close(found, by_hand(stock, scheduler_of(kind, stock), 0.6))


def test_both_predictions_are_in_the_output() -> None:
    guider = ah.CFGPlusPlusGuidance(0.25)
    cond, uncond = torch.ones(2, dtype=torch.float16), torch.zeros(2, dtype=torch.float16)
    output = guider.forward(cond, uncond)
    guided, carried = output[0].take_apart()
    assert guided.tolist() == [0.25, 0.25] and guided.dtype == torch.float16
    assert carried is uncond and output.pred_uncond is uncond and output.pred_cond is cond
    alone = guider.forward(cond)
    assert [value.tolist() for value in alone[0].take_apart()] == [[1.0, 1.0]] * 2
    assert alone.pred_uncond is None


def test_conditions_of_a_step() -> None:
    guider = ah.CFGPlusPlusGuidance(start=0.5, stop=0.75)
    assert guider.num_conditions == 2  # no request yet: the negative prompt will be needed
    found = []
    for step in range(4):
        guider.set_state(step, 4, torch.tensor(0))
        batches = guider.prepare_inputs({"text": (torch.ones(1), torch.zeros(1)), "nothing": (None, None)})
        found.append((guider.num_conditions, [float(batch.text) for batch in batches]))
    assert found == [(1, [1.0]), (1, [1.0]), (2, [1.0, 0.0]), (1, [1.0])]
    guider.disable()
    assert guider.num_conditions == 1
    guider.enable()
    guider.set_state(2, 4, torch.tensor(0))
    guider.prepare_models(torch.nn.Identity())
    assert guider.is_conditional and not guider.is_unconditional
    guider.prepare_models(torch.nn.Identity())
    assert guider.is_unconditional


# --- configuration ----------------------------------------------------------------------------------------------------


def test_configuration_round_trip(tmp_path: Path) -> None:
    guider = ah.CFGPlusPlusGuidance(0.3, start=0.1, stop=0.9)
    guider.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "guider_config.json").read_text(encoding="utf-8"))
    assert saved["_class_name"] == "CFGPlusPlusGuidance" and saved["scale"] == 0.3
    loaded = ah.CFGPlusPlusGuidance.from_pretrained(tmp_path)
    assert (loaded.scale, loaded._start, loaded._stop) == (0.3, 0.1, 0.9)
    assert dict(loaded.config).items() >= {"scale": 0.3, "start": 0.1, "stop": 0.9, "enabled": True}.items()
    renewed = guider.new(scale=0.7)
    assert (renewed.scale, renewed._start) == (0.7, 0.1)
    assert "scale" in repr(guider)


# --- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [7.5, -0.1, 1.0001, float("nan"), True, "0.6", None])
def test_lambda_outside_of_its_range(scale: Any) -> None:
    with pytest.raises(BadInput, match=r"lambda: expected a number in 0..1.*pass lambda = w / 12.5") as error:
        ah.CFGPlusPlusGuidance(scale)
    assert "\n" not in str(error.value)
    guider = ah.CFGPlusPlusGuidance()
    guider.scale = scale
    with pytest.raises(BadInput, match="lambda"):
        guider.forward(torch.ones(1), torch.zeros(1))


def test_guidance_rescale() -> None:
    with pytest.raises(BadInput, match=r"guidance_rescale: expected 0, got 0\.7"):
        ah.CFGPlusPlusGuidance(0.6, guidance_rescale=0.7)
    with pytest.raises(BadInput, match="guidance_rescale"):
        ah.CFGPlusPlusGuidance.from_config(diffusers.ClassifierFreeGuidance(7.5, guidance_rescale=0.7).config)


@pytest.mark.parametrize("window", [{"start": -0.1}, {"start": 1.0}, {"start": 0.6, "stop": 0.5}, {"stop": 1.1}])
def test_start_and_stop(window: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="Expected `st"):
        ah.CFGPlusPlusGuidance(0.6, **window)


@pytest.mark.parametrize("kind", [*PLAIN.values(), PNDMScheduler, UniPCMultistepScheduler, LCMScheduler])
def test_a_scheduler_without_cfgpp_is_refused_at_its_first_step(stock: Any, kind: Any) -> None:
    modular = assemble(stock, scheduler_of(kind, stock), ah.CFGPlusPlusGuidance())
    calls = []
    hook = modular.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(BadInput, match=r"CFGPlusPlusGuidance: expected a CFG\+\+ scheduler") as error:
        generate(modular)
    hook.remove()
    assert len(calls) <= 2 and "\n" not in str(error.value)


def test_nothing_computes_with_a_guided_prediction() -> None:
    joined = GuidedPrediction.join(torch.ones(2, 3), torch.zeros(2, 3))
    assert (joined.shape, joined.dtype, joined.device.type, joined.ndim) == ((2, 3), torch.float32, "cpu", 2)
    assert "GuidedPrediction" in repr(joined)
    for use in (
        lambda: joined + 1,
        lambda: 2.0 * joined,
        lambda: torch.ones(2, 3) * joined,
        lambda: np.float64(2.0) * joined,
        lambda: joined.to(torch.float64),
        lambda: joined.chunk(2),
        lambda: torch.cat([joined, joined]),
        lambda: joined[0],
        lambda: joined.data,
        lambda: maths.guided(joined, torch.ones(2, 3), 0.5),
    ):
        with pytest.raises(BadInput, match="CFGPlusPlusGuidance: expected a CFG"):
            use()
