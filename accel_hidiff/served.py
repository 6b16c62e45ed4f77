"""The models of a pipeline whose calls compiled graphs serve: its UNet, its ControlNets, its VAE's decoder.

Each knows its regions, puts itself in the place of the module's forward, and tells the dispatcher which graph a call
needs.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from accel_hidiff import compat
from accel_hidiff.binder import ArtifactFailed, Graphs
from accel_hidiff.call import UNetCall
from accel_hidiff.config import DecodeConfig
from accel_hidiff.control import DOWN, MID
from accel_hidiff.decoding import (
    Decode,
    InDtype,
    Tiles,
    choose_tiles,
    decode_in_tiles,
    decode_one_by_one,
    free_memory,
    require_dtype,
    unfolds,
)
from accel_hidiff.dispatch import Dispatcher, Graph
from accel_hidiff.errors import GraphMiss
from accel_hidiff.facts import call_facts, call_name, hook_of, mixed_residuals
from accel_hidiff.families import Layout, Size, feature_sizes, sampler_sizes, upsampling
from accel_hidiff.fingerprint import is_replaced
from accel_hidiff.flow import HEAD, TAIL, Flow, skip_channels
from accel_hidiff.forwards import Forward
from accel_hidiff.guard import CallFacts
from accel_hidiff.patching import Patch
from accel_hidiff.regions import (
    ControlNetRegion,
    DecoderRegion,
    DownsamplerRegion,
    HeadRegion,
    Region,
    RegionGraph,
    ResnetRegion,
    Sizes,
    TailRegion,
    TransformerRegion,
    UNetRegion,
    UpsamplerRegion,
    find_blocks,
    is_whole_controlnet,
)
from accel_hidiff.replay.inputs import StepInputs, zero_inputs
from accel_hidiff.schedule import LATENT_CELL
from accel_hidiff.topology import PLAIN, Topology
from accel_hidiff.undo import UndoLog
from compile_cache import UnstableFactor

LOG: Final = logging.getLogger("accel_hidiff")

ControlNetOutput = compat.controlnet_output()

REGIONS = ("blocks", "whole")
UNET, DECODER = "unet", "vae.decoder"


class ServedUNet:
    """The UNet of a patch. `install` is the patch's region layer: above window attention, below pool and resize."""

    def __init__(self, dispatcher: Dispatcher, regions: str) -> None:
        self.dispatcher = dispatcher
        self.whole = regions == "whole"
        self.regions: list[Region] = []
        self._patch: Patch | None = None
        self._between: list[Region] = []
        self._flow: Flow | None = None
        self._cleared: tuple[object, bool] = self, False

    @property
    def patch(self) -> Patch:
        """The patch that it is installed with."""
        assert self._patch is not None, "served models are installed first"
        return self._patch

    def install(self, patch: Patch, undo: UndoLog) -> None:
        """Replaces the forwards of the regions, and takes over the UNet's calls."""
        self._patch = patch
        patch.runner = self.run
        unet = patch.unet
        if self.whole:
            self.regions = [UNetRegion(UNET, unet, unet.forward, patch.scope, patch.shift_layout, patch.family)]
        else:
            skips = skip_channels(unet)
            self.regions = install_blocks(self.dispatcher, UNET, unet, patch, undo, skips)
            if skips is not None:
                self._between = between_blocks(unet, patch)
                self.regions += self._between
                flow = Flow(UNET, unet, {region.path: region for region in self.regions}, patch.family)
                # Whoever replaced the UNet's forward is called.
                self._flow = flow if flow.is_whole and not is_replaced(unet) else None
        self.dispatcher.register(UNET, unet, self.regions)

    def run(
        self, call: UNetCall, inner: Forward, sample: Tensor, timestep: Any, text: Any, kwargs: dict[str, Any]
    ) -> Any:
        """Runs one UNet call; `kwargs` are the UNet's own, residuals at their final sizes."""
        patch, replays = self.patch, self.dispatcher.replays
        self.dispatcher.begin(patch.request_number)
        extras, residuals = _given(kwargs), mixed_residuals(sample, kwargs.get(DOWN), kwargs.get(MID))
        name = (UNET, call.topology, extras, residuals, *call_name(sample, text))

        def facts() -> CallFacts:
            return call_facts(
                call.topology,
                sample,
                text,
                extras=extras,
                residuals=residuals,
                model=patch.unet,
                whole=self.whole,
            )

        def graphs() -> Graphs:
            controlled = kwargs.get(DOWN) is not None
            sizes = _sizes(sample, text)
            return self.graphs(call.topology, *sizes, dtype=sample.dtype, device=sample.device, controlled=controlled)

        if replays is not None and not extras:
            inputs = StepInputs(call, sample, timestep, text, kwargs.get("added_cond_kwargs") or {})
            if replays.is_capturing:
                graph = self.dispatcher.find(name, facts, graphs)
                replays.capture(name, graph, inputs, patch.unet, lambda step: self._compute_step(graph, inner, step))
                return None
            graph = self.dispatcher.graph(name, facts, graphs)
            if (out := replays.run(name, graph, inputs)) is not None:
                return _output(out, kwargs)
        else:
            graph = self.dispatcher.graph(name, facts, graphs)
        return self._compute(graph, call, inner, sample, timestep, text, kwargs)

    def _compute(
        self, graph: Graph, call: UNetCall, inner: Forward, sample: Tensor, timestep: Any, text: Any, kwargs: Any
    ) -> Any:
        if self.whole and graph.calls:
            try:
                out = self.regions[0].forward_with(graph.calls[UNET], call, sample, timestep, text, **kwargs)
                return _output(out, kwargs)
            except ArtifactFailed as failed:
                self.dispatcher.quarantine(failed)
        regions = {} if self.whole else graph.calls
        if graph.calls and (flow := self._flow_for(kwargs)) is not None:
            inputs = flow.inputs(graph.calls, sample, timestep, kwargs.get("added_cond_kwargs"))
            if inputs is not None:
                try:
                    return _output(flow.run(graph.calls, call, inputs, text, kwargs.get(DOWN), kwargs.get(MID)), kwargs)
                except ArtifactFailed as failed:
                    self.dispatcher.quarantine(failed)
                    regions = {path: one for path, one in regions.items() if one.name[1] != failed.key.digest}
        call.regions = regions
        with self.patch.scope.opened(call):
            return inner(sample, timestep, text, **kwargs)

    def _flow_for(self, kwargs: Mapping[str, Any]) -> Flow | None:
        """What runs the regions of a call with these arguments; None: diffusers' own forwards do."""
        if (kwargs.get(DOWN) is None) != (kwargs.get(MID) is None):
            return None
        return None if any(name not in _OF_FLOW for name in _given(kwargs)) else self._clear_flow()

    def _clear_flow(self) -> Flow | None:
        """What runs the regions of a call; None where diffusers' own forwards have to, whatever its arguments."""
        if self._flow is None:
            return None
        state = self.dispatcher.state(UNET)
        if self._cleared[0] is not state:
            self._cleared = state, self._flow.is_clear()
        return self._flow if self._cleared[1] else None

    def _compute_step(self, graph: Graph, inner: Forward, step: StepInputs) -> Tensor:
        out: Tensor = self._compute(graph, step.call, inner, step.sample, step.timestep, step.text, step.kwargs())[0]
        return out

    def capture(self, step: int, num_steps: int, height: int, width: int, batch: int, tokens: int) -> None:
        """Captures the calls of a step of a request; sizes are latent. Inside of `Replays.capturing`."""
        unet = self.patch.unet
        with self.patch.phase(step, num_steps), torch.inference_mode(False), torch.no_grad():
            inputs, kwargs = zero_inputs(unet, batch, height, width, tokens)
            try:
                unet.forward(*inputs, **kwargs)
            except GraphMiss as miss:  # a request would be refused, too
                assert self.dispatcher.replays is not None, "it is capturing"
                self.dispatcher.replays.skip(str(miss))

    def graphs(
        self,
        topology: Topology,
        height: int,
        width: int,
        batch: int,
        tokens: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        controlled: bool = False,
    ) -> Graphs:
        """The graph and the sizes of every region in a call; sizes are latent."""
        patch = self.patch
        features = feature_sizes(patch.layout, patch.family, height, width, topology)
        features |= sampler_sizes(patch.layout, patch.family, height, width, topology)
        named = {f"{UNET}.{path}": size for path, size in features.items()}

        def graph(region: Region, sizes: Sizes) -> RegionGraph:
            return self.dispatcher.binder.graph(region, topology, sizes, dtype, device, controlled)

        regions = [region for region in self._regions() if region.serves(named, topology)]
        return _graphs_of(regions, patch, named, batch, tokens, graph)

    def _regions(self) -> list[Region]:
        """Those that calls run: without the ones between its blocks where one of these is not its own any more, or
        something was put beside them, so that diffusers' forwards run there what somebody wants."""
        if self._clear_flow() is not None:
            own = self.patch.function_ids()
            for region in self._between:
                region.own_forwards = own
            with suppress(UnstableFactor):
                if all(region.structure for region in self._between):
                    return self.regions
        return [region for region in self.regions if region not in self._between]


