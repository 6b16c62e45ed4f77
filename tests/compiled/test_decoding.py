"""A compiled decoder in tiles: one symbolic artifact serves whole images and tiles, in bfloat16 too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import accel_hidiff as ah
from accel_hidiff.config import DecodeConfig
from tests import models, needs

pytestmark = [pytest.mark.slow, needs.needs_aot]


@pytest.mark.parametrize(("dtype", "limit"), [(None, 1e-5), ("bfloat16", 0.05)])
def test_one_artifact_serves_tiles_of_any_size(tmp_path: Path, dtype: str | None, limit: float) -> None:
    latents = torch.randn(1, 4, 27, 16, generator=torch.Generator().manual_seed(0))
    for config in (DecodeConfig(dtype=dtype), DecodeConfig(tiles="always", tile=96, overlap=16, dtype=dtype)):
        images = []
        for backend in ("eager", "aot"):
            pipe = models.build("sdxl", "text2img")
            handle = ah.accelerate(pipe, cache=tmp_path, backend=backend, on_miss="compile", decode=config)
            with torch.no_grad():
                images.append(pipe.vae.decode(latents).sample)
            if backend == "aot":
                assert not handle.stats.rejected and handle.stats.hits > 0 and handle.stats.eager_calls == 0
                missing = handle.missing(handle.needed([(216, 128)]))
                assert not [reason for reason in missing.values() if reason.startswith("vae.decoder")]
            handle.remove()
        assert float((images[0] - images[1]).abs().max()) < limit
