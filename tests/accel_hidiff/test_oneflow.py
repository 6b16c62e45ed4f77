"""The oneflow half of backend "onediff", over stand-ins for both packages: keys, files, processes, errors.

No build of oneflow that fits onediff can be installed (docs/onediff.md), so oneflow itself is not run here. The
stand-in behaves as onediff 1.2.0's source does in what this backend relies on: a graph belongs to one deployable module
and one set of shapes, is built at the first call, saved and loaded by path, and options become environment variables.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import accel_hidiff as ah
from accel_hidiff.backends import create_backend, oneflow
from tests import models, needs
from tests.accel_hidiff.conftest import Install
from tests.compiled.conftest import relative_difference

SIZES = [(128, 128), (128, 192)]
STEPS = 2  # one topology
ONEFLOW = {
    "oneflow/__init__.py": """
class nn:
    class Graph:
        with_dynamic_input_shape = runtime_state_dict = load_runtime_state_dict = None
""",
    "oneflow/framework/__init__.py": "",
    "oneflow/framework/args_tree.py": "ArgsTree = None",
    "oneflow/mock_torch/__init__.py": "enable = None",
    "oneflow/mock_torch/mock_importer.py": "",
    "oneflow/utils/__init__.py": "",
    "oneflow/utils/tensor.py": "to_torch = None",
}
ONEDIFF = {
    "onediff/__init__.py": "",
    "onediff/infer_compiler/backends/__init__.py": "",
    "onediff/infer_compiler/backends/env_var.py": """
import os

def set_oneflow_default_env_vars():
    os.environ.setdefault("ONEFLOW_RUN_GRAPH_BY_VM", "1")
    os.environ.setdefault("ONEFLOW_MLIR_CSE", "1")

def set_oneflow_env_vars(options):
    if options.mlir_cse is not None:
        os.environ["ONEFLOW_MLIR_CSE"] = str(int(options.mlir_cse))
""",
    "onediff/infer_compiler/__init__.py": """
import json, os
from .backends.env_var import set_oneflow_default_env_vars, set_oneflow_env_vars

class OneflowCompileOptions:
    def __init__(self, dynamic=True, max_cached_graph_size=9, graph_file=None, mlir_cse=None):
        self.dynamic, self.size, self.file, self.mlir_cse = dynamic, max_cached_graph_size, graph_file, mlir_cse

class Deployable:
    made, built, fault = [], 0, ""

    def __init__(self, module, options):
        assert not options.dynamic and options.file is None
        self.module, self.shapes = module, None
        Deployable.made.append(self)

    def __call__(self, *tensors):
        shapes = [list(tensor.shape) for tensor in tensors]
        if self.shapes is None:
            Deployable.built += 1
            self.shapes = shapes
        if shapes != self.shapes:
            raise RuntimeError(f"a graph of {self.shapes} got {shapes}")
        return self.module(*tensors)

    def save_graph(self, path):
        if Deployable.fault == "raises":
            raise OSError("disk full")
        if Deployable.fault != "logs":
            with open(path, "w") as file:
                json.dump(self.shapes, file)

    def load_graph(self, path, device=None, run_warmup=True):
        if Deployable.fault == "load":
            raise RuntimeError("no such operator")
        with open(path) as file:
            self.shapes = json.load(file)

def compile(module, *, backend, options):
    assert backend == "oneflow"
    set_oneflow_default_env_vars()
    set_oneflow_env_vars(options)
    return Deployable(module, options)
""",
}


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages are the same in every test, and tried once."""
    return tmp_path_factory.mktemp("memory")


@pytest.fixture
def deployable(install: Install, monkeypatch: pytest.MonkeyPatch, memory: Path) -> Iterator[Any]:
    """The stand-in's class, with both packages in place."""
    needs.no_onediff()
    monkeypatch.setenv("XDG_CACHE_HOME", str(memory))
    monkeypatch.setattr(oneflow, "_claimed", None)
    install("oneflow", "9.9", ONEFLOW)
    install("onediff", "1.2.0", ONEDIFF)
    variables = {name: value for name, value in os.environ.items() if name.startswith("ONEFLOW_")}
    import onediff.infer_compiler

    yield onediff.infer_compiler.Deployable
    for name in [name for name in sys.modules if name.split(".")[0] in ("onediff", "oneflow")]:
        del sys.modules[name]
    for name in [name for name in os.environ if name.startswith("ONEFLOW_") and name not in variables]:
        del os.environ[name]


def accelerate(cache: Path, on_miss: str = "compile", task: str = "text2img", **fields: Any) -> ah.Handle:
    config = ah.OneDiffConfig(compiler="oneflow", **fields)
    pipe = models.build("sdxl", task)
    return ah.accelerate(pipe, hidiffusion=ah.HiDiffusionConfig(), backend=config, cache=cache, on_miss=on_miss)


