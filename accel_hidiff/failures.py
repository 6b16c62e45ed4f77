"""What a failure of a compiled call is the fault of. Plain Python: facts come in, a verdict goes out.

Facts are collected elsewhere (`device.failure_facts`), so that CUDA's cases are decided, and tested, on any machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final


class Fault(Enum):
    """Whose fault a failure is, and so what is to stop: an artifact, a request, or everything on the device."""

    ARTIFACT = "artifact"
    MEMORY = "memory"
    DEVICE = "device"


@dataclass(frozen=True, slots=True)
class FailureFacts:
    """Everything about one failure that decides whose fault it is.

    Attributes:
        kinds: class names of the error, of its bases and of its causes.
        text: what they say.
        code: CUDA's number of the error, None where it has none.
        probe: what the device said when it was waited for afterwards; "" where it answers, and for the CPU.
        free, total: bytes of device memory, with torch's unused blocks given back; None where they are not known.
        refused: allocations that torch's allocator has refused on this device since the last failure there.
    """

    kinds: tuple[str, ...]
    text: str
    code: int | None = None
    probe: str = ""
    free: int | None = None
    total: int | None = None
    refused: int = 0


# After these, every further call of CUDA in the process fails, on that device (CUDA's runtime API, error handling).
_LOST_CODES: Final = frozenset({214, 220, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719})
_LOST: Final = (
    "uncorrectable ecc error",
    "uncorrectable nvlink error",
    "illegal memory access",
    "launch timed out and was terminated",
    "context is destroyed",
    "device-side assert triggered",  # every CUDA error mentions "device-side assertions", in a hint
    "hardware stack error",
    "illegal instruction was encountered",
    "misaligned address",
    "operation not supported on global/shared address space",
    "invalid program counter",
    "unspecified launch failure",
)
_MEMORY_KINDS: Final = frozenset({"OutOfMemoryError", "MemoryError"})
_MEMORY: Final = ("out of memory", "allocate memory", "not enough memory", "status_alloc_failed", "bad_alloc")
_SILENT: Final = "api call failed at"  # a package's error, mostly without its reason, which went to stderr
_ALLOCATION: Final = "aoti_torch_empty_strided("  # the function that failed, where it is told
_LOW: Final = 1 / 16  # of the memory


def judge_failure(facts: FailureFacts) -> Fault:
    """Whose fault a failure is.

    >>> judge_failure(FailureFacts(("RuntimeError",), "CUDA error: an illegal memory access was encountered"))
    <Fault.DEVICE: 'device'>
    """
    said, probe = facts.text.lower(), facts.probe.lower()
    if facts.code in _LOST_CODES or any(words in said or words in probe for words in _LOST):
        return Fault.DEVICE
    if probe and not any(words in probe for words in _MEMORY):
        return Fault.DEVICE
    if _MEMORY_KINDS.intersection(facts.kinds) or any(words in said or words in probe for words in _MEMORY):
        return Fault.MEMORY
    if _SILENT in said and (_ALLOCATION in said or facts.refused > 0 or _is_low(facts)):
        return Fault.MEMORY
    return Fault.ARTIFACT


def _is_low(facts: FailureFacts) -> bool:
    return facts.free is not None and facts.total is not None and facts.free < _LOW * facts.total
