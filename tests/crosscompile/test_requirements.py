"""What compiling for a target needs: facts are given, so that every case is judged on any machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from elftools.elf.elffile import ELFFile

from accel_hidiff.crosscompile import toolkit
from accel_hidiff.crosscompile.libcuda import build_stub, driver_functions
from accel_hidiff.crosscompile.requirements import TESTED, Machine, judge, look
from accel_hidiff.doctor import examine_target
from accel_hidiff.errors import BadInput, CompileFailed
from accel_hidiff.target import Target

TORCH, TRITON = TESTED[0]
READY = Machine("x86_64", f"{TORCH}+cu130", "13.0", TRITON, "", "g++")
TARGET = Target.parse("sm_90", torch=TORCH, triton=TRITON)


def missing(here: Machine, target: Target = TARGET) -> dict[str, str]:
    return {requirement.part: requirement.detail for requirement in judge(target, here) if not requirement.met}


def test_a_machine_without_a_gpu_has_all_that_is_needed() -> None:
    assert missing(READY) == {}


@pytest.mark.parametrize(
    ("change", "part", "says"),
    [
        ({"machine": "aarch64"}, "machine", "expected x86_64"),
        ({"cuda": None, "torch": f"{TORCH}+cpu"}, "torch", "has no CUDA; pip install"),
        ({"triton": None}, "triton", "not installed"),
        ({"torch": "2.12.0"}, "versions", f"expected torch {TORCH} with Triton {TRITON}, torch 2.15.0 with"),
        ({"torch": "2.15.0"}, "versions", f"got 2.15.0 and {TRITON}"),  # a Triton that another torch was tested with
        ({"triton": "3.5.0"}, "versions", "3.5.0"),
        ({"headers": "CUDA headers: expected cuda.h"}, "CUDA headers", "expected cuda.h"),
        ({"compiler": ""}, "C++ compiler", "none on PATH"),
    ],
)
def test_each_thing_that_can_be_missing(change: dict[str, Any], part: str, says: str) -> None:
    assert says in missing(replace(READY, **change))[part]


def test_versions_that_the_target_asks_for_are_installed_or_it_is_refused() -> None:
    other = replace(TARGET, torch="2.15.0")
    assert "expected 2.15.0 and" in missing(READY, other)["target's versions"]


def test_the_facts_of_this_machine_are_found() -> None:
    here = look()
    assert here.torch and here.machine and here.compiler


def test_doctor_lists_them_and_ends_with_the_target() -> None:
    findings = examine_target("l4")
    assert [finding.part for finding in findings][-1] == "target l4"
    assert findings[-1].usable == all(finding.usable for finding in findings[:-1])
    with pytest.raises(BadInput, match="expected one of"):
        examine_target("sm_20")


def test_headers_are_looked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(BadInput, match=r"expected cuda\.h in .*, found none; pip install nvidia-cuda-runtime"):
        toolkit.cuda_home()
    for header in toolkit.HEADERS:
        (tmp_path / "include" / header).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "include" / header).touch()
    assert toolkit.cuda_home() == tmp_path


HEADER = "CUresult CUDAAPI cuInit(unsigned int Flags);\nCUresult CUDAAPI cuLaunchKernel(CUfunction f,\n"


def test_the_drivers_stand_in_has_its_name_and_functions(tmp_path: Path) -> None:
    (tmp_path / "cuda.h").write_text(HEADER)
    library = build_stub(tmp_path / "cuda.h", tmp_path, "g++")
    with library.open("rb") as stream:
        file = ELFFile(stream)
        sonames = [tag.soname for tag in file.get_section_by_name(".dynamic").iter_tags("DT_SONAME")]
        symbols = {symbol.name for symbol in file.get_section_by_name(".dynsym").iter_symbols()}
    assert sonames == ["libcuda.so.1"]
    assert set(driver_functions(HEADER)) <= symbols and "cuLaunchKernel" in symbols


def test_a_compiler_that_fails_says_why(tmp_path: Path) -> None:
    (tmp_path / "cuda.h").write_text(HEADER)
    with pytest.raises(CompileFailed, match="cannot be built"):
        build_stub(tmp_path / "cuda.h", tmp_path / "nowhere", "g++")
