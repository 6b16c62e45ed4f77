"""What two fills of a cache, and two checkouts, are compared by."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import harness as h
from benchmarks.against import compare_checkouts
from benchmarks.fill import artifacts, compared
from benchmarks.waiting import watched
from compile_cache import CacheKey, CompileCache


def filled(folder: Path, contents: dict[str, bytes]) -> CompileCache:
    cache = CompileCache(folder)
    for name, content in contents.items():
        cache.get_or_build(
            CacheKey({"name": name}), lambda place, content=content: (place / "p").write_bytes(content) and None
        )
    return cache


def test_two_fills_are_the_same_if_every_byte_is(tmp_path: Path) -> None:
    contents = {"a": b"one", "b": b"two", "c": b"two"}
    first, second = (filled(tmp_path / name, contents) for name in ("first", "second"))
    assert compared(first, second) == {"same_keys": 3, "same_bytes": 3}
    assert len(artifacts(first)) == 2  # two keys name the same


@pytest.mark.parametrize("other", [{"a": b"one"}, {"a": b"one", "b": b"other"}, {"a": b"one", "c": b"two"}])
def test_anything_else_is_wrong(other: dict[str, bytes], tmp_path: Path) -> None:
    first, second = filled(tmp_path / "first", {"a": b"one", "b": b"two"}), filled(tmp_path / "second", other)
    with pytest.raises(h.WrongOutput, match=r"expected the 2 keys of the first fill with the same bytes, got \d of"):
        compared(first, second)


def test_checkouts_take_turns_and_their_medians_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["against"])
    report, order = h.Report(tmp_path / "out.json", True), []

    def run(name: str, root: Path) -> dict[str, float]:
        order.append(name)
        return {"wall_s": {"before": 10.0, "now": 4.0}[name] + len(order), "zero_ms": 0.0}

    compare_checkouts(report, "demo", 3, {"before": tmp_path, "now": tmp_path}, run)
    assert order == ["before", "now", "now", "before", "before", "now"]
    last = json.loads((tmp_path / "out.json").read_text())["records"][-1]
    assert (last["wall_s_before"], last["wall_s_now"], last["wall_s_ratio"]) == (14.0, 7.0, 0.5)
    assert last["zero_ms_ratio"] is None


def test_a_thread_that_waits_has_waited() -> None:
    with watched() as gaps:
        pass
    assert gaps and all(0.001 <= gap < 10 for gap in gaps)
