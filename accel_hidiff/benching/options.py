"""What a bench is asked to run. No torch."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accel_hidiff.benching.names import BENCHED, REFERENCE, Contender
from accel_hidiff.config import check_steps
from accel_hidiff.errors import BadInput


@dataclass(frozen=True)
class Options:
    """Of the command line; `regions`, `shapes`, `dtype`, `device` and `model` are checked where the model is loaded.

    Attributes:
        model: a diffusers folder or a hub id; None: the project's tiny SDXL model, with random weights.
        sizes: (height, width) in pixels; none: the size that the model's config names.
        steps: of a request; they decide which topologies occur.
        backends: names as in `Contender.parse`, in the order of the report; the reference is always among them, first.
        repeats: timed turns of each backend.
        batch: of a UNet call, guidance counted.
        cache: compile cache to load from and to fill; None: an empty one, for this run.
        regions, shapes: as in `accelerate`.
        dtype, device: as in `load_pipeline`.
        threads: of torch on the CPU; None: its own choice.
        pythons: (name, Python executable): what runs in another environment, which needs this package's dependencies.
        jobs: contestants that are set up at the same time. Turns are always taken one by one.
        dynamo_backend: of peers that use `torch.compile`.
        reference_asked: whether the reference was among the backends that were asked for.

    Raises:
        BadInput: a number that cannot be, or a backend that nobody knows.
    """

    model: str | None = None
    sizes: tuple[tuple[int, int], ...] = ()
    steps: int = 30
    backends: tuple[str, ...] = BENCHED
    repeats: int = 15
    batch: int = 2
    cache: Path | None = None
    regions: str = "blocks"
    shapes: str = "symbolic"
    dtype: str | None = None
    device: str | None = None
    threads: int | None = None
    pythons: tuple[tuple[str, Path], ...] = ()
    jobs: int = 1
    dynamo_backend: str = "inductor"
    reference_asked: bool = field(init=False)

    def __post_init__(self) -> None:
        check_steps(self.steps)
        for option, value in (
            ("--repeats", self.repeats),
            ("--batch", self.batch),
            ("--threads", self.threads),
            ("--jobs", self.jobs),
        ):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise BadInput(f"{option}: expected an integer of at least 1, got {value!r}")
        object.__setattr__(self, "reference_asked", REFERENCE in self.backends)
        object.__setattr__(self, "backends", tuple(dict.fromkeys((REFERENCE, *self.backends))))
        object.__setattr__(self, "sizes", tuple(dict.fromkeys(self.sizes)))

    @staticmethod
    def parse_backends(text: str) -> tuple[str, ...]:
        """Names from a list with commas.

        >>> Options.parse_backends("aot, eager, aot/whole")
        ('aot', 'eager', 'aot/whole')

        Raises:
            BadInput: an unknown name, or none.
        """
        names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
        for name in names:
            Contender.parse(name)
        return names

    @staticmethod
    def parse_pythons(texts: Sequence[str]) -> tuple[tuple[str, Path], ...]:
        """(name, executable) of each NAME=PATH.

        Raises:
            BadInput: it is no such pair, or there is no such executable.
        """
        pairs = []
        if texts and (place := Path(__file__).resolve().parents[2]).name in ("site-packages", "dist-packages"):
            raise BadInput(
                "--python: expected this project in a checkout, from where another environment can import it alone, "
                f"got one in {place.name}; run it from a checkout"
            )
        for text in texts:
            name, equals, path = text.partition("=")
            if not equals or not os.access(path, os.X_OK) or Path(path).is_dir():
                raise BadInput(f"--python: expected NAME=PATH with the path of a Python, got {text!r}")
            pairs.append((Contender.parse(name).name, Path(os.path.abspath(path))))  # not resolved: a venv's is a link
        return tuple(pairs)

    def python_of(self, backend: str) -> Path | None:
        """The Python that runs a contestant; None: this one."""
        return dict(self.pythons).get(backend)

    def command(self) -> str:
        """The command line that asks for this; places on this machine are left out.

        >>> Options(sizes=((128, 192),), repeats=3, cache=Path("/a/b")).command()
        'accel-hidiff bench --size 192x128 --cache DIR --repeats 3'
        """
        return " ".join(["accel-hidiff bench", *self._words()])

    def to_json(self) -> dict[str, Any]:
        """A plain JSON mapping, for the report."""
        return {
            "model": self.model_name,
            "random_weights": self.model is None,
            "steps": self.steps,
            "batch": self.batch,
            "repeats": self.repeats,
            "regions": self.regions,
            "shapes": self.shapes,
        }

    @property
    def model_name(self) -> str:
        """For people: the model without the folders that it lies in."""
        if self.model is None:
            return "tiny SDXL"
        return Path(self.model).resolve().name if Path(self.model).exists() else self.model

    def _words(self) -> Iterator[str]:
        if self.model is not None:
            yield shlex.quote(self.model_name)
        for height, width in self.sizes:
            yield f"--size {width}x{height}"
        if self.backends != BENCHED:
            yield f"--backends {','.join(self.backends)}"
        if self.cache is not None:
            yield "--cache DIR"
        default = Options()
        for name in ("steps", "repeats", "batch", "regions", "shapes", "dtype", "device", "threads", "jobs"):
            if (value := getattr(self, name)) != getattr(default, name):
                yield f"--{name} {value}"
        for name, _ in self.pythons:
            yield f"--python {name}=PYTHON"


@dataclass(frozen=True)
class Case:
    """One topology of a request at one size.

    Attributes:
        height, width: in pixels.
        topology: its name.
        start, stop: the steps [start, stop) of its first phase.
    """

    height: int
    width: int
    topology: str
    start: int
    stop: int

    @property
    def size(self) -> str:
        """WIDTHxHEIGHT."""
        return f"{self.width}x{self.height}"
