"""Backends: how one region graph becomes something that can be called.

All share the small protocol `Backend`; `create_backend` makes one by name.
"""

from __future__ import annotations

from accel_hidiff.backends.base import Backend, BoundRegion, Prepared
from accel_hidiff.compat import require_aot
from accel_hidiff.config import check_choice

BACKENDS = ("aot", "inductor", "eager")

__all__ = ["BACKENDS", "Backend", "BoundRegion", "Prepared", "create_backend"]


def create_backend(name: str) -> Backend:
    """The backend of this name; modules are imported when they are asked for.

    Raises:
        BadInput: an unknown name, or one that this torch is too old for.
    """
    check_choice("backend", name, BACKENDS)
    if name == "aot":
        require_aot()
        from accel_hidiff.backends.aot import AOTBackend

        return AOTBackend()
    if name == "inductor":
        from accel_hidiff.backends.inductor import InductorBackend

        return InductorBackend()
    from accel_hidiff.backends.eager import EagerBackend

    return EagerBackend()
