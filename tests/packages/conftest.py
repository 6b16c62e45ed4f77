"""Real packages for sm_90, read where no CUDA build of torch is."""

from __future__ import annotations

import json
import lzma
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from accel_hidiff.packages.facts import PackageFacts, read_package

DATA = Path(__file__).parent.parent / "data" / "packages"


@dataclass(frozen=True)
class Stored:
    """A package on the disk, its notes, and what is in it."""

    path: Path
    notes: dict[str, Any]
    facts: PackageFacts


def unpack(name: str, folder: Path) -> Stored:
    path = folder / f"{name}.pt2"
    path.write_bytes(lzma.decompress((DATA / f"{name}.pt2.xz").read_bytes()))
    notes = json.loads((DATA / f"{name}.json").read_text())
    return Stored(path, notes, read_package(path, notes["inputs"]))


@pytest.fixture(scope="session")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    return unpack("resnet", tmp_path_factory.mktemp("packages"))


@pytest.fixture(scope="session")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    return unpack("transformer", tmp_path_factory.mktemp("packages"))
