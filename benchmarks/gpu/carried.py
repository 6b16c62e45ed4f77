"""What a run takes along: packages of several variants, and wheels of what the machine lacks.

A package travels under its *slot*: the graph that it is for, whatever sources and options compiled it. So an idea can
be compiled by another checkout, and runs beside what it is to replace, as long as it leaves the graph's inputs and
ranges as they are.
"""

from __future__ import annotations

import json
import lzma
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.gpu.setting import Variant

LIMIT: Final = 64 * 2**20  # bytes of the repository and what is carried beside it
LISTING: Final = "listing.json"
_ARCHIVE: Final = "packages.tar.xz"
_MANIFEST: Final = "manifest.json"
_NOTES: Final = "entry.json"


class BadLuggage(ValueError):
    """It cannot be packed or unpacked; the message is one line."""


@dataclass(frozen=True)
class Package:
    """One artifact of a variant.

    Attributes:
        slot: of the graph that it is for.
        key: digest of the key that it has where it was compiled.
        files: name -> where it lies.
        notes: of its entry.
    """

    slot: str
    key: str
    files: Mapping[str, Path]
    notes: Mapping[str, Any]


def pack(folder: Path, variants: Mapping[Variant, Sequence[Package]], wheels: Sequence[Path], root: Path) -> int:
    """Writes packages and wheels to a folder; bytes of it and the repository.

    Args:
        folder: made, or empty.
        variants: their packages.
        wheels: files that are copied.
        root: of the repository, which travels too: what git tracks.

    Raises:
        BadLuggage: the folder holds something, or it is too much; what was written is removed then.
    """
    if folder.exists() and any(folder.iterdir()):
        raise BadLuggage(f"--pack: expected a new or an empty folder, got {folder}, which holds something; remove it")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _write_archive(folder / _ARCHIVE, variants)
        for wheel in wheels:
            shutil.copy(wheel, folder)
        repository = tracked_bytes(root)
        carried = sum(path.stat().st_size for path in folder.iterdir())
        if repository + carried > LIMIT:
            told = f"{repository / 2**20:.1f} of the repository and {carried / 2**20:.1f} beside it"
            raise BadLuggage(f"--pack: expected at most {LIMIT / 2**20:.0f} MiB, got {told}; take fewer variants along")
    except BaseException:
        shutil.rmtree(folder)
        raise
    return repository + carried


def read_listing(folder: Path) -> dict[Variant, list[Package]]:
    """The variants that `listing` wrote to a folder."""
    found = {}
    for row in json.loads((folder / LISTING).read_text(encoding="utf-8")):
        packages = []
        for told in row["packages"]:
            files = {path.name: path for path in (folder / row["name"] / told["slot"]).iterdir()}
            packages.append(Package(told["slot"], told["key"], files, told["notes"]))
        found[Variant(row["name"], row["dtype"], row["memory_format"])] = packages
    return found


def _write_archive(path: Path, variants: Mapping[Variant, Sequence[Package]]) -> None:
    manifest = [{**asdict(variant), "slots": [p.slot for p in packages]} for variant, packages in variants.items()]
    with (
        tempfile.TemporaryDirectory() as scratch,
        lzma.open(path, "wb", preset=6) as out,
        tarfile.open(fileobj=out, mode="w|") as archive,
    ):
        text = Path(scratch) / "text"
        text.write_text(json.dumps(manifest))
        archive.add(text, _MANIFEST)
        for variant, packages in variants.items():
            for package in packages:
                name = f"{variant.name}/{package.slot}"
                text.write_text(json.dumps({"key": package.key, "notes": dict(package.notes)}))
                archive.add(text, f"{name}/{_NOTES}")
                for file, place in package.files.items():
                    archive.add(place, f"{name}/files/{file}")


def tracked_bytes(root: Path) -> int:
    """Bytes of the files that git tracks below a folder.

    Raises:
        BadLuggage: it is no checkout.
    """
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        raise BadLuggage(f"--pack: expected a git checkout, got {root}; pack from one")
    paths = (root / name for name in listed.stdout.split("\0") if name)
    return sum(path.stat().st_size for path in paths if path.is_file())


def unpack(folder: Path, into: Path) -> tuple[Variant, ...]:
    """Unpacks what `pack` wrote: packages below `into / "packages"`, wheels below `into / "site"`. The variants.

    Raises:
        BadLuggage: it is no such folder.
    """
    archive = folder / _ARCHIVE
    if not archive.is_file():
        raise BadLuggage(f"--carried: expected a folder that --pack wrote, got one without {_ARCHIVE}: {folder}")
    packages = into / "packages"
    with tarfile.open(archive) as members:
        members.extractall(packages, filter="data")
    for wheel in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(wheel) as files:
            files.extractall(into / "site")
    manifest = json.loads((packages / _MANIFEST).read_text(encoding="utf-8"))
    return tuple(Variant(row["name"], row["dtype"], row["memory_format"]) for row in manifest)


def packages_of(carried: Path, name: str) -> dict[str, Package]:
    """The packages of a variant below a folder of `unpack`, by their slots."""
    found = {}
    for folder in sorted((carried / "packages" / name).iterdir()):
        told = json.loads((folder / _NOTES).read_text(encoding="utf-8"))
        files = {path.name: path for path in (folder / "files").iterdir()}
        found[folder.name] = Package(folder.name, told["key"], files, told["notes"])
    return found
