"""The deploy file: what a service compiles ahead of time and serves, as TOML. No torch.

    [cache]
    location = "compile-cache"          # relative paths are relative to the file

    [[models]]
    name = "base"
    model = "models/sdxl"               # a diffusers folder or a hub id
    sizes = ["1024x1024", "2688x1536"]  # WIDTHxHEIGHT
    steps = [30]

Every table is a frozen dataclass below; its fields are the names that the file may use, its docstring their meaning.
"""

from __future__ import annotations

import dataclasses
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from accel_hidiff.config import (
    CUDA_GRAPHS,
    FAMILIES,
    MEMORY_FORMATS,
    TASKS,
    CFGPlusPlusConfig,
    DecodeConfig,
    OneDiffConfig,
    check_choice,
    check_pixels,
    check_steps,
)
from accel_hidiff.errors import BadInput
from accel_hidiff.schedule import running_steps
from compile_cache import ShapeBuckets

SERVICE_ON_MISS: Final = ("background", "eager", "error")  # a request never compiles
_SIZE = re.compile(r"\s*(-?\d+)\s*[xX]\s*(-?\d+)\s*")
_NAME = re.compile(r"[\w.-]+")


def parse_size(text: str, option: str = "--size") -> tuple[int, int]:
    """(height, width) from "WIDTHxHEIGHT".

    >>> parse_size("2688x1536")
    (1536, 2688)
    """
    match = _SIZE.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise BadInput(f"{option}: expected WIDTHxHEIGHT in pixels, such as 2688x1536, got {text!r}")
    width, height = int(match[1]), int(match[2])
    return check_pixels(height, width)


