"""A request on its way through an engine, and what is told of it. No torch, no web framework."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from accel_hidiff.serving.refusal import Refusal
from accel_hidiff.serving.requests import ImageRequest


@dataclass(frozen=True)
class Step:
    """A denoising step is done: `step` of `total`, both from 1, of image `image`, from 0."""

    image: int
    step: int
    total: int


@dataclass(frozen=True)
class Finished:
    """All images are there.

    Attributes:
        images: (PIL image, seed).
        compiled, eager: calls that compiled graphs served, and that ran eager.
        waited, drawn: seconds in the queue, and from there on.
    """

    images: tuple[tuple[Any, int], ...]
    compiled: int
    eager: int
    waited: float
    drawn: float


Event = Step | Finished | Refusal


class Stopped(Exception):
    """Raised between two steps of a job that ended meanwhile: its client went, or its time is over."""


class Job:
    """One request. It ends once: with its images or with a Refusal, from whichever thread is first.

    Args:
        request: what to draw.
        number: a name for logs.
        tell: gets each event, in the thread that it happens in; the last one is `Finished` or a `Refusal`.
    """

    def __init__(self, request: ImageRequest, number: str, tell: Callable[[Event], None]) -> None:
        self.request = request
        self.number = number
        self.arrived = time.monotonic()
        self._tell = tell
        self._ended = False
        self._lock = threading.Lock()

    @property
    def ended(self) -> bool:
        """Whether nobody waits for it any more."""
        return self._ended

    def finish(self, event: Finished | Refusal) -> bool:
        """Ends it; False if it had ended already, and nothing is told then."""
        with self._lock:
            if self._ended:
                return False
            self._ended = True
        self._tell(event)
        return True

    def step(self, event: Step) -> None:
        """Tells a step.

        Raises:
            Stopped: the job has ended.
        """
        self.check()
        self._tell(event)

    def check(self) -> None:
        """Stopped if the job has ended."""
        if self._ended:
            raise Stopped
