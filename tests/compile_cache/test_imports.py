"""The package imports and works without torch, starts no device, and keys the environment without an index."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

from compile_cache import CacheKey, CompileCacheError, environment_factors
from compile_cache import environment as module
from compile_cache.environment import cuda_factors

ROOT = Path(module.__file__).parents[1]  # the package need not be installed

BLOCKED = """
import importlib, pkgutil, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "numpy", "diffusers", "accel_hidiff"}:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Block())
import compile_cache
for module in pkgutil.iter_modules(compile_cache.__path__, "compile_cache."):
    importlib.import_module(module.name)
assert not {"torch", "accel_hidiff"} & set(sys.modules)
try:
    compile_cache.environment_factors("cpu")
except ImportError:
    print("works without torch")
"""

FAKE_RUN = """
import json, sys, types
torch = types.ModuleType("torch")
torch.__version__ = "2.13.0"
torch.version = types.SimpleNamespace(git_version="abc", cuda="12.8")
class NoDevice:
    def __getattr__(self, name):
        raise AssertionError("CUDA was touched: " + name)
torch.cuda = NoDevice()
sys.modules["torch"] = torch
from compile_cache import environment_factors
print(json.dumps(environment_factors("cpu"), sort_keys=True))
"""


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout.strip()


def test_imports_without_torch():
    assert python(BLOCKED) == "works without torch"


def test_cpu_facts_touch_no_cuda_and_are_stable():
    text = python(FAKE_RUN)
    facts = json.loads(text)
    assert text == python(FAKE_RUN)
    assert facts["torch"] == "2.13.0" and facts["torch_git"] == "abc" and facts["machine"] and facts["libc"]
    assert facts["cpu"]["flags"] == sorted(set(facts["cpu"]["flags"]))
    assert CacheKey(facts)


def imported(tree: ast.AST) -> set[str]:
    """What the code of a module imports from elsewhere, in its functions too."""
    found = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    found |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
    return {name.partition(".")[0] for name in found}


def test_only_the_environment_asks_for_torch():
    blocked = {"torch", "numpy", "diffusers", "transformers", "safetensors", "accel_hidiff"}
    files = sorted(Path(module.__file__).parent.glob("**/*.py"))
    asking = {path.name: blocked & imported(ast.parse(path.read_text("utf-8"))) for path in files}
    assert {name: names for name, names in asking.items() if names} == {"environment.py": {"torch"}}


# Files that between them load every module of the package. The rest is collected alone: it would find nothing else, as
# one module asks for torch (above), and takes minutes.
WITHOUT_TORCH = ("cache", "cli", "cli_operations", "bundle", "keys", "buckets", "metrics", "remote", "signing", "trust")


@pytest.mark.slow
def test_the_package_works_without_torch(tmp_path):
    """Its own tests run with torch out of reach, and load every module."""
    loaded = tmp_path / "loaded.json"
    run = f"""
