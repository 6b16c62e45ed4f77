"""HiDiffusion as small reversible patches on a live diffusers UNet: forwards of single modules, no copied code.

Applying replaces instance attributes only (see `UndoLog`); removing takes them back in reverse order. All state of a
call lives in a `UNetCall`, all state of a request in the pipeline's scheduler.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from accel_hidiff.call import CallScope, UNetCall
from accel_hidiff.clock import PipelineClock, StepPosition
from accel_hidiff.config import HiDiffusionConfig, check_pixels, check_steps
from accel_hidiff.control import at_trained_scale, find_controlnets, fitted
from accel_hidiff.entrance import Entered, enter_alone, run_before
from accel_hidiff.errors import AccelHiDiffError, BadInput, NoPhase, NotAPipeline, PatchConflict, SizeWarning
from accel_hidiff.families import Family, window_sizes
from accel_hidiff.forwards import (
    Forward,
    dilated,
    pool_after,
    require_downsampler,
    require_parameters,
    resize_after,
    window_attention,
    window_frame,
)
from accel_hidiff.recognize import Recognized, recognize
from accel_hidiff.schedule import LATENT_CELL, PhasePlan, controls, plan_latent, plan_pixels, running_steps
from accel_hidiff.shifts import ShiftLayout, check_shifts, window_shifts
from accel_hidiff.sizes import control_size, odd_window_notice, suggest_latent
from accel_hidiff.undo import UndoLog, is_installed, refuse_copy
from accel_hidiff.windows import window_tables

RegionLayer = Callable[["Patch", UndoLog], None]
UNetRunner = Callable[[UNetCall, Forward, Tensor, Any, Any, dict[str, Any]], Any]

_PATCH = "_accel_hidiff_patch"
_FORCE_UPSAMPLE_SIZE = 31  # no latent size is a multiple of 2**31: upsamplers take their size from the next skip


class Patch:
    """HiDiffusion on one UNet. Made by `apply_hidiffusion`; `remove()` takes it off.

    Attributes:
        unet, family, layout, config, task: what was patched, and how.
        evidence: what family and settings were told from, for people.
        controlnets: the pipeline's ControlNets by path; they run at their trained scale.
        windowed_blocks: module paths of the windowed transformer blocks in call order; `window_shifts` has one entry
            for each.
        shift_layout: how many windowed blocks each windowed transformer has, and where a step's shifts lie.
    """

    def __init__(self, pipe: Any, unet: UNet2DConditionModel, model: Recognized) -> None:
        self.unet = unet
        self.family = family = model.family
        self.layout = model.layout
        self.config = model.config
        self.task = model.task
        self.evidence = model.evidence
        self.controlnets = find_controlnets(pipe)
        self.control_ratio = self.config.control_ratio if self.config.is_active else 1.0
        self.scope = CallScope()
        self.runner: UNetRunner | None = None
        self.follow: Callable[[], bool] | None = None  # puts another patch in this one's place if models were exchanged
        self.clock: PipelineClock | None = None
        self.windowed_transformers = _windowed_transformers(unet, family)
        self.windowed_blocks = tuple(
            f"{path}.transformer_blocks.{index}"
            for path, transformer in self.windowed_transformers
            for index in range(len(transformer.transformer_blocks))
        )
        self.shift_layout = ShiftLayout(tuple(len(one.transformer_blocks) for _, one in self.windowed_transformers))
        self._undo = UndoLog()
        self._entered: Entered | None = None
        self._request = _Request()
        self._warned_sizes: set[tuple[int, int]] = set()

    def plan(self, height: int, width: int, num_inference_steps: int, strength: float = 1.0) -> PhasePlan:
        """The phases of a request.

        Args:
            height, width: image size in pixels, multiples of 8.
            num_inference_steps: steps of the schedule, at least 1. A second-order scheduler's two calls are one step.
            strength: of image-to-image and inpainting, the share of the steps that really runs.

        Raises:
            BadInput: a size, a step count or a strength that cannot be.
        """
        steps = running_steps(num_inference_steps, strength)
        return plan_pixels(self.family, self.layout, height, width, steps, self.config, self.task)

    def size_notice(self, height: int, width: int, num_steps: int) -> str | None:
        """One line if a size in pixels costs a resize in window attention; None if it does not."""
        cells = height // LATENT_CELL, width // LATENT_CELL
        plan = plan_latent(self.family, self.layout, *cells, num_steps, self.config, self.task)
        return odd_window_notice(self.family, self.layout, *cells, plan, self.config, self.task)

    def control_size(self, height: int, width: int) -> tuple[int, int]:
        """The latent size at which ControlNets run for a request of a latent size."""
        return control_size(self.family.control_side, height, width) if self.config.is_active else (height, width)

    def suggest_size(self, height: int, width: int, num_inference_steps: int = 50) -> tuple[int, int]:
        """The nearest (height, width) in pixels without a resize in window attention; see `ah.suggest_size`."""
        check_pixels(height, width)
        check_steps(num_inference_steps)
        cells = height // LATENT_CELL, width // LATENT_CELL
        latent = suggest_latent(self.family, self.layout, *cells, num_inference_steps, self.config, self.task)
        return latent[0] * LATENT_CELL, latent[1] * LATENT_CELL

    @contextmanager
    def phase(self, step: int, num_steps: int, window_shifts: object = None) -> Iterator[None]:
        """Names the step of the UNet calls inside, to drive a UNet by hand.

        Args:
            step: 0..num_steps - 1.
            num_steps: number of UNet steps of the request.
            window_shifts: one int in 0..3 per windowed block, in call order; None: from the config's `shift_seed`.

        Raises:
            BadInput: a step outside of the request, or shifts that do not fit.
        """
        check_steps(num_steps)
        if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < num_steps:
            raise BadInput(f"step: expected an integer in 0..{num_steps - 1}, got {step!r}")
        shifts = None if window_shifts is None else check_shifts(window_shifts, len(self.windowed_blocks))
        outer = self._request.by_hand
        self._request.by_hand = (StepPosition(step, num_steps), shifts)
        self._request.number += 1
        try:
            yield
        finally:
            self._request.by_hand = outer

    @property
    def request_number(self) -> int:
        """Changes whenever this thread begins a request; for checks that are made once per request."""
        return self._request.number + (0 if self.clock is None else self.clock.request_number)

    def function_ids(self) -> frozenset[int]:
        """Ids of the forwards that this patch installed."""
        return self._undo.function_ids()

    def check_removable(self) -> None:
        """PatchConflict if somebody else replaced a patched attribute since."""
        self._undo.check()
        if self._entered is not None:
            self._entered.check()

    def remove(self) -> None:
        """Takes every patch off again, in reverse order; afterwards the model is what it was before.

        Raises:
            PatchConflict: somebody else replaced a patched attribute since.
        """
        self.check_removable()
        self._undo.undo()
        if self._entered is not None:
            self._entered.remove()

    def __deepcopy__(self, memo: Any) -> Any:
        raise refuse_copy()

    def __repr__(self) -> str:
        return f"Patch(family={self.family.name!r}, task={self.task!r}, {len(self._undo.labels())} patches installed)"

    def _install(self, pipe: Any, region_layer: RegionLayer | None) -> None:
        undo = self._undo
        first = 0
        for path, transformer in self.windowed_transformers:
            blocks = transformer.transformer_blocks
            for index, block in enumerate(blocks):
                forward = window_attention(block.attn1.forward, self.scope, index)
                undo.replace(block.attn1, "forward", forward, f"window attention of {path}.{index}")
            forward = window_frame(transformer.forward, self.scope, first, len(blocks))
            undo.replace(transformer, "forward", forward, f"window frame of {path}")
            first += len(blocks)
        if region_layer is not None:
            region_layer(self, undo)
        for path, wrap in ((self.family.pool_after, pool_after), (self.family.resize_after, resize_after)):
            module = self.unet.get_submodule(path)
            undo.replace(module, "forward", wrap(module.forward, self.scope), f"{wrap.__name__} {path}")
        downsampler = self.unet.get_submodule(self.family.dilate)
        require_downsampler(downsampler, self.family.dilate)
        undo.replace(downsampler, "forward", dilated(downsampler.forward, self.scope), f"dilate {self.family.dilate}")
        undo.replace(self.unet, "num_upsamplers", _FORCE_UPSAMPLE_SIZE, "upsample size from the next skip")
        undo.replace(self.unet, "forward", self._unet_forward(self.unet.forward), "UNet call")
        for path, net in self.controlnets.items():
            if find_patch(net) is not None:
                raise AccelHiDiffError(
                    f"{path}: this ControlNet is patched with another UNet already; remove HiDiffusion there first"
                )
            forward = at_trained_scale(net.forward, self)
            undo.replace(net, "forward", forward, f"trained scale of {path}")
            undo.replace(net, _PATCH, self, "patch record")
        if pipe is not None:
            undo.replace(pipe, _PATCH, self, "patch record")
            self.clock = PipelineClock(pipe)
            if hasattr(pipe, "check_inputs"):
                self._entered = run_before(pipe, check_inputs=lambda: enter_alone(pipe))
            if hasattr(pipe, "prepare_extra_step_kwargs"):
                watch = self._watch_request(pipe, pipe.prepare_extra_step_kwargs)
                undo.replace(pipe, "prepare_extra_step_kwargs", watch, "request's generator")
        undo.replace(self.unet, _PATCH, self, "patch record")

    def _unet_forward(self, inner: Forward) -> Forward:
        require_parameters(inner, ("sample", "timestep", "encoder_hidden_states"), "UNet")

        def forward(sample: Tensor, timestep: Any, encoder_hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            if args:
                raise BadInput(
                    "a patched UNet takes sample, timestep and encoder_hidden_states by position, the rest by name"
                )
            call, controlled = self._begin_call(sample, timestep)
            size = int(sample.shape[-2]), int(sample.shape[-1])
            kwargs = fitted(kwargs, self.layout, self.family, size, call.topology, controlled)
            if self.runner is not None:
                return self.runner(call, inner, sample, timestep, encoder_hidden_states, kwargs)
            with self.scope.opened(call):
                return inner(sample, timestep, encoder_hidden_states, **kwargs)

        return forward

    def controls(self, position: StepPosition) -> bool:
        """Whether ControlNets run in a step: in the first `control_ratio` of all."""
        return controls(*position, self.control_ratio)

    def owns(self, timestep: Any) -> bool:
        """Whether a call with this timestep is one of `phase`, or of a pipeline on the patched components."""
        return self._request.by_hand is not None or (self.clock is not None and self.clock.owns(timestep))

    def position(self, timestep: Any) -> StepPosition:
        """The step of a call with this timestep; NoPhase where nobody names one."""
        return self._where(timestep)[0]

    def _where(self, timestep: Any) -> tuple[StepPosition, int | None, tuple[int, ...] | None]:
        """(step, seed of the request, shifts given by hand) of a call with this timestep."""
        if self._request.by_hand is not None:
            position, shifts = self._request.by_hand
            return position, None, shifts
        if self.clock is not None:
            position = self.clock.position(timestep)
            return position, self.clock.seed, None
        raise NoPhase(
            "a patched UNet was called without a step; expected a call by the pipeline that was patched, or "
            "`with patch.phase(step=..., num_steps=...)` around it"
        )

    def _begin_call(self, sample: Tensor, timestep: Any) -> tuple[UNetCall, bool]:
        """The call, and whether residuals of a ControlNet count in it."""
        position, seed, shifts = self._where(timestep)
        step, num_steps = position
        controlled = not self.controlnets or self.controls(position)
        height, width = sample.shape[-2:]
        plan = plan_latent(self.family, self.layout, height, width, num_steps, self.config, self.task)
        topology = plan.at(step)
        if not topology.windowed:
            return UNetCall(topology), controlled
        self._warn_of_odd_windows(plan, height, width)
        layout, device = self.shift_layout, sample.device
        sizes = window_sizes(self.layout, self.family, height, width, topology)
        tables = {(len(sample), *size): window_tables(len(sample), *size, device) for size in sizes}
        if shifts is not None:
            (laid_out,) = _on_device((shifts,), layout, device)
        else:
            seed = self.config.shift_seed if seed is None else seed
            laid_out = _shifts_of_request(seed, num_steps, self.config.window_shifts, layout, device)[step]
        return UNetCall(topology, laid_out.all, shifts_from=laid_out.by_first, tables=tables), controlled

    def _warn_of_odd_windows(self, plan: PhasePlan, height: int, width: int) -> None:
        """Says once for each size which nearest one needs no resize in window attention."""
        if (height, width) in self._warned_sizes:
            return
        notice = odd_window_notice(self.family, self.layout, height, width, plan, self.config, self.task)
        if notice is not None:
            self._warned_sizes.add((height, width))
            warnings.warn(notice, SizeWarning, stacklevel=2)

    def _watch_request(self, pipe: Any, inner: Forward) -> Forward:
        """A request begins: its generator's seed, read without drawing from it, seeds the window shifts.

        A list of generators (one per image) gives no common seed; the config's `shift_seed` is used, so that a batch
        and its parts run with the same shifts. Models that were exchanged since are followed, or refused: nothing is
        patched in them.
        """

        def prepare_extra_step_kwargs(generator: Any, *args: Any, **kwargs: Any) -> Any:
            if self.follow is not None and self.follow():
                return pipe.prepare_extra_step_kwargs(generator, *args, **kwargs)
            if pipe.unet is not self.unet:
                raise PatchConflict(
                    "pipe.unet: expected the UNet that HiDiffusion was applied to, got another one; after exchanging "
                    "it, apply again"
                )
            if set(find_controlnets(pipe).values()) != set(self.controlnets.values()):
                raise PatchConflict(
                    "pipe.controlnet: expected the ControlNets that HiDiffusion was applied with, got others; after "
                    "exchanging them, apply (or accelerate) again"
                )
            _require_in_place(self.unet)
            if self.clock is not None:
                self.clock.begin(generator.initial_seed() if isinstance(generator, torch.Generator) else None)
            return inner(generator, *args, **kwargs)

        return prepare_extra_step_kwargs


def _require_in_place(unet: Any) -> None:
    """PatchConflict if the UNet has its class's forward again: the request would run without HiDiffusion."""
    forward = vars(unet).get("forward")
    if "_old_forward" in vars(unet):  # accelerate's hooks keep here what they wrap
        forward = vars(unet)["_old_forward"] if not is_installed(forward) else forward
    if forward is None or getattr(forward, "__func__", None) is type(unet).forward:
        raise PatchConflict(
            "pipe.unet.forward: expected HiDiffusion's, got the UNet's own; something took it off (hooks of accelerate "
            "do, where they were there first): apply or accelerate again"
        )


