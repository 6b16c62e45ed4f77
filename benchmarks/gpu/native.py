"""Regions compiled on this machine, beside the carried packages of the same graphs."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any, Final

import torch

from accel_hidiff.backends.aot import AOTBackend
from accel_hidiff.binder import BoundCall
from accel_hidiff.packages.archive import read_archive
from benchmarks import harness as h
from benchmarks.gpu.journal import Case, Figures
from benchmarks.gpu.lab import BATCHES, Lab, ratio, timing_fields
from benchmarks.gpu.model import compare
from compile_cache import CacheKey, CompileCache, Entry

_SHOWN: Final = 8  # kernels whose configurations differ
_LAUNCH: Final = re.compile(
    r"uint32_t grid_0 = (?P<grid>[^;]+);"
    r"|launchKernel\(kernels_?\.(?P<kernel>\w+), grid_0, grid_1, grid_2, (?P<warps>\d+), (?P<shared>\d+),"
)


def measure_native(lab: Lab, case: Case, figures: Figures) -> None:
    """One region: seconds to compile it here, what differs in the packages, and both in turns.

    Raises:
        WrongOutput: they do not give the same.
    """
    handle = lab.served(case["variant"]).handle
    needed = handle.needed(lab.setting.pixels[:1], (h.NUM_STEPS,), batch_sizes=BATCHES)
    graph, sizes = next(pair for call in needed.calls for pair in call if pair[0].region.kind == case["region"])
    backend = AOTBackend()
    key = graph.key(backend.factors(graph.device))
    assert handle.cache is not None, "a handle of packages has a cache"
    carried = handle.cache.get(key)
    if carried is None:
        raise h.WrongOutput(f"{graph.region.path}: expected its package to be carried, it is not in the cache")
    figures["path"] = graph.region.path
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        made = backend.prepare(graph, CompileCache(Path(folder)))
        figures["compile_s"] = h.rounded(made.seconds)
        figures |= _differences(graph.device, {"carried": carried, "native": made.entry})
        calls = {"carried": _bound(backend, graph, carried, key, sizes)}
        calls["native"] = _bound(backend, graph, made.entry, key, sizes)
        inputs = graph.region.example(graph.traits, sizes, graph.dtype, graph.device)
        outs = [call(*inputs) for call in calls.values()]
        figures |= compare(graph.region.path, outs[0], outs[1])
        times = lab.interleave({name: lambda call=call: call(*inputs) for name, call in calls.items()})
    figures |= timing_fields(times) | ratio(times, "carried", "native")


def _bound(backend: AOTBackend, graph: Any, entry: Entry, key: CacheKey, sizes: Any) -> BoundCall:
    bound = backend.bind(graph, entry)
    assert bound is not None, "an artifact of this backend binds"
    return BoundCall(bound, graph.region, key, sizes)


def _differences(device: torch.device, entries: dict[str, Entry]) -> Figures:
    """Whether the packages are the same bytes; and on a GPU, which kernels they share, in which configurations."""
    one, other = ({name: ref.sha256 for name, ref in entry.files.items()} for entry in entries.values())
    figures: Figures = {"same_bytes": one == other}
    if device.type != "cuda":
        return figures
    found = {name: launches(read_archive(entry.path / "package.pt2").wrapper) for name, entry in entries.items()}
    figures |= {f"{name}_kernels": len(configurations) for name, configurations in found.items()}
    carried, native = found.values()
    both = sorted(carried.keys() & native.keys())
    others = [name for name in both if carried[name] != native[name]]
    figures |= {"kernels_of_both": len(both), "same_configurations": len(both) - len(others)}
    figures["other_configurations"] = {name: f"{carried[name]} | {native[name]}" for name in others[:_SHOWN]}
    return figures


def launches(wrapper: str) -> dict[str, str]:
    """Each Triton kernel's configuration, as the source of a package launches it: grid, warps, shared memory.

    >>> text = "uint32_t grid_0 = ((xnumel + (256 - 1)) / (256));"
    >>> launches(text + " launchKernel(kernels_.triton_poi_1, grid_0, grid_1, grid_2, 4, 0, args, stream);")
    {'triton_poi_1': '((xnumel + (256 - 1)) / (256)), 4 warps, 0 B'}
    """
    found, grid = {}, ""
    for line in _LAUNCH.finditer(wrapper):
        if line["grid"] is not None:
            grid = line["grid"]
        else:
            found[line["kernel"]] = f"{grid}, {line['warps']} warps, {line['shared']} B"
    return found
