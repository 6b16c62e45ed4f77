"""The CFG++ formulas compute what the reference code of each sampler computes, and what the paper says of them."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from accel_hidiff.cfgpp import maths
from accel_hidiff.config import check_lambda, lambda_of
from accel_hidiff.errors import BadInput
from tests import cfgpp_golden as golden

EXACT = {"rtol": 1e-12, "atol": 1e-12}
PLAIN = {"ddim", "ddim_lightning", "ddim_edit", "ddim_inversion", "euler", "euler_lightning"}  # CFG, not CFG++

lambdas = st.floats(0, 1)
alphas = st.floats(1e-4, 0.9999)
seeds = st.integers(0, 2**32)


def normal(seed: int, count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, 2, 4, 3, 5, generator=generator, dtype=torch.float64))


# --- the reference trajectories ---------------------------------------------------------------------------------------


def inversion(case: dict[str, Any], data: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    x, states = data["x_T"].to(dtype), []
    rows = torch.stack([data[name].double() for name in ("inv_t", "inv_alpha_t", "inv_alpha_prev")], dim=1)
    for t, alpha, alpha_prev in rows.tolist():
        eps, uncond = golden.predict(x, t, case["guidance"])
        renoise = eps if case["solver"] in PLAIN else uncond
        x = maths.ddim_cfgpp_inversion(x, eps, renoise, *maths.level(alpha_prev), *maths.level(alpha))
        states.append(x)
    return {"inv_zt": torch.stack(states), "x_init": x}


def ddim(case: dict[str, Any], data: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {"z0t": [], "zt": [], "model_in": []}
    phi = 1.0 if "edit" in case["solver"] else 0.0
    eta = case.get("eta", 0.0)
    noises = data["noise"].to(x.dtype) if "noise" in data else [torch.zeros_like(x)] * case["steps"]
    rows = torch.stack([data[name].double() for name in ("t_model", "alpha_t", "alpha_next")], dim=1)
    for (t, alpha, alpha_next), noise in zip(rows.tolist(), noises, strict=False):
        eps, uncond = golden.predict(x, t, case["guidance"], phi)
        found["model_in"].append(x)
        x0 = maths.x0_of_eps(x, eps, *maths.level(alpha))
        std = maths.ddim_std(alpha, alpha_next, eta) if eta else 0.0
        x = maths.ddim_cfgpp(x0, eps if case["solver"] in PLAIN else uncond, *maths.level(alpha_next), std, noise)
        found["z0t"].append(x0)
        found["zt"].append(x)
    return {name: torch.stack(values) for name, values in found.items()}


def sigma_space(case: dict[str, Any], data: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {"z0t": [], "zt": [], "model_in": []}
    solver, times = case["solver"], iter(data["t_model"].tolist())
    noises = [*(data["noise"].to(x.dtype) if "noise" in data else []), *[torch.zeros_like(x)] * 99]
    U_prev = sigma_prev = None

    def denoise(y: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        found["model_in"].append(maths.to_vp(y, maths.level_of_sigma(sigma)[0]))
        outputs = golden.predict(found["model_in"][-1], next(times), case["guidance"])
        D, U = (maths.x0_of_ve("epsilon", output, y, sigma) for output in outputs)
        return D, U

    for (sigma, sigma_next), noise in zip(pairwise(data["sigma"].tolist()), noises, strict=False):
        if "2s" in solver:
            form = "comfy" if case["family"] == "comfy" else "authors"
            x, D = maths.dpmpp_2s_ancestral_cfgpp(x, denoise, sigma, sigma_next, noise, form=form)
        else:
            D, U = denoise(x, sigma)
            if "2m" in solver:
                difference = "uncond" if case["family"] == "sdxl" else "guided"
                x = maths.dpmpp_2m_cfgpp(x, D, U, U_prev, sigma_prev, sigma, sigma_next, difference=difference)
                U_prev, sigma_prev = U, sigma
            elif "euler_a" in solver:
                x = maths.euler_ancestral_cfgpp(x, D, U, sigma, sigma_next, noise)
            else:
                x = maths.euler_cfgpp(x, D, D if solver in PLAIN else U, sigma, sigma_next)
        found["z0t"].append(D)
        found["zt"].append(x)
    return {name: torch.stack(values) for name, values in found.items()}


def errors(case_id: str, dtype: torch.dtype) -> dict[str, float]:
    case, data = golden.CASES[case_id], golden.tensors(case_id)
    found = inversion(case, data, dtype) if "inv_t" in data else {"x_init": data["x_init"].to(dtype)}
    run = ddim if case["state_space"] == "VP" else sigma_space
    found |= run(case, data, found["x_init"])
    found["final"] = found["zt" if case["returned"] == "zt" else "z0t"][-1]
    return {name: golden.error(value, data[name]) for name, value in found.items()}


@pytest.mark.parametrize(("dtype", "tolerance"), golden.TOLERANCES, ids=["float64", "float32"])
@pytest.mark.parametrize("case_id", golden.CASES)
def test_the_formulas_reproduce_every_reference_trajectory(case_id: str, dtype: torch.dtype, tolerance: float) -> None:
    assert max(errors(case_id, dtype).values()) <= tolerance


def test_every_family_and_variant_is_there() -> None:
    assert len(golden.CASES) == 80
    assert {case["variant"] for case in golden.CASES.values()} == {"official", "aligned", "bypass"}
    assert {case["family"] for case in golden.CASES.values()} == {"sdxl", "sd", "comfy", "a1111"}


@pytest.mark.parametrize("mistake", ["swap", "guidance", "level"])
def test_the_reference_notices_a_mistake(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trajectories are worth their tolerance: the least mistake is a hundred thousand times larger."""
    predict, level = golden.predict, maths.level
    if mistake == "swap":
        monkeypatch.setattr(golden, "predict", lambda *given: predict(*given)[::-1])
    elif mistake == "guidance":
        monkeypatch.setattr(golden, "predict", lambda x, t, guidance, *rest: predict(x, t, 1.01 * guidance, *rest))
    else:
        monkeypatch.setattr(maths, "level", lambda alpha: level(alpha * 0.999))
    assert max(errors("sdxl-ddim_cfgpp-sdxl-aligned-N10-g0.6", torch.float64).values()) > 1e-4


