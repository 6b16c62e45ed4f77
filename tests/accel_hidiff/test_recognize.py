"""What a model is, is told from its blocks, its scheduler, its VAE and its pipeline's signature, and from no name."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest

import accel_hidiff as ah
from accel_hidiff import BadInput, HiDiffusionConfig, UnknownLayout
from accel_hidiff.config import FAMILIES, TASKS
from accel_hidiff.families import SD15, SDXL, Layout
from accel_hidiff.recognize import Recognized, recognize
from tests import models

# name in tests/models.py: (family, aggressive)
TOLD = {
    "sd15": ("sd15", None),
    "sd21": ("sd15", None),
    "sdxl": ("sdxl", None),
    "sdxl_turbo": ("sdxl_turbo", None),
    "sdxl_lightning": ("sdxl_turbo", None),
    "playground": ("sdxl", False),
    "kolors": ("sdxl", None),
}
TASK_OF = {"multi_controlnet": "controlnet", "inpaint9": "inpaint"}
MISLEADING = "sdxl-turbo-playground-inpainting"


def told(pipe: Any, config: HiDiffusionConfig | None = None, **stated: Any) -> Recognized:
    return recognize(pipe, pipe.unet.config, config or HiDiffusionConfig(), **stated)


def with_scheduler(pipe: Any, name: str, **options: Any) -> Any:
    """Swaps the scheduler as users do."""
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **options)
    return pipe


# ---- every family and task


@pytest.mark.parametrize(("name", "task"), models.SUPPORTED, ids=map("-".join, models.SUPPORTED))
def test_family_task_and_settings_are_told_from_the_pipeline(name: str, task: str) -> None:
    family, aggressive = TOLD[name]
    pipe = models.build(name, task)
    model = told(pipe)
    assert (model.family.name, model.task) == (family, TASK_OF.get(task, task))
    assert model.config == HiDiffusionConfig(aggressive=aggressive), "nothing else is filled in"
    assert model.layout == Layout.from_config(pipe.unet.config)
    patch = ah.apply_hidiffusion(pipe)
    applied = Recognized(patch.family, patch.layout, patch.task, patch.config, patch.evidence)
    assert applied == model


def test_every_family_and_task_of_the_package_is_among_them() -> None:
    assert {family for family, _ in TOLD.values()} == set(FAMILIES)
    assert {TASK_OF.get(task, task) for _, task in models.SUPPORTED} == set(TASKS)


def test_an_adapter_is_no_controlnet() -> None:
    model = told(models.build_adapter())
    assert (model.family.name, model.task) == ("sdxl", "text2img")


@pytest.mark.parametrize("name", TOLD)
@pytest.mark.parametrize("task", ["text2img", "img2img"])
def test_a_name_never_matters(name: str, task: str) -> None:
    pipe = models.build(name, task)
    before = told(pipe)
    for part in (pipe, pipe.unet, pipe.vae, pipe.scheduler):
        part.register_to_config(_name_or_path=MISLEADING)
    pipe.unet.name_or_path = MISLEADING
    assert pipe.name_or_path == pipe.unet.config["_name_or_path"] == MISLEADING
    assert told(pipe) == before
    assert recognize(None, pipe.unet.config, HiDiffusionConfig()).family is (SD15 if TOLD[name][0] == "sd15" else SDXL)


# ---- what was stated stands


@pytest.mark.parametrize("name", ["sdxl", "sdxl_turbo", "playground"])
@pytest.mark.parametrize("family", ["sdxl", "sdxl_turbo"])
def test_a_stated_family_stands(name: str, family: str) -> None:
    model = told(models.build(name, "text2img"), family=family)
    assert model.family.name == family
    assert model.evidence.startswith("as stated")


@pytest.mark.parametrize("aggressive", [True, False])
@pytest.mark.parametrize("name", ["sdxl", "playground"])
def test_a_stated_aggressive_stands(name: str, aggressive: bool) -> None:
    config = HiDiffusionConfig(aggressive=aggressive, shift_seed=3)
    model = told(models.build(name, "text2img"), config)
    assert model.config == config and "aggressive" not in model.evidence


def test_what_is_told_leaves_the_other_settings_alone() -> None:
    config = HiDiffusionConfig(t1_ratio=0.3, pooled=False, window_shifts="per_step", control_ratio=0.2, shift_seed=9)
    assert told(models.build("playground", "text2img"), config).config == config.replace(aggressive=False)
    assert config.aggressive is None


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("made_for", ["text2img", "inpaint9", "controlnet"])
def test_a_stated_task_stands(made_for: str, task: str) -> None:
    assert told(models.build("sdxl", made_for), task=task).task == task


def test_options_that_cannot_be_are_refused() -> None:
    pipe = models.build("sdxl", "text2img")
    with pytest.raises(BadInput, match="family: expected one of sd15, sdxl, sdxl_turbo; got 'sd3'"):
        told(pipe, family="sd3")
    with pytest.raises(BadInput, match=r"task: expected one of text2img, .*; got 'upscale'"):
        told(pipe, task="upscale")
    for config in ({"aggressive": False}, "default", 1):
        with pytest.raises(BadInput, match=f"config: expected a HiDiffusionConfig, got {type(config).__name__}"):
            told(pipe, config)
        with pytest.raises(BadInput, match="config: expected a HiDiffusionConfig"):
            ah.apply_hidiffusion(pipe, config=config)
    with pytest.raises(BadInput, match="got NoneType"):
        recognize(pipe, pipe.unet.config, None)  # type: ignore[arg-type]


# ---- distilled models


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler"])
@pytest.mark.parametrize("saved", [False, True])
def test_a_scheduler_of_few_steps_tells_a_distilled_model(name: str, saved: bool) -> None:
    """A scheduler that was loaded from a file has its class in its config, from which the next one is made."""
    pipe = models.build("sdxl", "text2img")
    if saved:
        pipe.scheduler.register_to_config(_class_name="EulerDiscreteScheduler")
    model = told(with_scheduler(pipe, name))
    assert model.family.name == "sdxl_turbo" and model.evidence == f"{name}: distilled"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("EulerDiscreteScheduler", {"prediction_type": "v_prediction"}),
        ("EulerAncestralDiscreteScheduler", {"prediction_type": "v_prediction"}),
        ("EulerDiscreteScheduler", {"rescale_betas_zero_snr": True}),
        ("EulerDiscreteScheduler", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
        ("EulerDiscreteScheduler", {"timestep_spacing": "leading"}),
        ("EulerDiscreteScheduler", {"timestep_spacing": "linspace"}),
        ("DPMSolverMultistepScheduler", {}),
        ("UniPCMultistepScheduler", {}),
        ("DDIMScheduler", {}),
    ],
)
def test_other_trailing_schedulers_and_other_eulers_tell_nothing(name: str, options: dict[str, Any]) -> None:
    pipe = with_scheduler(models.build("sdxl", "text2img"), name, **{"timestep_spacing": "trailing", **options})
    assert pipe.scheduler.config.timestep_spacing == options.get("timestep_spacing", "trailing")
    model = told(pipe)
    assert model.family is SDXL and model.config.aggressive is None
    assert model.evidence == "from the UNet's blocks"


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"])
def test_an_epsilon_euler_with_trailing_timesteps_tells_turbo(name: str) -> None:
    model = told(with_scheduler(models.build("sdxl", "text2img"), name, timestep_spacing="trailing"))
    assert model.family.name == "sdxl_turbo"
    assert model.evidence == f"{name} with trailing timesteps: Turbo or Lightning"


@pytest.mark.parametrize("name", ["LCMScheduler", "EulerDiscreteScheduler"])
def test_a_scheduler_moves_no_other_layout(name: str) -> None:
    pipe = with_scheduler(models.build("sd15", "text2img"), name, timestep_spacing="trailing")
    assert told(pipe).family is SD15


def test_a_unet_with_a_guidance_embedding_is_distilled_whatever_its_scheduler() -> None:
    """Latent consistency models take the guidance as an input."""
    pipe = models.build("sdxl", "text2img")
    pipe.unet.register_to_config(time_cond_proj_dim=256)
    for model in (told(pipe), recognize(None, pipe.unet.config, HiDiffusionConfig())):
        assert model.family.name == "sdxl_turbo"
        assert model.evidence == "its UNet takes the guidance as an embedding: distilled"


# ---- Playground


@pytest.mark.parametrize("name", ["EDMDPMSolverMultistepScheduler", "EDMEulerScheduler"])
def test_playground_is_told_from_its_edm_scheduler(name: str) -> None:
    """Also without the statistics in its VAE."""
    pipe = models.build("sdxl", "text2img")
    pipe.scheduler = getattr(diffusers, name)(sigma_data=0.5)
    model = told(pipe)
    assert model.family is SDXL and model.config.aggressive is False
    assert model.evidence == (f"from the UNet's blocks; not aggressive: {name} is an EDM scheduler, as Playground's")


def test_playground_is_told_from_its_vae_where_its_scheduler_is_another() -> None:
    pipe = models.build("playground", "text2img")
    pipe.scheduler = models.build("sdxl", "text2img").scheduler
    assert type(pipe.scheduler).__name__ == "EulerDiscreteScheduler" and "sigma_data" not in pipe.scheduler.config
    model = told(pipe)
    assert model.family is SDXL and model.config.aggressive is False
    assert model.evidence == (
        "from the UNet's blocks; not aggressive: the VAE's config states the statistics of its latents, as Playground's"
    )


def test_playground_is_told_after_its_scheduler_was_made_into_another() -> None:
    """`from_config` keeps what it does not know: the new scheduler's config has the old one's sigma_data."""
    pipe = with_scheduler(models.build("playground", "text2img"), "EulerDiscreteScheduler")
    assert told(pipe).config.aggressive is False


def test_a_scheduler_is_not_taken_for_the_one_that_it_was_made_from() -> None:
    pipe = with_scheduler(models.build("sdxl", "text2img"), "EDMEulerScheduler", sigma_data=0.5)
    assert told(pipe).config.aggressive is False
    model = told(with_scheduler(pipe, "EulerDiscreteScheduler"))
    assert "EulerDiscreteScheduler is an EDM scheduler" not in model.evidence
    assert model.config.aggressive is None


def test_a_distilled_model_and_other_layouts_have_no_aggressive_setting() -> None:
    for name in ("sd15", "sdxl_turbo"):
        pipe = models.build(name, "text2img")
        pipe.vae.register_to_config(latents_mean=[0.0] * 4)
        assert told(pipe).config.aggressive is None


# ---- bare UNets, unknown ones


@pytest.mark.parametrize(
    ("name", "task", "family", "told_task"),
    [
        ("sdxl", "text2img", "sdxl", "text2img"),
        ("sdxl_turbo", "text2img", "sdxl", "text2img"),  # the scheduler is not there to tell
        ("playground", "img2img", "sdxl", "text2img"),
        ("sdxl", "inpaint9", "sdxl", "inpaint"),
        ("sd15", "inpaint9", "sd15", "inpaint"),
        ("sd21", "inpaint", "sd15", "text2img"),
    ],
)
def test_a_bare_unet_is_told_from_its_blocks_and_channels(name: str, task: str, family: str, told_task: str) -> None:
    unet = models.build(name, task).unet
    model = recognize(None, unet.config, HiDiffusionConfig())
    assert (model.family.name, model.task) == (family, told_task)
    assert model.config == HiDiffusionConfig() and model.evidence == "from the UNet's blocks"
    patch = ah.apply_hidiffusion(unet, family="sdxl_turbo" if family == "sdxl" else None, task="controlnet")
    assert (patch.family.name, patch.task) == ("sdxl_turbo" if family == "sdxl" else "sd15", "controlnet")


def test_an_unknown_layout_is_refused_with_what_was_looked_for_and_found() -> None:
    config = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": (2, 3),
        "in_channels": 4,
    }
    with pytest.raises(UnknownLayout) as raised:
        recognize(None, config, HiDiffusionConfig())
    text = str(raised.value)
    for family in (SD15, SDXL):
        blocks = f"down {', '.join(family.down_block_types)}, up {', '.join(family.up_block_types)}"
        assert f"{family.name}: {blocks} with 2 layers per block" in text
    assert "got down DownBlock2D, AttnDownBlock2D, up AttnUpBlock2D, UpBlock2D with (2, 3) layers per block" in text


def test_a_family_that_does_not_fit_is_refused_whatever_the_scheduler_tells() -> None:
    pipe = models.build("sdxl_turbo", "text2img")
    with pytest.raises(UnknownLayout, match=r"expected sd15: down CrossAttnDownBlock2D.*; got down DownBlock2D"):
        told(pipe, family="sd15")
    with pytest.raises(UnknownLayout, match="expected sdxl_turbo"):
        told(models.build("sd15", "text2img"), family="sdxl_turbo")
