"""CFG++ (arXiv 2406.08070) as a guider of modular diffusers.

    scheduler = EulerCFGPPScheduler.from_config(pipe.scheduler.config)
    pipe.update_components(scheduler=scheduler, guider=CFGPlusPlusGuidance(scale=0.6))

The stock denoise blocks of diffusers 0.42 keep only `guider(...)[0]` and give `scheduler.step` nothing else of the
guider's (`StableDiffusionXLLoopDenoiser`, `StableDiffusionXLLoopAfterDenoiser`). So the unconditional prediction
travels on that tensor, a `GuidedPrediction`, and the schedulers of `accel_hidiff.schedulers` take it off again. Every
other use of that tensor is an error: a scheduler that does not know CFG++ cannot quietly run with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers.configuration_utils import register_to_config
from torch import Tensor

from accel_hidiff import compat
from accel_hidiff.cfgpp import maths
from accel_hidiff.cfgpp.prediction import GuidedPrediction
from accel_hidiff.config import check_lambda
from accel_hidiff.errors import BadInput

__all__ = ["CFGPlusPlusGuidance"]

BaseGuidance: Any
GuiderOutput: Any
BaseGuidance, GuiderOutput = compat.guider_classes()


class CFGPlusPlusGuidance(BaseGuidance):
    """CFG++ guidance: the guided prediction e_uncond + scale (e_cond - e_uncond), stepped with e_uncond as well.

    For noise, v and x0 predictions. Outside of `start`..`stop`, and disabled, a step is the sampler's plain one with
    the conditional prediction alone, as for diffusers' own guiders.

    Args:
        scale: lambda, 0..1; 0.6 stands for diffusers' guidance_scale of 7.5.
        guidance_rescale: refused unless 0, CFG++ does not define it.
        start: 0..1, first fraction of the steps that is guided.
        stop: start..1, where guidance ends.
        enabled: as in diffusers, whose SDXL denoise loop sets it for every request.

    Raises:
        BadInput: a value outside of its range. (start and stop: ValueError.)
    """

    _input_predictions = ["pred_cond", "pred_uncond"]  # noqa: RUF012  # BaseGuidance insists on a list

    @register_to_config
    def __init__(
        self,
        scale: float = 0.6,
        guidance_rescale: float = 0.0,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ) -> None:
        if guidance_rescale != 0:
            raise BadInput(
                f"guidance_rescale: expected 0, got {guidance_rescale!r}; CFG++ does not define it, leave it out"
            )
        self.scale = check_lambda(scale)
        super().__init__(start, stop, enabled)

    def prepare_inputs(self, data: dict[str, Any]) -> list[Any]:
        """One batch of model inputs for each condition, the conditional one first, from (cond, uncond) pairs."""
        return [self._prepare_batch(data, i, name) for i, name in enumerate(self._predictions())]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, Any]) -> list[Any]:
        """As `prepare_inputs`, with the names of the fields of a block state in place of the values."""
        return [
            self._prepare_batch_from_block_state(input_fields, data, i, name)
            for i, name in enumerate(self._predictions())
        ]

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> Any:
        """The output whose `pred`, a `GuidedPrediction`, is for the next step of the scheduler.

        Args:
            pred_cond: conditional prediction, any shape.
            pred_uncond: unconditional one, same shape and dtype; None where guidance is off.

        Raises:
            BadInput: `scale` was set to something outside of 0..1.
        """
        # The step is over. diffusers asks `num_conditions` at the start of the next request, to decide about the
        # negative prompt; with the last step of this one (outside of start..stop) the answer would be wrong.
        self._num_inference_steps = None
        uncond = pred_cond if pred_uncond is None else pred_uncond
        guided = maths.guided(uncond, pred_cond, check_lambda(self.scale))
        return GuiderOutput(pred=GuidedPrediction.join(guided, uncond), pred_cond=pred_cond, pred_uncond=pred_uncond)

    @property
    def is_conditional(self) -> bool:
        """Whether the model was last prepared for the conditional prediction."""
        return self._count_prepared == 1

    @property
    def num_conditions(self) -> int:
        """Predictions of this step: 2, or 1 where guidance is off. Between steps: 2, unless disabled."""
        return len(self._predictions())

    def _predictions(self) -> Sequence[str]:
        within = True
        if self._num_inference_steps is not None:
            first, end = (int(share * self._num_inference_steps) for share in (self._start, self._stop))
            within = first <= self._step < end
        return self._input_predictions if self._enabled and within else self._input_predictions[:1]
