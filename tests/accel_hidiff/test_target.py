"""Targets: told by name, looked up on a device, the same key from both."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

from accel_hidiff import target as module
from accel_hidiff.errors import BadInput
from accel_hidiff.target import LIMITS, PROFILES, Target, made_elsewhere
from compile_cache import environment_factors

VERSIONS = {"torch": "2.11.0", "triton": "3.6.0"}


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A torch that finds one device, whatever is installed."""
    found = types.SimpleNamespace(name="NVIDIA H200", major=9, minor=0, multi_processor_count=132)
    torch = types.ModuleType("torch")
    torch.__version__ = "2.11.0+cu130"  # type: ignore[attr-defined]
    torch.version = types.SimpleNamespace(git_version="abc", cuda="13.0")  # type: ignore[attr-defined]
    torch.cuda = types.SimpleNamespace(  # type: ignore[attr-defined]
        is_available=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        get_device_properties=lambda index: found,
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr("compile_cache.environment.host_level", lambda: "x86-64-v4")
    return found


@pytest.mark.parametrize(
    ("text", "profile", "architecture", "host"),
    [
        ("sm_80", "a100", "sm_80", "x86-64-v3"),
        ("sm_89", "l40s", "sm_89", "x86-64-v3"),
        ("sm_90", "h100", "sm_90", "x86-64-v3"),
        ("sm_100", "b200", "sm_100", "x86-64-v3"),
        ("H200", "h200", "sm_90", "x86-64-v3"),
        ("rtx-4090", "rtx4090", "sm_89", "x86-64-v3"),
        ("l4/x86-64-v2", "l4", "sm_89", "x86-64-v2"),
    ],
)
def test_names(text: str, profile: str, architecture: str, host: str) -> None:
    target = Target.parse(text, **VERSIONS)
    assert (target.profile.name, target.architecture, target.host) == (profile, architecture, host)
    assert Target.parse(str(target), **VERSIONS) == target


@pytest.mark.parametrize("text", ["", "sm_70", "v100", "sm_90/x86-64-v9", "sm_90/", "cuda"])
def test_names_that_are_none(text: str) -> None:
    if text == "sm_90/":
        assert Target.parse(text, **VERSIONS).host == module.DEFAULT_HOST
        return
    with pytest.raises(BadInput, match=r"target: expected .*, got '"):
        Target.parse(text, **VERSIONS)


def test_a_target_has_the_key_of_its_device(device: Any) -> None:
    there = environment_factors("cuda")
    for name in ("sm_90", "h100", "h200"):  # by what the code depends on: what serves on one serves on all
        assert Target.parse(name, **VERSIONS).factors() == there
    assert Target.parse("h200/x86-64-v2", **VERSIONS).factors() != there
    assert Target.parse("sm_89", **VERSIONS).factors() != there
    device.multi_processor_count, device.name = 78, "NVIDIA H100 PCIe"
    assert environment_factors("cuda") == there


def test_the_target_of_a_devices_key(device: Any) -> None:
    target = Target.parse("sm_90/x86-64-v2", **VERSIONS)
    found = Target.of_factors({**target.factors(), **VERSIONS})
    assert found == target
    with pytest.raises(BadInput, match="expected one of"):
        Target.of_factors({**target.factors(), "capability": "sm_61"})


def test_nothing_of_this_machine_is_in_a_targets_key(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Target.parse("sm_90", **VERSIONS).factors()
    device.name, device.major = "NVIDIA L4", 8
    monkeypatch.setattr("compile_cache.environment.parse_cpuinfo", lambda text: {"flags": ["sse"]})
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "9.99"))
    assert Target.parse("sm_90", **VERSIONS).factors() == before


def test_profiles_fit_their_architectures() -> None:
    assert {profile.architecture for profile in PROFILES.values()} == set(LIMITS)
    for name, profile in PROFILES.items():
        assert profile.name == name and profile.source
        assert profile.limits.shared_per_block < profile.limits.shared_per_multiprocessor


def test_an_artifact_made_for_another_device_is_named() -> None:
    assert made_elsewhere(["h100", "", "h100/x86-64-v2"], "NVIDIA H100 80GB HBM3") is None
    told = made_elsewhere(["h100", "NVIDIA H100 NVL", "h200"], "NVIDIA H200")
    assert told is not None and told.startswith("compiled for NVIDIA H100 NVL, h100, and serves h200: ")
    assert made_elsewhere(["h100"], "h200/x86-64-v2") and made_elsewhere([], "h200") is None


def test_without_triton_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(library: str) -> str:
        raise module.metadata.PackageNotFoundError(library)

    monkeypatch.setattr(module.metadata, "version", missing)
    with pytest.raises(BadInput, match=r"found none; pip install accel-hidiff\[cuda-build\]"):
        Target.parse("sm_90")
