"""Whole requests in a process of its own for each contender: seconds of every step, and what was compiled in it.

Seconds of a step are those between the ends of two steps (of the first one, from the call of the pipeline on), so that
everything a user waits for is in them. Compilations are counted by torch's own records
(`accel_hidiff.benching.compilations`), and of this project's backends by the handle's counters too.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from accel_hidiff.benching.compilations import Compilations, compilations, watch
from accel_hidiff.benching.found import find
from accel_hidiff.benching.names import Contender
from accel_hidiff.benching.options import Options
from accel_hidiff.benching.subjects import subject_of
from accel_hidiff.models import load_pipeline
from benchmarks import harness as h
from benchmarks.compare import models
from benchmarks.compare.scenarios import STEPS, Entry, RequestScenario, dtype_of
from benchmarks.compare.text import reason

_PROMPT = "a red circle"
_SHOWN = 16  # pixels of an image's side that are compared
_LIMIT = 1e-2  # of max|diff|/max|ref| between images of 30 steps
# Whose images a contender's have to be, if not eager's. The authors' package draws other window shifts in a request.
_SAME_IMAGES = {"hidiffusion-compile": "hidiffusion"}
_UNCOMPARED = ("eager", "stock", "hidiffusion")
_WRONG = "wrong output"


def run(
    scenario: RequestScenario,
    pythons: Mapping[str, Path],
    threads: int | None,
    jobs: int,
    cache: Path | None = None,
) -> dict[str, Any]:
    """All contenders of a scenario.

    Args:
        scenario: what to run.
        pythons: executables with environments of their own, by contender.
        threads: of torch; None: its own choice.
        jobs: contenders that run at the same time on a CPU; on a GPU it is one.
        cache: compile cache of this project's backends; None: an empty one for each of them.

    Returns:
        JSON values: the scenario's fields; "processes": what each answered, or as "failed" the reason why there is
        none: one whose images differ from those of its eager counterpart, or that has none, has no figures either.
    """
    with tempfile.TemporaryDirectory(prefix="compare-") as directory:
        place = Path(directory)
        model = models.save(scenario.model, place / "model", dtype_of(scenario))
        config = {
            "model": str(model),
            "traced_only": scenario.traced_only,
            "dtype": scenario.dtype,
            "device": scenario.device,
            "limit_s": scenario.limit_s,
            "threads": threads,
            "cache": cache and str(cache),
        }

        def processes_of(entry: Entry) -> list[dict[str, Any]]:
            served = {**config, "sizes": scenario.sizes[: entry.sizes]}
            kept = place / entry.name.replace("/", "-")
            return _processes(entry, served, kept, pythons.get(entry.name))

        with ThreadPoolExecutor(1 if scenario.device == "cuda" else jobs) as pool:
            rows = [row for rows in pool.map(processes_of, scenario.contenders) for row in rows]
    return {**scenario.to_json(), "processes": verified(rows)}


def _processes(entry: Entry, config: Mapping[str, Any], kept: Path, python: Path | None) -> list[dict[str, Any]]:
    """The processes of one contender, one after the other, over the same folder `kept`."""
    name = entry.name
    found = find(name, python)
    if not found.usable:
        return [{"contender": name, "process": 1, "failed": found.detail}]
    files = {"TORCHINDUCTOR_CACHE_DIR": str(kept / "inductor"), "TRITON_CACHE_DIR": str(kept / "triton")}
    rows: list[dict[str, Any]] = []
    for number in range(1, entry.processes + 1):
        full, limit_s = {**config, "contender": name, "kept": str(kept)}, config["limit_s"]
        try:
            answer = h.worker("benchmarks.compare.requests", full, files, limit_s, python)
        except h.WorkerFailed as problem:
            answer = {"failed": reason(str(problem))}
        except subprocess.TimeoutExpired as problem:
            answer = h.last_answer(problem.output) or {"failed": f"no request was finished in {limit_s:g} s"}
            if requests := answer.get("requests"):
                width, height = config["sizes"][len(requests)]
                done_s = answer["ready_s"] + sum(sum(request["step_ms"]) for request in requests) / 1e3
                answer["cut"] = (
                    f"ended after {limit_s:g} s, of which some {limit_s - done_s:.0f} s were the request of "
                    f"{width}x{height}, not finished by then"
                )
        rows.append({"contender": name, "process": number, **answer})
        print(_told(rows[-1]), flush=True)
        if "failed" in answer or "cut" in answer:
            break
    return rows


def serve(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One process: a pipeline, and a request of each size. What there is to tell, again after each request."""
    contender = Contender.parse(config["contender"])
    started = psutil.Process().create_time()
    kept = Path(config["kept"])
    kept.mkdir(exist_ok=True)
    watch()
    pipe = load_pipeline(config["model"], config["dtype"], config["device"])
    options = Options(
        cache=config["cache"] and Path(config["cache"]),
        dynamo_backend="eager" if config["traced_only"] else "inductor",
    )
    subject = subject_of(contender, pipe, options, kept)
    pipe.set_progress_bar_config(disable=True)
    ready_s = time.time() - started
    requests: list[dict[str, Any]] = []
    first_image_s = None
    for size in (h.Size(*size) for size in config["sizes"]):
        requests.append(_request(pipe, subject, size))
        first_image_s = first_image_s or time.time() - started
        yield {
            "ready_s": h.rounded(ready_s),
            "first_image_s": h.rounded(first_image_s),
            "processor_s": h.rounded(h.cpu_seconds()),
            "resident_mb": h.rounded(psutil.Process().memory_info().rss / 1e6),
            "requests": requests,
        }


