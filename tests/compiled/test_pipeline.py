"""The compiled path against the eager one, and what a handle promises."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import accel_hidiff as ah
from accel_hidiff.backends import aot, aot_package
from compile_cache import CompileCache
from tests.compiled.conftest import (
    SIZES,
    STEPS,
    accelerate_strict,
    relative_difference,
    request,
    unet_inputs,
)
from tests.conftest import ARTIFACTS, BOUND

TOLERANCE = 1e-3


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_step_of_a_full_run_equals_patched_eager(strict: Any, make_pipe: Any, size: Any, batch: int) -> None:
    eager_unet = make_pipe().unet
    eager = ah.apply_hidiffusion(eager_unet)
    inputs = unet_inputs(eager_unet, *size, batch)
    seen = set()
    with torch.no_grad(), strict.stats.expect(hits=STEPS, eager_calls=0, compiles=0):
        for step in range(STEPS):
            shifts = [(step + block) % 4 for block in range(len(eager.windowed_blocks))]
            seen.add(str(strict.patch.plan(*size, STEPS).at(step)))
            with strict.patch.phase(step=step, num_steps=STEPS, window_shifts=shifts):
                got = strict.pipe.unet(**inputs).sample
            with eager.phase(step=step, num_steps=STEPS, window_shifts=shifts):
                want = eager_unet(**inputs).sample
            assert relative_difference(got, want) < TOLERANCE
    assert seen == {"windowed+dilated", "windowed+pooled", "windowed"}


def test_shifts_reach_the_compiled_graph(strict: Any) -> None:
    inputs = unet_inputs(strict.pipe.unet, 128, 192, 2)
    blocks = len(strict.patch.windowed_blocks)
    outs = []
    with torch.no_grad():
        for shift in (0, 2):
            with strict.patch.phase(step=6, num_steps=STEPS, window_shifts=[shift] * blocks):
                outs.append(strict.pipe.unet(**inputs).sample)
    assert relative_difference(outs[0], outs[1]) > 10 * TOLERANCE


@pytest.mark.parametrize("guidance_scale", [5.0, 0.0])
def test_images_equal_patched_eager(strict: Any, make_pipe: Any, guidance_scale: float) -> None:
    eager = make_pipe()
    ah.apply_hidiffusion(eager)
    for height, width in SIZES:
        options = {"guidance_scale": guidance_scale, "output_type": "np"}
        got = torch.from_numpy(request(strict.pipe, height, width, **options))
        want = torch.from_numpy(request(eager, height, width, **options))
        assert relative_difference(got, want) < 5e-3


def test_artifacts_are_shared_over_blocks_phases_sizes_and_batches(precompiled: Any) -> None:
    _, report = precompiled
    assert report.compiled == report.artifacts == ARTIFACTS
    assert report.graphs == 3 * (2 * 3 + 1)  # sizes x (batches x topologies + decoder)


def test_a_warm_start_loads_and_compiles_nothing(make_pipe: Any, cache_dir: Path) -> None:
    handle = accelerate_strict(make_pipe(), cache_dir)
    with handle.stats.expect(compiles=0, misses=0, loads=ARTIFACTS, bindings=BOUND, hits=STEPS + 1):
        request(handle.pipe, output_type="np")
    with handle.stats.expect(loads=0, bindings=0, hits=STEPS):
        request(handle.pipe, 256, 128)


def test_load_makes_the_first_request_find_everything_ready(strict: Any) -> None:
    with strict.stats.expect(loads=ARTIFACTS, bindings=BOUND, hits=0):
        strict.load(SIZES, STEPS)
    assert {row.state for row in strict.explain(128, 192, STEPS).rows} == {"loaded"}
    with strict.stats.expect(loads=0, bindings=0, compiles=0):
        request(strict.pipe, output_type="np")


def test_precompiling_again_compiles_nothing(strict: Any) -> None:
    report = strict.precompile(SIZES, STEPS)
    assert (report.compiled, report.found) == (0, ARTIFACTS)


def test_another_checkpoint_of_the_architecture_uses_the_same_artifacts(make_pipe: Any, cache_dir: Path) -> None:
    handle, eager = accelerate_strict(make_pipe(seed=7), cache_dir), make_pipe(seed=7)
    ah.apply_hidiffusion(eager)
    with handle.stats.expect(compiles=0):
        got = request(handle.pipe)
    assert relative_difference(got, request(eager)) < 5e-3


def test_the_pipeline_stays_the_users_own(strict: Any, make_pipe: Any) -> None:
    plain, unet = make_pipe(), strict.pipe.unet
    assert type(unet) is type(plain.unet) and unet.config == plain.unet.config
    assert (unet.dtype, unet.device) == (plain.unet.dtype, plain.unet.device)
    assert unet.attn_processors.keys() == plain.unet.attn_processors.keys()
    assert unet.state_dict().keys() == plain.unet.state_dict().keys()
    assert type(strict.pipe) is type(plain)


def test_remove_restores_the_pipeline_bit_for_bit(make_pipe: Any, cache_dir: Path) -> None:
    pipe = make_pipe()
    before = request(pipe, output_type="np")
    names = {path: set(vars(module)) for path, module in [*pipe.unet.named_modules(), *pipe.vae.named_modules()]}
    pipe_names = set(vars(pipe))
    handle = accelerate_strict(pipe, cache_dir)
    request(pipe)
    assert handle.remove() is pipe
    after = {path: set(vars(module)) for path, module in [*pipe.unet.named_modules(), *pipe.vae.named_modules()]}
    assert names == after and pipe_names == set(vars(pipe))
    assert (request(pipe, output_type="np") == before).all()


def test_remove_gives_programs_and_descriptors_back_at_once(make_pipe: Any, cache_dir: Path) -> None:
    """Without waiting for the garbage collector, which does not know how much they hold."""
    process, pipe = psutil.Process(), make_pipe()
    before = process.num_fds()
    gc.disable()
    try:
        for _ in range(3):
            handle = accelerate_strict(pipe, cache_dir)
            request(pipe, output_type="np")
            assert process.num_fds() >= before + ARTIFACTS
            handle.remove()
            assert process.num_fds() == before
    finally:
        gc.enable()


def test_accelerating_twice_replaces_the_first_handle(make_pipe: Any, cache_dir: Path) -> None:
    pipe = make_pipe()
    accelerate_strict(pipe, cache_dir)
    handle = accelerate_strict(pipe, cache_dir)
    request(pipe)
    assert handle.stats.hits == STEPS
    handle.remove()
    assert not [module for module in pipe.unet.modules() if "forward" in vars(module)]


def test_an_eager_patch_on_an_accelerated_pipeline_is_refused(strict: Any) -> None:
    with pytest.raises(ah.AccelHiDiffError, match="remove"):
        ah.apply_hidiffusion(strict.pipe)
    with pytest.raises(ah.AccelHiDiffError, match="remove"):
        ah.remove_hidiffusion(strict.pipe)


def test_weights_changed_in_place_are_seen_without_recompiling(strict: Any, make_pipe: Any) -> None:
    request(strict.pipe)
    eager = make_pipe()
    ah.apply_hidiffusion(eager)
    with torch.no_grad():
        for pipe in (strict.pipe, eager):
            pipe.unet.mid_block.attentions[0].proj_out.weight.mul_(3.0)
    with strict.stats.expect(compiles=0, bindings=0):
        got = request(strict.pipe)
    assert relative_difference(got, request(eager)) < 5e-3


def test_replaced_weights_are_bound_anew(strict: Any, make_pipe: Any) -> None:
    request(strict.pipe)
    other, eager = make_pipe(seed=3), make_pipe(seed=3)
    ah.apply_hidiffusion(eager)
    strict.pipe.unet.load_state_dict(other.unet.state_dict(), assign=True)
    strict.pipe.text_encoder, strict.pipe.text_encoder_2 = other.text_encoder, other.text_encoder_2
    with strict.stats.expect(compiles=0, bindings=BOUND - 1):
        got = request(strict.pipe)
    assert relative_difference(got, request(eager)) < 5e-3


def test_plain_unet_without_hidiffusion(make_pipe: Any, own_cache: Path) -> None:
    """Only the level that windows would change needs a graph of its own; everything else is shared."""
    pipe, plain = make_pipe(), make_pipe()
    handle = ah.accelerate(pipe, cache=own_cache)
    assert str(handle.patch.plan(128, 192, STEPS)) == f"[0, {STEPS}) plain"
    got = request(pipe)
    assert relative_difference(got, request(plain)) < 5e-3
    assert handle.stats.eager_calls == 0


def test_explain_tells_the_graph_of_every_step(strict: Any, tmp_path: Path) -> None:
    explanation = strict.explain(128, 192, STEPS)
    assert [(row.steps, row.topology) for row in explanation.rows] == [
        ("[0, 1)", "windowed+dilated"),
        ("[1, 2)", "windowed+pooled"),
        ("[2, 7)", "windowed"),
        ("after", "VAE decoder"),
    ]
    assert explanation.ready and {row.state for row in explanation.rows} == {"cached"}
    assert "windowed+pooled" in str(explanation)


def test_explain_tells_what_is_missing_and_why(make_pipe: Any, tmp_path: Path) -> None:
    handle = ah.accelerate(make_pipe(), hidiffusion=ah.HiDiffusionConfig(), cache=tmp_path / "empty")
    explanation = handle.explain(128, 192, STEPS)
    assert not explanation.ready
    assert explanation.rows[0].state == "missing 11 of 11 artifacts"
    assert "holds no entries" in str(explanation)
    assert not (tmp_path / "empty").exists()


class TestMisses:
    def test_error_raises_with_the_reason_and_the_command(self, make_pipe: Any, tmp_path: Path) -> None:
        handle = accelerate_strict(make_pipe(), tmp_path / "empty")
        with pytest.raises(ah.GraphMiss) as caught:
            request(handle.pipe)
        text = str(caught.value)
        assert "\n" not in text and "holds no entries" in text and "accel-hidiff precompile" in text
        assert handle.stats.misses == 1 and not (tmp_path / "empty").exists()

    def test_eager_serves_the_right_image_and_says_why(self, make_pipe: Any, tmp_path: Path) -> None:
        eager = make_pipe()
        ah.apply_hidiffusion(eager)
        config = ah.HiDiffusionConfig()
        handle = ah.accelerate(make_pipe(), hidiffusion=config, cache=tmp_path / "empty", on_miss="eager")
        assert torch.equal(request(handle.pipe), request(eager))
        assert handle.stats.eager_calls == STEPS and handle.stats.compiles == 0
        assert any("holds no entries" in reason for reason in handle.stats.rejected)

    def test_a_cache_that_is_filled_meanwhile_is_found_by_the_next_request(
        self, make_pipe: Any, own_cache: Path, tmp_path: Path
    ) -> None:
        config, location = ah.HiDiffusionConfig(), tmp_path / "later"
        handle = ah.accelerate(make_pipe(), hidiffusion=config, cache=location, on_miss="eager")
        request(handle.pipe)
        own_cache.rename(location)
        with handle.stats.expect(hits=STEPS, eager_calls=0):
            request(handle.pipe)

    def test_a_cache_of_another_torch_is_named(
        self, make_pipe: Any, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        here = aot._factors("cpu")
        other = {**here, "environment": {**here["environment"], "torch": "2.99.0"}}
        monkeypatch.setattr(aot, "_factors", lambda device, target: other)
        handle = accelerate_strict(make_pipe(), cache_dir)
        with pytest.raises(ah.GraphMiss, match=r"environment\.torch: 2\.99\.0 here, 2\.\d+\.\d+\S* there"):
            request(handle.pipe)


class TestGuard:
    def test_gradients_are_refused(self, strict: Any) -> None:
        inputs = unet_inputs(strict.pipe.unet, 128, 192, 1)
        with strict.patch.phase(step=0, num_steps=STEPS), pytest.raises(ah.GraphMiss, match="no_grad"):
            strict.pipe.unet(**inputs)

    def test_autocast_is_refused(self, strict: Any) -> None:
        inputs = unet_inputs(strict.pipe.unet, 128, 192, 1)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), strict.patch.phase(step=0, num_steps=STEPS):
            with pytest.raises(ah.GraphMiss, match="autocast"):
                strict.pipe.unet(**inputs)

    def test_attention_arguments_are_refused(self, strict: Any) -> None:
        inputs = unet_inputs(strict.pipe.unet, 128, 192, 1)
        with torch.no_grad(), strict.patch.phase(step=0, num_steps=STEPS):
            with pytest.raises(ah.GraphMiss, match="cross_attention_kwargs"):
                strict.pipe.unet(**inputs, cross_attention_kwargs={"scale": 0.5})

    def test_hooks_are_refused(self, strict: Any) -> None:
        strict.pipe.unet.mid_block.resnets[0].register_forward_hook(lambda *_: None)
        with pytest.raises(ah.GraphMiss, match="hooks"):
            request(strict.pipe)

    def test_a_size_outside_of_the_served_range_needs_a_graph_of_its_own(self, strict: Any) -> None:
        with pytest.raises(ah.GraphMiss, match="missing"):
            request(strict.pipe, 72, 128)  # 9 latent cells: an odd feature map under window attention

    @pytest.mark.parametrize("tokens", [1, 50, 154, 256])
    def test_other_text_lengths_are_served_by_the_same_graphs(self, strict: Any, make_pipe: Any, tokens: int) -> None:
        inputs = unet_inputs(strict.pipe.unet, 128, 192, 1)
        draw = torch.Generator().manual_seed(tokens)
        inputs["encoder_hidden_states"] = torch.randn(1, tokens, 32, generator=draw)
        eager = ah.apply_hidiffusion(make_pipe().unet)
        with torch.no_grad(), strict.stats.expect(compiles=0, eager_calls=0):
            with strict.patch.phase(step=0, num_steps=STEPS):
                got = strict.pipe.unet(**inputs).sample
            with eager.phase(step=0, num_steps=STEPS):
                want = eager.unet(**inputs).sample
        assert relative_difference(got, want) < TOLERANCE


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"backend": "tensorrt"}, "backend: expected one of"),
            ({"on_miss": "panic"}, "on_miss: expected one of"),
            ({"regions": "all"}, "regions: expected one of"),
            ({"shapes": "any"}, "shapes: expected one of"),
            ({"cache": None}, "cache: expected"),
            ({"guidance": object()}, "guidance: expected a CFGPlusPlusConfig or None"),
            ({"hidiffusion": {"t1_ratio": 0.5}}, "hidiffusion: expected"),
        ],
    )
    def test_options_are_checked_before_anything_is_touched(
        self, make_pipe: Any, tmp_path: Path, options: Any, match: str
    ) -> None:
        pipe = make_pipe()
        with pytest.raises(ah.BadInput, match=match):
            ah.accelerate(pipe, **{"cache": tmp_path / "cache", **options})
        assert not any("forward" in vars(module) for module in pipe.unet.modules())
        assert not (tmp_path / "cache").exists()

    def test_a_bare_unet_is_no_pipeline(self, make_pipe: Any, tmp_path: Path) -> None:
        with pytest.raises(ah.BadInput, match="pipeline"):
            ah.accelerate(make_pipe().unet, cache=tmp_path)

    @pytest.mark.parametrize("size", [(0, 128), (-8, 128), (100, 128), (128, "128"), (128, 128.0), (True, 128)])
    def test_sizes_are_checked(self, strict: Any, size: Any) -> None:
        with pytest.raises(ah.BadInput, match="expected"):
            strict.precompile([size], STEPS)
        with pytest.raises(ah.BadInput, match="expected"):
            strict.explain(*size, STEPS)

    def test_steps_batches_and_empty_lists_are_checked(self, strict: Any) -> None:
        for arguments in (([(128, 128)], 0), ([], 5)):
            with pytest.raises(ah.BadInput):
                strict.precompile(*arguments)
        with pytest.raises(ah.BadInput, match="batch_sizes"):
            strict.precompile([(128, 128)], 5, batch_sizes=(0,))


def test_the_eager_backend_needs_no_cache(make_pipe: Any) -> None:
    eager = make_pipe()
    ah.apply_hidiffusion(eager)
    handle = ah.accelerate(make_pipe(), hidiffusion=ah.HiDiffusionConfig(), backend="eager")
    assert torch.equal(request(handle.pipe), request(eager))
    assert handle.stats.eager_calls == STEPS and not handle.stats.rejected
    assert {row.state for row in handle.explain(128, 192, STEPS).rows} == {"eager"}


def test_a_read_only_cache_serves(make_pipe: Any, cache_dir: Path) -> None:
    cache = CompileCache(cache_dir, read_only=True)
    handle = ah.accelerate(make_pipe(), hidiffusion=ah.HiDiffusionConfig(), cache=cache, on_miss="error")
    request(handle.pipe)
    assert handle.stats.hits == STEPS


def test_a_copied_cache_serves(make_pipe: Any, own_cache: Path) -> None:
    handle = accelerate_strict(make_pipe(), own_cache)
    request(handle.pipe)
    assert handle.stats.hits == STEPS


def test_a_feature_size_that_the_plan_does_not_know_is_refused(strict: Any) -> None:
    """Whoever changes sizes inside of the UNet must not feed a compiled region with what it was not bound for."""
    block = strict.pipe.unet.down_blocks[0]
    original = block.downsamplers[0].forward
    block.downsamplers[0].forward = lambda hidden: original(hidden)[..., :-2]
    with pytest.raises(ah.GraphMiss, match="the plan gives it inputs of shape"):
        request(strict.pipe)
    del block.downsamplers[0].forward


def test_remove_refuses_as_a_whole_when_somebody_else_wrapped_a_forward(strict: Any) -> None:
    block = strict.pipe.unet.mid_block.resnets[0]
    ours = block.forward
    block.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    with pytest.raises(ah.PatchConflict):
        strict.remove()
    assert "forward" in vars(strict.pipe.vae.decoder)
    block.forward = ours


@pytest.mark.usefixtures("nothing_loaded")
def test_what_the_collector_frees_while_something_is_traced_is_used_again(make_pipe: Any, cache_dir: Path) -> None:
    """In a kernel of tracing all operators are meta's; the collector does not wait for its end."""
    handle = accelerate_strict(make_pipe(), cache_dir)
    request(handle.pipe)
    gc.collect()
    with torch._C._DisableTorchDispatch(), torch._C._PreserveDispatchKeyGuard():
        torch._C._set_meta_in_tls_dispatch_include(True)
        handle.remove()
        del handle
        gc.collect()
    idle = _idle_programs()
    assert idle and all(slot.numel() == 0 for package in idle for slot in package._slots.values())
    again = accelerate_strict(make_pipe(), cache_dir)
    with again.stats.expect(eager_calls=0):
        request(again.pipe)
    assert not _idle_programs()
    again.remove()
    del again
    gc.collect()
    assert set(map(id, _idle_programs())) == set(map(id, idle))


def _idle_programs() -> list[Any]:
    return [package for packages in aot_package._idle.values() for package in packages]
