"""Several threads, several pipelines over the same weights: each image is, bit for bit, that of its request alone.

What may not be shared is refused with one line that says what to do; see docs/production.md.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import accel_hidiff as ah
from accel_hidiff.compiling.pool import CompilePool
from compile_cache import CompileCache
from tests import models
from tests.compiled.conftest import SIZES, STEPS, relative_difference, request
from tests.compiled.test_background import without

CONFIG = ah.HiDiffusionConfig()
THREADS = 4

# (height, width, steps, seed): sizes, phases and shifts that differ; the guidance decides the UNet's batch.
REQUESTS = [
    {"height": height, "width": width, "num_inference_steps": steps, "seed": seed, "guidance_scale": guidance}
    for (height, width), steps, seed, guidance in zip(
        SIZES * 2, (7, 3, 9, 5, 8, 4), (0, 1, 2, 3, 4, 5), (5.0, 0.0, 7.5, 5.0, 0.0, 3.0), strict=True
    )
]


def image(pipe: Any, **options: Any) -> torch.Tensor:
    seed = options.pop("seed", 0)
    generator = torch.Generator().manual_seed(seed)
    return torch.as_tensor(request(pipe, output_type="pt", generator=generator, **options))


def in_threads(works: list[Callable[[], Any]]) -> list[Any]:
    """What each returned; they begin at the same moment."""
    barrier = threading.Barrier(len(works))

    def work(run: Callable[[], Any]) -> Any:
        barrier.wait(60)
        return run()

    with ThreadPoolExecutor(len(works)) as executor:
        return list(executor.map(work, works))


def serve(pipe: Any, cache: Path | CompileCache, **options: Any) -> Any:
    store = cache if isinstance(cache, CompileCache) else CompileCache(cache, read_only=True)
    return ah.accelerate(pipe, **{"hidiffusion": CONFIG, "cache": store, "on_miss": "error", **options})


@pytest.fixture(scope="module")
def alone(cache_dir: Path) -> list[torch.Tensor]:
    """The images of REQUESTS, one after the other on one pipeline."""
    handle = serve(models.build("sdxl", "text2img"), cache_dir)
    made = [image(handle.pipe, **one) for one in REQUESTS]
    assert all(relative_difference(one, two) > 5e-3 for one, two in zip(made[:3], made[3:], strict=True))
    return made


def all_requests(pipe: Any, alone: list[torch.Tensor], seed: int) -> list[bool]:
    """Whether each image is that of its request alone; in an order of this thread's own."""
    order = list(range(len(REQUESTS)))
    random.Random(seed).shuffle(order)
    return [torch.equal(image(pipe, **REQUESTS[number]), alone[number]) for number in order]


