"""A repair of nexfort's wheel on PyPI: modules that it needs lie beside the package, where it does not look.

nexfort 0.1.dev330 installs `triton.cpython-*.so`, `triton_helpers.cpython-*.so` and
`nexfort_codegen_extension.cpython-*.so` at the top of site-packages. They are the modules of
`nexfort.inductor.codegen`, which every mode but "jit" imports.
"""

from __future__ import annotations

import atexit
import importlib
import importlib.util
import shutil
import sys
import tempfile
import types
from importlib import metadata
from pathlib import Path
from typing import Final

PACKAGE: Final = "nexfort.inductor.codegen"
_MODULES: Final = ("triton", "triton_helpers", "nexfort_codegen_extension")


def repair() -> None:
    """Makes `nexfort.inductor.codegen` importable where the wheel put it elsewhere; imports nexfort."""
    try:
        if PACKAGE in sys.modules or importlib.util.find_spec(PACKAGE) is not None:
            return
    except ModuleNotFoundError:  # a release without nexfort.inductor
        return
    strays = {path.name.split(".")[0]: path for path in _top_level_files("nexfort")}
    if any(name not in strays for name in _MODULES):
        return
    folder = Path(tempfile.mkdtemp(prefix="nexfort-codegen-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name in _MODULES:
        (folder / strays[name].name).symlink_to(strays[name])
    package = types.ModuleType(
        PACKAGE, f"The modules that nexfort's wheel installs beside the package: see {__name__}."
    )
    package.__path__ = [str(folder)]
    sys.modules[PACKAGE] = package
    importlib.import_module("nexfort.inductor").codegen = package  # type: ignore[attr-defined]


def _top_level_files(distribution: str) -> list[Path]:
    """Extension modules that a distribution installed beside its packages."""
    files = metadata.distribution(distribution).files or []
    return [Path(str(file.locate())).resolve() for file in files if len(file.parts) == 1 and file.suffix == ".so"]
