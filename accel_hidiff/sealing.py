"""`torch.compile` switched off for the whole process, for as long as anybody asks for it."""

from __future__ import annotations

import threading

import torch

_lock = threading.Lock()
_held = 0


def hold() -> None:
    """From now on `torch.compile` raises where it would compile."""
    global _held  # noqa: PLW0603
    with _lock:
        _held += 1
        torch.compiler.set_stance("fail_on_recompile")


def release() -> None:
    """Takes one `hold` back; with the last one, `torch.compile` compiles again."""
    global _held  # noqa: PLW0603
    with _lock:
        _held -= 1
        if not _held:
            torch.compiler.set_stance("default")