class TestSharedWeights:
    def test_replicas_in_threads_make_the_images_of_each_request_alone(self, cache_dir: Path, alone: Any) -> None:
        """Of different sizes, steps, seeds and batches at the same moment, from one CompileCache object."""
        pipe = models.build("sdxl", "text2img")
        cache = CompileCache(cache_dir, read_only=True)
        handles = [serve(one, cache) for one in [*(ah.replica(pipe) for _ in range(THREADS - 1)), pipe]]
        storages = {handle.pipe.unet.conv_in.weight.data_ptr() for handle in handles}
        assert len(storages) == 1
        works = [lambda h=handle, n=n: all_requests(h.pipe, alone, n) for n, handle in enumerate(handles)]
        assert in_threads(works) == [[True] * len(REQUESTS)] * THREADS
        for handle in handles:
            assert handle.stats.eager_calls == handle.stats.compiles == 0
            handle.remove()

    def test_pipelines_over_the_same_parameter_objects(self, cache_dir: Path, alone: Any) -> None:
        pipes = [models.build("sdxl", "text2img", seed=seed) for seed in (0, 1)]
        for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
            ours, theirs = (getattr(pipe, name) for pipe in pipes)
            for path, module in ours.named_modules():
                theirs.get_submodule(path)._parameters.update(module._parameters)
        handles = [serve(pipe, cache_dir) for pipe in pipes]
        works = [lambda h=handle, n=n: all_requests(h.pipe, alone, n) for n, handle in enumerate(handles)]
        assert in_threads(works) == [[True] * len(REQUESTS)] * 2

    def test_other_settings_on_the_same_weights_do_not_cross(self, cache_dir: Path) -> None:
        """Compiled, eager, without windows, with CFG++, and not patched at all, at the same moment."""
        pipe = models.build("sdxl", "text2img")
        pipes = [ah.replica(pipe) for _ in range(5)]
        serve(pipes[0], cache_dir)
        serve(pipes[1], cache_dir, hidiffusion=ah.HiDiffusionConfig(windowed=False), on_miss="eager")
        ah.apply_hidiffusion(pipes[2], config=CONFIG)
        ah.apply_hidiffusion(pipes[3], config=ah.HiDiffusionConfig(shift_seed=9))
        ah.apply_cfgpp(pipes[3], 0.5)
        want = [image(pipe, seed=number) for number, pipe in enumerate(pipes)]
        works = [lambda p=p, n=n: [image(p, seed=n) for _ in range(3)] for n, p in enumerate(pipes)]
        for got, expected in zip(in_threads(works), want, strict=True):
            assert all(torch.equal(one, expected) for one in got)

    def test_a_lora_that_is_fused_between_requests_is_in_all_of_them(self, cache_dir: Path) -> None:
        from tests.accel_hidiff.test_variants import ATTENTION, add_lora

        pipe = models.build("sdxl", "text2img")
        fusing = ah.replica(pipe)
        handles = [serve(ah.replica(pipe), cache_dir) for _ in range(2)]
        before = image(handles[0].pipe)
        add_lora(fusing.unet, ATTENTION)
        fusing.unet.fuse_lora()
        fusing.unet.unload_lora()
        ah.apply_hidiffusion(fusing, config=CONFIG)
        want = image(fusing)
        for got in in_threads([lambda h=handle: image(h.pipe) for handle in handles]):
            assert relative_difference(got, want) < 5e-3 < relative_difference(got, before)
        assert [handle.stats.compiles + handle.stats.eager_calls for handle in handles] == [0, 0]

    def test_in_the_background_two_replicas_share_what_is_compiled(self, own_cache: Path, alone: Any) -> None:
        pipe = models.build("sdxl", "text2img")
        cache = CompileCache(without(own_cache, "resnet"))
        with CompilePool() as pool:
            options = {"on_miss": "background", "background": pool}
            handles = [serve(one, cache, **options) for one in (ah.replica(pipe), pipe)]

            def run(handle: Any) -> list[float]:
                return [relative_difference(image(handle.pipe, **REQUESTS[0]), alone[0]) for _ in range(3)]

            for differences in in_threads([lambda h=handle: run(h) for handle in handles]):
                assert max(differences) < 5e-3
            assert all(handle.wait(240) for handle in handles)
            for handle in handles:
                with handle.stats.expect(eager_calls=0, compiles=0):
                    assert torch.equal(image(handle.pipe, **REQUESTS[0]), alone[0])
                handle.remove()


@pytest.fixture
def handle(cache_dir: Path) -> Iterator[Any]:
    handle = serve(models.build("sdxl", "text2img"), cache_dir)
    yield handle
    handle.remove()


class TestOnePipelineObject:
    def test_a_second_request_is_refused_and_the_first_one_is_right(self, handle: Any, alone: Any) -> None:
        inside, go_on = threading.Event(), threading.Event()

        def waits(pipe: Any, step: int, timestep: Any, kwargs: Any) -> Any:
            inside.set()
            assert go_on.wait(60)
            return kwargs

        with ThreadPoolExecutor(1) as executor:
            first = executor.submit(image, handle.pipe, callback_on_step_end=waits, **REQUESTS[0])
            assert inside.wait(60)
            with pytest.raises(ah.PipelineBusy, match=r"one request of a StableDiffusionXLPipeline.*ah\.replica"):
                image(handle.pipe, **REQUESTS[1])
            go_on.set()
            assert torch.equal(first.result(60), alone[0])
            assert torch.equal(image(handle.pipe, **REQUESTS[1]), alone[1])  # the other thread lives, and is idle

    def test_threads_that_come_back_later_get_their_images(self, handle: Any, alone: Any) -> None:
        """Whatever interleaving: an image is right, or its request was refused."""

        def insists(number: int) -> tuple[bool, int]:
            refused = 0
            while True:
                try:
                    return torch.equal(image(handle.pipe, **REQUESTS[number]), alone[number]), refused
                except ah.PipelineBusy:
                    refused += 1
                    threading.Event().wait(0.01)

        results = in_threads([lambda n=n: insists(n) for n in range(THREADS)])
        assert all(right for right, _ in results) and sum(refused for _, refused in results) > 0

    def test_an_eager_patch_refuses_too(self) -> None:
        pipe = models.build("sdxl", "text2img")
        ah.apply_hidiffusion(pipe, config=CONFIG)
        busy = []

        def intrudes(pipe: Any, step: int, timestep: Any, kwargs: Any) -> Any:
            with ThreadPoolExecutor(1) as executor:
                busy.append(type(executor.submit(image, pipe).exception(60)))
            return kwargs

        want = image(pipe)
        assert torch.equal(image(pipe, callback_on_step_end=intrudes), want)
        assert busy == [ah.PipelineBusy] * STEPS


