"""Forms of operators for a GPU give what torch's own do, and the graphs that are traced in them what eager does."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import accel_hidiff as ah
from accel_hidiff.backends import aot_program
from accel_hidiff.backends.aot_cuda import options_of
from accel_hidiff.forms import TracedInForms, end_detours, forms_of, group_norm
from accel_hidiff.regions import Region, RegionGraph, bucket_of, example_sizes
from accel_hidiff.topology import PLAIN, Topology
from tests import models
from tests.compiled.conftest import relative_difference

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
WINDOWED = Topology(windowed=True)
RESNET, TRANSFORMER, DECODER = "unet.up_blocks.1.resnets.0", "unet.down_blocks.1.attentions.0", "vae.decoder"


@pytest.fixture(scope="module")
def regions() -> Iterator[dict[str, Region]]:
    """Those of a tiny SDXL pipeline in channels_last."""
    pipe = models.build("sdxl", "text2img")
    for model in (pipe.unet, pipe.vae):
        model.to(memory_format=torch.channels_last)
    handle = ah.accelerate(pipe, hidiffusion=ah.HiDiffusionConfig(), backend="eager")
    yield handle._installed.regions()


def graph_of(region: Region, topology: Topology, sizes: dict[str, int], shapes: str = "symbolic") -> RegionGraph:
    traits = region.traits(topology)
    sizes = {"tokens": 77, **sizes} if region.kind == "transformer" else sizes
    bucket = bucket_of(region, traits, sizes, shapes)
    return RegionGraph(region, traits, bucket, example_sizes(bucket, sizes), torch.float32, CPU)


class TestGroupNorm:
    @settings(max_examples=60, deadline=None)
    @given(
        batch=st.integers(1, 8),
        groups=st.sampled_from([1, 2, 8]),
        each=st.integers(1, 5),
        size=st.lists(st.integers(2, 9), min_size=1, max_size=2),
        affine=st.booleans(),
    )
    def test_it_is_torchs(self, batch: int, groups: int, each: int, size: list[int], affine: bool) -> None:
        draw = torch.Generator().manual_seed(batch * 100 + groups * 10 + each)
        channels = groups * each
        image = torch.randn(batch, *size, channels, generator=draw).movedim(-1, 1) * 3 + 5
        numbers = torch.randn(2, channels, generator=draw) if affine else (None, None)
        want = F.group_norm(image.double(), groups, *(None if one is None else one.double() for one in numbers), 1e-5)
        got = group_norm(image, groups, *numbers, 1e-5)
        # Two numbers of a group may lie so close that their difference has few digits left, in torch's own norm too.
        torchs = (F.group_norm(image, groups, *numbers, 1e-5).double() - want).abs().max().item()
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=2e-5 + 4 * torchs)
        assert got.movedim(1, -1).is_contiguous(), "channels lie beside each other"

    def test_a_large_mean_costs_no_digits(self) -> None:
        """Variances are not differences of large squares."""
        image = (torch.randn(1, 64, 32, 32) + 1000).contiguous(memory_format=torch.channels_last)
        want = F.group_norm(image.double(), 8)
        torch.testing.assert_close(group_norm(image, 8).double(), want, rtol=1e-3, atol=2e-3)

    def test_half_precision_is_as_exact_as_torchs(self) -> None:
        image = torch.randn(2, 64, 17, 23).contiguous(memory_format=torch.channels_last)
        half = image.to(torch.bfloat16)
        want = F.group_norm(half.double(), 32)
        ours, torchs = ((norm(half, 32).double() - want).abs().max() for norm in (group_norm, F.group_norm))
        assert group_norm(half, 32).dtype == torch.bfloat16 and ours <= 1.01 * torchs


class TestForms:
    def test_only_gpus_and_channels_last_have_them(self) -> None:
        image = torch.randn(1, 8, 4, 4)
        for device, memory_format in product((CPU, CUDA), (torch.channels_last, torch.contiguous_format)):
            with Called() as seen, forms_of(device, memory_format):
                F.group_norm(image, 2)
            assert ("aten.native_group_norm.default" not in seen.names) == (
                device == CUDA and memory_format == torch.channels_last
            )

    def test_what_is_no_image_is_left_alone(self) -> None:
        with Called() as seen, forms_of(CUDA, torch.channels_last):
            F.group_norm(torch.randn(3, 8), 2)
        assert "aten.native_group_norm.default" in seen.names

    @pytest.mark.parametrize("batch", [1, 8])
    @pytest.mark.parametrize("size", [(6, 10), (7, 5)], ids=str)
    @pytest.mark.parametrize(
        ("path", "topology"),
        [(RESNET, PLAIN), (TRANSFORMER, PLAIN), (TRANSFORMER, WINDOWED), (DECODER, PLAIN)],
        ids=str,
    )
    def test_a_region_gives_what_eager_gives(
        self, regions: dict[str, Region], path: str, topology: Topology, size: tuple[int, int], batch: int
    ) -> None:
        region = regions[path]
        graph = graph_of(region, topology, {"batch": batch, "height": size[0], "width": size[1]}, "exact")
        module, inputs = region.graph_module(graph.traits), [*graph.example()]
        program = exported(graph)
        shifts = range(4) if graph.traits.get("windowed") else (0,)
        for shift in shifts:
            if graph.traits.get("windowed"):
                inputs[2] = (inputs[2] + shift) % 4
            with torch.no_grad():
                want, got = module(*inputs), program.module()(*inputs)
            assert relative_difference(got, want) < 1e-5
            assert got.is_contiguous(memory_format=torch.channels_last) or path == DECODER


class TestDetours:
    def test_tokens_go_to_the_first_product_as_they_are(self, regions: dict[str, Region]) -> None:
        sizes = {"batch": 2, "height": 8, "width": 12}
        program = exported(graph_of(regions[TRANSFORMER], WINDOWED, sizes))
        linear = next(node for node in program.graph.nodes if node.target is torch.ops.aten.linear.default)
        source = linear.args[0]
        assert isinstance(source, torch.fx.Node) and not str(source.target).startswith(("aten.reshape", "aten.permute"))

    @pytest.mark.parametrize("path", [RESNET, TRANSFORMER, DECODER])
    def test_sizes_stay_symbolic(self, regions: dict[str, Region], path: str) -> None:
        """Comparing layouts must not make a guard on them: a decoder's height became 32 for good."""
        graph = graph_of(regions[path], WINDOWED, {"batch": 2, "height": 8, "width": 12})
        served = aot_program.served_bucket(graph, exported(graph)).dims
        assert {name: size.maximum for name, size in served.items()} == {
            name: size.maximum for name, size in graph.bucket.dims.items()
        }
        assert all(size.minimum <= 4 for size in served.values())

    def test_a_copy_is_no_detour(self) -> None:
        class Turned(nn.Module):
            def forward(self, image: Tensor) -> Tensor:
                return image.transpose(0, 1).reshape(4, 4) + 1

        image = torch.arange(16.0).view(4, 4)
        program = torch.export.export(Turned(), (image,))
        end_detours(program)
        assert torch.equal(program.module()(image), image.T + 1)


