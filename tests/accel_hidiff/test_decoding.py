"""Decoding: the estimate of its memory, the tiles that it is cut into, and a dtype of its own."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.vae import Decoder
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import accel_hidiff as ah
from accel_hidiff.backends.aot_program import export_region
from accel_hidiff.config import DecodeConfig
from accel_hidiff.decoding import (
    Decode,
    Tiles,
    choose_tiles,
    decode_in_tiles,
    free_memory,
    lacks_bfloat16,
    tiled_peak_bytes,
    unfolds,
)
from accel_hidiff.deploy import load_deployment
from accel_hidiff.errors import BadInput
from accel_hidiff.regions import DecoderRegion, RegionGraph
from accel_hidiff.regions.base import bucket_of, example_sizes
from accel_hidiff.served import DECODER, ServedDecoder
from benchmarks.decoding import PeakCase
from tests import models, needs

SDXL = (128, 256, 512, 512)
GIB = 1 << 30


def cuda_decode(side: int, batch: int = 1) -> Decode:
    return Decode(side // 8, side // 8, batch, SDXL, 2, "cuda", compiled=False)


# Config


def test_config_survives_json() -> None:
    config = DecodeConfig(tiles="always", tile=512, overlap=64, max_memory=GIB, dtype="bfloat16")
    assert DecodeConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tiles": "some"}, "decode.tiles: expected one of auto, never, always"),
        ({"tile": 100}, "decode.tile: expected a multiple of 8 pixels, at least 64, got 100"),
        ({"tile": 32}, "decode.tile: expected a multiple of 8 pixels, at least 64, got 32"),
        ({"overlap": -8}, "decode.overlap: expected a multiple of 8"),
        ({"tile": 128, "overlap": 72}, "decode.overlap: expected at most half of a tile of 128 pixels, got 72"),
        ({"max_memory": 0}, "decode.max_memory: expected a positive number of bytes"),
        ({"max_memory": True}, "decode.max_memory: expected a positive number of bytes"),
        ({"dtype": "float16"}, "decode.dtype: expected one of bfloat16"),
    ],
)
def test_config_names_what_is_wrong(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        DecodeConfig(**fields)


def test_deploy_file_takes_it(tmp_path: Path) -> None:
    file = tmp_path / "deploy.toml"
    text = '[[models]]\nname = "m"\nmodel = "x"\nsizes = ["64x64"]\ndecode = {tiles = "always", tile = 512}\n'
    file.write_text(text, encoding="utf-8")
    assert load_deployment(file).model().decode == DecodeConfig(tiles="always", tile=512)
    file.write_text(text.replace("tile = 512", "tile = 5"), encoding="utf-8")
    with pytest.raises(BadInput, match=r"deploy\.toml: decode\.tile: expected a multiple of 8"):
        load_deployment(file)


# Tiles


@pytest.mark.parametrize("length", [*range(2, 70), 131, 200])
@pytest.mark.parametrize(("tile", "overlap"), [(8, 0), (8, 4), (17, 3), (64, 32)])
def test_tiles_cover_everything_with_their_overlap(length: int, tile: int, overlap: int) -> None:
    tiles = Tiles.of(length, 5, tile, overlap)
    assert tiles.tops[0] == 0 and tiles.tops[-1] + tiles.height == length
    assert tiles.height <= tile
    assert all(after + overlap <= before + tiles.height for before, after in itertools.pairwise(tiles.tops))
    assert tiles.height == length or tiles.height > tile // 2  # no narrow rest


@pytest.mark.parametrize("overlap", [0, 2, 4])
def test_tiles_of_a_decoder_that_sees_single_cells_are_the_whole(overlap: int) -> None:
    latents = torch.randn(2, 3, 21, 13, generator=torch.Generator().manual_seed(0))

    def decode(cells: Tensor) -> Tensor:
        return torch.nn.functional.interpolate(cells, scale_factor=8.0)

    tiled = decode_in_tiles(decode, latents, Tiles.of(21, 13, 8, overlap))
    torch.testing.assert_close(tiled, decode(latents), atol=1e-6, rtol=0)


def test_one_tile_is_bit_equal_where_nothing_is_blended() -> None:
    latents = torch.randn(1, 4, 8, 12)
    decoded = torch.randn(1, 3, 64, 96)
    assert torch.equal(decode_in_tiles(lambda cells: decoded, latents, Tiles.of(8, 12, 16, 4)), decoded)


def test_a_step_between_two_tiles_becomes_a_ramp() -> None:
    tiles = Tiles.of(2, 16, 10, 4)
    levels = iter((0.0, 1.0))
    row = decode_in_tiles(lambda cells: torch.full((1, 3, 16, 80), next(levels)), torch.zeros(1, 4, 2, 16), tiles)[
        0, 0, 0
    ]
    assert row[:48].eq(0).all() and row[80:].eq(1).all()
    torch.testing.assert_close(row[48:80], (torch.arange(32) + 0.5) / 32)


# When


def test_4096_fits_24_gb_in_tiles_alone() -> None:
    decode = cuda_decode(4096)
    assert decode.peak_bytes() > 30e9  # measured on an H200
    tiles = choose_tiles(DecodeConfig(), decode, 24 * GIB)
    assert tiles is not None and tiled_peak_bytes(decode, tiles) < 4 * GIB
    assert choose_tiles(DecodeConfig(), decode, 80 * GIB) is None


@pytest.mark.parametrize(
    ("config", "free", "tiled"),
    [
        (DecodeConfig(), 2 * GIB, True),
        (DecodeConfig(), None, False),
        (DecodeConfig(max_memory=GIB), 80 * GIB, True),
        (DecodeConfig(max_memory=GIB), None, True),
        (DecodeConfig(max_memory=20 * GIB), GIB, False),
        (DecodeConfig(tiles="never"), 1, False),
        (DecodeConfig(tiles="always"), 80 * GIB, True),
        (DecodeConfig(tiles="always", tile=2048), 80 * GIB, False),  # one tile is the whole
    ],
)
def test_when_a_decode_is_tiled(config: DecodeConfig, free: int | None, tiled: bool) -> None:
    assert (choose_tiles(config, cuda_decode(2048), free) is not None) == tiled


def test_the_estimate_grows_with_what_it_depends_on() -> None:
    assert cuda_decode(2048, batch=2).peak_bytes() == 2 * cuda_decode(2048).peak_bytes()
    assert cuda_decode(2048).peak_bytes() == 4 * cuda_decode(1024).peak_bytes()
    # Of these widths the half-size level is the widest, of a single level that level alone.
    assert (
        Decode(8, 8, 1, (8, 16, 128), 4, "cuda", False).peak_bytes()
        == 2 * Decode(8, 8, 1, (8, 16, 64), 4, "cuda", False).peak_bytes()
    )
    assert Decode(8, 8, 1, (8,), 4, "cuda", False).peak_bytes() > 8 * 64 * 4


def test_attention_in_parts_is_in_the_estimate_of_a_gpus_compiled_graph() -> None:
    """Where it is more than the widest image: here only with narrow images, or more tokens than a UNet makes."""
    narrow = Decode(512, 512, 1, (8, 8, 512), 2, "cuda", compiled=True)
    scores = 512**4 // 16 * 6
    assert scores < narrow.peak_bytes() < 1.1 * scores
    for other in ({"compiled": False}, {"itemsize": 4}, {"device": "cpu"}, {"widths": (8, 8, 256)}):
        assert dataclasses.replace(narrow, **other).peak_bytes() < scores  # type: ignore[arg-type]
    for side in (1024, 2048, 4096):
        compiled = dataclasses.replace(cuda_decode(side), compiled=True)
        assert compiled.peak_bytes() == cuda_decode(side).peak_bytes()


def test_free_memory_of_this_machine() -> None:
    free = free_memory(torch.device("cpu"))
    assert free is not None and free > 1 << 20
    assert free_memory(torch.device("meta")) is None


@pytest.mark.parametrize(
    ("dtype", "isa", "widths", "sides"),
    [
        ("float32", "", (32, 64, 128, 128), (192, 320)),
        ("bfloat16", "", (32, 64, 128, 128), (192, 320)),
        ("bfloat16", "AVX2", (32, 64), (64, 96)),  # slow: every convolution unfolds its input
    ],
)
def test_the_estimate_is_an_upper_bound_and_grows_as_memory_does(
    dtype: str, isa: str, widths: tuple[int, ...], sides: tuple[int, int]
) -> None:
    cases = (PeakCase(widths, side, getattr(torch, dtype), isa=isa) for side in sides)
    (small, estimate_of_small), (large, estimate_of_large) = (case.measure() for case in cases)
    assert estimate_of_small >= small and estimate_of_large >= large
    assert 1 <= (estimate_of_large - estimate_of_small) / (large - small) <= 1.3


def test_where_a_convolution_unfolds_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert not unfolds(cpu, torch.float32)
    assert not unfolds(torch.device("cuda"), torch.bfloat16)
    for native in (True, False):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda native=native: native)
        assert unfolds(cpu, torch.bfloat16) != native
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert unfolds(cpu, torch.float32)


@pytest.mark.parametrize("capability", [(7, 0), (7, 5), (8, 0), (9, 0)])
def test_which_devices_compute_in_bfloat16(capability: tuple[int, int]) -> None:
    reason = lacks_bfloat16("a card", capability)
    assert bool(reason) == (capability < (8, 0))
    assert not reason or f"got a card of {capability[0]}.{capability[1]}; use dtype=None" in reason


# Attention


class _Largest(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


def _decoder() -> Decoder:
    kinds = ("UpDecoderBlock2D",)
    return Decoder(4, 3, kinds, (8,), layers_per_block=1, norm_num_groups=4).eval().requires_grad_(False)


def test_eager_attention_holds_no_square_matrix() -> None:
    with torch.no_grad(), _Largest() as largest:
        _decoder()(torch.randn(1, 4, 48, 48))
    assert 8 * 48 * 48 <= largest.numbers < (48 * 48) ** 2 / 16


@needs.needs_aot
def test_exported_attention_stays_one_operator() -> None:
    decoder = _decoder()
    region = DecoderRegion(DECODER, decoder, decoder.forward)
    sizes = {"batch": 1, "height": 16, "width": 24}
    bucket = bucket_of(region, {}, sizes, "symbolic", 2)
    device = torch.device("cpu")
    graph = RegionGraph(region, {}, bucket, example_sizes(bucket, sizes), torch.float32, device)
    program, _ = export_region(graph)
    targets = {str(node.target) for node in program.graph.nodes}
    assert "aten.scaled_dot_product_attention.default" in targets
    assert not {name for name in targets if "softmax" in name or "bmm" in name}


# In a pipeline


def accelerated(**config: Any) -> Any:
    pipe = models.build("sdxl", "text2img")
    return ah.accelerate(pipe, backend="eager", decode=DecodeConfig(**config))


def request(pipe: Any, **changes: Any) -> Tensor:
    arguments = models.arguments("sdxl", "text2img", 128, 192, num_inference_steps=2)
    return torch.from_numpy(pipe(**{**arguments, "output_type": "np", **changes}).images)


def test_the_default_changes_no_bit() -> None:
    plain = request(models.build("sdxl", "text2img"))
    assert torch.equal(request(accelerated().pipe), plain)
    assert torch.equal(request(accelerated(tiles="never").pipe), plain)


def test_tiles_are_said_once_and_in_explain(caplog: pytest.LogCaptureFixture) -> None:
    handle = accelerated(tiles="auto", max_memory=1, tile=64, overlap=16)
    with caplog.at_level(logging.INFO, "accel_hidiff"):
        tiled = request(handle.pipe)
        assert torch.equal(request(handle.pipe), tiled)
    told = [record.message for record in caplog.records if "tiles" in record.message]
    assert told == ["the VAE decodes 192x128 in 12 tiles of 64x56"]
    assert handle.explain(128, 192, 2).rows[-1].topology == "VAE decoder, tiles of 64x56"
    plain = request(models.build("sdxl", "text2img"))
    assert 0 < float((tiled - plain).abs().mean()) < 0.1
    handle.remove()
    assert torch.equal(request(handle.pipe), plain)


def test_images_are_tiled_one_by_one() -> None:
    handle = accelerated(tiles="always", tile=64, overlap=16)
    latents = torch.randn(2, 4, 16, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        both = handle.pipe.vae.decode(latents).sample
        single = [handle.pipe.vae.decode(one[None]).sample for one in latents]
    assert torch.equal(both, torch.cat(single))


def test_whoever_gives_more_than_latents_decodes_whole() -> None:
    """A mask or an image is of the batch and of the whole picture: decoders of asymmetric VAEs take both."""
    handle = accelerated(tiles="always", tile=64, overlap=16)
    seen: list[tuple[Any, ...]] = []
    region = handle._installed.decoder.region
    inner = region.inner
    region.inner = lambda *given: seen.append(given) or inner(given[0])
    latents, mask = torch.randn(2, 4, 16, 24), torch.ones(2, 1, 128, 192)
    with torch.no_grad():
        handle.pipe.vae.decoder(latents, None)
        assert len(seen) > 2 and {given[0].shape[0] for given in seen} == {1}
        seen.clear()
        handle.pipe.vae.decoder(latents, mask)
    ((given, beside),) = seen
    assert torch.equal(given, latents) and beside is mask


def test_a_gpus_compiled_decoder_takes_a_batch_image_by_image(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = accelerated()
    monkeypatch.setattr(ServedDecoder, "_one_by_one", lambda self, device: True)
    seen: list[int] = []
    run = ServedDecoder._run
    monkeypatch.setattr(
        ServedDecoder, "_run", lambda self, vae, cells: seen.append(len(cells)) or run(self, vae, cells)
    )
    vae = handle.pipe.vae.to(memory_format=torch.channels_last)
    latents = torch.randn(3, 4, 16, 24, generator=torch.Generator().manual_seed(0))
    latents = latents.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        both = vae.decode(latents).sample
        assert seen == [1, 1, 1]
        single = [vae.decode(one[None]).sample for one in latents]
    assert torch.equal(both, torch.cat(single)) and both.is_contiguous(memory_format=torch.channels_last)


def test_which_decoders_go_image_by_image() -> None:
    decoder = accelerated()._installed.decoder
    assert not decoder._one_by_one(torch.device("cuda")), "eager ones decode as they did"
    decoder.dispatcher.binder.backend = SimpleNamespace(name="aot")
    assert decoder._one_by_one(torch.device("cuda")) and not decoder._one_by_one(torch.device("cpu"))
    few = {"dtype": torch.bfloat16, "device": torch.device("cuda")}
    decoder.config = DecodeConfig(max_memory=10 * GIB)
    decoder._widths = SDXL
    assert decoder.tiles(256, 256, 8, **few) is None, "the memory of one image"


@needs.needs_aot
def test_the_graph_of_a_tile_is_needed(tmp_path: Path) -> None:
    def needed(decode: DecodeConfig) -> dict[str, int]:
        pipe = models.build("sdxl", "text2img")
        handle = ah.accelerate(pipe, cache=tmp_path, shapes="exact", on_miss="eager", decode=decode)
        (sizes,) = [
            {name: size.minimum for name, size in graph.bucket.dims.items()}
            for call in handle.needed([(128, 192)]).calls
            for graph, _ in call
            if graph.region.kind == "decoder"
        ]
        return sizes

    assert needed(DecodeConfig()) == {"batch": 1, "height": 16, "width": 24}
    assert needed(DecodeConfig(tiles="always", tile=64, overlap=16)) == {"batch": 1, "height": 7, "width": 8}


# bfloat16


def test_bfloat16_leaves_the_vae_alone() -> None:
    pipe = models.build("sdxl", "text2img")
    plain = request(pipe)
    before = {name: (id(value), value.dtype, value.clone()) for name, value in pipe.vae.named_parameters()}
    handle = ah.accelerate(pipe, backend="eager", decode=DecodeConfig(dtype="bfloat16"))
    narrow = request(pipe)
    assert (
        pipe.vae.dtype == torch.float32
        and handle._installed.decoder.region.module.conv_in.weight.dtype == torch.bfloat16
    )
    assert 0 < float((narrow - plain).abs().max()) < 0.05
    handle.remove()
    for name, value in pipe.vae.named_parameters():
        identity, dtype, bits = before[name]
        assert (id(value), value.dtype) == (identity, dtype) and torch.equal(value, bits)
    assert torch.equal(request(pipe), plain)


def test_bfloat16_follows_the_weights() -> None:
    pipe = models.build("sdxl", "text2img")
    handle = ah.accelerate(pipe, backend="eager", decode=DecodeConfig(dtype="bfloat16"))
    latents = torch.randn(1, 4, 8, 8)
    bound = handle._installed.decoder.region.module.conv_in.weight
    with torch.no_grad():
        first = pipe.vae.decode(latents).sample
        pipe.vae.decoder.conv_out.bias += 1
        in_place = pipe.vae.decode(latents).sample
        pipe.vae.to(torch.float64).to(torch.float32)  # other tensors, as a pipeline casts it for each decode
        replaced = pipe.vae.decode(latents).sample
    assert first.dtype == torch.float32
    torch.testing.assert_close(in_place, first + 1, atol=0.05, rtol=0)
    assert torch.equal(replaced, in_place)
    assert handle._installed.decoder.region.module.conv_in.weight is bound  # what is bound to it stays bound


def test_a_raised_float16_vae_is_looked_at_as_it_decodes() -> None:
    pipe = models.build("sdxl", "text2img").to(torch.float16)
    pipe.vae.register_to_config(force_upcast=True)
    for dtype, decodes_in, raised in (
        (None, torch.float32, torch.float32),
        ("bfloat16", torch.bfloat16, torch.float16),
    ):
        handle = ah.accelerate(pipe, backend="eager", decode=DecodeConfig(dtype=dtype))
        with handle._graphs.in_decoder_precision():
            ((graph, _),) = handle._graphs.decoder(128, 192, 1)
            assert pipe.vae.dtype == raised
        assert graph.dtype == decodes_in and pipe.vae.dtype == torch.float16
        handle.remove()


def test_another_structure_is_refused() -> None:
    pipe = models.build("sdxl", "text2img")
    ah.accelerate(pipe, backend="eager", decode=DecodeConfig(dtype="bfloat16"))
    pipe.vae.decoder.conv_out.bias = None
    with pytest.raises(BadInput, match=r"decode\.dtype: expected a VAE decoder of the same structure"), torch.no_grad():
        pipe.vae.decode(torch.randn(1, 4, 8, 8))


def test_accelerate_refuses_another_type() -> None:
    with pytest.raises(BadInput, match="decode: expected a DecodeConfig or None, got dict"):
        ah.accelerate(models.build("sdxl", "text2img"), backend="eager", decode={"tiles": "auto"})  # type: ignore[arg-type]
