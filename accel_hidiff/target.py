"""What an artifact will run on: a GPU's architecture and profile, the host's instruction set, torch and Triton.

Plain Python. A `Target` is told (`--target sm_90`, where no GPU is needed) or looked up on a device; both give the same
key, so that what one machine compiled another one finds. The key holds what the code depends on to be right: the
architecture (its cubins run there and nowhere else), the host's instruction set, and the libraries that it is linked
against. A profile (how many multiprocessors, how much shared memory) steers how fast it is, and is noted beside it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from typing import Any, Final, Self

from accel_hidiff.errors import BadInput
from compile_cache.environment import HOST_LEVELS, cuda_factors

KIB: Final = 1024
DEFAULT_HOST: Final = "x86-64-v3"


@dataclass(frozen=True)
class DeviceProfile:
    """A GPU as compilers see it.

    Attributes:
        name: as users know it; `torch_name` is what the driver calls it.
        architecture: "sm_90": compute capability 9.0.
        multiprocessors: on the device.
        l2_bytes, memory_bytes: of its cache, and of its memory.
        source: where these numbers are from.
    """

    name: str
    torch_name: str
    architecture: str
    multiprocessors: int
    l2_bytes: int
    memory_bytes: int
    source: str

    @property
    def capability(self) -> tuple[int, int]:
        """(9, 0) for "sm_90"."""
        digits = self.architecture.removeprefix("sm_")
        return int(digits[:-1]), int(digits[-1])

    @property
    def limits(self) -> Limits:
        """What its architecture allows."""
        return LIMITS[self.architecture]


@dataclass(frozen=True)
class Limits:
    """What an architecture allows (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability").

    Attributes:
        shared_per_block: bytes of shared memory that one block may ask for.
        shared_per_multiprocessor: bytes that a multiprocessor has for all its blocks.
        threads_per_multiprocessor, blocks_per_multiprocessor: resident at once.
    """

    shared_per_block: int
    shared_per_multiprocessor: int
    threads_per_multiprocessor: int
    blocks_per_multiprocessor: int
    registers_per_multiprocessor: int = 64 * KIB


LIMITS: Final = {
    "sm_80": Limits(163 * KIB, 164 * KIB, 2048, 32),
    "sm_89": Limits(99 * KIB, 100 * KIB, 1536, 24),
    "sm_90": Limits(227 * KIB, 228 * KIB, 2048, 32),
    "sm_100": Limits(227 * KIB, 228 * KIB, 2048, 32),
}

_MIB, _GB = KIB * KIB, 10**9
PROFILES: Final = {
    profile.name: profile
    for profile in (
        DeviceProfile("a100", "NVIDIA A100-SXM4-80GB", "sm_80", 108, 40 * _MIB, 80 * _GB, "NVIDIA A100 whitepaper"),
        DeviceProfile("l4", "NVIDIA L4", "sm_89", 58, 48 * _MIB, 24 * _GB, "NVIDIA L4 datasheet; Ada whitepaper"),
        DeviceProfile("l40s", "NVIDIA L40S", "sm_89", 142, 96 * _MIB, 48 * _GB, "NVIDIA L40S datasheet"),
        DeviceProfile("rtx4090", "NVIDIA GeForce RTX 4090", "sm_89", 128, 72 * _MIB, 24 * _GB, "NVIDIA Ada whitepaper"),
        DeviceProfile("h100", "NVIDIA H100 80GB HBM3", "sm_90", 132, 50 * _MIB, 80 * _GB, "NVIDIA H100 whitepaper"),
        DeviceProfile("h200", "NVIDIA H200", "sm_90", 132, 60 * _MIB, 150 * _GB, "its driver, 580.159.04"),
        DeviceProfile("b200", "NVIDIA B200", "sm_100", 148, 126 * _MIB, 180 * _GB, "NVIDIA Blackwell tuning guide"),
    )
}
HOST_LIBRARIES: Final = {"GLIBC": "2.34", "GLIBCXX": "3.4.30"}
"""The newest symbol versions that a package may need: what every system has that torch's CUDA images are based on
(Ubuntu 22.04, Debian 12, RHEL 9 with its toolset)."""

_USUAL: Final = {"sm_80": "a100", "sm_89": "l40s", "sm_90": "h100", "sm_100": "b200"}  # of an architecture


@dataclass(frozen=True)
class Target:
    """What artifacts are compiled for.

    Attributes:
        profile: of the GPU.
        host: instruction set of the machine that it is in: "x86-64-v3" (AVX2) and the like, or another machine's name.
        torch, triton: versions that the artifact is compiled with, and needs.

    >>> Target.parse("sm_90", torch="2.11.0+cu130", triton="3.6.0").profile.name
    'h100'
    >>> str(Target.parse("h200/x86-64-v2", torch="2.11.0+cu130", triton="3.6.0"))
    'h200/x86-64-v2'
    """

    profile: DeviceProfile
    host: str
    torch: str
    triton: str

    @classmethod
    def parse(cls, text: str, *, torch: str | None = None, triton: str | None = None) -> Self:
        """A target by its name: an architecture or a profile, and with "/" behind it a host's instruction set.

        Args:
            text: "sm_90", "h200", "l4/x86-64-v2".
            torch, triton: versions; None: those that are installed.

        Raises:
            BadInput: no such architecture, profile or instruction set, or no Triton is installed.
        """
        name, _, host = text.partition("/")
        key = _USUAL.get(name, re.sub(r"[\s_-]", "", name.lower()))
        if key not in PROFILES:
            known = ", ".join([*_USUAL, *PROFILES])
            raise BadInput(f"target: expected one of {known}, got {name!r}; a device of the same architecture will do")
        if host and host not in HOST_LEVELS:
            raise BadInput(f"target: expected a host among {', '.join(HOST_LEVELS)} behind the slash, got {host!r}")
        return cls(PROFILES[key], host or DEFAULT_HOST, torch or _installed("torch"), triton or _installed("triton"))

    @classmethod
    def of_factors(cls, environment: Mapping[str, Any]) -> Self:
        """The target that `factors`, or `environment_factors` on a device, is of; its usual profile.

        Raises:
            BadInput: an architecture that no target has.
        """
        versions = {"torch": str(environment["torch"]), "triton": str(environment["triton"])}
        found = cls.parse(str(environment["capability"]), **versions)
        return replace(found, host=str(environment["host"]))

    @property
    def architecture(self) -> str:
        """ "sm_90": what cubins are made for."""
        return self.profile.architecture

    def factors(self) -> dict[str, Any]:
        """What of it keys an artifact; the same as `environment_factors` finds on such a device."""
        return cuda_factors(self.architecture, self.host)

    def to_json(self) -> dict[str, Any]:
        """A plain JSON mapping, for people and notes."""
        return {"target": str(self), **asdict(self)}

    def __str__(self) -> str:
        return self.profile.name if self.host == DEFAULT_HOST else f"{self.profile.name}/{self.host}"


def made_elsewhere(made_for: Iterable[str], here: str) -> str | None:
    """One line on artifacts that were made for another device of the architecture than the one they run on.

    They are right there: cubins run on every device of their architecture. Only what they were tuned to differs.

    Args:
        made_for: of the artifacts: a target's name, or a device's as its driver says it; "" where none was noted.
        here: the same of the device that they run on.

    Returns:
        None if all of them were made for this device.
    """
    others = sorted({_known(name) for name in made_for if name} - {_known(here)})
    if not others:
        return None
    return (
        f"compiled for {', '.join(others)}, and serves {_known(here)}: the same architecture, so the same code; "
        "`accel-hidiff tune` on the device chooses its kernels' configurations again"
    )


def _known(name: str) -> str:
    """A profile's name, of a target's or a device's; what no profile has stays as it is."""
    profile = name.partition("/")[0]
    return next((known.name for known in PROFILES.values() if known.torch_name == name), profile)


def _installed(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        raise BadInput(
            f"target: expected {library} to be installed, found none; pip install accel-hidiff[cuda-build]"
        ) from None
