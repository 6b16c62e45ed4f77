"""The step region: guidance, one step of CFG++ by any sampler, and the next network input, in one graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from accel_hidiff.call import RegionCall, UNetCall
from accel_hidiff.cfgpp import maths
from accel_hidiff.families import Size
from accel_hidiff.regions.base import BATCH, SIDE, Axes, GraphModule, Region, Sizes
from compile_cache import Range

STEP = "cfgpp.step"
_IMAGE = {0: "batch", 2: "height", 3: "width"}


class GuidedStep(nn.Module):
    """Combines two predictions, takes one step by its coefficients (`maths.step_by_coefficients`), and makes the next
    input of the network of its result."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(
        self,
        sample: Tensor,
        uncond: Tensor,
        cond: Tensor,
        history: Tensor,
        noise: Tensor,
        row: Tensor,
        strength: Tensor,
        next_scale: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(next sample, history of the next step in the row's dtype, next sample twice and scaled)."""
        x, u, c = (tensor.to(row.dtype) for tensor in (sample, uncond, cond))
        guided = maths.guided(u, c, strength)
        x_next, history_next = maths.step_by_coefficients(row, x, guided, u, history, noise)
        x_next = x_next.to(sample.dtype)
        scaled = (x_next.to(row.dtype) * next_scale).to(sample.dtype)
        return x_next, history_next, torch.cat([scaled, scaled])


class StepRegion(Region):
    """(B, C, h, w) sample, predictions without and with the prompt, float32 history and noise; (8,) float32
    coefficients, 0-d float32 lambda and scale -> next sample, next history, (2 B, C, h, w) next input of the network.

    All numbers are tensors: sampler, step and lambda change no graph.
    """

    kind = "cfgpp step"

    def __init__(self, channels: int) -> None:
        module = GuidedStep(channels)
        super().__init__(STEP, module, module.forward)

    @property
    def channels(self) -> int:
        return int(self.module.channels)

    def axes(self, traits: Mapping[str, Any]) -> Axes:
        return (_IMAGE,) * 5

    def ranges(self, traits: Mapping[str, Any]) -> dict[str, Range]:
        return {"batch": BATCH, "height": SIDE, "width": SIDE}

    def sizes(self, features: Mapping[str, Size], batch: int, tokens: int) -> dict[str, int]:
        height, width = features[STEP]
        return {"batch": batch, "height": height, "width": width}

    def example(
        self, traits: Mapping[str, Any], sizes: Sizes, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, ...]:
        wide = torch.promote_types(dtype, torch.float32)
        images = [self.image(sizes, kind, device) for kind in (dtype, dtype, dtype, wide, wide)]
        numbers = [torch.tensor(0.5, device=device), torch.tensor(0.5, dtype=wide, device=device)]
        return *images, torch.rand(len(maths.COLUMNS), dtype=wide, device=device), *numbers

    def graph_module(self, traits: Mapping[str, Any]) -> nn.Module:
        return GraphModule(self.module, self.inner)

    def forward_with(self, compiled: RegionCall, call: UNetCall | None, *args: Any, **kwargs: Any) -> Any:
        return compiled(*args)
