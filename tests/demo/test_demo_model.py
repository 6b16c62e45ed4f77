"""The demo model: a real pipeline, the same on every build, unchanged by saving and loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline

from accel_hidiff.demo import DemoModelConfig, build_pipeline, save_model, tiny_config

MODULES = ("unet", "vae", "text_encoder", "text_encoder_2")
PROMPTS = ("a red circle", "", "Grüße, 漢字 and 'quotes' 42!")


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionXLPipeline:
    return quiet(build_pipeline(config=tiny_config()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("demo") / "model", config=tiny_config())


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline: Any, prompt: str = "a red circle") -> np.ndarray:
    """float32 array of shape (128, 192, 3), values in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    output = pipeline(prompt, height=128, width=192, num_inference_steps=2, generator=generator, output_type="np")
    image: np.ndarray = output.images[0]
    return image


def assert_same_weights(left: Any, right: Any) -> None:
    for name in MODULES:
        expected, got = getattr(left, name).state_dict(), getattr(right, name).state_dict()
        assert expected.keys() == got.keys()
        for key, tensor in expected.items():
            assert tensor.dtype == got[key].dtype
            assert torch.equal(tensor, got[key]), f"{name}.{key}"


def test_same_seed_same_weights(pipeline: Any) -> None:
    assert_same_weights(pipeline, build_pipeline(config=tiny_config()))


def test_other_seed_other_weights(pipeline: Any) -> None:
    other = build_pipeline(1, config=tiny_config())
    assert not torch.equal(pipeline.unet.conv_in.weight, other.unet.conv_in.weight)


def test_global_random_state_is_untouched() -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[union-attr]
    build_pipeline(3, config=tiny_config())
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)


def test_global_random_state_has_no_influence(pipeline: Any) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        assert_same_weights(pipeline, build_pipeline(config=tiny_config()))


def test_round_trip(pipeline: Any, folder: Path) -> None:
    loaded = quiet(DiffusionPipeline.from_pretrained(folder))
    assert type(loaded) is StableDiffusionXLPipeline
    assert_same_weights(pipeline, loaded)
    # The classes of the values change (tuples become lists), so compare what is stored.
    assert json.loads(pipeline.scheduler.to_json_string()) == json.loads(loaded.scheduler.to_json_string())
    assert np.array_equal(generate(pipeline), generate(loaded))


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2"])
def test_tokenizers_survive_saving(pipeline: Any, folder: Path, name: str) -> None:
    built, loaded = getattr(pipeline, name), getattr(DiffusionPipeline.from_pretrained(folder), name)
    assert built.model_max_length == loaded.model_max_length == 77
    assert built.pad_token == loaded.pad_token == {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"}[name]
    for prompt in PROMPTS:
        arguments = {"padding": "max_length", "max_length": 77, "truncation": True}
        ids = built(prompt, **arguments).input_ids
        assert ids == loaded(prompt, **arguments).input_ids
        assert len(ids) == 77
        assert ids[0] == built.bos_token_id
        assert max(ids) < pipeline.text_encoder.config.vocab_size


def test_image_is_textured_and_depends_on_the_prompt(pipeline: Any) -> None:
    image = generate(pipeline)
    assert image.shape == (128, 192, 3)
    assert np.isfinite(image).all()
    assert image.std() > 0.05
    assert np.mean((image == 0) | (image == 1)) < 0.1
    assert np.abs(image - generate(pipeline, "the blue square")).max() > 1e-3


def test_guidance_has_an_effect(pipeline: Any) -> None:
    arguments: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "latent"}
    unguided, guided = (
        pipeline("a", guidance_scale=w, generator=torch.Generator().manual_seed(0), **arguments).images
        for w in (1.0, 7.5)
    )
    assert (guided - unguided).abs().max() > 1e-3


def test_default_layout_is_sdxl() -> None:
    unet = build_pipeline().unet
    depths = [
        [len(attention.transformer_blocks) for attention in getattr(block, "attentions", [])]
        for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks)
    ]
    assert depths == [[], [2, 2], [10, 10], [10], [10, 10, 10], [2, 2, 2], []]
    attention = unet.down_blocks[2].attentions[0].transformer_blocks[0].attn1
    assert attention.inner_dim // attention.heads == DemoModelConfig().head_width
    assert unet.config.addition_embed_type == "text_time"
    assert not unet.training


def test_save_model_reuses_a_complete_folder(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert save_model(folder, config=tiny_config()) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_save_model_refuses_another_recipe(folder: Path) -> None:
    with pytest.raises(ValueError, match="choose another directory"):
        save_model(folder, seed=1, config=tiny_config())


def test_save_model_keeps_trained_weights(tmp_path: Path) -> None:
    """A pipeline folder that was not written by `save_model` is used as it is, whatever the seed."""
    build_pipeline(7, config=tiny_config()).save_pretrained(tmp_path / "trained")
    weights = (tmp_path / "trained/unet/diffusion_pytorch_model.safetensors").read_bytes()
    assert save_model(tmp_path / "trained") == tmp_path / "trained"
    assert (tmp_path / "trained/unet/diffusion_pytorch_model.safetensors").read_bytes() == weights


def test_save_model_refuses_a_folder_of_other_things(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("keep me")
    with pytest.raises(FileExistsError, match="something else"):
        save_model(tmp_path, config=tiny_config())
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_save_model_accepts_an_empty_folder_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    save_model(str(tmp_path / "model"), config=tiny_config())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, directory: Path) -> None:
        Path(directory).mkdir()
        raise OSError("no space left")

    monkeypatch.setattr(StableDiffusionXLPipeline, "save_pretrained", fail)
    with pytest.raises(OSError, match="no space left"):
        save_model(tmp_path / "model", config=tiny_config())
    assert list(tmp_path.iterdir()) == []


def test_a_lost_race_reuses_the_winner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another writer finishes between our check and our rename."""
    save_pretrained = StableDiffusionXLPipeline.save_pretrained
    raced: list[bool] = []

    def save_after_the_other(self: Any, directory: Path) -> None:
        if not raced:
            raced.append(True)
            save_model(tmp_path / "model", config=tiny_config())
        save_pretrained(self, directory)

    monkeypatch.setattr(StableDiffusionXLPipeline, "save_pretrained", save_after_the_other)
    assert save_model(tmp_path / "model", config=tiny_config()) == tmp_path / "model"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_out_channels": (16, 16)}, "tuple of 3 integers"),
        ({"block_out_channels": (16, 16, 20)}, "multiples of head_width"),
        ({"norm_groups": 3}, "multiples of norm_groups"),
        ({"vae_channels": (8, 8, 8, 9)}, "multiples of vae_norm_groups"),
        ({"transformer_layers": (1, 0, 1)}, "positive integers"),
        ({"sample_size": 16.0}, "positive integers"),
        ({"time_ids_width": 7}, "even"),
    ],
)
def test_bad_configurations_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DemoModelConfig(**changes)
