"""accelerate(): a diffusers pipeline, HiDiffusion and a compile cache, put together; the user's call stays the same."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch

from accel_hidiff import sealing
from accel_hidiff.backends import create_backend
from accel_hidiff.binder import ArtifactFailed, Binder, Graphs
from accel_hidiff.cfgpp.compiled import CompiledStep
from accel_hidiff.cfgpp.guidance import Guidance, apply_cfgpp
from accel_hidiff.compiling.background import Background
from accel_hidiff.compiling.blueprint import Blueprint
from accel_hidiff.compiling.needed import Needed, Progress, compile_needed
from accel_hidiff.compiling.pool import CompilePool, default_pool
from accel_hidiff.config import (
    CUDA_GRAPHS,
    MEMORY_FORMATS,
    CFGPlusPlusConfig,
    DecodeConfig,
    HiDiffusionConfig,
    OneDiffConfig,
    check_choice,
    check_pixels,
)
from accel_hidiff.dispatch import ON_MISS, Dispatcher
from accel_hidiff.errors import BadInput
from accel_hidiff.explain import ExplainRow, Explanation, PrecompileReport
from accel_hidiff.graphs import RequestGraphs
from accel_hidiff.installed import Installed
from accel_hidiff.patching import Patch, find_unet
from accel_hidiff.regions import RegionGraph
from accel_hidiff.replay import Captures, Replays
from accel_hidiff.schedule import control_steps, running_steps
from accel_hidiff.served import REGIONS
from accel_hidiff.stats import Stats
from accel_hidiff.target import Target
from accel_hidiff.undo import UndoLog
from accel_hidiff.warming import LoadReport, WarmUp
from compile_cache import CacheKey, CompileCache

LOG = logging.getLogger(__name__)

DEFAULT_REGIONS = "blocks"
DEFAULT_SHAPES = "symbolic"
_NO_HIDIFFUSION = HiDiffusionConfig(windowed=False, pooled=False, dilated=False)
_HANDLE = "_accel_hidiff_handle"
SHAPES = ("symbolic", "exact")
_TEXT_TOKENS = 77  # of CLIP


class Handle:
    """An accelerated pipeline. Made by `accelerate`.

    Attributes:
        pipe: the user's pipeline; call it as before.
        cache: the compile cache, None where the backend keeps nothing.
        stats: counters, see `accel_hidiff.stats.Stats`.
    """

    def __init__(
        self,
        pipe: Any,
        dispatcher: Dispatcher,
        installed: Installed,
        guidance: Guidance | None,
        step: CompiledStep,
    ) -> None:
        self.pipe = pipe
        self._dispatcher = dispatcher
        self._installed = installed
        self._guidance = guidance
        self._graphs = RequestGraphs(pipe, dispatcher, installed, None if guidance is None else step)
        self._undo = UndoLog()
        self._undo.replace(pipe, _HANDLE, self, "handle")
        self._warm_up = WarmUp()
        self._sealed = False

    @property
    def meant_for(self) -> torch.device | None:
        """The device that a pipeline without weights (on torch's "meta" device) is looked at for."""
        return self._graphs.meant_for

    @meant_for.setter
    def meant_for(self, device: torch.device | None) -> None:
        self._graphs.meant_for = device

    @property
    def patch(self) -> Patch:
        """The HiDiffusion patch on the pipeline's UNet."""
        return self._installed.patch

    @property
    def stats(self) -> Stats:
        """Counters since this handle was made."""
        return self._dispatcher.binder.stats

    @property
    def keeps_artifacts(self) -> bool:
        """Whether what its backend compiles goes into the cache, for other processes."""
        return self._dispatcher.binder.backend.persistent

    @property
    def cache(self) -> CompileCache | None:
        """The compile cache."""
        return self._dispatcher.binder.cache

    def precompile(
        self,
        sizes: Sequence[tuple[int, int]],
        num_inference_steps: int = 30,
        *,
        batch_sizes: Sequence[int] = (1, 2),
        strength: float = 1.0,
        jobs: int | None = None,
        progress: Progress | None = None,
    ) -> PrecompileReport:
        """Compiles every graph that requests of these sizes need, into the cache. Can be stopped and called again.

        Args:
            sizes: (height, width) in pixels, multiples of 8.
            num_inference_steps: steps of a request's schedule, at least 1: they decide which topologies occur.
            batch_sizes: UNet batches, guidance counted (1 image with guidance: 2).
            strength: of image-to-image and inpainting requests.
            jobs: compile in so many processes, and in none of them with weights; None: in this process, or in one where
                this machine has no GPU for the target.
            progress: called once before and once after each artifact.

        Raises:
            BadInput: a size, a step count or a batch that cannot be.
            CompileFailed: a region cannot be compiled; what was compiled before stays in the cache.
            compile_cache.CacheWriteError: the cache cannot be written.
            compile_cache.RemoteError: the cache sends what it stores to a remote that does not take it.
        """
        checked = self._check(sizes, batch_sizes)
        steps = running_steps(num_inference_steps, strength)
        binder = self._dispatcher.binder
        if binder.cache is not None and binder.backend.persistent:
            binder.cache.require_writable()
        with ExitStack() as stack:
            stack.enter_context(self._graphs.in_decoder_precision())
            needed = Needed.of(binder, self._graphs.all(checked, steps, batch_sizes))
            if jobs is None and binder.backend.target is not None and not torch.cuda.is_available():
                jobs = 1  # what stands in for a GPU must not be seen by anything else
            own = None if jobs is None else stack.enter_context(CompilePool(jobs, niceness=0))
            return compile_needed(binder, needed, progress, own, self.blueprint)

    def needed(
        self,
        sizes: Sequence[tuple[int, int]],
        num_inference_steps: Sequence[int] = (30,),
        *,
        batch_sizes: Sequence[int] = (1, 2),
        strengths: Sequence[float] = (1.0,),
    ) -> Needed:
        """The graphs that requests of these sizes, steps and strengths need together.

        Arguments as in `precompile`, several of each.
        """
        checked = self._check(sizes, batch_sizes)
        with self._graphs.in_decoder_precision():
            ways = dict.fromkeys(running_steps(n, s) for n in num_inference_steps for s in strengths)
            calls = (graphs for steps in ways for graphs in self._graphs.all(checked, steps, batch_sizes))
            return Needed.of(self._dispatcher.binder, calls)

    def to_compile(self, needed: Needed) -> dict[str, RegionGraph]:
        """What of these graphs the cache does not hold, by the digest of its key; nothing if the backend keeps none."""
        binder = self._dispatcher.binder
        return needed.missing(binder) if binder.cache is not None and binder.backend.persistent else {}

    def missing(self, needed: Needed) -> dict[str, str]:
        """What of these graphs the cache does not hold: key digest -> region and reason."""
        binder = self._dispatcher.binder
        if binder.cache is None:
            return {}
        found = self.to_compile(needed)
        return {
            digest: f"{graph.region.path}: {binder.cache.explain(binder.key(graph))}" for digest, graph in found.items()
        }

    def unbound(self, needed: Needed) -> list[str]:
        """The regions, by path, that are not bound to one of these graphs yet; nothing for backend "eager"."""
        binder = self._dispatcher.binder
        graphs = [graph for call in needed.calls for graph, _ in call if binder.backend.name != "eager"]
        return list(dict.fromkeys(graph.region.path for graph in graphs if not binder.is_bound(graph)))

    def describe(self) -> Blueprint:
        """As `blueprint`, with the VAE in the precision that it decodes in, as the graphs of `needed` are.

        Raises:
            CompileFailed: something in the models cannot go to another process.
        """
        with self._graphs.in_decoder_precision():
            return self.blueprint()

    def blueprint(self) -> Blueprint:
        """The models without their weights, for a compiling process.

        Raises:
            CompileFailed: something in the models cannot go to another process.
        """
        patch = self.patch
        told: dict[str, Any] = {
            "family": patch.family.name,
            "task": patch.task,
            "regions": self._installed.regions_kind,
        }
        backend = self._dispatcher.binder.backend.spec
        target, dtype = self._dispatcher.binder.backend.target, self._installed.decode.dtype
        told |= {"target": target, "decode_dtype": dtype}
        return Blueprint.of(self.pipe, config=patch.config, backend=backend, **told)

    def _enter(self) -> None:
        """What a request does once, before its first call: looks whether the models are still what they were."""
        self._dispatcher.begin(self.patch.request_number)

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until nothing that requests missed is queued or compiled in the background any more.

        Returns:
            False if that took longer than `timeout` seconds.
        """
        background = self._dispatcher.background
        return background is None or background.wait(timeout)

    def load(
        self,
        sizes: Sequence[tuple[int, int]],
        num_inference_steps: int = 30,
        *,
        batch_sizes: Sequence[int] = (1, 2),
        strength: float = 1.0,
        warm: bool | None = None,
    ) -> LoadReport:
        """Loads and binds every graph that requests of these sizes need, so that the first request finds them ready.

        Arguments as in `precompile`; `on_miss` decides what happens to a graph that the cache does not hold. With a
        backend that keeps nothing, this is where it compiles. Call it on the thread that will serve: what a first call
        makes on a GPU (cuDNN's plans) belongs to the thread that made it. CUDA graphs are captured here and nowhere
        else: after something made the handle drop them (`accelerate`'s `cuda_graphs`), call it again.

        Args:
            warm: run what was loaded once at each size, over zeros; what ran on this thread already is not run again.
                None: on a GPU, where a first call takes up to a second more than the next, and not on the CPU, where
                this takes longer than it saves.

        Returns:
            How much was loaded and run, and how long that took.

        Raises:
            BadInput: a size, a step count or a batch that cannot be, or `cuda_graphs="on"` on a device without any.
            GraphMiss: a graph is missing under `on_miss="error"`.
        """
        replays = self._dispatcher.replays
        if replays is not None:
            replays.require(self.patch.unet.device)
        regions: set[tuple[str, str]] = set()
        too_large: list[str] = []
        kinds, warm_calls, load_seconds, warm_seconds = 0, 0, 0.0, 0.0
        with self._graphs.in_decoder_precision():
            checked = self._check(sizes, batch_sizes)
            warm = self.patch.unet.device.type == "cuda" if warm is None else warm
            for graphs in self._graphs.all(checked, running_steps(num_inference_steps, strength), batch_sizes):
                began = time.perf_counter()
                calls = self._dispatcher.load(graphs).calls
                loaded = time.perf_counter()
                if warm:
                    try:
                        count, large = self._warm_up.run(graphs, calls)
                        warm_calls += count
                        too_large += large
                    except ArtifactFailed as failed:
                        self._dispatcher.quarantine(failed)
                kinds += 1
                regions.update(call.name for call in calls.values())
                load_seconds += loaded - began
                warm_seconds += time.perf_counter() - loaded
            captures = self._capture(checked, running_steps(num_inference_steps, strength), batch_sizes)
        report = LoadReport(
            kinds,
            len(regions),
            load_seconds,
            warm_calls,
            warm_seconds,
            tuple(too_large),
            captures.kept,
            self.stats.graph_bytes,
            tuple(captures.skipped),
        )
        LOG.info("%s", report)
        if (told := self._made_elsewhere()) is not None:
            LOG.info("artifacts: %s", told)
        return report

    def _capture(self, sizes: Sequence[tuple[int, int]], steps: int, batch_sizes: Sequence[int]) -> Captures:
        """Captures the UNet calls that compiled graphs serve; nothing where CUDA graphs are off, or the device has
        none."""
        replays = self._dispatcher.replays
        if replays is None:
            return Captures()
        with replays.capturing(self.patch.unet.device) as captures:
            if replays.is_possible:
                for call in self._graphs.loaded_steps(sizes, steps, batch_sizes):
                    self._installed.unet.capture(call[0], steps, *call[1:])
        return captures

    def _made_elsewhere(self) -> str | None:
        return self._dispatcher.binder.made_elsewhere(self.meant_for or self.patch.unet.device)

    @staticmethod
    def _check(sizes: Sequence[tuple[int, int]], batch_sizes: Sequence[int]) -> list[tuple[int, int]]:
        checked = [check_pixels(height, width) for height, width in sizes]
        if not checked:
            raise BadInput("sizes: expected at least one (height, width), got none")
        if not batch_sizes or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in batch_sizes):
            raise BadInput(f"batch_sizes: expected integers of at least 1, got {batch_sizes!r}")
        return checked

    def explain(
        self, height: int, width: int, num_inference_steps: int = 30, *, batch: int = 2, strength: float = 1.0
    ) -> Explanation:
        """Which graph runs at which step of a request, and whether it is there. Compiles and loads nothing.

        Args:
            height, width: image size in pixels, multiples of 8.
            num_inference_steps: steps of the request's schedule.
            batch: UNet batch, guidance counted.
            strength: of image-to-image and inpainting, the share of the steps that runs.

        Raises:
            BadInput: a size, a step count or a strength that cannot be.
        """
        check_pixels(height, width)
        steps = running_steps(num_inference_steps, strength)
        self._dispatcher.refresh()
        rows = []
        states: dict[tuple[Any, bool], ExplainRow] = {}
        for phase, controlled in self._graphs.phases(height, width, steps):
            if (phase.topology, controlled) not in states:
                graphs = self._graphs.unet(phase.topology, height, width, batch, controlled)
                states[phase.topology, controlled] = self._row("", str(phase.topology), graphs)
            row = states[phase.topology, controlled]
            rows.append(ExplainRow(**{**vars(row), "steps": f"[{phase.start}, {phase.stop})"}))
        for net in self._installed.controlnets:
            span = f"[0, {control_steps(steps, self.patch.control_ratio)})"
            rows.append(self._row(span, net.name, self._graphs.controlnet(net, height, width, batch)))
        if step := self._graphs.step(height, width, batch):
            rows.append(self._row("each", "CFG++ step", step))
        with self._graphs.in_decoder_precision():
            if decoder := self._graphs.decoder(height, width, 1):
                tiles = self._graphs.tiles(height, width, 1)
                name = "VAE decoder" if tiles is None else f"VAE decoder, {tiles}"
                rows.append(self._row("after", name, decoder))
        model = f"{self.patch.family.name} ({self.patch.evidence})"
        size_notice = self.patch.size_notice(height, width, steps)
        return Explanation(height, width, steps, model, tuple(rows), size_notice, self._made_elsewhere())

    def seal(self) -> None:
        """From here on, this process compiles nothing for this pipeline and writes nothing to its cache.

        Call it after `load`. `torch.compiler.set_stance("fail_on_recompile")` then holds for the whole process, until
        the last sealed handle is removed: a `torch.compile` elsewhere in it raises where it would compile. The remote
        of the cache is not asked any more. A graph that is missing raises `GraphMiss` as before. A torch older than
        2.6 has no stances: there, a `torch.compile` elsewhere compiles as before.

        Raises:
            BadInput: `on_miss` is not "error".
        """
        self._dispatcher.seal()
        if not self._sealed:
            sealing.hold()
        self._sealed = True

    def verify(self) -> dict[str, str | None]:
        """Checks every byte of the artifacts that failed at run time; the sound ones serve again from now on.

        Returns:
            Key digest -> None where it is sound, else what is wrong with it. Empty if none failed.
        """
        return self._dispatcher.verify()

    def remove(self) -> Any:
        """Takes everything off; the pipeline is then bit for bit what it was. Returns the pipeline.

        Raises:
            PatchConflict: something else replaced a patched attribute since; nothing is removed then.
        """
        self._installed.check_removable()
        if self._guidance is not None:
            self._guidance.check_removable()
        if self._sealed:
            sealing.release()
            self._sealed = False
        self._dispatcher.close()
        self._undo.undo()
        if self._guidance is not None:
            self._guidance.remove()
        self._installed.remove()
        return self.pipe

    def __repr__(self) -> str:
        binder = self._dispatcher.binder
        return (
            f"Handle(backend={binder.backend.name!r}, regions={'whole' if self._installed.unet.whole else 'blocks'!r}, "
            f"shapes={binder.shapes!r}, on_miss={self._dispatcher.on_miss!r}, {self.patch!r})"
        )

    def _row(self, steps: str, topology: str, graphs: Graphs) -> ExplainRow:
        binder = self._dispatcher.binder
        digests = {graph.region.path: binder.key(graph) for graph, _ in graphs}
        distinct = {key.digest: key for key in digests.values()}
        key = CacheKey({"regions": {path: region_key.digest for path, region_key in digests.items()}})
        missing = [region_key for region_key in distinct.values() if binder.entry(region_key) is None]
        reason = ""
        if binder.backend.name == "eager":
            state = "eager"
        elif not binder.backend.persistent:
            state = "loaded" if all(binder.is_bound(graph) for graph, _ in graphs) else "compiles at start"
        elif missing:
            assert binder.cache is not None
            state = f"missing {len(missing)} of {len(distinct)} artifacts"
            background = self._dispatcher.background
            if background is not None and (told := background.state(missing)):
                state += f" ({told})"
            reason = binder.cache.explain(missing[0])
        else:
            state = "loaded" if all(binder.is_bound(graph) for graph, _ in graphs) else "cached"
        bucket = _widest([graph for graph, _ in graphs])
        return ExplainRow(steps, topology, bucket, key.short, len(graphs), len(distinct), state, reason)


def _widest(graphs: Sequence[RegionGraph]) -> str:
    """The buckets of a UNet graph's regions, most common first."""
    counts: dict[str, int] = {}
    for graph in graphs:
        counts[str(graph.bucket)] = counts.get(str(graph.bucket), 0) + 1
    ordered = sorted(counts, key=lambda text: (-counts[text], text))
    more = f" (+{len(ordered) - 1} more)" if len(ordered) > 1 else ""
    return ordered[0] + more


def accelerate(
    pipe: Any,
    *,
    hidiffusion: HiDiffusionConfig | None = None,
    guidance: CFGPlusPlusConfig | None = None,
    cache: CompileCache | str | os.PathLike[str] | None = None,
    backend: str | OneDiffConfig = "aot",
    on_miss: str = "compile",
    regions: str = DEFAULT_REGIONS,
    shapes: str = DEFAULT_SHAPES,
    family: str | None = None,
    task: str | None = None,
    background: CompilePool | None = None,
    target: Target | str | None = None,
    memory_format: str | None = None,
    variant: str | None = None,
    decode: DecodeConfig | None = None,
    cuda_graphs: str = "auto",
) -> Handle:
    """Makes a diffusers pipeline serve compiled graphs. `pipe(...)` is called as before.

    Args:
        pipe: a diffusers pipeline with a UNet of a known family.
        hidiffusion: HiDiffusion's settings; None: the plain UNet, compiled.
        guidance: CFG++'s settings; None: the pipeline's own guidance. The UNet's graphs are the same with both.
        cache: a `CompileCache` or its directory; needed by backend "aot".
        backend: "aot" (ahead of time, kept in the cache), "inductor" (`torch.compile`, compiled in every process),
            "onediff" or an `OneDiffConfig` (see docs/onediff.md) or "eager" (nothing compiled; for comparison).
        on_miss: a graph is not in the cache (or, for a backend that keeps nothing, not loaded): "compile" now;
            "background": run eager (or a graph of a wider range that is there) while another process compiles it, and
            take it up between two steps; run "eager"; or raise "error" (`GraphMiss`).
        regions: "blocks": the UNet's resnets and transformers, which share artifacts over blocks, phases and sizes;
            "whole": one artifact for the UNet in each topology.
        shapes: "symbolic": one artifact for a range of sizes; "exact": one for each size, as always with "onediff".
        family, task: as in `apply_hidiffusion`.
        background: the pool that compiles under `on_miss="background"`; None: one worker that the whole process shares.
        target: what GPU code is compiled and looked for for, or its name ("sm_90", see `Target.parse`); None: the GPU
            that the pipeline is on. For "aot".
        memory_format: "channels_last" or "contiguous": the weights of convolutions are laid out so until `remove`;
            None: as they are. Graphs of one format do not serve another one.
        variant: "tuned": artifacts that `tune` found better on this device come first; None: those as compiled.
        decode: how the VAE decodes: tiles, memory, dtype; None: as the pipeline does, in tiles where memory is short.
        cuda_graphs: whole UNet calls as CUDA graphs, captured by `load`: "auto": on a CUDA device, where that saves at
            least 5 % of a call's time; "on": always; "off": never. Calls with ControlNet residuals or other optional
            arguments run without. Weights that are moved or replaced, another structure, an artifact that fails: the
            graphs are dropped until the next `load`.

    Raises:
        NotAPipeline, UnknownLayout, BadInput: the pipeline or an option is not what it should be.
        compile_cache.CacheWriteError: `on_miss="background"`, and the cache cannot be written.
    """
    if guidance is not None and not isinstance(guidance, CFGPlusPlusConfig):
        raise BadInput(f"guidance: expected a CFGPlusPlusConfig or None, got {type(guidance).__name__}")
    if hidiffusion is not None and not isinstance(hidiffusion, HiDiffusionConfig):
        raise BadInput(f"hidiffusion: expected a HiDiffusionConfig or None, got {type(hidiffusion).__name__}")
    if decode is not None and not isinstance(decode, DecodeConfig):
        raise BadInput(f"decode: expected a DecodeConfig or None, got {type(decode).__name__}")
    check_choice("cuda_graphs", cuda_graphs, CUDA_GRAPHS)
    check_choice("on_miss", on_miss, ON_MISS)
    check_choice("regions", regions, REGIONS)
    check_choice("shapes", shapes, SHAPES)
    chosen = create_backend(backend, Target.parse(target) if isinstance(target, str) else target, variant=variant)
    if memory_format is not None:
        check_choice("memory_format", memory_format, MEMORY_FORMATS)
    owner, unet = find_unet(pipe)
    if owner is None:
        raise BadInput("pipe: expected a diffusers pipeline, got a bare UNet; accelerate the pipeline that holds it")
    if cache is None and chosen.persistent:
        raise BadInput(f"cache: expected a CompileCache or a directory for backend {chosen.name!r}, got None")
    if cache is not None and not isinstance(cache, CompileCache):
        cache = CompileCache(cache)
    if on_miss == "background":
        if not chosen.persistent or cache is None:
            raise BadInput(
                f'on_miss: expected "error", "eager" or "compile" for backend {chosen.name!r}, got "background"; it '
                "compiles in every process anew, so that no other one can do it"
            )
        cache.require_writable()
    if (previous := vars(pipe).get(_HANDLE)) is not None:
        previous.remove()
    if regions == "whole" and unet.config.addition_embed_type not in (None, "text_time"):
        raise BadInput(
            'regions: expected "blocks" for a UNet with added conditions other than SDXL\'s, '
            f'got "whole" and addition_embed_type {unet.config.addition_embed_type!r}'
        )
    shapes = "exact" if chosen.smallest_symbolic is None else shapes
    dispatcher = Dispatcher(Binder(cache, chosen, shapes, Stats()), on_miss, _hint(chosen.persistent, cache))
    if cuda_graphs != "off":
        dispatcher.replays = replays = Replays(cuda_graphs, dispatcher.binder.stats, dispatcher.serves)
        replays.require(unet.device)
    memory_format = memory_format or (backend.memory_format if isinstance(backend, OneDiffConfig) else None)
    installed = Installed(
        pipe, dispatcher, hidiffusion or _NO_HIDIFFUSION, regions, family, task, memory_format, decode
    )
    step = CompiledStep(dispatcher, unet.config.out_channels)
    guided = None if guidance is None else apply_cfgpp(pipe, config=guidance, stepper=step)
    try:
        installed.install()
    except BaseException:
        if guided is not None:
            guided.remove()
        raise
    handle = Handle(pipe, dispatcher, installed, guided, step)
    if on_miss == "background" and cache is not None:
        pool = default_pool() if background is None else background
        dispatcher.background = Background(pool, cache, handle.blueprint, handle.stats.background)
    return handle


def _hint(persistent: bool, cache: CompileCache | None) -> str:
    if not persistent:
        return "handle.load([(height, width)], num_inference_steps=...) before the first request"
    where = cache.location if cache is not None else "DIR"
    return f"accel-hidiff precompile MODEL --size WIDTHxHEIGHT --cache {where}"
