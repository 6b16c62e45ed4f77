"""What must import without torch does, and importing the packages starts no device."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import accel_hidiff

ROOT = Path(accel_hidiff.__file__).parents[1]  # the package need not be installed

BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "numpy", "diffusers", "transformers", "safetensors"}:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Block())
"""
PLAIN_MODULES = [
    "accel_hidiff",
    *(
        f"accel_hidiff.{name}"
        for name in ("errors", "config", "topology", "families", "schedule", "shifts", "guard", "failures")
    ),
    "accel_hidiff.compat",
    *(f"accel_hidiff.serving.{name}" for name in ("requests", "schema", "metrics", "engine", "service")),
    *("accel_hidiff.serving.app", "accel_hidiff.serving.command", "accel_hidiff.deploy"),
    *(f"accel_hidiff.precompiling.{name}" for name in ("options", "machine", "estimate")),
    *(f"accel_hidiff.benching.{name}" for name in ("options", "turns", "report", "command")),
]


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("module", PLAIN_MODULES)
def test_a_plain_module_imports_without_torch(module: str) -> None:
    code = f"import importlib; importlib.import_module({module!r}); assert 'torch' not in sys.modules; print('done')"
    assert python(BLOCK + code) == "done"


def test_the_block_works() -> None:
    """The test above can fail: a module that needs torch does not import under it."""
    code = "\ntry:\n    import accel_hidiff.patching\nexcept ImportError as e:\n    print(e)"
    assert python(BLOCK + code) == "torch is blocked"


def test_plans_are_made_without_torch() -> None:
    code = """
import accel_hidiff as ah
from accel_hidiff.families import SDXL, Layout
from accel_hidiff.schedule import plan_pixels
layout = Layout(SDXL.down_block_types, SDXL.up_block_types, (2, 2, 2), 4)
print(plan_pixels(SDXL, layout, 2048, 2048, 10, ah.HiDiffusionConfig()))
"""
    assert python(BLOCK + code) == "[0, 1) windowed+dilated, [1, 4) windowed+pooled, [4, 10) windowed"


def test_importing_the_packages_imports_no_torch_and_everything_else_starts_no_device() -> None:
    code = """
import sys
import accel_hidiff, compile_cache
assert "torch" not in sys.modules and "diffusers" not in sys.modules
import torch
def refuse(*args, **kwargs):
    raise AssertionError("CUDA was started")
torch.cuda._lazy_init = torch._C._cuda_init = refuse
for name in accel_hidiff.__all__:
    try:
        getattr(accel_hidiff, name)
    except accel_hidiff.BadInput:
        from accel_hidiff.compat import missing_for_guiders
        assert name == "CFGPlusPlusGuidance" and missing_for_guiders()
assert "accel_hidiff.patching" in sys.modules and "accel_hidiff.pipeline" in sys.modules
assert not torch.cuda.is_initialized()
try:
    torch.cuda.current_device()
except AssertionError as e:
    print(e)
"""
    assert python(code).splitlines()[-1] == "CUDA was started", "the last call must, or the check checks nothing"


def test_public_names_are_listed_and_others_refused() -> None:
    assert set(accel_hidiff.__all__) <= set(dir(accel_hidiff))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        accel_hidiff.nothing  # noqa: B018
