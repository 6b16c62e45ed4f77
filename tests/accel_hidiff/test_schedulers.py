"""The CFG++ schedulers: the reference's trajectories on diffusers' levels, and a diffusers scheduler's manners."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)
from hypothesis import given, settings
from torch import Tensor

from accel_hidiff import schedulers
from accel_hidiff.cfgpp import maths
from accel_hidiff.errors import BadInput
from accel_hidiff.schedulers import (
    DDIMCFGPPScheduler,
    DPMSolverMultistepCFGPPScheduler,
    EulerAncestralCFGPPScheduler,
    EulerCFGPPScheduler,
    counterpart,
)
from tests import cfgpp_golden as golden
from tests import needs

PLAIN = {
    DDIMCFGPPScheduler: DDIMScheduler,
    EulerCFGPPScheduler: EulerDiscreteScheduler,
    EulerAncestralCFGPPScheduler: EulerAncestralDiscreteScheduler,
    DPMSolverMultistepCFGPPScheduler: DPMSolverMultistepScheduler,
}
ALL = list(PLAIN)
SDXL = {**golden.TABLES["sdxl"], "steps_offset": 1, "timestep_spacing": "leading"}
LATENT = {DDIMCFGPPScheduler: {"clip_sample": False, "set_alpha_to_one": False}}  # as the model repositories have it
SPACINGS = ("leading", "trailing", "linspace")
SHAPE = (2, 4, 3, 5)


def make(kind: Any, **options: Any) -> Any:
    return kind(**{**SDXL, **LATENT.get(kind, {}), **options})


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*(shape or SHAPE), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def is_ve(scheduler: Any) -> bool:
    return isinstance(scheduler, EulerDiscreteScheduler | EulerAncestralDiscreteScheduler)


def level_at(scheduler: Any, index: int) -> tuple[float, float]:
    """(a, s) of the level that a step starts from."""
    if hasattr(scheduler, "sigmas"):
        return maths.level_of_sigma(scheduler._levels()[index])
    return maths.level(float(scheduler.alphas_cumprod[int(scheduler.timesteps[index])].double()))


def run(
    scheduler: Any,
    x: Tensor,
    lam: float = 0.6,
    *,
    start: int = 0,
    prediction: str = "epsilon",
    times: list[float] | None = None,
    guidance_only: bool = False,
    phi: float = 0.0,
    **options: Any,
) -> dict[str, Tensor]:
    """A denoising loop as a pipeline runs it, with the closed-form predictor as the network."""
    noises = options.pop("noises", None)
    found: dict[str, list[Tensor]] = {"model_in": [], "zt": [], "z0t": []}
    steps = len(scheduler.timesteps if times is None else times)
    for index, t in enumerate(scheduler.timesteps[start:steps], start=start):
        given = scheduler.scale_model_input(x, t)
        eps = golden.predict(given, float(t) if times is None else times[index], lam, phi)
        a, s = level_at(scheduler, index)
        output, uncond = (
            maths.output_of(prediction, maths.x0_of_eps(given, value, a, s), value, a, s) for value in eps
        )
        if noises is not None:
            options["variance_noise"] = noises[index] if index < len(noises) else torch.zeros_like(x)
        uncond = output if guidance_only else uncond
        x = scheduler.step(output, t, x, uncond_output=uncond, return_dict=False, **options)[0]
        found["model_in"].append(given)
        found["zt"].append(x)
        found["z0t"].append(maths.x0_of_eps(given, eps[0], a, s))
    return {name: torch.stack(values) for name, values in found.items()}


# --- the reference trajectories ---------------------------------------------------------------------------------------


class UncondDifference(DPMSolverMultistepCFGPPScheduler):
    """As the authors' SDXL code extrapolates."""

    difference = "uncond"