def latents(pipe: Any, size: tuple[int, int]) -> torch.Tensor:
    out: torch.Tensor = pipe(**models.arguments("sdxl", "text2img", *size, num_inference_steps=STEPS)).images
    return out


def fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a process that has not used oneflow yet."""
    monkeypatch.setattr(oneflow, "_claimed", None)
    for name in [name for name in os.environ if name.startswith("ONEFLOW_")]:
        monkeypatch.delenv(name)


def test_graphs_are_saved_under_our_keys_and_loaded_by_the_next_process(
    deployable: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = accelerate(tmp_path / "cache")
    report = first.precompile(SIZES, STEPS, batch_sizes=[2])
    assert report.compiled == deployable.built == report.artifacts > 2
    first.remove()
    deployable.built = 0
    fresh_process(monkeypatch)
    second = accelerate(tmp_path / "cache", "error")
    assert {row.state for row in second.explain(*SIZES[0], STEPS).rows} == {"cached"}
    eager = models.build("sdxl", "text2img")
    ah.apply_hidiffusion(eager)
    for size in (*SIZES, SIZES[0]):
        with second.stats.expect(compiles=0, eager_calls=0):
            got = latents(second.pipe, size)
        assert relative_difference(got, latents(eager, size)) < 5e-3
    assert deployable.built == 0, "every graph was loaded, none is built in a request"
    with pytest.raises(ah.GraphMiss, match=r"the nearest entry .* differs in bucket"):
        latents(second.pipe, (192, 192))


def test_each_region_has_an_object_of_its_own(deployable: Any, tmp_path: Path) -> None:
    """onediff's own cache would keep nine graphs in one object, and recompile the tenth."""
    handle = accelerate(tmp_path / "cache")
    deployable.made.clear()
    handle.load(SIZES[:1], STEPS, batch_sizes=[2])
    bound = [one for one in deployable.made if one.shapes is not None]
    assert len(bound) >= 29


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("raises", "oneflow failed: OSError: disk full"),
        ("logs", "expected oneflow to save its graph, it wrote no file"),
    ],
)
def test_a_graph_that_is_not_saved_is_not_kept(deployable: Any, tmp_path: Path, fault: str, message: str) -> None:
    deployable.fault = fault
    handle = accelerate(tmp_path / "cache")
    with pytest.raises(ah.CompileFailed, match=message):
        handle.precompile(SIZES[:1], STEPS, batch_sizes=[2])
    assert handle.cache is not None and not list(handle.cache.entries())


def test_a_graph_that_does_not_load_runs_eager_and_says_why(deployable: Any, tmp_path: Path) -> None:
    handle = accelerate(tmp_path / "cache")
    handle.precompile(SIZES[:1], STEPS, batch_sizes=[2])
    deployable.fault = "load"
    latents(handle.pipe, SIZES[0])
    assert handle.stats.eager_calls == STEPS
    assert any(
        "oneflow's graph does not load: RuntimeError: no such operator" in text for text in handle.stats.rejected
    )


def test_a_moved_model_is_another_graph(deployable: Any, tmp_path: Path) -> None:
    """onediff's module raises where it is moved after it was built; here another dtype has another key."""
    handle = accelerate(tmp_path / "cache")
    handle.precompile(SIZES[:1], STEPS, batch_sizes=[2])
    before = {row.key for row in handle.explain(*SIZES[0], STEPS).rows}
    handle.pipe.unet.to(torch.float64)
    rows = handle.explain(*SIZES[0], STEPS).rows
    assert rows[0].state.startswith("missing") and rows[0].key not in before


@pytest.mark.slow
def test_options_are_the_whole_processs(deployable: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def key(**fields: Any) -> str:
        handle = accelerate(tmp_path / "cache", **fields)
        found = handle.explain(*SIZES[0], STEPS).rows[0].key
        handle.remove()
        return found

    plain = key()
    with pytest.raises(ah.BadInput, match=r"which this process uses with oneflow already, got \{'mlir_cse': False\}"):
        key(options={"mlir_cse": False})
    assert key() == plain
    fresh_process(monkeypatch)
    assert key(options={"mlir_cse": False}) != plain
    fresh_process(monkeypatch)
    monkeypatch.setenv("ONEFLOW_RUN_GRAPH_BY_VM", "0")
    assert key() != plain


def test_it_needs_a_cache(deployable: Any) -> None:
    with pytest.raises(ah.BadInput, match="expected a CompileCache or a directory for backend 'onediff', got None"):
        ah.accelerate(models.build("sdxl", "text2img"), backend=ah.OneDiffConfig(compiler="oneflow"))


def test_the_compiler_that_works_is_chosen(deployable: Any) -> None:
    assert isinstance(create_backend("onediff"), oneflow.OneflowBackend)
