"""The served models of one pipeline: put in place together, taken off together, followed when they are exchanged."""

from __future__ import annotations

import logging
from typing import Any, Final

from accel_hidiff.config import DecodeConfig, HiDiffusionConfig
from accel_hidiff.control import find_controlnets
from accel_hidiff.dispatch import Dispatcher
from accel_hidiff.errors import AccelHiDiffError
from accel_hidiff.memory_format import ConvertedWeights
from accel_hidiff.patching import Patch, install
from accel_hidiff.regions import Region
from accel_hidiff.served import ServedControlNet, ServedDecoder, ServedUNet
from accel_hidiff.undo import UndoLog, is_installed

LOG: Final = logging.getLogger("accel_hidiff")


class Installed:
    """UNet, ControlNets and VAE decoder of a pipeline, under a dispatcher.

    Args:
        pipe: the pipeline.
        dispatcher: serves their calls.
        config: HiDiffusion's settings.
        regions, family, task: as in `accelerate`.
        memory_format: of the convolutions' weights, as in `OneDiffConfig`; None: as they are.
        decode: how the VAE decodes; None: as by default.
    """

    unet: ServedUNet
    controlnets: list[ServedControlNet]
    decoder: ServedDecoder

    def __init__(
        self,
        pipe: Any,
        dispatcher: Dispatcher,
        config: HiDiffusionConfig,
        regions: str,
        family: str | None,
        task: str | None,
        memory_format: str | None = None,
        decode: DecodeConfig | None = None,
    ) -> None:
        self._pipe = pipe
        self._dispatcher = dispatcher
        self._config = config
        self.regions_kind = regions
        self._told = family, task
        self._memory_format = memory_format
        self.decode = decode or DecodeConfig()
        self._converted: ConvertedWeights | None = None
        self._undo = UndoLog()
        self._vae: Any = None

    @property
    def patch(self) -> Patch:
        """HiDiffusion on the UNet that the pipeline has now."""
        return self.unet.patch

    def install(self) -> None:
        """Puts everything in place, or nothing.

        Raises:
            UnknownLayout, BadInput, AccelHiDiffError: the pipeline's models are not what they should be.
        """
        pipe, dispatcher = self._pipe, self._dispatcher
        _require_own_vae(getattr(pipe, "vae", None))
        found = find_controlnets(pipe)
        unet = ServedUNet(dispatcher, self.regions_kind)
        nets = [ServedControlNet(dispatcher, path, net, self.regions_kind) for path, net in found.items()]

        def region_layer(patch: Patch, undo: UndoLog) -> None:
            unet.install(patch, undo)
            for net in nets:
                net.install(patch, undo)

        install(pipe, self._config, *self._told, region_layer)
        if self._memory_format is not None:
            models = pipe.unet, getattr(getattr(pipe, "vae", None), "decoder", None), *found.values()
            self._converted = ConvertedWeights(models, self._memory_format)
        self.unet, self.controlnets, self.decoder = unet, nets, ServedDecoder(dispatcher, self.decode)
        self._vae = getattr(pipe, "vae", None)
        if self._vae is not None and hasattr(self._vae, "decoder"):
            self.decoder.install(self._vae, self._undo)
        self.patch.follow = self._follow
        dispatcher.refresh()  # what is replaced from now on is noticed

    def regions(self) -> dict[str, Region]:
        """Every region by its path."""
        own = self.patch.function_ids()
        found: dict[str, Region] = {}
        for region in (*self.unet.regions, *(region for net in self.controlnets for region in net.regions)):
            region.own_forwards = own
            found[region.path] = region
        if self.decoder.region is not None:
            found[self.decoder.region.path] = self.decoder.region
        return found

    def check_removable(self) -> None:
        """PatchConflict if somebody else replaced a patched attribute since."""
        self.patch.check_removable()
        self._undo.check()

    def remove(self) -> None:
        """Takes everything off.

        Raises:
            PatchConflict: somebody else replaced a patched attribute since; nothing is removed then.
        """
        self.check_removable()
        self._undo.undo()
        self.patch.remove()
        if self._converted is not None:
            self._converted.undo()

    def _follow(self) -> bool:
        """At the begin of a request: takes over the models that the user has set since, if there are any."""
        if not self._exchanged():
            return False
        LOG.info("models of the pipeline were exchanged; their graphs are bound anew", extra={"event": "exchanged"})
        self.remove()
        self._dispatcher.forget_models()
        self.install()
        return True

    def _exchanged(self) -> bool:
        """Whether the user has set another UNet, ControlNet or VAE since."""
        pipe, nets = self._pipe, find_controlnets(self._pipe).values()
        return (
            pipe.unet is not self.patch.unet
            or getattr(pipe, "vae", None) is not self._vae
            or [id(net) for net in nets] != [id(served.net) for served in self.controlnets]
        )


def _require_own_vae(vae: Any) -> None:
    """AccelHiDiffError for a VAE that another handle serves: its graphs are those of that one's cache and policy."""
    if is_installed(vars(getattr(vae, "decoder", vae)).get("forward") if vae is not None else None):
        raise AccelHiDiffError(
            "vae: this VAE is accelerated with another pipeline already: remove that one's handle first, or give this "
            "pipeline a VAE of its own over the same weights (ah.replica(vae), before either is accelerated)"
        )
