"""Does HiDiffusion stop duplication, and does CFG++ keep colours? Counted on pictures of the demo model.

    python -m benchmarks.effect --out benchmarks/results/effect.json

draws with the trained demo model (128x128) at its own size and above, in every way that is compared, reads each picture
by plain rules (`reading.py`) and writes JSON, a Markdown table beside it and contact sheets. An interrupted run goes on
where it stopped when it is started again with the same `--out` and the same model.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from accel_hidiff.benching.facts import machine, versions
from accel_hidiff.demo.scenes import draw
from accel_hidiff.demo.trained import trained_model
from accel_hidiff.demo.training.card import digests
from accel_hidiff.models import load_pipeline
from benchmarks.effect import drawing, report
from benchmarks.effect.arms import SIZES, cells, kinds
from benchmarks.effect.frechet import distance, features
from benchmarks.effect.reading import read
from benchmarks.harness import command_line, git_commit, write_whole


def main(argv: list[str] | None = None) -> int:
    """Run, or go on; returns the exit code."""
    options = _options(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    pictures = options.pictures or options.out.with_suffix("") / "pictures"
    if options.render:
        report.write(json.loads(options.out.read_text()), options.out, pictures)
        return 0
    pipe = load_pipeline(str(options.model or trained_model()), device="cpu")
    pipe.set_progress_bar_config(disable=True)
    record = _begun(options)
    reference = drawing.Reference(pipe.vae)
    if not any(row["table"] == "real" for row in record["cells"].values()):
        record["cells"] |= _real(pipe.vae, reference, options.captions)
    with tempfile.TemporaryDirectory() as temporary:
        cache = options.cache or Path(temporary)
        for cell in cells(options.captions, options.large, options.swept, options.guided):
            if cell.name in record["cells"] or (options.only and cell.table not in options.only):
                continue
            print(cell.name, end=" ", flush=True)
            row = drawing.measured(cell, pipe, reference, pictures, cache)
            record["cells"][cell.name] = row
            print(f"{row['seconds']} s", flush=True)
            write_whole(options.out, drawing.as_text(record))
    write_whole(options.out, drawing.as_text(record))
    report.write(record, options.out, pictures)
    return 0


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.effect", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write, or to go on with")
    parser.add_argument("--model", type=Path, help="a folder of trained weights; default: those that ship")
    parser.add_argument("--captions", type=int, default=120, help="pictures of each cell of the main table")
    parser.add_argument("--large", type=int, default=40, help="pictures of each cell at 512x512")
    parser.add_argument("--swept", type=int, default=100, help="pictures of each cell of a sweep")
    parser.add_argument("--guided", type=int, default=50, help="pictures of each cell of guidance, 50 steps each")
    parser.add_argument("--only", action="append", help="a table; repeatable")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: as torch has them")
    parser.add_argument("--pictures", type=Path, help="folder for the pictures of the sheets; default: beside --out")
    parser.add_argument("--cache", type=Path, help="a compile cache to keep between runs")
    parser.add_argument("--render", action="store_true", help="only write tables and sheets anew")
    return parser.parse_args(argv)


def _begun(options: argparse.Namespace) -> dict[str, Any]:
    """The record so far; a record of another model is not gone on with."""
    weights = digests(options.model or trained_model())
    if options.out.is_file():
        record: dict[str, Any] = json.loads(options.out.read_text())
        if record["weights"] != weights:
            raise SystemExit(
                f"{options.out}: expected results of these weights, found those of others; remove the file"
            )
        return record
    options.out.parent.mkdir(parents=True, exist_ok=True)
    return {
        "command": command_line(),
        "commit": git_commit(),
        "machine": machine(),
        "versions": versions(),
        "weights": weights,
        "cells": {},
    }


def _real(vae: Any, reference: drawing.Reference, count: int) -> dict[str, Any]:
    """What the rules make of drawn scenes, whose truth is known, and of the same through the autoencoder."""
    rows: dict[str, Any] = {}
    for size in SIZES:
        scenes = drawing.scenes(count, size, 17)
        images = [draw(scene, size.height, size.width) for scene in scenes]
        for arm, some in (("drawn", images), ("autoencoder", drawing.through_autoencoder(vae, images))):
            rows[f"real: {arm}, {size}"] = {
                "table": "real",
                "arm": arm,
                "size": str(size),
                "frechet": distance(features(vae, some), reference.of(size)),
                "readings": [asdict(read(image, kinds(scene))) for image, scene in zip(some, scenes, strict=True)],
            }
    return rows


if __name__ == "__main__":
    sys.exit(main())
