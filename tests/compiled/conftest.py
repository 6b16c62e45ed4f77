"""Fixtures of the compiled half; the tiny model and its cache are in `tests/conftest.py`."""

from __future__ import annotations

import shutil
from collections import defaultdict, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import accel_hidiff as ah
from accel_hidiff.backends import aot_package
from compile_cache import CompileCache
from tests import models
from tests.conftest import SIZES, STEPS

__all__ = ["CONFIG", "SIZES", "STEPS"]

CONFIG = ah.HiDiffusionConfig()


@pytest.fixture(scope="session")
def families_cache(cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache for all families, which grows: their tiny blocks are alike, so that few need a compilation."""
    return Path(shutil.copytree(cache_dir, tmp_path_factory.mktemp("families") / "cache"))


@pytest.fixture
def strict(make_pipe: Any, cache_dir: Path) -> Iterator[Any]:
    """A handle that serves from the session's cache and refuses everything else."""
    handle = accelerate_strict(make_pipe(), cache_dir)
    yield handle
    handle.remove()


@pytest.fixture
def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No program of an earlier test is used again: what is bound is loaded from the cache."""
    monkeypatch.setattr(aot_package, "_idle", defaultdict(deque))


@pytest.fixture
def twins(cache_dir: Path) -> tuple[Any, Any]:
    """(handle under `on_miss="eager"`, patched eager pipeline) of the same weights."""
    served, eager = models.build("sdxl", "text2img"), models.build("sdxl", "text2img")
    cache = CompileCache(cache_dir, read_only=True)
    handle = ah.accelerate(served, hidiffusion=CONFIG, cache=cache, on_miss="eager")
    ah.apply_hidiffusion(eager, config=CONFIG)
    return handle, eager


def accelerate_strict(pipe: Any, cache: Path) -> Any:
    config = ah.HiDiffusionConfig()
    return ah.accelerate(pipe, hidiffusion=config, cache=CompileCache(cache), on_miss="error")


def request(pipe: Any, height: int = 128, width: int = 192, **kwargs: Any) -> torch.Tensor:
    """One request of seed 0; latents unless `output_type` says otherwise."""
    options = {"num_inference_steps": STEPS, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    return pipe("a red circle", height=height, width=width, **{**options, **kwargs}).images


def image(pipe: Any, **changes: Any) -> torch.Tensor:
    """The image of one request of seed 0, float32."""
    return torch.as_tensor(request(pipe, output_type="pt", **changes)).float()


def unet_inputs(unet: Any, height: int, width: int, batch: int) -> dict[str, Any]:
    """Random inputs of one UNet call; sizes in pixels."""
    generator = torch.Generator().manual_seed(height * 1000 + width + batch)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    config = unet.config
    inputs = {
        "sample": randn(batch, 4, height // 8, width // 8),
        "timestep": torch.tensor(321.0),
        "encoder_hidden_states": randn(batch, 77, config.cross_attention_dim),
    }
    if config.addition_embed_type == "text_time":
        text_embeds = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": randn(batch, text_embeds), "time_ids": randn(batch, 6)}
    return inputs


def relative_difference(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()
