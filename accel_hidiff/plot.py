"""A picture of a plan: which topology runs at which step, and the size that each block of the UNet runs at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accel_hidiff.errors import BadInput
from accel_hidiff.families import Size
from accel_hidiff.files import whole_file
from accel_hidiff.patching import Patch
from accel_hidiff.schedule import LATENT_CELL, PhasePlan, control_steps
from accel_hidiff.sizes import block_sizes

TOPOLOGY_COLOURS = {
    "windowed+pooled+dilated": "#7b4f9d",
    "windowed+dilated": "#d1495b",
    "windowed+pooled": "#edae49",
    "windowed": "#00798c",
}
OTHER_COLOUR = "#6b6b6b"
_DARK = "#222222"


def plot_plans(patch: Patch, sizes: Sequence[Size], num_steps: int, path: Path) -> None:
    """Draws one panel for each size: steps from left to right, blocks from the UNet's input to its output.

    Args:
        patch: tells family, task and settings.
        sizes: (height, width) in pixels.
        num_steps: steps that run.
        path: a PNG file.

    Raises:
        BadInput: matplotlib is not installed, or the file cannot be written.
    """
    try:
        import matplotlib
    except ImportError:
        raise BadInput("--plot: expected matplotlib, got none here: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plans = [(size, patch.plan(*size, num_steps)) for size in sizes]
    blocks = list(block_sizes(patch.family, patch.layout, 64, 64, plans[0][1].at(0)))
    rows = len(blocks) + 1 + bool(patch.controlnets)
    figure, panels = plt.subplots(
        len(plans), 1, figsize=(10, (0.36 * rows + 1.1) * len(plans)), squeeze=False, layout="constrained"
    )
    for panel, (size, plan) in zip(panels[:, 0], plans, strict=True):
        _draw(panel, patch, size, plan, blocks)
    try:
        with whole_file(path) as part:
            figure.savefig(part, dpi=110, format="png")
    except OSError as problem:
        raise BadInput(f"--plot: expected a file that can be written, got {path}: {problem.strerror}") from None
    finally:
        plt.close(figure)


def _draw(panel: Any, patch: Patch, size: Size, plan: PhasePlan, blocks: Sequence[str]) -> None:
    height, width = size
    cells = height // LATENT_CELL, width // LATENT_CELL
    labels = ["topology", *blocks]
    for phase in plan:
        name, span = str(phase.topology), phase.stop - phase.start
        wide = span > plan.num_steps / 8
        colour = TOPOLOGY_COLOURS.get(name, OTHER_COLOUR)
        panel.barh(0, span, left=phase.start, color=colour, edgecolor="white", height=0.9)
        _label(panel, phase.start + span / 2, 0, name.replace("+", "\n") if not wide else name, "white")
        found = block_sizes(patch.family, patch.layout, *cells, phase.topology)
        for row, block in enumerate(blocks, 1):
            windowed = phase.topology.windowed and block in patch.family.windowed_levels
            share = max(h * w for h, w in found[block]) / (cells[0] * cells[1])
            panel.barh(
                row, span, left=phase.start, height=0.9, linewidth=1.5 if windowed else 0.5,
                color=_shade(share), edgecolor=colour if windowed else "white",
            )  # fmt: skip
            text = " → ".join(f"{w}x{h}" for h, w in found[block])
            _label(panel, phase.start + span / 2, row, text if wide else text.replace(" → ", "\n"), _DARK)
    if patch.controlnets:
        h, w = patch.control_size(*cells)
        stop = control_steps(plan.num_steps, patch.control_ratio)
        row = len(labels)
        labels.append("ControlNet")
        panel.barh(row, stop, left=0, height=0.9, color=_shade(h * w / (cells[0] * cells[1])), edgecolor="white")
        _label(panel, stop / 2, row, f"{w}x{h}", _DARK)
    panel.set_yticks(range(len(labels)), labels)
    panel.set_ylim(len(labels) - 0.5, -0.5)
    panel.set_xlim(0, plan.num_steps)
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.set_xlabel("step")
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    title = f"{width}x{height} pixels, {cells[1]}x{cells[0]} latent cells, {plan.num_steps} steps, {patch.family.name}"
    panel.set_title(
        f"{title}\nwidth x height of the features; darker: larger; outlined: attention in windows", fontsize=9
    )


def _label(panel: Any, x: float, y: float, text: str, colour: str) -> None:
    panel.text(x, y, text, ha="center", va="center", fontsize=7, color=colour, clip_on=True, linespacing=0.85)


def _shade(share: float) -> tuple[float, float, float]:
    """Light to dark over four halvings of the side: 1/256 of the latent's area to all of it."""
    depth = min(max(1 + math.log(share, 256), 0.0), 1.0)
    return (0.95 - 0.35 * depth, 0.97 - 0.25 * depth, 1.0 - 0.1 * depth)
