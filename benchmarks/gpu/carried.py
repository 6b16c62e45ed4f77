"""What a run takes along: packages of several variants, sources of other checkouts, wheels of what the machine lacks.

A package travels under its *slot*, the graph that it is for, less who compiles it and how. What another checkout
compiled runs over that checkout's own sources.
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
TREES: Final = "trees"
_SOURCES: Final = (
    "accel_hidiff",
    "compile_cache",
    "benchmarks",
    ":!accel_hidiff/demo/trained_model",
    ":!benchmarks/results",
)
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


def pack(
    folder: Path,
    variants: Mapping[Variant, Sequence[Package]],
    wheels: Sequence[Path],
    root: Path,
    trees: Mapping[str, Path] | None = None,
) -> int:
    """Writes packages and wheels to a folder; bytes of it and the repository.

    Args:
        folder: made, or empty.
        variants: their packages.
        wheels: files that are copied.
        root: of the repository, which travels too: what git tracks.
        trees: name -> another checkout, whose sources are taken along.

    Raises:
        BadLuggage: the folder holds something, or it is too much; what was written is removed then.
    """
    if folder.exists() and any(folder.iterdir()):
        raise BadLuggage(f"--pack: expected a new or an empty folder, got {folder}, which holds something; remove it")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _write_archive(folder / _ARCHIVE, variants, trees or {})
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


def _write_archive(path: Path, variants: Mapping[Variant, Sequence[Package]], trees: Mapping[str, Path]) -> None:
    manifest = [asdict(variant) for variant in variants]
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
                name = f"packages/{variant.name}/{package.slot}"
                text.write_text(json.dumps({"key": package.key, "notes": dict(package.notes)}))
                archive.add(text, f"{name}/{_NOTES}")
                for file, place in package.files.items():
                    archive.add(place, f"{name}/files/{file}")
        for tree, checkout in trees.items():
            for file in _listed(checkout, *_SOURCES):
                archive.add(checkout / file, f"{TREES}/{tree}/{file}")


def tracked_bytes(root: Path) -> int:
    """Bytes of the files of a checkout, less what git ignores.

    Raises:
        BadLuggage: it is no checkout.
    """
    return sum((root / name).stat().st_size for name in _listed(root))


def _listed(root: Path, *paths: str) -> list[str]:
    """The files of a checkout that git tracks or does not ignore, below these paths; BadLuggage if it is none."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *paths]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        raise BadLuggage(f"--pack: expected a git checkout, got {root}; pack from one")
    return [name for name in dict.fromkeys(listed.stdout.split("\0")) if name and (root / name).is_file()]


def unpack(folder: Path, into: Path) -> tuple[Variant, ...]:
    """Unpacks what `pack` wrote into a folder: packages, other sources, and wheels (below `site`). The variants.

    Raises:
        BadLuggage: it is no such folder.
    """
    archive = folder / _ARCHIVE
    if not archive.is_file():
        raise BadLuggage(f"--carried: expected a folder that --pack wrote, got one without {_ARCHIVE}: {folder}")
    with tarfile.open(archive) as members:
        members.extractall(into, filter="data")
    for wheel in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(wheel) as files:
            files.extractall(into / "site")
    return tuple(Variant(**row) for row in json.loads((into / _MANIFEST).read_text(encoding="utf-8")))


def packages_of(carried: Path, name: str) -> dict[str, Package]:
    """The packages of a variant below a folder of `unpack`, by their slots."""
    found = {}
    for folder in sorted((carried / "packages" / name).iterdir()):
        told = json.loads((folder / _NOTES).read_text(encoding="utf-8"))
        files = {path.name: path for path in (folder / "files").iterdir()}
        found[folder.name] = Package(folder.name, told["key"], files, told["notes"])
    return found
