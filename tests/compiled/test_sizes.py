"""The sizes that people ask for, at their real latent sizes and tiny widths: compiled equals patched eager."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import accel_hidiff as ah
from tests import models
from tests.compiled.conftest import accelerate_strict, relative_difference, unet_inputs

pytestmark = pytest.mark.slow
STEPS = 30
PER_CALL = 1e-3
SDXL = ["2048x2048", "2688x1536", "1536x2688", "2432x1664", "3072x2048", "4096x2048", "4096x4096"]
SD15 = ["1024x1024", "1536x640", "2048x2048"]


@pytest.mark.parametrize(("family", "size"), [*(("sdxl", size) for size in SDXL), *(("sd15", size) for size in SD15)])
def test_every_topology_of_a_size_equals_patched_eager(family: str, size: str, families_cache: Path) -> None:
    """One UNet call in the first step of each phase. Everything is served by the graphs of small sizes."""
    width, height = map(int, size.split("x"))
    small = (256, 320)
    handle = ah.accelerate(models.build(family, "text2img"), hidiffusion=ah.HiDiffusionConfig(), cache=families_cache)
    handle.precompile([small], STEPS)
    handle.remove()
    handle = accelerate_strict(models.build(family, "text2img"), families_cache)
    eager = ah.apply_hidiffusion(models.build(family, "text2img").unet)
    inputs: dict[str, Any] = unet_inputs(eager.unet, height, width, 1)
    plan = handle.patch.plan(height, width, STEPS)
    assert len(plan.topologies) == (3 if family == "sdxl" or size == "2048x2048" else 2)
    with torch.no_grad(), handle.stats.expect(compiles=0, eager_calls=0, hits=len(list(plan))):
        for phase in plan:
            with handle.patch.phase(step=phase.start, num_steps=STEPS):
                got = handle.pipe.unet(**inputs).sample
            with eager.phase(step=phase.start, num_steps=STEPS):
                want = eager.unet(**inputs).sample
            assert relative_difference(got, want) < PER_CALL, phase
