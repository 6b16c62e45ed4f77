"""The dispatcher: names the graph of every UNet call before it runs, and runs it.

The hot path is one dictionary lookup; whatever it finds was decided before by the guard. The slow path (first call of
a size, dtype or topology) asks the guard, then the binder.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from accel_hidiff.binder import Binder, BoundCall, Missing
from accel_hidiff.call import UNetCall
from accel_hidiff.errors import GraphMiss
from accel_hidiff.families import feature_sizes
from accel_hidiff.fingerprint import weights_token
from accel_hidiff.forwards import Forward
from accel_hidiff.guard import CallFacts, Reject, judge_call
from accel_hidiff.patching import Patch
from accel_hidiff.regions import (
    DecoderRegion,
    Region,
    RegionGraph,
    ResnetRegion,
    Sizes,
    TransformerRegion,
    UNetRegion,
    find_regions,
)
from accel_hidiff.topology import PLAIN, Topology
from accel_hidiff.undo import UndoLog
from compile_cache import UnstableFactor

ON_MISS = ("compile", "eager", "error")
REGIONS = ("blocks", "whole")
SHAPES = ("symbolic", "exact")
UNET = "unet"


@dataclass(frozen=True, slots=True)
class Graph:
    """What serves one kind of call: compiled region calls, or the reason why it runs eager."""

    calls: Mapping[str, BoundCall] = field(default_factory=dict)
    reason: str | None = None
    missing: bool = False


class Dispatcher:
    """Serves the UNet calls of one patched UNet, and the decoder calls of its VAE.

    Args:
        binder: makes calls out of region graphs.
        on_miss: "compile", "eager" or "error".
        regions: "blocks" or "whole".
        hint: a command that fills a gap.
    """

    def __init__(self, binder: Binder, on_miss: str, regions: str, hint: str) -> None:
        self.binder = binder
        self.on_miss = on_miss
        self.regions_option = regions
        self.regions: list[Region] = []
        self.decoder: DecoderRegion | None = None
        self._hint = hint
        self._patch: Patch | None = None
        self._graphs: dict[Any, Graph] = {}
        self._weights: dict[str, Any] = {}
        self._checked = _Checked()
        self._lock = threading.RLock()

    # Installation

    def install_unet(self, patch: Patch, undo: UndoLog) -> None:
        """The region layer of a patch: above window attention, below pool and resize."""
        self._patch = patch
        patch.runner = self.run_unet
        unet = patch.unet
        if self.regions_option == "whole":
            blocks = len(patch.windowed_blocks)
            self.regions = [UNetRegion(UNET, unet, unet.forward, patch.scope, blocks)]
            return
        first_block: dict[str, int] = {}
        for index, path in enumerate(patch.windowed_blocks):
            first_block.setdefault(path.rsplit(".", 2)[0], index)
        for path, module in find_regions(unet):
            name = f"{UNET}.{path}"
            region: Region
            if "resnets" in path:
                region = ResnetRegion(name, module, module.forward)
            else:
                region = TransformerRegion(name, module, module.forward, patch.scope, first_block.get(path))
            self.regions.append(region)
            undo.replace(module, "forward", self._region_forward(region, patch), f"region {path}")

    def install_decoder(self, vae: Any, undo: UndoLog) -> None:
        """Serves `vae.decoder`, tiles included."""
        region = DecoderRegion("vae.decoder", vae.decoder, vae.decoder.forward)
        self.decoder = region
        undo.replace(vae.decoder, "forward", self._decoder_forward(region), "region vae.decoder")
        region.own_forwards = undo.function_ids()

    def _region_forward(self, region: Region, patch: Patch) -> Forward:
        scope, path, inner = patch.scope, region.path, region.inner

        def forward(*args: Any, **kwargs: Any) -> Any:
            call = scope.call
            compiled = call.regions.get(path) if call is not None else None
            if compiled is None:
                return inner(*args, **kwargs)
            if compiled.shape != args[0].shape:  # type: ignore[attr-defined]
                self._unplanned(path, compiled.shape, args[0].shape)  # type: ignore[attr-defined]
                return inner(*args, **kwargs)
            return region.forward_with(compiled, call, *args, **kwargs)

        return forward

    def _unplanned(self, path: str, planned: torch.Size, shape: torch.Size) -> None:
        """Something changed feature sizes inside of the UNet: the region runs eager, or the call is refused."""
        reason = f"{path}: the plan gives it inputs of shape {tuple(planned)}, it got {tuple(shape)}"
        self._refused(reason)
        self.binder.stats.rejected[reason] += 1

    # Hot path

    def run_unet(
        self, call: UNetCall, inner: Forward, sample: Tensor, timestep: Any, text: Any, kwargs: dict[str, Any]
    ) -> Any:
        """Runs one UNet call; `kwargs` are the UNet's own."""
        patch = self._patch
        assert patch is not None
        if self._checked.request != patch.request_number:
            self._begin_request(patch)
        extras = _extras(kwargs)
        name = (
            call.topology,
            sample.shape,
            sample.dtype,
            sample.device,
            text.shape if isinstance(text, Tensor) else None,
            getattr(text, "dtype", None),
            extras,
            torch.is_grad_enabled(),
            torch.is_autocast_enabled(sample.device.type),
        )
        graph = self._graphs.get(name)
        if graph is None:
            facts = _facts(call, sample, text, extras, _device_of(patch.unet))
            graph = self._graphs[name] = self._resolve(facts, sample)
        self._count(graph)
        call.regions = graph.calls
        if UNET in graph.calls:
            out = self.regions[0].forward_with(graph.calls[UNET], call, sample, timestep, text, **kwargs)
            return UNet2DConditionOutput(sample=out) if kwargs.get("return_dict", True) else (out,)
        with patch.scope.opened(call):
            return inner(sample, timestep, text, **kwargs)

    def _decoder_forward(self, region: DecoderRegion) -> Forward:
        inner = region.inner

        def forward(sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._changed("vae", region.module):
                self._forget()
            facts = torch.is_grad_enabled(), torch.is_autocast_enabled(sample.device.type)
            name = ("vae", sample.shape, sample.dtype, sample.device, *facts)
            graph = self._graphs.get(name)
            if graph is None or graph.missing:
                graph = self._graphs[name] = self._resolve_decoder(region, sample, *facts)
            self._count(graph)
            compiled = graph.calls.get(region.path)
            if compiled is None:
                return inner(sample, *args, **kwargs)
            return region.forward_with(compiled, None, sample, *args, **kwargs)

        return forward

    def _count(self, graph: Graph) -> None:
        stats = self.binder.stats
        if graph.calls:
            stats.hits += 1
            return
        stats.eager_calls += 1
        if graph.reason is not None:
            stats.rejected[graph.reason] += 1

    # Once per request

    def _begin_request(self, patch: Patch) -> None:
        self._checked.request = patch.request_number
        self.refresh()
        with self._lock:
            self._graphs = {name: graph for name, graph in self._graphs.items() if not graph.missing}

    def refresh(self) -> None:
        """Looks whether weights were moved or replaced since the last time; what was bound to them is forgotten."""
        assert self._patch is not None
        changed = self._changed(UNET, self._patch.unet)
        if self.decoder is not None:
            changed = self._changed("vae", self.decoder.module) or changed
        if changed:
            self._forget()

    def _changed(self, name: str, module: nn.Module) -> bool:
        token = weights_token(module)
        previous, self._weights[name] = self._weights.get(name), token
        return previous is not None and previous != token

    def _forget(self) -> None:
        """Weights were replaced, moved or added: whatever was bound holds old tensors."""
        with self._lock:
            for region in [*self.regions, self.decoder]:
                if region is not None:
                    region.forget()
            self.binder.forget_bindings()
            self._graphs = {}

    # Slow path

    def region_graphs(
        self,
        topology: Topology,
        height: int,
        width: int,
        batch: int,
        tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> list[tuple[RegionGraph, Sizes]]:
        """The graph and the sizes of every UNet region in a call; sizes are latent."""
        patch = self._patch
        assert patch is not None
        features = {
            f"{UNET}.{path}": size
            for path, size in feature_sizes(patch.layout, patch.family, height, width, topology).items()
        }
        own = patch.function_ids()
        graphs: list[tuple[RegionGraph, Sizes]] = []
        for region in self.regions:
            region.own_forwards = own
            sizes = region.sizes(features, batch, tokens)
            graphs.append((self.binder.graph(region, topology, sizes, dtype, device), sizes))
        return graphs

    def decoder_graph(
        self, height: int, width: int, batch: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[RegionGraph, Sizes] | None:
        """The VAE decoder's graph and sizes; None where the pipeline has no VAE."""
        if self.decoder is None:
            return None
        sizes = {"batch": batch, "height": height, "width": width}
        return self.binder.graph(self.decoder, PLAIN, sizes, dtype, device), sizes

    def _resolve(self, facts: CallFacts, sample: Tensor) -> Graph:
        decision = judge_call(facts, self.regions_option)
        if isinstance(decision, Reject):
            return self._refused(decision.reason)
        if self.binder.backend.name == "eager":
            return Graph()
        arguments = facts.topology, facts.height, facts.width, facts.batch, facts.tokens
        return self._bind(lambda: self.region_graphs(*arguments, sample.dtype, sample.device))

    def _resolve_decoder(self, region: DecoderRegion, sample: Tensor, grad: bool, autocast: bool) -> Graph:
        batch, _, height, width = sample.shape
        facts = CallFacts(
            topology=PLAIN,
            height=height,
            width=width,
            batch=batch,
            tokens=0,
            dtype=str(sample.dtype),
            device=str(sample.device),
            grad=grad,
            autocast=autocast,
            weights=_device_of(region.module),
        )
        decision = judge_call(facts, self.regions_option)
        if isinstance(decision, Reject):
            return self._refused(decision.reason)
        if self.binder.backend.name == "eager":
            return Graph()

        def graphs() -> list[tuple[RegionGraph, Sizes]]:
            graph = self.decoder_graph(height, width, batch, sample.dtype, sample.device)
            return [graph] if graph is not None else []

        return self._bind(graphs)

    def load(self, graphs: list[tuple[RegionGraph, Sizes]]) -> None:
        """Binds graphs before a call asks for them; GraphMiss under `on_miss="error"`."""
        if self.binder.backend.name != "eager":
            self._bind(lambda: graphs)

    def _bind(self, graphs: Callable[[], list[tuple[RegionGraph, Sizes]]]) -> Graph:
        with self._lock:
            try:
                found = self.binder.bind_all(graphs(), compile_missing=self.on_miss == "compile")
            except UnstableFactor as problem:
                return self._refused(str(problem))
        if isinstance(found, Missing):
            self.binder.stats.misses += 1
            reason = f"{found.graph.region.path}: {found.reason}"
            return self._refused(f"{reason}; to fill the gap: {self._hint}", missing=True)
        if isinstance(found, Reject):
            return self._refused(found.reason)
        return Graph(found)

    def _refused(self, reason: str, missing: bool = False) -> Graph:
        if self.on_miss == "error":
            self.binder.stats.rejected[reason] += 1
            raise GraphMiss(f"no compiled graph serves this call: {reason}")
        return Graph(reason=reason, missing=missing)


class _Checked(threading.local):
    request: int = -1


def _extras(kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    given = [
        name
        for name, value in kwargs.items()
        if value is not None
        and name not in ("return_dict", "added_cond_kwargs")
        and (value or not isinstance(value, dict))
    ]
    added = kwargs.get("added_cond_kwargs")
    if added and "image_embeds" in added:
        given.append("image_embeds")
    return tuple(given)


def _device_of(module: nn.Module) -> str:
    return str(next(module.parameters()).device)


def _facts(call: UNetCall, sample: Tensor, text: Any, extras: tuple[str, ...], weights: str) -> CallFacts:
    batch, _, height, width = sample.shape
    fits = isinstance(text, Tensor) and text.ndim == 3 and text.shape[0] == batch and text.dtype == sample.dtype
    return CallFacts(
        topology=call.topology,
        height=height,
        width=width,
        batch=batch,
        tokens=text.shape[1] if fits else 0,
        dtype=str(sample.dtype),
        device=str(sample.device),
        extras=extras,
        grad=torch.is_grad_enabled(),
        autocast=torch.is_autocast_enabled(sample.device.type),
        tensor_text=fits,
        weights=weights,
    )
