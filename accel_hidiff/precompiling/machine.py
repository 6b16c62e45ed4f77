"""How many graphs a machine can compile at once, and with how much memory each. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from accel_hidiff.errors import BadInput

WORKER_MEMORY: Final = 4 << 30  # bytes that a compiling process of SDXL's blocks, with its C++ compiler, stays below
_CGROUP: Final = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Machine:
    """What this process may use.

    Attributes:
        cores: processors, a container's share rounded up.
        memory: bytes, a container's limit counted.
    """

    cores: int
    memory: int


@dataclass(frozen=True)
class Workers:
    """Compiling processes.

    Attributes:
        jobs: how many at once.
        max_memory: bytes that each may take.
    """

    jobs: int
    max_memory: int


def this_machine() -> Machine:
    """The machine, or the container, that this process runs in."""
    cores, memory = len(os.sched_getaffinity(0)), psutil.virtual_memory().total
    for limit in _limits("memory.max", "memory/memory.limit_in_bytes"):
        memory = min(memory, limit[0])
    for limit in _limits("cpu.max"):
        if len(limit) == 2 and limit[1] > 0:
            cores = min(cores, -(-limit[0] // limit[1]))
    return Machine(max(cores, 1), memory)


def workers(machine: Machine, jobs: int | None, max_memory: int | None) -> Workers:
    """How many compiling processes, and how large they may become.

    Args:
        machine: where they run.
        jobs: how many; None: one for each core, but no more than have 4 GiB each.
        max_memory: bytes of each; None: an equal share of the machine's memory.

    Raises:
        BadInput: no job, or more than 64 to a core.

    >>> workers(Machine(cores=8, memory=16 << 30), None, None)
    Workers(jobs=4, max_memory=4294967296)
    """
    if jobs is not None and not 1 <= jobs <= 64 * machine.cores:
        raise BadInput(f"--jobs: expected 1 to {64 * machine.cores} processes on {machine.cores} cores, got {jobs}")
    share = WORKER_MEMORY if max_memory is None else max_memory
    chosen = jobs if jobs is not None else max(1, min(machine.cores, machine.memory // share))
    return Workers(chosen, machine.memory // chosen if max_memory is None else max_memory)


def _limits(*names: str) -> Iterator[list[int]]:
    """The numbers in these files of the container's control group; nothing where there is no limit."""
    for name in names:
        with suppress(OSError, ValueError):
            yield [int(word) for word in (_CGROUP / name).read_text().split()]
