"""Tries one of onediff's compilers for real: imports, symbols, and a module that is compiled and compared with eager.

Runs in a process of its own: `python -m accel_hidiff.availability.trial JSON`. Prints one JSON line.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from importlib import import_module, metadata
from types import TracebackType
from typing import Any, Final

from accel_hidiff.availability import nexfort_wheel
from accel_hidiff.errors import first_line

# What onediff 1.2.0 calls and releases of oneflow on PyPI do not have.
ONEFLOW_SYMBOLS: Final = (
    "framework.args_tree.ArgsTree",
    "mock_torch.mock_importer",
    "mock_torch.enable",
    "nn.Graph.with_dynamic_input_shape",
    "nn.Graph.runtime_state_dict",
    "nn.Graph.load_runtime_state_dict",
    "utils.tensor.to_torch",
)
_LIMIT: Final = 1e-3  # max|compiled - eager| / max|eager|


class Unavailable(Exception):
    """Why it cannot be used, in one line.

    Attributes:
        lasting: it will be found again as long as the same packages are installed.
    """

    def __init__(self, reason: str, lasting: bool = True) -> None:
        super().__init__(reason)
        self.lasting = lasting


def attempt(compiler: str, mode: str, options: Mapping[str, Any]) -> None:
    """Raises `Unavailable` unless the compiler compiles a module here that computes what it computes in eager."""
    _imported(compiler)
    if compiler == "oneflow" and (lacking := next(filter(None, map(_missing_of_oneflow, ONEFLOW_SYMBOLS)), "")):
        raise Unavailable(f"{_named('oneflow')} lacks {lacking}; needs a build for onediff")
    for name in ("torch", "diffusers", "onediff"):  # diffusers first: onediff looks at what is imported already
        _imported(name)
    infer_compiler = _imported("onediff.infer_compiler")
    for name in ("compile", "OneflowCompileOptions"):
        if not hasattr(infer_compiler, name):
            raise Unavailable(f"{_named('onediff')} lacks infer_compiler.{name}; needs onediff 1.2")
    asked = f"options {dict(options)!r}" if compiler == "oneflow" else f"mode {mode!r}"
    if options and compiler == "nexfort":
        asked += f" and options {dict(options)!r}"
    try:
        if compiler == "nexfort":
            nexfort_wheel.repair()
            given: Any = {"mode": mode, "dynamic": False, "fullgraph": True, "options": dict(options) or None}
        else:
            given = infer_compiler.OneflowCompileOptions(dynamic=False, **options)
        error = _relative_error(infer_compiler.compile, compiler, given)
    except Exception as problem:
        raise Unavailable(
            f"{_named(compiler)} cannot compile a module with {asked}: {first_line(problem)}", lasting=False
        ) from problem
    if not error < _LIMIT:
        told = f"{_named(compiler)} computes something else than eager: relative difference {error:.1e}"
        raise Unavailable(told, lasting=False)
    if compiler == "nexfort" and not _compiled_graphs():
        raise Unavailable(
            f"{_named(compiler)} ran the module eager; look for TORCHDYNAMO_DISABLE, TORCH_COMPILE_DISABLE or "
            "onediff's fallback_to_eager, of which False means eager",
            lasting=False,
        )


def _relative_error(compile_: Any, compiler: str, options: Any) -> float:
    """max|compiled - eager| / max|eager| of a small module."""
    import torch
    from torch import nn

    from accel_hidiff.parity import relative_error

    device = "cuda" if torch.cuda.is_available() else "cpu"
    module = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU()).to(device).eval()
    image = torch.randn(2, 4, 8, 12, device=device)
    with torch.no_grad():
        want = module(image)
        return relative_error(compile_(module, backend=compiler, options=options)(image), want)


def _imported(name: str) -> Any:
    package = name.split(".", maxsplit=1)[0]
    try:
        return import_module(name)
    except Exception as problem:
        if isinstance(problem, ModuleNotFoundError) and problem.name == package:
            raise Unavailable(f"{package} is not installed") from problem
        # Others import a compiler by themselves: a module of nexfort's wheel passes for triton.
        guilty = next((name for name in ("nexfort", "oneflow") if _is_in(problem.__traceback__, name)), package)
        raise Unavailable(f"{_named(guilty)} {_import_error(problem)}") from problem


def _is_in(trace: TracebackType | None, package: str) -> bool:
    """Whether an error came out of a package."""
    while trace is not None:
        if str(trace.tb_frame.f_globals.get("__name__", "")).split(".")[0] == package:
            return True
        trace = trace.tb_next
    return False


def _import_error(problem: Exception) -> str:
    if versions := re.findall(r"\((torch|triton)==([^)]+)\)", str(problem)):  # what nexfort says of itself
        (library, built), (_, found) = versions[0], versions[-1]
        return f"was built for {library} {built}, this environment has {found}"
    if "undefined symbol" in str(problem):
        return f"was built for another torch than {metadata.version('torch')}: {first_line(problem)}"
    return f"does not import: {first_line(problem)}"


def _missing_of_oneflow(path: str) -> str:
    """How much of a dotted path into oneflow is not there; "" where all is."""
    found = import_module("oneflow")
    walked: list[str] = []
    for part in path.split("."):
        walked.append(part)
        try:
            found = getattr(found, part) if hasattr(found, part) else import_module(".".join(["oneflow", *walked]))
        except ImportError:
            return ".".join(walked)
    return ""


def _compiled_graphs() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def _named(package: str) -> str:
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return package


def main() -> None:
    """The arguments are one JSON object: compiler, mode, options."""
    asked = json.loads(sys.argv[1])
    try:
        attempt(asked["compiler"], asked["mode"], asked["options"])
        answer = {"usable": True, "reason": "", "lasting": True}
    except Unavailable as unavailable:
        answer = {"usable": False, "reason": str(unavailable), "lasting": unavailable.lasting}
    print(json.dumps(answer), file=sys.__stdout__, flush=True)


if __name__ == "__main__":
    main()
