"""Inversion and editing: the reference's trajectories through the loops, and the pipelines' manners around them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)
from PIL import Image
from torch import Tensor

import accel_hidiff as ah
from accel_hidiff.cfgpp import maths
from accel_hidiff.cfgpp.climbing import Grid, climb, descend
from accel_hidiff.cfgpp.inversion import invert, reconstruction_error
from accel_hidiff.errors import BadInput, NotAPipeline
from accel_hidiff.patching import Patch
from accel_hidiff.schedulers import DDIMCFGPPScheduler
from tests import cfgpp_golden as golden
from tests import models
from tests.ids import without_address

SDXL = {**golden.TABLES["sdxl"], "steps_offset": 1, "timestep_spacing": "leading"}
LEADING = {**SDXL, "clip_sample": False, "set_alpha_to_one": False}
STEPS = 7  # all of SDXL's phases
HEIGHT, WIDTH = 64, 96
GUIDANCE = [("cfgpp", 0.6), ("cfg", 5.0)]
CASES = [name for name, case in golden.CASES.items() if "inv_t" in case["tensors"]]


def normal(seed: int, *shape: int) -> Tensor:
    shape = shape or (1, 4, 3, 5)
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def grid_of(steps: int = 10, **options: Any) -> Grid:
    return Grid.of(EulerDiscreteScheduler(**{**SDXL, **options}), steps)


# --- the reference trajectories ---------------------------------------------------------------------------------------


class Recorded:
    """The closed-form predictor, which keeps the samples that it was given."""

    def __init__(self, grid: Grid, phi: float = 0.0) -> None:
        self.grid, self.phi = grid, phi
        self.given: list[Tensor] = []

    def __call__(self, x: Tensor, step: int) -> tuple[Tensor, Tensor]:
        self.given.append(x)
        cond, uncond = golden.predict(x, self.grid.timesteps[step], 1.0, self.phi)
        return uncond, cond


def grid_of_case(data: dict[str, Tensor]) -> Grid:
    timesteps = tuple(int(t) for t in data["t_model"])
    return Grid(timesteps, (*data["alpha_t"].tolist(), float(data["alpha_next"][-1])))


def errors(case_id: str, dtype: torch.dtype, grid: Grid | None = None) -> dict[str, float]:
    case, data = golden.CASES[case_id], golden.tensors(case_id)
    grid = grid or grid_of_case(data)
    guidance = case["guidance"], "cfgpp" if case["solver"].endswith("cfg++") else "cfg"
    up, down = Recorded(grid), Recorded(grid, 1.0 if "edit" in case["solver"] else 0.0)
    inverted = climb(up, data["x_T"].to(dtype), grid, *guidance)
    sampled = descend(down, inverted, grid, *guidance)
    assert inverted.dtype == sampled.dtype == dtype
    found = {
        "x_init": inverted,
        "inv_zt": torch.stack([*up.given[1:], inverted]),
        "model_in": torch.stack(down.given),
        "zt": torch.stack([*down.given[1:], sampled]),
    }
    return {name: golden.error(value, data[name]) for name, value in found.items()}


@pytest.mark.parametrize(("dtype", "tolerance"), golden.TOLERANCES, ids=["float64", "float32"])
@pytest.mark.parametrize("case_id", CASES)
def test_the_loops_reproduce_every_reference_trajectory(case_id: str, dtype: torch.dtype, tolerance: float) -> None:
    assert max(errors(case_id, dtype).values()) <= tolerance


def test_every_inversion_of_the_reference_is_there() -> None:
    assert len(CASES) == 11
    assert {golden.CASES[name]["variant"] for name in CASES} == {"official", "aligned"}


def test_the_levels_of_a_scheduler_are_those_of_the_aligned_reference() -> None:
    name = "sdxl-ddim_edit_cfgpp-sdxl-aligned-N10-g0.6"
    assert max(errors(name, torch.float64, grid_of()).values()) <= golden.FLOAT64
    data = golden.tensors(name)
    assert [*reversed(grid_of().timesteps)] == data["inv_t"].tolist()
    assert [*reversed(grid_of().alphas[:-1])] == data["inv_alpha_t"].tolist()


@pytest.mark.parametrize("mistake", ["swap", "guidance", "timestep"])
def test_the_reference_notices_a_mistake(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    predict = golden.predict
    wrong: dict[str, Callable[..., Any]] = {
        "swap": lambda *given: predict(*given)[::-1],
        "guidance": lambda x, t, w, phi: predict(x, t, 1.01 * w, phi),
        "timestep": lambda x, t, w, phi: predict(x, t + 1, w, phi),
    }
    monkeypatch.setattr(golden, "predict", wrong[mistake])
    assert max(errors("sdxl-ddim_edit_cfgpp-sdxl-aligned-N10-g0.6", torch.float64).values()) > 1e-4


# --- equalities -------------------------------------------------------------------------------------------------------


def as_prediction(grid: Grid, prediction: str) -> tuple[Grid, Callable[[Tensor, int], tuple[Tensor, Tensor]]]:
    """The closed-form predictor as a network of another prediction type."""
    noise = Recorded(grid)

    def predict(x: Tensor, step: int) -> tuple[Tensor, Tensor]:
        a, s = maths.level(grid.alphas[step])
        uncond, cond = (maths.output_of(prediction, maths.x0_of_eps(x, eps, a, s), eps, a, s) for eps in noise(x, step))
        return uncond, cond

    return Grid(grid.timesteps, grid.alphas, prediction), predict


@pytest.mark.parametrize("prediction", maths.PREDICTIONS)
@pytest.mark.parametrize(("guidance", "scale"), GUIDANCE)
def test_sampling_is_the_scheduler_s(guidance: str, scale: float, prediction: str) -> None:
    grid, predict = as_prediction(grid_of(), prediction)
    scheduler = DDIMCFGPPScheduler(**LEADING, prediction_type=prediction)
    scheduler.set_timesteps(10)
    x = start = normal(0)
    for step, t in enumerate(scheduler.timesteps):
        uncond, cond = predict(x, step)
        guided = maths.guided(uncond, cond, scale)
        x = scheduler.step(guided, t, x, uncond_output=uncond if guidance == "cfgpp" else guided).prev_sample
    torch.testing.assert_close(descend(predict, start, grid, scale, guidance), x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("loop", [climb, descend])
@pytest.mark.parametrize("prediction", maths.PREDICTIONS)
def test_what_a_network_predicts_makes_no_difference(prediction: str, loop: Any) -> None:
    grid, predict = as_prediction(grid_of(), prediction)
    expected = loop(Recorded(grid), normal(1), grid_of(), 0.6)
    torch.testing.assert_close(loop(predict, normal(1), grid, 0.6), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("loop", [climb, descend])
def test_cfgpp_is_cfg_with_the_equivalent_weight_of_each_step_in_both_directions(loop: Any) -> None:
    """So CFG++ inverts better or worse than CFG by how its weight is spread over the steps, and by nothing else."""
    grid = grid_of(30)
    weights = maths.equivalent_cfg_scale(0.6, grid.sigmas).tolist()
    cfg = loop(Recorded(grid), normal(2), grid, weights, "cfg")
    torch.testing.assert_close(loop(Recorded(grid), normal(2), grid, 0.6), cfg, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}])
@pytest.mark.parametrize(("guidance", "scale"), GUIDANCE)
def test_a_prediction_that_does_not_depend_on_the_sample_inverts_exactly(
    guidance: str, scale: float, options: dict[str, Any]
) -> None:
    grid = grid_of(10) if not options else Grid.of(DDIMScheduler(**LEADING), 10)

    def predict(x: Tensor, step: int) -> tuple[Tensor, Tensor]:
        return normal(2 * step), normal(2 * step + 1)

    inverted = climb(predict, normal(99), grid, scale, guidance)
    back = descend(predict, inverted, grid, scale, guidance)
    assert reconstruction_error(back, normal(99)).relative < 1e-12


def test_at_zero_signal_inversion_is_finite() -> None:
    scheduler = DDIMScheduler(
        **{**LEADING, "timestep_spacing": "trailing"}, rescale_betas_zero_snr=True, prediction_type="v_prediction"
    )
    grid = Grid.of(scheduler, 10)
    assert grid.alphas[0] == 0 and grid.sigmas[0] == math.inf
    inverted = climb(Recorded(grid), normal(3), grid, 0.6)
    assert descend(Recorded(grid), inverted, grid, 0.6).isfinite().all()


@pytest.mark.parametrize("guidance", ["cfgpp", "cfg"])
def test_without_guidance_the_round_trip_is_of_first_order_and_nearly_exact_with_many_steps(guidance: str) -> None:
    def error(steps: int) -> float:
        grid = grid_of(steps)
        up = climb(Recorded(grid), normal(4), grid, 0.0, guidance)
        return reconstruction_error(descend(Recorded(grid), up, grid, 0.0, guidance), normal(4)).relative

    assert error(125) / error(500) == pytest.approx(4, rel=0.35)
    assert error(990) < 0.05


# --- levels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheduler",
    [
        EulerDiscreteScheduler(**SDXL),
        DDIMScheduler(**LEADING),
        DPMSolverMultistepScheduler(**SDXL, use_karras_sigmas=True),
        PNDMScheduler(**SDXL, skip_prk_steps=True),
        DDIMCFGPPScheduler(**{**LEADING, "clip_sample": True}),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_whatever_the_sampler_the_levels_are_ddim_s(scheduler: Any) -> None:
    before = scheduler.timesteps
    grid = Grid.of(scheduler, 10)
    assert grid == grid_of() and len(grid) == 10
    assert grid.timesteps[0] == 901 and grid.timesteps[-1] == 1
    assert scheduler.timesteps is before


def test_the_last_level_is_the_config_s() -> None:
    assert Grid.of(DDIMScheduler(**{**LEADING, "set_alpha_to_one": True}), 10).alphas[-1] == 1
    assert grid_of().alphas[-1] == float(golden.table("sdxl")[0])


def test_levels_of_kolors_with_a_number_of_steps_that_does_not_divide() -> None:
    grid = Grid.of(EulerDiscreteScheduler(**golden.TABLES["kolors"], timestep_spacing="trailing"), 30)
    assert len(grid) == 30 and grid.timesteps[0] == 1099
    table = golden.table("kolors").double()
    assert grid.alphas == (*(float(table[t]) for t in grid.timesteps), float(table[0]))


class OwnTable(EulerDiscreteScheduler):
    """Levels that its config does not tell."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.alphas_cumprod = self.alphas_cumprod**2


