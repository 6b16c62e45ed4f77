"""Does the demo model train better on velocity or on noise? A short training of each, and what their pictures show.

    python -m benchmarks.effect.prediction --training demo-training --out benchmarks/results/prediction.json

All else is equal: autoencoder, scenes, batches, noise and rates. Losses of the two cannot be compared; pictures can.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from accel_hidiff.demo.training.recipe import DiffusionRecipe
from accel_hidiff.demo.training.run import train
from accel_hidiff.models import load_pipeline
from benchmarks.effect import drawing
from benchmarks.effect.arms import PLAIN, TRAINED, Cell, single
from benchmarks.effect.tables import share
from benchmarks.harness import Report


def main(argv: list[str] | None = None) -> None:
    """Train, draw, read, and write the report."""
    parser = argparse.ArgumentParser(prog="benchmarks.effect.prediction", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--training", type=Path, required=True, help="folder of a finished scripts/train_demo_model.py")
    parser.add_argument("--steps", type=int, default=300, help="of each training of UNet and text encoders")
    parser.add_argument("--captions", type=int, default=100, help="pictures at the training size")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: as torch has them")
    options = parser.parse_args(argv)
    if not (options.training / "autoencoder.ckpt").is_file():
        parser.error(f"--training: expected a folder with autoencoder.ckpt, got {options.training}")
    if options.threads:
        torch.set_num_threads(options.threads)
    report = Report(options.out, tiny=False)
    cell = Cell("scale", PLAIN, TRAINED, single(options.captions))
    for prediction in ("v_prediction", "epsilon"):
        recipe = replace(DiffusionRecipe(), steps=options.steps, prediction=prediction)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            for path in (options.training / "autoencoder.ckpt", *options.training.glob("scenes-*")):
                shutil.copy(path, folder)
            report.add(prediction=prediction, steps=options.steps, **_figures(train(folder, diffusion=recipe), cell))


def _figures(model: Path, cell: Cell) -> dict[str, Any]:
    pipe = load_pipeline(str(model), device="cpu")
    pipe.set_progress_bar_config(disable=True)
    with tempfile.TemporaryDirectory() as temporary:
        row = drawing.measured(cell, pipe, drawing.Reference(pipe.vae), Path(temporary), Path(temporary))
    readings = drawing.readings_of(row)
    return {
        "pictures": len(readings),
        "right_percent": share(readings, lambda reading: reading.right),
        "colours_right_percent": share(readings, lambda reading: reading.colours_right),
        "frechet": round(row["frechet"], 3),
        "seconds": json.loads((model.parent / "training.json").read_text())["seconds"]["diffusion"],
    }


if __name__ == "__main__":
    main()
