"""What a model is, told from its structure, its scheduler and its pipeline's signature; never from a name. No torch.

The block types give the layout (`families.identify`). Models that share SDXL's layout and want another plan are told
from what they must ship with to work at all: Playground v2.5 its EDM scheduler, or the statistics of its VAE's latents;
distilled models (Turbo, Lightning, LCM) the scheduler of their few steps. Each can be stated instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from accel_hidiff.config import TASKS, HiDiffusionConfig, check_choice
from accel_hidiff.errors import BadInput
from accel_hidiff.families import SDXL, SDXL_TURBO, Family, Layout, identify
from accel_hidiff.schedule import INPAINTING_CHANNELS

_FEW_STEPS = ("LCMScheduler", "TCDScheduler")
_EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
_EULER = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")


@dataclass(frozen=True)
class Recognized:
    """A model's family, its task, the settings with what was told filled in, and what it was told from."""

    family: Family
    layout: Layout
    task: str
    config: HiDiffusionConfig
    evidence: str


def recognize(
    pipe: Any,
    unet_config: Mapping[str, Any],
    config: HiDiffusionConfig,
    family: str | None = None,
    task: str | None = None,
) -> Recognized:
    """What to apply to a model.

    Args:
        pipe: the pipeline, None for a bare UNet.
        unet_config: `unet.config`.
        config, family, task: what the user stated; it stands.

    Raises:
        UnknownLayout: the UNet fits no family, or not the one that was named.
        BadInput: an option is not what it should be.
    """
    if not isinstance(config, HiDiffusionConfig):
        raise BadInput(f"config: expected a HiDiffusionConfig, got {type(config).__name__}")
    layout = Layout.from_config(unet_config)
    chosen = identify(layout, family)
    reasons = ["as stated" if family is not None else "from the UNet's blocks"]
    if family is None and chosen is SDXL and (reason := _distilled(pipe, unet_config)):
        chosen, reasons = SDXL_TURBO, [reason]
    if config.aggressive is None and chosen is SDXL and (reason := _playground(pipe)):
        config = config.replace(aggressive=False)
        reasons.append(f"not aggressive: {reason}")
    if task is None:
        task = tell_task(pipe, layout)
    check_choice("task", task, TASKS)
    return Recognized(chosen, layout, task, config, "; ".join(reasons))


def tell_task(pipe: Any, layout: Layout) -> str:
    """The task, from what the pipeline's call takes and which components it has."""
    if pipe is None:
        return "inpaint" if layout.in_channels == INPAINTING_CHANNELS else "text2img"
    parameters = inspect.signature(type(pipe).__call__).parameters
    if getattr(pipe, "controlnet", None) is not None:
        return "controlnet_img2img" if "strength" in parameters else "controlnet"
    if "mask_image" in parameters:
        return "inpaint"
    return "img2img" if "strength" in parameters else "text2img"


def _distilled(pipe: Any, unet_config: Mapping[str, Any]) -> str | None:
    """Why this is a guidance-free few-step model with SDXL's structure, if it is.

    Trailing timesteps alone are no sign: models trained to zero terminal SNR use them with v-prediction.
    """
    if unet_config.get("time_cond_proj_dim") is not None:
        return "its UNet takes the guidance as an embedding: distilled"
    scheduler = getattr(pipe, "scheduler", None)
    name, config = type(scheduler).__name__, _config_of(scheduler)
    if _is_a(scheduler, _FEW_STEPS):
        return f"{name}: distilled"
    trailing = config.get("timestep_spacing") == "trailing" and config.get("prediction_type") == "epsilon"
    if trailing and _is_a(scheduler, _EULER) and not config.get("rescale_betas_zero_snr"):
        return f"{name} with trailing timesteps: Turbo or Lightning"
    return None


def _playground(pipe: Any) -> str | None:
    scheduler = getattr(pipe, "scheduler", None)
    # Its class, not its config: a scheduler that was made from another's config keeps the other's entries.
    if _is_a(scheduler, _EDM):
        return f"{type(scheduler).__name__} is an EDM scheduler, as Playground's"
    if _config_of(getattr(pipe, "vae", None)).get("latents_mean") is not None:
        return "the VAE's config states the statistics of its latents, as Playground's"
    return None


def _is_a(component: Any, names: tuple[str, ...]) -> bool:
    """`isinstance` by the names of diffusers classes, which need no import."""
    return any(base.__name__ in names for base in type(component).__mro__)


def _config_of(component: Any) -> Mapping[str, Any]:
    config = getattr(component, "config", None)
    return config if isinstance(config, Mapping) else {}