def scheduler_of(case: dict[str, Any], data: dict[str, Tensor]) -> tuple[Any, str] | None:
    """The scheduler that walks a case's levels, and how it came by them; None: no scheduler of diffusers has them."""
    solver, grid, steps = case["solver"], case.get("grid", "table_leading"), case["steps"]
    table = golden.TABLES[case["config"]]
    spacing = "trailing" if grid == "table_trailing" or "lightning" in solver else "leading"
    options = {**table, "steps_offset": 1, "timestep_spacing": spacing, "use_karras_sigmas": grid == "karras"}
    if grid == "karras":
        options["timestep_spacing"] = "linspace"  # from the largest level of the table to the smallest
    if case["family"] == "a1111":
        scheduler = DDIMCFGPPScheduler(**table, **LATENT[DDIMCFGPPScheduler])
        scheduler.set_timesteps(steps)
        scheduler.timesteps = data["timesteps"].long().flip(0)  # one more than diffusers has; it is only stepped to
        return scheduler, "timesteps by hand"
    if case["state_space"] == "VP":
        if case["variant"] != "aligned":
            return None
        del options["use_karras_sigmas"]
        scheduler = DDIMCFGPPScheduler(**options, **LATENT[DDIMCFGPPScheduler])
        scheduler.set_timesteps(steps)
        return scheduler, "set_timesteps"
    if "2s" in solver:
        return None
    if "2m" in solver:
        if case["family"] != "comfy":  # no level 0 at the end, or a Karras ramp that stops short of the last level
            kind = UncondDifference if case["family"] == "sdxl" else DPMSolverMultistepCFGPPScheduler
            scheduler = kind(**{**options, "lower_order_final": False})
            scheduler.set_timesteps(timesteps=data["t_model"].long().tolist())
            scheduler.sigmas = data["sigma"]
            return scheduler, "sigmas by hand"
        scheduler = DPMSolverMultistepCFGPPScheduler(**options)
        if grid == "table_leading":  # diffusers' own leading grid of this scheduler leaves out one more
            scheduler.set_timesteps(timesteps=data["t_model"].long().tolist())
            return scheduler, "set_timesteps(timesteps=)"
        scheduler.set_timesteps(steps)
        return scheduler, "set_timesteps"
    if "euler_a" in solver:
        del options["use_karras_sigmas"]
        if grid == "karras" or case["family"] == "sd":  # diffusers has no Karras levels here
            scheduler = EulerAncestralCFGPPScheduler(**options)
            scheduler.set_timesteps(steps)
            scheduler.sigmas = data["sigma"]
            return scheduler, "sigmas by hand"
        scheduler = EulerAncestralCFGPPScheduler(**options)
        scheduler.set_timesteps(steps)
        return scheduler, "set_timesteps"
    scheduler = EulerCFGPPScheduler(**options)
    if case["family"] == "sd" or solver in {
        "euler",
        "euler_lightning",
    }:  # a Karras ramp that stops short of the last level
        scheduler.set_timesteps(sigmas=data["sigma"].tolist())
        return scheduler, "set_timesteps(sigmas=)"
    scheduler.set_timesteps(steps)
    return scheduler, "set_timesteps"


def has_scheduler(case: dict[str, Any]) -> bool:
    # Not: VP levels shifted by one, and 2S.
    aligned = case["state_space"] == "VE" or case["variant"] == "aligned" or case["family"] == "a1111"
    return aligned and "2s" not in case["solver"]


WALKED = [case_id for case_id, case in golden.CASES.items() if has_scheduler(case)]


def golden_errors(case_id: str, dtype: torch.dtype) -> dict[str, float]:
    case, data = golden.CASES[case_id], golden.tensors(case_id)
    made = scheduler_of(case, data)
    assert made is not None
    scheduler, x = made[0], data["x_init"].to(dtype)
    vp_state = isinstance(scheduler, DPMSolverMultistepScheduler)  # the reference is in VE
    options: dict[str, Any] = {"phi": 1.0 if "edit" in case["solver"] else 0.0}
    if case["family"] == "a1111":
        options["eta"] = case["eta"]
    if "noise" in data:
        options["noises"] = data["noise"].to(dtype)
    if vp_state:
        x = maths.to_vp(x, maths.level_of_sigma(float(data["sigma"][0]))[0])
    plain = case["solver"] in {"ddim", "euler", "euler_lightning"}
    found = run(scheduler, x, case["guidance"], times=data["t_model"].tolist(), guidance_only=plain, **options)
    if vp_state:
        levels = [maths.level_of_sigma(sigma)[0] for sigma in data["sigma"][1:].tolist()]
        found["zt"] = torch.stack([maths.to_ve(zt, a) for zt, a in zip(found["zt"], levels, strict=True)])
    found["final"] = found["zt" if case["returned"] == "zt" else "z0t"][-1]
    return {name: golden.error(value, data[name]) for name, value in found.items()}


