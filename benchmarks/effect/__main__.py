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
from accel_hidiff.errors import BadInput
from accel_hidiff.models import load_pipeline
from benchmarks.effect import drawing, report
from benchmarks.effect.arms import cells, kinds, tables
from benchmarks.effect.frechet import distance, features
from benchmarks.effect.reading import read
from benchmarks.harness import Size, command_line, git_commit, write_whole


def main(argv: list[str] | None = None) -> int:
    """Run, or go on; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        return _run(options)
    except (BadInput, OSError) as problem:
        parser.error(str(problem))


def _run(options: argparse.Namespace) -> int:
    if options.threads:
        torch.set_num_threads(options.threads)
    pictures = options.pictures or options.out.with_suffix("") / "pictures"
    if options.render:
        report.write(_read(options.out), options.out, pictures)
        return 0
    record = _begun(options)
    pipe = load_pipeline(str(options.model or trained_model()), device="cpu")
    pipe.set_progress_bar_config(disable=True)
    reference = drawing.Reference(pipe.vae)
    wanted = [
        cell
        for cell in cells(options.captions, options.large, options.swept, options.guided)
        if not options.only or cell.table in options.only
    ]

    run = {
        "command": command_line(),
        "commit": git_commit(),
        "machine": machine(),
        "versions": versions(),
        "threads": torch.get_num_threads(),
    }

    def keep(name: str, row: dict[str, Any]) -> None:
        if record["runs"][-1:] != [run]:
            record["runs"].append(run)
        record["cells"][name] = row | {"run": len(record["runs"]) - 1}
        write_whole(options.out, drawing.as_text(record))

    for size, count in dict.fromkeys((cell.size, len(cell.prompts)) for cell in wanted):
        if f"real: drawn, {size}, {count} pictures" not in record["cells"]:
            for row in _real(pipe.vae, reference, size, count):
                keep(f"real: {row['arm']}, {size}, {count} pictures", row)
    with tempfile.TemporaryDirectory() as temporary:
        for cell in wanted:
            if cell.name not in record["cells"]:
                print(cell.name, end=" ", flush=True)
                row = drawing.measured(cell, pipe, reference, pictures, options.cache or Path(temporary))
                keep(cell.name, row)
                print(f"{row['seconds']} s", flush=True)
    report.write(record, options.out, pictures)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.effect", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=_json, required=True, help="JSON file to write, or to go on with")
    parser.add_argument("--model", type=Path, help="a folder of trained weights; default: those that ship")
    parser.add_argument("--captions", type=_count, default=100, help="pictures of each cell of the main table")
    parser.add_argument("--large", type=_count, default=30, help="pictures of each cell at 512x512")
    parser.add_argument("--swept", type=_count, default=50, help="pictures of each cell of a sweep")
    parser.add_argument("--guided", type=_count, default=50, help="pictures of each cell of guidance, 50 steps each")
    parser.add_argument("--only", action="append", choices=tables(), help="a table; repeatable")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: as torch has them")
    parser.add_argument("--pictures", type=Path, help="folder for the pictures of the sheets; default: beside --out")
    parser.add_argument("--cache", type=Path, help="a compile cache to keep between runs")
    parser.add_argument("--render", action="store_true", help="only write tables and sheets anew")
    return parser


def _json(text: str) -> Path:
    path = Path(text)
    if path.suffix != ".json":
        raise argparse.ArgumentTypeError(f"expected a name that ends with .json, got {text}")
    return path


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"expected 2 or more pictures, which have a spread, got {text}")
    return int(text)


def _read(out: Path) -> dict[str, Any]:
    """A record that this version wrote."""
    try:
        record: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        version = record["version"]
    except (ValueError, KeyError):
        raise BadInput(f"{out}: expected a record of benchmarks.effect, found something else") from None
    if version != drawing.VERSION:
        raise BadInput(f"{out}: expected a record of version {drawing.VERSION}, got {version}; choose another --out")
    return record


def _begun(options: argparse.Namespace) -> dict[str, Any]:
    """The record so far; one of another model is not gone on with."""
    weights = digests(options.model or trained_model())
    record = _read(options.out) if options.out.exists() else {}
    if record.setdefault("weights", weights) != weights:
        raise BadInput(f"{options.out}: expected results of these weights, found those of others; choose another --out")
    record = {"version": drawing.VERSION, "runs": [], "cells": {}} | record
    write_whole(options.out, drawing.as_text(record))  # what cannot be written is told before anything is drawn
    return record


def _real(vae: Any, reference: drawing.Reference, size: Size, count: int) -> list[dict[str, Any]]:
    """What the rules make of the same scenes through the autoencoder, and as drawn, with their truth known."""
    scenes = drawing.scenes(count, size, 17)
    images = [draw(scene, size.height, size.width) for scene in scenes]
    return [
        {
            "table": "real",
            "arm": arm,
            "size": str(size),
            "frechet": distance(features(vae, some), reference.of(size)),
            "readings": [asdict(read(image, kinds(scene))) for image, scene in zip(some, scenes, strict=True)],
        }
        for arm, some in (("autoencoder", drawing.through_autoencoder(vae, images)), ("drawn", images))
    ]


if __name__ == "__main__":
    sys.exit(main())
