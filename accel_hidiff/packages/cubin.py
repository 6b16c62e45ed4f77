"""The GPU's code of one Triton kernel: for which architecture, how many registers, what spills. Plain Python."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from elftools.elf.elffile import ELFFile

# Attributes in the sections .nv.info of a cubin: what `cuobjdump -res-usage` prints (a test compares the two).
_REGISTERS: Final = 0x2F
_FRAME: Final = 0x11
_SIZED: Final = 4  # the format of an attribute with a length and a value behind it
_ABI_WITH_WIDE_FLAGS: Final = 8  # from this on the architecture stands in the second byte of the flags


@dataclass(frozen=True)
class Usage:
    """What a kernel needs of a multiprocessor.

    Attributes:
        registers: of a thread.
        stack_bytes: of a thread; Triton's kernels use a stack for spilled registers alone.
    """

    registers: int
    stack_bytes: int


def architecture_of(cubin: bytes) -> str:
    """ "sm_90": what it was assembled for."""
    header = ELFFile(io.BytesIO(cubin)).header
    flags = int(header["e_flags"])
    wide = int(header["e_ident"]["EI_ABIVERSION"]) >= _ABI_WITH_WIDE_FLAGS
    return f"sm_{(flags >> 8 if wide else flags) & 0xFF}"


@lru_cache(maxsize=256)
def usage_of(cubin: bytes) -> dict[str, Usage]:
    """What each function in it needs, by name."""
    file: Any = ELFFile(io.BytesIO(cubin))
    names = [symbol.name for symbol in file.get_section_by_name(".symtab").iter_symbols()]
    functions = {name.removeprefix(".text.") for name in (s.name for s in file.iter_sections()) if name[:6] == ".text."}
    found: dict[int, dict[str, int]] = {_REGISTERS: {}, _FRAME: {}}
    for attribute, symbol, value in _attributes(file.get_section_by_name(".nv.info").data()):
        if attribute in found and symbol < len(names):
            found[attribute][names[symbol]] = value
    return {name: Usage(found[_REGISTERS].get(name, 0), found[_FRAME].get(name, 0)) for name in sorted(functions)}


def _attributes(data: bytes) -> list[tuple[int, int, int]]:
    """(attribute, symbol's number, value) of those that say something of a symbol."""
    found = []
    at = 0
    while at + 4 <= len(data):
        kind, attribute, size = struct.unpack_from("<BBH", data, at)
        at += 4
        if kind == _SIZED:
            if size == 8:
                found.append((attribute, *struct.unpack_from("<II", data, at)))
            at += size
    return found