@pytest.mark.parametrize(("dtype", "tolerance"), golden.TOLERANCES, ids=["float64", "float32"])
@pytest.mark.parametrize("case_id", WALKED)
def test_a_scheduler_walks_the_reference_trajectory(case_id: str, dtype: torch.dtype, tolerance: float) -> None:
    assert max(golden_errors(case_id, dtype).values()) <= tolerance


def test_every_aligned_comfy_and_a1111_case_has_a_scheduler_but_2s() -> None:
    wanted = {
        case_id
        for case_id, case in golden.CASES.items()
        if case["variant"] == "aligned" or case["family"] in {"comfy", "a1111"}
    }
    left = sorted(golden.CASES[case_id]["solver"] for case_id in wanted - set(WALKED))
    assert left == ["dpmpp_2s_ancestral_cfg_pp"] * 3


# --- where the authors' code is not followed --------------------------------------------------------------------------


@pytest.mark.parametrize("config", golden.TABLES)
def test_the_level_table_is_not_shifted_by_one(config: str) -> None:
    case_id = f"sdxl-ddim_cfgpp-{config}-official-N10-g0.6"
    data, table = golden.tensors(case_id), golden.table(config).double()
    times = data["timesteps"].long()
    torch.testing.assert_close(data["alpha_t"], table[times - 1])  # the authors'
    scheduler = make(DDIMCFGPPScheduler, **golden.TABLES[config])
    scheduler.set_timesteps(10)
    assert scheduler.timesteps.tolist() == times.tolist()
    a, s = (torch.tensor([level_at(scheduler, i)[j] for i in range(10)], dtype=torch.float64) for j in (0, 1))
    torch.testing.assert_close(a * a, table[times])
    torch.testing.assert_close(s * s, 1 - table[times])


def test_the_last_step_does_not_wrap_to_the_noisy_end() -> None:
    data, table = golden.tensors("sdxl-ddim_cfgpp-sdxl-official-N10-g0.6"), golden.table("sdxl").double()
    assert data["alpha_next"][-1] < 0.02  # the authors': almost pure noise
    scheduler = make(DDIMCFGPPScheduler)
    scheduler.set_timesteps(10)
    *_, a_next, s_next, _ = scheduler._link(int(scheduler.timesteps[-1]), 0.0)
    assert (a_next**2, s_next**2) == pytest.approx((float(table[0]), float(1 - table[0])), rel=1e-12)
    ends_at_one = make(DDIMCFGPPScheduler, set_alpha_to_one=True)
    ends_at_one.set_timesteps(10)
    assert ends_at_one._link(int(scheduler.timesteps[-1]), 0.0)[2:4] == (1.0, 0.0)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("config", golden.TABLES)
