"""The ways of drawing that are compared, and the cells (way x size x captions) of which each table is made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy

import accel_hidiff as ah
from accel_hidiff.demo.scenes import Scene, caption, captions, random_scene
from benchmarks.effect.reading import Kind
from benchmarks.harness import Size

STEPS: Final = 20
MANY_STEPS: Final = 50  # of guidance's cells
SCALE: Final = 3.0  # of guidance, unless a cell says otherwise
TRAINED: Final = Size(128, 128)


@dataclass(frozen=True)
class Arm:
    """One way of drawing. `hidiffusion` None: with the model as it was; `lam`: CFG++ of this strength, else CFG."""

    name: str
    hidiffusion: ah.HiDiffusionConfig | None = None
    scale: float = SCALE
    lam: float | None = None
    compiled: bool = False

    @contextmanager
    def on(self, pipe: Any, cache: Path) -> Iterator[None]:
        """Make a pipeline draw in this way, and restore it."""
        guidance = None if self.lam is None else ah.CFGPlusPlusConfig(scale=self.lam)
        if self.compiled:
            handle = ah.accelerate(pipe, hidiffusion=self.hidiffusion, guidance=guidance, cache=cache)
            try:
                yield
            finally:
                handle.remove()
            return
        if self.hidiffusion is not None:
            ah.apply_hidiffusion(pipe, config=self.hidiffusion)
        if self.lam is not None:
            ah.apply_cfgpp(pipe, self.lam)
        try:
            yield
        finally:
            if self.lam is not None:
                ah.remove_cfgpp(pipe)
            if self.hidiffusion is not None:
                ah.remove_hidiffusion(pipe)


PLAIN: Final = Arm("plain")
RAUNET: Final = Arm("RAU-Net", ah.HiDiffusionConfig(windowed=False))
WINDOWS: Final = Arm("MSW-MSA", ah.HiDiffusionConfig(pooled=False, dilated=False))
BOTH: Final = Arm("HiDiffusion", ah.HiDiffusionConfig())
# What SDXL's table has at four times its side. It goes by pixels, so that this model does not get it by itself.
FOURFOLD: Final = Arm("HiDiffusion, T1 0.7, T2 0.3", ah.HiDiffusionConfig(t1_ratio=0.7, t2_ratio=0.3))
COMPILED: Final = Arm("HiDiffusion, compiled", ah.HiDiffusionConfig(), compiled=True)

SIZES: Final = (Size(128, 128), Size(192, 176), Size(256, 256), Size(320, 192), Size(192, 320), Size(384, 256))
LARGE: Final = Size(512, 512)
RATIOS: Final = ((0.0, 0.0), (0.2, 0.16), (0.4, 0.0), (0.4, 0.4), (0.6, 0.16), (0.8, 0.16), (1.0, 0.16))
# (lambda, w) that the CFG++ paper compares over 50 steps (arXiv 2406.08070), where lambda is worth 12 lambda of CFG in
# the mean of the steps; over fewer, less.
STRENGTHS: Final = ((0.2, 2.0), (0.4, 5.0), (0.6, 7.5), (0.8, 9.0), (1.0, 12.5))


@dataclass(frozen=True)
class Prompt:
    """A caption with what it names, and the seed of the first noise."""

    text: str
    kinds: tuple[Kind, ...]
    seed: int


@dataclass(frozen=True)
class Cell:
    """Pictures that are drawn in one way at one size."""

    table: str
    arm: Arm
    size: Size
    prompts: tuple[Prompt, ...]
    steps: int = STEPS

    @property
    def name(self) -> str:
        """Unique among the cells."""
        return f"{self.table}: {self.arm.name}, {self.size}, {self.steps} steps, {len(self.prompts)} pictures"


def single(count: int) -> tuple[Prompt, ...]:
    """Captions of one object, spread over shapes, colours and backgrounds: each once before any comes again."""
    names = captions()
    chosen = [names[number * 37 % len(names)] for number in range(count)]
    return tuple(Prompt(text, (_kind(text),), 1000 + number) for number, text in enumerate(chosen))


def several(count: int) -> tuple[Prompt, ...]:
    """Captions of two objects, as the training data has them."""
    prompts = []
    for number in range(count):
        scene = random_scene(numpy.random.default_rng((77, number)), objects=2)
        prompts.append(Prompt(caption(scene), kinds(scene), 5000 + number))
    return tuple(prompts)


def guidance_pairs(hidiffusion: ah.HiDiffusionConfig | None = None) -> list[tuple[Arm, Arm]]:
    """CFG and CFG++ of each pair of STRENGTHS."""
    return [
        (Arm(f"CFG {scale:g}", hidiffusion, scale), Arm(f"CFG++ {lam:g}", hidiffusion, SCALE, lam))
        for lam, scale in STRENGTHS
    ]


def cells(count: int, large: int, swept: int, guided: int) -> list[Cell]:
    """All cells: so many captions in the main table, at 512x512, in each sweep, and for each strength of guidance."""

    def at(*sizes: Size) -> list[Cell]:
        arms = (PLAIN, RAUNET, WINDOWS, BOTH)
        return [Cell("scale", arm, size, single(large if size == LARGE else count)) for size in sizes for arm in arms]

    pairs = [Cell("two objects", arm, size, several(swept)) for size in SIZES[:3:2] for arm in (PLAIN, BOTH)]
    ratios = [
        Cell(
            "T1 and T2",
            Arm(f"T1 {t1:g}, T2 {t2:g}", ah.HiDiffusionConfig(t1_ratio=t1, t2_ratio=t2)),
            SIZES[2],
            single(swept),
        )
        for t1, t2 in RATIOS
    ]
    guidance = [
        Cell("guidance", arm, size, single(guided), MANY_STEPS)
        for size, config in ((SIZES[0], None), (SIZES[2], ah.HiDiffusionConfig()))
        for pair in guidance_pairs(config)
        for arm in pair
    ]
    compiled = [Cell("compiled", arm, SIZES[2], single(swept)) for arm in (BOTH, COMPILED)]
    # What tells most comes first: a run can be ended early.
    first = (SIZES[2], SIZES[0])
    rest = [size for size in SIZES if size not in first]
    fourfold = Cell("scale", FOURFOLD, LARGE, single(large))
    return [*at(*first), *guidance, *at(*rest), *ratios, *compiled, *pairs, *at(LARGE), fourfold]


def tables() -> tuple[str, ...]:
    """The names of the tables that cells belong to."""
    return tuple(dict.fromkeys(cell.table for cell in cells(1, 1, 1, 1)))


def kinds(scene: Scene) -> tuple[Kind, ...]:
    """What a scene shows."""
    return tuple((thing.shape, thing.colour) for thing in scene.things)


def _kind(text: str) -> Kind:
    _, colour, shape, *_ = text.split()
    return shape, colour
