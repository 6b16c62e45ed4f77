"""The trained demo model that ships with the package: where it lies."""

from __future__ import annotations

from pathlib import Path

from accel_hidiff.errors import NotAPipeline

_FOLDER = Path(__file__).parent / "trained_model"


def trained_model() -> Path:
    """The diffusers folder of the trained demo model; its card, `README.md`, tells data, recipe and limits.

    Raises:
        NotAPipeline: this installation came without it.
    """
    if not (_FOLDER / "model_index.json").is_file():
        raise NotAPipeline(
            f"{_FOLDER}: expected the trained demo model, found nothing; install the whole wheel, "
            "or train it with scripts/train_demo_model.py"
        )
    return _FOLDER
