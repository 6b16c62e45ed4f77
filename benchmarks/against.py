"""This checkout against an earlier one, in turns: compiling from nothing, the demo, what a request pays for once.

    git worktree add ../before COMMIT
    python -m benchmarks.against ../before --out benchmarks/results/against.json

Each part runs in new processes with an empty home and temporary folder, over the packages of one checkout and then of
the other: `precompile` (the trained demo model, one size, by two processes, and how long until the first artifact is
stored), `serving` (another thread's longest wait beside requests; what the first call of a request takes more than the
next, processor time, on a UNet of SDXL's depth that computes nothing), `demo` (all of `accel-hidiff demo`), and for the
trained demo model and the wider one with random weights `compile` (processor time of a region of each kind) and `steps`
(processor time of a UNet call in each topology at three sizes, one thread); `decoder` compiles the trained model's
decoder in each turn, of which `compile` has one alone. `--only` runs some of them.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

from benchmarks import harness as h

Run = Callable[[str, Path], dict[str, float]]  # of a checkout's name and place: figures

_ARTIFACT_BYTES: Final = 100_000  # records and notes are smaller
_PARTS: Final = ("precompile", "serving", "demo", "steps", "decoder")
_LONG: Final = ("demo", "steps", "decoder")
_MODELS: Final = ("trained", "random")
_MODEL: Final = Path("accel_hidiff", "demo", "trained_model")


def main() -> None:
    parser = h.arguments(__doc__, repeats=2)
    parser.add_argument("before", type=Path, help="the earlier checkout")
    parser.add_argument("--only", action="append", choices=_PARTS, help="a part; repeatable; default: all")
    options = h.parsed(parser)
    parts = options.only or [part for part in _PARTS if part not in _LONG or not options.tiny]
    report = h.Report(options.out, options.tiny)
    checkouts = {"before": options.before.resolve(), "now": h.ROOT}
    report.add(before_commit=commit_of(checkouts["before"]))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        caches = {name: Path(scratch, name, "cache") for name in checkouts}
        turns = 1 if options.tiny else options.repeats

        def with_cache(run: Callable[[Path, Path], dict[str, float]]) -> Run:
            return lambda name, root: run(root, caches[name])

        if "precompile" in parts or "serving" in parts:
            compare_checkouts(report, "precompile", turns, checkouts, with_cache(precompiled))
        if "serving" in parts:
            compare_checkouts(report, "serving", 3 * turns, checkouts, with_cache(served))
        if "demo" in parts:
            compare_checkouts(report, "demo", 1, checkouts, lambda name, root: drawn(root))
        for model in _MODELS if "steps" in parts else ():

            def run(part: str, name: str, root: Path, model: str = model) -> dict[str, float]:
                where = str(root / _MODEL) if model == "trained" else model
                return worker("steps_worker.py", root, caches[name].parent, part, where, f"{caches[name]}-{model}")

            compare_checkouts(report, f"compile, {model}", 1, checkouts, partial(run, "compile"))
            compare_checkouts(report, f"steps, {model}", turns, checkouts, partial(run, "steps"))
        if "decoder" in parts:

            def decoder(_: str, root: Path) -> dict[str, float]:
                empty = tempfile.mkdtemp(dir=scratch)
                return worker("steps_worker.py", root, Path(scratch), "decoder", str(root / _MODEL), empty)

            compare_checkouts(report, "decoder", turns, checkouts, decoder)


def compare_checkouts(
    report: h.Report,
    part: str,
    turns: int,
    checkouts: Mapping[str, Path],
    run: Run,
) -> None:
    """Rows of both checkouts, then the medians and their ratios."""
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
    for turn in range(turns):
        for name in list(checkouts)[:: 1 if turn % 2 == 0 else -1]:
            rows[name].append(run(name, checkouts[name]))
            report.keep({"part": part, "checkout": name, **rows[name][-1]})
    row: dict[str, Any] = {"part": part}
    for figure in rows["now"][0]:
        medians = {name: statistics.median(found[figure] for found in rows[name]) for name in rows}
        row |= {f"{figure}_{name}": h.rounded(value) for name, value in medians.items()}
        row[f"{figure}_ratio"] = h.rounded(medians["now"] / medians["before"], 3) if medians["before"] else None
    report.add(**row)


def precompiled(root: Path, cache: Path) -> dict[str, float]:
    """`precompile --jobs 2` of the demo model into an empty cache, which the last turn leaves filled."""
    words = ["precompile", str(root / _MODEL), "--size", "256x256", "--steps", "20", "--jobs", "2"]
    if cache.exists():
        cache = Path(tempfile.mkdtemp(dir=cache.parent))
    start, cpu, first_s = time.perf_counter(), h.cpu_seconds(), 0.0
    process = _start(root, [*_cli(), *words, "--cache", str(cache)], cache.parent)
    while process.poll() is None:
        if not first_s and any(path.stat().st_size > _ARTIFACT_BYTES for path in cache.rglob("*") if path.is_file()):
            first_s = time.perf_counter() - start
        time.sleep(0.1)
    _require(process)
    wall_s, cpu_s = time.perf_counter() - start, h.cpu_seconds() - cpu
    return {"first_artifact_s": h.rounded(first_s), "wall_s": h.rounded(wall_s), "cpu_s": h.rounded(cpu_s)}


def served(root: Path, cache: Path) -> dict[str, float]:
    """What `against_worker` prints."""
    return worker("against_worker.py", root, cache.parent, str(root / _MODEL), str(cache))


def worker(script: str, root: Path, folder: Path, *arguments: str) -> dict[str, float]:
    """What a script beside this one prints last, in a process over the packages of a checkout.

    Args:
        script: its name.
        root: the checkout.
        folder: for the process's home.
        arguments: of the script.
    """
    words = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
    process = _start(root, words, folder, stdout=subprocess.PIPE)
    out, _ = process.communicate()
    _require(process)
    answer = h.last_answer(out)
    assert answer is not None, "a worker that ended well has answered"
    return answer


def drawn(root: Path) -> dict[str, float]:
    """The whole demo, from nothing."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        start = time.perf_counter()
        process = _start(root, [*_cli(), "demo", "--out", str(Path(scratch, "out"))], Path(scratch))
        process.wait()
        _require(process)
        return {"wall_s": h.rounded(time.perf_counter() - start)}


def _cli() -> list[str]:
    return [sys.executable, "-m", "accel_hidiff.cli"]


def _start(root: Path, words: list[str], folder: Path, **options: Any) -> subprocess.Popen[bytes]:
    """A process over the packages of a checkout, with an empty home and temporary folder."""
    folder.mkdir(parents=True, exist_ok=True)
    home = tempfile.mkdtemp(dir=folder)
    places = {"HOME": home, "TMPDIR": home, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
    environment = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"} | places
    options = {"stdout": subprocess.DEVNULL, **options}
    return subprocess.Popen(words, cwd=folder, env=environment, stderr=subprocess.DEVNULL, **options)


def _require(process: subprocess.Popen[bytes]) -> None:
    if process.returncode != 0:
        raise h.WrongOutput(f"{json.dumps(process.args)} ended with {process.returncode}")


def commit_of(root: Path) -> str:
    """The commit that a checkout is at."""
    words = ["git", "rev-parse", "HEAD"]
    return subprocess.run(words, cwd=root, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
