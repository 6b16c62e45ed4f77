"""A sealed process: no compiler on its PATH, no triton, a cache that it may only read; it starts and writes nothing.

Python's audit events tell what the process does after `handle.seal()`; what code below Python writes would show in its
temporary folder, its home and the cache.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import accel_hidiff as ah
from tests.compiled.conftest import STEPS, relative_difference, request

_SERVE = """
import importlib.abc, json, os, sys

class NoTriton(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoTriton())

def obey_permissions():
    # Permissions do not stop root, unless it gives up the capability to override them (1), for good.
    if os.geteuid() != 0:
        return
    import ctypes

    class Header(ctypes.Structure):
        _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]

    class Data(ctypes.Structure):
        _fields_ = [("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32)]

    libc, header, data = ctypes.CDLL(None, use_errno=True), Header(0x20080522, 0), (Data * 2)()
    assert libc.capget(ctypes.byref(header), data) == 0
    data[0].effective &= ~(1 << 1)
    data[0].permitted &= ~(1 << 1)
    assert libc.capset(ctypes.byref(header), data) == 0

import torch
import accel_hidiff as ah
from accel_hidiff.models import load_pipeline
from compile_cache import CompileCache

model, cache, out, steps, read_only = sys.argv[1:6]
torch.set_num_threads(1)
if read_only == "no":
    obey_permissions()
    try:
        open(os.path.join(cache, "written"), "w")
        raise AssertionError("expected a cache that this process cannot write")
    except PermissionError:
        pass
pipe = load_pipeline(model)
pipe.set_progress_bar_config(disable=True)
handle = ah.accelerate(
    pipe, hidiffusion=ah.HiDiffusionConfig(), cache=CompileCache(cache, read_only=read_only == "yes"), on_miss="error"
)
handle.load([(128, 192), (256, 128)], int(steps))

def serve():
    images = {}
    for height, width in ((128, 192), (256, 128)):
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": int(steps), "output_type": "pt", "generator": generator}
        images[f"{height}x{width}"] = pipe("a red circle", height=height, width=width, **options).images
    return images

serve()  # what diffusers and torch import at their first request is there now
handle.seal()

seen = []
STARTS = ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "os.system")
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod",
           "os.utime", "shutil.copyfile", "tempfile.mkstemp", "tempfile.mkdtemp")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
watching = True

def audit(event, arguments):
    if watching and (event in STARTS or event in CHANGES or (event == "open" and (arguments[2] or 0) & WRITES)):
        seen.append([event, str(arguments)[:200]])

sys.addaudithook(audit)
images = serve()
refused = []

def refuse(run):
    try:
        run()
    except Exception as problem:
        refused.append([type(problem).__name__, str(problem)[:600]])

refuse(lambda: pipe("a red circle", height=72, width=128, num_inference_steps=2))
watching = False
refuse(lambda: torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(2)))  # it makes folders before it refuses
with open(out, "wb") as file:
    torch.save(images, file)
print(json.dumps({
    "seen": seen, "refused": refused, "stats": handle.stats.to_json(),
    "compiler": [name for name in ("torch._inductor.compile_fx", "torch._inductor.graph") if name in sys.modules],
    "triton": "triton" in sys.modules,
}))
"""


@pytest.fixture
def place(model_folder: Path, cache_dir: Path) -> Iterator[Path]:
    """A folder with a model and a cache that may be read and not written."""
    folder = Path(tempfile.mkdtemp())
    shutil.copytree(model_folder, folder / "model")
    shutil.copytree(cache_dir, folder / "cache")
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    folder.chmod(0o755)
    for name in ("home", "tmp", "tools", "out"):
        (folder / name).mkdir()
        (folder / name).chmod(0o777)
    yield folder
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            path.chmod(0o755)
    shutil.rmtree(folder)


def _path() -> str:
    return str(Path(ah.__file__).parents[1])


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("read_only", ["yes", pytest.param("no", id="by permissions alone")])
def test_a_sealed_process_has_no_compiler_starts_nothing_and_writes_nothing(
    place: Path, make_pipe: Any, read_only: str
) -> None:
    environment = {
        "PATH": str(place / "tools"),  # empty: no g++, no clang, no ld
        "HOME": str(place / "home"),
        "TMPDIR": str(place / "tmp"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": _path(),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    out = place / "out" / "images.pt"
    before = contents(place / "cache")
    arguments = [str(place / "model"), str(place / "cache"), str(out), str(STEPS), read_only]
    command = [sys.executable, "-c", _SERVE, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["seen"] == [] and report["compiler"] == [] and not report["triton"]
    assert report["stats"]["compiles"] == report["stats"]["eager_calls"] == 0
    (miss, missed), (stance, recompiles) = report["refused"]
    assert miss == "GraphMiss" and "to fill the gap: accel-hidiff precompile" in missed
    assert stance == "RuntimeError" and "fail_on_recompile" in recompiles
    assert contents(place / "cache") == before
    assert not [path for path in (place / "home").rglob("*") if path.is_file()]

    eager = make_pipe()
    ah.apply_hidiffusion(eager)
    for name, got in torch.load(out).items():
        height, width = map(int, name.split("x"))
        assert relative_difference(got, torch.as_tensor(request(eager, height, width, output_type="pt"))) < 5e-3
