"""What figures depend on: the machine and the versions."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, Any]:
    """Processor, cores, torch's threads, system and, where there is one, the GPU."""
    facts: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}",
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["gpu_capability"] = list(torch.cuda.get_device_capability())
    return facts


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter."""
    import accel_hidiff

    facts = {"python": platform.python_version(), "torch": torch.__version__}
    facts["diffusers"] = metadata.version("diffusers")
    if torch.version.cuda:
        facts["cuda"] = torch.version.cuda
    return {**facts, "accel_hidiff": accel_hidiff.__version__}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    facts = {name.strip(): value.strip() for name, value in pairs}
    model = ", ".join(f"{name} {facts[name]}" for name in ("cpu family", "model", "stepping") if name in facts)
    return f"{facts.get('model name', platform.machine())} ({model})" if model else platform.machine()
