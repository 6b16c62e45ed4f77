"""Flipped, truncated and missing bytes in every kind of file of a cache: detected, no crash, no wrong image."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import accel_hidiff as ah
from compile_cache import CompileCache, unpacked
from tests.compiled.conftest import STEPS, accelerate_strict, relative_difference, request
from tests.conftest import ARTIFACTS


@pytest.fixture(scope="module")
def right_latents(make_pipe: Any) -> torch.Tensor:
    eager = make_pipe()
    ah.apply_hidiffusion(eager)
    return request(eager)


def files_of(cache: Path, kind: str) -> list[Path]:
    found = sorted(path for path in (cache / "v1" / kind).rglob("*") if path.is_file())
    assert found
    return found


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x40
    path.write_bytes(data)


def damage_all(cache: Path, kind: str, how: str) -> None:
    randomness = random.Random(kind + how)
    for path in files_of(cache, kind):
        if how == "truncated":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        elif how == "empty":
            path.write_bytes(b"")
        else:
            flip(path, randomness.randrange(path.stat().st_size))


@pytest.mark.parametrize("how", ["flipped", "truncated", "empty"])
@pytest.mark.parametrize("kind", ["actions", "blobs"])
def test_damage_is_a_miss_with_the_reason_and_eager_is_right(
    own_cache: Path, make_pipe: Any, right_latents: torch.Tensor, kind: str, how: str
) -> None:
    damage_all(own_cache, kind, how)
    assert not CompileCache(own_cache).verify().ok
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read_only = CompileCache(own_cache, read_only=True)  # nothing is set aside: every check meets the damage
        strict = ah.accelerate(make_pipe(), hidiffusion=ah.HiDiffusionConfig(), cache=read_only, on_miss="error")
        with pytest.raises(ah.GraphMiss, match="damaged"):
            request(strict.pipe)
        lenient = ah.accelerate(
            make_pipe(), hidiffusion=ah.HiDiffusionConfig(), cache=CompileCache(own_cache), on_miss="eager"
        )
        assert torch.equal(request(lenient.pipe), right_latents)
    assert lenient.stats.eager_calls == STEPS


@pytest.mark.parametrize("kind", ["actions", "blobs"])
def test_a_flip_in_any_one_file_never_gives_a_wrong_image(
    own_cache: Path, make_pipe: Any, right_latents: torch.Tensor, kind: str
) -> None:
    for number, path in enumerate(files_of(own_cache, kind)):
        whole = path.read_bytes()
        flip(path, (number * 7919) % len(whole))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cache = CompileCache(own_cache, read_only=True)
            handle = ah.accelerate(make_pipe(), hidiffusion=ah.HiDiffusionConfig(), cache=cache, on_miss="eager")
            assert relative_difference(request(handle.pipe), right_latents) < 5e-3
        assert handle.stats.compiles == 0
        path.write_bytes(whole)


@pytest.mark.usefixtures("nothing_loaded")
def test_an_artifact_changed_between_check_and_load_is_refused(
    own_cache: Path, make_pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes that are loaded are the bytes whose checksum was verified."""
    handle = accelerate_strict(make_pipe(), own_cache)
    handle.explain(128, 192, STEPS)  # entries are verified and remembered here
    monkeypatch.setattr(unpacked._Own, "directory", None)  # nothing is unpacked yet
    for path in files_of(own_cache, "blobs"):
        flip(path, 1000)
    with pytest.raises(Exception, match=r"expected .* stored bytes"):
        request(handle.pipe)


def test_a_missing_blob_is_named_and_rebuilt(own_cache: Path, make_pipe: Any) -> None:
    """One resnet's blob goes away; precompiling compiles that one artifact and no other."""
    cache = CompileCache(own_cache)
    entry = next(entry for entry in cache.entries() if entry.factors.get("region") == "resnet")
    blob = entry.files["package.pt2"].sha256
    next((own_cache / "v1" / "blobs").rglob(blob)).unlink()
    assert not cache.verify().ok
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        handle = ah.accelerate(make_pipe(), hidiffusion=ah.HiDiffusionConfig(), cache=cache)
        report = handle.precompile([(128, 192)], STEPS)
    assert (report.compiled, report.found) == (1, ARTIFACTS - 1)
    served = accelerate_strict(make_pipe(), own_cache)
    request(served.pipe)
    assert served.stats.hits == STEPS
