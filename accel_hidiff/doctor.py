"""What of accel_hidiff is usable on this machine, and for each part that is not, why."""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.version import Version

from accel_hidiff import compat
from accel_hidiff.availability.onediff import try_compiler
from accel_hidiff.config import ONEDIFF_COMPILERS


@dataclass(frozen=True)
class Finding:
    """One part: whether it is usable here, what was found, and what to do where it is not."""

    part: str
    usable: bool
    detail: str

    def to_json(self) -> dict[str, Any]:
        """A plain JSON mapping."""
        return asdict(self)


def examine() -> list[Finding]:
    """Looks at libraries, the compiler, devices and backends. Imports no optional compiler into this process."""
    torch = _torch()
    return [
        Finding("python", True, platform.python_version()),
        torch,
        _library("diffusers"),
        _compiler(),
        Finding("device cpu", True, f"{platform.machine()}, {os.cpu_count()} cores"),
        _gpu(),
        examine_backend("eager"),
        _aot_serving(),
        examine_backend("aot"),
        examine_backend("inductor"),
        examine_backend("onediff"),
    ]


def examine_target(name: str) -> list[Finding]:
    """What compiling for a GPU needs here, one by one; no GPU is among it.

    Args:
        name: of a target, "sm_90" and the like.

    Raises:
        BadInput: there is no such target.
    """
    from accel_hidiff.crosscompile.requirements import judge, look
    from accel_hidiff.target import Target

    here = look()
    target = Target.parse(name, torch=here.torch or "none", triton=here.triton or "none")
    judged = judge(target, here)
    usable = all(requirement.met for requirement in judged)
    what = f"{target.profile.torch_name} ({target.architecture}) in a host with {target.host}, compiled on this machine"
    findings = [Finding(requirement.part, requirement.met, requirement.detail) for requirement in judged]
    return [*findings, Finding(f"target {target}", usable, what if usable else "see above")]


def examine_backend(name: str) -> Finding:
    """Whether a backend can compile and run here, and why not.

    Args:
        name: "eager", "inductor", "aot" or "onediff".
    """
    torch = _torch()
    if name == "eager":
        return Finding("backend eager", torch.usable, "the reference" if torch.usable else torch.detail)
    if name == "onediff":
        return _onediff()
    compiler = _compiler()
    part = f"backend {name}, compiling" if name == "aot" else f"backend {name}"
    if name == "aot" and torch.usable and (missing := compat.missing_for_aot()):
        return Finding(part, False, missing)
    if not (torch.usable and compiler.usable):
        return Finding(part, False, f"cannot compile: {compiler.detail if torch.usable else torch.detail}")
    return Finding(part, True, compiles_for(_compilers()) if name == "aot" else "torch.compile")


@dataclass(frozen=True)
class Compilers:
    """What decides what AOTInductor can compile for here.

    Attributes:
        cuda: of torch's build; None: it has none.
        gpus: names of the devices.
        elsewhere: why nothing can be compiled for a GPU that is not here; "" where it can.
    """

    cuda: str | None
    gpus: tuple[str, ...]
    elsewhere: str


def compiles_for(found: Compilers) -> str:
    """What can be compiled for, in words.

    >>> compiles_for(Compilers(None, (), "torch: no CUDA"))
    'compiles for this CPU'
    >>> compiles_for(Compilers("13.0", (), ""))
    'compiles for this CPU, and with --target for GPUs that are not here'
    """
    if found.cuda is None:
        return "compiles for this CPU"
    here = " and ".join(["this CPU", *found.gpus])
    if found.elsewhere:
        return f"compiles for {here}; not for GPUs that are not here: {found.elsewhere} (doctor --target sm_90)"
    return f"compiles for {here}, and with --target for GPUs that are not here"


def _compilers() -> Compilers:
    import torch

    from accel_hidiff.crosscompile.requirements import judge, look
    from accel_hidiff.target import Target

    here = look()
    target = Target.parse("sm_90", torch=here.torch or "none", triton=here.triton or "none")
    missing = [f"{each.part}: {each.detail}" for each in judge(target, here) if not each.met]
    gpus = tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    return Compilers(torch.version.cuda, gpus if torch.cuda.is_available() else (), missing[0] if missing else "")


def _aot_serving() -> Finding:
    torch = _torch()
    reason = compat.missing_for_aot() if torch.usable else torch.detail
    return Finding("backend aot, serving", not reason, reason or "loads and runs cached artifacts")


def _library(name: str) -> Finding:
    try:
        return Finding(name, True, metadata.version(name))
    except metadata.PackageNotFoundError:
        return Finding(name, False, f"not installed: pip install {name}")


def _torch() -> Finding:
    found = _library("torch")
    if not found.usable:
        return found
    low, high = (Version(text) for text in compat.TORCH)
    if not low <= compat.torch_version() < high:
        return Finding("torch", False, f"expected {low} to below {high}, got {found.detail}; install a tested torch")
    return found


def _compiler() -> Finding:
    command = shlex.split(os.environ.get("CXX", "g++"))
    path = shutil.which(command[0])
    if path is None:
        return Finding(
            "C++ compiler", False, f"expected {command[0]} on PATH, found none; on Debian: apt-get install g++"
        )
    with tempfile.TemporaryDirectory() as directory:
        source, library = Path(directory) / "probe.cpp", Path(directory) / "probe.so"
        source.write_text('#include <vector>\nextern "C" int probe() { return (int)std::vector<int>(3).size(); }\n')
        build = [*command, "-shared", "-fPIC", "-fopenmp", "-o", str(library), str(source)]
        try:
            done = subprocess.run(build, capture_output=True, text=True, timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired) as problem:
            return Finding("C++ compiler", False, f"{command[0]} does not run: {problem}")
    if done.returncode:
        line = (done.stderr.strip().splitlines() or ["no message"])[0]
        return Finding("C++ compiler", False, f"{command[0]} cannot build a shared library with OpenMP: {line}")
    version = subprocess.run([*command, "-dumpfullversion"], capture_output=True, text=True, check=False).stdout.strip()
    return Finding("C++ compiler", True, f"{command[0]} {version}")


def _gpu() -> Finding:
    if importlib.util.find_spec("torch") is None:
        return Finding("device cuda", False, "torch is not installed")
    import torch

    if torch.version.cuda is None:
        return Finding("device cuda", False, f"torch {torch.__version__} is built without CUDA; install a CUDA build")
    if not torch.cuda.is_available():
        return Finding("device cuda", False, "torch finds no GPU: no device, or no driver that fits its CUDA")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    triton = _library("triton")
    return Finding("device cuda", triton.usable, f"{', '.join(names)}; triton {triton.detail}")


def _onediff() -> Finding:
    found = [try_compiler(compiler, anew=True) for compiler in ONEDIFF_COMPILERS]
    return Finding("backend onediff", any(each.usable for each in found), "; ".join(map(str, found)))
