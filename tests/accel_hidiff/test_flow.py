"""A UNet call as a list of regions gives what diffusers' own forwards give, and is left where it would not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import UNet2DConditionModel
from diffusers.models.unets.unet_2d_blocks import (
    CrossAttnDownBlock2D,
    CrossAttnUpBlock2D,
    DownBlock2D,
    UNetMidBlock2DCrossAttn,
    UpBlock2D,
)
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

import accel_hidiff as ah
from accel_hidiff.backends import BoundRegion
from accel_hidiff.binder import BoundCall
from accel_hidiff.control import ADAPTER, DOWN, MID
from accel_hidiff.dispatch import Graph
from accel_hidiff.families import BY_NAME, adapter_sizes, feature_sizes, sampler_sizes, skip_sizes, upsampling
from accel_hidiff.flow import Flow, skip_channels
from accel_hidiff.regions.blocks import beside
from accel_hidiff.regions.samplers import enlarged
from accel_hidiff.topology import Topology
from tests import models
from tests.accel_hidiff.test_variants import add_lora
from tests.compiled.conftest import relative_difference

STEPS = 30
TOPOLOGIES = [Topology(w, p, d) for w in (False, True) for p, d in ((False, False), (True, False), (False, True))]
BLOCKS = (DownBlock2D, CrossAttnDownBlock2D, UNetMidBlock2DCrossAttn, UpBlock2D, CrossAttnUpBlock2D)


class Served:
    """A pipeline whose UNet calls run its regions, uncompiled, and a patched one of the same weights."""

    def __init__(self, family: str, pipe: Any = None) -> None:
        pipe = pipe or models.build(family, "text2img")
        self.handle = ah.accelerate(pipe, backend="eager", hidiffusion=CONFIG)
        self.unet = self.handle.pipe.unet
        self.eager = models.build(family, "text2img").unet
        self.patch = ah.apply_hidiffusion(self.eager, config=CONFIG, family=self.handle.patch.family.name)

    def given(self, height: int, width: int, batch: int = 2) -> tuple[list[Any], dict[str, Any]]:
        """Random arguments of a call; the size is latent."""
        config, draw = self.unet.config, torch.Generator().manual_seed(height * 100 + width)
        text = config.encoder_hid_dim or config.cross_attention_dim
        positional = [
            torch.randn(batch, config.in_channels, height, width, generator=draw),
            torch.tensor(321),
            torch.randn(batch, 77, text, generator=draw),
        ]
        if config.addition_embed_type is None:
            return positional, {}
        ids = torch.tensor([[height * 8, width * 8, 0, 0, height * 8, width * 8]]).float().expand(batch, 6)
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        return positional, {
            "added_cond_kwargs": {"text_embeds": torch.randn(batch, pooled, generator=draw), "time_ids": ids}
        }

    def both(self, step: int, height: int, width: int, batch: int = 2, **more: Any) -> tuple[Tensor, Tensor]:
        """What the served UNet gives in a step of a request, and what the eager one does."""
        positional, named = self.given(height, width, batch)
        self.fill(step, height, width, batch)
        outs = []
        for patch, unet in ((self.handle.patch, self.unet), (self.patch, self.eager)):
            shifts = [index % 4 for index in range(len(patch.windowed_blocks))]
            copies = {name: list(value) if isinstance(value, list) else value for name, value in more.items()}
            with patch.phase(step, STEPS, shifts), torch.no_grad():
                outs.append(unet(*positional, **named, **copies, return_dict=False)[0])
        return outs[0], outs[1]

    def fill(self, step: int, height: int, width: int, batch: int) -> None:
        """Puts regions that are not compiled where compiled ones would be."""
        unet, dispatcher = self.unet, self.handle._dispatcher
        dispatcher.refresh()
        plan = self.handle.patch.plan(height * 8, width * 8, STEPS)
        graphs = self.handle._installed.unet.graphs(
            plan.at(step), height, width, batch, 77, dtype=unet.dtype, device=unet.device
        )
        calls = {}
        for graph, sizes in graphs:
            region = graph.region
            bound = BoundRegion(region.graph_module(graph.traits), graph.bucket)
            calls[region.path] = BoundCall(bound, region, dispatcher.binder.key(graph), sizes)
        self.calls = calls
        dispatcher.find = lambda *_: Graph(calls)  # type: ignore[method-assign]
        dispatcher._graphs.clear()


CONFIG = ah.HiDiffusionConfig()


@pytest.fixture(scope="module", params=["sd15", "sdxl", "sdxl_turbo", "kolors", "sdxl channels_last"])
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    family, _, memory_format = request.param.partition(" ")
    pipe = models.build(family, "text2img")
    if memory_format:
        pipe.unet.to(memory_format=getattr(torch, memory_format))
    yield Served(family, pipe)


@pytest.fixture
def xl() -> Served:
    return Served("sdxl")


@pytest.fixture
def no_blocks() -> Iterator[Callable[[], int]]:
    """How often a forward of one of diffusers' blocks ran, and that of each model of a pair by half."""
    count = 0

    def counting(module: Any, args: Any) -> None:
        nonlocal count
        count += isinstance(module, BLOCKS)

    hook = register_module_forward_pre_hook(counting)
    yield lambda: count
    hook.remove()


