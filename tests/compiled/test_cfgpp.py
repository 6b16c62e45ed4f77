"""CFG++ compiled: one step graph for all samplers, steps, strengths and sizes; the UNet's graphs as without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import accel_hidiff as ah
from compile_cache import CompileCache
from tests import models
from tests.compiled.conftest import STEPS, relative_difference, request
from tests.compiled.test_families import FINAL, PER_CALL, assert_agree, outputs_of

SAMPLERS = ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"]
CONFIG = ah.HiDiffusionConfig()


@pytest.fixture(scope="module")
def cfgpp_cache(families_cache: Path) -> tuple[Path, Any]:
    """A cache with everything that CFG++ needs, and the report of adding it to one that had all but the step."""
    for family in ("sdxl", "kolors"):
        handle = ah.accelerate(models.build(family, "text2img"), hidiffusion=CONFIG, cache=families_cache)
        handle.precompile([(128, 192)], STEPS)
    pipe = models.build("sdxl", "text2img")
    handle = ah.accelerate(pipe, hidiffusion=CONFIG, guidance=ah.CFGPlusPlusConfig(), cache=families_cache)
    return families_cache, handle.precompile([(128, 192)], STEPS)


@pytest.fixture
def strict(cfgpp_cache: Any) -> Any:
    cache = CompileCache(cfgpp_cache[0], read_only=True)
    pipe = models.build("sdxl", "text2img")
    return ah.accelerate(pipe, hidiffusion=CONFIG, guidance=ah.CFGPlusPlusConfig(), cache=cache, on_miss="error")


def scheduler_of(name: str) -> Any:
    """A plain scheduler for the tiny SDXL model; of a latent model, so that DDIM does not clip."""
    options = {"clip_sample": False} if name == "DDIMScheduler" else {}
    return getattr(diffusers, name).from_config(models.build("sdxl", "text2img").scheduler.config, **options)


def eager_twin(pipe: Any) -> Any:
    ah.apply_hidiffusion(pipe)
    ah.apply_cfgpp(pipe)
    return pipe


def run(pipe: Any, height: int = 128, width: int = 192, **changes: Any) -> tuple[list[torch.Tensor], torch.Tensor]:
    with outputs_of(pipe.unet) as calls:
        latents = request(pipe, height, width, **{"guidance_scale": 7.5, **changes})
    return calls, latents


def test_turning_it_on_compiles_the_step_alone(cfgpp_cache: Any) -> None:
    assert cfgpp_cache[1].compiled == 1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_run_equals_its_eager_twin(strict: Any, sampler: str) -> None:
    """Non-square, with HiDiffusion; another lambda, number of steps, size and batch among requests compile nothing."""
    eager = eager_twin(models.build("sdxl", "text2img"))
    for pipe in (strict.pipe, eager):
        pipe.scheduler = scheduler_of(sampler)
    images = []
    for changes in (
        {},
        {"guidance_scale": 3.0},
        {"num_inference_steps": 11},
        {"height": 256, "width": 128},
        {"num_images_per_prompt": 2},
    ):
        with strict.stats.expect(compiles=0, eager_calls=0, misses=0):
            got = run(strict.pipe, **changes)
        assert_agree(got, run(eager, **changes))
        images.append(got[1])
    assert relative_difference(images[0], images[1]) > FINAL, "lambda matters"


def test_samplers_may_be_switched_among_requests(strict: Any) -> None:
    with strict.stats.expect(compiles=0, eager_calls=0, misses=0):
        for sampler in [*SAMPLERS, *reversed(SAMPLERS)]:
            strict.pipe.scheduler = scheduler_of(sampler)
            got = run(strict.pipe)
            eager = models.build("sdxl", "text2img")
            eager.scheduler = scheduler_of(sampler)
            assert_agree(got, run(eager_twin(eager)))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_next_input_is_scaled_in_the_step_unless_something_came_between(strict: Any, sampler: str) -> None:
    """The scheduler's own `scale_model_input` runs for the first step alone; a callback's latents are scaled by it."""
    eager = eager_twin(models.build("sdxl", "text2img"))
    for pipe in (strict.pipe, eager):
        pipe.scheduler = scheduler_of(sampler)
        request(pipe, 128, 192, num_inference_steps=1)  # CFG++ takes the scheduler over
    scaled: list[int] = []
    own = type(strict.pipe.scheduler).scale_model_input

    def counted(self: Any, *args: Any) -> torch.Tensor:
        scaled.append(1)
        return own(self, *args)

    def shift(pipe: Any, step: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        return {"latents": values["latents"] + 0.1} if step == 1 else {}

    def shift_in_place(pipe: Any, step: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step in (1, 3):
            values["latents"].add_(0.1)
        return {}

    kind = type(strict.pipe.scheduler)
    for callback, asked in ((None, 1), (shift, 2), (shift_in_place, 3)):
        want = run(eager, callback_on_step_end=callback)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kind, "scale_model_input", counted)
            scheduler = strict.pipe.scheduler = kind.from_config(strict.pipe.scheduler.config)
            scaled.clear()
            got = run(strict.pipe, callback_on_step_end=callback)
            assert strict.pipe.scheduler is scheduler and len(scaled) == asked
        assert_agree(got, want)
        assert type(got[1]) is torch.Tensor


def test_under_inference_mode_it_equals_its_eager_twin(strict: Any) -> None:
    with torch.inference_mode():
        got = run(strict.pipe)
    assert_agree(got, run(eager_twin(models.build("sdxl", "text2img"))))


def test_each_step_is_a_hit_and_explained(strict: Any) -> None:
    with strict.stats.expect(hits=2 * STEPS):
        run(strict.pipe)
    rows = {row.topology: row for row in strict.explain(128, 192, STEPS).rows}
    assert (rows["CFG++ step"].steps, rows["CFG++ step"].state) == ("each", "loaded")
    assert rows["CFG++ step"].regions == 1


def test_history_starts_anew_after_an_abandoned_request(strict: Any) -> None:
    class Stopped(Exception):
        pass

    def stop(pipe: Any, step: int, t: Any, values: Any) -> Any:
        if step == 3:
            raise Stopped
        return {}

    strict.pipe.scheduler = scheduler_of("DPMSolverMultistepScheduler")
    want = run(strict.pipe)[1]
    with pytest.raises(Stopped):
        run(strict.pipe, callback_on_step_end=stop)
    assert torch.equal(run(strict.pipe)[1], want)


def test_image_to_image_and_kolors(cfgpp_cache: Any) -> None:
    for family, task in (("sdxl", "img2img"), ("sdxl", "inpaint"), ("kolors", "text2img")):
        pipe = models.build(family, task)
        handle = ah.accelerate(
            pipe, hidiffusion=CONFIG, guidance=ah.CFGPlusPlusConfig(0.4), cache=cfgpp_cache[0], on_miss="error"
        )
        eager = models.build(family, task)
        ah.apply_hidiffusion(eager)
        ah.apply_cfgpp(eager, 0.4)
        with handle.stats.expect(compiles=0, eager_calls=0):
            got = pipe(**models.arguments(family, task, 128, 192)).images
        want = eager(**models.arguments(family, task, 128, 192)).images
        assert relative_difference(got, want) < PER_CALL * 5


def test_without_hidiffusion(cfgpp_cache: Any) -> None:
    pipe = models.build("sdxl", "text2img")
    handle = ah.accelerate(pipe, guidance=ah.CFGPlusPlusConfig(0.6), cache=cfgpp_cache[0], on_miss="compile")
    eager = models.build("sdxl", "text2img")
    ah.apply_cfgpp(eager, 0.6)
    assert_agree(run(pipe), run(eager))
    assert handle.stats.eager_calls == 0


def test_remove_gives_the_plain_pipeline_back(cfgpp_cache: Any) -> None:
    pipe = models.build("sdxl", "text2img")
    want, scheduler = run(pipe)[1], pipe.scheduler
    handle = ah.accelerate(pipe, hidiffusion=CONFIG, guidance=ah.CFGPlusPlusConfig(), cache=cfgpp_cache[0])
    run(pipe)
    handle.remove()
    assert pipe.scheduler is scheduler and torch.equal(run(pipe)[1], want)
    assert not pipe.unet._forward_hooks and "check_inputs" not in vars(pipe)


def test_a_failed_acceleration_leaves_no_guidance_behind(tmp_path: Path) -> None:
    pipe = models.build("sdxl", "text2img")
    with pytest.raises(ah.UnknownLayout):
        ah.accelerate(pipe, hidiffusion=CONFIG, guidance=ah.CFGPlusPlusConfig(), cache=tmp_path, family="sd15")
    assert type(pipe.scheduler) is diffusers.EulerDiscreteScheduler and not pipe.unet._forward_hooks
    with pytest.raises(ah.BadInput, match="guidance: expected a CFGPlusPlusConfig or None"):
        ah.accelerate(pipe, guidance=0.6, cache=tmp_path)  # type: ignore[arg-type]


def test_a_clipping_scheduler_is_refused_with_what_to_do(strict: Any) -> None:
    """DDIM's own default, which no latent model wants."""
    strict.pipe.scheduler = diffusers.DDIMScheduler.from_config(strict.pipe.scheduler.config)
    with pytest.raises(ah.GraphMiss, match=r"clip_sample=False, got True.*pass clip_sample=False to from_config"):
        run(strict.pipe)


def test_a_clipping_step_runs_eager_and_is_counted_so(cfgpp_cache: Any) -> None:
    cache = CompileCache(cfgpp_cache[0], read_only=True)
    pipe, eager = models.build("sdxl", "text2img"), eager_twin(models.build("sdxl", "text2img"))
    handle = ah.accelerate(pipe, hidiffusion=CONFIG, guidance=ah.CFGPlusPlusConfig(), cache=cache, on_miss="eager")
    for one in (pipe, eager):
        one.scheduler = diffusers.DDIMScheduler.from_config(one.scheduler.config)
    with handle.stats.expect(hits=STEPS, eager_calls=STEPS):  # the UNet's calls; those of the step
        got = run(pipe)
    assert_agree(got, run(eager))
    ((reason, count),) = handle.stats.rejected.items()
    assert count == STEPS and reason.startswith("cfgpp.step: coefficients: expected clip_sample=False")
