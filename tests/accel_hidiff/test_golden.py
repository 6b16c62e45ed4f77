"""The patched UNet computes what the official HiDiffusion release computes, step by step."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from accel_hidiff import HiDiffusionConfig, apply_hidiffusion
from accel_hidiff.families import Layout, feature_sizes, identify
from accel_hidiff.schedule import plan_latent

_MANIFEST = json.loads((Path(__file__).parents[1] / "data" / "golden" / "manifest.json").read_text(encoding="utf-8"))
CASES = [case["file"].removesuffix(".safetensors") for case in _MANIFEST["cases"]]
MODES = list(_MANIFEST["phase_table"])
SLOW = {"sdxl_4096", "sd15_2048"}  # half a minute each: 512 x 512 and 256 x 256 latent cells
TOLERANCE = 1e-4  # of the largest output; rounding noise is about 1e-6, the least mistake above 1e-2


def apply_case(golden: Any, case: dict[str, Any]) -> Any:
    options = golden.options(case["mode"])
    config = HiDiffusionConfig(aggressive=options["aggressive"])
    # The inpainting case says no task: the UNet's nine channels tell it.
    task = None if case["arch"] == "sdxl_inpaint" else options["task"]
    unet = golden.unet(case["arch"])
    raunet, windows = case["apply_raunet"], case["apply_window_attn"]
    return apply_hidiffusion(unet, raunet, windows, config=config, family=options["family"], task=task)


def call_arguments(case: dict[str, Any], tensors: dict[str, torch.Tensor], step: int) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    if "text_embeds" in tensors:
        arguments["added_cond_kwargs"] = {name: tensors[name] for name in ("text_embeds", "time_ids")}
    if case["controlnet"] and step < 0.6 * case["num_timesteps"]:
        names = [name for name in tensors if name.startswith("down_block_additional_residuals.")]
        residuals = [tensors[f"down_block_additional_residuals.{index}"] for index in range(len(names))]
        arguments["down_block_additional_residuals"] = tuple(residuals)
        arguments["mid_block_additional_residual"] = tensors["mid_block_additional_residual"]
    return arguments


def errors(
    golden: Any, name: str, *, steps: Iterable[int] | None = None, change_shift: int | None = None
) -> dict[int, float]:
    """Recorded step -> max|y - ref| / max|ref|; `change_shift` names a windowed block that gets a wrong shift."""
    case, tensors = golden.cases[name], golden.tensors(name)
    patch = apply_case(golden, case)
    recorded = case["recorded_steps"]
    assert recorded == tensors["recorded_steps"].tolist()
    wanted = list(range(case["num_timesteps"]) if case["trajectory"] else recorded if steps is None else steps)
    sample, found = tensors["sample"], {}
    for step in wanted:
        shifts = tensors["shift_index"][step].tolist() if "shift_index" in tensors else None
        if change_shift is not None:
            shifts[change_shift] = (shifts[change_shift] + 1) % 4
        with torch.no_grad(), patch.phase(step=step, num_steps=case["num_timesteps"], window_shifts=shifts):
            y = patch.unet(
                sample,
                tensors["timesteps"][step],
                tensors["encoder_hidden_states"],
                **call_arguments(case, tensors, step),
            ).sample
        if case["trajectory"]:
            sample = sample - 0.1 * y
        if step in recorded:
            index = recorded.index(step)
            whole = "output" in tensors
            reference = tensors["output" if whole else "output_sub"][index]
            y = y if whole else y[..., ::3, ::3]
            found[step] = ((y - reference).abs().max() / reference.abs().max()).item()
    if "final_sample" in tensors:
        reference = tensors["final_sample"]
        assert (sample - reference).abs().max() < TOLERANCE * reference.abs().max()
    return found


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CASES])
def test_every_recorded_step_matches_the_official_output(golden: Any, name: str) -> None:
    found = errors(golden, name)
    assert list(found) == golden.cases[name]["recorded_steps"]
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize("name", ["sd15_landscape", "sdxl_square", "sdxl_portrait", "sdxl_odd"])
def test_one_wrong_shift_is_seen(golden: Any, name: str) -> None:
    """The comparison can fail: one shift of one block (the last), off by one, is far outside of the tolerance."""
    found = errors(golden, name, change_shift=-1)
    assert min(found.values()) > 1e-3, found


def test_a_wrong_phase_is_seen(golden: Any) -> None:
    """The comparison can fail: the inputs of step 0 (dilated), run as step 1 (pooled), give another output."""
    case, tensors = golden.cases["sdxl_square"], golden.tensors("sdxl_square")
    patch = apply_case(golden, case)
    with torch.no_grad(), patch.phase(step=1, num_steps=10, window_shifts=tensors["shift_index"][0].tolist()):
        text = tensors["encoder_hidden_states"]
        y = patch.unet(tensors["sample"], tensors["timesteps"][0], text, **call_arguments(case, tensors, 0)).sample
    assert (y - tensors["output"][0]).abs().max() > 1e-1 * tensors["output"][0].abs().max()


@pytest.mark.parametrize("name", [case for case in CASES if not case.endswith("raunet_only")])
def test_windowed_blocks_are_found_in_call_order(golden: Any, name: str) -> None:
    case = golden.cases[name]
    assert list(apply_case(golden, case).windowed_blocks) == case["windowed_blocks"]


@pytest.mark.parametrize("mode", MODES)
def test_phases_are_those_of_the_official_modules(golden: Any, mode: str) -> None:
    options = golden.options(mode)
    arch = "sdxl_inpaint" if "inpainting" in mode else mode.split("_", maxsplit=1)[0]
    layout = Layout.from_config(golden.unet_configs[arch])
    family = identify(layout, options["family"])
    config = HiDiffusionConfig(aggressive=options["aggressive"])
    sizes = {
        "sd15_1024": ((64, 64), (255, 700), (700, 255), (96, 168)),
        "sd15_2048": ((256, 256), (300, 257)),
        "sdxl_4096": ((512, 512), (600, 520)),
    }.get(mode.split(" ", maxsplit=1)[0], ((128, 128), (511, 700), (700, 511), (96, 168)))
    rows = golden.phase_table[mode]
    assert [int(n) for n in rows] == [*range(1, 61), 75, 100]
    for steps, (dilated, pooled) in rows.items():
        for height, width in sizes:
            plan = plan_latent(family, layout, height, width, int(steps), config, options["task"])
            assert [s for s in range(int(steps)) if plan.at(s).dilated] == list(range(*dilated)), (steps, height, width)
            assert [s for s in range(int(steps)) if plan.at(s).pooled] == list(range(*pooled)), (steps, height, width)


@pytest.mark.parametrize("name", CASES)
def test_feature_sizes_are_those_of_the_official_modules(golden: Any, name: str) -> None:
    case = golden.cases[name]
    options = golden.options(case["mode"])
    layout = Layout.from_config(golden.unet_configs[case["arch"]])
    family = identify(layout, options["family"])
    raunet = case["apply_raunet"]
    config = HiDiffusionConfig(aggressive=options["aggressive"], pooled=raunet, dilated=raunet)
    plan = plan_latent(family, layout, *case["latent"], case["num_timesteps"], config, options["task"])
    assert case["feature_sizes"]
    for step, recorded in case["feature_sizes"].items():
        computed = feature_sizes(layout, family, *case["latent"], plan.at(int(step)))
        assert {path: list(computed[path]) for path in recorded} == recorded, step
