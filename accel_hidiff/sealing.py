"""`torch.compile` switched off for the whole process, for as long as anybody asks for it."""

from __future__ import annotations

import threading

from accel_hidiff import compat

_lock = threading.Lock()
_held = 0


def hold() -> None:
    """From now on `torch.compile` raises where it would compile (torch before 2.6 cannot: nothing changes there)."""
    global _held  # noqa: PLW0603
    with _lock:
        _held += 1
        compat.set_stance("fail_on_recompile")


def release() -> None:
    """Takes one `hold` back; with the last one, `torch.compile` compiles again."""
    global _held  # noqa: PLW0603
    with _lock:
        _held -= 1
        if not _held:
            compat.set_stance("default")
