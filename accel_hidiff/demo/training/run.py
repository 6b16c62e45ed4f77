"""Both trainings in order, then the folder that ships."""

from __future__ import annotations

import json
import platform
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from accel_hidiff.demo.model import assemble
from accel_hidiff.demo.training.autoencoder import train_autoencoder
from accel_hidiff.demo.training.card import card, digests
from accel_hidiff.demo.training.diffusion import train_diffusion
from accel_hidiff.demo.training.loop import Training
from accel_hidiff.demo.training.recipe import AutoencoderRecipe, DiffusionRecipe, model_config
from accel_hidiff.files import whole_file


def train(
    out: Path,
    *,
    device: str = "cpu",
    autoencoder: AutoencoderRecipe | None = None,
    diffusion: DiffusionRecipe | None = None,
) -> Path:
    """Train the demo model from nothing, or from where an interrupted run in `out` stopped.

    Args:
        out: folder for checkpoints, encoded scenes, sample grids, `losses.png`, `training.json`, and `model`.
        device: a torch device.
        autoencoder, diffusion: the recipes; by default the ones of the weights that ship.

    Returns:
        `out/model`: a diffusers folder in float16 with its card.

    Raises:
        ValueError: `out` holds a training with other settings.
    """
    first, second = autoencoder or AutoencoderRecipe(), diffusion or DiffusionRecipe()
    out.mkdir(parents=True, exist_ok=True)
    if (out / "model").exists() and not (out / "training.json").exists():
        raise ValueError(f"{out / 'model'}: expected a training's result, found something else; choose another --out")
    where = torch.device(device)
    pipe = assemble(second.seed, model_config())
    for name in ("vae", "unet", "text_encoder", "text_encoder_2"):
        getattr(pipe, name).to(where)
    records = [train_autoencoder(pipe.vae, first, out, where)]
    pipe.vae.requires_grad_(False)
    records.append(train_diffusion(pipe, second, out, where))
    summary = _summary(records, where, first, second)
    with whole_file(out / "training.json") as part:
        part.write_text(json.dumps(summary, indent=1) + "\n")
    model = _export(pipe, out / "model", summary)
    _plot(records, out / "losses.png")
    return model


def shortened(share: float) -> tuple[AutoencoderRecipe, DiffusionRecipe]:
    """The recipes with a share of their steps and scenes, to try the way through; the weights are of no use."""
    first, second = AutoencoderRecipe(), DiffusionRecipe()
    return (
        replace(first, steps=max(int(first.steps * share), 1)),
        replace(second, steps=max(int(second.steps * share), 1), scenes=max(int(second.scenes * share), 200)),
    )


def _summary(
    records: list[Training], device: torch.device, first: AutoencoderRecipe, second: DiffusionRecipe
) -> dict[str, Any]:
    return {
        "recipes": {"autoencoder": asdict(first), "diffusion": asdict(second)},
        "seconds": {record.name: round(record.seconds) for record in records},
        "final_loss": {
            record.name: round(sum(record.losses[-100:]) / len(record.losses[-100:]), 5) for record in records
        },
        "device": device.type,
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
    }


def _export(pipe: Any, target: Path, summary: dict[str, Any]) -> Path:
    part = target.with_name(".model.tmp")
    shutil.rmtree(part, ignore_errors=True)
    pipe.to("cpu", torch.float16)
    pipe.save_pretrained(part)
    for name in ("text_encoder", "text_encoder_2"):
        # transformers loads in the dtype that it finds here, diffusers in float32: the two have to agree.
        config = part / name / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
    (part / "README.md").write_text(card(summary, digests(part)), encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)
    return target


def _plot(records: list[Training], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(records), figsize=(4.6 * len(records), 3.2))
    for panel, record in zip(panels, records, strict=True):
        window = max(len(record.losses) // 100, 1)
        means = [
            sum(record.losses[at : at + window]) / len(record.losses[at : at + window])
            for at in range(0, len(record.losses), window)
        ]
        panel.plot([at * window for at in range(len(means))], means, color="#1f77b4", linewidth=1.2)
        panel.set_title(record.name)
        panel.set_xlabel("step")
        panel.set_ylabel("loss")
        panel.set_yscale("log")
        panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    with whole_file(path) as part:
        figure.savefig(part, dpi=110)
    plt.close(figure)