class _Request(threading.local):
    number: int = 0
    by_hand: tuple[StepPosition, tuple[int, ...] | None] | None = None


def apply_hidiffusion(
    pipe_or_unet: Any,
    apply_raunet: bool = True,
    apply_window_attn: bool = True,
    *,
    config: HiDiffusionConfig | None = None,
    family: str | None = None,
    task: str | None = None,
) -> Patch:
    """Applies HiDiffusion (arXiv 2311.17528), eager; a patch that is there already is removed first.

    Args:
        pipe_or_unet: a diffusers pipeline with a UNet, or a `UNet2DConditionModel` (then `patch.phase` names steps).
        apply_raunet: RAU-Net, the pooled and dilated parts.
        apply_window_attn: MSW-MSA, the windowed part.
        config: changes to the published settings; None: none.
        family: "sd15", "sdxl", "sdxl_turbo"; None: told from the UNet's structure and the pipeline's scheduler.
        task: one of `accel_hidiff.config.TASKS`; None: told from the pipeline; for a bare UNet from its channels.

    A size whose feature maps do not cut into windows evenly gives one `SizeWarning` that names the nearest that does.

    Raises:
        NotAPipeline: the object is no pipeline with a UNet and no UNet.
        UnknownLayout: the UNet fits no family.
        BadInput: an option is not what it should be.
    """
    config = HiDiffusionConfig() if config is None else config
    if isinstance(config, HiDiffusionConfig):
        config = config.replace(
            windowed=config.windowed and bool(apply_window_attn),
            pooled=config.pooled and bool(apply_raunet),
            dilated=config.dilated and bool(apply_raunet),
        )
    return install(pipe_or_unet, config, family, task)


