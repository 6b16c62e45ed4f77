"""The GPU's code of a kernel as an object file to link: the same bytes wherever it is made.

Inductor has `ld` do it, which orders names by the path of the file.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

_ASSEMBLY = """\
.section .rodata, "a"
.balign 16
.globl __{kernel}_start
__{kernel}_start:
.incbin "{cubin}"
.globl __{kernel}_end
__{kernel}_end:
.globl __{kernel}_size
.set __{kernel}_size, __{kernel}_end - __{kernel}_start
.section .note.GNU-stack, "", @progbits
"""


def embedded(cubin: str, kernel: str, *tools: str) -> str:
    """The path of an object file with a kernel's code between `__KERNEL_start` and `__KERNEL_end`.

    Args:
        cubin: path of the code.
        kernel: its name.
        tools: the linker's and objcopy's commands, which are not needed.
    """
    source, made = Path(f"{cubin}.s"), f"{cubin}.o"
    source.write_text(_ASSEMBLY.format(kernel=kernel, cubin=cubin))
    command = [*shlex.split(os.environ.get("CXX", "g++")), "-c", "-x", "assembler", str(source), "-o", made]
    subprocess.run(command, capture_output=True, text=True, check=True)
    return made