class ServedControlNet:
    """One ControlNet of a pipeline; the patch calls it at its trained scale."""

    def __init__(self, dispatcher: Dispatcher, name: str, net: nn.Module, regions: str) -> None:
        self.dispatcher = dispatcher
        self.name = name
        self.net: Any = net
        self.whole = regions == "whole" and is_whole_controlnet(net)
        self.regions: list[Region] = []
        self._patch: Patch | None = None

    def install(self, patch: Patch, undo: UndoLog) -> None:
        """Replaces the forwards of the regions, and the ControlNet's own."""
        self._patch = patch
        if self.whole:
            self.regions = [ControlNetRegion(self.name, self.net, self.net.forward)]
        else:
            self.regions = install_blocks(self.dispatcher, self.name, self.net, patch, undo)
        self.dispatcher.register(self.name, self.net, self.regions)
        undo.replace(self.net, "forward", self._forward(self.net.forward, patch), f"served {self.name}")

    def _forward(self, inner: Forward, patch: Patch) -> Forward:
        names = list(inspect.signature(inner).parameters)

        def forward(sample: Tensor, timestep: Any, encoder_hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            kwargs.update(zip(names[3:], args, strict=False))
            self.dispatcher.begin(patch.request_number)
            extras = _given(kwargs)
            graph = self.dispatcher.graph(
                (self.name, extras, *call_name(sample, encoder_hidden_states)),
                lambda: call_facts(
                    PLAIN, sample, encoder_hidden_states, extras=extras, model=self.net, whole=self.whole
                ),
                lambda: self.graphs(*_sizes(sample, encoder_hidden_states), dtype=sample.dtype, device=sample.device),
            )
            inputs = sample, timestep, encoder_hidden_states
            if self.whole and graph.calls:
                rest = {name: value for name, value in kwargs.items() if name != "controlnet_cond"}
                image, compiled = kwargs["controlnet_cond"], graph.calls[self.name]
                try:
                    down, mid = self.regions[0].forward_with(compiled, None, *inputs, image, **rest)
                    if kwargs.get("return_dict", True):
                        return ControlNetOutput(down_block_res_samples=tuple(down), mid_block_res_sample=mid)
                    return down, mid
                except ArtifactFailed as failed:
                    self.dispatcher.quarantine(failed)
            with patch.scope.opened(UNetCall(PLAIN, regions={} if self.whole else graph.calls)):
                return inner(*inputs, **kwargs)

        return forward

    def graphs(
        self, height: int, width: int, batch: int, tokens: int, *, dtype: torch.dtype, device: torch.device
    ) -> Graphs:
        """The graph and the sizes of every region in a call; sizes are latent, at the trained scale."""
        assert self._patch is not None, "served models are installed first"
        layout = Layout.from_config(self.net.config)
        features = feature_sizes(layout, self._patch.family, height, width, PLAIN)
        named = {f"{self.name}.{path}": size for path, size in features.items()}

        def graph(region: Region, sizes: Sizes) -> RegionGraph:
            return self.dispatcher.binder.graph(region, PLAIN, sizes, dtype, device)

        return _graphs_of(self.regions, self._patch, named, batch, tokens, graph)


class ServedDecoder:
    """A VAE's decoder: whole or in tiles, in the VAE's own dtype or in another one.

    Args:
        dispatcher: serves its calls.
        config: tiles, limit of memory and dtype.
    """

    def __init__(self, dispatcher: Dispatcher, config: DecodeConfig) -> None:
        self.dispatcher = dispatcher
        self.config = config
        self.region: DecoderRegion | None = None
        self._widths: tuple[int, ...] = ()
        self._in_dtype: InDtype | None = None
        self._told: set[Tiles] = set()

    @property
    def dtype(self) -> torch.dtype | None:
        """What it decodes in whatever the VAE's dtype is; None: in that."""
        return None if self.config.dtype is None else getattr(torch, self.config.dtype)

    def install(self, vae: Any, undo: UndoLog) -> None:
        """Takes over the decoder's calls.

        Raises:
            BadInput: the device cannot compute in the dtype that was asked for.
        """
        module = vae.decoder
        if self.dtype is not None:
            require_dtype(self.dtype, vae.device)
            self._in_dtype = InDtype(module, self.dtype)
            module = self._in_dtype.module
        self._widths = tuple(vae.config.block_out_channels)
        self.region = region = DecoderRegion(DECODER, module, module.forward)
        self.dispatcher.register(DECODER, module, [region])
        undo.replace(vae.decoder, "forward", self._forward(vae), f"region {DECODER}")
        region.own_forwards = undo.function_ids()

    def tiles(self, height: int, width: int, batch: int, dtype: torch.dtype, device: torch.device) -> Tiles | None:
        """What a decode is cut into; None: nothing. Sizes are latent."""
        if not self._widths:
            return None
        dtype = self.dtype or dtype
        at_once = 1 if self._one_by_one(device) else batch
        unfolded = unfolds(device, dtype)
        decode = Decode(height, width, at_once, self._widths, dtype.itemsize, device.type, self._compiled, unfolded)
        return choose_tiles(self.config, decode, free_memory(device) if self.config.tiles == "auto" else None)

    @property
    def _compiled(self) -> bool:
        return self.dispatcher.binder.backend.name != "eager"

    def _one_by_one(self, device: torch.device) -> bool:
        """Whether a batch is decoded image by image: on a GPU, whose graph is of one (`DecoderRegion.ranges_on`), and
        which one image of any size keeps busy."""
        return self._compiled and device.type == "cuda"

    def _forward(self, vae: Any) -> Forward:
        def forward(sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            given, shadow = sample.dtype, self._in_dtype
            if shadow is not None:
                shadow.follow(sample.device)
                sample = sample.to(shadow.dtype)
            if any(value is not None for value in (*args, *kwargs.values())):
                return self._with_more(sample, *args, **kwargs).to(given)
            batch, _, height, width = sample.shape
            tiles = self.tiles(height, width, batch, sample.dtype, sample.device)
            run = partial(self._run, vae)
            if tiles is not None:
                self._tell(tiles, height, width)
                return decode_in_tiles(run, sample, tiles).to(given)
            one_by_one = batch > 1 and self._one_by_one(sample.device)
            return (decode_one_by_one(run, sample) if one_by_one else run(sample)).to(given)

        return forward

    def _run(self, vae: Any, sample: Tensor) -> Any:
        assert self.region is not None, "served models are installed first"
        region = self.region
        self.dispatcher.refresh(DECODER)
        hook = hook_of(vae)
        name = (DECODER, hook, *call_name(sample))
        self.dispatcher.forget_missing(name)
        batch, _, height, width = sample.shape
        graph = self.dispatcher.graph(
            name,
            lambda: call_facts(PLAIN, sample, model=region.module, hook=hook),
            lambda: self.graphs(height, width, batch, dtype=sample.dtype, device=sample.device),
        )
        compiled = graph.calls.get(DECODER)
        if compiled is not None:
            try:
                return region.forward_with(compiled, None, sample)
            except ArtifactFailed as failed:
                self.dispatcher.quarantine(failed)
        return region.inner(sample)

    def _with_more(self, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Whole, and eager: no graph takes an image or a mask beside latents, and only the decoder could cut them."""
        assert self.region is not None, "served models are installed first"
        if self._compiled:
            self.dispatcher.fall_back("the VAE decodes with more than latents, which are all that its graph takes")
        return self.region.inner(sample, *args, **kwargs)

    def _tell(self, tiles: Tiles, height: int, width: int) -> None:
        if tiles in self._told:
            return
        self._told.add(tiles)
        pixels = f"{width * LATENT_CELL}x{height * LATENT_CELL}"
        LOG.info("the VAE decodes %s in %d %s", pixels, tiles.count, tiles, extra={"event": "tiles"})

    def graphs(self, height: int, width: int, batch: int, *, dtype: torch.dtype, device: torch.device) -> Graphs:
        """The decoder's graph and sizes, of latents that are decoded as they are; none where there is no VAE."""
        if self.region is None:
            return []
        sizes = {"batch": batch, "height": height, "width": width}
        return [(self.dispatcher.binder.graph(self.region, PLAIN, sizes, self.dtype or dtype, device), sizes)]


def _graphs_of(
    regions: Sequence[Region],
    patch: Patch,
    features: Mapping[str, Size],
    batch: int,
    tokens: int,
    graph: Callable[[Region, Sizes], RegionGraph],
) -> Graphs:
    """The graph and the sizes of every region of a model whose features have these sizes, by region path."""
    own = patch.function_ids()
    found: Graphs = []
    for region in regions:
        region.own_forwards = own
        sizes = region.sizes(features, batch, tokens)
        found.append((graph(region, sizes), sizes))
    return found


def install_blocks(
    dispatcher: Dispatcher,
    name: str,
    model: nn.Module,
    patch: Patch,
    undo: UndoLog,
    skips: Mapping[str, int] | None = None,
) -> list[Region]:
    """Puts the repeated blocks of a model under the dispatcher; returns them.

    Args:
        dispatcher, name, model, patch, undo: what is served, and how that is undone.
        skips: channels of the skip connection that a residual block takes as an input of its own, by module path.
    """
    first_block: dict[str, int] = {}
    for index, path in enumerate(patch.windowed_blocks if model is patch.unet else ()):
        first_block.setdefault(path.rsplit(".", 2)[0], index)
    regions: list[Region] = []
    for path, module in find_blocks(model):
        region: Region
        if "resnets" in path:
            region = ResnetRegion(f"{name}.{path}", module, module.forward, model, (skips or {}).get(path, 0))
        else:
            first = first_block.get(path)
            region = TransformerRegion(f"{name}.{path}", module, module.forward, model, patch.scope, first)
        regions.append(region)
        undo.replace(module, "forward", _region_forward(dispatcher, region, patch), f"region {name}.{path}")
    return regions


def between_blocks(unet: Any, patch: Patch) -> list[Region]:
    """The regions of a UNet beside its blocks: both ends, and the samplers. `Flow` alone calls them."""
    first = f"{UNET}.down_blocks.0.resnets.0"
    found: list[Region] = [HeadRegion(f"{UNET}.{HEAD}", unet, first), TailRegion(f"{UNET}.{TAIL}", unet, first)]
    for path, module in unet.named_modules():
        where = f"{UNET}.{path}"
        if path.endswith("downsamplers.0"):
            found.append(DownsamplerRegion(where, module, module.forward, unet, path == patch.family.dilate))
        elif path.endswith("upsamplers.0"):
            found.append(UpsamplerRegion(where, module, module.forward, unet, partial(_factor, patch, path)))
    return found


def _factor(patch: Patch, path: str, topology: Topology) -> int:
    return upsampling(patch.layout, patch.family, topology)[path]


def _region_forward(dispatcher: Dispatcher, region: Region, patch: Patch) -> Forward:
    scope, path, inner = patch.scope, region.path, region.inner

    def forward(*args: Any, **kwargs: Any) -> Any:
        call = scope.call
        compiled: Any = call.regions.get(path) if call is not None else None
        if compiled is None:
            return inner(*args, **kwargs)
        if compiled.shape != args[0].shape:
            # Something changed feature sizes inside of the model: the region runs eager, or the call is refused.
            planned, got = tuple(compiled.shape), tuple(args[0].shape)
            reason = f"{path}: the plan gives it inputs of shape {planned}, it got {got}"
            dispatcher.fall_back(reason)
            return inner(*args, **kwargs)
        try:
            return region.forward_with(compiled, call, *args, **kwargs)
        except ArtifactFailed as failed:
            dispatcher.quarantine(failed)
        return inner(*args, **kwargs)

    return forward


# Arguments that every graph takes, and those of a ControlNet that stay outside of its blocks.
_ORDINARY = ("return_dict", "added_cond_kwargs", "controlnet_cond", "conditioning_scale")
_OF_FLOW: Final = (DOWN, MID)  # that `Flow.run` takes beside these


def _given(kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the optional arguments of a call that were given, empty and False ones aside."""
    given = [
        name
        for name, value in kwargs.items()
        if name not in _ORDINARY and value is not None and value is not False and value != {}
    ]
    added = kwargs.get("added_cond_kwargs")
    if added and "image_embeds" in added:
        given.append("image_embeds")
    return tuple(given)


def _output(sample: Tensor, kwargs: Mapping[str, Any]) -> Any:
    return UNet2DConditionOutput(sample=sample) if kwargs.get("return_dict", True) else (sample,)


def _sizes(sample: Tensor, text: Tensor) -> tuple[int, int, int, int]:
    batch, _, height, width = sample.shape
    return height, width, batch, text.shape[1]
