"""The shared library of a package: what it needs of the machine that loads it, and the GPU's code in it."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from elftools.elf.elffile import ELFFile
from packaging.version import Version

_KERNEL: Final = re.compile(r"__(\w+)_start")
_VERSIONED: Final = re.compile(r"(GLIBC|GLIBCXX)_([\d.]+)$")


@dataclass(frozen=True)
class NativeFacts:
    """What a shared library says of itself.

    Attributes:
        libraries: that it asks for by name.
        undefined: functions and data that it takes from them.
        versions: the newest symbol version that it needs of "GLIBC" and "GLIBCXX".
        machine: "x86_64" or another one.
        cubins: kernel -> the GPU's code, where it is embedded.
    """

    libraries: tuple[str, ...]
    undefined: tuple[str, ...]
    versions: dict[str, str]
    machine: str
    cubins: dict[str, bytes]


def read_native(library: bytes) -> NativeFacts:
    """Reads the bytes of a shared library (ELF)."""
    file: Any = ELFFile(io.BytesIO(library))
    symbols = list(file.get_section_by_name(".dynsym").iter_symbols())
    needed = [tag.needed for tag in file.get_section_by_name(".dynamic").iter_tags("DT_NEEDED")]
    undefined = [
        symbol.name
        for symbol in symbols
        if symbol["st_shndx"] == "SHN_UNDEF" and symbol.name and symbol["st_info"]["bind"] == "STB_GLOBAL"
    ]
    machine = {"EM_X86_64": "x86_64", "EM_AARCH64": "aarch64"}.get(file.header["e_machine"], file.header["e_machine"])
    cubins = dict(_cubins(file, library, {symbol.name: symbol["st_value"] for symbol in symbols}))
    return NativeFacts(tuple(needed), tuple(sorted(undefined)), _versions(file), machine, cubins)


def _versions(file: Any) -> dict[str, str]:
    """The newest version of each library's symbols that are asked for."""
    newest: dict[str, str] = {}
    section = file.get_section_by_name(".gnu.version_r")
    for _, needs in section.iter_versions() if section is not None else ():
        for need in needs:
            if (match := _VERSIONED.match(need.name)) is not None:
                library, version = match.groups()
                newest[library] = max(newest.get(library, "0"), version, key=Version)
    return newest


def _cubins(file: Any, library: bytes, addresses: dict[str, int]) -> Iterator[tuple[str, bytes]]:
    segments = [segment.header for segment in file.iter_segments("PT_LOAD")]

    def offset(address: int) -> int:
        for segment in segments:
            if segment["p_vaddr"] <= address <= segment["p_vaddr"] + segment["p_filesz"]:
                return int(address - segment["p_vaddr"] + segment["p_offset"])
        raise ValueError(f"address {address:#x} is in no segment")

    for name, address in sorted(addresses.items()):
        match = _KERNEL.fullmatch(name)
        if match is not None and (end := addresses.get(f"__{match[1]}_end")) is not None:
            code = library[offset(address) : offset(end)]
            if code.startswith(b"\x7fELF"):
                yield match[1], code