@pytest.mark.parametrize("size", [(16, 16), (24, 16), (17, 27)], ids=str)
def test_it_gives_what_diffusers_forwards_give(
    served: Served, size: tuple[int, int], no_blocks: Callable[[], int]
) -> None:
    ran = set()
    for step in range(STEPS):
        topology = served.handle.patch.plan(size[0] * 8, size[1] * 8, STEPS).at(step)
        if topology in ran:
            continue
        ran.add(topology)
        before = no_blocks()
        got, want = served.both(step, *size, batch=1 + len(ran))
        assert relative_difference(got, want) < 1e-5, topology
        assert no_blocks() - before == sum(map(len, (served.unet.down_blocks, served.unet.up_blocks))) + 1  # eager's
    assert ran


def test_residuals_of_a_controlnet_are_added(xl: Served, no_blocks: Callable[[], int]) -> None:
    patch, size = xl.handle.patch, (16, 24)
    for step in (0, 5, STEPS - 1):
        topology = patch.plan(size[0] * 8, size[1] * 8, STEPS).at(step)
        sizes = skip_sizes(patch.layout, patch.family, *size, topology)
        width = xl.unet.config.block_out_channels[0]
        residuals = [torch.randn(2, width, *one) for one in sizes]
        before = no_blocks()
        got, want = xl.both(step, *size, **{DOWN: tuple(residuals), MID: torch.randn(2, width, *sizes[-1])})
        without, _ = xl.both(step, *size)
        assert relative_difference(got, want) < 1e-5 < 1e-2 < relative_difference(without, want)
        assert no_blocks() - before == 14  # of the eager one, twice


def test_adapter_features_go_through_diffusers_forwards(xl: Served, no_blocks: Callable[[], int]) -> None:
    patch, size = xl.handle.patch, (16, 24)
    topology = patch.plan(size[0] * 8, size[1] * 8, STEPS).at(STEPS - 1)
    width = xl.unet.config.block_out_channels[0]
    features = [torch.randn(2, width, *one) for one in adapter_sizes(patch.layout, patch.family, *size, topology)]
    got, want = xl.both(STEPS - 1, *size, **{ADAPTER: features})
    assert relative_difference(got, want) < 1e-5
    assert no_blocks() == 14  # of both


