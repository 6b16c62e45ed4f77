"""The reference trajectories of `tests/data/golden_cfgpp`: its README says what each tensor is and comes from."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accel_hidiff.cfgpp import maths
from tests.tensors import read_tensors

FOLDER = Path(__file__).parent / "data" / "golden_cfgpp"
CASES: dict[str, dict[str, Any]] = {
    case["id"]: case for case in json.loads((FOLDER / "manifest.json").read_text(encoding="utf-8"))["cases"]
}
FLOAT64 = 1e-9  # of the largest value; rounding noise is about 1e-14, the least mistake above 1e-4
FLOAT32 = 2e-5
TOLERANCES = ((torch.float64, FLOAT64), (torch.float32, FLOAT32))
TABLES = {  # the options that make a case's table
    "sdxl": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    "kolors": {
        "beta_start": 0.00085,
        "beta_end": 0.014,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1100,
    },
}


@cache
def _all() -> dict[str, Tensor]:
    return read_tensors(FOLDER / "trajectories.safetensors")


def tensors(case_id: str) -> dict[str, Tensor]:
    """The tensors of a case, by their short name."""
    return {name: _all()[f"{case_id}/{name}"] for name in CASES[case_id]["tensors"]}


def table(config: str) -> Tensor:
    """The float32 table of cumulative alphas."""
    return _all()[f"table/{config}_alphas_cumprod"]


def predict(x: Tensor, t: float, guidance: float, phi: float = 0.0) -> tuple[Tensor, Tensor]:
    """(guided, unconditional) noise of the closed-form predictor, in x's dtype."""
    uncond = torch.tanh(0.7 * x + 0.3 * math.sin(t / 100))
    return maths.guided(uncond, uncond + 0.25 * torch.cos(1.3 * x + t / 250 + phi), guidance), uncond


def error(found: Tensor, reference: Tensor) -> float:
    """max |found - reference| / max |reference|."""
    return float((found.double() - reference).abs().max() / reference.abs().max())