def install(
    pipe_or_unet: Any,
    config: HiDiffusionConfig,
    family: str | None = None,
    task: str | None = None,
    region_layer: RegionLayer | None = None,
) -> Patch:
    """`apply_hidiffusion` with a layer of compiled regions between the windows and the pool (see `dispatch`)."""
    pipe, unet = find_unet(pipe_or_unet)
    if getattr(pipe, "_all_hooks", None):
        raise PatchConflict(
            "pipe: expected no CPU offload yet, got enable_model_cpu_offload(), which puts the models' forwards back "
            "after each request; call pipe.remove_all_hooks(), apply or accelerate, and enable it again"
        )
    model = recognize(pipe, unet.config, config, family, task)
    for existing in _patches(unet, pipe):
        if existing.runner is not None:
            raise AccelHiDiffError(
                "this UNet is accelerated already: call its handle's remove() first; a second pipeline over the same "
                "weights needs modules of its own (ah.replica, before accelerate)"
            )
        existing.remove()
    patch = Patch(pipe, unet, model)
    try:
        patch._install(pipe, region_layer)
    except BaseException:
        patch.remove()
        raise
    return patch


def remove_hidiffusion(pipe_or_unet: Any) -> Any:
    """Takes HiDiffusion off; the model is then bit-identical to one that was never patched. Returns its argument."""
    pipe, unet = find_unet(pipe_or_unet)
    for patch in _patches(unet, pipe):
        if patch.runner is not None:
            raise AccelHiDiffError("this UNet is accelerated: call the handle's remove() instead")
        patch.remove()
    return pipe_or_unet