@pytest.mark.parametrize("steps", [1, 2, 7, 30, 61, 103])
def test_ddim_steps_to_the_level_that_the_next_step_starts_from(spacing: str, config: str, steps: int) -> None:
    """Also where N does not divide the training steps, where diffusers steps beside its own grid."""
    scheduler = make(DDIMCFGPPScheduler, **golden.TABLES[config], timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    times = scheduler.timesteps.tolist()
    assert len(times) == steps
    assert times == sorted(set(times), reverse=True) and min(times) >= 0
    links = [scheduler._link(t, 0.0) for t in times]
    for link, following in pairwise(links):
        assert link[2:4] == following[:2]


@pytest.mark.parametrize("kind", ALL)
def test_trailing_spacing_gives_as_many_timesteps_as_asked_for(kind: Any) -> None:
    options = {**golden.TABLES["kolors"], "timestep_spacing": "trailing"}
    plain = make(PLAIN[kind], **options)
    plain.set_timesteps(30)
    assert plain.timesteps.tolist()[-1] == -1 and len(plain.timesteps) == 31  # what is corrected
    scheduler = make(kind, **options)
    scheduler.set_timesteps(30)
    assert scheduler.timesteps.tolist() == plain.timesteps.tolist()[:-1]
    if hasattr(scheduler, "sigmas"):
        assert len(scheduler.sigmas) == 31
        assert scheduler.sigmas[-1] == 0 < scheduler.sigmas[-2]
    assert run(scheduler, normal(0))["zt"].isfinite().all()


# --- equalities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [4, 10, 50])
def test_euler_equals_ddim_on_equal_levels(steps: int) -> None:
    """Both at the levels of the table, the last one included: DDIM ends at abar = 1, Euler at sigma = 0."""
    options = {"timestep_spacing": "trailing"}
    ddim, euler = make(DDIMCFGPPScheduler, **options, set_alpha_to_one=True), make(EulerCFGPPScheduler, **options)
    for scheduler in (ddim, euler):
        scheduler.set_timesteps(steps)
    x = normal(3)
    vp = run(ddim, x)["zt"]
    ve = run(euler, x / level_at(euler, 0)[0])["zt"]
    scale = [*(level_at(euler, index)[0] for index in range(1, steps)), 1.0]
    for found, wanted, a in zip(ve, vp, scale, strict=True):
        torch.testing.assert_close(found * a, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ALL)
def test_lambda_0_is_the_plain_scheduler_with_the_unconditional_prediction(kind: Any) -> None:
    scheduler = make(kind)
    plain = PLAIN[kind].from_config(scheduler.config)
    x = start = normal(0, dtype=torch.float32) * (14.6 if is_ve(scheduler) else 1.0)
    for each in (scheduler, plain):
        each.set_timesteps(20)
    found = run(scheduler, start, 0.0, **noise_options(kind))["zt"]
    generator = torch.Generator().manual_seed(0)
    for index, t in enumerate(plain.timesteps):
        _, uncond = golden.predict(plain.scale_model_input(x, t), float(t), 0.0)
        x = plain.step(uncond, t, x, generator=generator).prev_sample
        torch.testing.assert_close(found[index], x, rtol=1e-4, atol=2e-5 * float(x.abs().max()))


def noise_options(kind: Any) -> dict[str, Any]:
    stochastic = kind is EulerAncestralCFGPPScheduler
    return {"generator": torch.Generator().manual_seed(0)} if stochastic else {}


def test_cfgpp_is_cfg_with_the_equivalent_weight_of_each_step() -> None:
    scheduler, plain = make(EulerCFGPPScheduler), make(EulerCFGPPScheduler)
    for each in (scheduler, plain):
        each.set_timesteps(20)
    x = cfg = normal(1) * 14.6
    weights = maths.equivalent_cfg_scale(0.6, scheduler._levels()).tolist()
    found = run(scheduler, x)["zt"]
    for index, (t, weight) in enumerate(zip(plain.timesteps, weights, strict=True)):
        output, _ = golden.predict(plain.scale_model_input(cfg, t), float(t), weight)
        cfg = plain.step(output, t, cfg, uncond_output=output).prev_sample
        torch.testing.assert_close(found[index], cfg, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
@pytest.mark.parametrize("kind", ALL)
def test_a_prediction_of_any_type_gives_the_same_steps(kind: Any, prediction: str) -> None:
    results = []
    for each in ("epsilon", prediction):
        scheduler = make(kind, prediction_type=each)
        scheduler.set_timesteps(10)
        results.append(run(scheduler, normal(2), prediction=each, **noise_options(kind))["zt"])
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12 * float(results[0].abs().max()))


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(ALL),
    spacing=st.sampled_from(SPACINGS),
    prediction=st.sampled_from(maths.PREDICTIONS),
    config=st.sampled_from(sorted(golden.TABLES)),
    karras=st.booleans(),
    steps=st.integers(1, 40),
    eta=st.sampled_from([0.0, 0.5, 1.0]),
    start=st.integers(0, 39),
)
def test_stepping_by_the_coefficients_equals_step(
    kind: Any, spacing: str, prediction: str, config: str, karras: bool, steps: int, eta: float, start: int
) -> None:
    options: dict[str, Any] = {"timestep_spacing": spacing, "prediction_type": prediction, **golden.TABLES[config]}
    if kind in (EulerCFGPPScheduler, DPMSolverMultistepCFGPPScheduler):
        options["use_karras_sigmas"] = karras
    is_ddim, start = kind is DDIMCFGPPScheduler, start % steps
    scheduler = make(kind, **options)
    scheduler.set_timesteps(steps)
    if not is_ddim:
        scheduler.set_begin_index(start)
    rows = scheduler.coefficients(eta=eta) if is_ddim else scheduler.coefficients()
    assert rows.shape == (steps, len(maths.COLUMNS)) and rows.dtype == torch.float64 and rows.isfinite().all()
    x, history = normal(steps), torch.zeros(SHAPE, dtype=torch.float64)
    for index, t in enumerate(scheduler.timesteps[start:], start=start):
        guided, uncond, noise = (normal(7 * index + k) for k in range(3))
        torch.testing.assert_close(rows[index, -1] * x, scheduler.scale_model_input(x, t), rtol=1e-12, atol=1e-12)
        more: dict[str, Any] = {"eta": eta, "variance_noise": noise} if is_ddim else {}
        if kind is EulerAncestralCFGPPScheduler:
            more = {"variance_noise": noise}
        wanted = scheduler.step(guided, t, x, uncond_output=uncond, **more).prev_sample
        found, history = maths.step_by_coefficients(rows[index], x, guided, uncond, history, noise)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12 * float(wanted.abs().max() + x.abs().max()))
        x = wanted / wanted.abs().max()


