"""What both trainings share: steps that can be interrupted, a learning rate, a running average, a record of losses."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from accel_hidiff.files import whole_file

_SAVE_EVERY_S = 120.0
_SAY_EVERY = 50


def learning_rate(step: int, steps: int, warm_up: int) -> float:
    """A share of the highest rate: linear up, then half a cosine down to a hundredth.

    >>> learning_rate(0, 100, 10), learning_rate(10, 100, 10), round(learning_rate(100, 100, 10), 4)
    (0.1, 1.0, 0.01)
    """
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.01 + 0.99 * (1 + math.cos(math.pi * (step - warm_up) / max(steps - warm_up, 1))) / 2


class Average:
    """A running average of parameters, which draws better than the last step's do.

    It forgets fast at first: after n steps it reaches back n / 10 of them, up to 1 / (1 - decay).
    """

    def __init__(self, parameters: list[torch.nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = parameters, decay
        self.values = [parameter.detach().clone() for parameter in parameters]

    def update(self, step: int) -> None:
        """Take the parameters after step number `step` in."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], 1 - decay)

    def swap(self) -> None:
        """Exchange the averages and the parameters, in place."""
        with torch.no_grad():
            for value, parameter in zip(self.values, self.parameters, strict=True):
                kept = parameter.detach().clone()
                parameter.copy_(value)
                value.copy_(kept)


@dataclass
class Training:
    """One training: `loss_of(step)` builds the loss; everything else about a step is the same for both.

    `folder/NAME.ckpt` holds it after interruptions; a run that finds one goes on from there, and gives the weights that
    it would have given without the interruption (data and noise of a step depend on its number alone).
    """

    name: str
    folder: Path
    modules: Mapping[str, torch.nn.Module]
    loss_of: Callable[[int], torch.Tensor]
    steps: int
    rate: float
    warm_up: int
    settings: Mapping[str, Any]
    weight_decay: float = 0.01
    clip: float = 1.0
    average: float = 0.998
    pictures: Callable[[int], None] | None = None
    pictures_every: int = 500
    say: Callable[[str], None] = print
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def run(self) -> None:
        """Train to the last step, and leave the averaged weights in the modules.

        Raises:
            ValueError: the folder holds a training with other settings.
        """
        parameters = [p for module in self.modules.values() for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters, self.rate, betas=(0.9, 0.99), weight_decay=self.weight_decay, fused=True
        )
        mean = Average(parameters, self.average)
        step = self._restore(optimizer, mean)
        saved = began = time.monotonic()
        before = self.seconds
        for module in self.modules.values():
            module.train()
        while step < self.steps:
            for group in optimizer.param_groups:
                group["lr"] = self.rate * learning_rate(step, self.steps, self.warm_up)
            loss = self.loss_of(step)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, self.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            mean.update(step)
            self.losses.append(float(loss.detach()))
            step += 1
            self.seconds = before + time.monotonic() - began
            if step % _SAY_EVERY == 0 or step == self.steps:
                recent = self.losses[-_SAY_EVERY:]
                self.say(
                    f"{self.name}: step {step} of {self.steps}, loss {sum(recent) / len(recent):.4f}, "
                    f"{self.seconds:.0f} s"
                )
            if step == self.steps or time.monotonic() - saved > _SAVE_EVERY_S:
                self._save(step, optimizer, mean)
                saved = time.monotonic()
            if self.pictures and (step % self.pictures_every == 0 or step == self.steps):
                mean.swap()
                with torch.no_grad():
                    self.pictures(step)
                mean.swap()
        mean.swap()
        for module in self.modules.values():
            module.eval()

    def _save(self, step: int, optimizer: torch.optim.Optimizer, mean: Average) -> None:
        state = {
            "settings": json.dumps(self.settings, sort_keys=True),
            "step": step,
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimizer": optimizer.state_dict(),
            "average": mean.values,
            "losses": self.losses,
            "seconds": self.seconds,
        }
        with whole_file(self.folder / f"{self.name}.ckpt") as part:
            torch.save(state, part)

    def _restore(self, optimizer: torch.optim.Optimizer, mean: Average) -> int:
        path = self.folder / f"{self.name}.ckpt"
        if not path.is_file():
            return 0
        state = torch.load(path, map_location=mean.values[0].device, weights_only=True)
        wanted = json.dumps(self.settings, sort_keys=True)
        if state["settings"] != wanted:
            raise ValueError(
                f"{path}: expected a training with {wanted}, found one with {state['settings']}; "
                "choose another folder, or remove that whole folder"
            )
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        optimizer.load_state_dict(state["optimizer"])
        mean.values = state["average"]
        self.losses, self.seconds = state["losses"], state["seconds"]
        self.say(f"{self.name}: going on at step {state['step']} of {self.steps}")
        return int(state["step"])
