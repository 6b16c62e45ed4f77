"""What goes wrong with onediff and nexfort as they are, and does not here."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import accel_hidiff as ah
from accel_hidiff.availability.onediff import try_compiler
from tests import models
from tests.compiled.conftest import relative_difference
from tests.onediff.conftest import SIZES, Pair

SIZE = SIZES[1]


def doubled_in_place(unet: Any) -> None:
    with torch.no_grad():
        for weight in unet.parameters():
            weight.mul_(1.01)


def loaded_state(unet: Any) -> None:
    unet.load_state_dict({name: weight * 1.01 for name, weight in unet.state_dict().items()})


def new_parameters(unet: Any) -> None:
    for module in unet.modules():
        for name, weight in list(module._parameters.items()):
            if weight is not None:
                module._parameters[name] = nn.Parameter(weight.detach() * 1.01)


def new_data(unet: Any) -> None:
    for weight in unet.parameters():
        weight.data = weight.data * 1.01


@pytest.fixture
def restored(sdxl: Pair) -> Iterator[Pair]:
    """The pair, with its weights put back afterwards."""
    kept = {name: weight.clone() for name, weight in sdxl.eager.unet.state_dict().items()}
    yield sdxl
    for pipe in (sdxl.served, sdxl.eager):
        pipe.unet.load_state_dict(kept)


class TestWeights:
    """A program takes weights as inputs: no change of them is missed, and none compiles anything."""

    @pytest.mark.parametrize("change", [doubled_in_place, loaded_state, new_parameters, new_data])
    def test_a_change_is_followed(self, restored: Pair, change: Callable[[Any], None], nothing_compiled: None) -> None:
        before, _ = restored.images(*SIZE)
        for pipe in (restored.served, restored.eager):
            change(pipe.unet)
        with restored.handle.stats.expect(compiles=0, eager_calls=0):
            got, want = restored.images(*SIZE)
        assert relative_difference(got, want) < 5e-3 < relative_difference(before, want)

    @pytest.mark.parametrize(
        "config",
        [
            ah.OneDiffConfig(mode="jit:freezing"),
            ah.OneDiffConfig(options={"jit.freezing": True, "common.freezing": True}),
        ],
        ids=["mode", "options"],
    )
    def test_freezing_finds_nothing_to_freeze(self, config: ah.OneDiffConfig, few_regions: None) -> None:
        served, eager = models.build("sdxl", "text2img"), models.build("sdxl", "text2img")
        handle = ah.accelerate(served, hidiffusion=ah.HiDiffusionConfig(), backend=config, on_miss="error")
        handle.load([SIZE], 2, batch_sizes=[2])
        ah.apply_hidiffusion(eager)
        for pipe in (served, eager):
            doubled_in_place(pipe.unet)
        asked = {"num_inference_steps": 2}
        got, want = (pipe(**models.arguments("sdxl", "text2img", *SIZE, **asked)).images for pipe in (served, eager))
        assert relative_difference(got, want) < 5e-3


class TestNothingCompilesInARequest:
    """Dynamo guards on all of these, and would compile again."""

    def test_threads(self, sdxl: Pair, nothing_compiled: None) -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(before + 1)
        try:
            self.same(sdxl)
        finally:
            torch.set_num_threads(before)

    def test_deterministic_algorithms(self, sdxl: Pair, nothing_compiled: None) -> None:
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            self.same(sdxl)
        finally:
            torch.use_deterministic_algorithms(False)

    def test_inference_mode(self, sdxl: Pair, nothing_compiled: None) -> None:
        with torch.inference_mode():
            self.same(sdxl)

    def test_another_thread(self, sdxl: Pair, nothing_compiled: None) -> None:
        problems: list[BaseException] = []

        def run() -> None:
            try:
                self.same(sdxl)
            except BaseException as problem:
                problems.append(problem)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert not problems

    def same(self, pair: Pair) -> None:
        with pair.handle.stats.expect(compiles=0, eager_calls=0):
            got, want = pair.images(*SIZE)
        assert relative_difference(got, want) < 5e-3


class TestMoves:
    def test_another_dtype_is_another_graph(self, few_regions: None) -> None:
        """A program of float32 is not fed with bfloat16; back in float32, what was compiled serves again."""
        pipe = models.build("sdxl", "text2img")
        handle = ah.accelerate(pipe, hidiffusion=ah.HiDiffusionConfig(), backend="onediff", on_miss="error")
        handle.load([SIZE], 2, batch_sizes=[2])
        asked = {"num_inference_steps": 2}
        want = pipe(**models.arguments("sdxl", "text2img", *SIZE, **asked)).images
        for part in (pipe.unet, pipe.text_encoder, pipe.text_encoder_2):
            part.to(torch.bfloat16)
        with pytest.raises(ah.GraphMiss, match="not compiled in this process"):
            pipe(**models.arguments("sdxl", "text2img", *SIZE, **asked))
        for part in (pipe.unet, pipe.text_encoder, pipe.text_encoder_2):
            part.to(torch.float32)
        with handle.stats.expect(compiles=0, eager_calls=0):
            pipe(**models.arguments("sdxl", "text2img", *SIZE, **asked))
        assert want.dtype == torch.float32

    def test_memory_format(self, few_regions: None) -> None:
        pipe = models.build("sdxl", "text2img")
        eager = models.build("sdxl", "text2img")
        strides = {name: weight.stride() for name, weight in pipe.unet.named_parameters()}
        config = ah.OneDiffConfig(memory_format="channels_last")
        handle = ah.accelerate(pipe, hidiffusion=ah.HiDiffusionConfig(), backend=config)
        convolution = pipe.unet.mid_block.resnets[0].conv1.weight
        assert convolution.is_contiguous(memory_format=torch.channels_last)
        ah.apply_hidiffusion(eager)
        asked = {"num_inference_steps": 2}
        got, want = (pipe(**models.arguments("sdxl", "text2img", *SIZE, **asked)).images for pipe in (pipe, eager))
        assert relative_difference(got, want) < 5e-3
        handle.remove()
        assert {name: weight.stride() for name, weight in pipe.unet.named_parameters()} == strides
        assert pipe.unet.mid_block.resnets[0].conv1.weight is convolution


class TestSealed:
    """Nothing is compiled any more: not for a request, and not by `load` either."""

    def test_what_was_loaded_is_served_and_nothing_else(self, few_regions: None, nothing_after: Any) -> None:
        pipe = models.build("sdxl", "text2img")
        handle = ah.accelerate(pipe, hidiffusion=ah.HiDiffusionConfig(), backend="onediff", on_miss="error")
        with pytest.raises(ah.GraphMiss, match=r"compiles at start; to fill the gap: handle\.load"):
            pipe(**models.arguments("sdxl", "text2img", *SIZE, num_inference_steps=2))
        handle.load([SIZE], 2, batch_sizes=[2])
        handle.seal()
        nothing_after()
        with handle.stats.expect(compiles=0, eager_calls=0):
            pipe(**models.arguments("sdxl", "text2img", *SIZE, num_inference_steps=2))
        with pytest.raises(ah.GraphMiss, match="not compiled in this process"):
            handle.load([SIZES[0]], 2, batch_sizes=[2])
        handle.remove()


@pytest.fixture
def nothing_after() -> Iterator[Callable[[], None]]:
    """To be called at a point after which Dynamo must not compile anything in this test."""
    from torch._dynamo.utils import counters

    seen: list[int] = []
    yield lambda: seen.append(counters["stats"]["unique_graphs"])
    assert seen == [counters["stats"]["unique_graphs"]]


class TestProcess:
    """What the backend does to the process that it works in."""

    def test_environment_variables_stay(self, few_regions: None) -> None:
        before = dict(os.environ)
        pipe = models.build("sdxl", "text2img")
        handle = ah.accelerate(pipe, hidiffusion=ah.HiDiffusionConfig(), backend="onediff")
        handle.load([SIZE], 2, batch_sizes=[2])
        assert dict(os.environ) == before

    def test_diffusers_comes_before_onediff_and_oneflow_not_at_all(self, tmp_path: Path) -> None:
        """There is a oneflow here, and importing it ends the process."""
        (tmp_path / "oneflow.py").write_text("import os\nos._exit(9)\n")
        script = (
            "import sys, accel_hidiff.backends as b\n"
            "from accel_hidiff.config import OneDiffConfig\n"
            "b.create_backend('onediff')\n"
            "import onediff.infer_compiler\n"
            "names = list(sys.modules)\n"
            "assert names.index('diffusers') < names.index('onediff'), 'order'\n"
            "assert not any(name.split('.')[0] == 'oneflow' for name in names), 'oneflow'\n"
        )
        path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
        subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "PYTHONPATH": path})

    def test_a_switched_off_compiler_is_told(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """Whoever switches Dynamo off gets eager from onediff, without a word."""
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
        found = try_compiler("nexfort")
        assert not found.usable and "ran the module eager" in found.reason

    def test_a_compiler_that_is_switched_off_later_is_told(
        self, few_regions: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pipe = models.build("sdxl", "text2img")
        handle = ah.accelerate(pipe, hidiffusion=ah.HiDiffusionConfig(), backend="onediff")
        monkeypatch.setattr(torch._dynamo.config, "disable", True)
        with pytest.raises(ah.CompileFailed, match="to compile one graph, it compiled 0"):
            handle.load([SIZE], 2, batch_sizes=[2])

    def test_background_compilation_is_refused(self) -> None:
        pipe = models.build("sdxl", "text2img")
        with pytest.raises(ah.BadInput, match='got "background"'):
            ah.accelerate(pipe, backend="onediff", on_miss="background")

    def test_an_unknown_option_is_told_before_anything_is_patched(self) -> None:
        pipe = models.build("sdxl", "text2img")
        config = ah.OneDiffConfig(compiler="nexfort", options={"nonsense": 1})
        with pytest.raises(ah.BadInput, match="Unexpected optimization option nonsense"):
            ah.accelerate(pipe, backend=config)
        assert "forward" not in vars(pipe.unet)

    def test_oneflow_is_not_there(self) -> None:
        with pytest.raises(ah.BadInput, match="onediff/oneflow: unavailable: oneflow is not installed"):
            ah.accelerate(models.build("sdxl", "text2img"), backend=ah.OneDiffConfig(compiler="oneflow"))
