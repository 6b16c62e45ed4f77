"""A pool of compiling processes: bounded in number, memory and time, and gone when this process is."""

from __future__ import annotations

import atexit
import logging
import os
import re
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import psutil

from accel_hidiff.compiling.blueprint import Blueprint, CompileJob
from accel_hidiff.compiling.child import Child, ChildDied
from accel_hidiff.compiling.frames import LOWEST_PRIORITY
from accel_hidiff.compiling.instructions import Found
from accel_hidiff.errors import BadInput
from compile_cache import CompileCache, CompileCacheError

LOG: Final = logging.getLogger("accel_hidiff")
_TICK: Final = 0.2  # seconds between two looks at a process that works
_PLAIN: Final = re.compile(r"[\w./+-]+", re.ASCII)  # of paths
_PATIENCE: Final = 2  # times that a graph is tried whose process died
_ONE_THREAD: Final = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"), "1")
_SAME_ORDER: Final = {"PYTHONHASHSEED": "0"}  # of sets in Inductor, so that two builds of a graph are the same bytes


@dataclass(frozen=True)
class Outcome:
    """What came of a job.

    Attributes:
        digest: of the graph's key.
        path: of its region.
        state: "compiled"; "found": somebody else had compiled it; "failed": it cannot be compiled; "not stored": the
            cache did not take it; "died": the process ended, ran out of its memory or its time; "cancelled".
        seconds: that it took.
        error: one line, where it is not in the cache now.
    """

    digest: str
    path: str
    state: str
    seconds: float = 0.0
    error: str = ""

    @property
    def ok(self) -> bool:
        """Whether the artifact is in the cache now."""
        return self.state in ("compiled", "found")


@dataclass
class _Task:
    job: CompileJob
    blueprint: Blueprint
    cache: CompileCache
    done: Callable[[Outcome], None]
    started: Callable[[], None] | None
    tries: int = 0
    cancelled: bool = False