# --- equalities -------------------------------------------------------------------------------------------------------


def of_noise(x: Tensor, eps: Tensor, alpha: float) -> Tensor:
    return maths.x0_of_eps(x, eps, *maths.level(alpha))


@given(seeds, lambdas, alphas, alphas)
def test_euler_equals_ddim_after_the_change_of_variables(
    seed: int, lam: float, alpha: float, alpha_next: float
) -> None:
    x, uncond, cond = normal(seed)
    eps = maths.guided(uncond, cond, lam)
    (a, s), (a_next, s_next) = maths.level(alpha), maths.level(alpha_next)
    vp = maths.ddim_cfgpp(of_noise(x, eps, alpha), uncond, a_next, s_next)
    ve, sigma = maths.to_ve(x, a), s / a
    D, U = (maths.x0_of_ve("epsilon", output, ve, sigma) for output in (eps, uncond))
    euler = maths.to_vp(maths.euler_cfgpp(ve, D, U, sigma, s_next / a_next), a_next)
    torch.testing.assert_close(euler, vp, rtol=1e-12, atol=1e-12 * (1 + s / a))


@given(alphas)
def test_a_sigma_and_a_cumulative_alpha_name_one_level(alpha: float) -> None:
    a, s = maths.level(alpha)
    assert maths.level_of_sigma(s / a) == pytest.approx((a, s), rel=1e-12)


