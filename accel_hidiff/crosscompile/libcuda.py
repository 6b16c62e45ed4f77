"""A library to link against in the place of NVIDIA's driver, which is not installed where there is no GPU.

It has the driver's names, read off `cuda.h`, and no code, like the stubs that come with NVIDIA's toolkit. It is linked
under the driver's own name, so that a package asks for `libcuda.so.1` where it is loaded.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Final

from accel_hidiff.errors import CompileFailed

DRIVER: Final = "libcuda.so.1"


def driver_functions(header: str) -> list[str]:
    """The functions that the text of `cuda.h` declares, and their second versions, sorted.

    >>> driver_functions("CUresult CUDAAPI cuInit(unsigned int Flags);")
    ['cuInit', 'cuInit_v2']
    """
    names = set(re.findall(r"\b(cu[A-Z]\w+)\(", header))
    return sorted(names | {f"{name}_v2" for name in names})


def build_stub(header: Path, folder: Path, compiler: str) -> Path:
    """Builds `libcuda.so` in a folder; returns it.

    Args:
        header: NVIDIA's `cuda.h`.
        folder: an existing one, to give to the linker.
        compiler: a C++ compiler's command.

    Raises:
        CompileFailed: the compiler cannot build it.
    """
    library = folder / "libcuda.so"
    code = "".join(f'extern "C" void {name}() {{}}\n' for name in driver_functions(header.read_text()))
    command = [*shlex.split(compiler), "-shared", "-fPIC", "-xc++", "-", "-o", str(library), f"-Wl,-soname,{DRIVER}"]
    done = subprocess.run(command, input=code, capture_output=True, text=True, check=False)
    if done.returncode:
        line = (done.stderr.strip().splitlines() or ["no message"])[0]
        raise CompileFailed(f"a stand-in for {DRIVER} cannot be built: {line}")
    return library