def test_the_clipped_step_is_not_linear_and_says_so() -> None:
    scheduler = make(DDIMCFGPPScheduler, clip_sample=True)
    scheduler.set_timesteps(10)
    with pytest.raises(BadInput, match="coefficients: expected clip_sample=False, got True"):
        scheduler.coefficients()
    x = normal(0) * 10
    done = scheduler.step(x, scheduler.timesteps[0], x, uncond_output=x)
    assert done.pred_original_sample.abs().max() <= 1


# --- a diffusers scheduler's manners ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
def test_it_is_its_plain_counterpart_but_for_the_step(kind: Any) -> None:
    assert issubclass(kind, PLAIN[kind]) and kind.order == 1
    plain = make(PLAIN[kind])
    scheduler = kind.from_config(plain.config)
    ignored = {"_class_name", "_use_default_values"}
    assert {k: v for k, v in scheduler.config.items() if k not in ignored} == {
        k: v for k, v in plain.config.items() if k not in ignored
    }
    back = PLAIN[kind].from_config(scheduler.config)
    assert back.config.beta_end == 0.012 and type(back) is PLAIN[kind]
    for each in (scheduler, plain):
        each.set_timesteps(25)
    assert torch.equal(scheduler.timesteps, plain.timesteps)
    noised = [each.add_noise(normal(0), normal(1), each.timesteps[3:4]) for each in (scheduler, plain)]
    assert torch.equal(*noised)
    assert float(scheduler.init_noise_sigma) == pytest.approx(float(plain.init_noise_sigma), rel=1e-6)
    if hasattr(plain, "sigmas"):
        assert torch.equal(scheduler.sigmas, plain.sigmas)


