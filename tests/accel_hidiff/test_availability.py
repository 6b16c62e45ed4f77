"""Every reason for which onediff is unavailable: packages that are really installed, and stand-ins for broken ones.

Each is found out as ever: by a process that imports what it finds.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

import accel_hidiff as ah
from accel_hidiff.availability.onediff import Availability, try_compiler
from accel_hidiff.backends import create_backend
from accel_hidiff.doctor import examine_backend
from tests import needs
from tests.accel_hidiff.conftest import Install

ONEDIFF = {
    "onediff/__init__.py": "",
    "onediff/infer_compiler.py": "class OneflowCompileOptions:\n    def __init__(self, **fields): pass\n",
}
COMPILE = "def compile(module, *, backend, options):\n    {body}\n"


@pytest.fixture(autouse=True)
def nothing_installed() -> None:
    needs.no_onediff()


@pytest.fixture(autouse=True)
def no_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty place to remember trials in."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "memory"))
    return tmp_path / "memory"


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Really installs a release into a folder of its own, once, and tells the folder."""
    made: dict[str, str] = {}

    def installed(requirement: str) -> str:
        if requirement not in made:
            folder = tmp_path_factory.mktemp("wheel")
            pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), requirement]
            subprocess.run(pip, check=True)
            made[requirement] = str(folder)
        return made[requirement]

    return installed


def refused(compiler: str = "nexfort", **arguments: object) -> str:
    """The reason; told by `accelerate`'s backend too."""
    found = try_compiler(compiler, **arguments)  # type: ignore[arg-type]
    assert not found.usable
    assert "\n" not in found.reason
    return found.reason


