"""CFG++ in stock pipelines, eager: the scheduler sees both predictions, and nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch

import accel_hidiff as ah
from accel_hidiff.cfgpp import maths
from tests import models

SIZE = 128, 192
PLAIN = [
    "DDIMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
]


def build(family: str = "sdxl", task: str = "text2img", scheduler: str | None = None, **options: Any) -> Any:
    pipe = models.build(family, task)
    if scheduler is not None:
        pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config, **options)
    elif family == "sd15":  # PNDM has no counterpart
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    return pipe


def generate(pipe: Any, family: str = "sdxl", task: str = "text2img", **changes: Any) -> torch.Tensor:
    return pipe(**models.arguments(family, task, *SIZE, **{"guidance_scale": 5.0, **changes})).images


def by_hand(pipe: Any, strength: float, seed: int = 0, steps: int = 7) -> torch.Tensor:
    """The same request without a pipeline's loop: the UNet, the guidance, and a scheduler's `step(uncond_output=)`."""
    kind = ah.schedulers.counterpart(pipe.scheduler)
    scheduler = kind.from_config(pipe.scheduler.config)
    generator = torch.Generator().manual_seed(seed)
    text, negative, pooled, negative_pooled = pipe.encode_prompt(models.PROMPT, do_classifier_free_guidance=True)
    ids = pipe._get_add_time_ids(SIZE, (0, 0), SIZE, text.dtype, pooled.shape[-1])
    added = {"text_embeds": torch.cat([negative_pooled, pooled]), "time_ids": torch.cat([ids, ids])}
    scheduler.set_timesteps(steps)
    sample = torch.randn(1, 4, 16, 24, generator=generator) * scheduler.init_noise_sigma
    with torch.no_grad():
        for t in scheduler.timesteps:
            both = scheduler.scale_model_input(torch.cat([sample] * 2), t)
            said = pipe.unet(both, t, torch.cat([negative, text]), added_cond_kwargs=added).sample
            uncond, cond = said.chunk(2)
            guided = maths.guided(uncond, cond, strength)
            sample = scheduler.step(guided, t, sample, uncond_output=uncond, generator=generator).prev_sample
    return sample


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return bool((got - want).abs().max() <= tolerance * want.abs().max())


@pytest.mark.parametrize("scheduler", PLAIN)
def test_a_request_is_the_loop_that_knows_both_predictions(one_thread: None, scheduler: str) -> None:
    pipe = build(scheduler=scheduler)
    want = by_hand(pipe, 0.6)
    plain = generate(pipe)
    ah.apply_cfgpp(pipe, 0.6)
    assert close(generate(pipe), want)
    assert not close(generate(pipe), plain, 1e-2)


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_both_pooled_embeddings_and_the_size_in_order_are_used_at_every_lambda(
    one_thread: None, strength: float
) -> None:
    """The authors' code drops one of the embeddings at lambda 0 and 1, and swaps height and width in the time ids."""
    pipe = build()
    want = by_hand(pipe, strength)
    ah.apply_cfgpp(pipe, strength)
    assert close(generate(pipe), want)
    ids: list[torch.Tensor] = []
    hook = pipe.unet.register_forward_pre_hook(
        lambda _, __, kwargs: ids.append(kwargs["added_cond_kwargs"]["time_ids"]), with_kwargs=True
    )
    generate(pipe)
    hook.remove()
    assert ids[0].tolist() == [[128, 192, 0, 0, 128, 192]] * 2


def test_without_a_scale_the_guidance_scale_is_read_as_lambda(one_thread: None) -> None:
    pipe = build()
    want = by_hand(pipe, 0.4)
    guidance = ah.apply_cfgpp(pipe)
    assert close(generate(pipe, guidance_scale=5.0), want)
    assert guidance.strength() == 0.4
    guidance.remove()
    ah.apply_cfgpp(pipe, config=ah.CFGPlusPlusConfig(scale=0.4))
    for scale in (2.0, 9.0):
        assert close(generate(pipe, guidance_scale=scale), want), "with a scale, guidance_scale only turns guidance on"


