"""The process of one contestant: `python -m accel_hidiff.benching.worker`, started and fed by `turns`.

Frames come in on the standard input, JSON lines go out. It works only when asked, and ends with its parent.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from accel_hidiff.compiling.frames import Inbox, answers
from compile_cache.errors import one_line

if TYPE_CHECKING:
    from accel_hidiff.benching.contestant import Contestant


_ACTIONS: Final[dict[str, Callable[..., dict[str, Any]]]] = {
    "set up": lambda contestant, *value: contestant.set_up(*value),
    "turn": lambda contestant, *value: contestant.turn(*value),
    "memory": lambda contestant: contestant.memory(),
}


def serve(inbox: Inbox, out: IO[str]) -> None:
    """Does what frames ask for until the parent closes the pipe; a request that fails is answered with the reason."""
    contestant: Contestant | None = None
    while True:
        kind, value = inbox.next()
        try:
            if contestant is None:
                contestant, answer = _open(*value)
            else:
                answer = _ACTIONS[kind](contestant, *value)
        except Exception as problem:
            answer = {"failed": _line(problem), "refused": _refused(problem)}
        print(json.dumps(answer), file=out, flush=True)


def _open(options: Any, backend: str, work: Path) -> tuple[Contestant, dict[str, Any]]:
    from accel_hidiff.benching.contestant import Contestant
    from accel_hidiff.benching.facts import machine, versions

    contestant = Contestant(options, backend, work)
    cases = [vars(case) for case in contestant.cases()]
    return contestant, {"cases": cases, "model": contestant.facts, "machine": machine(), "versions": versions()}


def _line(problem: Exception) -> str:
    """One line; the name of an exception that this project does not raise on purpose comes first."""
    from accel_hidiff.errors import AccelHiDiffError
    from compile_cache import CompileCacheError

    lines = str(problem).strip().splitlines()
    first = one_line(lines[0], 300) if lines else ""
    if isinstance(problem, AccelHiDiffError | CompileCacheError):
        return first
    return f"{type(problem).__name__}: {first}" if first else type(problem).__name__


def _refused(problem: Exception) -> bool:
    """Whether the user's input is what is wrong."""
    from accel_hidiff.errors import BadInput
    from compile_cache import CacheLocationError

    return isinstance(problem, BadInput | CacheLocationError)


def main() -> None:
    """Entry point of the process."""
    out = answers()
    serve(Inbox(0), out)


if __name__ == "__main__":
    main()
