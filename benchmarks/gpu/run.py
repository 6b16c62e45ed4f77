"""SDXL in full size (random weights, bfloat16, batch 2) on one GPU, the most valuable figures first, in some minutes.

    python -m benchmarks.gpu.run --minutes 8 --out benchmarks/results/gpu.json
    python benchmarks/gpu/run.py --minutes 8 --out benchmarks/results/gpu.json    # nothing installed, from the root

It needs torch, triton, diffusers, transformers and psutil. JSON and Markdown are on disk after every record; a case for
which too little time is left is skipped. `--resume` goes on where a run ended: records that are done stay.
`--device cpu --tiny` is a dry run. The exit code is 1 if a compiled output was wrong, if a check could not run, or if
the second process compiled anything; cases that were skipped, or cut at the end of the minutes, do not count.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

if not __package__:  # run as a file: its own folder must not hide modules, the root has the packages
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from benchmarks import harness as h
from benchmarks.gpu.lab import Lab, Setting
from benchmarks.gpu.model import LIMITS, model_name
from benchmarks.gpu.records import CannotResume, Records, facts_of_run
from benchmarks.gpu.runner import Clock, passed, run_stages, work_alone
from benchmarks.gpu.stages import NAMES, chosen
from benchmarks.gpu.table import render

GPU_SIZES = (h.Size(1024, 1024), h.Size(2048, 2048), h.Size(2688, 1536))
TINY_SIZES = (h.Size(128, 128),)


def main() -> int:
    """The exit code."""
    if (config := h.worker_config()) is not None:
        print(json.dumps(asdict(work_alone(config))), flush=True)
        return 0
    parser = _arguments()
    options = h.parsed(parser)
    clock = Clock(options.minutes)
    try:
        stages = chosen(options.only)
    except ValueError as problem:
        parser.error(str(problem))
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected cpu on a machine without CUDA, got cuda; a dry run is --device cpu --tiny")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the process of a case ends with this one
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        setting = _setting(options, (options.cache or Path(directory)).resolve())
        model = {
            "name": model_name(setting.tiny),
            "device": setting.device,
            "dtype": setting.dtype,
            "sizes": [f"{width}x{height}" for width, height in setting.sizes],
            "limits": LIMITS[getattr(torch, setting.dtype)],
        }
        markdown = options.markdown or options.out.with_suffix(".md")
        records = Records(options.out, markdown, facts_of_run(model), render)
        try:
            if options.resume:
                records.resume()
        except CannotResume as problem:
            parser.error(str(problem))
        records.begin()
        run_stages(stages, Lab(setting), records, clock)
        return 0 if passed(stages, records) else 1


def _arguments() -> argparse.ArgumentParser:
    parser = h.arguments(__doc__, repeats=10)
    parser.add_argument("--minutes", type=float, default=8.0, help="budget of the whole run")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--resume", action="store_true", help="keep what --out holds and did not fail")
    parser.add_argument("--only", metavar="STAGE[,STAGE]", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--markdown", type=Path, help="Markdown file to write; default: beside --out")
    parser.add_argument("--cache", type=Path, help="compile cache to use and fill; default: a temporary one")
    parser.add_argument("--jobs", type=int, help="processes that compile; default on a GPU: two fewer than cores")
    return parser


def _setting(options: argparse.Namespace, cache: Path) -> Setting:
    sizes = tuple(options.size or (TINY_SIZES if options.tiny else GPU_SIZES))
    jobs = options.jobs
    if jobs is None and options.device == "cuda":
        jobs = max(1, min(14, (os.cpu_count() or 1) - 2))
    dtype = "bfloat16" if options.device == "cuda" else "float32"
    sides = tuple((size.width, size.height) for size in sizes)
    return Setting(options.device, dtype, options.tiny, sides, str(cache), jobs, options.repeats)


if __name__ == "__main__":
    sys.exit(main())
