"""What a UNet call and a decode take on an H200, predicted from the packages that a machine without a GPU made.

Method. The regions of full-size SDXL are compiled for a target into a cache of its own (or found in `--cache`), and the
source of each package is read for the sizes of one call at 2048x2048, batch 2: operations of products, convolutions and
attention, and the bytes that Triton's kernels read and write. Divided by the speeds that an H200 reached in the same
kinds of kernels (`packages.prediction.H200`), this is the least that the call can take with these packages. What runs
eager between the regions is not in it: samplers, concatenations, the first and the last convolution.

For each package also: passes over its widest token or image (bytes over the bytes of the region's output), kernels with
64-bit indices, run-time divisions, transposing kernels. Needs the extra `cuda-build` unless the cache is filled.

`--packages` reads packages that something else made, by other means or of another commit: a folder with them and
`calls.json`, which has of each kind of call a list of {"file", "path", "inputs", "times"}: a package, a region's path,
(sizes, dtype, strides) of each input, and how many regions of the call are alike.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

import accel_hidiff as ah
from accel_hidiff.crosscompile.requirements import look
from accel_hidiff.models import load_skeleton
from accel_hidiff.packages.facts import PackageFacts, read_package
from accel_hidiff.packages.prediction import H200, Work, work_of
from accel_hidiff.pipeline import Handle
from accel_hidiff.regions import RegionGraph, Sizes
from accel_hidiff.target import Target
from benchmarks import harness as h
from compile_cache import CompileCache

SIDE = 2048
STEPS = 30
BATCH = 2


def main() -> None:
    parser = h.arguments(__doc__)
    parser.add_argument("--target", default="sm_90", help="what to compile for")
    parser.add_argument("--cache", type=Path, help="a compile cache to fill, or a filled one")
    parser.add_argument("--packages", type=Path, help="a folder of packages that something else made")
    parser.add_argument("--model", default="arch:sdxl", help="an architecture or a diffusers folder")
    options = h.parsed(parser)
    report = h.Report(options.out, options.tiny)
    side = 256 if options.tiny else SIDE
    if options.packages is not None:
        for row in folder_predictions(options.packages):
            report.add(**row)
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        handle = skeleton(options.model, options.target, options.cache or Path(scratch))
        handle.precompile([(side, side)], STEPS, batch_sizes=(BATCH,), jobs=2)
        for row in predictions(handle, side):
            report.add(**row)


def skeleton(model: str, target: str, cache: Path) -> Handle:
    """A model without weights, accelerated for a target."""
    found = look()
    wanted = Target.parse(target, torch=found.torch or "none", triton=found.triton or "none")
    pipe, device = load_skeleton(model, "bfloat16", elsewhere=True)
    options: dict[str, Any] = {"cache": CompileCache(cache), "target": wanted, "memory_format": "channels_last"}
    handle = ah.accelerate(pipe, hidiffusion=ah.HiDiffusionConfig(), **options)
    handle.meant_for = device
    return handle


def predictions(handle: Handle, side: int) -> list[dict[str, Any]]:
    """A row for each distinct package of each kind of call, and one for the call."""
    rows = []
    phases = handle.patch.plan(side, side, STEPS)
    calls = {str(phase.topology): handle._graphs.unet(phase.topology, side, side, BATCH) for phase in phases}
    calls["decoder"] = handle._graphs.decoder(side, side, 1)
    for name, graphs in calls.items():
        alike: dict[tuple[Path, int, int], list[tuple[RegionGraph, Sizes]]] = {}
        for graph, sizes in graphs:
            place = package_of(handle, graph), sizes["height"], sizes["width"]
            alike.setdefault(place, []).append((graph, sizes))
        total = Work()
        for (package, *_), same in alike.items():
            graph, sizes = same[0]
            facts = read(package, graph, sizes)
            work = work_of(facts)
            total += work * len(same)
            rows.append({"call": name, **_row(graph, sizes, facts, work), "times": len(same)})
        rows.append({"call": name, "regions": len(graphs), **_rounded(total.milliseconds(H200))})
    return rows


def folder_predictions(folder: Path) -> list[dict[str, Any]]:
    """The same of packages that something else made (`--packages`)."""
    rows: list[dict[str, Any]] = []
    for name, regions in json.loads((folder / "calls.json").read_text(encoding="utf-8")).items():
        total = Work()
        for region in regions:
            facts = read_package(folder / region["file"], region["inputs"])
            work = work_of(facts)
            total += work * region["times"]
            said = {"region": region["path"], "size": "x".join(map(str, region["inputs"][0][0]))}
            rows.append({"call": name, **said, **_facts(facts, work), "times": region["times"]})
        times = sum(region["times"] for region in regions)
        rows.append({"call": name, "regions": times, **_rounded(total.milliseconds(H200))})
    return rows


def package_of(handle: Handle, graph: RegionGraph) -> Path:
    """Where the package of a graph lies; equal ones at one place."""
    binder = handle._dispatcher.binder
    entry = binder.entry(binder.key(graph))
    if entry is None:
        raise h.WrongOutput(f"{graph.region.path}: expected a package in the cache, found none")
    return entry.path / "package.pt2"


def read(package: Path, graph: RegionGraph, sizes: Sizes) -> PackageFacts:
    """A graph's package, read for the inputs of a call."""
    example = graph.region.example(graph.traits, sizes, graph.dtype, torch.device("meta"))
    inputs = [(tuple(tensor.shape), str(tensor.dtype), tensor.stride()) for tensor in example]
    return read_package(package, inputs)


def _row(graph: RegionGraph, sizes: Sizes, facts: PackageFacts, work: Work) -> dict[str, Any]:
    module: Any = graph.region.module
    image = sizes["batch"] * sizes["height"] * sizes["width"] * 2  # bytes of one channel
    channels = graph.region.channels if graph.region.kind == "transformer" else getattr(module, "out_channels", 0)
    return {
        "region": graph.region.path,
        "size": f"{sizes['batch']}x{graph.region.channels}x{sizes['height']}x{sizes['width']}",
        "passes": h.rounded(work.moved / (image * channels), 3) if channels else 0,
        **_facts(facts, work),
    }


def _facts(facts: PackageFacts, work: Work) -> dict[str, Any]:
    kernels = facts.kernels.values()
    return {
        **_rounded(work.milliseconds(H200)),
        "moved_mb": h.rounded(work.moved / 1e6),
        "int64_kernels": sum(kernel.int64 for kernel in kernels),
        "divisions": max((kernel.divisions for kernel in kernels), default=0),
        "transposing": sum(kernel.transposes for kernel in kernels),
        "nchw_convolutions": sum(
            not call.arguments[0].channels_last for call in facts.convolutions if call.arguments[0]
        ),
    }


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {f"{name.replace(' ', '_')}_ms": h.rounded(value) for name, value in values.items()}


if __name__ == "__main__":
    main()
