"""What tiles and bfloat16 do to decoded pictures, and what a decode takes of memory against its estimate.

`seams`: pictures of drawn scenes, encoded by the trained demo VAE and decoded whole and in tiles; differences of pixels
in [-1, 1], mean and largest, within the overlaps of tiles and elsewhere, beside the mean error of the whole decode
against the picture itself. The demo VAE has no attention and one group per norm, so that a norm sees all of a tile.
`dtype`: the same pictures decoded in bfloat16 against float32; the weights of the demo VAE are float16 numbers.
`forms`: the same in channels_last, by the operators' own forms and by those that a GPU's graph is traced in
(`accel_hidiff.forms`), which run on the CPU here, and each in float32 too. The demo VAE has no attention: that is
compared on drawn numbers, one head of 512, whose queries attend to many keys or (`sharp`) to few; relative errors.
`memory`: the resident memory that a decode of random weights adds in a process of its own, at its peak, and the
estimate; with `isa`, oneDNN is told to use no more than those instructions. Linux only: its kernel knows the peak, and
its heap is told to give every block back (`man mallopt`), so that two runs give the same number. The estimate allows
for a heap that does not.
"""

from __future__ import annotations

import copy
import itertools
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import Decoder
from torch import Tensor

from accel_hidiff.decoding import Decode, InDtype, Tiles, decode_in_tiles, unfolds
from accel_hidiff.demo import scenes
from accel_hidiff.demo.trained import trained_model
from accel_hidiff.forms import attention, forms_of
from benchmarks import harness as h

SIZES = (h.Size(512, 512), h.Size(768, 448))
TILES = (128, 256)
OVERLAPS = (0, 16, 32, 64, 96, 128)
MEMORY = (((32, 64, 128, 128), 512), ((32, 64, 128, 128), 1024), ((128, 256, 512, 512), 256))
TOKENS, HEAD = 4096, 512  # of attention
_GIVEN_BACK = 1 << 16  # bytes of a block from which on the heap gives it back at once


def picture(seed: int, size: h.Size) -> Tensor:
    """(1, 3, height, width) in [-1, 1]: a drawn scene."""
    scene = scenes.random_scene(numpy.random.default_rng(seed), aspect=size.width / size.height)
    pixels = torch.from_numpy(scenes.draw(scene, size.height, size.width).copy())
    return pixels.permute(2, 0, 1)[None].float() / 127.5 - 1


def seam_mask(tiles: Tiles, height: int, width: int) -> Tensor:
    """(height, width) of bool: pixels within 8 of an edge of a tile, or in an overlap."""
    mask = torch.zeros(height, width, dtype=torch.bool)
    for starts, side, axis in ((tiles.tops, tiles.height, 0), (tiles.lefts, tiles.width, 1)):
        for before, after in itertools.pairwise(starts):
            low, high = after * 8 - 8, (before + side) * 8 + 8
            mask[(slice(low, high), slice(None)) if axis == 0 else (slice(None), slice(low, high))] = True
    return mask


def jump(image: Tensor, whole: Tensor, tiles: Tiles) -> float:
    """The mean step of the difference between two neighbouring pixels on both sides of where a tile begins or ends."""
    difference = image - whole
    steps = []
    for starts, side, axis in ((tiles.tops, tiles.height, 2), (tiles.lefts, tiles.width, 3)):
        step = difference.diff(dim=axis).abs()
        edges = [start * 8 for start in starts[1:]] + [(start + side) * 8 for start in starts[:-1]]
        steps += [step.select(axis, edge - 1).mean() for edge in edges]
    return float(torch.stack(steps).mean())