CHANGES: dict[str, Callable[[Any], Any]] = {
    "freeu": lambda unet: unet.enable_freeu(s1=0.9, s2=0.2, b1=1.3, b2=1.4),
    "a hook on a block": lambda unet: unet.down_blocks[1].register_forward_hook(
        lambda module, args, out: (out[0] * 1.1, out[1])
    ),
    "a hook on the middle": lambda unet: unet.mid_block.register_forward_pre_hook(
        lambda module, args: (args[0] * 1.1, *args[1:])
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_happens_between_regions_is_left_to_diffusers(xl: Served, change: str) -> None:
    plain, _ = xl.both(STEPS - 1, 16, 16)
    for unet in (xl.unet, xl.eager):
        CHANGES[change](unet)
    got, want = xl.both(STEPS - 1, 16, 16)
    assert relative_difference(got, want) < 1e-5 < 1e-3 < relative_difference(plain, want)


def test_both_ends_are_asked_for_only_where_they_are_called(xl: Served) -> None:
    """A graph that no call would run is not compiled, and not missed."""

    def needed() -> set[str]:
        graphs = xl.handle._installed.unet.graphs(Topology(), 16, 16, 2, 77, dtype=torch.float32, device=xl.unet.device)
        return {graph.region.kind for graph, _ in graphs}

    everything = {"resnet", "transformer", "head", "tail", "downsampler", "upsampler"}
    assert needed() == everything
    xl.unet.enable_freeu(s1=0.9, s2=0.2, b1=1.3, b2=1.4)
    xl.handle._dispatcher.refresh()
    assert needed() == {"resnet", "transformer"}
    xl.unet.disable_freeu()
    xl.handle._dispatcher.refresh()
    assert needed() == everything


def test_hooks_that_were_taken_off_are_no_reason(xl: Served, no_blocks: Callable[[], int]) -> None:
    """They leave the class's own forward on the module."""
    add_hook_to_module(xl.unet.mid_block, ModelHook())
    remove_hook_from_module(xl.unet.mid_block)
    assert "forward" in vars(xl.unet.mid_block)
    xl.both(STEPS - 1, 16, 16)
    assert no_blocks() == 7


@pytest.mark.parametrize("kind", [CrossAttnUpBlock2D, UNet2DConditionModel])
@pytest.mark.parametrize("before", [True, False])
def test_another_forward_of_a_class_is_called(
    kind: type[nn.Module], before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At least where it was set before; on blocks later, too, which are called by diffusers' own forwards."""
    inner, seen = kind.forward, []

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(self)
        return inner(self, *args, **kwargs)

    if before:
        monkeypatch.setattr(kind, "forward", forward)
    served = Served("sdxl")
    monkeypatch.setattr(kind, "forward", forward)
    got, want = served.both(STEPS - 1, 16, 16)
    assert relative_difference(got, want) < 1e-5
    if before or kind is CrossAttnUpBlock2D:
        assert {id(module) for module in served.unet.modules() if type(module) is kind} <= set(map(id, seen))


@pytest.mark.parametrize("layer", ["conv_in", "conv_out", "time_embedding.linear_1"])
@pytest.mark.parametrize("before", [True, False])
def test_lora_on_both_ends(layer: str, before: bool, no_blocks: Callable[[], int]) -> None:
    pipe = models.build("sdxl", "text2img")
    if before:
        add_lora(pipe.unet, [layer])
    xl = Served("sdxl", pipe)
    if not before:
        add_lora(xl.unet, [layer])
    add_lora(xl.eager, [layer])
    got, want = xl.both(STEPS - 1, 16, 16)
    assert relative_difference(got, want) < 1e-5 and no_blocks() == 7
    xl.unet.disable_adapters()
    without, _ = xl.both(STEPS - 1, 16, 16)
    assert relative_difference(without, want) > 1e-3


@pytest.mark.parametrize("kind", [DOWN, MID])
def test_residuals_of_another_dtype_are_for_no_graph(xl: Served, kind: str) -> None:
    """A package would read them as what it was compiled for."""
    sizes = skip_sizes(xl.handle.patch.layout, xl.handle.patch.family, 16, 16, Topology())
    width = xl.unet.config.block_out_channels[0]
    given: dict[str, Any] = {DOWN: [torch.randn(2, width, *one) for one in sizes], MID: torch.randn(2, width, 4, 4)}
    given[kind] = given[kind].double() if kind == MID else [one.double() for one in given[kind]]
    positional, named = xl.given(16, 16)
    with xl.handle.patch.phase(STEPS - 1, STEPS), torch.no_grad(), pytest.raises(RuntimeError, match=r"dtype|type"):
        xl.unet(*positional, **named, **given)  # diffusers' own error
    (reason,) = xl.handle.stats.rejected
    assert reason.startswith("expected a ControlNet's residuals in torch.float32 on cpu") and "torch.float64" in reason


def test_conditions_on_another_device_are_diffusers_to_refuse(xl: Served) -> None:
    positional, named = xl.given(16, 16)
    xl.fill(0, 16, 16, 2)
    flow, added = xl.handle._installed.unet._flow, named["added_cond_kwargs"]
    assert flow is not None and flow.inputs(xl.calls, *positional[:2], added) is not None
    elsewhere = {**added, "time_ids": added["time_ids"].to("meta")}
    assert flow.inputs(xl.calls, *positional[:2], elsewhere) is None


def test_another_forward_of_a_block_is_called(xl: Served) -> None:
    block = xl.unet.up_blocks[0]
    inner, seen = block.forward, []
    block.forward = lambda *args, **kwargs: seen.append(1) or inner(*args, **kwargs)
    got, want = xl.both(STEPS - 1, 16, 16)
    assert relative_difference(got, want) < 1e-5
    assert seen == [1]


def test_a_forward_that_was_there_before_is_called() -> None:
    pipe = models.build("sdxl", "text2img")
    inner, seen = pipe.unet.forward, []
    pipe.unet.forward = lambda *args, **kwargs: seen.append(1) or inner(*args, **kwargs)
    served = Served("sdxl", pipe)
    got, want = served.both(STEPS - 1, 16, 16)
    assert relative_difference(got, want) < 1e-5
    assert seen == [1]


@pytest.mark.parametrize("called", [True, False])
def test_parts_of_both_ends_that_are_exchanged_are_followed(xl: Served, called: bool) -> None:
    """Also before the first call."""
    plain, _ = (xl if called else Served("sdxl")).both(STEPS - 1, 16, 16)
    for unet in (xl.unet, xl.eager):
        torch.manual_seed(3)
        unet.conv_in = nn.Conv2d(4, unet.conv_in.out_channels, 3, padding=1)
        unet.time_embedding.linear_1 = nn.Linear(
            unet.time_embedding.linear_1.in_features, unet.time_embedding.linear_1.out_features
        )
    got, want = xl.both(STEPS - 1, 16, 16)
    assert relative_difference(got, want) < 1e-5 < 1e-3 < relative_difference(plain, want)


@pytest.mark.parametrize(
    ("timestep", "flows"),
    [(7, True), (7.5, True), (torch.tensor([7]), True), (torch.tensor(7), True), (torch.tensor([7, 9]), False)],
    ids=str,
)
def test_timesteps_of_every_form(xl: Served, timestep: Any, flows: bool, no_blocks: Callable[[], int]) -> None:
    positional, named = xl.given(16, 16)
    xl.fill(0, 16, 16, 2)
    outs = []
    for patch, unet in ((xl.handle.patch, xl.unet), (xl.patch, xl.eager)):
        with patch.phase(0, STEPS, [0] * len(patch.windowed_blocks)), torch.no_grad():
            outs.append(unet(positional[0], timestep, positional[2], **named, return_dict=False)[0])
    assert relative_difference(*outs) < 1e-5
    assert no_blocks() == (7 if flows else 14)


def test_conditions_of_another_dtype_are_not_rounded(xl: Served, no_blocks: Callable[[], int]) -> None:
    """Sizes in pixels are no numbers of bfloat16: given in float32, they stay in it."""
    positional, named = xl.given(16, 16)
    named["added_cond_kwargs"]["time_ids"] = named["added_cond_kwargs"]["time_ids"].double()
    xl.fill(0, 16, 16, 2)
    with xl.handle.patch.phase(0, STEPS), torch.no_grad():
        xl.unet(*positional, **named, return_dict=False)
    assert no_blocks() == 7


def test_a_region_that_is_not_there_is_diffusers_to_run(xl: Served, no_blocks: Callable[[], int]) -> None:
    positional, named = xl.given(16, 16)
    xl.fill(0, 16, 16, 2)
    del xl.calls["unet.tail"]
    with xl.handle.patch.phase(0, STEPS), torch.no_grad():
        xl.unet(*positional, **named, return_dict=False)
    assert no_blocks() == 7


class TestImages:
    """What regions do to images gives the same numbers in both memory formats, and a result of that format."""

    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
    def test_channels_beside_channels(self, memory_format: torch.memory_format) -> None:
        one, other = (torch.randn(2, n, 5, 7).contiguous(memory_format=memory_format) for n in (3, 4))
        got = beside(one, other, memory_format)
        assert torch.equal(got, torch.cat([one, other], 1)) and got.is_contiguous(memory_format=memory_format)

    @pytest.mark.parametrize("factor", [2, 4])
    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
    def test_enlarged_by_nearest_neighbours(self, factor: int, memory_format: torch.memory_format) -> None:
        image = torch.randn(2, 3, 5, 7).contiguous(memory_format=memory_format)
        got = enlarged(image, factor, memory_format)
        want = nn.functional.interpolate(image, size=(5 * factor, 7 * factor), mode="nearest")
        assert torch.equal(got, want) and got.is_contiguous(memory_format=memory_format)


class TestStructure:
    def test_a_skip_connection_has_the_channels_of_what_made_it(self) -> None:
        unet = models.build("sdxl", "text2img").unet
        found = skip_channels(unet)
        assert found is not None and list(found) == [f"up_blocks.{i}.resnets.{j}" for i in range(3) for j in range(3)]
        for path, channels in found.items():
            assert 0 < channels < unet.get_submodule(path).in_channels

    @pytest.mark.parametrize(
        "change",
        [
            lambda unet: setattr(unet, "mid_block", None),
            lambda unet: setattr(unet, "class_embedding", nn.Embedding(2, 8)),
            lambda unet: unet.down_blocks[0].downsamplers.append(unet.down_blocks[0].downsamplers[0]),
            lambda unet: unet.down_blocks[1].attentions.append(unet.down_blocks[1].attentions[0]),
            lambda unet: setattr(unet.mid_block, "attentions", nn.ModuleList()),
            lambda unet: setattr(unet, "conv_in", nn.Sequential(unet.conv_in)),
            lambda unet: setattr(unet.up_blocks[0].upsamplers[0], "use_conv", False),
            lambda unet: setattr(unet, "encoder_hid_proj", nn.Linear(4, 4)),
        ],
    )
    def test_another_structure_has_no_flow(self, change: Callable[[Any], Any]) -> None:
        unet = models.build("sdxl", "text2img").unet
        change(unet)
        assert skip_channels(unet) is None

    def test_a_subclass_may_do_anything(self) -> None:
        unet = models.build("sdxl", "text2img").unet
        unet.__class__ = type("Other", (type(unet),), {})
        assert skip_channels(unet) is None

    @pytest.mark.parametrize("name", ["sd15", "sdxl"])
    @pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
    def test_upsamplers_undo_what_was_taken_from_a_size(self, name: str, topology: Topology) -> None:
        family = BY_NAME[name]
        layout = family.layout()
        factors = upsampling(layout, family, topology)
        features = feature_sizes(layout, family, 128, 192, topology)
        given = sampler_sizes(layout, family, 128, 192, topology)
        for path, factor in factors.items():
            after = features[f"up_blocks.{int(path.split('.')[1]) + 1}.resnets.0"]
            assert after == (factor * given[path][0], factor * given[path][1])
        assert set(factors.values()) <= {2, 4} and (4 in factors.values()) == topology.dilated


def test_flow_is_told_from_the_unet_of_each_family(served: Served) -> None:
    assert isinstance(served.handle._installed.unet._flow, Flow)
