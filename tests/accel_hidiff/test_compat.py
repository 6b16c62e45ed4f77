"""One package for several versions of torch and diffusers: what an old one cannot do is said in one line."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version

import accel_hidiff as ah
from accel_hidiff import BadInput, compat, doctor
from accel_hidiff.backends import create_backend
from accel_hidiff.models import load_pipeline


@pytest.fixture
def old_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "torch_version", lambda: Version("2.4.0"))


def one_line(raised: pytest.ExceptionInfo[BadInput]) -> str:
    text = str(raised.value)
    assert "\n" not in text
    return text


def test_the_versions_are_those_that_run() -> None:
    assert str(compat.torch_version()) == torch.__version__.split("+")[0]
    assert compat.diffusers_version() == Version(sys.modules["diffusers"].__version__)


def test_aot_on_an_old_torch_is_refused(old_torch: None, pipe: Any, tmp_path: Path) -> None:
    before = dict(vars(pipe))
    for asked in ({"backend": "aot"}, {}):
        with pytest.raises(BadInput) as raised:
            ah.accelerate(pipe, cache=tmp_path / "cache", **asked)
        assert one_line(raised).startswith('backend: "aot" needs torch >= 2.11, got 2.4.0; ')
    assert vars(pipe) == before and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ["eager", "inductor"])
def test_the_other_backends_run_on_an_old_torch(old_torch: None, name: str) -> None:
    assert create_backend(name).name == name


@pytest.mark.parametrize(
    ("version", "reason"),
    [("2.10.0", "needs torch >= 2.11, got 2.10.0"), ("2.11.0", ""), ("2.13.0", "")],
)
def test_the_first_torch_of_aot(monkeypatch: pytest.MonkeyPatch, version: str, reason: str) -> None:
    monkeypatch.setattr(compat, "torch_version", lambda: Version(version))
    assert compat.missing_for_aot() == reason


def test_a_diffusers_without_guiders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "diffusers_version", lambda: Version("0.30.3"))
    monkeypatch.delitem(sys.modules, "accel_hidiff.cfgpp.guider", raising=False)
    monkeypatch.delattr(importlib.import_module("accel_hidiff.cfgpp"), "guider", raising=False)
    with pytest.raises(BadInput) as raised:
        ah.CFGPlusPlusGuidance  # noqa: B018
    assert one_line(raised).startswith("CFGPlusPlusGuidance: needs diffusers >= 0.42, got 0.30.3; ")


class TestDoctor:
    @pytest.fixture(autouse=True)
    def compiler(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(doctor, "_compiler", lambda: doctor.Finding("C++ compiler", True, "g++ 12"))

    @staticmethod
    def findings() -> dict[str, doctor.Finding]:
        return {finding.part: finding for finding in doctor.examine()}

    def test_an_old_torch_is_usable_and_aot_is_not(self, old_torch: None) -> None:
        found = self.findings()
        for part in ("torch", "backend eager", "backend inductor"):
            assert found[part].usable, found[part]
        for part in ("backend aot, serving", "backend aot, compiling"):
            assert (found[part].usable, found[part].detail) == (False, "needs torch >= 2.11, got 2.4.0")

    @pytest.mark.parametrize("version", ["2.3.1", "2.14.0"])
    def test_a_torch_that_nobody_tested_is_not_usable(self, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
        monkeypatch.setattr(compat, "torch_version", lambda: Version(version))
        found = self.findings()
        parts = ("torch", "backend eager", "backend inductor", "backend aot, serving", "backend aot, compiling")
        assert not any(found[part].usable for part in parts)
        assert all("expected 2.4 to below 2.14" in found[part].detail for part in parts)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_torch_without_stances_is_sealed_too(
    old_torch: None, pipe: Any, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing there is left to `torch.compile` in a request: `accelerate`'s programs are called without it."""
    monkeypatch.delattr(torch.compiler, "set_stance", raising=False)
    handle = ah.accelerate(pipe, hidiffusion=ah.HiDiffusionConfig(), backend=backend, on_miss="error")
    handle.seal()
    if backend == "inductor":
        with pytest.raises(ah.GraphMiss, match="not compiled in this process"):
            handle.load([(128, 128)], 1)
    handle.remove()


def test_weights_are_loaded_in_the_dtype_that_is_asked_for(pipe: Any, tmp_path: Path) -> None:
    """diffusers ignores the name that it does not know."""
    pipe.save_pretrained(tmp_path)
    assert load_pipeline(str(tmp_path), "bfloat16", "cpu").unet.dtype == torch.bfloat16
