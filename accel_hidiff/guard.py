"""The guard: may a compiled graph serve this UNet call? A pure function of facts; no torch.

Facts are collected elsewhere (`dispatch`), so that every decision can be tested on any machine. A rejection carries the
reason, and what to do about it, to the user.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from accel_hidiff.topology import Topology
from compile_cache import ShapeBucket


@dataclass(frozen=True, slots=True)
class Accept:
    """A compiled graph may serve the call."""


@dataclass(frozen=True, slots=True)
class Reject:
    """No compiled graph may serve the call, and why."""

    reason: str


Decision = Accept | Reject
ACCEPT = Accept()

# Arguments of a UNet's or ControlNet's call that change what runs inside of a block; any other one that is not among
# the inputs of a whole-model graph changes that.
_CHANGES_BLOCKS = ("cross_attention_kwargs", "attention_mask", "encoder_attention_mask", "image_embeds")
_INPUTS_OF_WHOLE = ("down_block_additional_residuals", "mid_block_additional_residual")


@dataclass(frozen=True, slots=True)
class CallFacts:
    """Everything about one UNet call that decides which graph serves it, and whether one may.

    Sizes are latent; `tokens` is the text length; `extras` names the optional arguments that were given, `whole` tells
    that one graph serves the whole model; `dtype` and `device` are the sample's, `channels` those that it has and those
    that the model takes, `residuals` the dtypes and devices of a ControlNet's that are not the sample's, `weights` the
    device that the weights are on ("" where it is not known), `hook` the attribute in which the model has a hook of
    accelerate or diffusers ("" for none).
    """

    topology: Topology
    height: int
    width: int
    batch: int
    tokens: int
    dtype: str
    device: str
    extras: tuple[str, ...] = ()
    whole: bool = False
    grad: bool = False
    autocast: bool = False
    tensor_text: bool = True
    channels: tuple[int, int] = (4, 4)
    residuals: tuple[str, ...] = ()
    weights: str = ""
    hook: str = ""


def judge_call(facts: CallFacts) -> Decision:
    """Accept, or Reject with the reason."""
    if facts.grad:
        return Reject("gradients are on, compiled graphs have none: call under torch.no_grad()")
    if facts.autocast:
        return Reject("autocast is on, graphs are compiled for one dtype: leave it, or set the pipeline's dtype")
    if facts.weights and facts.weights != facts.device:
        return Reject(
            f"the weights are on {facts.weights}, the sample on {facts.device}: compiled graphs bind weights where "
            "they are; move the model there for good (CPU offload moves it at every call)"
        )
    if facts.hook:
        return Reject(
            f"the model has a hook ({facts.hook}) that may move its weights at every call (CPU offload does), compiled "
            "graphs bind weights where they are: remove the hook, and move the model to its device for good"
        )
    if not facts.tensor_text:
        return Reject("encoder_hidden_states is no (batch, tokens, channels) tensor of the sample's batch and dtype")
    if facts.channels[0] != facts.channels[1]:
        return Reject(f"expected a sample of {facts.channels[1]} channels, got {facts.channels[0]}")
    if facts.residuals:
        return Reject(
            f"expected a ControlNet's residuals in {facts.dtype} on {facts.device}, as the sample is, got "
            f"{', '.join(facts.residuals)}: give the ControlNet the UNet's dtype and device"
        )
    if facts.whole:
        given = [name for name in facts.extras if name not in _INPUTS_OF_WHOLE]
    else:
        given = [name for name in facts.extras if name in _CHANGES_BLOCKS]
    if given:
        hint = '; regions="blocks" serves it' if given[0] not in _CHANGES_BLOCKS else ""
        return Reject(f"the call passes {given[0]}, which is no input of the compiled graphs{hint}")
    return ACCEPT


def judge_sizes(region: str, bucket: ShapeBucket, sizes: Mapping[str, int]) -> Decision:
    """Whether an artifact may be fed with these sizes: by the constraints that its export recorded.

    A package that is fed with other sizes computes garbage without an error, so this check stands before each first
    use of a size.
    """
    reason = bucket.reject(sizes)
    return ACCEPT if reason is None else Reject(f"{region}: {reason}; its artifact serves {bucket}")
