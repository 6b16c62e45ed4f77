"""Runs a set of scenarios and writes JSON, Markdown and plots: `python -m benchmarks.compare --out FILE.json`."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from accel_hidiff.benching.options import Options
from benchmarks import harness as h
from benchmarks.compare import insight, requests, steps
from benchmarks.compare.plots import plot
from benchmarks.compare.scenarios import SETS, Scenario, StepScenario
from benchmarks.compare.tables import markdown


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
    if not options.render:
        scenarios = chosen(parser, options)
        pythons = dict(Options.parse_pythons(options.python))
        report = h.Report(options.out, tiny=options.set == "smoke")
        with tempfile.TemporaryDirectory(prefix="compare-cache-") as cache:
            for scenario in scenarios:
                for record in run(scenario, Path(cache), pythons, options.threads, options.jobs):
                    report.keep(record)
    content = json.loads(options.out.read_text(encoding="utf-8"))
    h.write_whole(options.out.with_suffix(".md"), markdown(content, plot(content, options.out)))


def chosen(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[Scenario]:
    """The scenarios that were asked for."""
    all_of = {scenario.name: scenario for scenario in SETS[options.set]}
    for name in options.only or ():
        if name not in all_of:
            parser.error(f"--only: expected one of {', '.join(all_of)}, got {name}")
    return [scenario for name, scenario in all_of.items() if not options.only or name in options.only]


def run(scenario: Scenario, cache: Path, pythons: dict[str, Path], threads: int, jobs: int) -> list[dict[str, Any]]:
    """The records of a scenario."""
    print(f"{scenario.name}:", flush=True)
    if not isinstance(scenario, StepScenario):
        return [{"kind": "requests", **requests.run(scenario, pythons, threads, jobs)}]
    records = [{"kind": "steps", **steps.run(scenario, cache, pythons, threads, jobs)}]
    if "aot" in scenario.contenders:
        records.append({"kind": "insight", **insight.run(scenario, cache, threads)})
    return records


if __name__ == "__main__":
    main()
