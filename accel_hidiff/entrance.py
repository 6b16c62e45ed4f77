"""The begin of a pipeline's request: what has to happen before anything of it runs, and one request at a time.

diffusers' pipelines call their own `check_inputs` first and `encode_prompt` next; both are replaced on the instance,
once, however many features want to run before them. Features may be added and taken off in any order.
"""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

from accel_hidiff.errors import PipelineBusy
from accel_hidiff.undo import UndoLog

First = Callable[[], None]

_ENTRANCE = "_accel_hidiff_entrance"


class Entrance:
    """What runs before methods of one pipeline. Made by `run_before`."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = weakref.ref(pipe)
        self._firsts: dict[str, list[First]] = {}
        self._undo = UndoLog()

    def add(self, method: str, first: First) -> None:
        """Runs `first` before the method, before what was added earlier."""
        pipe = self._pipe()
        if not self._firsts:
            self._undo.replace(pipe, _ENTRANCE, self, "entrance record")
        if method not in self._firsts:
            self._firsts[method] = []
            self._undo.replace(pipe, method, self._wrapped(method, getattr(pipe, method)), f"entrance of {method}")
        self._firsts[method].insert(0, first)

    def discard(self, method: str, first: First) -> None:
        """Takes it off; with the last one, the pipeline has its own methods again."""
        self._firsts[method].remove(first)
        if not any(self._firsts.values()):
            self._undo.undo()
            self._firsts.clear()

    def check(self) -> None:
        """PatchConflict if somebody else replaced one of the methods since."""
        self._undo.check()

    def _wrapped(self, method: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        firsts = self._firsts[method]

        @functools.wraps(inner)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            for first in tuple(firsts):
                first()
            return inner(*args, **kwargs)

        return wrapper


class Entered:
    """Something that runs before methods of a pipeline, until it is taken off."""

    def __init__(self, entrance: Entrance, firsts: dict[str, First]) -> None:
        self._entrance = entrance
        self._firsts = firsts

    def check(self) -> None:
        """PatchConflict if somebody else replaced one of the methods since."""
        if self._firsts:
            self._entrance.check()

    def remove(self) -> None:
        """Takes it off; nothing happens the second time.

        Raises:
            PatchConflict: somebody else replaced one of the methods since; nothing is removed then.
        """
        self.check()
        while self._firsts:
            self._entrance.discard(*self._firsts.popitem())


def run_before(pipe: Any, **firsts: First) -> Entered:
    """Has functions run before methods of a pipeline: method name -> function without arguments."""
    entrance = vars(pipe).get(_ENTRANCE) or Entrance(pipe)
    for method, first in firsts.items():
        entrance.add(method, first)
    return Entered(entrance, firsts)


_in_request: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()  # pipeline -> the thread of its last one
_lock = threading.Lock()


def enter_alone(pipe: Any) -> None:
    """This thread begins a request of a pipeline; refused while another thread is in one.

    A pipeline and its scheduler keep the state of the request that runs: timesteps, the step, the guidance. A second
    one would change them under the first, and both images would be wrong without an error.

    Whether the other thread is still in its request is read off its stack, so that a request which ended by an
    exception, or a thread that died, holds nothing.

    Raises:
        PipelineBusy: another thread is in a request.
    """
    with _lock:
        other, mine = _in_request.get(pipe), threading.get_ident()
        if other is not None and other != mine and _runs_in(pipe, sys._current_frames().get(other)):
            raise PipelineBusy(
                f"expected one request of a {type(pipe).__name__} at a time, got a second one while thread {other} is "
                "in its call; queue requests, or give each thread a pipeline of its own over the same weights: "
                "ah.replica(pipe), before accelerate"
            )
        _in_request[pipe] = mine


def _runs_in(pipe: Any, frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_name == "__call__" and frame.f_locals.get("self") is pipe:
            return True
        frame = frame.f_back
    return False