class CompilePool:
    """Processes that compile graphs into a cache. They start with the first job and end after `idle` seconds without.

    Args:
        workers: how many at once.
        max_memory: bytes that one process with its compilers may take; over it, it is ended and its graph has failed.
            None: no limit.
        timeout: seconds that one graph may take.
        idle: seconds that a process waits for the next job.
        niceness: 0 (as this process) to 19 (lowest priority).

    Raises:
        BadInput: a value out of its range.
    """

    def __init__(
        self,
        workers: int = 1,
        *,
        max_memory: int | None = None,
        timeout: float = 3600.0,
        idle: float = 60.0,
        niceness: int = LOWEST_PRIORITY,
    ) -> None:
        for name, value, low in (("workers", workers, 1), ("niceness", niceness, 0), ("max_memory", max_memory, 1)):
            if name == "max_memory" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise BadInput(f"{name}: expected an integer of at least {low}, got {value!r}")
        for name, seconds in (("timeout", timeout), ("idle", idle)):
            if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds >= 0:
                raise BadInput(f"{name}: expected seconds, at least 0, got {seconds!r}")
        self.workers = workers
        self.max_memory = max_memory
        self.timeout = timeout
        self.idle = idle
        self.niceness = niceness
        self._tasks: deque[_Task] = deque()
        self._threads: set[threading.Thread] = set()  # all that live: closing waits for them
        self._takers: set[threading.Thread] = set()  # those of them that take the next job
        self._running: set[_Process] = set()
        self._closed = False
        self._work = threading.Condition()

    def submit(
        self,
        job: CompileJob,
        blueprint: Blueprint,
        cache: CompileCache,
        done: Callable[[Outcome], None],
        started: Callable[[], None] | None = None,
    ) -> Callable[[], None]:
        """Queues a job; returns a function that cancels it while it waits.

        Args:
            job, blueprint: what to compile.
            cache: where it goes.
            done: called once with what came of it, in a thread of the pool.
            started: called when a process begins with it.
        """
        task = _Task(job, blueprint, cache, done, started)
        with self._work:
            if self._closed:
                raise RuntimeError("expected an open pool, got one that was closed; make another one")
            self._tasks.append(task)
            if len(self._takers) < self.workers:
                thread = threading.Thread(target=self._run, name="accel_hidiff-compiling", daemon=True)
                self._threads.add(thread)
                self._takers.add(thread)
                thread.start()
            self._work.notify()

        def cancel() -> None:
            task.cancelled = True

        return cancel

    def pids(self) -> list[int]:
        """The processes that live now."""
        with self._work:
            return [process.pid for process in self._running]

    def close(self) -> None:
        """Ends all processes at once; what they worked on and what waits is cancelled."""
        with self._work:
            self._closed = True
            waiting, self._tasks = list(self._tasks), deque()
            for process in self._running:
                process.kill()
            threads = list(self._threads)
            self._work.notify_all()
        for task in waiting:
            self._finish(task, Outcome(task.job.digest, task.job.path, "cancelled", error="the pool was closed"))
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(10)

    def __enter__(self) -> CompilePool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ---- inside --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        """One thread per process: starts it, feeds it, and clears up after it."""
        process: _Process | None = None
        try:
            while (task := self._next()) is not None:
                if task.cancelled:
                    outcome = Outcome(task.job.digest, task.job.path, "cancelled", error="nobody needs it any more")
                    self._finish(task, outcome)
                    continue
                if process is not None and not process.fits(task.cache):
                    self._end(process)
                    process = None
                try:
                    if process is None:
                        process = self._start(task.cache)
                    outcome = self._work_off(process, task)
                except (OSError, CompileCacheError) as problem:  # no process, or no place for its files
                    first = str(problem).splitlines()[0]
                    outcome = Outcome(task.job.digest, task.job.path, "died", error=f"no compiling process: {first}")
                if process is not None and not process.alive:
                    self._end(process)
                    process = None
                task.tries += 1
                if outcome.state == "died" and self._closed:  # by this pool
                    outcome = replace(outcome, state="cancelled", error="the pool was closed")
                if outcome.state == "died" and task.tries < _PATIENCE:
                    with self._work:
                        self._tasks.append(task)
                    continue
                self._finish(task, outcome)
        finally:
            self._end(process)
            with self._work:
                self._threads.discard(threading.current_thread())
                self._takers.discard(threading.current_thread())

    def _next(self) -> _Task | None:
        """The next task; None where the thread may end."""
        end = time.monotonic() + self.idle
        with self._work:
            while not self._tasks:
                left = end - time.monotonic()
                if self._closed or left <= 0:
                    self._takers.discard(threading.current_thread())  # the next job starts another one
                    return None
                self._work.wait(left)
            return self._tasks.popleft()

    def _start(self, cache: CompileCache) -> _Process:
        process = _Process(cache, self.niceness)
        with self._work:
            self._running.add(process)
            if self._closed:
                process.kill()
        return process

    def _end(self, process: _Process | None) -> None:
        if process is not None:
            process.end()
            with self._work:
                self._running.discard(process)

    def _work_off(self, process: _Process, task: _Task) -> Outcome:
        if task.started is not None:
            task.started()
        start = time.monotonic()
        answer = process.ask(task.blueprint, task.job, self._limits(start))
        seconds = time.monotonic() - start
        return Outcome(task.job.digest, task.job.path, answer["state"], seconds, answer.get("error", ""))

    def _limits(self, start: float) -> Callable[[_Process], tuple[str, str] | None]:
        """Tells of a process that is at work whether it has to end: (state, error) of its job then."""

        def exceeded(process: _Process) -> tuple[str, str] | None:
            if self._closed:
                return "cancelled", "the pool was closed"
            if time.monotonic() - start > self.timeout:
                return "failed", f"it took more than {self.timeout:.0f} s"
            if self.max_memory is not None and (used := process.memory()) > self.max_memory:
                allowed = f"{self.max_memory / 1e9:.2f} GB are allowed"
                return "failed", f"it took {used / 1e9:.2f} GB of memory, {allowed}"
            return None

        return exceeded

    @staticmethod
    def _finish(task: _Task, outcome: Outcome) -> None:
        level = logging.INFO if outcome.ok or outcome.state == "cancelled" else logging.WARNING
        text = f" ({outcome.error})" if outcome.error else ""
        facts = {"event": "background_compile", "key": outcome.digest, "state": outcome.state}
        LOG.log(level, "%s: %s in %.1f s%s", outcome.path, outcome.state, outcome.seconds, text, extra=facts)
        try:
            task.done(outcome)
        except Exception:
            LOG.exception("%s: what waited for its graph failed", outcome.path)


