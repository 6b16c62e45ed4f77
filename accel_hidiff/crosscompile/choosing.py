"""Which configuration of a Triton kernel is taken where none can be timed.

Inductor offers several for each kernel (block sizes, warps, stages) and would run them on the device. Here they are all
compiled, and what the assembler says of each decides, by this rule:

1. None that needs more shared memory than a block may have.
2. The fewest spilled words, where up to `FEW_SPILLS` count as none.
3. Enough warps resident on a multiprocessor to hide the latency of memory: half of what it can hold, or of what the
   best configuration reaches. More than that gains little for kernels that wait for memory (V. Volkov, "Better
   Performance at Lower Occupancy", GTC 2010), and these all do.
4. Inductor's own order: its first choice comes from the shape of the kernel.

What each candidate needs is kept in the notes of the artifact, so that the rule can be judged, and its choice bettered
(`accel-hidiff tune`), on a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from accel_hidiff.target import Limits

FEW_SPILLS: Final = 16  # words (4 bytes) of a thread
_WARP: Final = 32
_REGISTERS_AT_ONCE: Final = 256  # of a warp: they are given out in such steps
_SHARED_RESERVED: Final = 1024  # bytes of a block that the system takes, from sm_80 on


@dataclass(frozen=True)
class Candidate:
    """One configuration of a kernel, as it was compiled.

    Attributes:
        config: block sizes and options, as text.
        warps: of a block.
        registers: of a thread.
        spilled: words of a thread that did not fit into registers.
        shared: bytes of shared memory of a block.
    """

    config: str
    warps: int
    registers: int
    spilled: int
    shared: int

    def resident_warps(self, limits: Limits) -> int:
        """Warps that a multiprocessor holds at once (CUDA C++ Programming Guide, "Hardware Multithreading")."""
        per_warp = -(-max(self.registers, 1) * _WARP // _REGISTERS_AT_ONCE) * _REGISTERS_AT_ONCE
        blocks = min(
            limits.registers_per_multiprocessor // per_warp // self.warps,
            limits.shared_per_multiprocessor // (self.shared + _SHARED_RESERVED),
            limits.threads_per_multiprocessor // (_WARP * self.warps),
            limits.blocks_per_multiprocessor,
        )
        return blocks * self.warps

    def occupancy(self, limits: Limits) -> float:
        """Share, 0..1, of the warps that a multiprocessor can hold."""
        return round(self.resident_warps(limits) * _WARP / limits.threads_per_multiprocessor, 3)


@dataclass(frozen=True)
class Choice:
    """What was taken for a kernel, and from what.

    Attributes:
        kernel: its name.
        taken: index into `candidates`.
        candidates: in Inductor's order.
    """

    kernel: str
    taken: int
    candidates: tuple[Candidate, ...]

    def to_json(self, limits: Limits) -> dict[str, Any]:
        """A plain JSON mapping, with the occupancy that the rule saw."""
        rows = [{**asdict(one), "occupancy": one.occupancy(limits)} for one in self.candidates]
        return {"kernel": self.kernel, "taken": self.taken, "candidates": rows}


def choose(kernel: str, candidates: Sequence[Candidate], limits: Limits) -> Choice:
    """Takes a configuration by the rule above.

    Raises:
        ValueError: none of them fits into a block's shared memory.
    """
    fitting = [index for index, one in enumerate(candidates) if one.shared <= limits.shared_per_block]
    if not fitting:
        least = min((one.shared for one in candidates), default=0)
        raise ValueError(
            f"{kernel}: expected a configuration within {limits.shared_per_block} bytes of shared memory, "
            f"the smallest needs {least}"
        )
    spills = {index: max(candidates[index].spilled - FEW_SPILLS, 0) for index in fitting}
    calm = [index for index in fitting if spills[index] == min(spills.values())]
    warps = {index: candidates[index].resident_warps(limits) for index in calm}
    half = limits.threads_per_multiprocessor // _WARP / 2
    enough = min(half, max(warps.values()) / 2)
    return Choice(kernel, next(index for index in calm if warps[index] >= enough), tuple(candidates))
