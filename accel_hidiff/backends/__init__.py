"""Backends: how one region graph becomes something that can be called.

All share the small protocol `Backend`; `create_backend` makes one by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from accel_hidiff.backends.base import Backend, BoundRegion, Prepared
from accel_hidiff.compat import dynamo_traces_regions, require_aot
from accel_hidiff.config import OneDiffConfig, check_choice
from accel_hidiff.errors import BadInput
from accel_hidiff.target import Target

if TYPE_CHECKING:
    from accel_hidiff.crosscompile.session import Session

BACKENDS = ("aot", "inductor", "onediff", "eager")
VARIANTS = ("tuned",)

__all__ = ["BACKENDS", "Backend", "BoundRegion", "Prepared", "create_backend"]


def create_backend(
    spec: str | OneDiffConfig,
    target: Target | None = None,
    session: Session | None = None,
    variant: str | None = None,
) -> Backend:
    """The backend of this name, or of this configuration; modules are imported when they are asked for.

    Args:
        spec: a name, or onediff's configuration.
        target: what GPU code is for, for "aot"; None: the device that a graph is on.
        session: compiles for the target in this process, without such a device.
        variant: "tuned", for "aot": artifacts that were tuned on this device come first.

    Raises:
        BadInput: an unknown name, one that this torch is too old for or that has no targets, or onediff does not work
            in this environment.
    """
    if variant is not None:
        check_choice("variant", variant, VARIANTS)
        if spec != "aot":
            raise BadInput(f'variant: expected it with backend "aot" alone, got {spec!r}; that one keeps none')
    if target is not None and spec != "aot":
        raise BadInput(f'target: expected it with backend "aot" alone, got {spec!r}; that one compiles where it runs')
    if spec == "onediff":
        spec = OneDiffConfig()
    if isinstance(spec, OneDiffConfig):
        return _onediff(spec)
    check_choice("backend", spec, BACKENDS)
    if spec == "aot":
        require_aot()
        from accel_hidiff.backends.aot import AOTBackend

        return AOTBackend(target, session, variant)
    if spec == "inductor":
        from accel_hidiff.backends.inductor import InductorBackend
        from accel_hidiff.backends.inductor_exact import ExactInductorBackend

        return InductorBackend() if dynamo_traces_regions() else ExactInductorBackend()
    from accel_hidiff.backends.eager import EagerBackend

    return EagerBackend()


def _onediff(config: OneDiffConfig) -> Backend:
    from accel_hidiff.availability.onediff import try_compiler

    found = []
    for compiler in config.compilers:
        found.append(try_compiler(compiler, config.mode, config.options))
        if found[-1].usable:
            break
    else:
        told = "; ".join(map(str, found))
        raise BadInput(
            f"backend: expected one that works here, got {told}; `accel-hidiff doctor` tells which others do"
        )
    if found[-1].compiler == "nexfort":
        from accel_hidiff.backends.nexfort import NexfortBackend

        return NexfortBackend(config)
    from accel_hidiff.backends.oneflow import OneflowBackend

    return OneflowBackend(config)
