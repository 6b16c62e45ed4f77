"""Whether onediff and one of its compilers work in this environment: tried once in another process, and remembered.

Nothing of onediff, oneflow or nexfort is imported into this process: a compiler that does not fit its torch can end the
process, and oneflow changes what `import torch` means to others.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from accel_hidiff.availability import nexfort_wheel, trial
from accel_hidiff.config import NEXFORT_MODE, ONEDIFF_COMPILERS
from accel_hidiff.files import whole_file

_PACKAGES: Final = ("torch", "triton", "diffusers", "transformers", "huggingface-hub", "numpy", "onediff", "onediffx")
_VARIABLES: Final = ("NEXFORT_", "ONEFLOW_", "ONEDIFF_", "TORCH", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH")
_PLACES: Final = ("_DIR", "_HOME", "_THREADS")  # how variables end that change nothing of the outcome
_SECONDS: Final = 300.0


@dataclass(frozen=True)
class Availability:
    """Of one compiler.

    Attributes:
        compiler: "nexfort" or "oneflow".
        usable: it compiled a module here, and the module computed what eager computes.
        reason: why not, in one line; empty where it is usable.
    """

    compiler: str
    usable: bool
    reason: str = ""

    def __str__(self) -> str:
        return f"onediff/{self.compiler}: {'usable' if self.usable else f'unavailable: {self.reason}'}"


def try_compiler(
    compiler: str,
    mode: str = NEXFORT_MODE,
    options: Mapping[str, Any] | None = None,
    *,
    anew: bool = False,
    seconds: float = _SECONDS,
) -> Availability:
    """Has a process compile one small module, unless this environment was tried before.

    Args:
        compiler: "nexfort" or "oneflow".
        mode, options: of the compiler, as in `OneDiffConfig`.
        anew: forget what was found before.
        seconds: after which the trial is stopped.

    What was found is kept in `$XDG_CACHE_HOME/accel_hidiff` (`~/.cache/accel_hidiff`), under a key of everything that
    it depends on: versions and builds of the packages, interpreter, device, environment variables, mode and options.
    What may be gone the next time is not kept: a trial that was stopped or killed, a module that did not compile.
    """
    asked = json.dumps({"compiler": compiler, "mode": mode, "options": dict(options or {})}, sort_keys=True)
    if _build("onediff") is None:  # the usual case, and no reason to start anything
        return Availability(compiler, False, "onediff is not installed: see docs/onediff.md")
    place = _memory() / f"onediff-{_environment(asked)}.json"
    if not anew and (known := _recalled(place)) is not None:
        return known
    found, lasting = _tried(compiler, asked, seconds)
    if lasting:
        _remember(place, found)
    return found


def _tried(compiler: str, asked: str, seconds: float) -> tuple[Availability, bool]:
    """What a process found, and whether it would find the same again."""
    command = [sys.executable, "-P", "-m", trial.__name__, asked]
    # This process's own path, so that both import the same.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    with tempfile.TemporaryFile("w+") as errors:  # a pipe that nobody reads could fill up
        pipes: Any = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": errors}
        with subprocess.Popen(command, env=environment, text=True, process_group=0, **pipes) as process:
            try:
                text, _ = process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                _kill(process)
                reason = f"the trial did not end in {seconds:g} s and was stopped; run it again on a quieter machine"
                return Availability(compiler, False, reason), False
            except BaseException:
                _kill(process)
                raise
        lines = text.strip().splitlines()
        if process.returncode == 0 and lines:
            with suppress(ValueError, KeyError):
                answer = json.loads(lines[-1])
                return Availability(compiler, bool(answer["usable"]), str(answer["reason"])), bool(answer["lasting"])
        errors.seek(0)
        said = [line.strip() for line in errors.read().splitlines() if line.strip()]
    code = process.returncode
    ended = f"signal {signal.Signals(-code).name}" if code < 0 else f"code {code}"
    told = f": {said[-1][:300]}" if said else ""
    return Availability(compiler, False, f"the trial ended with {ended}{told}"), False


def _kill(process: subprocess.Popen[str]) -> None:
    """Ends it, and the compilers that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _environment(asked: str) -> str:
    """SHA-256 over everything that the outcome depends on."""
    variables = {
        name: value for name, value in os.environ.items() if name.startswith(_VARIABLES) and not name.endswith(_PLACES)
    }
    builds = {package: _build(package) for package in (*_PACKAGES, *ONEDIFF_COMPILERS)}
    sources = b"".join(Path(str(module.__file__)).read_bytes() for module in (trial, nexfort_wheel))
    source = hashlib.sha256(sources).hexdigest()
    facts = [asked, source, sys.executable, sys.version, platform.platform(), Path("/dev/nvidiactl").exists()]
    return hashlib.sha256(json.dumps([facts, builds, variables], sort_keys=True).encode()).hexdigest()


def _build(package: str) -> str | None:
    """Version of a package and digest of what was installed; None where it is not."""
    try:
        found = metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return None
    record = found.read_text("RECORD") or found.read_text("METADATA") or ""
    return f"{found.version} {hashlib.sha256(record.encode()).hexdigest()}"


def _memory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "accel_hidiff"


def _recalled(place: Path) -> Availability | None:
    with suppress(OSError, ValueError, TypeError):
        return Availability(**json.loads(place.read_text(encoding="utf-8")))
    return None


def _remember(place: Path, found: Availability) -> None:
    with suppress(OSError), whole_file(place) as part:  # without a place to write to, it is tried again next time
        part.write_text(json.dumps(vars(found)), encoding="utf-8")
