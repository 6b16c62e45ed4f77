"""Published architectures, as configs without weights: enough to precompile for every checkpoint that has them.

"arch:sdxl" names one in the place of a model's folder, where no weights are needed: artifacts hold none, and their keys
name the structure. The configs are those that the models were published with (Stable Diffusion XL base 1.0 and Stable
Diffusion 1.5, and a ControlNet of each).
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from accel_hidiff.errors import BadInput

_PREFIX: Final = "arch:"
_FOLDER: Final = Path(__file__).parent
NAMES: Final = ("sd15", "sdxl")


def is_architecture(model: str) -> bool:
    """Whether a model's name is that of an architecture."""
    return model.startswith(_PREFIX)


def configs_of(model: str, part: str = "") -> str:
    """The folder of an architecture's configs; any other model stays as it is.

    Args:
        model: "arch:sdxl", or a diffusers folder or a hub id.
        part: of it: "controlnet"; "" for the pipeline.

    Raises:
        BadInput: there is no such architecture.

    >>> configs_of("models/sdxl")
    'models/sdxl'
    """
    if not is_architecture(model):
        return model
    name = model.removeprefix(_PREFIX)
    if name not in NAMES:
        raise BadInput(f"model: expected an architecture among {', '.join(NAMES)} behind {_PREFIX!r}, got {name!r}")
    return str(_FOLDER / name / part)
