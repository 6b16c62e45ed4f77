"""Facts of a device and what is done to it: index, memory, which one is current, why something failed there."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch

from accel_hidiff.failures import FailureFacts, Fault, judge_failure

# Held while this process captures on a device: what waits for a whole device, on any thread, would break the capture.
CAPTURE: Final = threading.RLock()

_refused: dict[int, int] = {}  # by device index: what torch's allocator had refused at the last failure there


def device_index(device: torch.device) -> int:
    """The index that torch's loader of packages takes; -1 for the CPU."""
    return -1 if device.type == "cpu" else (torch.cuda.current_device() if device.index is None else device.index)


@contextmanager
def current_device(
    index: int, get: Callable[[], int] | None = None, put: Callable[[int], None] | None = None
) -> Iterator[None]:
    """Device `index` is the current one inside of the block; afterwards it is the one before, whatever the block made
    current. Loading a package does so (`cudaSetDevice`), and a call runs on the stream of the current device.

    Args:
        index: of a CUDA device.
        get, put: tell and change the current device; None: those of torch.
    """
    get, put = get or torch.cuda.current_device, put or torch.cuda.set_device
    before = get()
    if before != index:
        put(index)
    try:
        yield
    finally:
        if get() != before:
            put(before)


@contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """A CUDA device is the current one inside of the block, and the one before afterwards; nothing for the CPU."""
    if device.type != "cuda":
        yield
        return
    with current_device(device_index(device)):
        yield


def has_siblings(device: torch.device) -> bool:
    """Whether another device than this one may be the current one."""
    return device.type == "cuda" and torch.cuda.device_count() > 1


def wait_for(device: torch.device) -> None:
    """Waits until a device has done what it was given."""
    if device.type == "cuda":
        with CAPTURE:
            torch.cuda.synchronize(device)


def is_capturing(device: torch.device) -> bool:
    """Whether what this thread gives a device goes into a CUDA graph now."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def release_memory(device: torch.device) -> None:
    """Gives back what nobody uses: tensors in reference cycles, and the blocks that torch's allocator keeps."""
    gc.collect()
    if device.type == "cuda":
        with CAPTURE, on_device(device):
            torch.cuda.empty_cache()


def fault_of(error: BaseException, device: torch.device) -> Fault:
    """Whose fault an error is that work on a device raised."""
    return judge_failure(failure_facts(error, device))


def failure_facts(error: BaseException, device: torch.device) -> FailureFacts:
    """What `judge_failure` looks at. Waits for the device, and frees what its allocator keeps."""
    chain = _chain(error)
    kinds = tuple(dict.fromkeys(kind.__name__ for one in chain for kind in type(one).__mro__))
    code = next((number for one in chain if isinstance(number := getattr(one, "error_code", None), int)), None)
    told: dict[str, Any] = _told_by_cuda(device) if device.type == "cuda" else {}
    return FailureFacts(kinds, "\n".join(str(one) for one in chain), code, **told)


def _told_by_cuda(device: torch.device) -> dict[str, Any]:
    try:
        wait_for(device)
        release_memory(device)
        free, total = torch.cuda.mem_get_info(device)
        refused = int(torch.cuda.memory_stats(device).get("num_ooms", 0))
    except RuntimeError as problem:
        return {"probe": str(problem) or type(problem).__name__}
    index = device_index(device)
    since, _refused[index] = refused - _refused.get(index, 0), refused
    return {"free": free, "total": total, "refused": since}


def _chain(error: BaseException) -> list[BaseException]:
    """An error, what it was raised from, and so on."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__
    return chain
