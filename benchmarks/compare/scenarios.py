"""The scenarios, by name: what is compared, over which calls. Nothing here changes without a new name. No torch.

`StepScenario` is of single UNet calls, `RequestScenario` of whole requests in a process of its own for each contender.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from benchmarks.harness import Size

STEPS: Final = 30  # of a request, in all scenarios
EAGER: Final = ("stock", "hidiffusion")


def sizes(*texts: str) -> tuple[Size, ...]:
    """Sizes from WIDTHxHEIGHT."""
    return tuple(Size.parse(text) for text in texts)


@dataclass(frozen=True)
class StepScenario:
    """UNet calls, one for each topology of a request at each size.

    Attributes:
        name: unique.
        model: of `models.NAMES`.
        sizes: of images.
        contenders: as `accel-hidiff bench --backends` takes them; the reference, patched eager, runs in any case.
        batch: of the UNet call: 2 is one image with guidance, 1 one without.
        dtype, device: None: float32 on the CPU.
        repeats: timed turns.
        insight: look into what its steps are made of, too.
    """

    name: str
    model: str
    sizes: tuple[Size, ...]
    contenders: tuple[str, ...]
    batch: int = 2
    dtype: str | None = None
    device: str | None = None
    repeats: int = 11
    insight: bool = False

    def to_json(self) -> dict[str, Any]:
        """A plain JSON mapping."""
        return {**asdict(self), "sizes": [str(size) for size in self.sizes], "steps": STEPS}


@dataclass(frozen=True)
class Entry:
    """A contender of a `RequestScenario`.

    Attributes:
        name: as of `StepScenario`.
        processes: one after the other; the second one finds on disk what the first one left there.
        sizes: how many of the scenario's it serves; None: all.
    """

    name: str
    processes: int = 1
    sizes: int | None = None


@dataclass(frozen=True)
class RequestScenario:
    """Requests of text to image with guidance, one for each size, in a process for each contender.

    On a CPU several contenders run at the same time, each on one thread.

    Attributes:
        name: unique.
        model: of `models.NAMES`.
        sizes: in the order of the requests.
        contenders: in the order in which they begin.
        traced_only: peers have `torch.compile` trace, guard and count, but not generate code ("eager" in place of
            Inductor): their counts do not need it, and are there in minutes.
        dtype, device: None: float32 on the CPU.
        limit_s: seconds after which a process is ended; requests that it has finished by then count.
    """

    name: str
    model: str
    sizes: tuple[Size, ...]
    contenders: tuple[Entry, ...]
    traced_only: bool = False
    dtype: str | None = None
    device: str | None = None
    limit_s: float = 600.0

    def to_json(self) -> dict[str, Any]:
        """A plain JSON mapping."""
        return {**asdict(self), "sizes": [str(size) for size in self.sizes], "steps": STEPS}


Scenario = StepScenario | RequestScenario


def dtype_of(scenario: Scenario) -> str:
    """Name of the dtype in which a scenario's model is saved, and runs."""
    return scenario.dtype or "float32"


_VARIANTS: Final = ("aot", "aot/exact", "aot/whole/exact")
_SLOW: Final = ("hidiffusion-compile", "inductor")
_ALL: Final = (*EAGER, *_SLOW, "torch-compile", "repeated-blocks", "tensorrt", "onediff", *_VARIANTS)
_FIVE_SMALL: Final = sizes("512x512", "384x256", "256x384", "320x192", "256x256")
_FIVE_LARGE: Final = sizes("1024x1024", "2048x2048", "2688x1536", "1536x2688", "4096x4096")
_PEERS: Final = tuple(
    Entry(name)
    for name in ("torch-compile/exact", "torch-compile", "hidiffusion-compile", "repeated-blocks", "hidiffusion")
)
_GPU: Final[dict[str, Any]] = {"dtype": "bfloat16", "device": "cuda"}

# A quarter of an hour on two cores. What takes longer to compile is in `LONG`.
CPU: Final[tuple[Scenario, ...]] = (
    RequestScenario(
        "five-sizes", "sdxl-tiny", _FIVE_SMALL, (Entry("torch-compile", 2, sizes=1), Entry("eager"), Entry("aot", 2))
    ),
    RequestScenario(
        "five-sizes-peers", "sdxl-tiny", _FIVE_SMALL, (*_PEERS, Entry("eager")), traced_only=True, limit_s=60.0
    ),
    StepScenario(
        "square",
        "sdxl-tiny",
        sizes("512x512"),
        (*EAGER, "torch-compile", "repeated-blocks", "tensorrt", "onediff", *_VARIANTS),
        repeats=7,
        insight=True,
    ),
    StepScenario("landscape", "sdxl-tiny", sizes("640x384"), ("hidiffusion", "aot"), repeats=7),
    StepScenario("batch-1", "sdxl-tiny", sizes("512x512"), ("aot",), batch=1, repeats=7),
    StepScenario("sd15", "sd15-tiny", sizes("384x256"), ("hidiffusion", "aot"), repeats=7),
)
LONG: Final[tuple[Scenario, ...]] = (
    StepScenario("square-slow-compilers", "sdxl-tiny", sizes("512x512"), _SLOW, repeats=9),
    RequestScenario("five-sizes-peers-compiled", "sdxl-tiny", _FIVE_SMALL, (Entry("eager"), *_PEERS), limit_s=1800.0),
)
GPU: Final[tuple[Scenario, ...]] = (
    StepScenario("sdxl-gpu", "sdxl", _FIVE_LARGE, _ALL, insight=True, **_GPU),
    StepScenario("sdxl-gpu-batch-1", "sdxl", _FIVE_LARGE, ("stock", "aot"), batch=1, **_GPU),
    StepScenario("sd15-gpu", "sd15", sizes("1024x1024", "2048x2048"), _ALL, insight=True, **_GPU),
    StepScenario("sd15-gpu-batch-1", "sd15", sizes("1024x1024", "2048x2048"), ("stock", "aot"), batch=1, **_GPU),
)
SMOKE: Final[tuple[Scenario, ...]] = (
    RequestScenario("smoke-requests", "sdxl-tiny", sizes("128x128", "192x128"), (Entry("eager"), Entry("aot", 2))),
    StepScenario("smoke-steps", "sdxl-tiny", sizes("128x128"), ("stock", "tensorrt", "aot"), repeats=3, insight=True),
)
SETS: Final[dict[str, Sequence[Scenario]]] = {"cpu": CPU, "cpu-long": LONG, "gpu": GPU, "smoke": SMOKE}