@pytest.mark.parametrize(("family", "task"), [pair for pair in models.PAIRS if pair.values[0] != "playground"])
def test_every_family_and_task_runs_with_hidiffusion(one_thread: None, family: str, task: str) -> None:
    """Applied in either order, CFG++ and HiDiffusion give the same image, and another than each alone."""
    images = []
    for order in ((ah.apply_hidiffusion, ah.apply_cfgpp), (ah.apply_cfgpp, ah.apply_hidiffusion)):
        pipe = build(family, task)
        for apply in order:
            apply(pipe)
        images.append(generate(pipe, family, task))
        alone = build(family, task)
        order[0](alone)
        images.append(generate(alone, family, task))
    both, hidiffusion, again, cfgpp = images
    assert torch.isfinite(both).all() and torch.equal(both, again)
    assert not close(both, hidiffusion, 1e-3) and not close(both, cfgpp, 1e-3)


def test_an_image_of_several_equals_the_image_alone(one_thread: None) -> None:
    pipe = build()
    ah.apply_cfgpp(pipe, 0.6)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    both = generate(pipe, num_images_per_prompt=2, generator=generators)
    for index, seed in enumerate((3, 4)):
        assert close(both[index : index + 1], generate(pipe, generator=torch.Generator().manual_seed(seed)))


def test_the_scheduler_may_be_changed_between_requests(one_thread: None) -> None:
    pipe = build()
    ah.apply_cfgpp(pipe, 0.6)
    for scheduler in [*PLAIN, *PLAIN[::-1]]:
        pipe.scheduler = getattr(diffusers, scheduler).from_config(models.build("sdxl", "text2img").scheduler.config)
        assert close(generate(pipe), by_hand(build(scheduler=scheduler), 0.6)), scheduler


def test_lightning_runs_at_lambda_one_and_zero_is_the_unconditional_model(one_thread: None) -> None:
    pipe = build("sdxl_lightning")
    ah.apply_cfgpp(pipe, 1.0)
    assert torch.isfinite(generate(pipe, "sdxl_lightning", num_inference_steps=4)).all()
    pipe = build(scheduler="DDIMScheduler")
    want = generate(pipe, prompt="", negative_prompt="")
    ah.apply_cfgpp(pipe, 0.0)
    # Two predictions of one prompt differ by rounding, as the processor has it, and guidance multiplies that in `want`.
    assert close(generate(pipe, negative_prompt=""), want, 1e-4)


class TestRemoval:
    @pytest.mark.parametrize("order", ["cfgpp last", "cfgpp first"])
    def test_nothing_is_left(
        self, one_thread: None, order: str, snapshot: Callable[..., Any], assert_identical: Callable[..., None]
    ) -> None:
        pipe = build()
        image = generate(pipe)
        before = snapshot(pipe), snapshot(pipe.unet)
        for _ in range(2):
            ah.apply_hidiffusion(pipe)
            ah.apply_cfgpp(pipe, 0.6)
            generate(pipe)
            removes = [ah.remove_cfgpp, ah.remove_hidiffusion]
            for remove in removes if order == "cfgpp last" else removes[::-1]:
                remove(pipe)
        assert_identical(before[0], snapshot(pipe))
        assert_identical(before[1], snapshot(pipe.unet))
        assert "step" not in vars(pipe.scheduler)
        assert torch.equal(generate(pipe), image)

    def test_a_scheduler_that_the_user_set_stays_and_is_plain_again(self) -> None:
        pipe = build()
        ah.apply_cfgpp(pipe, 0.6)
        own = ah.schedulers.EulerCFGPPScheduler.from_config(pipe.scheduler.config)
        pipe.scheduler = own
        generate(pipe)
        assert pipe.scheduler is own and "step" in vars(own)
        ah.remove_cfgpp(pipe)
        assert pipe.scheduler is own and "step" not in vars(own)

    def test_applying_twice_does_not_stack(self, one_thread: None) -> None:
        pipe = build()
        want = by_hand(pipe, 0.3)
        ah.apply_cfgpp(pipe, 0.6)
        ah.apply_cfgpp(pipe, 0.3)
        assert close(generate(pipe), want)
        ah.remove_cfgpp(pipe)
        assert type(pipe.scheduler) is diffusers.EulerDiscreteScheduler

    def test_an_interrupted_request_leaves_the_next_one_right(self, one_thread: None) -> None:
        pipe = build(scheduler="DPMSolverMultistepScheduler")
        ah.apply_cfgpp(pipe, 0.6)
        want = generate(pipe)

        def stop(pipe: Any, step: int, t: Any, values: Any) -> Any:
            if step == 2:
                raise _Stopped
            return {}

        with pytest.raises(_Stopped):
            generate(pipe, callback_on_step_end=stop)
        assert torch.equal(generate(pipe), want)


