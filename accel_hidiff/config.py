"""Frozen, validated, versioned configurations with a JSON round trip. No torch."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from accel_hidiff.errors import BadInput

TASKS = ("text2img", "img2img", "inpaint", "controlnet", "controlnet_img2img")
FAMILIES = ("sd15", "sdxl", "sdxl_turbo")
WINDOW_SHIFTS = ("per_block", "per_step")
ONEDIFF_COMPILERS = ("nexfort", "oneflow")
MEMORY_FORMATS = ("channels_last", "contiguous")
NEXFORT_MODE = "jit"
CUDA_GRAPHS = ("auto", "on", "off")
DECODE_TILES = ("auto", "never", "always")
DECODE_DTYPES = ("bfloat16",)


@dataclass(frozen=True)
class _Config:
    """What every config has: a checked copy, and a JSON round trip."""

    VERSION: ClassVar[int]

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """A plain JSON mapping; `from_json` takes it back.

        >>> HiDiffusionConfig.from_json(HiDiffusionConfig(t1_ratio=0.5).to_json()).t1_ratio
        0.5
        """
        return {"type": type(self).__name__, "version": self.VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of `to_json`; refuses other types, versions and unknown fields."""
        name = cls.__name__
        if not isinstance(data, Mapping):
            raise BadInput(f"expected the mapping that {name}.to_json gives, got {type(data).__name__}")
        kind, version = data.get("type"), data.get("version")
        if (kind, version) != (name, cls.VERSION):
            raise BadInput(f"expected a {name} of version {cls.VERSION}, got {kind!r} version {version!r}")
        fields = {field.name for field in dataclasses.fields(cls)}
        values = {name: value for name, value in data.items() if name not in ("type", "version")}
        if unknown := sorted(set(values) - fields):
            raise BadInput(f"{name} has no field {unknown[0]!r}; it has {', '.join(sorted(fields))}")
        return cls(**values)


@dataclass(frozen=True)
class HiDiffusionConfig(_Config):
    """What to change of HiDiffusion's published settings; the defaults change nothing.

    Args:
        t1_ratio: share of the steps, 0..1, that the longer RAU-Net range ends at; None: the table of the family and
            size (see `accel_hidiff.schedule`).
        t2_ratio: the same for the shorter range; 0 switches that part off. T2 <= T1.
        aggressive: SDXL below 4096: start with the dilated downsampler (True), or pool only (False); None: False for
            inpainting and for Playground (told from its EDM scheduler or its VAE), else True.
        windowed, pooled, dilated: which of the three parts may be on at all.
        window_shifts: "per_block" draws a shift for each windowed block at each step, as published; "per_step" lets all
            blocks of a step share one.
        control_ratio: share of the steps, 0..1, in which ControlNets run.
        shift_seed: seed of the window shifts where a request brings no single generator.

    None of these fields is part of a graph's key: a ratio decides which graphs a request needs, not what is in them.

    Raises:
        BadInput: a ratio outside 0..1, T2 > T1, or a value of another type.
    """

    t1_ratio: float | None = None
    t2_ratio: float | None = None
    aggressive: bool | None = None
    windowed: bool = True
    pooled: bool = True
    dilated: bool = True
    window_shifts: str = "per_block"
    control_ratio: float = 0.6
    shift_seed: int = 0

    VERSION: ClassVar[int] = 1

    def __post_init__(self) -> None:
        for name, optional in (("t1_ratio", " or None"), ("t2_ratio", " or None"), ("control_ratio", "")):
            ratio = getattr(self, name)
            if ratio is None and optional:
                continue
            number = isinstance(ratio, int | float) and not isinstance(ratio, bool)
            if not number or not math.isfinite(ratio) or not 0 <= ratio <= 1:
                raise BadInput(
                    f"{name}: expected a number in 0..1{optional}, got {ratio!r}; it is a share of the steps"
                )
        if self.t1_ratio is not None and self.t2_ratio is not None and self.t2_ratio > self.t1_ratio:
            raise BadInput(f"expected t2_ratio <= t1_ratio, got {self.t2_ratio} > {self.t1_ratio}; swap the two?")
        if self.aggressive is not None and not isinstance(self.aggressive, bool):
            raise BadInput(f"aggressive: expected True, False or None, got {self.aggressive!r}")
        for name in ("windowed", "pooled", "dilated"):
            if not isinstance(getattr(self, name), bool):
                raise BadInput(f"{name}: expected True or False, got {getattr(self, name)!r}")
        check_choice("window_shifts", self.window_shifts, WINDOW_SHIFTS)
        if not isinstance(self.shift_seed, int) or isinstance(self.shift_seed, bool):
            raise BadInput(f"shift_seed: expected an integer, got {self.shift_seed!r}")

    @property
    def is_active(self) -> bool:
        """Whether any part of HiDiffusion may be on; without one the model runs as it was."""
        return self.windowed or self.pooled or self.dilated