@pytest.mark.parametrize("kind", ALL)
def test_it_survives_saving_and_loading(kind: Any, tmp_path: Path) -> None:
    scheduler = make(kind, **golden.TABLES["kolors"], prediction_type="v_prediction")
    scheduler.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path)
    assert type(loaded) is kind
    assert loaded.config.num_train_timesteps == 1100 and loaded.config.prediction_type == "v_prediction"
    for each in (scheduler, loaded):
        each.set_timesteps(10)
    results = [
        run(each, normal(0), prediction="v_prediction", **noise_options(kind))["zt"] for each in (scheduler, loaded)
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize("kind", ALL)
def test_a_second_request_gives_what_the_first_gave(kind: Any) -> None:
    scheduler, results = make(kind), []
    for interrupted in (False, True, False):
        scheduler.set_timesteps(8 if not interrupted else 12)
        if interrupted:  # half of another request
            for t in scheduler.timesteps[:5]:
                x = normal(5)
                scheduler.step(x, t, scheduler.scale_model_input(x, t), uncond_output=x)
        else:
            results.append(run(scheduler, normal(0), **noise_options(kind))["zt"])
    assert torch.equal(*results)


@pytest.mark.parametrize("kind", ALL)
def test_image_to_image_starts_in_the_middle(kind: Any) -> None:
    """By `set_begin_index` where the scheduler has it, and by its first timestep otherwise: the same steps."""
    results = []
    for begin in (True, False):
        scheduler = make(kind)
        scheduler.set_timesteps(20)
        if begin and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(12)
        x = scheduler.add_noise(normal(0), normal(1), scheduler.timesteps[12:13])
        results.append(run(scheduler, x, start=12, **noise_options(kind))["zt"])
    assert len(results[0]) == 8 and torch.equal(*results)
    assert results[0][-1].abs().max() < 10


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (EulerAncestralCFGPPScheduler, {}),
        (EulerCFGPPScheduler, {}),
        (EulerCFGPPScheduler, {"use_karras_sigmas": True}),
        (EulerCFGPPScheduler, {"use_exponential_sigmas": True}),
        (DPMSolverMultistepCFGPPScheduler, {}),
        (DPMSolverMultistepCFGPPScheduler, {"use_karras_sigmas": True}),
        (DPMSolverMultistepCFGPPScheduler, {"use_exponential_sigmas": True}),
    ],
)
def test_the_float64_levels_are_those_of_diffusers_before_rounding(kind: Any, spacing: str, options: Any) -> None:
    needs.scheduler_options(kind, options)
    for steps in (1, 7, 30):
        scheduler = make(kind, timestep_spacing=spacing, **options)
        scheduler.set_timesteps(steps)
        levels = torch.tensor(scheduler._levels(), dtype=torch.float64)
        torch.testing.assert_close(levels.float(), scheduler.sigmas, rtol=3e-7, atol=0)
        assert not torch.equal(levels, scheduler.sigmas.double())  # not merely the rounded ones
        assert scheduler._exact[0] is scheduler.sigmas


def test_levels_set_by_hand_are_taken() -> None:
    scheduler = make(EulerCFGPPScheduler)
    scheduler.set_timesteps(sigmas=[10.0, 3.1, 0.0])
    assert scheduler._levels() == [10.0, 3.1, 0.0] and scheduler.sigmas.dtype == torch.float32
    scheduler.sigmas = torch.tensor([8.0, 2.2, 0.0], dtype=torch.float64)
    assert scheduler._levels() == [8.0, 2.2, 0.0]
    assert copy.deepcopy(scheduler)._levels() == [8.0, 2.2, 0.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ALL)
def test_the_sample_keeps_its_dtype_and_the_arithmetic_is_float32_at_least(kind: Any, dtype: torch.dtype) -> None:
    scheduler = make(kind)
    scheduler.set_timesteps(10)
    x, guided, uncond, noise = (normal(k, dtype=dtype) for k in range(4))
    t = scheduler.timesteps[0]
    assert scheduler.scale_model_input(x, t).dtype == dtype
    more = {"variance_noise": noise} if kind is EulerAncestralCFGPPScheduler else {}
    found = scheduler.step(guided, t, x, uncond_output=uncond, **more).prev_sample
    assert found.dtype == dtype
    row = scheduler.coefficients()[0]
    zeros = torch.zeros(SHAPE, dtype=torch.float64)
    wanted, _ = maths.step_by_coefficients(row, x.double(), guided.double(), uncond.double(), zeros, noise.double())
    epsilon = torch.finfo(dtype).eps if dtype.itemsize == 2 else 20 * torch.finfo(dtype).eps
    arithmetic = 20 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    torch.testing.assert_close(found.double(), wanted, rtol=epsilon, atol=arithmetic)


def test_lightning_runs_at_lambda_1_on_trailing_timesteps() -> None:
    for kind in ALL:
        scheduler = make(kind, timestep_spacing="trailing")
        scheduler.set_timesteps(4)
        assert scheduler.timesteps.tolist() == [999, 749, 499, 249]
        assert run(scheduler, normal(0), 1.0)["zt"].isfinite().all()


