"""Golden pictures of the trained model: requests with fixed seeds, and the pictures that eager drew for them.

`python -m tests.demo.golden` draws them anew, after the model or the meaning of a request changed on purpose.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import accel_hidiff as ah
from accel_hidiff.demo import trained_model
from accel_hidiff.models import load_pipeline

FOLDER = Path(__file__).parents[1] / "data/demo_golden"
STEPS = 12


@dataclass(frozen=True)
class Request:
    """One request: name of its picture, caption, size in pixels, whether HiDiffusion is on, lambda of CFG++."""

    name: str
    prompt: str
    height: int
    width: int
    hidiffusion: bool = True
    lam: float | None = None

    @property
    def kinds(self) -> list[tuple[str, str]]:
        """Shape and colour of what the caption names."""
        _, colour, shape, *_ = self.prompt.split()
        return [(shape, colour)]


REQUESTS = (
    Request("trained_size", "a red house on grey", 128, 128, hidiffusion=False),
    Request("square", "a blue person on pink", 256, 256),
    Request("wide", "an orange fish on blue", 192, 320),
    Request("guided", "a green tree on yellow", 256, 256, lam=0.6),
)


def pipeline() -> Any:
    """The trained model, on the CPU in float32."""
    pipe = load_pipeline(str(trained_model()), device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe: Any, request: Request) -> np.ndarray:
    """(height, width, 3), float32 in [0, 1], by the pipeline as it is."""
    image: np.ndarray = pipe(
        request.prompt,
        height=request.height,
        width=request.width,
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).images[0]
    return image


def eager(pipe: Any, request: Request) -> np.ndarray:
    """The same with what the request asks for put on, and taken off again."""
    if request.hidiffusion:
        ah.apply_hidiffusion(pipe)
    if request.lam is not None:
        ah.apply_cfgpp(pipe, request.lam)
    try:
        return picture(pipe, request)
    finally:
        if request.lam is not None:
            ah.remove_cfgpp(pipe)
        if request.hidiffusion:
            ah.remove_hidiffusion(pipe)


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    pipe = pipeline()
    for request in REQUESTS:
        pixels = (eager(pipe, request) * 255).round().astype(np.uint8)
        Image.fromarray(pixels).save(FOLDER / f"{request.name}.png", optimize=True)


if __name__ == "__main__":
    main()
