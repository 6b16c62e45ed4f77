"""The trained model end to end: what ships is what the card says, and pictures are the golden ones, eager and compiled.

Tolerances: rounding differs between machines and between eager and compiled code, and twelve steps amplify it. A
picture may differ from the golden one by 0.01 in the mean and 0.1 in all but a thousandth of its values (of a range of
1); its structural similarity (Wang et al. 2004: what an eye would see, local contrast and structure) is at least 0.98;
and it has to be read as the same objects.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import structural_similarity

import accel_hidiff as ah
from accel_hidiff.cli import run
from accel_hidiff.demo import trained_model
from accel_hidiff.demo.serve import serve
from accel_hidiff.demo.training.card import digests
from benchmarks.effect.reading import read
from compile_cache import CompileCache
from tests.demo.golden import FOLDER, REQUESTS, STEPS, Request, eager, picture, pipeline
from tests.needs import needs_aot


@pytest.fixture(scope="module")
def pipe() -> Any:
    return pipeline()


def assert_golden(image: np.ndarray, request: Request) -> None:
    golden = np.asarray(Image.open(FOLDER / f"{request.name}.png"))
    difference = np.abs(image - golden / 255.0)
    assert difference.mean() < 0.01 and np.quantile(difference, 0.999) < 0.1
    assert structural_similarity(image, golden / 255.0, channel_axis=2, data_range=1.0) > 0.98
    seen, known = (read(pixels, request.kinds) for pixels in ((image * 255).round().astype(np.uint8), golden))
    assert (seen.objects, seen.colours_right, seen.shapes_right) == (
        known.objects,
        known.colours_right,
        known.shapes_right,
    )


def test_the_weights_are_the_cards() -> None:
    card = (trained_model() / "README.md").read_text()
    weights = digests(trained_model())
    assert set(weights) == {
        f"{part}/{name}.safetensors"
        for part, name in (
            ("unet", "diffusion_pytorch_model"),
            ("vae", "diffusion_pytorch_model"),
            ("text_encoder", "model"),
            ("text_encoder_2", "model"),
        )
    }
    assert all(digest in card for digest in weights.values())
    assert sum(path.stat().st_size for path in trained_model().rglob("*") if path.is_file()) <= 25_000_000


def test_it_is_recognized_as_sdxl(pipe: Any) -> None:
    patch = ah.apply_hidiffusion(pipe)
    try:
        topologies = [str(phase.topology) for phase in patch.plan(256, 256, 50)]
        assert topologies == ["windowed+dilated", "windowed+pooled", "windowed"]
    finally:
        ah.remove_hidiffusion(pipe)


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda request: request.name)
def test_eager_draws_the_golden_pictures(pipe: Any, request_: Request) -> None:
    assert_golden(eager(pipe, request_), request_)


def test_the_golden_pictures_show_what_was_asked_for() -> None:
    """At four times the trained area shapes need not be right (benchmarks/effect counts how often); the rest is."""
    for request in REQUESTS:
        reading = read(np.asarray(Image.open(FOLDER / f"{request.name}.png")), request.kinds)
        assert reading.count_right and reading.colours_right, request.name
        assert reading.shapes_right or request.hidiffusion, request.name


@pytest.mark.parametrize(
    "config",
    [
        None,
        ah.HiDiffusionConfig(windowed=False),
        ah.HiDiffusionConfig(t1_ratio=0.5, t2_ratio=0.5),
        ah.HiDiffusionConfig(t2_ratio=0.25),
    ],
    ids=["none", "no windows", "dilated in half of the steps", "dilated too long"],
)
def test_another_picture_is_not_taken_for_golden(pipe: Any, config: ah.HiDiffusionConfig | None) -> None:
    """The comparison can fail: a wrong phase or missing windows are far outside of the tolerance."""
    square, *_ = (request for request in REQUESTS if request.name == "square")
    if config is not None:
        ah.apply_hidiffusion(pipe, config=config)
    try:
        with pytest.raises(AssertionError):
            assert_golden(picture(pipe, square), square)
    finally:
        if config is not None:
            ah.remove_hidiffusion(pipe)


@pytest.fixture(scope="module")
def compiled(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compile cache that was filled for 256x256."""
    location = tmp_path_factory.mktemp("compiled")
    handle = ah.accelerate(pipe, hidiffusion=ah.HiDiffusionConfig(), cache=location)
    handle.precompile([(256, 256)], num_inference_steps=STEPS)
    handle.remove()
    return location


@needs_aot
@pytest.mark.slow
def test_compiled_draws_the_golden_pictures(pipe: Any, compiled: Path) -> None:
    """What was compiled for one size serves all of them, with and without CFG++."""
    cache = CompileCache(compiled)
    for request in REQUESTS:
        if not request.hidiffusion:
            continue
        guidance = None if request.lam is None else ah.CFGPlusPlusConfig(scale=request.lam)
        on_miss = "error" if request.lam is None else "compile"  # the step of CFG++ is compiled when it is first met
        handle = ah.accelerate(
            pipe, hidiffusion=ah.HiDiffusionConfig(), guidance=guidance, cache=cache, on_miss=on_miss
        )
        try:
            assert_golden(picture(pipe, request), request)
            assert handle.stats.eager_calls == 0
        finally:
            handle.remove()


@needs_aot
@pytest.mark.slow
def test_the_demo_serves_before_and_after_side_by_side(compiled: Path, tmp_path: Path) -> None:
    report = serve(
        {
            "model": str(trained_model()),
            "cache": str(compiled),
            "out": str(tmp_path),
            "sizes": [[256, 256]],
            "steps": STEPS,
            "before": True,
            "device": "cpu",
            "started": time.time(),
        }
    )
    (size,) = report["sizes"]
    assert size["relative_difference"] < 5e-3
    assert report["stats"]["compiles"] == report["stats"]["eager_calls"] == 0
    with Image.open(tmp_path / "before-after.png") as sheet:
        pixels = np.asarray(sheet)
    assert pixels.shape[0] > 2 * 256 and pixels.shape[1] > 4 * 256
    before, after = (pixels[top : top + 256] for top in (38, 38 + 256 + 6))  # captions, a row, a gap
    assert np.abs(before.astype(int) - after).mean() > 5


def test_a_demo_that_fails_ends_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert run(["demo", "--out", str(tmp_path), "--steps", "2"]) == 1
    assert "precompiling failed with exit code 1" in capsys.readouterr().err
    (tmp_path / "model").mkdir()
    (tmp_path / "model/other.txt").touch()
    assert run(["demo", "--out", str(tmp_path), "--steps", "2", "--random-weights"]) == 1
    assert "expected a complete diffusers folder or nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "gpu", "where"), [([], True, "cuda"), ([], False, "cpu"), (["--device", "cpu"], True, "cpu")]
)
def test_the_demo_runs_on_the_best_device_or_on_the_one_that_is_asked_for(
    asked: list[str], gpu: bool, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tmp_path / "told"
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\necho "$@" > {told}\nexit 1\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert run(["demo", "--out", str(tmp_path / "out"), "--steps", "2", *asked]) == 1
    assert f"--device {where} --dtype float32 --jobs" in told.read_text()


def test_a_device_that_is_not_here_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", "--out", str(tmp_path / "out"), "--device", "warp"]) == 2
    assert "device: expected cpu, cuda or cuda:N, got 'warp'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
