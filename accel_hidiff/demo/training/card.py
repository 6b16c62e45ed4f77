"""The card of the trained model: what it is, what it was made from, and how to know that it is that."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from accel_hidiff.demo.scenes import BACKGROUNDS, COLOURS, SHAPES


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every weights file of a diffusers folder, by its path in the folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.safetensors"))
    }


def card(summary: dict[str, Any], weights: dict[str, str]) -> str:
    """The card, in Markdown, from what a training recorded and the digests of the weights."""
    first, second = summary["recipes"]["autoencoder"], summary["recipes"]["diffusion"]
    seconds, loss, versions = summary["seconds"], summary["final_loss"], summary["versions"]
    hashes = "\n".join(f"| `{name}` | `{digest}` |" for name, digest in weights.items())
    shapes, colours, backgrounds = (", ".join(names) for names in (SHAPES, COLOURS, BACKGROUNDS))
    return f"""---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# The demo model of accel_hidiff

A small latent diffusion model with the layout of Stable Diffusion XL: its block types, two text encoders, pooled text
and size conditioning, a KL autoencoder of factor 8. It draws one sort of picture, an object on a pale background, at
128x128 pixels, so that what HiDiffusion and CFG++ do above that size can be seen and counted on a CPU.

    pipe = StableDiffusionXLPipeline.from_pretrained(FOLDER)
    pipe("a red house on grey", height=128, width=128, guidance_scale=3.0).images[0]

## Data

Scenes that `accel_hidiff/demo/scenes.py` draws from a seed, at random places and sizes, with soft texture:

- {len(SHAPES)} shapes: {shapes};
- {len(COLOURS)} colours: {colours};
- {len(BACKGROUNDS)} backgrounds: {backgrounds}.

84 % of the scenes have one object, 12 % two, 4 % three; captions name them all ("an orange house on grey", "two red
fish on blue"). Canvases: 128x128 (70 %), 160x96 and 96x160 (15 % each). No picture or text from elsewhere was used.

## Recipe

`scripts/train_demo_model.py`, from nothing, seed {second["seed"]}.

- Autoencoder: {first["steps"]} steps of {first["batch"]} crops of 64x64 pixels; absolute error of pixels and of their
  differences, KL weight {first["prior"]:g}.
- UNet and both text encoders together: {second["steps"]} steps of {second["batch"]} scenes, out of {second["scenes"]}
  that were encoded once; v-prediction on SDXL's noise schedule, mean squared error; AdamW, highest rate
  {second["rate"]:g}, {second["warm_up"]} steps of warm-up, half a cosine down; {100 * second["without_caption"]:g} % of
  the captions left out (zeros, as the pipeline has them for an empty prompt); running average of the weights, decay
  {second["average"]:g}. bfloat16 autocast, float32 weights, stored as float16.
- SDXL's size conditioning is drawn at random (once, twice or four times the real size), so that the model learned to
  take nothing from it.

Took {seconds["autoencoder"]} s and {seconds["diffusion"]} s on {summary["threads"]} threads ({summary["device"]}); last
losses {loss["autoencoder"]:g} and {loss["diffusion"]:g}; torch {versions["torch"]}, diffusers {versions["diffusers"]},
transformers {versions["transformers"]}, Python {versions["python"]}.

## Weights

| file | SHA-256 |
| --- | --- |
{hashes}

## Limits

It knows its {len(SHAPES)} shapes and the words above; any other word is noise to it. It counts to three, not reliably.
What it shows about scale need not carry over to large models in size, only in kind. It has no sibling in the layout
of Stable Diffusion 1.5, which would take as long again to train. Licence: as the project's (Apache-2.0).
"""
