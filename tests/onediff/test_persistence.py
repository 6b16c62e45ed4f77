"""What nexfort leaves in files is kept under the graph's key; mode "jit" leaves nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = """
import json, sys, time
import torch
from torch._dynamo.utils import counters
import accel_hidiff as ah
from accel_hidiff import served
from tests import models
from tests.compiled.conftest import relative_difference

torch.set_num_threads(1)
mode, cache, policy, deterministic = sys.argv[1:]
torch.use_deterministic_algorithms(deterministic == "True", warn_only=True)
two = "down_blocks.1.attentions.0", "mid_block.resnets.0"
served.find_blocks = lambda unet: [(path, unet.get_submodule(path)) for path in two]
pipe, eager = models.build("sdxl", "text2img"), models.build("sdxl", "text2img")
config = ah.HiDiffusionConfig()
handle = ah.accelerate(pipe, hidiffusion=config, backend=ah.OneDiffConfig(mode=mode), cache=cache, on_miss=policy)
state = handle.explain(128, 192, 1).rows[0].state
ah.apply_hidiffusion(eager, config=config)
start = time.perf_counter()
try:
    handle._dispatcher.load(handle._graphs.unet(handle.patch.plan(128, 192, 1).at(0), 128, 192, 2))
except ah.GraphMiss as missing:
    print(json.dumps({"state": state, "missing": str(missing)}))
    raise SystemExit
got = pipe(**models.arguments("sdxl", "text2img", 128, 192, num_inference_steps=1)).images
seconds = time.perf_counter() - start
want = eager(**models.arguments("sdxl", "text2img", 128, 192, num_inference_steps=1)).images
found = {name: counters["inductor"][f"fxgraph_cache_{name}"] for name in ("hit", "miss", "bypass")}
error = relative_difference(got, want)
print(json.dumps({"state": state, "compiles": handle.stats.compiles, "seconds": seconds, "error": error, **found}))
"""


def run(mode: str, cache: Path, policy: str, deterministic: bool = False, **environment: str) -> dict[str, Any]:
    """A process of its own that serves one request; what it found."""
    command = [sys.executable, "-c", SCRIPT, mode, str(cache), policy, str(deterministic)]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False, cwd=Path.cwd()
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_a_mode_that_uses_inductor_compiles_in_one_process_only(tmp_path: Path) -> None:
    """The second process compiles nothing by policy, and has another folder of Inductor's own."""
    cache = tmp_path / "cache"
    first = run("O2", cache, "compile", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "first"))
    assert first["state"].startswith("missing") and first["compiles"] == 2 and first["error"] < 5e-3
    second = run("O2", cache, "error", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "second"))
    assert second["state"] == "cached" and second["compiles"] == 0 and second["error"] < 5e-3
    assert (second["hit"], second["miss"], second["bypass"]) == (2, 0, 0)
    assert second["seconds"] < first["seconds"]
    other = run("O2", cache, "error", deterministic=True, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "third"))
    assert other["state"] == "missing 2 of 2 artifacts" and "differs in settings.deterministic" in other["missing"]
    options = {"TORCHINDUCTOR_PERMUTE_FUSION": "1", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "fourth")}
    assert run("O2", cache, "error", **options)["state"] == "missing 2 of 2 artifacts"


def test_a_compiling_process_takes_the_settings_over(tmp_path: Path, few_regions: None, no_programs: None) -> None:
    """As `precompile(jobs=1)` and background compilation do: a process without weights compiles, this one loads."""
    import accel_hidiff as ah
    from accel_hidiff.compiling.needed import Needed, compile_needed
    from accel_hidiff.compiling.pool import CompilePool
    from tests import models

    pipe = models.build("sdxl", "text2img")
    options: dict[str, Any] = {"backend": ah.OneDiffConfig(mode="cache-all"), "cache": tmp_path, "on_miss": "error"}
    handle = ah.accelerate(pipe, hidiffusion=ah.HiDiffusionConfig(), **options)
    binder = handle._dispatcher.binder
    graphs = handle._graphs.unet(handle.patch.plan(128, 192, 1).at(0), 128, 192, 2)
    with CompilePool(1) as pool:
        report = compile_needed(binder, Needed.of(binder, [graphs]), None, pool, handle.blueprint)
    assert report.compiled == 2
    with handle.stats.expect(compiles=0, bindings=2, eager_calls=0):
        pipe(**models.arguments("sdxl", "text2img", 128, 192, num_inference_steps=1))


def test_jit_leaves_nothing_that_could_be_kept(tmp_path: Path) -> None:
    files = tmp_path / "inductor"
    found = run("jit", tmp_path / "cache", "compile", TORCHINDUCTOR_CACHE_DIR=str(files))
    assert found["state"] == "compiles at start" and found["compiles"] == 2
    assert not [path for path in files.rglob("*") if path.is_file()]
    assert not list((tmp_path / "cache").rglob("*.so"))


@pytest.mark.parametrize("mode", ["O3", "max-autotune:cache-all"])
def test_other_modes_have_their_parts(mode: str) -> None:
    """The wheel has the modules that they import beside the package; they are found there."""
    from accel_hidiff.availability.onediff import try_compiler

    assert try_compiler("nexfort", mode).usable