class TestWideIndices:
    def test_a_call_of_large_tensors_has_a_graph_of_its_own(self, regions: dict[str, Region]) -> None:
        region = regions[DECODER]
        small, large = ({"batch": 1, "height": side, "width": side} for side in (64, 1 << 14))
        assert region.largest(small) < 1 << 31 <= region.largest(large)
        graph = graph_of(region, PLAIN, small)
        wide = RegionGraph(**{**vars(graph), "wide": True})
        assert graph.key({}) != wide.key({})
        assert options_of(graph)["assume_32bit_indexing"] and not options_of(wide)["assume_32bit_indexing"]

    @pytest.mark.parametrize(("path", "topology"), [(RESNET, PLAIN), (TRANSFORMER, WINDOWED), (DECODER, PLAIN)])
    def test_no_tensor_of_a_call_is_larger_than_told(
        self, regions: dict[str, Region], path: str, topology: Topology
    ) -> None:
        region, sizes = regions[path], {"batch": 2, "height": 34, "width": 50}
        graph = graph_of(region, topology, sizes, "exact")
        with torch.no_grad(), Called() as seen:
            region.graph_module(graph.traits)(*graph.example())
        told = region.largest(sizes)
        largest = seen.largest("aten.convolution.default", "aten.addmm.default", "aten.add.Tensor", "aten.mul.Tensor")
        assert told / 4 <= largest <= told

    @pytest.mark.parametrize(("side", "wide"), [(2048, False), (8192, True)])
    def test_sizes_choose(self, side: int, wide: bool) -> None:
        """Of a GPU's graphs; on a CPU indices always have 64 bits."""
        pipe = models.build("sdxl", "text2img")
        handle = ah.accelerate(pipe, hidiffusion=ah.HiDiffusionConfig(), backend="eager")
        found = handle._installed.regions()[DECODER]
        found.__class__ = type("Wider", (type(found),), {"width": 1 << 12})
        sizes = {"batch": 1, "height": side // 8, "width": side // 8}
        graphs = [handle._dispatcher.binder.graph(found, PLAIN, sizes, torch.float16, device) for device in (CUDA, CPU)]
        assert [graph.wide for graph in graphs] == [wide, False]


class TestLayout:
    def test_a_transformer_has_the_format_of_its_unet(self) -> None:
        pipe = models.build("sdxl", "text2img")
        handle = ah.accelerate(pipe, hidiffusion=ah.HiDiffusionConfig(), backend="eager")
        region = handle._installed.regions()[TRANSFORMER]
        assert region.memory_format == torch.contiguous_format
        pipe.unet.to(memory_format=torch.channels_last)
        region.forget()
        assert region.memory_format == torch.channels_last


class Called(TorchDispatchMode):
    """Which operators ran, and the numbers of what they made."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self._counts: list[int] = []

    def largest(self, *names: str) -> int:
        return max(count for name, count in zip(self.names, self._counts, strict=True) if name in names)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        self._counts.append(out.numel() if isinstance(out, Tensor) else 0)
        return out


def exported(graph: RegionGraph) -> torch.export.ExportedProgram:
    """As for a GPU, on the CPU."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(aot_program, "forms_of", lambda device, memory_format: forms_of(CUDA, memory_format))
        program, _ = aot_program.export_region(graph)
    assert not any("group_norm" in str(node.target) for node in program.graph.nodes if node.op == "call_function")
    return program


def test_the_mode_takes_other_forms() -> None:
    with TracedInForms({F.silu: lambda image, inplace: image * 0}):
        assert not F.silu(torch.ones(1, 2, 3, 3)).any() and F.silu(torch.ones(2)).any()