@dataclass(frozen=True)
class AspectRatios:
    """SDXL's 40 training sizes times a scale, as a family of sizes (`compile_cache.ShapeBuckets.aspect_ratios`).

    Args:
        scale: factor of both sides; 2.0 gives sizes of four times the area.
        multiple: sides are rounded to it, a multiple of 8 pixels.
    """

    scale: float = 1.0
    multiple: int = 64

    def __post_init__(self) -> None:
        _number("aspect_ratios.scale", self.scale, 0.1, 8)
        _integer("aspect_ratios.multiple", self.multiple, 8)
        if self.multiple % 8:
            raise BadInput(f"aspect_ratios.multiple: expected a multiple of 8 pixels, got {self.multiple}")

    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) in pixels."""
        buckets = ShapeBuckets.aspect_ratios(self.scale, self.multiple)
        return [(bucket.height.minimum, bucket.width.minimum) for bucket in buckets]


@dataclass(frozen=True)
class CacheTable:
    """`[cache]`: where artifacts are kept.

    Args:
        location: directory of the compile cache.
        remote: URL of a second cache that missing artifacts come from, such as s3://bucket/cache.
        push: send what is compiled to the remote as well.
        trust: public keys (ed25519:...) or files of them; nothing else is loaded then.
        sign_with: private key file that signs what is compiled; `precompile` only.
        max_bytes: what the cache may hold; the least recently used artifacts go first.
    """

    location: str = "compile-cache"
    remote: str | None = None
    push: bool = False
    trust: tuple[str, ...] = ()
    sign_with: str | None = None
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        _text("cache.location", self.location)
        _optional("cache.remote", self.remote, _text)
        _boolean("cache.push", self.push)
        _texts("cache.trust", self.trust)
        _optional("cache.sign_with", self.sign_with, _text)
        _optional("cache.max_bytes", self.max_bytes, _integer)
        if self.push and self.remote is None:
            raise BadInput("cache.push: expected cache.remote with it, got none; say where to send what is compiled")


@dataclass(frozen=True)
class ModelTable:
    """`[[models]]`: one pipeline, and the requests that it is compiled for.

    Args:
        name: what requests call it.
        model: a diffusers folder or a hub id.
        sizes: "WIDTHxHEIGHT" in pixels, multiples of 8.
        aspect_ratios: sizes of a family, beside `sizes`.
        steps: numbers of denoising steps; they decide which topologies occur.
        batch_sizes: UNet batches, guidance counted: (1, 2) is one image without and with it.
        strengths: of image-to-image and inpainting, the shares of the steps that run.
        controlnets: folders or hub ids; the model is then served with them.
        family, task: as in `apply_hidiffusion`; None: told from the model.
        scheduler: class name of a diffusers scheduler to use in place of the model's own; None: its own.
        cfgpp: lambda of CFG++, 0..1; None: the pipeline's own guidance.
        backend, regions, shapes: as in `accelerate`.
        onediff: a table with the fields of `OneDiffConfig`, for backend "onediff".
        dtype, device: as in `load_pipeline`.
        target: GPU to compile for, which need not be where `precompile` runs: "sm_90", "h200", see `Target.parse`.
        memory_format: "channels_last" or "contiguous", of the convolutions' weights; None: as the model has it.
        decode: a table with the fields of `DecodeConfig`: tiles, memory and dtype of the VAE's decoder.
        on_miss: "background", "eager" or "error": what `serve` does for a size that is not compiled.
        cuda_graphs: "auto", "on" or "off": whether `serve` replays UNet calls as CUDA graphs, as in `accelerate`.
    """

    name: str
    model: str
    sizes: tuple[str, ...] = ()
    aspect_ratios: AspectRatios | None = None
    steps: tuple[int, ...] = (30,)
    batch_sizes: tuple[int, ...] = (1, 2)
    strengths: tuple[float, ...] = (1.0,)
    controlnets: tuple[str, ...] = ()
    family: str | None = None
    task: str | None = None
    scheduler: str | None = None
    cfgpp: float | None = None
    backend: str = "aot"
    onediff: OneDiffConfig | None = None
    regions: str = "blocks"
    shapes: str = "symbolic"
    dtype: str | None = None
    device: str | None = None
    target: str | None = None
    memory_format: str | None = None
    on_miss: str = "background"
    decode: DecodeConfig | None = None
    cuda_graphs: str = "auto"

    def __post_init__(self) -> None:
        _text("models.name", self.name)
        if not _NAME.fullmatch(self.name):
            raise BadInput(f"models.name: expected letters, digits, '.', '_' and '-', got {self.name!r}")
        _text("models.model", self.model)
        _texts("models.sizes", self.sizes)
        _texts("models.controlnets", self.controlnets)
        for option, allowed in (("family", FAMILIES), ("task", TASKS), ("dtype", ("float32", "float16", "bfloat16"))):
            if getattr(self, option) is not None:
                check_choice(f"models.{option}", getattr(self, option), allowed)
        check_choice("models.backend", self.backend, ("aot", "inductor", "onediff", "eager"))
        if self.onediff is not None and not isinstance(self.onediff, OneDiffConfig):
            raise BadInput(f'models.onediff: expected a table such as {{mode = "jit"}}, got {self.onediff!r}')
        if self.onediff is not None and self.backend != "onediff":
            raise BadInput(f'models.onediff: expected it with backend = "onediff" alone, got {self.backend!r}')
        if self.decode is not None and not isinstance(self.decode, DecodeConfig):
            raise BadInput(f'models.decode: expected a table such as {{tiles = "auto"}}, got {self.decode!r}')
        check_choice("models.regions", self.regions, ("blocks", "whole"))
        check_choice("models.shapes", self.shapes, ("symbolic", "exact"))
        check_choice("models.cuda_graphs", self.cuda_graphs, CUDA_GRAPHS)
        check_choice("models.on_miss", self.on_miss, SERVICE_ON_MISS)
        if self.memory_format is not None:
            check_choice("models.memory_format", self.memory_format, MEMORY_FORMATS)
        if self.target is not None and self.backend != "aot":
            raise BadInput(f'models.target: expected it with backend = "aot" alone, got {self.backend!r}')
        for option in ("scheduler", "device", "target"):
            _optional(f"models.{option}", getattr(self, option), _text)
        if self.aspect_ratios is not None and not isinstance(self.aspect_ratios, AspectRatios):
            raise BadInput(f"models.aspect_ratios: expected a table with scale, got {self.aspect_ratios!r}")
        _some("models.steps", self.steps)
        _some("models.strengths", self.strengths)
        _some("models.batch_sizes", self.batch_sizes)
        for batch in self.batch_sizes:
            _integer("models.batch_sizes", batch)
        for steps in self.steps:
            check_steps(steps)
            for strength in self.strengths:
                _number("models.strengths", strength, 0, 1)
                running_steps(steps, strength)
        if self.cfgpp is not None:
            CFGPlusPlusConfig(self.cfgpp)
        if not self.pixel_sizes():
            raise BadInput(f"models.sizes: expected at least one size for {self.name}, got none; or aspect_ratios")

    @property
    def backend_spec(self) -> str | OneDiffConfig:
        """As `accelerate` takes it."""
        return self.onediff or self.backend

    def pixel_sizes(self) -> list[tuple[int, int]]:
        """Every (height, width) in pixels, in order, each once.

        >>> ModelTable("base", "models/sdxl", sizes=("1024x1024", "2688x1536")).pixel_sizes()
        [(1024, 1024), (1536, 2688)]
        """
        listed = [parse_size(text, "models.sizes") for text in self.sizes]
        families = self.aspect_ratios.sizes() if self.aspect_ratios is not None else []
        return list(dict.fromkeys([*listed, *families]))


@dataclass(frozen=True)
class ServiceTable:
    """`[service]`: the HTTP service, and what a request may ask for.

    Args:
        host, port: where it listens; port 0: any free one.
        queue: requests that may wait for each model; one more is answered with status 429.
        timeout: seconds that a request may take, waiting included.
        drain: seconds that requests get to end when the service is stopped.
        max_images: images of one request.
        max_steps: denoising steps of one request.
        max_prompt: characters of a prompt.
        max_body: bytes of a request.
        any_size: serve sizes that no model lists, too (`on_miss` says how); else they are refused, with the nearest.
        max_pixels: pixels of one image where `any_size`.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    queue: int = 16
    timeout: float = 300.0
    drain: float = 30.0
    max_images: int = 4
    max_steps: int = 100
    max_prompt: int = 2000
    max_body: int = 65536
    any_size: bool = False
    max_pixels: int = 4096 * 4096

    def __post_init__(self) -> None:
        _text("service.host", self.host)
        _integer("service.port", self.port, 0)
        if self.port > 65535:
            raise BadInput(f"service.port: expected 0 to 65535, got {self.port}")
        for option in ("queue", "max_images", "max_steps", "max_prompt", "max_body", "max_pixels"):
            _integer(f"service.{option}", getattr(self, option))
        _number("service.timeout", self.timeout, 0.001, 86400)
        _number("service.drain", self.drain, 0, 86400)
        _boolean("service.any_size", self.any_size)