def test_zero_terminal_snr_works_with_v_prediction_and_not_with_epsilon_in_ddim() -> None:
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    for kind in (DDIMCFGPPScheduler, EulerCFGPPScheduler, DPMSolverMultistepCFGPPScheduler):
        scheduler = make(kind, **options, prediction_type="v_prediction")
        scheduler.set_timesteps(5)
        x = normal(0)
        for t in scheduler.timesteps:
            scheduler.scale_model_input(x, t)
            x = scheduler.step(normal(1), t, x, uncond_output=normal(2)).prev_sample
        assert x.isfinite().all() and scheduler.coefficients().isfinite().all()
    scheduler = make(DDIMCFGPPScheduler, **options)
    scheduler.set_timesteps(5)
    with pytest.raises(BadInput, match="rescale_betas_zero_snr: expected prediction_type='v_prediction'"):
        scheduler.step(normal(0), scheduler.timesteps[0], normal(0), uncond_output=normal(0))


def test_2m_is_of_first_order_where_diffusers_is() -> None:
    def second_order(steps: int, **options: Any) -> list[bool]:
        scheduler = make(DPMSolverMultistepCFGPPScheduler, **options)
        scheduler.set_timesteps(steps)
        return (scheduler.coefficients()[:, maths.COLUMNS.index("history")] != 0).tolist()

    assert second_order(4) == [False, True, True, False]
    assert second_order(4, final_sigmas_type="sigma_min") == [False, True, True, False]
    assert second_order(4, final_sigmas_type="sigma_min", lower_order_final=False) == [False, True, True, True]
    assert second_order(15, final_sigmas_type="sigma_min") == [False, *[True] * 14]
    assert second_order(15, final_sigmas_type="sigma_min", euler_at_final=True) == [False, *[True] * 13, False]


# --- bad input --------------------------------------------------------------------------------------------------------


def one_line(error: pytest.ExceptionInfo[BadInput]) -> str:
    text = str(error.value)
    assert "\n" not in text and "expected" in text and "got" in text
    return text


@pytest.mark.parametrize("kind", ALL)
def test_a_step_needs_the_unconditional_prediction_in_the_samples_shape(kind: Any) -> None:
    scheduler, x = make(kind), normal(0)
    with pytest.raises(BadInput) as raised:
        scheduler.step(x, 1, x, uncond_output=x)
    assert "set_timesteps" in one_line(raised)
    scheduler.set_timesteps(10)
    t = scheduler.timesteps[0]
    for wrong in (None, x[:1], 1.0):
        with pytest.raises(BadInput) as raised:
            scheduler.step(x, t, x, uncond_output=wrong)
        assert "uncond_output" in one_line(raised) and kind.__name__ in one_line(raised)
    with pytest.raises(BadInput, match="model_output: expected the sample's shape"):
        scheduler.step(torch.cat([x, x]), t, x, uncond_output=x)
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    with pytest.raises(BadInput):
        scheduler.step(x, t, x, generator=generator)
    assert torch.equal(generator.get_state(), before)
    assert scheduler.step(x, t, x, uncond_output=x, **noise_options(kind)).prev_sample.shape == x.shape


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (DDIMCFGPPScheduler, {"use_clipped_model_output": True}),
        (DDIMCFGPPScheduler, {"eta": 1.5}),
        (DDIMCFGPPScheduler, {"eta": -0.1}),
        (EulerCFGPPScheduler, {"eta": 0.5}),
        (EulerCFGPPScheduler, {"s_churn": 1.0}),
        (EulerAncestralCFGPPScheduler, {"eta": 1.0}),
        (DPMSolverMultistepCFGPPScheduler, {"eta": 0.5}),
    ],
)
def test_a_step_option_that_the_sampler_does_not_define_is_refused(kind: Any, options: dict[str, Any]) -> None:
    scheduler, x = make(kind), normal(0)
    scheduler.set_timesteps(10)
    with pytest.raises(BadInput) as raised:
        scheduler.step(x, scheduler.timesteps[0], x, uncond_output=x, **options)
    assert next(iter(options)) in one_line(raised)
    off = dict.fromkeys(options, 0)  # as pipelines pass eta
    scheduler.step(x, scheduler.timesteps[0], x, uncond_output=x, **off)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((kind, {"prediction_type": "flow_prediction"}) for kind in ALL),
        (DDIMCFGPPScheduler, {"thresholding": True}),
        (DPMSolverMultistepCFGPPScheduler, {"solver_order": 1}),
        (DPMSolverMultistepCFGPPScheduler, {"solver_order": 3}),
        (DPMSolverMultistepCFGPPScheduler, {"algorithm_type": "dpmsolver"}),
        (DPMSolverMultistepCFGPPScheduler, {"algorithm_type": "sde-dpmsolver++"}),
        (DPMSolverMultistepCFGPPScheduler, {"solver_type": "heun"}),
        (DPMSolverMultistepCFGPPScheduler, {"thresholding": True}),
        (DPMSolverMultistepCFGPPScheduler, {"use_flow_sigmas": True}),
        (DPMSolverMultistepCFGPPScheduler, {"variance_type": "learned"}),
    ],
)
def test_a_constructor_option_that_cfgpp_does_not_define_is_refused(kind: Any, options: dict[str, Any]) -> None:
    name = next(iter(options))
    needs.scheduler_options(kind, options)
    for build in (lambda: make(kind, **options), lambda: kind.from_config(make(kind).config, **options)):
        with pytest.raises(BadInput) as raised:
            build()
        assert name in one_line(raised) and kind.__name__ in one_line(raised)