@given(seeds, alphas, alphas)
def test_lambda_0_is_unconditional_and_no_prompt_is_needed(seed: int, alpha: float, alpha_next: float) -> None:
    x, uncond, cond = normal(seed)
    (a, s), (a_next, s_next) = maths.level(alpha), maths.level(alpha_next)
    guided = maths.guided(uncond, cond, 0.0)
    step = maths.ddim_cfgpp(of_noise(x, guided, alpha), uncond, a_next, s_next)
    torch.testing.assert_close(step, a_next / a * x + (s_next - a_next * s / a) * uncond, rtol=1e-12, atol=1e-9)


@given(seeds, lambdas)
def test_cfgpp_is_cfg_with_the_equivalent_weight_of_each_step(seed: int, lam: float) -> None:
    x, uncond, cond = normal(seed)
    sigmas = [14.6, 9.1, 4.0, 1.2, 0.3, 0.0]
    weights = maths.equivalent_cfg_scale(lam, sigmas).tolist()
    for (sigma, sigma_next), weight in zip(pairwise(sigmas), weights, strict=True):
        D, U = (maths.x0_of_ve("epsilon", maths.guided(uncond, cond, g), x, sigma) for g in (lam, 0.0))
        W = maths.x0_of_ve("epsilon", maths.guided(uncond, cond, weight), x, sigma)
        torch.testing.assert_close(
            maths.euler_cfgpp(x, D, U, sigma, sigma_next), maths.euler_cfgpp(x, W, W, sigma, sigma_next), **EXACT
        )


def test_the_equivalent_weight_holds_on_whole_ddim_trajectories() -> None:
    """CFG++ at lambda, and CFG with a weight per step, walk the same path through a real table."""
    table = golden.table("sdxl").double()
    alphas = [*table[torch.arange(981, 0, -20)].tolist(), float(table[0])]
    weights = maths.equivalent_cfg_scale(0.6, [maths.level(v)[1] / maths.level(v)[0] for v in alphas]).tolist()
    assert sum(weights) / len(weights) == pytest.approx(7.5, abs=0.5)  # 50 steps: w = 12.5 lambda, on average
    cfgpp = cfg = normal(0)[0]
    for t, (alpha, alpha_next), weight in zip(range(981, 0, -20), pairwise(alphas), weights, strict=True):
        eps, uncond = golden.predict(cfgpp, t, 0.6)
        cfgpp = maths.ddim_cfgpp(of_noise(cfgpp, eps, alpha), uncond, *maths.level(alpha_next))
        eps, _ = golden.predict(cfg, t, weight)
        cfg = maths.ddim_cfgpp(of_noise(cfg, eps, alpha), eps, *maths.level(alpha_next))
    torch.testing.assert_close(cfg, cfgpp, **EXACT)


@given(seeds, alphas, st.sampled_from(maths.PREDICTIONS))
def test_a_prediction_of_any_type_says_the_same(seed: int, alpha: float, prediction: str) -> None:
    x0, eps, _ = normal(seed)
    a, s = maths.level(alpha)
    x, tolerance = a * x0 + s * eps, {"rtol": 1e-12, "atol": 1e-13 / min(a, s)}
    output = maths.output_of(prediction, x0, eps, a, s)
    torch.testing.assert_close(maths.x0_of(prediction, output, x, a, s), x0, **tolerance)
    torch.testing.assert_close(maths.eps_of(prediction, output, x, a, s), eps, **tolerance)
    torch.testing.assert_close(maths.x0_of_ve(prediction, output, maths.to_ve(x, a), s / a), x0, **tolerance)


@given(seeds, lambdas, alphas, alphas)
def test_inversion_undoes_a_step_whose_predictions_it_is_given(
    seed: int, lam: float, alpha: float, alpha_next: float
) -> None:
    x, uncond, cond = normal(seed)
    (a, s), (a_next, s_next) = maths.level(alpha), maths.level(alpha_next)
    eps = maths.guided(uncond, cond, lam)
    down = maths.ddim_cfgpp(of_noise(x, eps, alpha), uncond, a_next, s_next)
    up = maths.ddim_cfgpp_inversion(down, eps, uncond, a_next, s_next, a, s)
    torch.testing.assert_close(up, x, rtol=1e-9, atol=1e-9)