class _Instructions:
    """What one compiling process found out of this machine's instructions, for all later ones of this process."""

    def __init__(self) -> None:
        self._found: Found | None = None
        self._lock = threading.Lock()

    def found(self, child: Child) -> Found:
        """What is known; the first child that asks finds it out, and those that ask meanwhile wait for it.

        Raises:
            ChildDied: before it could tell; the next one is asked then.
        """
        with self._lock:
            if self._found is None:
                child.send("find out", None)
                while (answer := child.answer(_TICK)) is None:
                    pass
                self._found = answer["instructions"]
            return self._found


_instructions = _Instructions()


@contextmanager
def work_folder(cache: CompileCache) -> Iterator[Path]:
    """A folder for compilers' files, gone afterwards: the cache's own; a temporary one where a command could not hold
    the cache's path, which torch does not quote."""
    with cache.workspace() as work:
        if _PLAIN.fullmatch(str(work)):
            yield work
            return
        with tempfile.TemporaryDirectory(prefix="accel_hidiff-", ignore_cleanup_errors=True) as folder:
            yield Path(folder)


class _Process:
    """One compiling process and its files."""

    def __init__(self, cache: CompileCache, niceness: int) -> None:
        self._cache = cache
        self._stack = ExitStack()
        try:
            work = self._stack.enter_context(work_folder(cache))
            self._child = Child("accel_hidiff.compiling.worker", [str(niceness)], work, _ONE_THREAD | _SAME_ORDER)
        except BaseException:
            self._stack.close()
            raise
        self.pid = self._child.pid
        self._blueprint = ""

    @property
    def alive(self) -> bool:
        """Whether it can be asked again."""
        return self._child.alive

    def fits(self, cache: CompileCache) -> bool:
        """Whether it works for this cache."""
        return cache is self._cache

    def ask(
        self, blueprint: Blueprint, job: CompileJob, exceeded: Callable[[_Process], tuple[str, str] | None]
    ) -> dict[str, Any]:
        """Has a job done; what the process answers, or how it ended."""
        try:
            if not self._blueprint:
                self._child.send("cache", self._cache.handover())
                self._child.send("instructions", _instructions.found(self._child))
            if self._blueprint != (digest := blueprint.digest()):
                self._child.send("blueprint", blueprint)
                self._blueprint = digest
            self._child.send("job", job)
            while (answer := self._child.answer(_TICK)) is None:
                if (why := exceeded(self)) is not None:
                    self.kill()
                    return dict(zip(("state", "error"), why, strict=True))
            return answer
        except ChildDied as death:
            return {"state": "died", "error": f"the compiling process {death}"}

    def memory(self) -> int:
        """Resident bytes of the process and its compilers."""
        total = 0
        with suppress(psutil.Error):
            process = psutil.Process(self.pid)
            for one in (process, *process.children(recursive=True)):
                with suppress(psutil.Error):
                    total += one.memory_info().rss
        return total

    def kill(self) -> None:
        """Ends the process and its compilers, now."""
        self._child.kill()

    def end(self) -> None:
        """Ends it, and clears its files away."""
        self._child.end()
        self._cache.clear_after(self.pid)
        self._stack.close()


_default: CompilePool | None = None
_default_lock = threading.Lock()


def default_pool() -> CompilePool:
    """The pool of this process for graphs that requests miss: one worker, lowest priority."""
    global _default  # noqa: PLW0603
    with _default_lock:
        if _default is None or _default._closed:
            _default = CompilePool()
            atexit.register(_default.close)
        return _default


def _forget_default() -> None:
    global _default, _default_lock, _instructions
    _default, _default_lock, _instructions = None, threading.Lock(), _Instructions()


os.register_at_fork(after_in_child=_forget_default)
