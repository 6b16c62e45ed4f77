"""Replicas share weights in memory and nothing else; what runs before a request is added and taken off in any order."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

import accel_hidiff as ah
from accel_hidiff.entrance import enter_alone, run_before
from tests import models


def build() -> Any:
    return models.build("sdxl", "text2img")


def image(pipe: Any, **changes: Any) -> torch.Tensor:
    return pipe(**models.arguments("sdxl", "text2img", 128, 192, num_inference_steps=3, **changes)).images


class TestReplica:
    def test_it_makes_the_same_image_and_shares_every_weight_in_memory(self) -> None:
        pipe = build()
        other = ah.replica(pipe)
        assert type(other) is type(pipe) and torch.equal(image(other), image(pipe))
        for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
            ours, theirs = getattr(pipe, name), getattr(other, name)
            assert ours is not theirs
            for mine, its in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
                assert mine.data_ptr() == its.data_ptr() and mine is not its

    def test_scheduler_and_modules_are_its_own(self) -> None:
        pipe = build()
        other = ah.replica(pipe)
        shared = {id(module) for module in pipe.unet.modules()} & {id(module) for module in other.unet.modules()}
        assert not shared and other.scheduler is not pipe.scheduler and other.tokenizer is not pipe.tokenizer
        image(pipe)
        assert not torch.equal(other.scheduler.timesteps, pipe.scheduler.timesteps)
        assert dict(other.config) == dict(pipe.config) and other.components.keys() == pipe.components.keys()

    def test_weights_changed_in_place_are_changed_in_both(self) -> None:
        pipe = build()
        other = ah.replica(pipe)
        before = image(other)
        with torch.no_grad():
            pipe.unet.conv_out.weight.mul_(2.0)
        assert not torch.equal(image(other), before) and torch.equal(image(other), image(pipe))

    def test_a_lora_that_is_fused_in_one_is_fused_in_both(self) -> None:
        from tests.accel_hidiff.test_variants import ATTENTION, add_lora

        pipe = build()
        other = ah.replica(pipe)
        before = image(other)
        add_lora(pipe.unet, ATTENTION)
        assert torch.equal(image(other), before)
        pipe.unet.fuse_lora()
        pipe.unet.unload_lora()
        assert not torch.equal(image(other), before) and torch.equal(image(other), image(pipe))

    def test_what_is_cast_or_assigned_in_one_stays_there(self) -> None:
        pipe = build()
        other = ah.replica(pipe)
        before = image(other)
        pipe.vae.to(torch.float16)
        pipe.unet.load_state_dict(models.build("sdxl", "text2img", seed=5).unet.state_dict(), assign=True)
        assert other.vae.dtype == torch.float32 and torch.equal(image(other), before)

    def test_tied_weights_stay_tied(self) -> None:
        first, second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
        second.weight = first.weight
        copied = ah.replica(torch.nn.Sequential(first, second))
        assert copied[0].weight is copied[1].weight is not first.weight
        assert copied[0].weight.data_ptr() == first.weight.data_ptr()

    @pytest.mark.parametrize("apply", [ah.apply_hidiffusion, lambda pipe: ah.apply_cfgpp(pipe, 0.5)])
    def test_a_patched_pipeline_is_refused(self, apply: Any) -> None:
        pipe = build()
        apply(pipe)
        with pytest.raises(ah.PatchConflict, match="remove HiDiffusion, copy"):
            ah.replica(pipe)

    def test_other_things_are_refused(self) -> None:
        with pytest.raises(ah.BadInput, match="expected a diffusers pipeline or a module, got int"):
            ah.replica(3)


class TestEntrance:
    @pytest.mark.parametrize("first_off", [0, 1])
    def test_features_come_off_in_any_order(self, first_off: int) -> None:
        pipe, seen = build(), []
        features = [run_before(pipe, check_inputs=lambda name=name: seen.append(name)) for name in "ab"]
        image(pipe)
        assert seen == ["b", "a"]
        features.pop(first_off).remove()
        image(pipe)
        assert seen == ["b", "a", "ab"[1 - first_off]]
        features[0].remove()
        assert "check_inputs" not in vars(pipe) and not [name for name in vars(pipe) if "accel_hidiff" in name]

    @pytest.mark.parametrize("first_off", ["hidiffusion", "cfgpp"])
    def test_hidiffusion_and_cfgpp_come_off_in_any_order(self, first_off: str) -> None:
        pipe = build()
        before = image(pipe)
        ah.apply_hidiffusion(pipe)
        ah.apply_cfgpp(pipe, 0.5)
        removals = {"hidiffusion": ah.remove_hidiffusion, "cfgpp": ah.remove_cfgpp}
        removals.pop(first_off)(pipe)
        next(iter(removals.values()))(pipe)
        assert torch.equal(image(pipe), before) and "check_inputs" not in vars(pipe)

    def test_somebody_elses_wrapper_is_a_conflict(self) -> None:
        pipe = build()
        ah.apply_hidiffusion(pipe)
        theirs = pipe.check_inputs = lambda *args, **kwargs: None
        with pytest.raises(ah.PatchConflict, match="check_inputs was replaced"):
            ah.remove_hidiffusion(pipe)
        assert pipe.check_inputs is theirs

    def test_a_thread_that_has_left_its_request_holds_nothing(self) -> None:
        """Also where the exception, and with it the frames of the request, is kept."""
        pipe, kept = build(), []
        ah.apply_hidiffusion(pipe)
        left, done = threading.Event(), threading.Event()

        def fails(*args: Any) -> Any:
            raise TimeoutError

        def work() -> None:
            try:
                image(pipe, callback_on_step_end=fails)
            except TimeoutError as error:
                kept.append(error)
            left.set()
            done.wait(60)

        thread = threading.Thread(target=work)
        thread.start()
        assert left.wait(60)
        image(pipe)
        done.set()
        thread.join()
        assert len(kept) == 1
        image(pipe)

    def test_one_thread_may_enter_again(self) -> None:
        pipe = build()
        enter_alone(pipe)
        enter_alone(pipe)
