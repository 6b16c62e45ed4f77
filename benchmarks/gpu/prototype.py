"""The figures of the prototype that ran on an H200, as tables: `python -m benchmarks.gpu.prototype`.

Reads `results/gpu/h200-prototype-2026-11-27.jsonl`, one record a line as it was measured, and writes the Markdown
beside it. Where a case was measured in two calls to the machine, the later one counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

RECORDS: Final = Path(__file__).parents[1] / "results" / "gpu" / "h200-prototype-2026-11-27.jsonl"
_SIZES: Final = ("2048x2048", "2688x1536", "1024x1024")
_TOPOLOGIES: Final = ("windowed", "windowed+dilated", "windowed+pooled")
_VARIANTS: Final = ("base", "flash", "layout", "norm", "win", "qkv", "fp8", "fp8win")

Record = Mapping[str, Any]


def read(path: Path = RECORDS) -> list[Record]:
    """The records, in the order in which they were measured."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def render(records: Sequence[Record]) -> str:
    """Everything as Markdown."""
    return "\n".join([*_steps(records), *_graphs(records), *_requests(records), *_rest(records)]) + "\n"


def _last(records: Sequence[Record], stage: str, having: str = "", **facts: Any) -> Record:
    """The last record of a stage with these facts that did not fail, and that has a figure of this name."""
    found: Record = {}
    for record in records:
        fits = record["stage"] == stage and all(record.get(name) == value for name, value in facts.items())
        if fits and "FAILED" not in record and (not having or having in record):
            found = record
    return found


def _ms(value: Any) -> str:
    return "" if value is None else f"{value:.1f}"


def _steps(records: Sequence[Record]) -> list[str]:
    lines = ["Milliseconds of one UNet call; error: relative L2 against eager in the same dtype, `windowed`.", ""]
    columns = [(size, topology) for size in _SIZES for topology in _TOPOLOGIES]
    heads = [f"{size} {topology.removeprefix('windowed+')}" for size, topology in columns]
    lines += [f"| | {' | '.join(heads)} | error |", f"| --- |{' ---: |' * (len(heads) + 1)}"]
    eager = {size: _last(records, "eager", size=size) for size in _SIZES}
    stock = [_ms(eager[size].get("unpatched")) if topology == "windowed" else "" for size, topology in columns]
    lines.append(f"| diffusers | {' | '.join(stock)} | |")
    lines.append(f"| HiDiffusion, eager | {' | '.join(_ms(eager[size].get(t)) for size, t in columns)} | |")
    for variant in _VARIANTS:
        rows = [_last(records, f"variant {variant}", size=size, topology=topology) for size, topology in columns]
        error = rows[0].get("rel_l2")
        shown = "" if error is None else f"{error:.4f}"
        lines.append(f"| `{variant}` | {' | '.join(_ms(row.get('ms')) for row in rows)} | {shown} |")
    return [*lines, ""]


def _graphs(records: Sequence[Record]) -> list[str]:
    lines = [
        "A whole step in a CUDA graph, against the same calls without one (`win`, and `fp8win`); all bit-equal.",
        "",
    ]
    lines += [
        "| size | topology | `win` ms | in a graph | `fp8win` ms | in a graph |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for size in ("2048x2048", "1024x1024"):
        for topology in _TOPOLOGIES:
            rows = [_last(records, "cuda graph", size=size, topology=topology, call=call) for call in (2, 3)]
            cells = [_ms(row.get(name)) for row in rows for name in ("compiled_ms", "graph_ms")]
            lines.append(f"| {size} | {topology} | {' | '.join(cells)} |")
    return [*lines, ""]


def _requests(records: Sequence[Record]) -> list[str]:
    lines = ["Seconds of a request of 30 steps, UNet alone; the second request of a size.", ""]
    lines += ["| size | diffusers | HiDiffusion, eager | `win` | `fp8win` |", "| --- | ---: | ---: | ---: | ---: |"]
    for size in ("2048x2048", "1024x1024"):
        win, fp8 = (_last(records, "request", size=size, call=call) for call in (2, 3))
        cells = (win["stock"], win["hidiffusion_eager"], win["ours_again"], fp8["ours_again"])
        lines.append(f"| {size} | {' | '.join(f'{cell:.2f}' for cell in cells)} |")
    return [*lines, ""]


def _rest(records: Sequence[Record]) -> list[str]:
    lines = ["| what | figure |", "| --- | ---: |"]
    for side in (1024, 2048, 4096):
        vae = _last(records, "vae", "bf16_ms", side=side)
        lines.append(f"| VAE, eager bfloat16, {side}x{side} | {vae['bf16_ms']:.0f} ms, {vae['peak_gb']:.1f} GB |")
    large = _last(records, "4096")
    lines.append(
        f"| 4096x4096, `windowed`: diffusers, eager, `win` | {large['stock']:.0f}, {large['eager']:.0f}, "
        f"{large['ours']:.0f} ms |"
    )
    ours, eager = (_last(records, "freeze", who=who)["longest_ms"] for who in ("ours", "eager"))
    lines.append(f"| another thread stood still, at 2048x2048: `win`, eager | {ours}, {eager} ms |")
    small = _last(records, "after oom")["ms"]
    lines.append(f"| 1024x1024 after a request that was out of memory (34 before) | {small:.0f} ms |")
    repeated = _last(records, "repeated patched dynamic=False")
    lines.append(
        f"| diffusers' `compile_repeated_blocks` on our patch, 2048x2048 | {repeated['ms']:.0f} ms, first call "
        f"{repeated['first_s']:.1f} s |"
    )
    return lines


if __name__ == "__main__":
    RECORDS.with_suffix(".md").write_text(render(read()), encoding="utf-8")
