"""The command line: what it writes, and one clear line with exit code 2 for every bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from accel_hidiff.cli import run
from tests import models
from tests.compiled.conftest import STEPS
from tests.conftest import ARTIFACTS

SIZE = ["--size", "192x128", "--steps", str(STEPS)]


def run_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    capsys.readouterr()
    assert run([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert run([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("accel-hidiff: ")]
    assert len(lines) == 1 and "Traceback" not in captured.err and captured.out == ""
    return lines[0]


def test_precompile_on_a_full_cache_compiles_nothing(
    capsys: pytest.CaptureFixture[str], model_folder: Path, cache_dir: Path
) -> None:
    report = run_json(capsys, "precompile", model_folder, "--cache", cache_dir, *SIZE, "--size", "128x256")
    assert (report["compiled"], report["artifacts"]) == (0, ARTIFACTS)


def test_generate_writes_an_image_of_each_size(
    capsys: pytest.CaptureFixture[str], model_folder: Path, cache_dir: Path, tmp_path: Path
) -> None:
    arguments = ["--cache", cache_dir, *SIZE, "--size", "128x256", "--on-miss", "error", "--out", tmp_path]
    report = run_json(capsys, "generate", model_folder, *arguments)
    assert [Image.open(path).size for path in report["images"]] == [(192, 128), (128, 256)]
    assert report["stats"]["compiles"] == 0 and report["stats"]["hits"] == 2 * (STEPS + 1)
    assert not list(tmp_path.glob("*.part*"))


def test_explain_shows_steps_graphs_and_state(
    capsys: pytest.CaptureFixture[str], model_folder: Path, cache_dir: Path
) -> None:
    (explanation,) = run_json(capsys, "explain", model_folder, "--cache", cache_dir, *SIZE)
    assert explanation["ready"] is True
    assert [row["steps"] for row in explanation["rows"]] == ["[0, 1)", "[1, 2)", "[2, 7)", "after"]
    assert run(["explain", str(model_folder), "--cache", str(cache_dir), *SIZE]) == 0
    assert "windowed+pooled" in capsys.readouterr().out


def test_doctor_gives_a_reason_for_everything_that_is_not_usable(capsys: pytest.CaptureFixture[str]) -> None:
    findings = {finding["part"]: finding for finding in run_json(capsys, "doctor")}
    assert findings["backend aot, serving"]["usable"] and findings["torch"]["usable"]
    assert all(finding["detail"] for finding in findings.values())
    assert findings["device cuda"]["usable"] == torch.cuda.is_available()


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("0x128", "positive"),
        ("-128x128", "positive"),
        ("100x128", "multiple of 8"),
        ("axb", "WIDTHxHEIGHT"),
        ("128", "WIDTHxHEIGHT"),
        ("128x128.5", "WIDTHxHEIGHT"),
    ],
)
@pytest.mark.parametrize("verb", ["precompile", "generate", "explain"])
def test_bad_sizes(
    capsys: pytest.CaptureFixture[str], model_folder: Path, tmp_path: Path, verb: str, size: str, expected: str
) -> None:
    cache = tmp_path / "cache"
    assert expected in refused(capsys, verb, model_folder, "--cache", cache, f"--size={size}")
    assert not cache.exists()


@pytest.mark.parametrize("steps", ["0", "-1", "many"])
def test_bad_steps(capsys: pytest.CaptureFixture[str], model_folder: Path, tmp_path: Path, steps: str) -> None:
    arguments = ["--cache", tmp_path / "cache", "--size", "192x128", f"--steps={steps}"]
    refused(capsys, "precompile", model_folder, *arguments)
    assert not (tmp_path / "cache").exists()


def test_bad_models(capsys: pytest.CaptureFixture[str], model_folder: Path, tmp_path: Path) -> None:
    cache = ["--cache", tmp_path / "cache", *SIZE]
    assert "no such folder" in refused(capsys, "precompile", tmp_path / "none", *cache)
    assert "model_index.json" in refused(capsys, "precompile", tmp_path, *cache)
    assert "a file" in refused(capsys, "precompile", model_folder / "model_index.json", *cache)
    no_unet = tmp_path / "no-unet"
    no_unet.mkdir()
    (no_unet / "model_index.json").write_text('{"_class_name": "DDPMPipeline", "_diffusers_version": "0.42.1"}')
    refused(capsys, "precompile", no_unet, *cache)
    (no_unet / "model_index.json").write_text("{")
    refused(capsys, "precompile", no_unet, *cache)
    assert not (tmp_path / "cache").exists()


def test_an_unknown_layout_is_refused_with_what_was_found(
    capsys: pytest.CaptureFixture[str], model_folder: Path, tmp_path: Path
) -> None:
    from diffusers import UNet2DConditionModel

    other = Path(shutil.copytree(model_folder, tmp_path / "model"))
    config = dict(UNet2DConditionModel.load_config(other / "unet"))
    config["layers_per_block"] = 1
    shutil.rmtree(other / "unet")
    UNet2DConditionModel.from_config(config).save_pretrained(other / "unet")
    message = refused(capsys, "precompile", other, "--cache", tmp_path / "cache", *SIZE)
    assert "expected sd15" in message and "(1, 1, 1) layers per block" in message


def test_bad_caches(capsys: pytest.CaptureFixture[str], model_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for verb in ("precompile", "generate", "explain"):
        assert "directory" in refused(capsys, verb, model_folder, "--cache", file, *SIZE)
    assert file.read_text() == "mine"


def test_a_cache_that_cannot_be_written(
    capsys: pytest.CaptureFixture[str], model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compile_cache import CacheWriteError, CompileCache

    def refuse(self: CompileCache) -> None:
        raise CacheWriteError(f"expected a writable cache, got a read-only file system at {self.location}")

    monkeypatch.setattr(CompileCache, "require_writable", refuse)
    assert "read-only" in refused(capsys, "precompile", model_folder, "--cache", tmp_path / "cache", *SIZE)


def test_an_empty_cache_under_on_miss_error(
    capsys: pytest.CaptureFixture[str], model_folder: Path, tmp_path: Path
) -> None:
    arguments = ["--cache", tmp_path / "cache", "--out", tmp_path / "out", "--on-miss", "error", *SIZE]
    message = refused(capsys, "generate", model_folder, *arguments)
    assert "holds no entries" in message and "accel-hidiff precompile" in message
    assert not (tmp_path / "cache").exists() and not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--backend", "tensorrt"],
        ["--on-miss", "panic"],
        ["--regions", "half"],
        ["--dtype", "int8"],
        ["--device", "tpu9"],
    ],
    ids=str,
)
def test_bad_options(
    capsys: pytest.CaptureFixture[str], model_folder: Path, tmp_path: Path, arguments: list[str]
) -> None:
    out = ["--out", tmp_path / "out", "--cache", tmp_path / "cache"]
    assert "expected" in refused(capsys, "generate", model_folder, *out, *SIZE, *arguments)


def test_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Missing" in refused(capsys, "precompile")
    assert "No such" in refused(capsys, "frobnicate")


def test_explain_reads_configs_only(
    capsys: pytest.CaptureFixture[str], model_folder: Path, cache_dir: Path, tmp_path: Path
) -> None:
    """A folder without weights is explained like the whole one."""
    bare = tmp_path / "bare"
    shutil.copytree(model_folder, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    whole, configs = (
        run_json(capsys, "explain", model, "--cache", cache_dir, *SIZE)[0] for model in (model_folder, bare)
    )
    assert configs == whole and configs["ready"] is True


def test_explain_of_a_strength_shows_the_steps_that_run(
    capsys: pytest.CaptureFixture[str], model_folder: Path, tmp_path: Path
) -> None:
    plot = tmp_path / "plan.png"
    arguments = ["--size", "4096x2048", "--steps", "30", "--strength", "0.6", "--plot", plot, "--cache", tmp_path / "c"]
    (explanation,) = run_json(capsys, "explain", model_folder, *arguments)
    assert explanation["num_steps"] == 18
    assert [row["steps"] for row in explanation["rows"]] == ["[0, 2)", "[2, 7)", "[7, 18)", "after"]
    assert explanation["ready"] is False
    image = Image.open(plot)
    assert image.width > 800 and len(image.convert("RGB").getcolors(1 << 20) or []) > 20, "something is drawn"
    assert not list(tmp_path.glob("*.part*"))


def test_explain_with_a_controlnet(capsys: pytest.CaptureFixture[str], model_folder: Path, tmp_path: Path) -> None:
    models.build("sdxl", "controlnet").controlnet.save_pretrained(tmp_path / "net")
    nets = ["--controlnet", tmp_path / "net", "--controlnet", tmp_path / "net"]
    (explanation,) = run_json(capsys, "explain", model_folder, *nets, *SIZE, "--cache", tmp_path / "c")
    rows = {row["topology"]: row["steps"] for row in explanation["rows"]}
    assert rows["controlnet.nets.0"] == rows["controlnet.nets.1"] == "[0, 5)"


def test_explain_tells_what_an_odd_size_costs(
    capsys: pytest.CaptureFixture[str], model_folder: Path, tmp_path: Path
) -> None:
    size = ["--size", "1920x1048", "--steps", "30", "--cache", tmp_path / "c"]
    (explanation,) = run_json(capsys, "explain", model_folder, *size)
    assert "1920x1024 avoids that" in explanation["notice"]
    (explanation,) = run_json(capsys, "explain", model_folder, *SIZE, "--cache", tmp_path / "c")
    assert explanation["notice"] is None


def test_cfgpp_from_the_command_line(
    capsys: pytest.CaptureFixture[str], model_folder: Path, own_cache: Path, tmp_path: Path
) -> None:
    """The step is one artifact more; another lambda needs none."""
    report = run_json(capsys, "precompile", model_folder, "--cache", own_cache, *SIZE, "--cfgpp", "0.6")
    assert (report["compiled"], report["artifacts"]) == (1, ARTIFACTS + 1)
    (explanation,) = run_json(capsys, "explain", model_folder, "--cache", own_cache, *SIZE, "--cfgpp", "0.3")
    assert explanation["ready"] and [row["topology"] for row in explanation["rows"]][-2:] == [
        "CFG++ step",
        "VAE decoder",
    ]
    arguments = ["--cache", own_cache, *SIZE, "--on-miss", "error", "--out", tmp_path, "--cfgpp", "0.3"]
    report = run_json(capsys, "generate", model_folder, *arguments)
    assert report["stats"]["compiles"] == 0 and report["stats"]["hits"] == 2 * STEPS + 1
    assert "lambda: expected a number in 0..1, got 7.5" in refused(
        capsys, "generate", model_folder, *SIZE, "--cfgpp", "7.5"
    )


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--strength", "1.5", "strength: expected a number in 0..1, got 1.5"),
        ("--strength", "0.01", "strength: expected one that leaves a step"),
        ("--task", "draw", "task: expected one of text2img"),
        ("--family", "sd3", "family: expected one of sd15"),
        ("--family", "sd15", "fits no known family"),
        ("--controlnet", "nowhere/at/all", "nowhere/at/all cannot be loaded"),
        ("--plot", "/proc/plan.png", "--plot: expected a file that can be written"),
    ],
)
def test_bad_options_of_explain(
    capsys: pytest.CaptureFixture[str], model_folder: Path, tmp_path: Path, option: str, value: str, expected: str
) -> None:
    arguments = ["explain", model_folder, *SIZE, "--cache", tmp_path / "c", option, value]
    assert expected in refused(capsys, *arguments)