@dataclass(frozen=True)
class Deployment:
    """A whole deploy file.

    Args:
        models: at least one, with unique names; the first one is the default of requests.
        cache, service: the other tables.
    """

    models: tuple[ModelTable, ...]
    cache: CacheTable = field(default_factory=CacheTable)
    service: ServiceTable = field(default_factory=ServiceTable)

    def __post_init__(self) -> None:
        if not self.models:
            raise BadInput("models: expected at least one [[models]] table, got none")
        names = [model.name for model in self.models]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise BadInput(f"models.name: expected unique names, got {repeated[0]!r} twice")

    def for_target(self, target: str) -> Deployment:
        """The same with every model that keeps artifacts compiled for this GPU."""
        models = (dataclasses.replace(m, target=target) if m.backend == "aot" else m for m in self.models)
        return dataclasses.replace(self, models=tuple(models))

    def model(self, name: str | None = None) -> ModelTable:
        """The model of this name; None: the first one. BadInput, with the names that there are, if it is unknown."""
        for model in self.models:
            if name is None or model.name == name:
                return model
        raise BadInput(f"model: expected one of {', '.join(model.name for model in self.models)}, got {name!r}")


def is_deploy_file(text: str) -> bool:
    """Whether a command's argument names a deploy file, and no model.

    >>> is_deploy_file("deploy.toml"), is_deploy_file("models/sdxl")
    (True, False)
    """
    return text.endswith(".toml") and not os.path.isdir(text)


