"""What a bench calls: a pipeline whose UNet runs one contestant's way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from accel_hidiff.benching.compilations import compilations
from accel_hidiff.benching.inputs import UNetInputs
from accel_hidiff.benching.names import REFERENCE, STOCK, Contender
from accel_hidiff.benching.options import Case, Options
from accel_hidiff.config import HiDiffusionConfig
from accel_hidiff.errors import CompileFailed
from accel_hidiff.patching import Patch, apply_hidiffusion
from accel_hidiff.pipeline import accelerate
from accel_hidiff.shifts import window_shifts

Call = Callable[[UNetInputs], Tensor]


class Subject(Protocol):
    """A pipeline that one contestant runs.

    Attributes:
        pipe: the pipeline, for whole requests.
    """

    pipe: Any

    @property
    def patch(self) -> Patch | None:
        """HiDiffusion on it; None where it is not this project's."""

    def standing(self, case: Case, steps: int) -> Any:
        """A context in which its UNet stands at a case's first step of a request of so many; gives what to call."""

    def counters(self) -> dict[str, int]:
        """Graphs compiled, loaded and bound, and calls that ran eager, since it was made."""

    def require_served(self, counted: dict[str, int]) -> None:
        """CompileFailed if a call that these counters tell of was not served compiled."""


def subject_of(contender: Contender, pipe: Any, options: Options, work: Path) -> Subject:
    """Has a contestant take over a pipeline.

    Args:
        contender: who.
        pipe: a diffusers pipeline of its own.
        options: of the bench.
        work: the folder that all contestants share.

    Raises:
        BadInput: an option is not what it should be.
        ImportError: what a peer needs is not installed.
    """
    if contender.ours:
        return Accelerated(contender, pipe, options, work)
    if contender.base == STOCK:
        return Stock(pipe)
    if contender.base.startswith("hidiffusion"):
        return Published(pipe, options.dynamo_backend if contender.base.endswith("-compile") else None)
    return Compiled(contender, pipe, options.dynamo_backend)


class Accelerated:
    """A backend of this project."""

    def __init__(self, contender: Contender, pipe: Any, options: Options, work: Path) -> None:
        self.pipe, self._compiles = pipe, contender.base != REFERENCE
        self.handle = accelerate(
            pipe,
            hidiffusion=HiDiffusionConfig(),
            cache=options.cache or work / "cache",
            backend=contender.base,
            regions=contender.regions or options.regions,
            shapes=contender.shapes or options.shapes,
        )
        self.patch = self.handle.patch

    @contextmanager
    def standing(self, case: Case, steps: int) -> Iterator[Call]:
        """As in `Subject`."""
        with self.patch.phase(case.start, steps):
            self.handle._enter()  # what a request does once is not a step's
            yield lambda inputs: inputs.call(self.patch.unet)

    def counters(self) -> dict[str, int]:
        """As in `Subject`."""
        names = ("compiles", "loads", "bindings", "eager_calls")
        return {name: int(getattr(self.handle.stats, name)) for name in names}

    def require_served(self, counted: dict[str, int]) -> None:
        """As in `Subject`."""
        if self._compiles and counted["eager_calls"]:
            reasons = "; ".join(self.handle.stats.rejected) or "no reason was given"
            raise CompileFailed(f"calls ran eager: {reasons}")


class _Naive:
    """Nothing but `torch.compile`, which counts what it compiles, or not even that."""

    pipe: Any

    @property
    def patch(self) -> Patch | None:
        """As in `Subject`."""
        return None

    def counters(self) -> dict[str, int]:
        """As in `Subject`; a compiled graph is one that Dynamo captured."""
        made = compilations()
        return {"compiles": made.graphs, "loads": 0, "bindings": 0, "eager_calls": made.gave_up}

    def require_served(self, counted: dict[str, int]) -> None:
        """As in `Subject`."""
        if counted["eager_calls"]:
            raise CompileFailed("torch.compile reached its limit of recompilations, and calls ran eager")


class Stock(_Naive):
    """diffusers as it is."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    @contextmanager
    def standing(self, case: Case, steps: int) -> Iterator[Call]:
        """As in `Subject`."""
        yield lambda inputs: inputs.call(self.pipe.unet)


class Compiled(_Naive):
    """The patched UNet under `torch.compile`, as its users would do it."""

    def __init__(self, contender: Contender, pipe: Any, dynamo_backend: str) -> None:
        self.pipe, self._patch = pipe, apply_hidiffusion(pipe)
        if contender.base == "repeated-blocks":
            pipe.unet.compile_repeated_blocks(backend=dynamo_backend)
        elif contender.base == "tensorrt":
            import torch_tensorrt  # noqa: F401  it registers its backend

            pipe.unet.compile(backend="tensorrt")
        else:
            pipe.unet.compile(backend=dynamo_backend, dynamic=False if contender.shapes == "exact" else None)

    @property
    def patch(self) -> Patch | None:
        """As in `Subject`."""
        return self._patch

    @contextmanager
    def standing(self, case: Case, steps: int) -> Iterator[Call]:
        """As in `Subject`."""
        with self._patch.phase(case.start, steps):
            yield lambda inputs: inputs.call(self.pipe.unet)


class Published(_Naive):
    """The authors' package. Its modules count the steps, and it draws window shifts from torch's global generator.

    The generator is seeded before each call, so that the shifts are those that this project takes in that step.
    Compiled, it keeps torch's own random numbers (`fallback_random`); by default, Inductor draws others, and the output
    could not be verified.
    """

    def __init__(self, pipe: Any, dynamo_backend: str | None) -> None:
        patch = apply_hidiffusion(pipe)  # tells which layout it is, whatever the model's name
        patch.remove()
        from hidiffusion import apply_hidiffusion as apply_published

        self.pipe = pipe
        self._blocks = len(patch.windowed_blocks)
        pipe.register_to_config(_name_or_path=_PUBLISHED_NAMES[patch.family.name])
        apply_published(pipe)
        self._counting = [module for module in pipe.unet.modules() if hasattr(type(module), "max_timestep")]
        if dynamo_backend is not None:
            import torch._inductor.config as inductor

            inductor.fallback_random = True
            pipe.unet.compile(backend=dynamo_backend)

    @contextmanager
    def standing(self, case: Case, steps: int) -> Iterator[Call]:
        """As in `Subject`."""
        self.pipe._num_timesteps = steps
        seed = seed_of_shifts(window_shifts(HiDiffusionConfig().shift_seed, case.start, self._blocks))

        def call(inputs: UNetInputs) -> Tensor:
            for module in self._counting:
                module.timestep = case.start
            torch.manual_seed(seed)
            return inputs.call(self.pipe.unet)

        yield call


# What the authors' package tells a layout by, where a model has not all of the modules of the published one.
_PUBLISHED_NAMES: Final = {
    "sd15": "runwayml/stable-diffusion-v1-5",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sdxl_turbo": "stabilityai/sdxl-turbo",
}


def seed_of_shifts(shifts: Sequence[int]) -> int:
    """The least seed of torch's generator with which the authors' package draws these window shifts, in this order.

    It takes 4 ** len(shifts) tries on average: milliseconds for a few blocks, seconds for SDXL's ten.
    """
    generator, wanted = torch.Generator(), list(shifts)
    for seed in count():
        generator.manual_seed(seed)
        draws = (torch.rand(1, generator=generator).item() for _ in wanted)
        if all(
            sum(draw > bound for bound in (0.25, 0.5, 0.75)) == shift for draw, shift in zip(draws, wanted, strict=True)
        ):
            return seed
    raise AssertionError("seeds do not end")