import json, pathlib, sys
sys.modules["torch"] = None
import pytest
code = pytest.main(sys.argv[1:])
ours = [name for name in sys.modules if name.startswith("compile_cache.")]
pathlib.Path({str(loaded)!r}).write_text(json.dumps(ours))
sys.exit(code)
"""
    files = {f"tests/compile_cache/{path.name}" for path in Path(__file__).parent.glob("test_*.py")}
    chosen = {f"tests/compile_cache/test_{name}.py" for name in WITHOUT_TORCH}
    assert chosen < files
    tests = ["tests/compile_cache", "compile_cache", *(f"--deselect={name}" for name in sorted(files - chosen))]
    command = [sys.executable, "-c", run, "-q", "-m", "not slow", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:]
    modules = {f"compile_cache.{path.stem}" for path in Path(module.__file__).parent.glob("*.py")}
    assert modules - {"compile_cache.__init__", "compile_cache.__main__"} <= set(json.loads(loaded.read_text()))


@pytest.fixture
def fake_torch(monkeypatch):
    devices = [("NVIDIA A", 8, 0, 108), ("NVIDIA B", 9, 0, 132), ("NVIDIA B", 9, 0, 132)]

    def properties(index):
        name, major, minor, count = devices[index]
        return types.SimpleNamespace(name=name, major=major, minor=minor, multi_processor_count=count)

    torch = types.ModuleType("torch")
    torch.__version__ = "2.13.0"
    torch.version = types.SimpleNamespace(git_version="abc", cuda="12.8")
    torch.cuda = types.SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: len(devices),
        current_device=lambda: 0,
        get_device_properties=properties,
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    return torch


def test_cuda_facts_have_no_index(fake_torch):
    facts = environment_factors("cuda:1")
    assert facts["capability"] == "sm_90"
    assert facts == environment_factors("cuda:2") and facts != environment_factors("cuda:0")
    assert environment_factors("cuda") == environment_factors("cuda:0")
    assert facts["cuda"] == "12.8" and "cpu" not in facts


def test_a_machine_without_a_gpu_computes_the_key_of_one_that_has_it(fake_torch, monkeypatch):
    monkeypatch.setattr(module, "host_level", lambda: "x86-64-v4")  # it serves code for less, too
    there = environment_factors("cuda:1")
    fake_torch.cuda.is_available = lambda: False
    assert cuda_factors("sm_90", "x86-64-v3") == there
    assert cuda_factors("sm_80", "x86-64-v3") != there != cuda_factors("sm_90", "x86-64-v2")


def test_nothing_of_the_devices_name_or_size_is_in_a_key(fake_torch):
    fake_torch.cuda.get_device_properties = lambda index: types.SimpleNamespace(
        name=f"NVIDIA {index}", major=9, minor=0, multi_processor_count=100 + index
    )
    assert environment_factors("cuda:0") == environment_factors("cuda:2")


def test_gpu_keys_need_a_cuda_build(fake_torch):
    fake_torch.version.cuda = None
    with pytest.raises(CompileCacheError, match=r"expected a CUDA build of torch, got 2\.13\.0"):
        cuda_factors("sm_90", "x86-64-v3")


@pytest.mark.parametrize(
    ("flags", "level"),
    [
        ("cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3", "x86-64-v2"),
        ("cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3 avx avx2 bmi1 bmi2 f16c fma abm movbe xsave", "x86-64-v3"),
        ("cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3 avx512f avx512bw avx512cd avx512dq avx512vl", "x86-64-v2"),
        ("asimd", module.platform.machine()),
    ],
)
def test_the_level_of_a_host(flags, level):
    assert module.host_level(flags.split()) == level


@pytest.mark.parametrize("device", ["tpu", "", "cuda:x", "cuda:9", "cuda:-1"])
def test_devices_that_are_not_there(fake_torch, device):
    with pytest.raises(CompileCacheError, match="expected"):
        environment_factors(device)


def test_no_cuda(fake_torch):
    fake_torch.cuda.is_available = lambda: False
    with pytest.raises(CompileCacheError, match="got none"):
        environment_factors("cuda")


def test_cpuinfo_of_x86_arm_and_nothing():
    x86 = "vendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 207\nflags\t\t: sse2 avx avx2 avx\n\n"
    facts = module.parse_cpuinfo(x86 + x86.replace("207", "1"))
    assert facts == {"vendor": "GenuineIntel", "family": "6", "model": "207", "flags": ["avx", "avx2", "sse2"]}
    arm = "processor\t: 0\nFeatures\t: fp asimd\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU part\t: 0xd0c\n"
    assert module.parse_cpuinfo(arm) == {"vendor": "0x41", "family": "8", "model": "0xd0c", "flags": ["asimd", "fp"]}
    nothing = module.parse_cpuinfo("")
    assert nothing["model"] and nothing["flags"] == []
