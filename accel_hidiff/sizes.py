"""Sizes: where a request's size costs quality or time, and the nearest one that does not. No torch."""

from __future__ import annotations

from functools import lru_cache

from accel_hidiff.config import FAMILIES, TASKS, HiDiffusionConfig, check_choice, check_pixels, check_steps
from accel_hidiff.errors import BadInput
from accel_hidiff.families import BY_NAME, Family, Layout, Size, feature_sizes
from accel_hidiff.schedule import LATENT_CELL, PhasePlan, plan_latent
from accel_hidiff.topology import Topology

_SEARCH = 16  # latent cells in each direction; every multiple of 8 cells is even in all phases of all families


def odd_windows(family: Family, layout: Layout, height: int, width: int, topology: Topology) -> dict[str, Size]:
    """The windowed transformers whose feature map has an odd side, with its (height, width), by module path.

    Such a map is resized bicubically to even sides and back around its attention. Sizes are latent.
    """
    if not topology.windowed:
        return {}
    features = feature_sizes(layout, family, height, width, topology)
    return {
        path: (h, w)
        for path, (h, w) in features.items()
        if ".attentions." in path and path.startswith(family.windowed_levels) and (h % 2 or w % 2)
    }


@lru_cache(maxsize=1024)
def suggest_latent(
    family: Family, layout: Layout, height: int, width: int, num_steps: int, config: HiDiffusionConfig, task: str
) -> Size:
    """The nearest latent size (itself, where it is one) whose windowed feature maps are even in every phase."""

    def is_even(h: int, w: int) -> bool:
        plan = plan_latent(family, layout, h, w, num_steps, config, task)
        return not any(odd_windows(family, layout, h, w, topology) for topology in plan.topologies)

    offsets = sorted(range(-_SEARCH, _SEARCH + 1), key=lambda offset: (abs(offset), -offset))
    candidates = [(height + dy, width + dx) for dy in offsets for dx in offsets if height + dy > 0 and width + dx > 0]
    candidates.sort(key=lambda size: abs(size[0] - height) + abs(size[1] - width))  # stable: upwards first
    return next(size for size in candidates if is_even(*size))


@lru_cache(maxsize=1024)
def odd_window_notice(
    family: Family, layout: Layout, height: int, width: int, plan: PhasePlan, config: HiDiffusionConfig, task: str
) -> str | None:
    """One line for a latent size with odd windowed feature maps in a plan, which names the nearest size without."""
    for topology in plan.topologies:
        for path, (h, w) in odd_windows(family, layout, height, width, topology).items():
            y, x = suggest_latent(family, layout, height, width, plan.num_steps, config, task)
            return (
                f"{width * LATENT_CELL}x{height * LATENT_CELL}: the {topology} steps cut a feature map of {w}x{h} "
                f"({path}) into windows, which resizes it to even sides and back; "
                f"{x * LATENT_CELL}x{y * LATENT_CELL} avoids that"
            )
    return None


def suggest_size(
    height: int,
    width: int,
    *,
    family: str = "sdxl",
    num_inference_steps: int = 50,
    config: HiDiffusionConfig | None = None,
    task: str = "text2img",
) -> Size:
    """The nearest (height, width) whose feature maps cut into 2x2 windows without a resize, in every phase.

    Args:
        height, width: image size in pixels, multiples of 8.
        family: one of `accel_hidiff.config.FAMILIES`.
        num_inference_steps: steps that run: they decide which phases occur.
        config, task: as in `apply_hidiffusion`.

    >>> suggest_size(1048, 1920)
    (1024, 1920)
    >>> suggest_size(1000, 1504, family="sd15")
    (1008, 1504)

    Raises:
        BadInput: a size, a step count or a name that cannot be.
    """
    check_pixels(height, width)
    check_steps(num_inference_steps)
    check_choice("task", task, TASKS)
    if config is not None and not isinstance(config, HiDiffusionConfig):
        raise BadInput(f"config: expected a HiDiffusionConfig or None, got {type(config).__name__}")
    chosen = BY_NAME[check_choice("family", family, FAMILIES)]
    cells = height // LATENT_CELL, width // LATENT_CELL
    found = suggest_latent(chosen, chosen.layout(), *cells, num_inference_steps, config or HiDiffusionConfig(), task)
    return found[0] * LATENT_CELL, found[1] * LATENT_CELL


def block_sizes(
    family: Family, layout: Layout, height: int, width: int, topology: Topology
) -> dict[str, tuple[Size, ...]]:
    """The latent sizes that each block of the UNet runs at, in call order: one, or two where a pool or its resize lies
    inside of the block.

    >>> from accel_hidiff.families import SDXL
    >>> block_sizes(SDXL, SDXL.layout(), 256, 256, Topology(windowed=True, pooled=True))["down_blocks.1"]
    ((128, 128), (64, 64))
    """
    found: dict[str, tuple[Size, ...]] = {}
    for path, size in feature_sizes(layout, family, height, width, topology).items():
        block, kind, _ = path.rsplit(".", 2) if ".resnets." in path else ("", "", "")
        if kind:
            sizes = found.get(block, ())
            found[block] = sizes if sizes[-1:] == (size,) else (*sizes, size)
    return found


def control_size(side: int, height: int, width: int) -> Size:
    """The latent size at which a ControlNet runs: the longer side brought down to `side`, both sides multiples of 8.

    Sizes that are no longer than `side` stay as they are.

    >>> control_size(128, 192, 336)
    (72, 128)
    """
    longest = max(height, width)
    if longest <= side:
        return height, width
    scaled = (max(length * side // longest // 8 * 8, 8) for length in (height, width))
    return min(next(scaled), height), min(next(scaled), width)
