"""Artifacts tuned where they serve: compiled once more, compared, the faster one kept under the variant."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import accel_hidiff as ah
from accel_hidiff import tuning
from accel_hidiff.backends.aot import AOTBackend, tuned_key
from accel_hidiff.errors import BadInput, CompileFailed
from compile_cache import CompileCache
from tests.compiled.conftest import CONFIG, STEPS, request

SIZES = [(128, 192)]


@pytest.fixture
def own_cache(cache_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cache_dir, tmp_path / "cache"))


def accelerated(pipe: Any, cache: Path, **options: Any) -> Any:
    return ah.accelerate(pipe, hidiffusion=CONFIG, cache=CompileCache(cache), on_miss="error", **options)


def test_an_artifact_that_is_compiled_the_same_way_is_kept(make_pipe: Any, own_cache: Path) -> None:
    """On a CPU there is nothing to choose: the same artifact comes of it, and is noted as the one to use."""
    handle = accelerated(make_pipe(), own_cache)
    with handle.stats.expect(compiles=0):
        rows = tuning.tune(handle, SIZES, STEPS, rounds=1)
    assert {row.state for row in rows} <= {"kept", "tuned"} and all(row.before_ms > 0 for row in rows)
    assert {row.state for row in tuning.tune(handle, SIZES, STEPS, rounds=1)} == {"known"}
    handle.remove()


def test_the_variant_is_looked_for_first(make_pipe: Any, own_cache: Path) -> None:
    handle = accelerated(make_pipe(), own_cache)
    needed = handle.needed(SIZES, (STEPS,), batch_sizes=(2,))
    binder, cache = handle._dispatcher.binder, handle.cache
    plain, other = (binder.key(graph) for graph in list(needed.distinct.values())[:2])
    cache.link(tuned_key(plain), cache.get(other))  # told apart by what they hold
    handle.remove()
    for variant, expected in ((None, plain), ("tuned", other)):
        again = accelerated(make_pipe(), own_cache, variant=variant)
        entry = again._dispatcher.binder.entry(plain)
        assert entry.files == cache.get(expected).files
        again.remove()


def test_requests_are_served_with_the_variant_and_without_it(make_pipe: Any, own_cache: Path) -> None:
    handle = accelerated(make_pipe(), own_cache, variant="tuned")  # nothing is tuned: what was compiled serves
    with handle.stats.expect(hits=STEPS, eager_calls=0):
        request(handle.pipe)
    handle.remove()


def test_another_result_is_refused(make_pipe: Any, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = accelerated(make_pipe(), own_cache)
    bind = AOTBackend.bind
    made = []

    def drifting(self: AOTBackend, graph: Any, entry: Any) -> Any:
        """Every second artifact that is bound computes something else."""
        bound = bind(self, graph, entry)
        made.append(bound)
        if len(made) % 2 == 0:
            return replace(bound, call=lambda *inputs: bound.call(*inputs) * 1.01)
        return bound

    monkeypatch.setattr(AOTBackend, "bind", drifting)
    with pytest.raises(CompileFailed, match=r"expected the same of both artifacts, within 0\.001, they differ by 0\.0"):
        tuning.tune(handle, SIZES, STEPS, rounds=1)
    first = next(iter(handle.needed(SIZES, (STEPS,), batch_sizes=(2,)).distinct.values()))
    assert handle.cache.get(tuned_key(handle._dispatcher.binder.key(first))) is None
    handle.remove()


def test_bad_input(make_pipe: Any, own_cache: Path) -> None:
    handle = accelerated(make_pipe(), own_cache)
    with pytest.raises(BadInput, match="expected at least one round, got 0"):
        tuning.tune(handle, SIZES, STEPS, rounds=0)
    handle.remove()
    eager = ah.accelerate(make_pipe(), hidiffusion=CONFIG, backend="eager")
    with pytest.raises(BadInput, match='expected backend "aot", got'):
        tuning.tune(eager, SIZES, STEPS)
    eager.remove()
    with pytest.raises(BadInput, match="variant: expected"):
        ah.accelerate(make_pipe(), cache=own_cache, variant="best")
