"""OneDiffConfig: validation, round trip, and its place in a deploy file."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

import accel_hidiff as ah
from accel_hidiff.deploy import load_deployment

BAD = {
    "compiler": ({"compiler": "tensorrt"}, "onediff.compiler: expected one of nexfort, oneflow; got 'tensorrt'"),
    "memory format": ({"memory_format": "nhwc"}, "onediff.memory_format: expected one of channels_last, contiguous"),
    "mode": ({"mode": "O3 O2"}, "onediff.mode: expected names joined by"),
    "no mode": ({"mode": None}, "onediff.mode: expected names joined by"),
    "mode of oneflow": ({"compiler": "oneflow", "mode": "O3"}, "oneflow, which has no modes, got 'O3'; use options"),
    "options": ({"options": ["jit.freezing"]}, "onediff.options: expected a mapping of option names"),
    "option names": ({"options": {1: 2}}, "onediff.options: expected a mapping of option names"),
    "option values": ({"options": {"a": object()}}, "onediff.options: expected values that JSON has"),
    "not a number": ({"options": {"a": float("nan")}}, "onediff.options: expected values that JSON has"),
    "our own": ({"options": {"graph_file": "g"}}, "expected none of dynamic, .*, got 'graph_file'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_values(name: str) -> None:
    fields, message = BAD[name]
    with pytest.raises(ah.BadInput, match=message) as caught:
        ah.OneDiffConfig(**fields)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_round_trip() -> None:
    config = ah.OneDiffConfig("nexfort", "max-autotune:cache-all", {"jit.freezing": True}, "channels_last")
    assert ah.OneDiffConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert pickle.loads(pickle.dumps(config)) == config and hash(config) == hash(config.replace())
    assert config.replace(mode="O3").mode == "O3"


def test_options_are_a_copy() -> None:
    options: dict[str, Any] = {"inductor.options": {"max_autotune": True}}
    config = ah.OneDiffConfig(options=options)
    options["inductor.options"]["max_autotune"] = False
    assert config.options == {"inductor.options": {"max_autotune": True}}


class TestDeployFile:
    def deploy(self, folder: Path, *lines: str) -> Path:
        file = folder / "deploy.toml"
        file.write_text('[[models]]\nname = "base"\nmodel = "sdxl"\nsizes = ["1024x1024"]\n' + "\n".join(lines))
        return file

    def test_settings(self, tmp_path: Path) -> None:
        settings = '[models.onediff]\nmode = "O3"\nmemory_format = "channels_last"\noptions = {cudagraphs = true}'
        model = load_deployment(self.deploy(tmp_path, 'backend = "onediff"', settings)).model()
        assert model.backend_spec == ah.OneDiffConfig(
            mode="O3", options={"cudagraphs": True}, memory_format="channels_last"
        )

    def test_no_settings(self, tmp_path: Path) -> None:
        assert load_deployment(self.deploy(tmp_path, 'backend = "onediff"')).model().backend_spec == "onediff"

    @pytest.mark.parametrize(
        ("lines", "message"),
        [
            (["onediff = {}"], "models.onediff: expected it with backend = \"onediff\" alone, got 'aot'"),
            (['backend = "onediff"', "onediff = 1"], "models.onediff: expected a table such as"),
            (
                ['backend = "onediff"', 'onediff = {modus = "O3"}'],
                "models.onediff.modus: expected one of compiler, mode",
            ),
            (['backend = "onediff"', 'onediff = {mode = ""}'], "onediff.mode: expected names"),
        ],
    )
    def test_bad_settings(self, tmp_path: Path, lines: list[str], message: str) -> None:
        with pytest.raises(ah.BadInput, match=message):
            load_deployment(self.deploy(tmp_path, *lines))
