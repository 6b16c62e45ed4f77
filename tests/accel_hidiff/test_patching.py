"""HiDiffusion on a live pipeline: exact removal, no state between requests, and clear refusals."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

import accel_hidiff as ah
from accel_hidiff import BadInput, NoPhase, NotAPipeline, PatchConflict, UnknownLayout
from accel_hidiff.shifts import window_shifts

STEPS = 7
BLOCKS = 5  # windowed transformer blocks of the tiny UNet


# ---- applying and removing


def test_the_patch_changes_the_image(plain_image: torch.Tensor, patched_image: torch.Tensor) -> None:
    """Otherwise nothing below would show anything."""
    assert (plain_image - patched_image).abs().max() > 1e-2 * plain_image.abs().max()


def test_apply_and_remove_leave_every_attribute_as_it_was(pipe: Any, snapshot: Any, assert_identical: Any) -> None:
    parts = (pipe, pipe.unet, pipe.vae, pipe.text_encoder, pipe.scheduler)
    before = [snapshot(part) for part in parts]
    patch = ah.apply_hidiffusion(pipe)
    assert vars(pipe.unet)["forward"] is not None and "prepare_extra_step_kwargs" in vars(pipe)
    patch.remove()
    for part, state in zip(parts, before, strict=True):
        assert_identical(state, snapshot(part))


def test_after_use_and_removal_the_unet_is_as_it_was_and_the_output_bit_identical(
    pipe: Any, generate: Any, plain_image: torch.Tensor, snapshot: Any, assert_identical: Any
) -> None:
    assert torch.equal(generate(pipe), plain_image)
    unet, names = snapshot(pipe.unet), list(vars(pipe))
    ah.apply_hidiffusion(pipe)
    assert not torch.equal(generate(pipe), plain_image)
    assert ah.remove_hidiffusion(pipe) is pipe
    assert_identical(unet, snapshot(pipe.unet))
    assert list(vars(pipe)) == names
    assert torch.equal(generate(pipe), plain_image)


class Boom(Exception):
    pass


def fail_inside_the_unet(error: type[BaseException]) -> Callable[[Any, Any], None]:
    """The middle block raises at the third UNet call."""

    def run(pipe: Any, generate: Any) -> None:
        calls = []

        def hook(module: Any, args: Any) -> None:
            calls.append(1)
            if len(calls) == 3:
                raise error

        handle = pipe.unet.mid_block.register_forward_pre_hook(hook)
        try:
            generate(pipe, seed=9)
        finally:
            handle.remove()

    return run


def fail_inside_a_window(pipe: Any, generate: Any) -> None:
    """The first feed-forward of a windowed block raises, so that call and window are both open."""
    block = pipe.unet.down_blocks[1].attentions[0].transformer_blocks[0]

    def hook(module: Any, args: Any) -> None:
        raise Boom

    handle = block.ff.register_forward_pre_hook(hook)
    try:
        generate(pipe, seed=9)
    finally:
        handle.remove()


def fail_in_the_callback(error: type[BaseException]) -> Callable[[Any, Any], None]:
    def run(pipe: Any, generate: Any) -> None:
        def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if step == 1:
                raise error
            return tensors

        generate(pipe, seed=9, steps=12, callback_on_step_end=callback)

    return run


FAILURES = {
    "exception in the unet": fail_inside_the_unet(Boom),
    "interrupt in the unet": fail_inside_the_unet(KeyboardInterrupt),
    "exception in a window": fail_inside_a_window,
    "exception in the callback": fail_in_the_callback(Boom),
    "interrupt in the callback": fail_in_the_callback(KeyboardInterrupt),
}


@pytest.mark.parametrize("fail", FAILURES.values(), ids=FAILURES)
def test_a_failed_request_leaves_nothing_behind(
    pipe: Any, generate: Any, fail: Any, patched_image: Any, plain_image: Any, snapshot: Any, assert_identical: Any
) -> None:
    before = snapshot(pipe.unet)
    patch = ah.apply_hidiffusion(pipe)
    with pytest.raises((Boom, KeyboardInterrupt)):
        fail(pipe, generate)
    assert patch.scope.call is None
    assert torch.equal(generate(pipe), patched_image), "the next request equals a fresh one"
    with pytest.raises((Boom, KeyboardInterrupt)):
        fail(pipe, generate)
    patch.remove()
    assert_identical(before, snapshot(pipe.unet))
    assert torch.equal(generate(pipe), plain_image)


def test_a_cancelled_request_leaves_the_next_one_fresh(pipe: Any, generate: Any, patched_image: torch.Tensor) -> None:
    ah.apply_hidiffusion(pipe)

    def cancel(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step >= 1
        return tensors

    generate(pipe, seed=9, steps=12, callback_on_step_end=cancel)
    assert torch.equal(generate(pipe), patched_image)


def test_applying_twice_does_not_stack(
    pipe: Any, generate: Any, patched_image: torch.Tensor, snapshot: Any, assert_identical: Any
) -> None:
    before = snapshot(pipe.unet)
    first = ah.apply_hidiffusion(pipe)
    text = repr(first)
    second = ah.apply_hidiffusion(pipe)
    assert repr(second) == text and "0 patches" in repr(first)
    assert torch.equal(generate(pipe), patched_image)
    second.remove()
    assert_identical(before, snapshot(pipe.unet))
    second.remove()
    first.remove()
    ah.remove_hidiffusion(pipe)
    assert_identical(before, snapshot(pipe.unet))


def test_applying_to_another_pipeline_with_the_same_unet_moves_the_patch(
    pipe: Any, generate: Any, snapshot: Any, assert_identical: Any, patched_image: torch.Tensor
) -> None:
    other = StableDiffusionXLPipeline(**pipe.components, add_watermarker=False)
    other.set_progress_bar_config(disable=True)
    before = snapshot(pipe), snapshot(pipe.unet)
    ah.apply_hidiffusion(pipe)
    ah.apply_hidiffusion(other)
    assert_identical(before[0], snapshot(pipe))
    assert torch.equal(generate(other), patched_image)
    ah.remove_hidiffusion(other)
    assert_identical(before[1], snapshot(pipe.unet))


def test_both_parts_off_is_bit_identical_to_the_plain_model(
    pipe: Any, generate: Any, plain_image: torch.Tensor
) -> None:
    patch = ah.apply_hidiffusion(pipe, apply_raunet=False, apply_window_attn=False)
    assert str(patch.plan(2048, 2048, 10)) == "[0, 10) plain"
    assert torch.equal(generate(pipe), plain_image)


def test_a_refused_apply_keeps_the_earlier_patch(pipe: Any, generate: Any, patched_image: torch.Tensor) -> None:
    ah.apply_hidiffusion(pipe)
    with pytest.raises(UnknownLayout):
        ah.apply_hidiffusion(pipe, family="sd15")
    with pytest.raises(BadInput, match="task"):
        ah.apply_hidiffusion(pipe, task="upscale")
    assert torch.equal(generate(pipe), patched_image)


def test_somebody_elses_wrapper_is_a_conflict_and_survives(
    pipe: Any, generate: Any, patched_image: torch.Tensor, plain_image: torch.Tensor
) -> None:
    patch = ah.apply_hidiffusion(pipe)
    transformer = pipe.unet.down_blocks[1].attentions[0]
    ours, calls = transformer.forward, []

    def theirs(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return ours(*args, **kwargs)

    transformer.forward = theirs
    for undo in (patch.remove, lambda: ah.remove_hidiffusion(pipe), lambda: ah.apply_hidiffusion(pipe)):
        with pytest.raises(PatchConflict, match=r"Transformer2DModel\.forward was replaced.*undo that first"):
            undo()
        assert transformer.forward is theirs
    assert torch.equal(generate(pipe), patched_image) and len(calls) == STEPS, "nothing was undone"
    transformer.forward = ours
    patch.remove()
    assert torch.equal(generate(pipe), plain_image)


def test_a_wrapper_that_was_there_before_stays(pipe: Any, generate: Any, plain_image: torch.Tensor) -> None:
    transformer = pipe.unet.down_blocks[1].attentions[0]
    inner, calls = transformer.forward, []

    def earlier(hidden_states: Any, encoder_hidden_states: Any = None, return_dict: bool = True, **kwargs: Any) -> Any:
        calls.append(1)
        return inner(hidden_states, encoder_hidden_states=encoder_hidden_states, return_dict=return_dict, **kwargs)

    transformer.forward = earlier
    ah.apply_hidiffusion(pipe)
    generate(pipe)
    assert len(calls) == STEPS
    ah.remove_hidiffusion(pipe)
    assert transformer.forward is earlier
    assert torch.equal(generate(pipe), plain_image)


def test_saving_and_loading_a_patched_pipeline_gives_the_plain_model(
    pipe: Any, generate: Any, plain_image: torch.Tensor, patched_image: torch.Tensor, tmp_path: Path
) -> None:
    pipe.unet.save_config(tmp_path / "before")
    ah.apply_hidiffusion(pipe)
    generate(pipe)
    pipe.save_pretrained(tmp_path)
    assert torch.equal(generate(pipe), patched_image), "saving does not disturb the patch"
    loaded = StableDiffusionXLPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert "forward" not in vars(loaded.unet)
    assert torch.equal(generate(loaded), plain_image)
    assert (tmp_path / "unet/config.json").read_text() == (tmp_path / "before/config.json").read_text()


def test_weights_have_the_same_names_and_tensors_when_patched(unet: Any) -> None:
    before = dict(unet.state_dict(keep_vars=True))
    ah.apply_hidiffusion(unet)
    after = dict(unet.state_dict(keep_vars=True))
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)


def test_a_deep_copy_of_a_patched_unet_is_refused(unet: Any) -> None:
    """A copy's forwards would run the original's weights; nothing silent may come of it."""
    ah.apply_hidiffusion(unet)
    with pytest.raises(PatchConflict, match="remove HiDiffusion, copy"):
        copy.deepcopy(unet)
    ah.remove_hidiffusion(unet)
    assert copy.deepcopy(unet) is not unet


def test_a_deep_copy_of_a_patched_block_is_refused_too(unet: Any) -> None:
    ah.apply_hidiffusion(unet)
    with pytest.raises(PatchConflict, match="remove HiDiffusion, copy"):
        copy.deepcopy(unet.down_blocks[1].attentions[0])


# ---- refusals


@pytest.mark.parametrize("thing", [None, 3, "pipe", torch.nn.Linear(1, 1), UNet2DConditionModel])
def test_other_objects_are_no_pipelines(thing: Any) -> None:
    for verb in (ah.apply_hidiffusion, ah.remove_hidiffusion):
        with pytest.raises(NotAPipeline, match="expected a diffusers pipeline with a UNet2DConditionModel"):
            verb(thing)


def test_a_pipeline_with_another_unet_is_named(pipe: Any) -> None:
    class Other:
        unet = pipe.vae

    with pytest.raises(NotAPipeline, match="got Other with unet=AutoencoderKL"):
        ah.apply_hidiffusion(Other())
    with pytest.raises(NotAPipeline, match="got AutoencoderKL"):
        ah.apply_hidiffusion(pipe.vae)


def test_an_unknown_layout_is_refused_with_what_was_found() -> None:
    unet = UNet2DConditionModel(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 8),
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=2,
    )
    with pytest.raises(UnknownLayout, match="got down DownBlock2D, CrossAttnDownBlock2D, up CrossAttnUpBlock2D"):
        ah.apply_hidiffusion(unet)
    assert "forward" not in vars(unet)


def test_a_bare_unet_without_a_phase_is_refused(unet: Any, inputs: Any) -> None:
    patch = ah.apply_hidiffusion(unet)
    args, kwargs = inputs()
    with torch.no_grad():
        with pytest.raises(NoPhase, match=r"patch\.phase\(step="):
            unet(*args, **kwargs)
        with patch.phase(step=0, num_steps=1):
            unet(*args, **kwargs)
        with pytest.raises(NoPhase):
            unet(*args, **kwargs)


@pytest.mark.parametrize("step", [-1, 10, 1.0, True, None, "3"])
def test_a_step_outside_of_the_request_is_refused(unet: Any, step: Any) -> None:
    patch = ah.apply_hidiffusion(unet)
    with pytest.raises(BadInput, match=r"step: expected an integer in 0\.\.9"):
        with patch.phase(step=step, num_steps=10):
            pass


@pytest.mark.parametrize("num_steps", [0, -3, 1.5, None])
def test_a_bad_number_of_steps_is_refused(unet: Any, num_steps: Any) -> None:
    with pytest.raises(BadInput, match="steps: expected an integer of at least 1"):
        with ah.apply_hidiffusion(unet).phase(step=0, num_steps=num_steps):
            pass


@pytest.mark.parametrize("shifts", [[0, 1, 2, 3], [0] * 6, [0, 1, 2, 3, 4], [0, 0, 0, 0, -1], 3, "abcde"])
def test_shifts_that_do_not_fit_are_refused_and_no_phase_is_left_open(unet: Any, inputs: Any, shifts: Any) -> None:
    patch = ah.apply_hidiffusion(unet)
    with pytest.raises(BadInput, match="window_shifts"):
        with patch.phase(step=0, num_steps=10, window_shifts=shifts):
            pass
    args, kwargs = inputs()
    with torch.no_grad(), pytest.raises(NoPhase):
        unet(*args, **kwargs)


def test_a_plan_for_a_size_that_cannot_be_is_refused(unet: Any) -> None:
    patch = ah.apply_hidiffusion(unet)
    with pytest.raises(BadInput, match="multiple of 8"):
        patch.plan(1020, 1024, 10)
    assert str(patch.plan(1024, 1536, 10)) == "[0, 1) windowed+dilated, [1, 4) windowed+pooled, [4, 10) windowed"


# ---- phases by hand


def drive(patch: Any, inputs: Any, step: int, shifts: Any = None, size: tuple[int, int] = (16, 24)) -> torch.Tensor:
    args, kwargs = inputs(*size)
    with torch.no_grad(), patch.phase(step=step, num_steps=10, window_shifts=shifts):
        return patch.unet(*args, **kwargs).sample


def test_phases_nest_and_the_outer_one_comes_back(unet: Any, inputs: Any) -> None:
    patch = ah.apply_hidiffusion(unet)
    expected = drive(patch, inputs, 0)
    args, kwargs = inputs()
    with torch.no_grad(), patch.phase(step=0, num_steps=10):
        assert not torch.equal(drive(patch, inputs, 5), expected)
        with pytest.raises(Boom), patch.phase(step=3, num_steps=10):
            raise Boom
        assert torch.equal(unet(*args, **kwargs).sample, expected)


def test_order_and_size_of_earlier_calls_have_no_influence(unet: Any, inputs: Any) -> None:
    patch = ah.apply_hidiffusion(unet)
    alone = {step: drive(patch, inputs, step) for step in (0, 2, 7)}
    for step in (7, 0, 2, 2, 0):
        drive(patch, inputs, 9 - step, size=(17, 23))
        assert torch.equal(drive(patch, inputs, step), alone[step])


def test_shifts_default_to_the_seed_of_the_config(unet: Any, inputs: Any) -> None:
    for seed in (0, 5):
        patch = ah.apply_hidiffusion(unet, config=ah.HiDiffusionConfig(shift_seed=seed))
        assert torch.equal(drive(patch, inputs, 6), drive(patch, inputs, 6, window_shifts(seed, 6, BLOCKS)))
    assert not torch.equal(drive(patch, inputs, 6, [0] * BLOCKS), drive(patch, inputs, 6, [2] * BLOCKS))


def test_the_call_may_be_given_by_name_and_return_a_tuple(unet: Any, inputs: Any) -> None:
    patch = ah.apply_hidiffusion(unet)
    (sample, timestep, text), kwargs = inputs()
    with torch.no_grad(), patch.phase(step=1, num_steps=10):
        out = unet(sample=sample, timestep=timestep, encoder_hidden_states=text, return_dict=False, **kwargs)
        assert isinstance(out, tuple) and torch.equal(out[0], unet(sample, timestep, text, **kwargs).sample)


def test_threads_drive_one_unet_in_different_phases(run_all: Any, unet: Any, inputs: Any) -> None:
    patch = ah.apply_hidiffusion(unet)
    expected = {step: drive(patch, inputs, step) for step in (0, 2, 8)}
    failures: list[Any] = []
    barrier = threading.Barrier(3)

    def work(step: int) -> None:
        barrier.wait()
        for _ in range(5):
            if not torch.equal(drive(patch, inputs, step), expected[step]):
                failures.append(step)

    run_all([threading.Thread(target=work, args=(step,)) for step in expected])
    assert failures == []
