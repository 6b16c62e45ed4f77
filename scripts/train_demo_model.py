"""Train the demo model from nothing: autoencoder, UNet and text encoders, on scenes that the package draws.

    .venv/bin/python scripts/train_demo_model.py --out demo-training

About an hour on two CPU cores. An interrupted run goes on where it stopped when it is started again with the same
folder. The result is `demo-training/model`, a diffusers folder with its card; the one that ships lies in
`accel_hidiff/demo/trained_model`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from accel_hidiff.demo.training.run import shortened, train


def main(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, samples and the model.")] = Path("demo-training"),
    device: Annotated[str, typer.Option(help="A torch device.")] = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads; 0: as torch has them.", min=0)] = 0,
    share: Annotated[
        float, typer.Option(help="Share of the recipe's steps, to try the way through.", min=0.0001, max=1.0)
    ] = 1.0,
) -> None:
    """Train the demo model."""
    if threads:
        torch.set_num_threads(threads)
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).splitlines()[0]
        print(f"--device: expected one that torch has here, got {device} ({reason})", file=sys.stderr)
        raise SystemExit(2) from None
    first, second = shortened(share) if share < 1 else (None, None)
    try:
        print(train(out, device=device, autoencoder=first, diffusion=second))
    except ValueError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        print(f"--out: expected a folder that can be written, got {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    typer.run(main)