def seams(report: h.Report, vae: Any, sizes: tuple[h.Size, ...], seeds: int) -> None:
    """One record for each size, tile and overlap: means over the pictures, and the largest difference."""
    for size in sizes:
        pictures = [picture(seed, size) for seed in range(seeds)]
        latents = [vae.post_quant_conv(vae.encode(image).latent_dist.mode()) for image in pictures]
        wholes = [vae.decoder(cells) for cells in latents]
        own = [float((whole - image).abs().mean()) for whole, image in zip(wholes, pictures, strict=True)]
        for tile in TILES:
            for overlap in (pixels for pixels in OVERLAPS if pixels <= tile // 2):
                tiles = Tiles.of(size.height // 8, size.width // 8, tile // 8, overlap // 8)
                mask = seam_mask(tiles, size.height, size.width)
                rows = []
                for cells, whole, image in zip(latents, wholes, pictures, strict=True):
                    tiled = decode_in_tiles(vae.decoder, cells, tiles)
                    off = (tiled - whole).abs()
                    at = float(off[..., mask].mean())
                    elsewhere = float(off[..., ~mask].mean())
                    error = float((tiled - image).abs().mean())
                    rows.append((float(off.mean()), at, elsewhere, jump(tiled, whole, tiles), error, float(off.max())))
                mean, at, elsewhere, step, error = (sum(row[k] for row in rows) / len(rows) for k in range(5))
                report.add(
                    what="seams",
                    size=str(size),
                    tile=tile,
                    overlap=overlap,
                    **h.rounded_row(
                        {
                            "tiles": tiles.count,
                            "pictures": seeds,
                            "mean": mean,
                            "mean_at_seams": at,
                            "mean_elsewhere": elsewhere,
                            "step_at_edges": step,
                            "max": max(row[5] for row in rows),
                            "own_error_tiled": error,
                            "own_error_whole": sum(own) / len(own),
                        }
                    ),
                )


def dtypes(report: h.Report, vae: Any, sizes: tuple[h.Size, ...], seeds: int) -> None:
    """Differences of the decode in bfloat16 from that in float32, in [-1, 1] and in grey levels of 255."""
    for size in sizes:
        latents = []
        for seed in range(seeds):
            latents.append(vae.post_quant_conv(vae.encode(picture(seed, size)).latent_dist.mode()))
        narrow = InDtype(vae.decoder, torch.bfloat16).module
        off = torch.stack([(narrow(cells.bfloat16()).float() - vae.decoder(cells)).abs() for cells in latents])
        grey = {"mean_levels": float(off.mean()) * 127.5, "max_levels": float(off.max()) * 127.5}
        differences = {"mean": float(off.mean()), "max": float(off.max()), **grey}
        report.add(what="dtype", size=str(size), dtype="bfloat16", pictures=seeds, **h.rounded_row(differences))


def formed(report: h.Report, vae: Any, sizes: tuple[h.Size, ...], seeds: int) -> None:
    """Differences of decodes by a GPU's forms from the plain one in float32, beside those of plain ones."""
    gpu = torch.device("cuda"), torch.channels_last
    decoders = {"float32": copy.deepcopy(vae.decoder), "bfloat16": InDtype(vae.decoder, torch.bfloat16).module}
    for decoder in decoders.values():
        decoder.to(memory_format=torch.channels_last)
    for size in sizes:
        latents = [vae.post_quant_conv(vae.encode(picture(seed, size)).latent_dist.mode()) for seed in range(seeds)]
        wholes = [vae.decoder(cells) for cells in latents]
        for (dtype, decoder), forms in itertools.product(decoders.items(), (False, True)):
            offs = []
            for cells, whole in zip(latents, wholes, strict=True):
                given = cells.to(dtype=getattr(torch, dtype), memory_format=torch.channels_last)
                with forms_of(*gpu) if forms else nullcontext():
                    offs.append((decoder(given).float() - whole).abs())
            off = torch.stack(offs)
            levels = {"mean_levels": float(off.mean()) * 127.5, "max_levels": float(off.max()) * 127.5}
            report.add(what="forms", size=str(size), dtype=dtype, forms=forms, pictures=seeds, **h.rounded_row(levels))


def attention_errors(report: h.Report, tokens: int) -> None:
    """Relative errors of attention in bfloat16 against float64, by torch's kernel and by a GPU's form."""
    for sharp in (1, 4):
        draw = torch.Generator().manual_seed(0)
        query, key, value = (torch.randn(1, 1, tokens, HEAD, generator=draw) for _ in range(3))
        query, key, value = (tensor.bfloat16() for tensor in (query * sharp, key, value))
        want = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
        made = {"plain": F.scaled_dot_product_attention(query, key, value), "form": attention(query, key, value)}
        errors = {name: float((out.double() - want).norm() / want.norm()) for name, out in made.items()}
        report.add(what="attention", tokens=tokens, head=HEAD, sharp=sharp, dtype="bfloat16", **h.rounded_row(errors))


@dataclass(frozen=True)
class PeakCase:
    """One decode whose memory is measured, in a process of its own.

    Args:
        widths: the decoder's `block_out_channels`.
        side: of the image, in pixels.
        isa: `ONEDNN_MAX_CPU_ISA`; "": all that the CPU has.
    """

    widths: tuple[int, ...]
    side: int
    dtype: torch.dtype
    memory_format: torch.memory_format = torch.contiguous_format
    compiled: bool = False
    isa: str = ""

    @property
    def cells(self) -> int:
        """Side of the latents."""
        return self.side >> len(self.widths) - 1

    def told(self) -> list[str]:
        """Its fields on the command line of the process that measures it."""
        names = (str(name).removeprefix("torch.") for name in (self.dtype, self.memory_format))
        return [",".join(map(str, self.widths)), str(self.side), *names, str(int(self.compiled))]

    @classmethod
    def of(cls, told: Sequence[str]) -> PeakCase:
        """The inverse of `told`, but for `isa`, which is in the environment."""
        widths, side, dtype, memory_format, compiled = told
        sizes = tuple(map(int, widths.split(",")))
        return cls(sizes, int(side), getattr(torch, dtype), getattr(torch, memory_format), bool(int(compiled)))

    def measure(self) -> tuple[int, int]:
        """Bytes: measured, in a process of its own, and estimated for the CPU as that process found it."""
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(_GIVEN_BACK), "ONEDNN_MAX_CPU_ISA": self.isa}
        command = [sys.executable, "-m", "benchmarks.decoding", "--peak", *self.told()]
        done = subprocess.run(command, cwd=h.ROOT, env=environment, check=True, capture_output=True, text=True)
        measured, estimate = map(int, done.stdout.splitlines()[-1].split())
        return measured, estimate


def peak_of(case: PeakCase) -> int:
    """Bytes of resident memory that a decode adds at its peak, in this process."""
    kinds = ("UpDecoderBlock2D",) * len(case.widths)
    decoder = Decoder(4, 3, kinds, case.widths, layers_per_block=2, norm_num_groups=32).eval().requires_grad_(False)
    decoder.to(dtype=case.dtype, memory_format=case.memory_format)  # type: ignore[call-overload]
    decode = torch.compile(decoder, dynamic=True) if case.compiled else decoder
    decode(torch.randn(1, 4, 6, 8, dtype=case.dtype))  # compiled for any size
    latents = torch.randn(1, 4, case.cells, case.cells, dtype=case.dtype)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew (`man proc_pid_clear_refs`)
    decode(latents)
    return _status("VmHWM") - before


def _status(name: str) -> int:
    """Bytes, from what the kernel tells of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def memory(report: h.Report, cases: Iterable[PeakCase]) -> None:
    """One record for each case."""
    for case in cases:
        measured, estimate = case.measure()
        rounded = h.rounded_row(
            {"measured_mb": measured / 1e6, "estimate_mb": estimate / 1e6, "estimate_ratio": estimate / measured}
        )
        _, _, dtype, memory_format, _ = case.told()
        report.add(
            what="memory",
            widths=case.widths,
            side=case.side,
            dtype=dtype,
            memory_format=memory_format,
            compiled=case.compiled,
            isa=case.isa,
            **rounded,
        )


def memory_cases(tiny: bool) -> Iterator[PeakCase]:
    """Every dtype and layout at every size; compiled at the smallest; and what a CPU without AVX-512 needs."""
    for widths, side in MEMORY[:1] if tiny else MEMORY:
        for dtype in (torch.float32, torch.bfloat16):
            for memory_format in (torch.contiguous_format, torch.channels_last):
                yield PeakCase(widths, side, dtype, memory_format)
    widths, _ = MEMORY[0]
    for dtype in (torch.float32, torch.bfloat16):
        yield PeakCase(widths, 384, dtype, compiled=True)
    for compiled in (False, True):
        yield PeakCase(widths, 384, torch.bfloat16, compiled=compiled, isa="AVX2")


@torch.no_grad()
def main() -> None:
    if sys.argv[1:2] == ["--peak"]:
        torch.manual_seed(0)
        torch.set_num_threads(1)
        case = PeakCase.of(sys.argv[2:])
        unfolded = unfolds(torch.device("cpu"), case.dtype)
        decode = Decode(
            case.cells, case.cells, 1, case.widths, case.dtype.itemsize, "cpu", case.compiled, unfolded=unfolded
        )
        print(peak_of(case), decode.peak_bytes())
        return
    parser = h.arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=16, help="pictures of each size")
    parser.add_argument("--only", choices=("seams", "dtype", "forms", "memory"), help="one part; default: all")
    options = h.parsed(parser)
    report = h.Report(options.out, options.tiny)
    vae = AutoencoderKL.from_pretrained(trained_model() / "vae").eval()
    sizes = tuple(options.size or (SIZES[:1] if options.tiny else SIZES))
    seeds = 1 if options.tiny else options.seeds
    if options.only in (None, "seams"):
        seams(report, vae, sizes, seeds)
    if options.only in (None, "dtype"):
        dtypes(report, vae, sizes, seeds)
    if options.only in (None, "forms"):
        formed(report, vae, sizes, seeds)
        attention_errors(report, 256 if options.tiny else TOKENS)
    if options.only in (None, "memory"):
        memory(report, memory_cases(options.tiny))


if __name__ == "__main__":
    main()