def load_deployment(path: str | os.PathLike[str]) -> Deployment:
    """Reads a deploy file; relative paths in it come back relative to the current directory.

    Raises:
        BadInput: it cannot be read, is no TOML, or says something that cannot be; the message names file and field.
    """
    file = Path(path)
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as problem:
        raise BadInput(f"{file}: expected a deploy file, cannot read it: {problem.strerror}") from problem
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise BadInput(f"{file}: expected TOML, got {str(problem).splitlines()[0]}") from problem
    try:
        return _read(data, file.parent)
    except BadInput as problem:
        raise BadInput(f"{file}: {problem}") from problem


def _read(data: Mapping[str, Any], folder: Path) -> Deployment:
    known = {"cache", "service", "models"}
    if unknown := sorted(set(data) - known):
        raise BadInput(f"{unknown[0]}: expected the tables {', '.join(sorted(known))}; there is no such one")
    models = data.get("models", [])
    if not isinstance(models, list):
        raise BadInput("models: expected [[models]], an array of tables, got [models]; double the brackets")
    cache = _table(CacheTable, "cache", data.get("cache", {}))
    cache = dataclasses.replace(
        cache,
        location=str(folder / cache.location),
        trust=tuple(key if key.startswith("ed25519:") else str(folder / key) for key in cache.trust),
        sign_with=None if cache.sign_with is None else str(folder / cache.sign_with),
    )
    return Deployment(
        models=tuple(_placed(_table(ModelTable, "models", model), folder) for model in models),
        cache=cache,
        service=_table(ServiceTable, "service", data.get("service", {})),
    )


def _placed(model: ModelTable, folder: Path) -> ModelTable:
    """Folders that are there, as seen from here; what is no folder may be a hub id."""

    def placed(name: str) -> str:
        return str(folder / name) if (folder / name).exists() else name

    return dataclasses.replace(model, model=placed(model.model), controlnets=tuple(map(placed, model.controlnets)))


def _table(kind: type[Any], name: str, data: Any) -> Any:
    if not isinstance(data, Mapping):
        raise BadInput(f"{name}: expected a table, got {type(data).__name__}")
    fields = {entry.name: entry for entry in dataclasses.fields(kind)}
    if unknown := sorted(set(data) - set(fields)):
        raise BadInput(f"{name}.{unknown[0]}: expected one of {', '.join(fields)}; there is no such setting")
    required = [key for key, entry in fields.items() if entry.default is entry.default_factory is dataclasses.MISSING]
    if missing := [key for key in required if key not in data]:
        raise BadInput(f"{name}.{missing[0]}: expected a value, got none; it has no default")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
    for inner, inner_kind in (("aspect_ratios", AspectRatios), ("onediff", OneDiffConfig), ("decode", DecodeConfig)):
        if isinstance(values.get(inner), Mapping):
            values[inner] = _table(inner_kind, f"{name}.{inner}", values[inner])
    return kind(**values)


def _text(name: str, value: Any) -> None:
    if not isinstance(value, str) or not value.strip():
        raise BadInput(f"{name}: expected text, got {value!r}")


def _texts(name: str, values: Any) -> None:
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise BadInput(f"{name}: expected a list of texts, got {values!r}")
    for value in values:
        _text(name, value)


def _some(name: str, values: Any) -> None:
    if not isinstance(values, tuple) or not values:
        raise BadInput(f"{name}: expected a list with at least one number, got {values!r}")


def _integer(name: str, value: Any, minimum: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise BadInput(f"{name}: expected an integer of at least {minimum}, got {value!r}")


def _number(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise BadInput(f"{name}: expected a number in {low}..{high}, got {value!r}")


def _boolean(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise BadInput(f"{name}: expected true or false, got {value!r}")


def _optional(name: str, value: Any, check: Any) -> None:
    if value is not None:
        check(name, value)