@dataclass(frozen=True)
class CFGPlusPlusConfig(_Config):
    """CFG++ (arXiv 2406.08070): guidance that renoises with the unconditional prediction.

    Args:
        scale: lambda, 0..1; None: the pipeline's guidance_scale / 12.5, which is the right strength for about 50 steps
            (`accel_hidiff.equivalent_cfg_scale` gives the CFG weight that a lambda amounts to in each step).

    Raises:
        BadInput: a scale outside of 0..1.
    """

    scale: float | None = None

    VERSION: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.scale is not None:
            check_lambda(self.scale)


@dataclass(frozen=True)
class OneDiffConfig(_Config):
    """Backend "onediff": which of its compilers compiles, and how. docs/onediff.md tells what was verified where.

    Args:
        compiler: "nexfort", "oneflow"; None: nexfort where it works, else oneflow; nexfort alone where a mode or an
            option is given.
        mode: of nexfort, passed through ("jit", "O3", "max-autotune:cache-all", ...); the default is the one that the
            wheel on PyPI has all parts of.
        options: of the compiler, passed through: nexfort's options by name ("jit.freezing"), or fields of onediff's
            `OneflowCompileOptions`.
        memory_format: of the convolutions' weights while the pipeline is accelerated, "channels_last" or "contiguous";
            None: as they are.

    Raises:
        BadInput: another value, or an option that this backend sets itself.
    """

    compiler: str | None = None
    mode: str = NEXFORT_MODE
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    memory_format: str | None = None

    VERSION: ClassVar[int] = 1

    # These decide which graph serves which call, and where it is kept: that is the compile cache's business.
    _OURS: ClassVar[tuple[str, ...]] = (
        "dynamic",
        "use_graph",
        "max_cached_graph_size",
        "graph_file",
        "graph_file_device",
    )

    @property
    def compilers(self) -> tuple[str, ...]:
        """Those that may be used, best first."""
        if self.compiler is not None:
            return (self.compiler,)
        return ONEDIFF_COMPILERS if self.mode == NEXFORT_MODE and not self.options else ONEDIFF_COMPILERS[:1]

    def __post_init__(self) -> None:
        if self.compiler is not None:
            check_choice("onediff.compiler", self.compiler, ONEDIFF_COMPILERS)
        if self.memory_format is not None:
            check_choice("onediff.memory_format", self.memory_format, MEMORY_FORMATS)
        if not isinstance(self.mode, str) or not re.fullmatch(r"[\w-]+(:[\w-]+)*", self.mode):
            raise BadInput(f'onediff.mode: expected names joined by ":", such as "jit", got {self.mode!r}')
        if self.mode != NEXFORT_MODE and self.compiler == "oneflow":
            raise BadInput(
                f"onediff.mode: expected none for oneflow, which has no modes, got {self.mode!r}; use options"
            )
        if not isinstance(self.options, Mapping) or not all(isinstance(name, str) for name in self.options):
            raise BadInput(f"onediff.options: expected a mapping of option names, got {self.options!r}")
        if ours := [name for name in self.options if name in self._OURS]:
            raise BadInput(
                f"onediff.options: expected none of {', '.join(self._OURS)}, got {ours[0]!r}; each graph has its own "
                "callable for one size, and the compile cache keeps it"
            )
        try:
            object.__setattr__(self, "options", json.loads(json.dumps(dict(self.options), allow_nan=False)))
        except (TypeError, ValueError) as problem:
            raise BadInput(f"onediff.options: expected values that JSON has, got {problem}") from None