@pytest.mark.parametrize(
    ("scheduler", "steps", "message"),
    [
        (FlowMatchEulerDiscreteScheduler(), 10, "expected one with cumulative alphas"),
        (diffusers.EDMEulerScheduler(), 10, "got EDMEulerScheduler"),
        (EulerDiscreteScheduler(**SDXL, prediction_type="flow"), 10, "prediction_type: expected .* got 'flow'"),
        (OwnTable(**SDXL), 10, "expected noise levels that its config gives"),
        (DPMSolverMultistepScheduler(**SDXL, thresholding=True), 10, "thresholding: expected False"),
        (DDIMScheduler(**SDXL, rescale_betas_zero_snr=True), 10, None),
        (
            DDIMScheduler(**{**SDXL, "timestep_spacing": "trailing"}, rescale_betas_zero_snr=True),
            10,
            "rescale_betas_zero_snr: expected prediction_type",
        ),
        (EulerDiscreteScheduler(**SDXL), 1001, "at most the 1000 training steps"),
        (EulerDiscreteScheduler(**SDXL), 1000, "timesteps below 1000, got 1000"),
        (EulerDiscreteScheduler(**SDXL), 0, "steps: expected an integer"),
        (None, 10, "got NoneType"),
    ],
)
def test_levels_that_ddim_does_not_have(scheduler: Any, steps: int, message: str | None) -> None:
    if message is None:
        assert Grid.of(scheduler, steps).alphas[0] > 0  # leading spacing does not reach zero signal
        return
    with pytest.raises(BadInput, match=message) as raised:
        Grid.of(scheduler, steps)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("timesteps", "alphas", "message"),
    [((), (1.0,), "at least one timestep"), ((1,), (0.5,), "got 1 for 1"), ((9, 1), (0.5, 0.4, 1.0), "that rise")],
)
def test_levels_by_hand_are_checked(timesteps: Any, alphas: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Grid(timesteps, alphas)


# --- pipelines --------------------------------------------------------------------------------------------------------

FAMILIES = ["sd15", "sd21", "sdxl", "kolors"]


@pytest.fixture(scope="module")
def built() -> Callable[[str], Any]:
    """Builds each pipeline once; a test gets it without a patch."""
    found: dict[str, Any] = {}

    def get(family: str) -> Any:
        if family == "kolors":
            pytest.importorskip("sentencepiece")
        pipe = found.setdefault(family, None) or models.build(family, "text2img")
        found[family] = pipe
        ah.remove_hidiffusion(pipe)
        return pipe

    return get


@pytest.fixture
def sdxl() -> Any:
    return models.build("sdxl", "text2img")


def picture(seed: int = 0, height: int = HEIGHT, width: int = WIDTH) -> Image.Image:
    return models._picture(height, width, seed)


def run(pipe: Any, image: Any = None, prompt: Any = "a red circle", **options: Any) -> Any:
    return invert(pipe, picture() if image is None else image, prompt, **{"num_inference_steps": STEPS, **options})


def fixed_features(pipe: Any) -> Any:
    """From now on the UNet's output depends on timestep, prompt, phase and shifts, not on the sample."""

    def hook(module: Any, args: Any, output: Tensor) -> Tensor:
        rows = normal(5, 1, *output.shape[1:]).to(output)
        return rows.expand_as(output).contiguous()

    return pipe.unet.conv_in.register_forward_hook(hook)


@pytest.mark.parametrize(("guidance", "scale"), GUIDANCE)
@pytest.mark.parametrize("patched", [False, True], ids=["plain", "hidiffusion"])
@pytest.mark.parametrize("family", ["sd15", "sdxl", "kolors"])  # SD 2.1 predicts v: its noise is not fixed
def test_inversion_mirrors_sampling(family: str, patched: bool, guidance: str, scale: float, built: Any) -> None:
    """Exact for a network that ignores its sample, if timesteps, levels, phases and shifts are the same both ways."""
    pipe = built(family)
    if patched:
        ah.apply_hidiffusion(pipe)
    handle = fixed_features(pipe)
    try:
        latents = normal(6, 1, 4, HEIGHT // 8, WIDTH // 8).float()
        inversion = run(pipe, latents, guidance=guidance, scale=scale)
        assert torch.equal(inversion.clean, latents)
        assert reconstruction_error(inversion.latents, latents).relative > 0.1
        assert inversion.error.relative < 1e-4
        assert inversion.error.psnr > 70 and inversion.error.psnr_image is None
    finally:
        handle.remove()


@pytest.mark.parametrize("patched", [False, True], ids=["plain", "hidiffusion"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_inverted_latent_samples_in_the_stock_pipeline_as_here(family: str, patched: bool, built: Any) -> None:
    pipe = built(family)
    if patched:
        ah.apply_hidiffusion(pipe)
    inversion = run(pipe, guidance="cfg", scale=5.0, shift_seed=11, negative_prompt="a square")
    here = inversion.edit("a blue circle").latents
    stock = pipe.scheduler
    options = {"clip_sample": False, "set_alpha_to_one": False}
    pipe.scheduler = DDIMScheduler.from_config(stock.config, **options)
    try:
        there = pipe(
            "a blue circle",
            negative_prompt="a square",
            latents=inversion.latents,
            guidance_scale=5.0,
            num_inference_steps=STEPS,
            height=HEIGHT,
            width=WIDTH,
            generator=torch.Generator().manual_seed(11),
            output_type="latent",
        ).images
    finally:
        pipe.scheduler = stock
    assert golden.error(there, here.double()) < 1e-4


def test_steps_run_with_the_topology_and_the_shifts_of_sampling(sdxl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ah.apply_hidiffusion(sdxl)
    calls: list[tuple[str, Any]] = []
    begin = Patch._begin_call

    def begin_call(self: Patch, *args: Any) -> Any:
        call, controlled = begin(self, *args)
        calls.append((str(call.topology), None if call.shifts is None else call.shifts.tolist()))
        return call, controlled

    monkeypatch.setattr(Patch, "_begin_call", begin_call)
    inversion = run(sdxl, generator=torch.Generator().manual_seed(3))
    up = calls.copy()
    inversion.edit("a blue circle")
    down = calls[STEPS:]
    assert up == down[::-1] and len({topology for topology, _ in up}) == 3
    del calls[:]
    options = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": STEPS, "output_type": "latent"}
    sdxl("a blue circle", generator=torch.Generator().manual_seed(3), **options)
    assert calls == down
    del calls[:]
    run(sdxl)
    sdxl("a blue circle", **options)  # no generator: the config's seed
    assert calls[:STEPS] == calls[STEPS:][::-1] and calls[STEPS:] != down


@pytest.mark.parametrize("patched", [False, True], ids=["plain", "hidiffusion"])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_editing_with_the_same_prompt_is_the_reconstruction(family: str, patched: bool, built: Any) -> None:
    pipe = built(family)
    if patched:
        ah.apply_hidiffusion(pipe)
    inversion = run(pipe)
    same, other = inversion.reconstruct(), inversion.edit("a blue square")
    assert torch.equal(inversion.edit("a red circle").latents, same.latents)
    assert not torch.equal(other.latents, same.latents)
    assert not torch.equal(inversion.edit("a red circle", "a blue square").latents, same.latents)
    assert other.prompt == ("a blue square",) and other.latents.shape == inversion.clean.shape
    image = other.images()[0]
    assert image.size == (WIDTH, HEIGHT)
    assert other.images("pt").shape == (1, 3, HEIGHT, WIDTH)


@pytest.mark.parametrize("patched", [False, True], ids=["plain", "hidiffusion"])
def test_without_guidance_and_with_many_steps_a_gentle_network_is_reconstructed(sdxl: Any, patched: bool) -> None:
    """Random weights are no denoiser, and far from smooth: a tenth of their prediction stands for a trained one."""
    with torch.no_grad():
        sdxl.unet.conv_out.weight.mul_(0.1)
        sdxl.unet.conv_out.bias.mul_(0.1)
    if patched:
        ah.apply_hidiffusion(sdxl)
    latents = normal(7, 1, 4, 8, 8).float()
    few, many = (run(sdxl, latents, scale=0.0, num_inference_steps=steps).error for steps in (5, 60))
    assert many.relative < 0.1 and many.rmse < 0.1
    assert many.relative < few.relative / 4
    assert many.psnr > few.psnr


def test_unconditional_is_the_negative_prompt_alone(sdxl: Any) -> None:
    first, second = (run(sdxl, prompt=text, scale=0.0, negative_prompt="a square") for text in ("a circle", "light"))
    assert torch.equal(first.latents, second.latents)
    alone = run(sdxl, prompt="a square", guidance="cfg", scale=1.0)
    assert golden.error(first.latents, alone.latents.double()) < 1e-5


def test_a_batch_is_its_parts(sdxl: Any) -> None:
    ah.apply_hidiffusion(sdxl)
    prompts = ["a red circle", "a blue square"]
    both = run(sdxl, [picture(0), picture(1)], prompts)
    alone = [run(sdxl, picture(number), prompts[number]) for number in range(2)]
    assert golden.error(both.latents, torch.cat([one.latents for one in alone]).double()) < 1e-4
    edited = both.edit("light")
    assert edited.prompt == ("light", "light") and len(edited.images()) == 2


def test_nothing_of_the_pipeline_changes(sdxl: Any, snapshot: Any, assert_identical: Any) -> None:
    ah.apply_hidiffusion(sdxl)
    parts = (sdxl.unet, sdxl.vae, sdxl.scheduler)
    before, names = [snapshot(part) for part in parts], list(vars(sdxl))
    state = torch.get_rng_state()
    inversion = run(sdxl)
    inversion.edit("light").images()
    assert inversion.error is inversion.error
    assert torch.equal(torch.get_rng_state(), state)
    for part, old in zip(parts, before, strict=True):
        assert_identical(old, snapshot(part))
    assert list(vars(sdxl)) == names
    with pytest.raises(AttributeError):
        inversion.scale = 0.5
    assert "tensor" not in repr(inversion)


def test_compiled_or_not_it_is_the_same_request(sdxl: Any) -> None:
    ah.apply_hidiffusion(sdxl)
    expected = run(sdxl)
    ah.remove_hidiffusion(sdxl)
    handle = ah.accelerate(sdxl, hidiffusion=ah.HiDiffusionConfig(), backend="eager", on_miss="eager")
    try:
        assert torch.equal(run(sdxl).latents, expected.latents)
        assert handle.stats.eager_calls + handle.stats.hits == STEPS
    finally:
        handle.remove()


# --- images and VAEs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd15", "sdxl", "playground"])
def test_latents_are_those_of_the_image_to_image_pipeline(family: str) -> None:
    stock, pipe = models.build(family, "img2img"), models.build(family, "text2img")
    pipe.scheduler = EulerDiscreteScheduler(**SDXL)  # Playground's levels are not those of DDIM
    stock.scheduler, t = pipe.scheduler, torch.tensor([1.0])
    pixels = stock.image_processor.preprocess(picture())
    given = (pixels, t, 1, 1, torch.float32, torch.device("cpu"))
    stock.scheduler.set_timesteps(1)
    stock.scheduler.add_noise = lambda latents, noise, timestep: latents
    with torch.no_grad():
        expected = stock.prepare_latents(*given, generator=torch.Generator().manual_seed(5))
    inversion = run(pipe, generator=torch.Generator().manual_seed(5), num_inference_steps=1)
    assert golden.error(inversion.clean, expected.double()) < 1e-6
    assert not torch.equal(run(pipe, num_inference_steps=1).clean, inversion.clean), "the mode, not a draw"
    inversion = run(pipe, num_inference_steps=1)
    assert torch.equal(run(pipe, inversion.clean, num_inference_steps=1).latents, inversion.latents)
    latents = inversion.reconstruct().latents
    mean, std = pipe.vae.config.latents_mean, pipe.vae.config.latents_std
    scaled = latents / pipe.vae.config.scaling_factor
    if mean is not None:
        scaled = scaled * torch.tensor(std).view(1, 4, 1, 1) + torch.tensor(mean).view(1, 4, 1, 1)
    with torch.no_grad():
        decoded = pipe.vae.decode(scaled).sample
    images = inversion.reconstruct().images("pt")
    assert (images - (decoded / 2 + 0.5).clamp(0, 1)).abs().max() < 1e-4


@pytest.mark.parametrize("force_upcast", [True, False])
def test_a_half_precision_vae_that_overflows_computes_in_float32(sdxl: Any, force_upcast: bool) -> None:
    expected = run(sdxl).clean
    sdxl.vae.register_to_config(force_upcast=force_upcast)
    sdxl.vae.to(torch.bfloat16)
    seen: set[torch.dtype] = set()
    handles = [
        part.conv_in.register_forward_pre_hook(lambda module, args: seen.add(args[0].dtype))
        for part in (sdxl.vae.encoder, sdxl.vae.decoder)
    ]
    inversion = run(sdxl)
    inversion.reconstruct().images()
    for handle in handles:
        handle.remove()
    assert seen == {torch.float32 if force_upcast else torch.bfloat16}
    assert sdxl.vae.dtype == torch.bfloat16 and inversion.clean.dtype == torch.float32
    assert golden.error(inversion.clean, expected.double()) < 0.05


def test_a_half_precision_unet_keeps_its_latents_in_float32(sdxl: Any) -> None:
    expected = run(sdxl)
    sdxl.unet.to(torch.bfloat16)
    sdxl.text_encoder.to(torch.bfloat16)
    sdxl.text_encoder_2.to(torch.bfloat16)
    inversion = run(sdxl)
    assert inversion.latents.dtype == inversion.reconstruct().latents.dtype == torch.float32
    assert golden.error(inversion.latents, expected.latents.double()) < 0.1


def test_a_vae_without_posterior(sdxl: Any) -> None:
    options = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    sdxl.vae = AutoencoderTiny(**options, num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4).eval()
    inversion = run(sdxl)
    assert inversion.clean.shape == (1, 4, HEIGHT // 8, WIDTH // 8)
    assert inversion.reconstruct().images()[0].size == (WIDTH, HEIGHT)


def test_latents_need_no_vae(sdxl: Any) -> None:
    sdxl.vae = None
    inversion = run(sdxl, normal(8, 4, 8, 12).float())
    assert inversion.image is None and inversion.error.psnr is None and inversion.error.rmse > 0
    with pytest.raises(BadInput, match=r"pipe\.vae: expected a VAE to decode"):
        inversion.reconstruct().images()


def test_kinds_of_images(sdxl: Any) -> None:
    array = np.asarray(picture(), dtype=np.float32) / 255
    expected = run(sdxl, num_inference_steps=1)
    assert expected.image.shape == (1, 3, HEIGHT, WIDTH)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    for image in (array, array[None], tensor, tensor[None], [picture()], picture().convert("RGBA")):
        assert golden.error(run(sdxl, image, num_inference_steps=1).clean, expected.clean.double()) < 1e-5
    assert run(sdxl, [tensor[None]] * 2, num_inference_steps=1).clean.shape[0] == 2
    grey = run(sdxl, picture().convert("L"), num_inference_steps=1)
    assert grey.image.std(dim=1).max() == 0
    resized = run(sdxl, picture(0, 70, 90), height=HEIGHT, width=WIDTH, num_inference_steps=1)
    assert resized.clean.shape == expected.clean.shape
    pixels = (expected.reconstruct().images("pt") - tensor).double().square().mean()
    assert expected.error.psnr_image == pytest.approx(-10 * math.log10(pixels), rel=1e-4)


def test_the_safety_checker_and_the_watermark_of_the_pipeline_run(sdxl: Any, built: Any) -> None:
    pipe = built("sd15")
    pipe.safety_checker = "there is one"
    pipe.run_safety_checker = lambda image, device, dtype: (torch.zeros_like(image), [True])
    try:
        assert run(pipe, num_inference_steps=1).reconstruct().images("pt").abs().max() == 0
    finally:
        del pipe.run_safety_checker
        pipe.safety_checker = None

    class Watermark:
        def apply_watermark(self, images: Tensor) -> Tensor:
            return torch.ones_like(images)

    sdxl.watermark = Watermark()
    assert run(sdxl, num_inference_steps=1).reconstruct().images("pt").min() == 1


# --- bad input --------------------------------------------------------------------------------------------------------

ARRAY = np.zeros((HEIGHT, WIDTH, 3), dtype=np.float32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 7.5}, r"lambda: expected a number in 0\.\.1, got 7\.5; .* lambda = w / 12\.5"),
        ({"scale": -0.1}, "lambda: expected"),
        ({"scale": math.nan}, "lambda: expected"),
        ({"scale": "0.6"}, "lambda: expected"),
        ({"scale": [0.6]}, "lambda: expected"),
        ({"guidance": "cfg", "scale": -1}, "scale: expected a CFG weight of at least 0, got -1"),
        ({"guidance": "cfg", "scale": math.inf}, "scale: expected a CFG weight"),
        ({"guidance": None}, "guidance: expected one of cfgpp, cfg, got None; to go without guidance"),
        ({"guidance": "off"}, "guidance: expected one of"),
        ({"num_inference_steps": 0}, "steps: expected"),
        ({"num_inference_steps": 2000}, "at most the 1000"),
        ({"image": picture(0, 60, 96)}, r"height: expected a positive multiple of 8 pixels, got 60; the nearest is 64"),
        ({"image": picture(0, 64, 99)}, "width: expected .* 99"),
        ({"height": 65}, "height: expected"),
        ({"width": "96"}, "width: expected"),
        ({"width": 0}, "width: expected"),
        ({"image": "picture.png"}, "image: expected PIL images, tensors or arrays, got str"),
        ({"image": []}, "image: expected PIL images"),
        ({"image": ARRAY[..., 0]}, "image: expected 3 or 4 dimensions, got 2"),
        ({"image": ARRAY[..., :2]}, "image: expected 3 channels, got 2"),
        ({"image": ARRAY.astype(np.uint8)}, "image: expected floating-point values .* divide by 255"),
        ({"image": ARRAY + 200}, r"image: expected values in 0\.\.1"),
        ({"image": ARRAY * math.nan}, r"image: expected values in 0\.\.1"),
        ({"image": torch.full((4, 8, 12), math.inf)}, "latents: expected finite"),
        ({"image": torch.zeros(4, 8, 12), "height": 128}, "height: expected 64, that of the latents"),
        ({"image": [picture(0), picture(0, 64, 64)]}, "images of one kind and size"),
        ({"image": [picture(0), ARRAY]}, "images of one kind and size"),
        ({"image": [ARRAY, ARRAY[None]]}, "images of one kind and size"),
        ({"prompt": ["a", "b"]}, "prompt: expected a string, or a list of 1 strings.* got 2"),
        ({"prompt": None}, "prompt: expected a string"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt: expected"),
        ({"shift_seed": 0.5}, "shift_seed: expected an integer"),
    ],
    ids=without_address,
)
def test_bad_input_is_one_clear_line(options: dict[str, Any], message: str, built: Any) -> None:
    with pytest.raises(BadInput, match=message) as raised:
        run(built("sdxl"), **options)
    assert "\n" not in str(raised.value)


def no_vae(pipe: Any) -> None:
    pipe.vae = None


def other_latents(pipe: Any) -> None:
    pipe.vae = models.diffusers.AutoencoderKL(**{**pipe.vae.config, "latent_channels": 16})


def flow(pipe: Any) -> None:
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()


def unknown_prediction(pipe: Any) -> None:
    pipe.scheduler.register_to_config(prediction_type="flow_prediction")


def distilled(pipe: Any) -> None:
    pipe.unet.register_to_config(time_cond_proj_dim=256)


def ip_adapter(pipe: Any) -> None:
    models.with_ip_adapter(pipe)


def other_conditioning(pipe: Any) -> None:
    pipe.unet.register_to_config(addition_embed_type="image")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no_vae, r"pipe\.vae: expected a VAE to encode"),
        (other_latents, r"unet: expected as many .* \(16\), got 4 and 4"),
        (flow, "got FlowMatchEulerDiscreteScheduler"),
        (unknown_prediction, "prediction_type: expected .* got 'flow_prediction'"),
        (distilled, "guidance is off in it"),
        (ip_adapter, "unload_ip_adapter"),
        (other_conditioning, "addition_embed_type='image'"),
    ],
)
def test_a_pipeline_that_cannot_be_inverted(change: Any, message: str, sdxl: Any) -> None:
    change(sdxl)
    with pytest.raises(BadInput, match=message) as raised:
        run(sdxl)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("family", "task", "message"),
    [
        ("sd15", "inpaint9", "got 9 and 4; inpainting"),
        ("sdxl", "inpaint9", "got 9 and 4; inpainting"),
        ("sdxl", "img2img", "expected a text-to-image pipeline, got StableDiffusionXLImg2ImgPipeline"),
        ("sd15", "controlnet", "expected a text-to-image pipeline"),
    ],
)
def test_other_tasks_are_refused(family: str, task: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        run(models.build(family, task))


def test_what_is_no_pipeline(built: Any) -> None:
    for other in (None, built("sdxl").unet, "a folder"):
        with pytest.raises(NotAPipeline):
            run(other)


def test_hidiffusion_that_came_or_went_since_the_inversion_is_noticed(sdxl: Any) -> None:
    inversion = run(sdxl)
    ah.apply_hidiffusion(sdxl)
    with pytest.raises(BadInput, match=r"pipe\.unet: expected HiDiffusion as it was at the inversion"):
        inversion.reconstruct()
    ah.remove_hidiffusion(sdxl)
    inversion.reconstruct()
    with pytest.raises(BadInput, match="prompt: expected"):
        inversion.edit(["a", "b"])


@pytest.mark.parametrize(
    ("scale", "guidance", "message"),
    [
        (0.5, "ddim", "guidance: expected"),
        ([0.5, 0.5], "cfgpp", "one for each of 10 steps, got 2"),
        (2, "cfgpp", "12.5"),
    ],
)
def test_the_loops_check_their_guidance(scale: Any, guidance: str, message: str) -> None:
    grid = grid_of()
    for loop in (climb, descend):
        with pytest.raises(BadInput, match=message):
            loop(Recorded(grid), normal(0), grid, scale, guidance)
