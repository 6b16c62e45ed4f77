"""The other choices: whole-UNet regions, exact shapes, odd sizes, torch.compile. Each really compiles: slow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import accel_hidiff as ah
from accel_hidiff import backends
from tests import models, needs
from tests.compiled.conftest import STEPS, relative_difference, request, unet_inputs
from tests.needs import needs_aot

pytestmark = pytest.mark.slow
ONE_TOPOLOGY = 2  # steps: too few for a RAU-Net phase, so that one graph is enough


@pytest.fixture
def eager(make_pipe: Any) -> Any:
    pipe = make_pipe()
    ah.apply_hidiffusion(pipe)
    return pipe


@needs_aot
def test_a_whole_unet_region_equals_eager(make_pipe: Any, eager: Any, tmp_path: Path) -> None:
    """One size, exact: a symbolic whole UNet takes many times as long to compile."""
    config, cache = ah.HiDiffusionConfig(), tmp_path / "cache"
    handle = ah.accelerate(make_pipe(), hidiffusion=config, cache=cache, regions="whole", shapes="exact")
    got = request(handle.pipe, 128, 192, num_inference_steps=ONE_TOPOLOGY)
    want = request(eager, 128, 192, num_inference_steps=ONE_TOPOLOGY)
    assert relative_difference(got, want) < 5e-3
    assert handle.stats.compiles == 1 and handle.stats.hits == ONE_TOPOLOGY


@needs_aot
def test_a_whole_unet_of_the_sd15_layout_equals_eager(tmp_path: Path) -> None:
    """It has no added conditions."""
    pipe = models.build("sd15", "text2img")
    handle = ah.accelerate(
        pipe, hidiffusion=ah.HiDiffusionConfig(), cache=tmp_path / "cache", regions="whole", shapes="exact"
    )
    asked = {"num_inference_steps": 1, "height": 256, "width": 320}
    got = request(pipe, **asked)
    assert (handle.stats.compiles, handle.stats.hits, handle.stats.eager_calls) == (1, 1, 0)
    handle.remove()
    ah.apply_hidiffusion(pipe)
    assert relative_difference(got, request(pipe, **asked)) < 5e-3


@needs_aot
def test_a_whole_unet_takes_residuals_of_a_whole_controlnet(tmp_path: Path) -> None:
    """One step, in which the ControlNet runs. Its scale is a tensor: another one compiles nothing."""
    pipe = models.build("sdxl", "controlnet")
    handle = ah.accelerate(
        pipe, hidiffusion=ah.HiDiffusionConfig(), cache=tmp_path / "cache", regions="whole", shapes="exact"
    )
    handle.precompile([(128, 192)], 1, batch_sizes=[2])
    rows = handle.explain(128, 192, 1).rows
    assert [(row.steps, row.topology, row.state) for row in rows[:2]] == [
        ("[0, 1)", "windowed", "cached"),
        ("[0, 1)", "controlnet", "cached"),
    ]
    eager = models.build("sdxl", "controlnet")
    ah.apply_hidiffusion(eager)
    for scale in (1.0, 0.3):
        changes = {"num_inference_steps": 1, "controlnet_conditioning_scale": scale}
        with handle.stats.expect(compiles=0, eager_calls=0, hits=2):
            got = pipe(**models.arguments("sdxl", "controlnet", 128, 192, **changes)).images
        want = eager(**models.arguments("sdxl", "controlnet", 128, 192, **changes)).images
        assert relative_difference(got, want) < 5e-3


@needs_aot
def test_odd_feature_maps_take_exact_graphs(make_pipe: Any, eager: Any, own_cache: Path) -> None:
    """72 x 136 pixels: 9 x 17 latent cells, 5 x 9 in the windowed level. Only what is windowed compiles again."""
    handle = ah.accelerate(make_pipe(), hidiffusion=ah.HiDiffusionConfig(), cache=own_cache)
    got = request(handle.pipe, 72, 136, num_inference_steps=ONE_TOPOLOGY)
    assert relative_difference(got, request(eager, 72, 136, num_inference_steps=ONE_TOPOLOGY)) < 5e-3
    assert handle.stats.compiles == 1 and handle.stats.eager_calls == 0


@needs_aot
def test_exact_shapes_compile_one_graph_per_size(make_pipe: Any, eager: Any, tmp_path: Path) -> None:
    config = ah.HiDiffusionConfig(pooled=False, dilated=False)
    pipe = make_pipe()
    handle = ah.accelerate(pipe, hidiffusion=config, cache=tmp_path / "cache", shapes="exact", on_miss="eager")
    graphs = handle._graphs.unet(handle.patch.plan(128, 192, 1).at(0), 128, 192, 1)
    assert all(size.is_exact for graph, _ in graphs for size in graph.bucket.dims.values())
    graph, sizes = graphs[-1]
    handle._dispatcher.binder.prepare(graph)
    (bound,) = handle._dispatcher.binder.bind_all([(graph, sizes)], compile_missing=False).values()
    example = graph.region.example(graph.traits, sizes, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        assert relative_difference(bound(*example), graph.region.graph_module(graph.traits)(*example)) < 1e-3


@pytest.fixture
def two_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two regions are compiled, one of them windowed; the rest runs eager, for time."""
    from accel_hidiff import served

    def find(unet: Any) -> Any:
        return [(path, unet.get_submodule(path)) for path in ("down_blocks.1.attentions.0", "mid_block.resnets.0")]

    monkeypatch.setattr(served, "find_blocks", find)