@given(st.floats(0.01, 100), st.floats(0, 1))
def test_an_ancestral_step_splits_the_noise(sigma: float, ratio: float) -> None:
    up, down = maths.ancestral(sigma, ratio * sigma)
    assert math.hypot(up, down) == pytest.approx(ratio * sigma, rel=1e-12)
    assert 0 <= down <= ratio * sigma


@given(seeds, st.sampled_from(["guided", "uncond"]))
def test_2m_is_exact_for_a_clean_estimate_that_is_linear_in_log_sigma(seed: int, difference: str) -> None:
    """At lambda = 0 it is DPM-Solver++(2M), whose midpoint rule the differences of U enter with half their weight."""
    x, slope, offset = normal(seed)
    sigma_prev, sigma, sigma_next = 8.0, 4.0, 2.0  # equal steps in log sigma: q = 1
    U, U_prev = (slope * math.log(value) + offset for value in (sigma, sigma_prev))
    step = maths.dpmpp_2m_cfgpp(x, U, U, U_prev, sigma_prev, sigma, sigma_next, difference=difference)
    torch.testing.assert_close(step, 0.5 * x + 0.5 * (U + (U - U_prev) / 2), **EXACT)


def test_levels_may_be_tensors() -> None:
    x, D, U = normal(1)
    numbers = 8.0, 4.0, 1.5
    levels = [torch.tensor(value, dtype=torch.float64) for value in numbers]
    torch.testing.assert_close(
        maths.dpmpp_2m_cfgpp(x, D, U, x, *levels), maths.dpmpp_2m_cfgpp(x, D, U, x, *numbers), **EXACT
    )
    torch.testing.assert_close(maths.ancestral(*levels[1:])[0].item(), maths.ancestral(*numbers[1:])[0])


# --- bad input --------------------------------------------------------------------------------------------------------


def test_lambda_of_is_the_cfg_weight_over_12_5() -> None:
    assert [lambda_of(w) for w in (0, 5, 7.5, 12.5)] == [0, 0.4, 0.6, 1]


@pytest.mark.parametrize("weight", [-0.1, 12.6, 15, math.nan, math.inf, "7.5", None, True])
def test_a_cfg_weight_without_a_lambda_is_refused_with_the_mapping(weight: Any) -> None:
    with pytest.raises(BadInput, match=r"guidance_scale: expected 0\.\.12\.5, got .*lambda = guidance_scale / 12\.5"):
        lambda_of(weight)


@pytest.mark.parametrize("lam", [-0.1, 1.01, 7.5, math.nan, "0.6", None, True])
def test_a_lambda_outside_of_0_to_1_is_refused_with_the_mapping(lam: Any) -> None:
    with pytest.raises(BadInput, match=r"lambda: expected a number in 0\.\.1, got .*lambda = w / 12\.5"):
        check_lambda(lam)


@pytest.mark.parametrize("sigmas", [[], [1.0], [1.0, 2.0], [2.0, 2.0, 1.0], [1.0, -1.0], [math.nan, 0.0], [[2.0, 1.0]]])
def test_levels_that_do_not_fall_have_no_equivalent_weight(sigmas: Any) -> None:
    with pytest.raises(BadInput, match="sigmas: expected"):
        maths.equivalent_cfg_scale(0.6, sigmas)


def test_unknown_names_are_refused() -> None:
    x, D, U = normal(0)
    for call in (
        lambda: maths.x0_of("flow", x, x, 0.8, 0.6),
        lambda: maths.eps_of("flow", x, x, 0.8, 0.6),
        lambda: maths.output_of("flow", x, x, 0.8, 0.6),
        lambda: maths.dpmpp_2m_cfgpp(x, D, U, None, None, 2.0, 1.0, difference="both"),
        lambda: maths.dpmpp_2s_ancestral_cfgpp(x, lambda y, sigma: (D, U), 2.0, 1.0, x, form="other"),
    ):
        with pytest.raises(BadInput, match="expected"):
            call()
