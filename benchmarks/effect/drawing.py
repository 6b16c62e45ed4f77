"""Draw the pictures of a cell, read them, and keep both."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy
import torch
from PIL import Image

import accel_hidiff as ah
from accel_hidiff.demo.scenes import Scene, draw, random_scene
from accel_hidiff.demo.training.recipe import pixels
from benchmarks.effect.arms import Arm, Cell
from benchmarks.effect.frechet import distance, features
from benchmarks.effect.reading import Pixels, Reading, read
from benchmarks.harness import Size

VERSION: Final = 2  # of what is in a record: raise it when the rules, the features or a row change
SHOWN: Final = 12  # pictures of a cell that are kept for the contact sheets
_PIXELS_AT_ONCE: Final = 8 * 256 * 256
_REAL: Final = 1000  # scenes that a Frechet distance is measured against


def pictures(pipe: Any, cell: Cell) -> list[Pixels]:
    """One picture for each prompt of a cell. A prompt's first noise depends on its own seed alone."""
    size = cell.size
    at_once = max(_PIXELS_AT_ONCE // (size.width * size.height), 1)
    drawn: list[Pixels] = []
    for start in range(0, len(cell.prompts), at_once):
        some = cell.prompts[start : start + at_once]
        images = pipe(
            [prompt.text for prompt in some],
            height=size.height,
            width=size.width,
            num_inference_steps=cell.steps,
            guidance_scale=cell.arm.scale,
            generator=[torch.Generator().manual_seed(prompt.seed) for prompt in some],
            output_type="np",
        ).images
        drawn += [(image * 255).round().astype(numpy.uint8) for image in images]
    return drawn


def scenes(count: int, size: Size, seed: int) -> list[Scene]:
    """Scenes with one object for canvases of a size."""
    aspect = size.width / size.height
    return [random_scene(numpy.random.default_rng((seed, number)), aspect=aspect, objects=1) for number in range(count)]


def through_autoencoder(vae: Any, images: Sequence[Pixels]) -> list[Pixels]:
    """Pictures encoded and decoded: what the best of diffusion models could draw with this autoencoder."""
    decoded: list[Pixels] = []
    for start in range(0, len(images), 16):
        with torch.no_grad():
            batch = vae.decode(vae.encode(pixels(list(images[start : start + 16]))).latent_dist.mode()).sample
        whole = batch.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
        decoded += list(whole)
    return decoded


class Reference:
    """Features of drawn scenes with one object, by size; made when first asked for."""

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self._known: dict[Size, numpy.ndarray[Any, Any]] = {}

    def of(self, size: Size) -> numpy.ndarray[Any, Any]:
        """(1000, 64)."""
        if size not in self._known:
            # Squeezed to 128x128 anyway: drawn at the trained scale of this aspect ratio, which is as good and quicker.
            scale = 128 / min(size)
            small = Size(round(size.width * scale), round(size.height * scale))
            drawn = [draw(scene, small.height, small.width) for scene in scenes(_REAL, small, 31)]
            self._known[size] = features(self.vae, drawn)
        return self._known[size]


def measured(cell: Cell, pipe: Any, reference: Reference, folder: Path, cache: Path) -> dict[str, Any]:
    """Draw and read one cell; its first pictures are kept in `folder` for the contact sheets."""
    began = time.perf_counter()
    with cell.arm.on(pipe, cache):
        images = pictures(pipe, cell)
        weight = _mean_weight(pipe, cell.arm)
    seconds = time.perf_counter() - began
    readings = [read(image, prompt.kinds) for image, prompt in zip(images, cell.prompts, strict=True)]
    one_object = all(len(prompt.kinds) == 1 for prompt in cell.prompts)
    apart = distance(features(pipe.vae, images), reference.of(cell.size)) if one_object else None
    kept(folder, cell.name, images)
    return {
        "table": cell.table,
        "arm": cell.arm.name,
        "hidiffusion": cell.arm.hidiffusion.to_json() if cell.arm.hidiffusion else None,
        "scale": None if cell.arm.lam is not None else cell.arm.scale,
        "lambda": cell.arm.lam,
        "mean_weight": weight,
        "steps": cell.steps,
        "size": str(cell.size),
        "seconds": round(seconds, 1),
        "frechet": apart,
        "readings": [asdict(reading) for reading in readings],
    }


def _mean_weight(pipe: Any, arm: Arm) -> float:
    """The CFG weight, of CFG++ the mean of those that take the same steps, in the request that has just been served."""
    if arm.lam is None:
        return arm.scale
    return float(ah.equivalent_cfg_scale(arm.lam, pipe.scheduler.sigmas).mean())


def kept(folder: Path, name: str, images: Sequence[Pixels]) -> None:
    """Keep the first pictures of a cell, side by side in one file."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(numpy.concatenate(list(images[:SHOWN]), 1)).save(folder / file_name(name))


def file_name(name: str) -> str:
    """Of a cell's pictures."""
    return "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in name) + ".png"


def readings_of(row: dict[str, Any]) -> list[Reading]:
    """The readings in a record of `measured`."""
    return [Reading(**entry) for entry in row["readings"]]


def as_text(rows: dict[str, Any]) -> str:
    """The record as JSON, one line per cell."""
    head = {name: value for name, value in rows.items() if name != "cells"}
    lines = [f"{json.dumps(name)}: {json.dumps(row)}" for name, row in rows["cells"].items()]
    return json.dumps(head, indent=1)[:-2] + ',\n "cells": {\n  ' + ",\n  ".join(lines) + "\n }\n}\n"
