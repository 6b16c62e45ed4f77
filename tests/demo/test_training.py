"""The training of the demo model, cut short: it learns, stops anywhere, and goes on to the same weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from accel_hidiff.demo.training import autoencoder, diffusion, loop, run
from accel_hidiff.demo.training.card import digests
from accel_hidiff.demo.training.loop import Training
from accel_hidiff.demo.training.recipe import AutoencoderRecipe, DiffusionRecipe

FIRST = AutoencoderRecipe(steps=3, batch=4, warm_up=1)
SECOND = DiffusionRecipe(steps=3, batch=4, scenes=60, warm_up=1)


class Stopped(Exception):
    """The process ended here."""


@pytest.fixture(scope="module", autouse=True)
def brief() -> Iterator[None]:
    """What is measured and drawn beside the training takes longer than three steps of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autoencoder, "_SCALED_ON", 16)
        patch.setattr(diffusion, "_SAMPLES", 8)
        patch.setattr(diffusion, "_SAMPLE_STEPS", 1)
        yield


@pytest.fixture(scope="module")
def trained(brief: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run.train(tmp_path_factory.mktemp("whole"), autoencoder=FIRST, diffusion=SECOND).parent


def test_the_result_is_a_diffusers_folder_with_its_card(trained: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(trained / "model")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    image = pipe("a red house on grey", height=64, width=96, num_inference_steps=1, output_type="np").images[0]
    assert image.shape == (64, 96, 3)
    card = (trained / "model/README.md").read_text()
    weights = digests(trained / "model")
    assert len(weights) == 4 and all(digest in card for digest in weights.values())
    assert sum(path.stat().st_size for path in (trained / "model").rglob("*.safetensors")) < 25e6
    summary = json.loads((trained / "training.json").read_text())
    assert summary["recipes"]["diffusion"]["steps"] == 3 and summary["final_loss"]["diffusion"] > 0
    for name in ("autoencoder.png", "samples-000003.png", "losses.png"):
        assert (trained / name).stat().st_size > 1000


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
def test_an_interrupted_training_gives_the_same_weights(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    save = Training._save

    def stops(self: Any, step: int, *state: Any) -> None:
        save(self, step, *state)
        if self.name == stage and step == 2:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_SAVE_EVERY_S", -1.0)
        patch.setattr(Training, "_save", stops)
        with pytest.raises(Stopped):
            run.train(tmp_path, autoencoder=FIRST, diffusion=SECOND)
    assert not (tmp_path / "model").exists()
    again = run.train(tmp_path, autoencoder=FIRST, diffusion=SECOND)
    assert digests(again) == digests(trained / "model")


def test_other_settings_are_refused(trained: Path) -> None:
    with pytest.raises(ValueError, match="choose another folder"):
        run.train(trained, autoencoder=replace(FIRST, rate=1.0), diffusion=SECOND)


def test_it_learns(tmp_path: Path) -> None:
    """A layer under the loop that both trainings share: the loss falls, and the averaged weights are left in it."""
    layer = torch.nn.Linear(4, 4)
    wanted = torch.eye(4)

    def loss_of(step: int) -> torch.Tensor:
        given = torch.randn(64, 4, generator=torch.Generator().manual_seed(step))
        return (layer(given) - given @ wanted).square().mean()

    training = Training(
        "layer", tmp_path, {"layer": layer}, loss_of, 200, 0.05, 10, {}, average=0.9, say=lambda _: None
    )
    training.run()
    assert training.losses[0] > 0.3 and loss_of(1000).item() < 1e-3
    assert not layer.training