class _Stopped(Exception):
    pass


class TestBadInput:
    @pytest.mark.parametrize("scale", [-0.1, 1.01, 7.5, "0.6", True, float("nan")])
    def test_a_lambda_that_cannot_be(self, scale: Any) -> None:
        for make in (lambda: ah.CFGPlusPlusConfig(scale), lambda: ah.apply_cfgpp(build(), scale)):
            with pytest.raises(ah.BadInput, match=r"lambda: expected a number in 0\.\.1, got .*guidance_scale w"):
                make()

    def test_a_guidance_scale_that_is_no_lambda(self) -> None:
        pipe = build()
        ah.apply_cfgpp(pipe)
        with pytest.raises(ah.BadInput, match=r"guidance_scale: expected 0\.\.12\.5, got 15"):
            generate(pipe, guidance_scale=15.0)

    def test_guidance_off(self) -> None:
        pipe = build()
        calls: list[Any] = []
        pipe.unet.register_forward_hook(lambda *_: calls.append(1))
        for scale in (None, 0.6):
            ah.apply_cfgpp(pipe, scale)
            with pytest.raises(ah.BadInput, match=r"guidance_scale: expected more than 1, got 1.0; .*unconditional"):
                generate(pipe, guidance_scale=1.0)
        assert not calls, "refused before anything runs"

    def test_options_that_cfgpp_does_not_define(self) -> None:
        pipe = build()
        ah.apply_cfgpp(pipe, 0.6)
        with pytest.raises(ah.BadInput, match=r"guidance_rescale: expected 0, got 0.7"):
            generate(pipe, guidance_rescale=0.7)
        with pytest.raises(ah.BadInput, match=r"eta: expected 0, got 0.5.*DDIMCFGPPScheduler"):
            generate(pipe, eta=0.5)

    def test_a_scheduler_without_a_counterpart(self) -> None:
        pipe = models.build("sd15", "text2img")
        with pytest.raises(ah.BadInput, match=r"DDIMScheduler, EulerDiscreteScheduler.*got PNDMScheduler"):
            ah.apply_cfgpp(pipe, 0.6)
        assert type(pipe.scheduler) is diffusers.PNDMScheduler and "check_inputs" not in vars(pipe)
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
        ah.apply_cfgpp(pipe, 0.6)
        pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(pipe.scheduler.config)
        with pytest.raises(ah.BadInput, match="got HeunDiscreteScheduler"):
            generate(pipe, "sd15")

    @pytest.mark.parametrize("thing", [None, 3, torch.nn.Linear(1, 1)])
    def test_what_is_no_pipeline(self, thing: Any) -> None:
        with pytest.raises(ah.NotAPipeline):
            ah.apply_cfgpp(thing, 0.6)

    def test_two_scales_or_another_config(self) -> None:
        with pytest.raises(ah.BadInput, match="scale or config"):
            ah.apply_cfgpp(build(), 0.6, config=ah.CFGPlusPlusConfig(0.6))
        with pytest.raises(ah.BadInput, match="CFGPlusPlusConfig"):
            ah.apply_cfgpp(build(), config=ah.HiDiffusionConfig())  # type: ignore[arg-type]
