"""Facts of this machine and its software that native code depends on, as key factors."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from .errors import CompileCacheError
from .keys import JSON

_CPUINFO = Path("/proc/cpuinfo")
_CPU_NAMES = {  # factor -> names in /proc/cpuinfo: x86 first, then Arm
    "vendor": ("vendor_id", "CPU implementer"),
    "family": ("cpu family", "CPU architecture"),
    "model": ("model", "CPU part"),
}
_CPU_FLAGS = ("flags", "Features")

HOST_LEVELS: Final = ("x86-64-v2", "x86-64-v3", "x86-64-v4")
"""Instruction sets of a host, each with those before it (x86-64 psABI, "Micro-Architecture Levels")."""

_DEFAULT_LEVEL = "x86-64-v3"
_LEVEL_FLAGS = {  # level -> what it adds, by the names in /proc/cpuinfo
    "x86-64-v2": {"cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"},
    "x86-64-v3": {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"},
    "x86-64-v4": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
}


def environment_factors(device: str = "cpu") -> dict[str, JSON]:
    """Return the facts that code compiled here for ``device`` depends on, for use in a :class:`CacheKey`.

    For every device: machine, system, torch version and commit. For "cpu": C library, vendor, family, model and
    instruction set flags of the processor. For "cuda": see :func:`cuda_factors`; the device's architecture is asked
    for, and the instruction set is the default one, or the best that this machine has below it. A device index selects
    the device to ask and is not part of the result: devices of one architecture share artifacts.

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

    if kind == "cuda":
        return cuda_factors(_capability(torch, index), min(host_level(), _DEFAULT_LEVEL, key=_rank))
    return {**_common(torch, kind), "libc": _libc(), "cpu": parse_cpuinfo(_cpuinfo())}


def cuda_factors(architecture: str, host: str) -> dict[str, JSON]:
    """Return the facts that code depends on which the installed torch and Triton compile for a GPU, for a key.

    They are the same on the machine that compiles, which needs no GPU, and on the one that serves. The name of a device
    and the number of its multiprocessors are not among them: cubins run on every device of their architecture.

    Args:
        architecture: "sm_90" for compute capability 9.0.
        host: instruction set of the code that runs on the CPU, one of :data:`HOST_LEVELS` or a machine's name.

    Raises:
        CompileCacheError: the installed torch is built without CUDA.
        ImportError: torch is not installed.
    """
    import torch

    if torch.version.cuda is None:
        raise CompileCacheError(
            f"expected a CUDA build of torch, got {torch.__version__}; install one: keys of GPU code name its version"
        )
    versions: dict[str, JSON] = {"cuda": str(torch.version.cuda), "triton": _version("triton")}
    return {**_common(torch, "cuda"), **versions, "capability": architecture, "host": host}


def host_level(flags: Iterable[str] | None = None) -> str:
    """Return the highest of :data:`HOST_LEVELS` that a processor has; the machine's name where it has none of them.

    Args:
        flags: of the processor, as ``/proc/cpuinfo`` has them; None: this machine's.
    """
    have = set(parse_cpuinfo(_cpuinfo())["flags"]) if flags is None else set(flags)  # type: ignore[arg-type]
    found = platform.machine()
    for level in HOST_LEVELS:
        if not _LEVEL_FLAGS[level] <= have:
            break
        found = level
    return found


def _rank(level: str) -> int:
    return HOST_LEVELS.index(level) if level in HOST_LEVELS else -1


def _common(torch: Any, kind: str) -> dict[str, JSON]:
    return {
        "device": kind,
        "machine": platform.machine(),
        "system": platform.system(),
        "torch": str(torch.__version__),
        "torch_git": str(torch.version.git_version),
    }


def _libc() -> str:
    name, version = platform.libc_ver()  # of the running C library where the system can tell
    return f"{name} {version}".strip() or "unknown"


def _cpuinfo() -> str:
    return _CPUINFO.read_text("utf-8", "replace") if os.access(_CPUINFO, os.R_OK) else ""


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


def _capability(torch: Any, index: str) -> str:
    if not torch.cuda.is_available():
        raise CompileCacheError(
            "expected a CUDA device, got none; install a CUDA build of torch, or use the device cpu"
        )
    count = torch.cuda.device_count()
    if index and int(index) >= count:
        raise CompileCacheError(f"expected a CUDA device index under {count}, got {index}; use one that is there")
    properties = torch.cuda.get_device_properties(int(index) if index else torch.cuda.current_device())
    return f"sm_{properties.major}{properties.minor}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
