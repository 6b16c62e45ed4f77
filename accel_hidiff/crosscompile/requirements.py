"""What compiling for a target needs of this machine: facts are collected in one function, and judged in another.

A driver and a GPU are not among them.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
from dataclasses import dataclass
from importlib import metadata
from typing import Final

from packaging.version import InvalidVersion, Version

from accel_hidiff.crosscompile.toolkit import cuda_home
from accel_hidiff.errors import BadInput
from accel_hidiff.target import Target

# (torch, Triton) for which the stand-ins are tested. Others may compile, and be wrong without an error.
TESTED: Final = (("2.11.0", "3.6.0"), ("2.15.0", "3.9.0"))
_INSTALL: Final = "pip install accel-hidiff[cuda-build]"


@dataclass(frozen=True)
class Machine:
    """What is here.

    Attributes:
        machine: "x86_64" and the like.
        torch, cuda: torch's version, and that of the CUDA that it is built with; None: none.
        triton: its version; None: not installed.
        headers: why NVIDIA's headers cannot be used; "" where they can.
        compiler: the C++ compiler's command; "": none.
    """

    machine: str
    torch: str | None
    cuda: str | None
    triton: str | None
    headers: str
    compiler: str


@dataclass(frozen=True)
class Requirement:
    """One thing that is needed: whether it is here, and what to do where it is not."""

    part: str
    met: bool
    detail: str


def look() -> Machine:
    """The facts of this machine. Starts no CUDA."""
    cuda = None
    if (torch_version := _version("torch")) is not None:
        import torch

        cuda = torch.version.cuda
    try:
        cuda_home()
        headers = ""
    except BadInput as missing:
        headers = str(missing)
    command = shlex.split(os.environ.get("CXX", "g++"))[0]
    compiler = command if shutil.which(command) else ""
    return Machine(platform.machine(), torch_version, cuda, _version("triton"), headers, compiler)


def judge(target: Target, here: Machine) -> list[Requirement]:
    """What compiling for a target needs, in the order in which to mend it."""
    pair = (_base(here.torch), _base(here.triton))
    known = ", ".join(f"torch {torch} with Triton {triton}" for torch, triton in TESTED)
    wanted = (_base(target.torch), _base(target.triton))
    host = "x86_64" if target.host.startswith("x86-64") else target.host
    installed, asked = (" and ".join(map(str, versions)) for versions in (pair, wanted))
    judged = (
        ("machine", here.machine == host, here.machine, f"expected {host}: the host's code is not translated"),
        ("torch", here.cuda is not None, f"{here.torch}, CUDA {here.cuda}", f"{here.torch} has no CUDA; {_INSTALL}"),
        ("triton", here.triton is not None, str(here.triton), f"not installed; {_INSTALL}"),
        ("versions", pair in TESTED, installed, f"expected {known}, got {installed}; {_INSTALL}"),
        ("target's versions", pair == wanted, "as installed", f"expected {asked} to be installed, got {installed}"),
        ("CUDA headers", not here.headers, "found", here.headers),
        ("C++ compiler", bool(here.compiler), here.compiler, "none on PATH; on Debian: apt-get install g++"),
    )
    return [Requirement(part, met, found if met else otherwise) for part, met, found, otherwise in judged]


def require(target: Target) -> None:
    """BadInput with the first thing that is missing here for a target."""
    for requirement in judge(target, look()):
        if not requirement.met:
            raise BadInput(f"target {target}: {requirement.part}: {requirement.detail}")


def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def _base(version: str | None) -> str:
    try:
        return Version(version or "none").base_version
    except InvalidVersion:
        return "none"
