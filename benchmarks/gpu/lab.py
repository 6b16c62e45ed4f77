"""What the cases of one process share: models, the ways to run them, figures of earlier cases."""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel

import accel_hidiff as ah
from accel_hidiff.backends.aot import AOTBackend
from accel_hidiff.target import Target
from benchmarks import harness as h
from benchmarks.gpu.carried import Package, packages_of
from benchmarks.gpu.journal import Figures
from benchmarks.gpu.model import inputs_of, make_unet, make_vae, pipeline_of, twin
from benchmarks.gpu.setting import Setting, Variant
from benchmarks.roofline import Ceilings, Work, count
from compile_cache import CompileCache

BATCHES = (h.GUIDANCE_BATCH,)


class NotHere(Exception):
    """A case that this machine cannot run; the message says what it needs."""


class Lab:
    """Everything is made when a case first asks for it.

    Args:
        setting: of the run.

    Attributes:
        ceilings: once a case has measured them.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.device = torch.device(setting.device)
        self.ceilings: Ceilings | None = None
        self._served: dict[str, Served | Exception] = {}
        self._work: dict[tuple[str, str], Work] = {}
        self.unet, self.vae = cache(self._make_unet), cache(self._make_vae)
        self.stock, self.patched = cache(self.another), cache(self._make_patched)

    @property
    def sizes(self) -> tuple[h.Size, ...]:
        """The setting's."""
        return tuple(h.Size(*size) for size in self.setting.sizes)

    def _make_unet(self, dtype: str) -> UNet2DConditionModel:
        return make_unet(self.setting.tiny, self.device, getattr(torch, dtype))

    def _make_vae(self, dtype: str) -> AutoencoderKL:
        return make_vae(self.setting.tiny, self.device, getattr(torch, dtype))

    def _make_patched(self, dtype: str) -> tuple[StableDiffusionXLPipeline, ah.Patch]:
        pipe = self.another(dtype)
        return pipe, ah.apply_hidiffusion(pipe)

    def eager(self, dtype: str) -> ah.Patch:
        """HiDiffusion on a pipeline (`patched` has that too), nothing compiled."""
        return self.patched(dtype)[1]

    def another(self, dtype: str, memory_format: str = "channels_last") -> StableDiffusionXLPipeline:
        """A pipeline over the same weights, to be patched; over a copy of them where they lie otherwise in memory."""
        parts = self.unet(dtype), self.vae(dtype)
        if memory_format == "channels_last":
            return pipeline_of(*map(twin, parts))
        return pipeline_of(*(copy.deepcopy(part).to(memory_format=torch.contiguous_format) for part in parts))

    def variant(self, name: str) -> Variant:
        """The setting's variant of a name."""
        return next(variant for variant in self.setting.variants if variant.name == name)

    def served(self, name: str) -> Served:
        """A variant's packages over the same weights; made once, which `Served.figures` tells of.

        Raises:
            WrongOutput: a package is missing.
            Exception: whatever loading raised, each time.
        """
        if name not in self._served:
            try:
                self._served[name] = Served(self, self.variant(name))
            except Exception as problem:
                self._served[name] = problem.with_traceback(None)  # its frames hold memory
        found = self._served[name]
        if isinstance(found, Exception):
            raise found
        return found

    def served_of(self, dtype: str) -> dict[str, Served]:
        """All variants of a dtype that can be loaded; why another one cannot is told where it is loaded."""
        found = {}
        for variant in self.setting.of_dtype(dtype):
            with suppress(Exception):
                found[variant.name] = self.served(variant.name)
        return found

    def step_of(self, size: h.Size, topology: str) -> int:
        """The first step of a topology in a request.

        Raises:
            NotHere: a request of this size has none of it.
        """
        steps = {str(found): step for found, step in h.topology_steps(self.eager(self.main), size).items()}
        if topology not in steps:
            raise NotHere(f"a request of {size} has {', '.join(steps)} only")
        return steps[topology]

    @property
    def main(self) -> str:
        """The dtype of the first variant."""
        return self.setting.dtypes[0]

    def call_of(self, patch: ah.Patch, dtype: str, size: h.Size, topology: str) -> h.StepCall:
        """The call that is timed: a topology's first step at a size, with the dispatch that belongs to it."""
        return h.StepCall(patch, inputs_of(self.unet(dtype), size), self.step_of(size, topology), h.NUM_STEPS)

    def work_of(self, size: h.Size, topology: str, run: Callable[[], object]) -> Work:
        """What an eager call asks for; counted once."""
        name = str(size), topology
        if name not in self._work:
            self._work[name] = count(run)
        return self._work[name]

    def interleave(self, contestants: Mapping[str, Callable[[], object]]) -> dict[str, h.Timing]:
        """Times contestants in turns, for some seconds at most."""
        return h.interleave(contestants, self.setting.repeats, limit_s=10.0)

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak_mb(self, run: Callable[[], object]) -> float | None:
        """Megabytes that a call takes at most beside what is there already; None on a CPU."""
        if self.device.type != "cuda":
            run()
            return None
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        run()
        self.synchronize()
        return h.rounded((torch.cuda.max_memory_allocated(self.device) - before) / 1e6)

    def tidy(self) -> None:
        """Gives memory back that no tensor uses.

        Raises:
            RuntimeError: the device does not answer any more.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()


class Served:
    """A variant over the lab's weights: its packages, from a cache and from nowhere else.

    Args:
        lab: has the weights.
        variant: which.

    Attributes:
        pipe: the pipeline.
        handle: on it.
        figures: seconds to load, and to run each size once.

    Raises:
        WrongOutput: a package is missing, or something was compiled.
    """

    def __init__(self, lab: Lab, variant: Variant) -> None:
        self.pipe = lab.another(variant.dtype, variant.memory_format)
        store = CompileCache(Path(lab.setting.caches) / variant.name)
        options: dict[str, Any] = {
            "cache": store,
            "on_miss": "error",
            "cuda_graphs": "off",
        }  # they are a case of their own
        self.handle = ah.accelerate(self.pipe, hidiffusion=ah.HiDiffusionConfig(), **options)
        start = time.perf_counter()
        filled = fill(self.handle, lab.setting.all_pixels, packages_of(Path(lab.setting.carried), variant.name))
        filled_s = time.perf_counter() - start
        if missing := self.handle.missing(
            self.handle.needed(lab.setting.all_pixels, (h.NUM_STEPS,), batch_sizes=BATCHES)
        ):
            raise h.WrongOutput(f"{variant.name}: expected every package to be carried, {next(iter(missing.values()))}")
        told = self.handle.load(lab.setting.pixels, h.NUM_STEPS, batch_sizes=BATCHES, warm=True)
        lab.synchronize()
        self.figures: Figures = {
            **filled, "filled_s": h.rounded(filled_s), "load_s": h.rounded(told.load_seconds),
            "regions": told.regions, "warm_calls": told.warm_calls, "warm_s": h.rounded(told.warm_seconds),
            "too_large": list(told.too_large),
        }  # fmt: skip
        self.require_served(variant.name)

    def require_served(self, name: str) -> None:
        """WrongOutput if anything was compiled or ran eager: figures are not those of the packages then."""
        stats = self.handle.stats
        if stats.compiles or stats.eager_calls:
            told = f"{stats.compiles} compilations and {stats.eager_calls} eager calls"
            raise h.WrongOutput(f"{name}: expected calls from the cache only, got {told}")


# Packages and the graphs that they are for


def slots_of(handle: ah.Handle, pixels: list[tuple[int, int]]) -> dict[str, Any]:
    """The graphs that requests of these sizes need, by slot: what keys them, less who compiles them and how."""
    needed = handle.needed(pixels, (h.NUM_STEPS,), batch_sizes=BATCHES)
    return {graph.key({}).digest: graph for graph in needed.distinct.values()}


def fill(handle: ah.Handle, pixels: list[tuple[int, int]], packages: Mapping[str, Package]) -> Figures:
    """Puts carried packages under the keys by which a handle looks for them.

    Returns:
        How many of them it needs, and how many had the same key where they were compiled.
    """
    assert handle.cache is not None, "a handle of packages has a cache"
    filled, same, known = 0, 0, set[str]()
    # Which graphs are needed depends on what is there: a package that does not serve a size asks for another one.
    while new := {slot: graph for slot, graph in slots_of(handle, pixels).items() if slot not in known}:
        known |= set(new)
        for slot in packages.keys() & set(new):
            graph, package = new[slot], packages[slot]
            key = graph.key(AOTBackend().factors(graph.device))
            handle.cache.get_or_build(key, partial(_place, package))
            filled += 1
            same += key.digest == package.key
    return {"packages": filled, "same_keys": same}


def _place(package: Package, folder: Path) -> Mapping[str, Any]:
    for name, file in package.files.items():
        shutil.copy(file, folder / name)
    return package.notes


def packages_in(
    cache: CompileCache, handle: ah.Handle, pixels: list[tuple[int, int]], target: Target | None
) -> tuple[list[Package], list[str]]:
    """The packages in a cache that requests of these sizes need, and the regions whose package it lacks.

    Args:
        cache: of this checkout.
        handle: on a pipeline, which needs no weights, with this cache.
        pixels: (height, width).
        target: what they are for; None: this machine's CPU.
    """
    backend, found, lacking = AOTBackend(target), [], []
    for slot, graph in slots_of(handle, pixels).items():
        entry = cache.get(graph.key(backend.factors(graph.device)))
        if entry is None:
            lacking.append(graph.region.path)
            continue
        found.append(Package(slot, entry.digest, {name: entry.path / name for name in entry.files}, entry.notes))
    return found, lacking


def timing_fields(times: Mapping[str, h.Timing]) -> Figures:
    """Median and spread of each contestant, in milliseconds of wall time."""
    fields: Figures = {}
    for name, timing in times.items():
        fields |= {key: value for key, value in timing.fields(name).items() if "_cpu_" not in key}
    return fields


def ratio(times: Mapping[str, h.Timing], name: str, other: str) -> Figures:
    """One median over another."""
    return {f"{name}_over_{other}_ratio": h.rounded(times[name].median / times[other].median, 3)}
