"""A cache for GPUs, filled on a machine that has none: `docs/deploy-gpu.toml` from an empty home, twice.

Each fill is the documented command in a new process with an empty home, temporary folder and cache; its memory is what
all of its processes have together (proportional set size, sampled each second). The two caches are compared key by key
and byte by byte; `explain` is asked for every model, dtype and size, with and without a ControlNet; and the table of
`accel-hidiff inspect` over the packages is written beside the records. `seconds` of an artifact are those of its
compiling process, of which there are as many as cores; the lines through them (`fit`) are what `precompile --dry-run`
estimates with. Needs the extra `cuda-build`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import psutil

from accel_hidiff.precompiling.estimate import fit
from benchmarks import harness as h
from compile_cache import CompileCache, Entry

_DEPLOY: Final = h.ROOT / "docs" / "deploy-gpu.toml"
_COMMAND: Final = (sys.executable, "-m", "accel_hidiff.cli")
_SMOKE: Final = """\
[cache]
location = "gpu-cache"

[[models]]
name = "demo"
model = "{model}"
sizes = ["256x256"]
dtype = "bfloat16"
memory_format = "channels_last"
"""


def main() -> None:
    parser = h.arguments(__doc__)
    parser.add_argument("--target", default="sm_90", help="what to compile for")
    options = h.parsed(parser)
    report = h.Report(options.out, options.tiny)
    text = _DEPLOY.read_text(encoding="utf-8")
    if options.tiny:
        text = _SMOKE.format(model=h.ROOT / "accel_hidiff" / "demo" / "trained_model")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        folders = [Path(scratch) / name for name in ("first", "second")]
        for folder in folders:
            report.add(fill=folder.name, **filled(folder, text, options.target))
        first, second = (CompileCache(folder / "gpu-cache") for folder in folders)
        report.add(**compared(first, second))
        for model in tomllib.loads(text)["models"]:
            for row in explained(folders[0], model, options.target):
                report.add(**row)
        rows = [_cost(entry) for entry in artifacts(first).values()]
        for row in rows:
            report.keep(row)
        for kind, line in fit(rows).items():
            report.add(fit=kind, **{name: h.rounded(value) for name, value in vars(line).items()})
        table = options.out.with_name(f"{options.out.stem}_inspect.md")
        subprocess.run([*_COMMAND, "inspect", str(first.location), "--markdown", str(table)], cwd=h.ROOT, check=True)


def filled(folder: Path, deploy: str, target: str) -> dict[str, Any]:
    """Runs the documented command; seconds on the wall and of the processor, memory, and what is in the cache.

    Args:
        folder: new.
        deploy: text of the deploy file.
        target: what to compile for.

    Raises:
        WrongOutput: it failed.
    """
    for name in ("home", "tmp"):
        (folder / name).mkdir(parents=True)
    (folder / _DEPLOY.name).write_text(deploy, encoding="utf-8")
    places = {"HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp")}
    command = [*_COMMAND, "precompile", _DEPLOY.name, "--target", target]
    start, cpu, peak = time.perf_counter(), h.cpu_seconds(), 0
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=_environment() | places, stdout=log, stderr=log)
        while process.poll() is None:
            peak = max(peak, _memory(process.pid))
            time.sleep(1)
    if process.returncode != 0:
        told = (folder / "log").read_text(errors="replace").strip().splitlines()
        raise h.WrongOutput(f"the fill ended with {process.returncode}: {told[-1] if told else 'it said nothing'}")
    cache = CompileCache(folder / "gpu-cache")
    kept = artifacts(cache).values()
    return {
        "wall_s": h.rounded(time.perf_counter() - start), "cpu_s": h.rounded(h.cpu_seconds() - cpu),
        "peak_mb": h.rounded(peak / 1e6), "keys": len(list(cache.digests())), "artifacts": len(kept),
        "artifacts_mb": h.rounded(sum(entry.size for entry in kept) / 1e6),
    }  # fmt: skip


def artifacts(cache: CompileCache) -> dict[str, Entry]:
    """What was compiled, by its files: several keys may name the same."""
    return {str(sorted(ref.sha256 for ref in entry.files.values())): entry for entry in cache.entries()}


def compared(first: CompileCache, second: CompileCache) -> dict[str, Any]:
    """How many keys two caches share, and how many of these name the same bytes.

    Raises:
        WrongOutput: not all.
    """
    one, other = ({entry.digest: dict(entry.files) for entry in cache.entries()} for cache in (first, second))
    same = one.keys() & other.keys()
    equal = sum(one[digest] == other[digest] for digest in same)
    if not len(one) == len(other) == len(same) == equal:
        told = f"{len(same)} of {len(other)}, {equal} of them with the same bytes"
        raise h.WrongOutput(f"expected the {len(one)} keys of the first fill with the same bytes, got {told}")
    return {"same_keys": len(same), "same_bytes": equal}


def explained(folder: Path, model: dict[str, Any], target: str) -> Iterator[dict[str, Any]]:
    """What `explain` says of every size of a model, with its ControlNets and without.

    Raises:
        WrongOutput: something is not in the cache.
    """
    for nets in dict.fromkeys(((), tuple(model.get("controlnets", ())))):
        command = [*_COMMAND, "explain", model["model"], "--cache", str(folder / "gpu-cache"), "--target", target]
        command += ["--dtype", model["dtype"], "--memory-format", model["memory_format"], "--json"]
        command += [word for size in model["sizes"] for word in ("--size", size)]
        command += [word for net in nets for word in ("--controlnet", net)]
        done = subprocess.run(command, cwd=h.ROOT, env=_environment(), capture_output=True, text=True, check=True)
        for found in json.loads(done.stdout):
            row = {"explain": model["name"], "dtype": model["dtype"], "size": f"{found['width']}x{found['height']}"}
            states = sorted({part["state"] for part in found["rows"]})
            if states != ["cached"]:
                raise h.WrongOutput(f"{row}: expected everything to be cached, got {', '.join(states)}")
            yield {**row, "controlnets": len(nets), "rows": len(found["rows"]), "state": states[0]}


def _cost(entry: Entry) -> dict[str, Any]:
    """What an artifact took, of its notes."""
    return {**{name: entry.notes[name] for name in ("region", "weights", "seconds")}, "bytes": entry.size}


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(h.ROOT), "HF_HUB_OFFLINE": "1"}


def _memory(pid: int) -> int:
    """Bytes that a process and all that it started have together."""
    total = 0
    with suppress(psutil.Error):
        for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
            with suppress(psutil.Error):
                total += process.memory_full_info().pss
    return total


if __name__ == "__main__":
    main()