def find_patch(holder: Any) -> Patch | None:
    """The patch that is installed on a UNet, a ControlNet or a pipeline."""
    return vars(holder).get(_PATCH)


def _patches(*holders: Any) -> list[Patch]:
    """The patches that are installed on these: two where a pipeline's UNet was exchanged for a patched one."""
    found = [find_patch(holder) for holder in holders if holder is not None]
    return list(dict.fromkeys(patch for patch in found if patch is not None))


def find_unet(pipe_or_unet: Any) -> tuple[Any, UNet2DConditionModel]:
    """(pipeline or None, UNet)."""
    unet = pipe_or_unet if isinstance(pipe_or_unet, nn.Module) else getattr(pipe_or_unet, "unet", None)
    if not isinstance(unet, UNet2DConditionModel):
        kind = type(pipe_or_unet).__name__
        got = kind if unet is None or unet is pipe_or_unet else f"{kind} with unet={type(unet).__name__}"
        raise NotAPipeline(f"expected a diffusers pipeline with a UNet2DConditionModel, or the UNet itself; got {got}")
    return (None if unet is pipe_or_unet else pipe_or_unet), unet


def _windowed_transformers(unet: UNet2DConditionModel, family: Family) -> tuple[tuple[str, Any], ...]:
    return tuple(
        (f"{level}.attentions.{index}", transformer)
        for level in family.windowed_levels
        for index, transformer in enumerate(unet.get_submodule(level).attentions)
    )


class _Shifts(NamedTuple):
    """The shifts of one step on a device, int64, each tensor where compiled code can load it as it is.

    `all`: one per windowed block; `by_first`: those of each transformer, by the number of its first windowed block.
    """

    all: Tensor
    by_first: Mapping[int, Tensor]


@lru_cache(maxsize=64)
def _shifts_of_request(
    seed: int, num_steps: int, mode: str, layout: ShiftLayout, device: torch.device
) -> tuple[_Shifts, ...]:
    """The shifts of all steps of a request."""
    steps = tuple(window_shifts(seed, step, layout.blocks, mode) for step in range(num_steps))
    return _on_device(steps, layout, device)


@lru_cache(maxsize=64)
def _on_device(steps: tuple[tuple[int, ...], ...], layout: ShiftLayout, device: torch.device) -> tuple[_Shifts, ...]:
    """The shifts of some steps: one copy to the device for all of them."""
    with torch.inference_mode(False):
        table = torch.tensor([layout.row(shifts) for shifts in steps], dtype=torch.int64, device=device)
        parts = list(zip(layout.places.items(), layout.counts, strict=True))
        return tuple(
            _Shifts(row[: layout.blocks], {first: row[place : place + count] for (first, place), count in parts})
            for row in table
        )
