"""A compiled decoder in tiles: one symbolic artifact serves whole images and tiles, in bfloat16 too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import accel_hidiff as ah
from accel_hidiff.config import DecodeConfig
from tests import models, needs

pytestmark = [pytest.mark.slow, needs.needs_aot]


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_one_artifact_serves_tiles_of_any_size(tmp_path: Path, dtype: str | None) -> None:
    """Compiled is eager within rounding: in bfloat16 both round, and neither is further from float32 than the other."""
    latents = torch.randn(1, 4, 27, 16, generator=torch.Generator().manual_seed(0))
    for config in (DecodeConfig(dtype=dtype), DecodeConfig(tiles="always", tile=96, overlap=16, dtype=dtype)):
        exact = _decoded(latents, config.replace(dtype=None), tmp_path, "eager")
        eager = _decoded(latents, config, tmp_path, "eager")
        compiled = _decoded(latents, config, tmp_path, "aot")
        if dtype is None:
            assert float((compiled - eager).abs().max()) < 1e-5
        else:
            errors = [float((image - exact).norm() / exact.norm()) for image in (compiled, eager)]
            assert 0 < errors[0] < 1.5 * errors[1] < 0.05, errors


def _decoded(latents: torch.Tensor, config: DecodeConfig, cache: Path, backend: str) -> torch.Tensor:
    pipe = models.build("sdxl", "text2img")
    handle = ah.accelerate(pipe, cache=cache, backend=backend, on_miss="compile", decode=config)
    with torch.no_grad():
        image: torch.Tensor = pipe.vae.decode(latents).sample
    if backend == "aot":
        assert not handle.stats.rejected and handle.stats.hits > 0 and handle.stats.eager_calls == 0
        missing = handle.missing(handle.needed([(216, 128)]))
        assert not [reason for reason in missing.values() if reason.startswith("vae.decoder")]
    handle.remove()
    return image
