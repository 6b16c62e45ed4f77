"""The graphs that requests need, told from a pipeline's models and from sizes, steps and batches."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from accel_hidiff.binder import Graphs
from accel_hidiff.cfgpp.compiled import CompiledStep
from accel_hidiff.decoding import Tiles
from accel_hidiff.dispatch import Dispatcher
from accel_hidiff.installed import Installed
from accel_hidiff.schedule import LATENT_CELL, Phase, control_steps
from accel_hidiff.served import ServedControlNet
from accel_hidiff.topology import Topology

_TEXT_TOKENS = 77  # of CLIP


class RequestGraphs:
    """Which graphs the calls of a request run.

    Args:
        pipe, dispatcher, installed: of one handle.
        step: of CFG++; None: the pipeline's own guidance.

    Attributes:
        meant_for: the device that a pipeline without weights (on torch's "meta" device) is looked at for.
    """

    def __init__(self, pipe: Any, dispatcher: Dispatcher, installed: Installed, step: CompiledStep | None) -> None:
        self.meant_for: torch.device | None = None
        self._pipe = pipe
        self._dispatcher = dispatcher
        self._installed = installed
        self._step = step

    def all(self, sizes: Sequence[tuple[int, int]], steps: int, batches: Sequence[int]) -> Iterator[Graphs]:
        """Those of every kind of call that requests of these sizes (height, width), steps and UNet batches make."""
        for height, width in sizes:
            kinds = dict.fromkeys((phase.topology, cut) for phase, cut in self.phases(height, width, steps))
            for batch in batches:
                for topology, controlled in kinds:
                    yield self.unet(topology, height, width, batch, controlled)
                for net in self._installed.controlnets:
                    yield self.controlnet(net, height, width, batch)
                if step := self.step(height, width, batch):
                    yield step
            if decoder := self.decoder(height, width, 1):
                yield decoder

    def loaded_steps(
        self, sizes: Sequence[tuple[int, int]], steps: int, batches: Sequence[int]
    ) -> Iterator[tuple[int, int, int, int, int]]:
        """(step, latent height, latent width, batch, text tokens) of one UNet call of each kind that such requests make
        without ControlNet residuals, and whose graphs are bound."""
        binder = self._dispatcher.binder
        for height, width in sizes:
            firsts = {
                phase.topology: phase.start for phase, cut in reversed([*self.phases(height, width, steps)]) if not cut
            }
            for batch in batches:
                for topology, step in firsts.items():
                    if all(binder.is_bound(graph) for graph, _ in self.unet(topology, height, width, batch)):
                        yield step, height // LATENT_CELL, width // LATENT_CELL, batch, self._tokens()

    def phases(self, height: int, width: int, steps: int) -> Iterator[tuple[Phase, bool]]:
        """The phases of a request, and whether a graph takes ControlNet residuals in them: only a whole UNet does, so
        that only there a phase is cut where the ControlNets stop."""
        cut = self._installed.controlnets and self._installed.unet.whole
        stop = control_steps(steps, self._installed.patch.control_ratio) if cut else 0
        for phase in self._installed.patch.plan(height, width, steps):
            if phase.start < stop:
                yield Phase(phase.start, min(phase.stop, stop), phase.topology), True
            if phase.stop > stop:
                yield Phase(max(phase.start, stop), phase.stop, phase.topology), False

    def unet(self, topology: Topology, height: int, width: int, batch: int, controlled: bool = False) -> Graphs:
        """Those of a call of the UNet in one topology; sizes in pixels, here and below."""
        unet = self._pipe.unet
        sizes = height // LATENT_CELL, width // LATENT_CELL, batch, self._tokens()
        device = self._device(unet)
        return self._installed.unet.graphs(topology, *sizes, dtype=unet.dtype, device=device, controlled=controlled)

    def controlnet(self, net: ServedControlNet, height: int, width: int, batch: int) -> Graphs:
        """Those of a call of a ControlNet, at its trained scale."""
        cells = self._installed.patch.control_size(height // LATENT_CELL, width // LATENT_CELL)
        model = net.net
        return net.graphs(*cells, batch, self._tokens(), dtype=model.dtype, device=self._device(model))

    def step(self, height: int, width: int, batch: int) -> Graphs:
        """That of a CFG++ step; none with the pipeline's own guidance."""
        if self._step is None:
            return []
        unet, cells = self._pipe.unet, (height // LATENT_CELL, width // LATENT_CELL)
        return self._step.graphs(*cells, max(batch // 2, 1), dtype=unet.dtype, device=self._device(unet))

    def decoder(self, height: int, width: int, batch: int) -> Graphs:
        """Those of the VAE's decoder; none without a VAE."""
        vae = getattr(self._pipe, "vae", None)
        if vae is None:
            return []
        cells = height // LATENT_CELL, width // LATENT_CELL
        tiles = self.tiles(height, width, batch)
        if tiles is not None:
            cells, batch = (tiles.height, tiles.width), 1
        return self._installed.decoder.graphs(*cells, batch, dtype=vae.dtype, device=self._device(vae))

    def tiles(self, height: int, width: int, batch: int) -> Tiles | None:
        """What the VAE's decoder cuts an image of this size into, with the memory that is free now; None: nothing."""
        vae: Any = getattr(self._pipe, "vae", None)
        if vae is None:
            return None
        cells = height // LATENT_CELL, width // LATENT_CELL
        return self._installed.decoder.tiles(*cells, batch, vae.dtype, self._device(vae))

    def _device(self, model: Any) -> torch.device:
        """Where a model runs: where it is, or where it is meant to be while it is only a skeleton."""
        return self.meant_for if model.device.type == "meta" and self.meant_for is not None else model.device

    def _tokens(self) -> int:
        """Length of the text that the pipeline gives its UNet: what its call says, else its tokenizer."""
        longest = inspect.signature(type(self._pipe).__call__).parameters.get("max_sequence_length")
        if longest is not None and isinstance(longest.default, int):
            return longest.default
        tokenizer = getattr(self._pipe, "tokenizer", None) or getattr(self._pipe, "tokenizer_2", None)
        return int(getattr(tokenizer, "model_max_length", _TEXT_TOKENS))

    @contextmanager
    def in_decoder_precision(self) -> Iterator[None]:
        """The VAE as it decodes, inside of the block: SDXL's pipelines raise a float16 one to float32 for that; those
        of SD 1.5 and 2.1 do not, whatever the VAE's config says.

        A decoder with a dtype of its own (`DecodeConfig.dtype`) stays as it is.
        """
        vae: Any = getattr(self._pipe, "vae", None)
        raised = vae is not None and vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
        raised = raised and self._installed.decoder.dtype is None and self._installed.patch.family.name != "sd15"
        if raised:
            vae.to(torch.float32)
        self._dispatcher.refresh()
        try:
            yield
        finally:
            if raised:
                vae.to(torch.float16)
