"""Calls that may hang, and several at a time: nobody waits for ever, and the end of a process waits for none."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from time import monotonic
from typing import Final, TypeVar

from .errors import one_line

Beat = Callable[[], None]
"""Called by work that goes on for long: it is not hanging."""

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all), from several threads one at a time."""

_T = TypeVar("_T")
_THREAD: Final = "compile-cache-remote"


class CallFailed(Exception):
    """The other side did not do what it was asked for, or did not answer; the cause tells."""


class Stopped(Exception):
    """Another file of the same entry failed, or nobody waits any more."""


class ByteCount:
    """Adds up bytes from several threads.

    Attributes:
        stopped: whoever adds next is told to stop.
    """

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total, self.done, self.stopped = total, 0, False
        self._progress = progress
        self._lock = threading.Lock()

    def add(self, size: int) -> None:
        """Count.

        Raises:
            Stopped: see ``stopped``.
        """
        if self.stopped:
            raise Stopped
        with self._lock:
            self.done += size
            if self._progress is not None:
                self._progress(self.done, self.total)


def call_bounded(work: Callable[[Beat], _T], limit: float) -> _T:
    """Call ``work`` in a thread of its own, and wait as long as it answers or calls its ``beat`` in time.

    A call that hangs is left behind: its thread ends with the process.

    Args:
        work: what to call.
        limit: seconds.

    Raises:
        CallFailed: whatever went wrong, or took too long, is its cause.
    """
    limit = min(limit, threading.TIMEOUT_MAX)
    results: queue.SimpleQueue[tuple[_T | None, BaseException | None]] = queue.SimpleQueue()
    last = [monotonic()]

    def beat() -> None:
        last[0] = monotonic()

    def run() -> None:
        try:
            results.put((work(beat), None))
        except BaseException as error:
            results.put((None, error))

    _start(run)
    while True:
        left = last[0] + limit - monotonic()
        try:
            value, error = results.get(timeout=max(0.0, left))
            break
        except queue.Empty:
            if left <= 0:
                value, error = None, TimeoutError(f"no answer for {limit:g} s")
                break
    if error is not None:
        raise CallFailed(f"{type(error).__name__}: {one_line(error, 160)}") from error
    return value  # type: ignore[return-value]


def side_by_side(work: Callable[[_T], None], items: Sequence[_T], workers: int, counter: ByteCount) -> None:
    """Call ``work`` with every item, some at a time; the first error stops the others and is raised.

    No pool of threads: those are waited for when the process ends.
    """
    todo: queue.SimpleQueue[_T] = queue.SimpleQueue()
    for item in items:
        todo.put(item)
    ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def run() -> None:
        error = None
        try:
            while not counter.stopped:
                work(todo.get_nowait())
        except (queue.Empty, Stopped):
            pass
        except BaseException as caught:
            error, counter.stopped = caught, True
        ended.put(error)

    errors: list[BaseException | None] = []
    try:
        threads = min(workers, len(items))
        for _ in range(threads):
            _start(run)
        while len(errors) < threads:
            with suppress(queue.Empty):
                errors.append(ended.get(timeout=1))  # not for ever: Ctrl-C would wait for it, too
    finally:
        counter.stopped = True
    for error in filter(None, errors):
        raise error


def _start(run: Callable[[], None]) -> None:
    try:
        threading.Thread(target=run, daemon=True, name=_THREAD).start()
    except RuntimeError as error:  # too many, or the process is about to end
        raise CallFailed(one_line(error)) from error