def load_unet(handle: ah.Handle, height: int, width: int, batch: int) -> None:
    """`load`, without the VAE's decoder."""
    for phase in handle.patch.plan(height, width, STEPS):
        handle._dispatcher.load(handle._graphs.unet(phase.topology, height, width, batch))


def test_inductor_compiles_each_graph_once_in_the_process(make_pipe: Any, eager: Any, two_regions: None) -> None:
    """Over all phases, for a range of sizes."""
    from torch._dynamo.utils import counters

    needs.whole_regions()
    pipe = make_pipe()
    handle = ah.accelerate(pipe, hidiffusion=ah.HiDiffusionConfig(), backend="inductor", on_miss="error")
    with pytest.raises(ah.GraphMiss, match=r"not compiled in this process.*handle\.load"):
        request(pipe)
    for batch in (2, 1):  # a batch of 1 is a constant to Dynamo: its own graphs
        with handle.stats.expect(compiles=2):
            load_unet(handle, 128, 192, batch)
    assert relative_difference(request(pipe), request(eager)) < 5e-3
    request(pipe, guidance_scale=0.0)
    counters.clear()
    with handle.stats.expect(compiles=0, eager_calls=0):
        request(pipe, 256, 128)
        request(pipe, 256, 128, guidance_scale=0.0)
    assert not counters["stats"], "torch compiled behind our back for a second size"
    inputs = unet_inputs(pipe.unet, 128, 128, 2)
    with torch.no_grad(), handle.patch.phase(step=STEPS - 1, num_steps=STEPS):
        pipe.unet(**inputs)


def test_inductor_of_an_old_torch_compiles_each_size_once(
    make_pipe: Any, eager: Any, two_regions: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs are traced before Dynamo sees them, with their weights as inputs: what it guards on compiles nothing."""
    from torch._dynamo.utils import counters

    monkeypatch.setattr(backends, "dynamo_traces_regions", lambda: False)
    pipe = make_pipe()
    handle = ah.accelerate(pipe, hidiffusion=ah.HiDiffusionConfig(), backend="inductor", on_miss="error")
    load_unet(handle, 128, 192, 2)
    compiled = handle.stats.compiles
    assert 2 <= compiled <= 6  # two regions, whose sizes RAU-Net changes in some of three topologies
    counters.clear()
    with torch.no_grad():
        for weight in pipe.unet.parameters():
            weight.mul_(1.01)
        for weight in eager.unet.parameters():
            weight.mul_(1.01)
    with handle.stats.expect(compiles=0, eager_calls=0):
        got = request(pipe)
        with torch.inference_mode():
            request(pipe)
    assert relative_difference(got, request(eager)) < 5e-3
    with pytest.raises(ah.GraphMiss, match="not compiled in this process"):
        request(pipe, 256, 128)
    assert not counters["stats"], "torch compiled behind our back"
