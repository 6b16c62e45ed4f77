"""Seconds and bytes of each artifact that is compiled, by kind of region; what `precompile --dry-run` estimates with.

Compiles the blocks and the decoder of the tiny and the demo model for one size, with the CFG++ step, and the tiny
model's whole UNet, each into an empty cache, in this process. `weights` is the number of weight tensors of the region,
`seconds` processor time, compilers included: what one core takes. A region that exports to a graph that is there
already is linked, not compiled, and not listed. The rows with `fit` are lines through these points, without the first
one: the first compilation of a process takes longer, and that with the start of a process is `start_s`. The table in
`accel_hidiff.precompiling.estimate` holds them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accel_hidiff as ah
from accel_hidiff.backends.aot import AOTBackend
from accel_hidiff.precompiling.estimate import fit
from benchmarks import harness as h
from compile_cache import CompileCache

STEPS = 30  # all three topologies


def compiled(name: str, tiny: bool, size: h.Size, cache: Path, **options: Any) -> Iterator[dict[str, Any]]:
    """Compiles one model; a row for each artifact that was built."""
    store = CompileCache(cache)
    handle = ah.accelerate(h.demo_pipeline(tiny), hidiffusion=ah.HiDiffusionConfig(), cache=store, **options)
    backend = AOTBackend()
    for graph in handle.needed([(size.height, size.width)], [STEPS]).distinct.values():
        cpu = h.cpu_seconds()
        made = backend.prepare(graph, store)
        if made.compiled:
            yield {
                "model": name,
                "region": graph.region.kind,
                "weights": graph.region.weights,
                "seconds": h.rounded(h.cpu_seconds() - cpu),
                "wall_s": h.rounded(made.seconds),
                "bytes": made.entry.size,
            }
    handle.remove()


def start_seconds() -> float:
    """Seconds until a compiling process can begin: the median of three."""
    code = "import torch, diffusers, accel_hidiff.installed; from accel_hidiff.backends.aot import AOTBackend"
    times = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], cwd=h.ROOT, check=True)
        times.append(time.perf_counter() - start)
    return sorted(times)[1]


def main() -> None:
    options = h.parsed(h.arguments(__doc__))
    report = h.Report(options.out, options.tiny)
    rows = []
    runs: dict[str, dict[str, Any]] = {
        "tiny": {"tiny": True, "size": h.TINY_SIZES[0], "guidance": ah.CFGPlusPlusConfig()},
        "tiny whole": {"tiny": True, "size": h.TINY_SIZES[0], "regions": "whole", "shapes": "exact"},
        "demo": {"tiny": False, "size": h.DEMO_SIZES[0]},
    }
    with tempfile.TemporaryDirectory() as directory:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(directory, "inductor"))
        for name in ("tiny",) if options.tiny else tuple(runs):
            for row in compiled(name, cache=Path(directory, name), **runs[name]):
                report.add(**row)
                rows.append(row)
    first, lines = rows[0], fit(rows[1:])
    more = max(first["seconds"] - lines[first["region"]].at(first["weights"])[0], 0.0)
    report.add(start_s=h.rounded(start_seconds() + more, 3))
    for kind, line in lines.items():
        report.add(fit=kind, **{name: h.rounded(value, 3) for name, value in vars(line).items()})


if __name__ == "__main__":
    main()
