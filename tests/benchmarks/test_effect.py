"""The rules that read pictures, held against drawn scenes; and the run that uses them, in small."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from accel_hidiff.demo.scenes import Scene, Thing, draw, random_scene
from benchmarks.effect import __main__ as effect
from benchmarks.effect import arms, drawing
from benchmarks.effect.arms import cells, kinds, several, single
from benchmarks.effect.frechet import distance
from benchmarks.effect.reading import Reading, read
from benchmarks.effect.tables import differences, wilson

SIZES = [(128, 128), (96, 160), (256, 256), (192, 320), (512, 512)]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_the_rules_are_right_about_drawn_scenes(height: int, width: int) -> None:
    scenes = [random_scene(np.random.default_rng((3, number)), aspect=width / height) for number in range(100)]
    readings = [read(draw(scene, height, width), kinds(scene)) for scene in scenes]
    assert sum(reading.right for reading in readings) >= 99
    ones = [reading for reading, scene in zip(readings, scenes, strict=True) if len(scene.things) == 1]
    assert all(reading.scale_right for reading in ones)


def test_what_is_wrong_is_read_as_wrong() -> None:
    house = Thing("house", "red", (0.25, 0.5), 0.4)
    twice = draw(Scene((house, Thing("house", "red", (0.75, 0.5), 0.4)), "grey", 1), 256, 256)
    reading = read(twice, [("house", "red")])
    assert reading.duplicated and not reading.right and not reading.scale_right
    assert read(twice, [("house", "red")] * 2).right
    once = draw(Scene((Thing("house", "red", (0.5, 0.5), 0.8),), "grey", 1), 256, 256)
    assert read(once, [("house", "red")]).right
    assert not read(once, [("house", "blue")]).colours_right
    assert not read(once, [("fish", "red")]).shapes_right
    nothing = read(np.full((128, 128, 3), 200, np.uint8), [("fish", "red")])
    assert nothing.objects == 0 and not nothing.right
    assert read(np.zeros((128, 128, 3), np.uint8), [("fish", "red")]).clipped == 1


def test_frechet_distance_of_shifted_normals() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(4000, 4)), rng.normal(size=(4000, 4)) * 2 + 3
    assert distance(one, one) == pytest.approx(0, abs=1e-6)
    assert distance(one, other) == pytest.approx(4 * 9 + 4 * 1, rel=0.05)


def test_wilson_holds_what_it_says() -> None:
    rng = np.random.default_rng(0)
    for share in (0.02, 0.3, 0.95):
        held = [low <= share <= high for low, high in (wilson(hits, 100) for hits in rng.binomial(100, share, 2000))]
        assert np.mean(held) > 0.92


def test_cells_are_named_apart_and_captions_are_what_they_say() -> None:
    names = [cell.name for cell in cells(4, 2, 3, 2)]
    assert len(names) == len(set(names))
    assert len({prompt.text for prompt in single(240)}) == 240
    assert all(len(prompt.kinds) == 2 for prompt in several(10))


def row(arm: str, *readings: Reading) -> dict[str, Any]:
    return {"arm": arm, "size": "8x8", "readings": [asdict(reading) for reading in readings]}


def test_differences_are_taken_picture_by_picture() -> None:
    pale = Reading(1, 1, 0.8, 0.4, True, True, 0.2, 0.3, 0.0)
    vivid = replace(pale, saturation=0.8, objects=2)
    lines = differences([(row("CFG", vivid, pale), row("CFG++", pale, pale))]).splitlines()
    cells = dict(zip(lines[0].split(" | "), lines[2].split(" | "), strict=True))
    assert cells["compared"] == "CFG - CFG++"
    assert cells["several, points"] == "50 (0-100)" and cells["right, points"] == "-50 (-100 to 0)"
    assert cells["saturation"] == "0.250 (0.000-0.500)"


def test_a_record_of_other_weights_or_of_another_version_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "effect.json"
    for record, message in (
        ({"version": drawing.VERSION, "weights": {}, "runs": [], "cells": {}}, "results of these weights"),
        ({"version": 0}, "version"),
        ({}, "a record of benchmarks.effect"),
    ):
        out.write_text(json.dumps(record))
        with pytest.raises(SystemExit, match="2"):
            effect.main(["--out", str(out)])
        assert message in capsys.readouterr().err and json.loads(out.read_text()) == record


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "effect.md"], "ends with .json"),
        (["--out", "effect.json", "--large", "1"], "2 or more pictures"),
        (["--out", "effect.json", "--only", "scales"], "invalid choice"),
        (["--out", "/proc/effect.json"], "/proc"),
        (["--out", "nowhere.json", "--render"], "nowhere.json"),
        (["--out", "effect.json", "--model", "nowhere"], "nowhere"),
    ],
)
def test_bad_input(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        effect.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_small_run_goes_on_where_it_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(arms, "MANY_STEPS", 5)
    out = tmp_path / "effect.json"
    arguments = ["--out", str(out), "--captions", "2", "--large", "2", "--guided", "2", "--only", "guidance"]
    measured, begun = drawing.measured, []

    def interrupted(cell: Any, *rest: Any) -> dict[str, Any]:
        begun.append(cell.name)
        if len(begun) == 4:
            raise KeyboardInterrupt
        return measured(cell, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(drawing, "measured", interrupted)
        effect.main(arguments)
    assert [name for name in json.loads(out.read_text())["cells"] if "real" not in name] == begun[:3]
    capsys.readouterr()
    assert effect.main(arguments) == 0
    assert begun[3] in (printed := capsys.readouterr().out) and not any(name in printed for name in begun[:3])
    record = json.loads(out.read_text())
    drawn = [row for row in record["cells"].values() if row["table"] == "guidance"]
    assert len(drawn) == 20 and all(len(row["readings"]) == 2 for row in drawn)
    assert len(record["runs"]) == 1 and {row["run"] for row in drawn} == {0}  # the same command of the same commit
    text = out.with_suffix(".md").read_text()
    assert "CFG++ 0.6 (mean w " in text and text.count("| CFG 7.5 - CFG++ 0.6") == 2
    written = {path.name for path in out.with_suffix("").iterdir() if path.is_file()}
    assert written == {"guidance.png", "guidance-128x128.webp", "guidance-256x256.webp"}
    before = out.read_text()
    assert effect.main(arguments) == 0
    assert capsys.readouterr().out == "" and out.read_text() == before  # nothing was drawn again
