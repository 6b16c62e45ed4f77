"""CFG++ in a stock diffusers pipeline: its scheduler gets the unconditional prediction that the pipeline combines away.

A pipeline runs the UNet on the unconditional and the conditional half of a batch, combines the two predictions, and
gives the scheduler the result alone. Here a hook keeps what the UNet said, and the `step` of the pipeline's scheduler,
a CFG++ one, takes it from there; what the pipeline combined is not used. Nothing of the pipeline is copied.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from accel_hidiff.cfgpp import maths
from accel_hidiff.cfgpp.next_input import ready_input
from accel_hidiff.config import CFGPlusPlusConfig, lambda_of
from accel_hidiff.entrance import Entered, run_before
from accel_hidiff.errors import BadInput, NotAPipeline
from accel_hidiff.schedulers import counterpart
from accel_hidiff.undo import UndoLog

_GUIDANCE = "_accel_hidiff_guidance"


class Predictions(NamedTuple):
    """What the UNet said in a step: (B, C, h, w) each, without and with the prompt; and the strength, 0..1."""

    uncond: Tensor
    cond: Tensor
    strength: float


Step = Callable[..., Any]
Stepper = Callable[[Any, Step, Predictions, Any, Tensor, dict[str, Any]], Any]


def eager_step(
    scheduler: Any, inner: Step, said: Predictions, timestep: Any, sample: Tensor, options: dict[str, Any]
) -> Any:
    """A step of a CFG++ scheduler from the two predictions.

    Args:
        scheduler, inner: the scheduler, and its own `step`.
        said: the predictions.
        timestep, sample, options: as the pipeline gave them to `step`.
    """
    dtype = torch.promote_types(sample.dtype, torch.float32)
    uncond, cond = said.uncond.to(dtype), said.cond.to(dtype)
    guided = maths.guided(uncond, cond, said.strength)
    return inner(guided, timestep, sample, uncond_output=uncond, **options)


class Guidance:
    """CFG++ on one pipeline. Made by `apply_cfgpp`; `remove()` takes it off.

    Attributes:
        config: its settings.
    """

    def __init__(self, pipe: Any, config: CFGPlusPlusConfig, stepper: Stepper = eager_step) -> None:
        self.config = config
        self._pipe = weakref.ref(pipe)
        self._stepper = stepper
        self._undo = UndoLog()
        self._entered: Entered | None = None
        self._driven: Any = None  # the CFG++ scheduler whose steps are taken here
        self._plain: Any = None  # the user's, in whose place it is: the same, if that is a CFG++ one
        self._heard: Any = None  # the UNet whose predictions are kept
        self._hook: Any = None
        self._said = _Said()

    @property
    def pipe(self) -> Any:
        """The pipeline."""
        return self._pipe()

    def install(self) -> None:
        """Takes over the pipeline's scheduler, now and whenever the user sets another."""
        pipe = self.pipe
        self._adopt_models()
        self._entered = run_before(pipe, check_inputs=self._adopt_models, encode_prompt=self._check_request)
        self._undo.replace(pipe, _GUIDANCE, self, "CFG++ record")

    def check_removable(self) -> None:
        """PatchConflict if somebody else replaced a method that CFG++ had replaced."""
        self._undo.check()
        if self._entered is not None:
            self._entered.check()

    def remove(self) -> Any:
        """Takes CFG++ off; the pipeline is then what it was, with its plain scheduler. Returns the pipeline.

        Raises:
            PatchConflict: something else replaced a method that CFG++ had replaced; nothing is removed then.
        """
        self.check_removable()
        self._undo.undo()
        if self._entered is not None:
            self._entered.remove()
        self._listen_to(None)
        pipe = self.pipe
        if pipe.scheduler is self._driven:
            vars(pipe)["scheduler"] = self._plain
        self._release_scheduler()
        return pipe

    def strength(self) -> float:
        """lambda of the running request: `config.scale`, or the pipeline's guidance_scale / 12.5.

        Raises:
            BadInput: the pipeline's guidance_scale stands for no lambda in 0..1.
        """
        return lambda_of(self.pipe.guidance_scale) if self.config.scale is None else self.config.scale

    def __repr__(self) -> str:
        return f"Guidance({self.config!r}, {type(self.pipe.scheduler).__name__})"

    def _keep_prediction(self) -> Callable[..., None]:
        said = self._said

        def keep(module: nn.Module, args: Any, out: Any) -> None:
            said.prediction = out[0]

        keep._accel_hidiff = True  # type: ignore[attr-defined]  # no part of any graph
        return keep

    def _listen_to(self, unet: Any) -> None:
        """The predictions of this UNet count, and no other's."""
        if self._hook is not None:
            self._hook.remove()
        self._heard = unet
        self._hook = None if unet is None else unet.register_forward_hook(self._keep_prediction())

    def _adopt_models(self) -> None:
        """The pipeline's scheduler becomes a CFG++ one: it is one already, or it is replaced by its counterpart. The
        UNet may be another one, too."""
        pipe = self.pipe
        if pipe.unet is not self._heard:
            self._listen_to(pipe.unet)
        current = pipe.scheduler
        self._said.prediction = None
        if current is self._driven:
            return
        kind = counterpart(current)
        driven = current if type(current) is kind else kind.from_config(current.config)
        self._release_scheduler()
        vars(driven)["step"] = self._drive(driven, driven.step)
        vars(driven)["scale_model_input"] = self._scale(driven, driven.scale_model_input)
        self._driven, self._plain = driven, current
        vars(pipe)["scheduler"] = driven

    def _release_scheduler(self) -> None:
        """The scheduler of the requests before is its own again, and is not kept."""
        if self._driven is not None:
            for name in ("step", "scale_model_input"):
                del vars(self._driven)[name]
        self._driven = self._plain = None

    def _check_request(self) -> None:
        """A request begins; its guidance is known now, and nothing has run yet."""
        pipe = self.pipe
        if not pipe.do_classifier_free_guidance:
            raise BadInput(
                f"guidance_scale: expected more than 1, got {pipe.guidance_scale}; CFG++ needs the unconditional "
                "prediction, which the pipeline makes with guidance on only (with CFGPlusPlusConfig(scale=...) any "
                "guidance_scale over 1 will do)"
            )
        if getattr(pipe, "guidance_rescale", 0.0):
            raise BadInput(
                f"guidance_rescale: expected 0, got {pipe.guidance_rescale}; CFG++ does not define it: leave it out"
            )
        self.strength()

    def _drive(self, scheduler: Any, inner: Step) -> Step:
        @functools.wraps(inner)
        def step(model_output: Tensor, timestep: Any, sample: Tensor, **options: Any) -> Any:
            if options.get("uncond_output") is not None:
                return inner(model_output, timestep, sample, **options)
            prediction, self._said.prediction = self._said.prediction, None
            if prediction is None or prediction.shape[0] != 2 * sample.shape[0]:
                got = "none" if prediction is None else f"a batch of {prediction.shape[0]}"
                raise BadInput(
                    f"CFG++: expected predictions without and with the prompt of {sample.shape[0]} samples, got {got}; "
                    "call the pipeline with guidance_scale > 1, or pass uncond_output= to scheduler.step"
                )
            uncond, cond = prediction.chunk(2)
            return self._stepper(
                scheduler, inner, Predictions(uncond, cond, self.strength()), timestep, sample, options
            )

        return step

    @staticmethod
    def _scale(scheduler: Any, inner: Step) -> Step:
        @functools.wraps(inner)
        def scale_model_input(sample: Tensor, timestep: Any = None) -> Tensor:
            ready = ready_input(sample, timestep, scheduler.timesteps)
            return inner(sample, timestep) if ready is None else ready

        return scale_model_input


