"""The demo, end to end: model, precompilation, then a new process that serves with no compilation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from accel_hidiff.errors import BadInput, DemoFailed

Size = tuple[int, int]


@dataclass(frozen=True)
class DemoReport:
    """Figures of the demo: `precompiled` from the first process, `served` from the second; seconds are wall time."""

    steps: int
    precompile_process_s: float
    precompiled: dict[str, Any]
    served: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """A plain JSON mapping."""
        return asdict(self)

    def table(self) -> Table:
        """As a rich table."""
        table = Table(show_header=False)
        table.add_column()
        table.add_column(justify="right")
        served, made = self.served, self.precompiled
        load = served["load_graphs_s"]
        sizes = served["sizes"]
        rows = [
            ("cold: precompile all sizes, new process", f"{self.precompile_process_s:.1f} s"),
            ("warm: load and bind all graphs, new process", f"{load:.2f} s"),
            ("precompile / load", f"{made['seconds'] / load:.0f}x"),
            ("warm: process start to first image", f"{served['start_to_first_image_s']:.1f} s"),
            ("compiles in the serving process", str(served["stats"]["compiles"])),
            ("artifacts loaded / regions bound", f"{served['stats']['loads']} / {served['stats']['bindings']}"),
            ("eager calls in the serving process", str(served["stats"]["eager_calls"])),
            ("cache", f"{made['bytes'] / 1e6:.1f} MB"),
            ("largest relative difference from eager", f"{max(row['relative_difference'] for row in sizes):.1e}"),
        ]
        for row in sizes:
            name = f"{row['width']}x{row['height']}, {self.steps} steps: compiled / eager"
            rows.append((name, f"{row['compiled_s']:.2f} s / {row['eager_s']:.2f} s"))
        for name, value in rows:
            table.add_row(name, value)
        return table


# (height, width): four times the area that the trained model knows; and sizes at which the wider one's steps take time.
_SIZES: tuple[Size, ...] = ((256, 256), (192, 320), (320, 192))
_MOST_JOBS = 4
_SIZES_OF_RANDOM: tuple[Size, ...] = ((512, 512), (384, 640), (640, 384))


def run_demo(
    out: Path,
    sizes: list[Size] | None,
    steps: int,
    console: Console,
    *,
    random_weights: bool = False,
    device: str | None = None,
) -> DemoReport:
    """Runs the demo; everything that it writes lies under `out`.

    Args:
        out: folder; `demo-cache` in it is removed, so that "cold" is cold.
        sizes: (height, width) in pixels; None: three of the model's.
        steps: denoising steps.
        console: for progress.
        random_weights: take a wider model with random weights instead of the trained one.
        device: a torch device; None: the best one here. Everything is in float32, so that pictures compare.

    Raises:
        BadInput: matplotlib is not installed, the device is not usable, or `out` holds a model of another version.
        DemoFailed: one of the two processes failed; its own message is on stderr.
    """
    import importlib.util
    import shutil

    from accel_hidiff.demo.model import save_model
    from accel_hidiff.demo.plot import plot_steps
    from accel_hidiff.demo.trained import trained_model
    from accel_hidiff.models import check_device

    if importlib.util.find_spec("matplotlib") is None:
        raise BadInput("demo: expected matplotlib, got none here: pip install 'accel_hidiff[demo]'")
    where = str(check_device(device))
    out.mkdir(parents=True, exist_ok=True)
    if random_weights:
        console.print("building the model with random weights", highlight=False)
    try:
        model = save_model(out / "model") if random_weights else trained_model()
    except ValueError as problem:  # one of another version
        raise BadInput(str(problem)) from None
    cache = out / "demo-cache"
    sizes = sizes or list(_SIZES_OF_RANDOM if random_weights else _SIZES)
    if cache.exists():
        shutil.rmtree(cache)

    names = [f"{width}x{height}" for height, width in sizes]
    console.print(f"precompiling {', '.join(names)} for {where}", highlight=False)
    command = [sys.executable, "-m", "accel_hidiff.cli", "precompile", str(model), "--cache", str(cache)]
    command += ["--steps", str(steps), "--device", where, "--dtype", "float32", "--jobs", str(_jobs()), "--json"]
    for name in names:
        command += ["--size", name]
    began = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    precompile_s = time.perf_counter() - began
    if done.returncode:
        raise DemoFailed(f"precompiling failed with exit code {done.returncode}; its message is above")

    beside = "eager" if random_weights else "eager and the model as it was"
    console.print(f"serving them in a new process, on_miss=error, and {beside} beside it", highlight=False)
    settings, report = out / "serve.json", out / "served.json"
    config: dict[str, Any] = {"model": str(model), "cache": str(cache), "out": str(out), "report": str(report)}
    config |= {"before": not random_weights, "device": where}
    settings.write_text(json.dumps({**config, "sizes": sizes, "steps": steps, "started": time.time()}))
    served = subprocess.run([sys.executable, "-m", "accel_hidiff.demo.serve", str(settings)], check=False)
    if served.returncode:
        raise DemoFailed(f"serving failed with exit code {served.returncode}; its message is above")

    result = DemoReport(steps, precompile_s, json.loads(done.stdout), json.loads(report.read_text()))
    settings.unlink()
    report.unlink()
    (out / "report.json").write_text(json.dumps(result.to_json(), indent=1))
    plot_steps(result.served["sizes"], out / "steps.png")
    shown = [] if random_weights else ["before-after.png"]
    written = [*shown, "steps.png", "report.json", *(f"{name}.png" for name in names)]
    console.print(f"wrote {', '.join(written)} to {out}", highlight=False)
    return result


def _jobs() -> int:
    """Compiling processes: a core each, and few enough for the memory of a small machine."""
    return min(os.cpu_count() or 1, _MOST_JOBS)
