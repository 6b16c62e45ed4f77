"""Runs a set of scenarios and writes JSON, Markdown and plots: `python -m benchmarks.compare --out FILE.json`."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from accel_hidiff.benching.options import Options
from accel_hidiff.errors import BadInput, BenchFailed
from benchmarks import harness as h
from benchmarks.compare import insight, requests, steps
from benchmarks.compare.plots import plot
from benchmarks.compare.scenarios import SETS, Scenario, StepScenario
from benchmarks.compare.tables import markdown
from benchmarks.compare.text import reason


def main() -> None:
    os.environ.setdefault("TQDM_DISABLE", "1")  # of libraries, in all processes
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("--set", choices=SETS, default="cpu", help="which scenarios (benchmarks/compare/scenarios.py)")
    parser.add_argument("--only", action="append", metavar="NAME", help="a scenario of the set; repeat for more")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; .md and plots are written beside it")
    parser.add_argument("--threads", type=int, default=1, help="torch's CPU threads")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="contenders that compile at the same time")
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH", help="as of accel-hidiff bench")
    parser.add_argument("--render", action="store_true", help="run nothing: write .md and plots anew from --out")
    options = parser.parse_args()
    if options.jobs < 1 or options.threads < 1:
        parser.error(f"--jobs, --threads: expected at least 1, got {options.jobs} and {options.threads}")
    failed = False
    if options.render:
        if not options.out.is_file():
            parser.error(f"--render: expected the JSON file of a run as --out, found none at {options.out}")
    else:
        try:
            pythons = dict(Options.parse_pythons(options.python))
        except BadInput as problem:
            parser.error(str(problem))
        failed = run_all(chosen(parser, options), options, pythons)
    content = json.loads(options.out.read_text(encoding="utf-8"))
    h.write_whole(options.out.with_suffix(".md"), markdown(content, plot(content, options.out)))
    sys.exit(1 if failed else 0)


def chosen(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[Scenario]:
    """The scenarios that were asked for."""
    all_of = {scenario.name: scenario for scenario in SETS[options.set]}
    for name in options.only or ():
        if name not in all_of:
            parser.error(f"--only: expected one of {', '.join(all_of)}, got {name}")
    return [scenario for name, scenario in all_of.items() if not options.only or name in options.only]


def run_all(scenarios: Sequence[Scenario], options: argparse.Namespace, pythons: dict[str, Path]) -> bool:
    """Runs scenarios, each of which leaves its records, or the reason why there are none; whether any failed."""
    torch.set_num_threads(options.threads)  # for the record of the machine; contenders have processes of their own
    report = h.Report(options.out, tiny=options.set == "smoke")
    failed = False
    with tempfile.TemporaryDirectory(prefix="compare-cache-") as cache:
        for scenario in scenarios:
            print(f"{scenario.name}:", flush=True)
            start = time.perf_counter()
            try:
                for record in run(scenario, Path(cache), pythons, options.threads, options.jobs):
                    report.keep({**record, "wall_s": h.rounded(time.perf_counter() - start)})
                    start = time.perf_counter()
                    failed = failed or requests.any_wrong(record)
            except (h.WorkerFailed, subprocess.TimeoutExpired, BenchFailed, BadInput) as problem:
                print(f"{scenario.name}: failed: {problem}", file=sys.stderr, flush=True)
                report.keep({"kind": "failed", "name": scenario.name, "failed": reason(str(problem))})
                failed = True
    return failed


def run(scenario: Scenario, cache: Path, pythons: dict[str, Path], threads: int, jobs: int) -> Iterator[dict[str, Any]]:
    """The records of a scenario, each as soon as it is there."""
    if not isinstance(scenario, StepScenario):
        yield {"kind": "requests", **requests.run(scenario, pythons, threads, jobs)}
        return
    record = {"kind": "steps", **steps.run(scenario, cache, pythons, threads, jobs)}
    yield record
    if scenario.insight and any(
        row["backend"] == "aot" and row["state"] == "timed" for row in record["report"]["rows"]
    ):
        yield {"kind": "insight", **insight.run(scenario, cache, threads)}


if __name__ == "__main__":
    main()
