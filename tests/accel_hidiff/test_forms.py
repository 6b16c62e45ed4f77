"""Forms of operators for a GPU give what torch's own do, and the graphs that are traced in them what eager does."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor
from diffusers.models.autoencoders.vae import Decoder
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import accel_hidiff as ah
from accel_hidiff import forms
from accel_hidiff.backends import aot_program
from accel_hidiff.backends.aot_cuda import options_of
from accel_hidiff.forms import (
    TracedInForms,
    attention,
    attention_in_parts,
    end_detours,
    forms_of,
    group_norm,
    in_parts,
    rows_of_parts,
)
from accel_hidiff.regions import DecoderRegion, Region, RegionGraph, bucket_of, example_sizes
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


def wide_decoder() -> DecoderRegion:
    """With one head that no fast kernel of attention takes."""
    kinds, widths = ("UpDecoderBlock2D",) * 2, (8, 264)
    decoder = Decoder(4, 3, kinds, widths, layers_per_block=1, norm_num_groups=4).eval().requires_grad_(False)
    decoder.to(memory_format=torch.channels_last)
    return DecoderRegion(DECODER, decoder, decoder.forward)


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


def heads(tokens: int, keys: int | None = None, width: int = 320, sharp: float = 1) -> list[Tensor]:
    """Query, key and value of one head; the sharper, the fewer keys a query attends to."""
    draw = torch.Generator().manual_seed(tokens)
    query, key, value = (torch.randn(1, 1, n, width, generator=draw) for n in (tokens, *[keys or tokens] * 2))
    return [query * sharp, key, value]


class TestAttention:
    @pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 31, 33, 35 * 35, 37 * 29])
    @pytest.mark.parametrize("sharp", [1, 4])
    def test_it_is_torchs(self, tokens: int, sharp: float) -> None:
        given = heads(tokens, sharp=sharp)
        want = F.scaled_dot_product_attention(*given)
        assert relative_difference(attention_in_parts(*given), want) < 1e-5

    @pytest.mark.parametrize("tokens", [33, 35 * 35])
    @pytest.mark.parametrize("sharp", [1, 4])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_as_exact_as_torchs(self, tokens: int, sharp: float, dtype: torch.dtype) -> None:
        """Also where few keys have all the weight. On a CPU the products are those of float32 numbers, which halves
        are, and summed in float32 as a GPU's."""
        given = [tensor.to(dtype) for tensor in heads(tokens, sharp=sharp)]
        want = F.scaled_dot_product_attention(*(tensor.double() for tensor in given))
        ours, torchs = ((form(*given).double() - want).norm() for form in (attention, F.scaled_dot_product_attention))
        assert attention(*given).dtype == dtype and ours <= 1.1 * torchs

    def test_scales_and_other_keys(self) -> None:
        given = heads(40, 23)
        want = F.scaled_dot_product_attention(*given, scale=0.3)
        assert relative_difference(attention_in_parts(*given, 0.3), want) < 1e-5

    @pytest.mark.parametrize("tokens", [1, 15, 16, 65536, 65536 + 15])
    def test_parts_are_all_queries(self, tokens: int) -> None:
        rows = rows_of_parts(tokens)
        assert sum(rows) == tokens and len(set(rows[:-1])) == 1 and 0 <= rows[-1] - rows[0] < len(rows)

    @pytest.mark.parametrize(
        ("shape", "dtype", "options", "parts"),
        [
            ((1, 1, 64, 512), torch.bfloat16, {}, True),
            ((1, 1, 64, 512), torch.float16, {"dropout_p": 0.0, "is_causal": False, "attn_mask": None}, True),
            ((1, 1, 64, 512), torch.float32, {}, False),
            ((1, 1, 64, 256), torch.bfloat16, {}, False),  # flash attention takes it
            ((1, 2, 64, 512), torch.bfloat16, {}, False),
            ((2, 1, 64, 512), torch.bfloat16, {}, False),
            ((1, 64, 512), torch.bfloat16, {}, False),
            ((1, 1, 64, 512), torch.bfloat16, {"is_causal": True}, False),
            ((1, 1, 64, 512), torch.bfloat16, {"attn_mask": torch.zeros(64, 64, dtype=torch.bfloat16)}, False),
        ],
    )
    def test_which_calls_go_in_parts(
        self, shape: tuple[int, ...], dtype: torch.dtype, options: dict[str, Any], parts: bool
    ) -> None:
        query = torch.randn(shape).to(dtype)
        with Called() as seen:
            attention(query, query, query, **options)
        assert (seen.names.count("aten.mm.default") == 32) == parts

    def test_more_tokens_than_a_graph_has_parts_for_are_torchs(self) -> None:
        assert in_parts(512, 512 * 512) and not in_parts(512, 512 * 512 + 1)


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

    @pytest.mark.parametrize(
        ("shapes", "sides"), [("symbolic", [(8, 8), (9, 13), (16, 16), (31, 17)]), ("exact", [(3, 5)])]
    )
    def test_a_decoder_with_a_wide_head_gives_what_eager_gives(
        self, monkeypatch: pytest.MonkeyPatch, shapes: str, sides: list[tuple[int, int]]
    ) -> None:
        """At any size: nothing of the example's remains in the graph, which 16 parts divide evenly."""
        monkeypatch.setattr(forms, "_HALF", (torch.float32,))
        region, sizes = wide_decoder(), [{"batch": 1, "height": height, "width": width} for height, width in sides]
        bucket = bucket_of(region, {}, sizes[0], shapes, device="cuda")
        program = exported(RegionGraph(region, {}, bucket, example_sizes(bucket, sizes[0]), torch.float32, CPU))
        assert not any("scaled_dot" in str(node.target) for node in program.graph.nodes)
        for one in sizes:
            latents = region.image(one, torch.float32, CPU)
            with torch.no_grad():
                want, got = region.module(latents), program.module()(latents)
            assert relative_difference(got, want) < 1e-5

    def test_a_gpu_decodes_one_image_at_a_time(self) -> None:
        region, sizes = wide_decoder(), {"batch": 3, "height": 16, "width": 24}
        on_gpu, on_cpu = (bucket_of(region, {}, sizes, "symbolic", device=device).dims for device in ("cuda", "cpu"))
        assert on_gpu["batch"].is_exact and not on_gpu["height"].is_exact and not on_cpu["batch"].is_exact

    def test_scores_count_among_the_largest_tensors(self) -> None:
        """Of a GPU's graph, whose indices they decide."""
        region, sizes = wide_decoder(), {"batch": 1, "height": 512, "width": 512}
        assert region.largest(sizes, {}) == 512**4 // 16 > 512**2 * region.width


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
        assert region.largest(small, {}) < 1 << 31 <= region.largest(large, {})
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
        told = region.largest(sizes, graph.traits)
        largest = seen.largest("aten.convolution.default", "aten.addmm.default", "aten.add.Tensor", "aten.mul.Tensor")
        assert told / 4 <= largest <= told

    def test_scores_of_attention_that_writes_them_count(self, regions: dict[str, Region]) -> None:
        region, sizes = regions[TRANSFORMER], {"batch": 2, "height": 128, "width": 128}
        fused = region.largest(sizes, {})
        layers = [layer for layer in region.module.modules() if isinstance(layer, Attention)]
        before = layers[0].processor
        layers[0].set_processor(AttnProcessor())
        try:
            assert region.largest(sizes, {}) == 2 * layers[0].heads * 128**4 > fused
        finally:
            layers[0].set_processor(before)

    @pytest.mark.parametrize(("topology", "factor"), [(PLAIN, 2), (Topology(dilated=True), 4)], ids=str)
    def test_an_upsampler_is_as_wide_as_what_it_gives(
        self, regions: dict[str, Region], topology: Topology, factor: int
    ) -> None:
        upsamplers = (region for region in regions.values() if region.kind == "upsampler")
        region = next(region for region in upsamplers if region.traits(topology)["factor"] == factor)
        sizes = {"batch": 2, "height": 8, "width": 12}
        given = region.graph_module(region.traits(topology))(*region.example({}, sizes, torch.float32, CPU))
        assert given.shape[2:] == (8 * factor, 12 * factor)
        assert region.largest(sizes, region.traits(topology)) == given.numel()

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


def test_arguments_may_be_named() -> None:
    torch.manual_seed(0)
    image = torch.randn(2, 8, 5, 3).contiguous(memory_format=torch.channels_last)
    tokens = {name: torch.randn(1, 2, 6, 4) for name in ("query", "key", "value")}
    want = F.group_norm(image, 4), F.scaled_dot_product_attention(*tokens.values())
    with forms_of(CUDA, torch.channels_last):
        got = F.group_norm(input=image, num_groups=4), F.scaled_dot_product_attention(**tokens)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)
