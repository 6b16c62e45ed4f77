"""accel_hidiff: HiDiffusion on diffusers UNets, compiled ahead of time and served without compilation.

Importing this package imports no torch; each public name loads its module at first use.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "HiDiffusionConfig": "config",
    "CFGPlusPlusConfig": "config",
    "OneDiffConfig": "config",
    "DecodeConfig": "config",
    "Topology": "topology",
    "Phase": "schedule",
    "PhasePlan": "schedule",
    "Patch": "patching",
    "apply_hidiffusion": "patching",
    "remove_hidiffusion": "patching",
    "suggest_size": "sizes",
    "CFGPlusPlusGuidance": "cfgpp.guider",
    "apply_cfgpp": "cfgpp.guidance",
    "remove_cfgpp": "cfgpp.guidance",
    "equivalent_cfg_scale": "cfgpp.maths",
    "invert": "cfgpp.inversion",
    "Inversion": "cfgpp.inversion",
    "accelerate": "pipeline",
    "Handle": "pipeline",
    "replica": "replicas",
    "LoadReport": "warming",
    "CompilePool": "compiling.pool",
    "SizeWarning": "errors",
    "AccelHiDiffError": "errors",
    "BadInput": "errors",
    "UnknownLayout": "errors",
    "NotAPipeline": "errors",
    "PatchConflict": "errors",
    "NoPhase": "errors",
    "PipelineBusy": "errors",
    "GraphMiss": "errors",
    "CompileFailed": "errors",
    "OutOfMemory": "errors",
    "DeviceLost": "errors",
}
_MODULES = ("schedulers",)
__all__ = ["__version__", *sorted((*_HOME, *_MODULES))]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"accel_hidiff.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'accel_hidiff' has no attribute {name!r}")
    return getattr(importlib.import_module(f"accel_hidiff.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_MODULES})