def _request(pipe: Any, subject: Any, size: h.Size) -> dict[str, Any]:
    seconds: list[float] = []
    steps: list[Compilations] = []
    compiled: list[int] = []
    done, before, ours = time.perf_counter(), compilations(), subject.counters()
    beginning = before

    def ended(pipeline: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        nonlocal done, before
        h.synchronize()
        now, counted = time.perf_counter(), compilations()
        seconds.append(now - done)
        steps.append(counted - before)
        compiled.append(subject.counters()["compiles"] - ours["compiles"] - sum(compiled))
        before = counted
        done = time.perf_counter()  # counting is nobody's
        return given

    torch.manual_seed(0)  # for window shifts that are drawn from the global generator
    image = pipe(
        _PROMPT,
        height=size.height,
        width=size.width,
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(1),
        output_type="np",
        callback_on_step_end=ended,
    ).images[0]
    grid = np.ix_(*(np.linspace(0, side - 1, _SHOWN).astype(int) for side in image.shape[:2]))
    made = compilations() - beginning
    handle = {name: value - ours[name] for name, value in subject.counters().items()}
    return {
        "size": str(size),
        "step_ms": [h.rounded(1e3 * second) for second in seconds],
        "frames_by_step": [step.frames for step in steps],
        "compiles_by_step": compiled,
        **h.rounded_row(asdict(made)),
        "handle": handle,
        "probe": image[grid].astype(float).round(5).ravel().tolist(),
    }


def verified(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows without their images' pixels; where these are wrong, with the reason and without figures."""
    probes = {
        (row["contender"], row["process"], request["size"]): torch.tensor(request.pop("probe"))
        for row in rows
        for request in row.get("requests", ())
    }
    return [{**row, "failed": why, "requests": []} if (why := _problem(row, probes)) else row for row in rows]


def any_wrong(record: Mapping[str, Any]) -> bool:
    """Whether a record holds a wrong output."""
    told = [row.get("failed") or "" for row in record.get("processes", ())]
    states = [row["state"] for row in record.get("report", {}).get("rows", ())]
    return _WRONG in states or any(why.startswith(_WRONG) for why in told)


def _problem(row: Mapping[str, Any], probes: Mapping[tuple[str, int, str], torch.Tensor]) -> str:
    """What is wrong with the images of a row; "" for nothing."""
    name, process = row["contender"], row["process"]
    if name in _UNCOMPARED:
        return ""
    like = _SAME_IMAGES.get(name, "eager")
    for request in row.get("requests", ()):
        size = request["size"]
        if (like, 1, size) not in probes:
            return f"there is no image of {like} at {size} to compare with"
        try:
            h.verify(f"{_WRONG}: {size}", probes[name, process, size], probes[like, 1, size], _LIMIT)
        except h.WrongOutput as problem:
            return str(problem)
    return ""


def _told(row: Mapping[str, Any]) -> str:
    if "failed" in row:
        return f"{row['contender']}, process {row['process']}: {row['failed']}"
    told = f"{row['contender']}, process {row['process']}: first image after {row['first_image_s']:.1f} s"
    counts = [request["frames"] + request["handle"]["compiles"] for request in row["requests"]]
    worst = max(max(request["step_ms"]) for request in row["requests"])
    return f"{told}, compilations {counts}, worst step {worst / 1e3:.1f} s{', cut' if 'cut' in row else ''}"


if __name__ == "__main__":
    given = h.worker_config()
    assert given is not None, "started by `run` alone"
    for told in serve(given):
        print(json.dumps(told), flush=True)