class TestNotInstalled:
    def test_onediff(self, no_memory: Path) -> None:
        for compiler in ("nexfort", "oneflow"):
            assert refused(compiler) == "onediff is not installed: see docs/onediff.md"
        assert not no_memory.exists(), "nothing was tried"

    def test_it_is_told_by_doctor_and_accelerate(self) -> None:
        told = (
            "onediff/nexfort: unavailable: onediff is not installed: see docs/onediff.md; onediff/oneflow: unavailable"
        )
        finding = examine_backend("onediff")
        assert not finding.usable and told in finding.detail
        with pytest.raises(ah.BadInput, match="expected one that works here") as caught:
            create_backend("onediff")
        assert told in str(caught.value) and "`accel-hidiff doctor` tells which others do" in str(caught.value)

    @pytest.mark.slow
    def test_no_compiler_beside_a_real_onediff(
        self, wheel: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.syspath_prepend(wheel("onediff==1.2.0"))
        assert refused("nexfort") == "nexfort is not installed"
        assert refused("oneflow") == "oneflow is not installed"


@pytest.mark.slow
class TestRealNexfort:
    """The wheel on PyPI, 66 MB, beside a torch that it was not built for."""

    @pytest.fixture(autouse=True)
    def packages(self, wheel: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
        for requirement in ("onediff==1.2.0", "nexfort==0.1.dev330"):
            monkeypatch.syspath_prepend(wheel(requirement))

    def test_it_says_what_it_was_built_for(self) -> None:
        found = metadata.version("torch")
        told = f"nexfort 0.1.dev330 was built for torch 2.4.0+cu121, this environment has {found}"
        assert refused() == told

    def test_it_cannot_be_loaded_where_it_does_not_look(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for library in ("TORCH", "TRITON"):
            monkeypatch.setenv(f"NEXFORT_FORCE_CHECK_{library}_VERSION", "0")
        reason = refused()
        assert reason.startswith(f"nexfort 0.1.dev330 was built for another torch than {metadata.version('torch')}: ")
        assert "undefined symbol" in reason

    def test_doctor_survives_it(self) -> None:
        finding = examine_backend("onediff")
        assert not finding.usable and "onediff/oneflow: unavailable: oneflow is not installed" in finding.detail
        assert not {"onediff", "nexfort", "oneflow"} & set(sys.modules)


class TestOneflowOfPyPI:
    """oneflow 0.9.0 has none of what onediff 1.2 needs; a stand-in has more and more of it."""

    def test_the_first_missing_part_is_named(self, install: Install) -> None:
        install("onediff", "1.2.0", ONEDIFF)
        package = install("oneflow", "0.9.0", {"oneflow/__init__.py": "class nn:\n    class Graph: pass\n"})
        assert refused("oneflow") == "oneflow 0.9.0 lacks framework; needs a build for onediff"
        for path, text, then in (
            ("framework/__init__.py", "", "framework.args_tree"),
            ("framework/args_tree.py", "ArgsTree = None", "mock_torch"),
            ("mock_torch/__init__.py", "enable = None", "mock_torch.mock_importer"),
            ("mock_torch/mock_importer.py", "", "nn.Graph.with_dynamic_input_shape"),
        ):
            (package / "oneflow" / path).parent.mkdir(exist_ok=True)
            (package / "oneflow" / path).write_text(text)
            found = try_compiler("oneflow", anew=True)
            assert str(found) == f"onediff/oneflow: unavailable: oneflow 0.9.0 lacks {then}; needs a build for onediff"


class TestBroken:
    def test_an_import_that_raises(self, install: Install) -> None:
        install("onediff", "1.2.0", ONEDIFF)
        install("nexfort", "9.0", {"nexfort/__init__.py": "raise RuntimeError('no such device\\nand more')"})
        assert refused() == "nexfort 9.0 does not import: RuntimeError: no such device"

    def test_a_package_that_it_needs(self, install: Install) -> None:
        install("onediff", "1.2.0", ONEDIFF)
        install("nexfort", "9.0", {"nexfort/__init__.py": "import no_such_package_anywhere"})
        assert refused() == (
            "nexfort 9.0 does not import: ModuleNotFoundError: No module named 'no_such_package_anywhere'"
        )

    def test_a_crash(self, install: Install, no_memory: Path) -> None:
        install("onediff", "1.2.0", ONEDIFF)
        install("nexfort", "9.0", {"nexfort/__init__.py": "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)"})
        assert refused() == "the trial ended with signal SIGSEGV"
        assert not no_memory.exists(), "a crash is not remembered"

    def test_an_exit(self, install: Install) -> None:
        install("onediff", "1.2.0", ONEDIFF)
        install("nexfort", "9.0", {"nexfort/__init__.py": "raise SystemExit('no licence')"})
        assert refused() == "the trial ended with code 1: no licence"

    def test_one_that_hangs(self, install: Install, no_memory: Path) -> None:
        install("onediff", "1.2.0", ONEDIFF)
        install("nexfort", "9.0", {"nexfort/__init__.py": "import time\ntime.sleep(600)"})
        assert refused(seconds=1.0).startswith("the trial did not end in 1 s and was stopped")
        assert not no_memory.exists()

    def test_another_onediff(self, install: Install) -> None:
        install("onediff", "0.9", ONEDIFF)
        install("nexfort", "9.0", {"nexfort/__init__.py": ""})
        assert refused() == "onediff 0.9 lacks infer_compiler.compile; needs onediff 1.2"


# What a stand-in's `compile` does, and what is told of it.
COMPILES = {
    "raises": (
        "raise ModuleNotFoundError(\"No module named 'nexfort.inductor.codegen'\")",
        "nexfort 9.0 cannot compile a module with mode 'jit': ModuleNotFoundError: No module named "
        "'nexfort.inductor.codegen'",
    ),
    "another result": (
        "return lambda image: module(image) * 1.5",
        "nexfort 9.0 computes something else than eager: relative difference 5.0e-01",
    ),
    "eager": ("return module", "nexfort 9.0 ran the module eager; look for TORCHDYNAMO_DISABLE"),
    "compiles": ("import torch\n    return torch.compile(module, backend='aot_eager')", ""),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "eager" else pytest.mark.slow) for name in COMPILES]
)
def test_what_a_compiled_module_tells(install: Install, name: str) -> None:
    body, reason = COMPILES[name]
    module = "onediff/infer_compiler.py"
    install("onediff", "1.2.0", {**ONEDIFF, module: ONEDIFF[module] + COMPILE.format(body=body)})
    install("nexfort", "9.0", {"nexfort/__init__.py": ""})
    found = try_compiler("nexfort")
    assert found.usable == (not reason) and found.reason.startswith(reason)


class TestMemory:
    @pytest.fixture
    def tries(self, install: Install, tmp_path: Path) -> Callable[[], int]:
        """How often a stand-in was imported."""
        count = tmp_path / "tries"
        install("onediff", "1.2.0", ONEDIFF)
        install("nexfort", "9.0", {"nexfort/__init__.py": f"open({str(count)!r}, 'a').write('x')\nraise OSError('no')"})
        return lambda: len(count.read_text()) if count.exists() else 0

    def test_one_trial_for_each_environment(
        self, tries: Callable[[], int], install: Install, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = refused()
        assert refused() == first and tries() == 1
        refused(mode="O3")
        assert tries() == 2, "another mode"
        refused(options={"jit.freezing": True})
        assert tries() == 3, "other options"
        monkeypatch.setenv("NEXFORT_GRAPH_CACHE", "1")
        refused()
        assert tries() == 4, "another environment variable"
        monkeypatch.delenv("NEXFORT_GRAPH_CACHE")
        assert refused() == first and tries() == 4
        refused(anew=True)
        assert tries() == 5, "asked for anew"
        install("nexfort", "9.1", {"nexfort/__init__.py": ""})
        assert "9.1" in str(metadata.version("nexfort"))
        assert refused() == "onediff 1.2.0 lacks infer_compiler.compile; needs onediff 1.2", "another release"

    def test_damage_is_tried_anew(self, tries: Callable[[], int], no_memory: Path) -> None:
        first = refused()
        (file,) = (no_memory / "accel_hidiff").iterdir()
        for damage in ("", "{", "[]", '{"usable": true}'):
            file.write_text(damage)
            assert refused() == first
        assert tries() == 5
        assert list((no_memory / "accel_hidiff").iterdir()) == [file]

    def test_what_may_be_gone_the_next_time_is_not_kept(self, install: Install, no_memory: Path) -> None:
        module = "onediff/infer_compiler.py"
        body = "raise RuntimeError('CUDA out of memory')"
        install("onediff", "1.2.0", {**ONEDIFF, module: ONEDIFF[module] + COMPILE.format(body=body)})
        install("nexfort", "9.0", {"nexfort/__init__.py": ""})
        assert refused() == "nexfort 9.0 cannot compile a module with mode 'jit': RuntimeError: CUDA out of memory"
        assert not no_memory.exists()

    def test_where_caches_lie_changes_nothing(self, tries: Callable[[], int], monkeypatch: pytest.MonkeyPatch) -> None:
        refused()
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
        refused()
        assert tries() == 1

    def test_a_place_that_cannot_be_written(
        self, tries: Callable[[], int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        assert refused() == refused()
        assert tries() == 2

    def test_the_trial_does_not_touch_this_process(self, tries: Callable[[], int]) -> None:
        before = dict(os.environ)
        refused()
        assert dict(os.environ) == before
        assert not {"onediff", "nexfort", "oneflow"} & set(sys.modules)


def test_text() -> None:
    assert str(Availability("oneflow", False, "why")) == "onediff/oneflow: unavailable: why"
    assert str(Availability("nexfort", True)) == "onediff/nexfort: usable"
