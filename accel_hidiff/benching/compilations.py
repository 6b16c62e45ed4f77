"""What Dynamo compiled in this process, by torch's own records, and where it gave up."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from typing import Any, Final

_KEPT: Final = 100_000  # records; torch keeps the last 64
_GAVE_UP: Final = "recompile_limit"  # in the line that Dynamo logs where a function runs eager from then on


@dataclass(frozen=True)
class Compilations:
    """Counts since the start of the process, or a difference of two.

    Attributes:
        graphs: captured.
        frames: functions that were compiled, again or for the first time.
        recompilations: of those, again, since a guard failed.
        graph_breaks: places where a function was cut.
        seconds: that all compilations took.
        gave_up: functions that run eager from now on, since the limit of recompilations was reached.
    """

    graphs: int = 0
    frames: int = 0
    recompilations: int = 0
    graph_breaks: int = 0
    seconds: float = 0.0
    gave_up: int = 0

    def __sub__(self, other: Compilations) -> Compilations:
        return Compilations(**{name: value - getattr(other, name) for name, value in vars(self).items()})


class _GivenUp(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += _GAVE_UP in record.getMessage()


_given_up = _GivenUp()


def watch() -> None:
    """Keeps all of torch's records from here on; call it before anything is compiled."""
    from torch._dynamo import utils

    utils.set_compilation_metrics_limit(_KEPT)
    logger = logging.getLogger("torch._dynamo")
    if _given_up not in logger.handlers:
        logger.addHandler(_given_up)


def compilations() -> Compilations:
    """What was compiled since `watch`."""
    utils: Any = sys.modules.get("torch._dynamo.utils")  # absent: nothing was traced
    if utils is None:
        return Compilations()
    records = [record for record in utils.get_compilation_metrics() if not getattr(record, "is_runtime", False)]
    compiled = [record for record in records if record.graph_op_count]
    return Compilations(
        graphs=int(utils.counters["stats"]["unique_graphs"]),
        frames=len(compiled),
        recompilations=sum(_again(record) for record in compiled),
        graph_breaks=sum(utils.counters["graph_break"].values()),
        seconds=sum(record.entire_frame_compile_time_s or 0.0 for record in records),
        gave_up=_given_up.count,
    )


def _again(record: Any) -> bool:
    """The id of a compilation is FRAME/HOW OFTEN, with an attempt behind it where it was begun anew."""
    return not str(record.compile_id).partition("/")[2].startswith("0")
