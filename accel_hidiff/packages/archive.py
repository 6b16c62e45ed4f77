"""The file of a package (`.pt2`): a zip archive of the shared library, Inductor's sources, and notes.

`rewrite` gives it one form: names, times, the folders of the machine that compiled it and the compilers' command lines
go, so that two builds of one graph are the same bytes, and nothing tells of where they were made. Sources are packed.
"""

from __future__ import annotations

import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from accel_hidiff.errors import CompileFailed

_ROOT: Final = "package"
_EPOCH: Final = (1980, 1, 1, 0, 0, 0)  # the first that a zip archive can say
_STEM: Final = re.compile(r"\bc[a-z2-7]{51}\b")  # the names that Inductor gives its files: SHA-256 in base 32
_COMMANDS: Final = re.compile(r"^// (?:Compile cmd|Link cmd|g\+\+ |c\+\+ |clang).*\n?", re.MULTILINE)
_PLACE: Final = re.compile(r"(?<![\w./-])/(?:[\w.+-]+/)+(?=[\w.+-]+)")  # the folders of an absolute path
_SERIALIZATION_ID: Final = ".data/serialization_id"


@dataclass(frozen=True)
class Archive:
    """What is in a package.

    Attributes:
        library: bytes of the shared library.
        wrapper: Inductor's C++ source, with its Triton kernels as comments.
        cubins: file name -> the GPU's code, where it is not in the library.
        size: bytes of the file.
    """

    library: bytes
    wrapper: str
    cubins: dict[str, bytes]
    size: int


def read_archive(path: Path) -> Archive:
    """Opens a package.

    Raises:
        CompileFailed: it is not what AOTInductor makes.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            library = next(name for name in names if name.endswith(".so"))
            wrapper = next((name for name in names if name.endswith("wrapper.cpp")), None)
            wrapper = wrapper or next(name for name in names if name.endswith(".cpp"))
            cubins = {name.rsplit("/", 1)[-1]: archive.read(name) for name in names if name.endswith(".cubin")}
            return Archive(archive.read(library), archive.read(wrapper).decode(), cubins, path.stat().st_size)
    except (zipfile.BadZipFile, StopIteration, OSError) as problem:
        raise CompileFailed(
            f"{path}: expected a package of AOTInductor, got {problem or 'an archive without one'}"
        ) from problem


def rewrite(path: Path) -> None:
    """Gives a package its one form, in place."""
    part = path.with_suffix(".part")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(part, "w") as new:
        top = old.namelist()[0].split("/")[0]
        stems = _stems(old.namelist())
        for name in sorted(old.namelist(), key=lambda name: _renamed(name, top, stems)):
            data = old.read(name)
            if name.endswith(_SERIALIZATION_ID):
                data = b"0" * len(data)
            if name.endswith(".cpp"):
                text = _PLACE.sub("", _COMMANDS.sub("", _renamed(data.decode(), top, stems)))
                data = f"{text.rstrip()}\n".encode()  # each compilation of a file adds its command, and an empty line
            entry = zipfile.ZipInfo(_renamed(name, top, stems), _EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED if name.endswith(".cpp") else zipfile.ZIP_STORED
            entry.external_attr = 0o644 << 16
            new.writestr(entry, data)
    part.replace(path)


def _stems(names: list[str]) -> dict[str, str]:
    """Inductor's name of each set of files -> "model", and "model1", ... for others."""
    found = dict.fromkeys(stem for name in names for stem in _STEM.findall(name) if name.endswith((".so", ".cpp")))
    order = sorted(found, key=lambda stem: (not any(stem in name and name.endswith(".so") for name in names), stem))
    return {stem: f"model{number or ''}" for number, stem in enumerate(order)}


def _renamed(text: str, top: str, stems: dict[str, str]) -> str:
    text = _STEM.sub(lambda match: stems.get(match[0], match[0]), text)
    return f"{_ROOT}/{text.removeprefix(f'{top}/')}" if text.startswith(f"{top}/") else text
