"""What a checkout weighs: it travels to machines that are at hand for minutes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIMIT = 40 << 20  # bytes


def test_the_repository_is_small() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]
    sizes = sorted(((path.stat().st_size, str(path.relative_to(ROOT))) for path in files), reverse=True)
    assert sum(size for size, _ in sizes) < LIMIT, f"the largest: {sizes[:5]}"
