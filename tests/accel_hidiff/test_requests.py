"""The requests of stock pipelines: which step, which shifts, with every scheduler; and what they leave alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline

import accel_hidiff as ah
from accel_hidiff.shifts import window_shifts
from tests.schedulers import SCHEDULERS

STEPS = 7
BLOCKS = 5  # windowed transformer blocks of the tiny UNet


def image_to_image(pipe: Any) -> StableDiffusionXLImg2ImgPipeline:
    other = StableDiffusionXLImg2ImgPipeline(**pipe.components, add_watermarker=False)
    other.set_progress_bar_config(disable=True)
    return other


# ---- requests of a pipeline


@pytest.mark.parametrize("generator", ["own", "global"])
def test_the_global_generator_is_as_after_an_unpatched_call(pipe: Any, generate: Any, generator: str) -> None:
    kwargs = {"generator": "global"} if generator == "global" else {}

    def state_after(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        generate(pipe, steps=2, **kwargs)
        return torch.get_rng_state()

    with torch.random.fork_rng(devices=[]):
        expected = state_after(1)
        assert not torch.equal(expected, state_after(2))
        ah.apply_hidiffusion(pipe)
        assert torch.equal(state_after(1), expected)


def test_the_users_generator_is_as_after_an_unpatched_call(pipe: Any, generate: Any) -> None:
    states = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(3)
        generate(pipe, steps=2, generator=generator)
        states.append(generator.get_state())
        ah.apply_hidiffusion(pipe)
    assert torch.equal(*states)


def test_one_seed_is_one_image_whatever_ran_in_between(pipe: Any, generate: Any, patched_image: torch.Tensor) -> None:
    ah.apply_hidiffusion(pipe)
    assert torch.equal(generate(pipe), patched_image)
    assert not torch.equal(generate(pipe, seed=1), patched_image)
    generate(pipe, seed=0, steps=3, height=136, width=256)
    assert torch.equal(generate(pipe), patched_image)


def recorded_calls(pipe: Any, run: Callable[[], Any]) -> list[tuple[Any, Any, torch.Tensor]]:
    """(args, kwargs, output) of every UNet call of a request."""
    calls: list[tuple[Any, Any, torch.Tensor]] = []

    def hook(module: Any, args: Any, kwargs: Any, out: Any) -> None:
        calls.append((args, kwargs, out[0].clone()))

    handle = pipe.unet.register_forward_hook(hook, with_kwargs=True)
    try:
        run()
    finally:
        handle.remove()
    return calls


def assert_replays(patch: Any, calls: list[Any], seed: int, positions: list[tuple[int, int]] | None = None) -> None:
    """The calls are those of the shifts of a seed; `positions` are one step for each call unless they are given."""
    positions = positions or [(step, len(calls)) for step in range(len(calls))]
    for (step, steps), (args, kwargs, out) in zip(positions, calls, strict=True):
        shifts = window_shifts(seed, step, BLOCKS)
        with torch.no_grad(), patch.phase(step=step, num_steps=steps, window_shifts=shifts):
            assert torch.equal(patch.unet(*args, **kwargs)[0], out), step


def test_a_request_runs_the_phases_and_the_shifts_of_its_generators_seed(pipe: Any, generate: Any) -> None:
    """The rule for a single generator: `window_shifts(seed, step, blocks)`, whatever the batch."""
    patch = ah.apply_hidiffusion(pipe)
    for count in (1, 2):
        calls = recorded_calls(pipe, lambda count=count: generate(pipe, seed=11, num_images_per_prompt=count))
        assert len(calls) == STEPS and calls[0][2].shape[0] == 2 * count
        assert_replays(patch, calls, 11)
    with pytest.raises(AssertionError):
        assert_replays(patch, calls, 12)


@pytest.mark.parametrize("generators", [None, "list"])
def test_without_a_single_generator_the_configs_seed_rules(pipe: Any, generate: Any, generators: Any) -> None:
    patch = ah.apply_hidiffusion(pipe, config=ah.HiDiffusionConfig(shift_seed=4))
    generate(pipe, seed=11, steps=1)  # an earlier request's seed must not linger
    generator = "global" if generators is None else [torch.Generator().manual_seed(11)]
    with torch.random.fork_rng(devices=[]):
        calls = recorded_calls(pipe, lambda: generate(pipe, generator=generator))
    assert_replays(patch, calls, 4)


def test_an_image_of_a_batch_equals_the_image_alone(pipe: Any, generate: Any) -> None:
    ah.apply_hidiffusion(pipe)
    seeds = (3, 8)
    together = generate(pipe, num_images_per_prompt=2, generator=[torch.Generator().manual_seed(s) for s in seeds])
    for image, seed in zip(together, seeds, strict=True):
        alone = generate(pipe, generator=[torch.Generator().manual_seed(seed)])[0]
        torch.testing.assert_close(image, alone, rtol=1e-4, atol=1e-4)


def test_two_threads_with_two_pipelines_make_the_images_of_each_alone(run_all: Any, build: Any, generate: Any) -> None:
    pipes = [build(), build()]
    requests = [{"seed": 1, "steps": 7}, {"seed": 2, "steps": 9, "height": 160}]
    for pipe in pipes:
        ah.apply_hidiffusion(pipe)
    alone = [generate(pipe, **request) for pipe, request in zip(pipes, requests, strict=True)]
    images: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    barrier = threading.Barrier(2)

    def work(index: int) -> None:
        barrier.wait()
        for _ in range(3):
            images[index].append(generate(pipes[index], **requests[index]))

    run_all([threading.Thread(target=work, args=(index,)) for index in (0, 1)])
    for index in (0, 1):
        assert len(images[index]) == 3
        for image in images[index]:
            torch.testing.assert_close(image, alone[index], rtol=1e-5, atol=1e-5)


# ---- schedulers


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_call_knows_its_step_with_every_scheduler(pipe: Any, generate: Any, positions: Any, name: str) -> None:
    """The scheduler is swapped after applying, as users do. All calls of a step run in one phase."""
    options, steps_of_calls = SCHEDULERS[name]
    if name == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde", reason="DPMSolverSDEScheduler needs torchsde")
    patch = ah.apply_hidiffusion(pipe)
    pipe.scheduler = getattr(diffusers, name.split(maxsplit=1)[0]).from_config(pipe.scheduler.config, **options)
    for steps in (5, 8, 7):
        positions.clear()
        calls = recorded_calls(pipe, lambda steps=steps: generate(pipe, steps=steps, seed=2))
        assert len(pipe.scheduler.timesteps) == len(calls)
        assert positions == [(step, steps) for step in steps_of_calls(steps)]
    assert_replays(patch, calls, 2, positions)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_denoising_end_makes_a_request_of_the_calls_that_run(
    pipe: Any, generate: Any, positions: Any, name: str
) -> None:
    ah.apply_hidiffusion(pipe)
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    generate(pipe, steps=10, denoising_end=0.6)
    assert 0 < len(positions) < 10
    assert positions == [(step, len(positions)) for step in range(len(positions))]
    positions.clear()
    generate(pipe, steps=10)
    assert positions == [(step, 10) for step in range(10)], "denoising_end does not linger"


WINDOWS = ({}, {"denoising_start": 0.5}, {"denoising_end": 0.8}, {"denoising_start": 0.4, "denoising_end": 0.8})


@pytest.mark.parametrize(
    ("name", "window"),
    [
        (name, window)
        for name in ("EulerDiscreteScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler")
        for window in WINDOWS
    ],
)
def test_image_to_image_counts_from_its_first_step(pipe: Any, positions: Any, name: str, window: Any) -> None:
    pipe = image_to_image(pipe)
    assert ah.apply_hidiffusion(pipe).task == "img2img"
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    image = torch.linspace(0, 1, 3 * 64 * 96).reshape(1, 3, 64, 96)
    draw = torch.Generator().manual_seed(0)
    arguments = {"image": image, "strength": 0.6, "num_inference_steps": 10, "output_type": "latent", **window}
    pipe("a", generator=draw, **arguments)
    steps = positions[-1][0] + 1
    assert 0 < steps < 10
    assert len(positions) in ((2 * steps - 1, 2 * steps) if name == "HeunDiscreteScheduler" else (steps,))
    order = 2 if name == "HeunDiscreteScheduler" else 1
    assert positions == [(call // order, steps) for call in range(len(positions))]


def test_another_pipeline_on_the_same_components_is_counted_rightly(pipe: Any, generate: Any, positions: Any) -> None:
    ah.apply_hidiffusion(pipe)
    generate(pipe, steps=3)
    other = StableDiffusionXLPipeline(**pipe.components, add_watermarker=False)
    other.set_progress_bar_config(disable=True)
    positions.clear()
    generate(other, steps=8)
    assert positions == [(step, 8) for step in range(8)]


@pytest.mark.parametrize(
    "name",
    [
        "EulerDiscreteScheduler",
        "DDIMScheduler",  # has no begin_index
    ],
)
def test_another_image_to_image_pipeline_on_the_same_components_is_counted_rightly(
    pipe: Any, generate: Any, positions: Any, name: str
) -> None:
    """The usual second pass: the same components, patched through the text-to-image pipeline."""
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    ah.apply_hidiffusion(pipe)
    generate(pipe, steps=3)
    positions.clear()
    image = torch.linspace(0, 1, 3 * 64 * 96).reshape(1, 3, 64, 96)
    image_to_image(pipe)("a", image=image, strength=0.6, num_inference_steps=10, output_type="latent")
    assert positions == [(step, 6) for step in range(6)]


def test_another_pipeline_on_the_same_components_does_not_inherit_a_seed(pipe: Any, generate: Any) -> None:
    other = StableDiffusionXLPipeline(**pipe.components, add_watermarker=False)
    other.set_progress_bar_config(disable=True)
    ah.apply_hidiffusion(pipe)
    generate(pipe, seed=1, steps=1)
    first = generate(other, seed=5)
    generate(pipe, seed=2, steps=1)
    assert torch.equal(generate(other, seed=5), first)