class _Said(threading.local):
    prediction: Tensor | None = None


def apply_cfgpp(
    pipe: Any, scale: float | None = None, *, config: CFGPlusPlusConfig | None = None, stepper: Stepper = eager_step
) -> Guidance:
    """Turns CFG++ (arXiv 2406.08070) on in a diffusers pipeline; guidance that is there already is removed first.

    The pipeline's scheduler is replaced by its CFG++ counterpart until `remove()`; so is every scheduler that the user
    sets later. `pipe(...)` is called as before, with guidance on.

    Args:
        pipe: a diffusers pipeline with classifier-free guidance.
        scale: lambda, 0..1; None: the pipeline's guidance_scale / 12.5.
        config: the same as a `CFGPlusPlusConfig`; give one of the two.
        stepper: who runs the steps (see `eager_step`).

    Raises:
        NotAPipeline: the object is no pipeline with a UNet, a scheduler and classifier-free guidance.
        BadInput: lambda outside of 0..1, a scheduler without a CFG++ counterpart, or one with options that CFG++ does
            not define.
    """
    if config is not None and scale is not None:
        raise BadInput("expected scale or config, got both; put the scale into the config")
    chosen = CFGPlusPlusConfig(scale) if config is None else config
    if not isinstance(chosen, CFGPlusPlusConfig):
        raise BadInput(f"config: expected a CFGPlusPlusConfig, got {type(chosen).__name__}")
    needed = ("unet", "scheduler", "check_inputs", "encode_prompt", "do_classifier_free_guidance", "guidance_scale")
    held = getattr(pipe, "__dict__", {})  # the last two are properties that have no value before the first request
    if missing := [name for name in needed if name not in held and not hasattr(type(pipe), name)]:
        raise NotAPipeline(
            "expected a diffusers pipeline with classifier-free guidance, "
            f"got {type(pipe).__name__} without {missing[0]}"
        )
    remove_cfgpp(pipe)
    guidance = Guidance(pipe, chosen, stepper)
    guidance.install()
    return guidance


def remove_cfgpp(pipe: Any) -> Any:
    """Takes CFG++ off a pipeline, if it is on. Returns its argument."""
    if (guidance := vars(pipe).get(_GUIDANCE)) is not None:
        guidance.remove()
    return pipe
