"""HiDiffusion as small reversible patches on a live diffusers UNet: forwards of single modules, no copied code.

Applying replaces instance attributes only (see `UndoLog`); removing takes them back in reverse order. All state of a
call lives in a `UNetCall`, all state of a request in the pipeline's scheduler.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from accel_hidiff.call import CallScope, UNetCall
from accel_hidiff.clock import PipelineClock, StepPosition
from accel_hidiff.config import TASKS, HiDiffusionConfig, check_choice, check_steps
from accel_hidiff.errors import AccelHiDiffError, BadInput, NoPhase, NotAPipeline
from accel_hidiff.families import Family, Layout, identify, skip_sizes
from accel_hidiff.forwards import (
    Forward,
    dilated,
    fit_residual,
    pool_after,
    require_parameters,
    resize_after,
    window_attention,
    window_frame,
)
from accel_hidiff.schedule import INPAINTING_CHANNELS, PhasePlan, plan_latent, plan_pixels
from accel_hidiff.shifts import check_shifts, window_shifts
from accel_hidiff.undo import UndoLog, refuse_copy

RegionLayer = Callable[["Patch", UndoLog], None]
UNetRunner = Callable[[UNetCall, Forward, Tensor, Any, Any, dict[str, Any]], Any]

_PATCH = "_accel_hidiff_patch"
_FORCE_UPSAMPLE_SIZE = 31  # no latent size is a multiple of 2**31: upsamplers take their size from the next skip


class Patch:
    """HiDiffusion on one UNet. Made by `apply_hidiffusion`; `remove()` takes it off.

    Attributes:
        unet, family, layout, config, task: what was patched, and how.
        windowed_blocks: module paths of the windowed transformer blocks in call order; `window_shifts` has one entry
            for each.
    """

    def __init__(self, unet: UNet2DConditionModel, family: Family, config: HiDiffusionConfig, task: str) -> None:
        self.unet = unet
        self.family = family
        self.layout = Layout.from_config(unet.config)
        self.config = config
        self.task = task
        self.scope = CallScope()
        self.runner: UNetRunner | None = None
        self.clock: PipelineClock | None = None
        self.windowed_transformers = _windowed_transformers(unet, family)
        self.windowed_blocks = tuple(
            f"{path}.transformer_blocks.{index}"
            for path, transformer in self.windowed_transformers
            for index in range(len(transformer.transformer_blocks))
        )
        self._undo = UndoLog()
        self._request = _Request()

    def plan(self, height: int, width: int, num_inference_steps: int) -> PhasePlan:
        """The phases of a request.

        Args:
            height, width: image size in pixels, multiples of 8.
            num_inference_steps: UNet steps that really run, at least 1.

        Raises:
            BadInput: a size or a step count that cannot be.
        """
        return plan_pixels(self.family, self.layout, height, width, num_inference_steps, self.config, self.task)

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
        return self._request.number

    def function_ids(self) -> frozenset[int]:
        """Ids of the forwards that this patch installed."""
        return self._undo.function_ids()

    def check_removable(self) -> None:
        """PatchConflict if somebody else replaced a patched attribute since."""
        self._undo.check()

    def remove(self) -> None:
        """Takes every patch off again, in reverse order; afterwards the model is what it was before.

        Raises:
            PatchConflict: somebody else replaced a patched attribute since.
        """
        self._undo.undo()

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
        conv = self.unet.get_submodule(self.family.dilate).conv
        undo.replace(conv, "forward", dilated(conv, conv.forward, self.scope), f"dilation of {self.family.dilate}")
        undo.replace(self.unet, "num_upsamplers", _FORCE_UPSAMPLE_SIZE, "upsample size from the next skip")
        undo.replace(self.unet, "forward", self._unet_forward(self.unet.forward), "UNet call")
        if pipe is not None:
            self.clock = PipelineClock(pipe)
            if hasattr(pipe, "prepare_extra_step_kwargs"):
                watch = self._watch_request(pipe.prepare_extra_step_kwargs)
                undo.replace(pipe, "prepare_extra_step_kwargs", watch, "request's generator")
        undo.replace(self.unet, _PATCH, self, "patch record")

    def _unet_forward(self, inner: Forward) -> Forward:
        require_parameters(inner, ("sample", "timestep", "encoder_hidden_states"), "UNet")

        def forward(sample: Tensor, timestep: Any, encoder_hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            if args:
                raise BadInput(
                    "a patched UNet takes sample, timestep and encoder_hidden_states by position, the rest by name"
                )
            call = self._begin_call(sample, timestep)
            kwargs = self._with_resized_residuals(sample, call, kwargs)
            if self.runner is not None:
                return self.runner(call, inner, sample, timestep, encoder_hidden_states, kwargs)
            with self.scope.opened(call):
                return inner(sample, timestep, encoder_hidden_states, **kwargs)

        return forward

    def _begin_call(self, sample: Tensor, timestep: Any) -> UNetCall:
        by_hand, seed, shifts = self._request.by_hand, None, None
        if by_hand is not None:
            (step, num_steps), shifts = by_hand
        elif self.clock is not None:
            (step, num_steps), seed = self.clock.position(timestep), self.clock.seed
        else:
            raise NoPhase(
                "a patched UNet was called without a step; expected a call by the pipeline that was patched, or "
                "`with patch.phase(step=..., num_steps=...)` around it"
            )
        height, width = sample.shape[-2:]
        plan = plan_latent(self.family, self.layout, height, width, num_steps, self.config, self.task)
        topology = plan.at(step)
        if not topology.windowed:
            return UNetCall(topology)
        if shifts is not None:
            return UNetCall(topology, torch.tensor(shifts, device=sample.device))
        seed = self.config.shift_seed if seed is None else seed
        return UNetCall(topology, _shift_table(seed, num_steps, len(self.windowed_blocks), sample.device)[step])

    def _with_resized_residuals(self, sample: Tensor, call: UNetCall, kwargs: dict[str, Any]) -> dict[str, Any]:
        """ControlNet residuals, resized bicubically to the skips (and the mid block) that they are added to."""
        residuals, mid = kwargs.get("down_block_additional_residuals"), kwargs.get("mid_block_additional_residual")
        if residuals is None or mid is None:
            return kwargs
        height, width = sample.shape[-2:]
        sizes = skip_sizes(self.layout, self.family, height, width, call.topology)
        fitted = tuple(fit_residual(residual, size) for residual, size in zip(residuals, sizes, strict=True))
        return {
            **kwargs,
            "down_block_additional_residuals": fitted,
            "mid_block_additional_residual": fit_residual(mid, sizes[-1]),
        }

    def _watch_request(self, inner: Forward) -> Forward:
        """A request begins: its generator's seed, read without drawing from it, seeds the window shifts.

        A list of generators (one per image) gives no common seed; the config's `shift_seed` is used, so that a batch
        and its parts run with the same shifts.
        """

        def prepare_extra_step_kwargs(generator: Any, *args: Any, **kwargs: Any) -> Any:
            self._request.number += 1
            if self.clock is not None:
                self.clock.begin(generator.initial_seed() if isinstance(generator, torch.Generator) else None)
            return inner(generator, *args, **kwargs)

        return prepare_extra_step_kwargs


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
        family: "sd15", "sdxl", "sdxl_turbo"; None: told from the UNet's structure.
        task: one of `accel_hidiff.config.TASKS`; None: told from the pipeline, "text2img" for a bare UNet.

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
    if not isinstance(config, HiDiffusionConfig):
        raise BadInput(f"config: expected a HiDiffusionConfig, got {type(config).__name__}")
    pipe, unet = find_unet(pipe_or_unet)
    chosen = identify(Layout.from_config(unet.config), family)
    if task is None:
        task = tell_task(pipe, unet)
    check_choice("task", task, TASKS)
    if (existing := find_patch(unet)) is not None:
        if existing.runner is not None:
            raise AccelHiDiffError("this UNet is accelerated already: call its handle's remove() first")
        existing.remove()
    patch = Patch(unet, chosen, config, task)
    try:
        patch._install(pipe, region_layer)
    except BaseException:
        patch.remove()
        raise
    return patch


def remove_hidiffusion(pipe_or_unet: Any) -> Any:
    """Takes HiDiffusion off; the model is then bit-identical to one that was never patched. Returns its argument."""
    _, unet = find_unet(pipe_or_unet)
    patch = find_patch(unet)
    if patch is not None:
        if patch.runner is not None:
            raise AccelHiDiffError("this UNet is accelerated: call the handle's remove() instead")
        patch.remove()
    return pipe_or_unet


def find_patch(unet: nn.Module) -> Patch | None:
    """The patch that is installed on a UNet."""
    return vars(unet).get(_PATCH)


def find_unet(pipe_or_unet: Any) -> tuple[Any, UNet2DConditionModel]:
    """(pipeline or None, UNet)."""
    unet = pipe_or_unet if isinstance(pipe_or_unet, nn.Module) else getattr(pipe_or_unet, "unet", None)
    if not isinstance(unet, UNet2DConditionModel):
        kind = type(pipe_or_unet).__name__
        got = kind if unet is None or unet is pipe_or_unet else f"{kind} with unet={type(unet).__name__}"
        raise NotAPipeline(f"expected a diffusers pipeline with a UNet2DConditionModel, or the UNet itself; got {got}")
    return (None if unet is pipe_or_unet else pipe_or_unet), unet


def tell_task(pipe: Any, unet: UNet2DConditionModel) -> str:
    """The task, from what the pipeline's call takes and which components it has; never from a name."""
    if pipe is None:
        return "inpaint" if unet.config.in_channels == INPAINTING_CHANNELS else "text2img"
    parameters = inspect.signature(type(pipe).__call__).parameters
    if getattr(pipe, "controlnet", None) is not None:
        return "controlnet_img2img" if "control_image" in parameters else "controlnet"
    if "mask_image" in parameters:
        return "inpaint"
    return "img2img" if "strength" in parameters else "text2img"


def _windowed_transformers(unet: UNet2DConditionModel, family: Family) -> tuple[tuple[str, Any], ...]:
    return tuple(
        (f"{level}.attentions.{index}", transformer)
        for level in family.windowed_levels
        for index, transformer in enumerate(unet.get_submodule(level).attentions)
    )


@lru_cache(maxsize=64)
def _shift_table(seed: int, num_steps: int, blocks: int, device: torch.device) -> Tensor:
    rows = [window_shifts(seed, step, blocks) for step in range(num_steps)]
    with torch.inference_mode(False):
        return torch.tensor(rows, dtype=torch.int64, device=device)