class TestSharedModules:
    """Two pipelines over one UNet, VAE or scheduler object."""

    @staticmethod
    def other(handle: Any, **components: Any) -> Any:
        pipe = diffusers.StableDiffusionXLPipeline(**{**handle.pipe.components, **components}, add_watermarker=False)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def test_one_unet_cannot_be_accelerated_twice(self, handle: Any, cache_dir: Path, alone: Any) -> None:
        with pytest.raises(ah.AccelHiDiffError, match=r"accelerated already.*ah\.replica, before accelerate"):
            serve(self.other(handle, vae=models.build("sdxl", "text2img").vae), cache_dir)
        assert torch.equal(image(handle.pipe, **REQUESTS[0]), alone[0])

    def test_one_vae_cannot_be_accelerated_twice(self, handle: Any, cache_dir: Path, alone: Any) -> None:
        other = self.other(handle, unet=models.build("sdxl", "text2img", seed=1).unet)
        untouched = set(vars(other)), set(vars(other.unet))
        with pytest.raises(ah.AccelHiDiffError, match=r"vae: this VAE is accelerated.*ah\.replica\(vae\)"):
            serve(other, cache_dir)
        assert (set(vars(other)), set(vars(other.unet))) == untouched
        assert torch.equal(image(handle.pipe, **REQUESTS[0]), alone[0])

    def test_text_encoders_may_be_shared(self, handle: Any, cache_dir: Path, alone: Any) -> None:
        """They are not patched. Tokenizers keep state while they run, so each pipeline has its own."""
        own = models.build("sdxl", "text2img")
        own.text_encoder, own.text_encoder_2 = handle.pipe.text_encoder, handle.pipe.text_encoder_2
        second = serve(own, cache_dir)
        works = [lambda p=p, n=n: all_requests(p, alone, n) for n, p in enumerate((handle.pipe, second.pipe))]
        assert in_threads(works) == [[True] * len(REQUESTS)] * 2

    @pytest.mark.parametrize(("mine", "its"), [(14, 7), (7, 14), (7, 8)])  # 7 of 14 timesteps are those of 7 steps
    def test_another_scheduler_on_one_unet_is_refused(self, handle: Any, mine: int, its: int) -> None:
        """A pipeline that is not accelerated and shares the UNet, with a scheduler of its own: the clock is not its."""
        scheduler = type(handle.pipe.scheduler).from_config(handle.pipe.scheduler.config)
        other = self.other(handle, scheduler=scheduler)
        want = image(handle.pipe, num_inference_steps=mine)
        refused = []

        def intrudes(pipe: Any, step: int, timestep: Any, kwargs: Any) -> Any:
            with ThreadPoolExecutor(1) as executor:
                refused.append(str(executor.submit(image, other, num_inference_steps=its).exception(60)))
            return kwargs

        got = image(handle.pipe, num_inference_steps=mine, callback_on_step_end=intrudes)
        assert torch.equal(got, want)
        assert len(refused) == mine and all("another schedule than the" in line for line in refused)

    def test_one_scheduler_is_not_set_anew_under_a_request(self, handle: Any, alone: Any) -> None:
        """`from_pipe` shares the scheduler: the two pipelines take turns."""
        other = self.other(handle)

        def intrudes(pipe: Any, step: int, timestep: Any, kwargs: Any) -> Any:
            if step == 1:
                other.scheduler.set_timesteps(2 * STEPS)
            return kwargs

        with pytest.raises(ah.NoPhase, match="got another schedule while its request ran"):
            image(handle.pipe, callback_on_step_end=intrudes)
        assert torch.equal(image(handle.pipe, **REQUESTS[0]), alone[0])


def test_torch_compile_stays_off_until_the_last_sealed_handle_is_removed(cache_dir: Path) -> None:
    pipe = models.build("sdxl", "text2img")
    handles = [serve(one, cache_dir) for one in (ah.replica(pipe), pipe)]
    for handle in (*handles, handles[0]):
        handle.seal()

    def compile_something() -> Any:
        return torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(2))

    handles[0].remove()
    with pytest.raises(RuntimeError, match="fail_on_recompile"):
        compile_something()
    handles[1].remove()
    assert compile_something().sum() == 2