def test_options_of_another_scheduler_in_a_config_are_no_concern() -> None:
    """diffusers keeps them in the config for the scheduler that they belong to."""
    sde = make(DPMSolverMultistepScheduler, algorithm_type="sde-dpmsolver++", solver_order=3, thresholding=True)
    assert EulerCFGPPScheduler.from_config(sde.config).config.algorithm_type == "sde-dpmsolver++"


@pytest.mark.parametrize("kind", ALL[1:])
def test_steps_beyond_the_last_and_foreign_timesteps_are_refused(kind: Any) -> None:
    scheduler, x = make(kind), normal(0)
    scheduler.set_timesteps(2)
    for t in scheduler.timesteps:
        scheduler.step(x, t, x, uncond_output=x)
    with pytest.raises(BadInput) as raised:
        scheduler.step(x, scheduler.timesteps[-1], x, uncond_output=x)
    assert "all steps are done" in one_line(raised)
    if is_ve(scheduler):  # 2M takes a foreign timestep for its last one, as diffusers does
        scheduler.set_timesteps(2)
        with pytest.raises(BadInput) as raised:
            scheduler.step(x, 3, x, uncond_output=x)
        assert "scheduler.timesteps" in one_line(raised)


def test_ddim_refuses_a_timestep_outside_of_its_table_and_a_2m_request_a_step_outside_of_its_own() -> None:
    scheduler, x = make(DDIMCFGPPScheduler), normal(0)
    scheduler.set_timesteps(2)
    with pytest.raises(BadInput, match=r"timestep: expected 0\.\.999, got 1000"):
        scheduler.step(x, 1000, x, uncond_output=x)
    multistep = make(DPMSolverMultistepCFGPPScheduler)
    multistep.set_timesteps(5)
    with pytest.raises(BadInput, match=r"begin: expected 0\.\.4, got 5"):
        multistep.coefficients(begin=5)


@pytest.mark.parametrize("kind", ALL)
def test_a_plain_scheduler_has_a_counterpart(kind: Any) -> None:
    assert counterpart(make(PLAIN[kind])) is kind
    assert counterpart(make(kind)) is kind


class Mine(EulerDiscreteScheduler):
    """A subclass whose changes are unknown."""


@pytest.mark.parametrize("other", [PNDMScheduler, LCMScheduler, FlowMatchEulerDiscreteScheduler, Mine, int])
def test_a_scheduler_without_a_counterpart_is_refused_with_those_that_have_one(other: Any) -> None:
    with pytest.raises(BadInput) as raised:
        counterpart(other())
    text = one_line(raised)
    assert all(plain.__name__ in text for plain in PLAIN.values()) and other.__name__ in text


def test_the_public_names_are_the_four_schedulers_and_their_counterpart() -> None:
    assert sorted(schedulers.__all__) == sorted([*(kind.__name__ for kind in ALL), "counterpart"])
    assert not math.isnan(float(make(EulerCFGPPScheduler).init_noise_sigma))
