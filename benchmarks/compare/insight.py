"""What a step is made of: arithmetic and bytes of each topology, and the profile of an eager and a compiled call."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from accel_hidiff.benching.contestant import Contestant
from accel_hidiff.benching.options import Options
from benchmarks import harness as h
from benchmarks import profiling, roofline
from benchmarks.compare import models
from benchmarks.compare.scenarios import STEPS, StepScenario, dtype_of
from benchmarks.compare.steps import cache_of

_PROFILED = ("eager", "aot")


def run(scenario: StepScenario, cache: Path, threads: int | None) -> dict[str, Any]:
    """Ceilings of the device, the work of each topology of a scenario, and profiles, in a process of their own.

    Args:
        scenario: whose calls are looked at.
        cache: as of `steps.run`, which was there before.
        threads: of torch; None: its own choice.

    Returns:
        JSON values: "scenario", "ceilings", "work" and "profiles", the latter two for each size and topology.
    """
    with tempfile.TemporaryDirectory(prefix="compare-") as directory:
        model = models.save(scenario.model, Path(directory) / "model", dtype_of(scenario))
        config = {
            "model": str(model),
            "cache": str(cache_of(cache, _PROFILED[-1])),
            "sizes": scenario.sizes,
            "batch": scenario.batch,
            "dtype": scenario.dtype,
            "device": scenario.device,
            "threads": threads,
        }
        return {"scenario": scenario.name, **h.worker("benchmarks.compare.insight", config)}


def look(config: dict[str, Any]) -> dict[str, Any]:
    """The process's part of `run`."""
    sizes = tuple((height, width) for width, height in config["sizes"])
    options = Options(
        model=config["model"],
        sizes=sizes,
        steps=STEPS,
        batch=config["batch"],
        cache=Path(config["cache"]),
        dtype=config["dtype"],
        device=config["device"],
        threads=config["threads"],
    )
    work: list[dict[str, Any]] = []
    profiles: list[dict[str, Any]] = []
    unet: Any = None
    for name in _PROFILED:
        contestant = Contestant(options, name, Path(config["cache"]))
        unet = contestant.subject.pipe.unet
        for case in contestant.cases():
            names = {"size": case.size, "topology": case.topology}
            with contestant.called(case) as call:
                call()
                contestant.subject.require_served(contestant.subject.counters())
                if name == "eager":
                    counted = roofline.count(call)
                    numbers = {"tflop": counted.tflop, "eager_gb": counted.eager_gb}
                    work.append(names | h.rounded_row(numbers))
                profiles.append({"contender": name, **names, **profiling.profile(call, unet.device).to_json()})
    found = roofline.ceilings(unet.device, unet.dtype)
    return {"ceilings": h.rounded_row(vars(found)), "work": work, "profiles": profiles}


if __name__ == "__main__":
    given = h.worker_config()
    assert given is not None, "started by `run` alone"
    with torch.no_grad():
        print(json.dumps(look(given)))
