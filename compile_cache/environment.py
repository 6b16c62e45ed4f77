"""Facts of this machine and its software that native code depends on, as key factors."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from .errors import CompileCacheError
from .keys import JSON

_CPUINFO = Path("/proc/cpuinfo")
_CPU_NAMES = {  # factor -> names in /proc/cpuinfo: x86 first, then Arm
    "vendor": ("vendor_id", "CPU implementer"),
    "family": ("cpu family", "CPU architecture"),
    "model": ("model", "CPU part"),
}
_CPU_FLAGS = ("flags", "Features")


def environment_factors(device: str = "cpu") -> dict[str, JSON]:
    """Return the facts that code compiled here for ``device`` depends on, for use in a :class:`CacheKey`.

    For every device: machine, system, C library, torch version and commit. For "cpu": vendor, family, model and
    instruction set flags of the processor. For "cuda": CUDA and Triton versions, compute capability ("sm_90"), device
    name and number of multiprocessors. A device index selects the device to ask and is not part of the result:
    equal devices share artifacts.

    Needs no compiler, and starts CUDA only for a "cuda" device.

    Args:
        device: "cpu", "cuda" or "cuda:<index>".

    Raises:
        CompileCacheError: if the device is none of these, or is not there.
        ImportError: if torch is not installed.
    """
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        raise CompileCacheError(f"expected the device cpu, cuda or cuda:<index>, got {device!r}; pass one of these")
    import torch

    facts: dict[str, JSON] = {
        "device": kind,
        "machine": platform.machine(),
        "system": platform.system(),
        "libc": _libc(),
        "torch": str(torch.__version__),
        "torch_git": str(torch.version.git_version),
    }
    facts.update(_cpu() if kind == "cpu" else _cuda(torch, index))
    return facts


def _libc() -> str:
    name, version = platform.libc_ver()  # of the running C library where the system can tell
    return f"{name} {version}".strip() or "unknown"


def _cpu() -> dict[str, JSON]:
    return {"cpu": parse_cpuinfo(_CPUINFO.read_text("utf-8", "replace") if os.access(_CPUINFO, os.R_OK) else "")}


def parse_cpuinfo(text: str) -> dict[str, JSON]:
    """Return vendor, family, model and sorted flags of the first processor in the text of ``/proc/cpuinfo``.

    Where the text names none of these, ``platform.processor()`` stands in for the model.
    """
    first: dict[str, str] = {}
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        if colon:
            first.setdefault(name.strip(), value.strip())
    facts: dict[str, JSON] = {
        fact: next((first[name] for name in names if name in first), None) for fact, names in _CPU_NAMES.items()
    }
    if facts["model"] is None:
        facts["model"] = platform.processor() or "unknown"
    flags = next((first[name] for name in _CPU_FLAGS if name in first), "")
    facts["flags"] = list[JSON](sorted(set(flags.split())))
    return facts


def _cuda(torch: Any, index: str) -> dict[str, JSON]:
    if not torch.cuda.is_available():
        raise CompileCacheError(
            "expected a CUDA device, got none; install a CUDA build of torch, or use the device cpu"
        )
    count = torch.cuda.device_count()
    if index and int(index) >= count:
        raise CompileCacheError(f"expected a CUDA device index under {count}, got {index}; use one that is there")
    properties = torch.cuda.get_device_properties(int(index) if index else torch.cuda.current_device())
    return {
        "cuda": str(torch.version.cuda),
        "triton": _version("triton"),
        "capability": f"sm_{properties.major}{properties.minor}",
        "device_name": str(properties.name),
        "multiprocessors": int(properties.multi_processor_count),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
