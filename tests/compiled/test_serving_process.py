"""A new process serves from the cache, without a compiler on its PATH and by torch's own counters without compiling."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import accel_hidiff as ah
from tests.compiled.conftest import SIZES, STEPS, relative_difference, request

_SERVE = """
import json, sys
import torch
from torch import _dynamo  # its counters count every graph that torch compiles
from torch._dynamo.utils import counters

def forbidden(*args, **kwargs):
    raise AssertionError("the serving process compiles or traces")

torch.compile = torch.export.export = torch._inductor.aoti_compile_and_package = forbidden

import accel_hidiff as ah
from accel_hidiff.models import load_pipeline
from compile_cache import CompileCache

model, cache, out, sizes, steps = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4]), int(sys.argv[5])
pipe = load_pipeline(model)
pipe.set_progress_bar_config(disable=True)
handle = ah.accelerate(pipe, hidiffusion=ah.HiDiffusionConfig(), cache=CompileCache(cache), on_miss="error")
images = {}
for height, width in sizes:
    for prompts in (["a red circle"], ["a red circle", "a blue square"]):
        for guidance_scale in (5.0, 0.0):
            options = {"guidance_scale": guidance_scale, "num_inference_steps": steps, "output_type": "np"}
            generator = torch.Generator().manual_seed(0)
            image = pipe(prompts, height=height, width=width, generator=generator, **options).images
            images[f"{height}x{width} {len(prompts)} {guidance_scale}"] = torch.from_numpy(image)
torch.save(images, out)
print(json.dumps({
    "counters": {name: dict(values) for name, values in counters.items() if values},
    "compiler": [name for name in ("torch._inductor.compile_fx", "torch._inductor.graph") if name in sys.modules],
    "stats": handle.stats.to_json(),
}))
"""


def test_zero_compilations_across_phases_sizes_batches_and_guidance(
    model_folder: Path, cache_dir: Path, make_pipe: Any, tmp_path: Path
) -> None:
    nothing = tmp_path / "no-tools"
    nothing.mkdir()
    home = tmp_path / "home"
    environment = {
        **os.environ,
        "PATH": str(nothing),  # no g++
        "HOME": str(home),
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
        "PYTHONPATH": str(Path(ah.__file__).parents[1]),
    }
    out = tmp_path / "images.pt"
    arguments = [str(model_folder), str(cache_dir), str(out), json.dumps(SIZES), str(STEPS)]
    command = [sys.executable, "-c", _SERVE, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["counters"] == {}
    assert report["compiler"] == []
    calls = len(SIZES) * 2 * 2
    assert report["stats"]["compiles"] == 0 and report["stats"]["eager_calls"] == 0
    assert report["stats"]["hits"] == calls * (STEPS + 1)
    assert not [path for path in tmp_path.glob("inductor/**/*") if path.is_file()], "Inductor wrote files"

    eager = make_pipe()
    ah.apply_hidiffusion(eager)
    images = torch.load(out)
    for height, width in SIZES:
        for guidance_scale in (5.0, 0.0):
            want = request(eager, height, width, guidance_scale=guidance_scale, output_type="np")
            got = images[f"{height}x{width} 1 {guidance_scale}"]
            assert relative_difference(got, torch.from_numpy(want)) < 5e-3
