"""Which contestants can run here, and for each that cannot, why: `python -m accel_hidiff.benching.found NAME`."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

from accel_hidiff.benching.names import PEERS, STOCK, Contender
from accel_hidiff.compiling.child import import_path
from accel_hidiff.doctor import Finding, examine_backend
from compile_cache.errors import one_line

_LIMIT: Final = 300.0  # seconds
_PACKAGES: Final = {"hidiffusion": "hidiffusion", "hidiffusion-compile": "hidiffusion", "tensorrt": "torch_tensorrt"}


def find(name: str, python: Path | None = None) -> Finding:
    """Whether a contestant can run.

    Args:
        name: as in `Contender.parse`.
        python: an executable whose environment it is to run in; None: this one. What has to be imported to find out is
            imported in another process in any case.
    """
    if python is None and Contender.parse(name).base not in _PACKAGES:
        return examine(name)
    command = [str(python or sys.executable), "-m", "accel_hidiff.benching.found", name]
    try:
        environment = import_path(python)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=_LIMIT)
    except subprocess.TimeoutExpired:
        return Finding(name, False, f"looking for it took longer than {_LIMIT:g} s")
    except OSError as problem:
        return Finding(name, False, f"its Python does not run: {problem.strerror}")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return Finding(name, False, one_line(last, 300))
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return Finding(**told)


def examine(name: str) -> Finding:
    """The same in this process and its environment; may import what the contestant needs."""
    contender = Contender.parse(name)
    if contender.ours:
        return examine_backend(contender.base)
    package = _PACKAGES.get(contender.base)
    if package is not None:
        try:
            importlib.import_module(package)
        except Exception as problem:
            missing = isinstance(problem, ModuleNotFoundError) and problem.name == package
            why = f"{package} is not installed" if missing else f"import {package}: {type(problem).__name__}: {problem}"
            return Finding(name, False, one_line(why, 300))
    if contender.base not in (STOCK, "hidiffusion") and not (found := examine_backend("inductor")).usable:
        return Finding(name, False, found.detail)
    return Finding(name, True, PEERS[contender.base])


if __name__ == "__main__":
    print(json.dumps(examine(sys.argv[1]).to_json()))