@dataclass(frozen=True)
class DecodeConfig(_Config):
    """How the VAE decodes; the defaults change nothing for an image that fits into memory.

    Args:
        tiles: "auto": in overlapping tiles where the image as a whole would take more than `max_memory`, "never",
            "always". A tile is normalised by what it shows itself, so that a tiled image differs a little from a whole
            one (benchmarks/RESULTS.md has figures).
        tile: the longest side of a tile in pixels, a multiple of 8.
        overlap: pixels that neighbouring tiles share at least, a multiple of 8, at most half a tile.
        max_memory: bytes that a decode may take; None: what is free on the device when it begins, so that the same
            request may be tiled at one time and not at another.
        dtype: "bfloat16" decodes in it, whatever dtype the VAE has (a float16 pipeline of SDXL decodes in float32
            otherwise); None: as the pipeline does.

    Raises:
        BadInput: another value.
    """

    tiles: str = "auto"
    tile: int = 1024
    overlap: int = 128
    max_memory: int | None = None
    dtype: str | None = None

    VERSION: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_choice("decode.tiles", self.tiles, DECODE_TILES)
        for name, least in (("tile", 64), ("overlap", 0)):
            pixels = getattr(self, name)
            if isinstance(pixels, bool) or not isinstance(pixels, int) or pixels < least or pixels % 8:
                raise BadInput(f"decode.{name}: expected a multiple of 8 pixels, at least {least}, got {pixels!r}")
        if self.overlap > self.tile // 2:
            raise BadInput(
                f"decode.overlap: expected at most half of a tile of {self.tile} pixels, got {self.overlap}; "
                "make tiles larger or the overlap smaller"
            )
        limit = self.max_memory
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
            raise BadInput(f"decode.max_memory: expected a positive number of bytes or None, got {limit!r}")
        if self.dtype is not None:
            check_choice("decode.dtype", self.dtype, DECODE_DTYPES)


CFG_PER_LAMBDA = 12.5  # the CFG weight whose effect lambda = 1 has, by the authors' account


def check_lambda(lam: object) -> float:
    """A CFG++ guidance strength as a float; BadInput outside of 0..1."""
    number = isinstance(lam, int | float) and not isinstance(lam, bool)
    if not number or not 0 <= lam <= 1:  # type: ignore[operator]
        raise BadInput(
            f"lambda: expected a number in 0..1, got {lam!r}; "
            f"for a CFG guidance_scale w pass lambda = w / {CFG_PER_LAMBDA}"
        )
    return float(lam)  # type: ignore[arg-type]


def lambda_of(guidance_scale: float) -> float:
    """lambda for a CFG weight: w / 12.5, as the A1111 sampler `ddim_cfgpp` maps it. Right for about 50 steps.

    >>> lambda_of(7.5)
    0.6

    Raises:
        BadInput: a weight outside of 0..12.5, for which no lambda in 0..1 stands.
    """
    number = isinstance(guidance_scale, int | float) and not isinstance(guidance_scale, bool)
    if not number or not 0 <= guidance_scale <= CFG_PER_LAMBDA:
        raise BadInput(
            f"guidance_scale: expected 0..{CFG_PER_LAMBDA}, got {guidance_scale!r}; "
            f"CFG++ reads it as lambda = guidance_scale / {CFG_PER_LAMBDA}, in 0..1"
        )
    return guidance_scale / CFG_PER_LAMBDA


def check_pixels(height: Any, width: Any) -> tuple[int, int]:
    """Validates an image size in pixels: positive integers, multiples of 8 (one latent cell)."""
    for name, value in (("height", height), ("width", width)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise BadInput(f"{name}: expected an integer number of pixels, got {value!r}")
        if value <= 0:
            raise BadInput(f"{name}: expected a positive number of pixels, got {value}")
        if value % 8:
            nearest = max(8, round(value / 8) * 8)
            raise BadInput(f"{name}: expected a multiple of 8 pixels, got {value}; the nearest is {nearest}")
    return height, width


def check_steps(steps: Any) -> int:
    """Validates a number of denoising steps: an integer of at least 1."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise BadInput(f"steps: expected an integer of at least 1, got {steps!r}")
    return steps


def check_strength(strength: Any) -> float:
    """Validates an image-to-image or inpainting strength: a number in 0..1."""
    number = isinstance(strength, int | float) and not isinstance(strength, bool)
    if not number or not math.isfinite(strength) or not 0 <= strength <= 1:
        raise BadInput(f"strength: expected a number in 0..1, got {strength!r}; it is a share of the steps")
    return float(strength)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """Validates an option that takes one of a few words."""
    if value not in choices:
        raise BadInput(f"{name}: expected one of {', '.join(choices)}; got {value!r}")
    return str(value)
