"""The deploy file: what it says, and one line that names file and field for everything that it cannot say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import accel_hidiff as ah
from accel_hidiff.deploy import Deployment, ModelTable, is_deploy_file, load_deployment

MODEL = '[[models]]\nname = "base"\nmodel = "models/sdxl"\nsizes = ["1024x1024"]\n'


def written(folder: Path, text: str) -> Path:
    file = folder / "deploy.toml"
    file.write_text(text, encoding="utf-8")
    return file


def load(folder: Path, text: str) -> Deployment:
    return load_deployment(written(folder, text))


def refused(folder: Path, text: str) -> str:
    """The message, which is one line and begins with the file."""
    file = written(folder, text)
    with pytest.raises(ah.BadInput) as caught:
        load_deployment(file)
    message = str(caught.value)
    assert message.startswith(f"{file}: ") and "\n" not in message
    return message.removeprefix(f"{file}: ")


class TestWhatItSays:
    def test_defaults(self, tmp_path: Path) -> None:
        deployment = load(tmp_path, MODEL)
        (model,) = deployment.models
        assert (model.steps, model.batch_sizes, model.strengths) == ((30,), (1, 2), (1.0,))
        assert (model.backend, model.regions, model.shapes) == ("aot", "blocks", "symbolic")
        assert (model.on_miss, model.scheduler, model.cfgpp) == ("background", None, None)
        assert (deployment.cache.trust, deployment.cache.remote, deployment.service.port) == ((), None, 8000)

    def test_every_field(self, tmp_path: Path) -> None:
        text = """
            [cache]
            location = "/srv/cache"
            remote = "s3://bucket/cache"
            push = true
            trust = ["ed25519:00", "keys/public"]
            sign_with = "keys/private"
            max_bytes = 1000

            [service]
            host = "0.0.0.0"
            port = 0
            queue = 2
            timeout = 10
            drain = 0
            any_size = true

            [[models]]
            name = "edit-1.5"
            model = "owner/name"
            sizes = ["1024x1024", "2688x1536"]
            aspect_ratios = { scale = 2.0, multiple = 128 }
            steps = [4, 30]
            batch_sizes = [2]
            strengths = [0.5, 1]
            controlnets = ["owner/net"]
            family = "sdxl"
            task = "img2img"
            scheduler = "DDIMScheduler"
            cfgpp = 0.6
            backend = "aot"
            regions = "whole"
            shapes = "exact"
            dtype = "float16"
            device = "cuda:1"
            on_miss = "error"
        """
        deployment = load(tmp_path, text)
        model = deployment.model("edit-1.5")
        assert model.pixel_sizes()[:2] == [(1024, 1024), (1536, 2688)] and len(model.pixel_sizes()) > 20
        assert (model.scheduler, model.cfgpp, model.strengths) == ("DDIMScheduler", 0.6, (0.5, 1))
        assert (model.task, model.controlnets, model.device) == ("img2img", ("owner/net",), "cuda:1")
        assert deployment.cache.location == "/srv/cache" and deployment.service.any_size

    def test_paths_are_relative_to_the_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = tmp_path / "etc"
        (folder / "models" / "sdxl").mkdir(parents=True)
        (folder / "net").mkdir()
        keys = '[cache]\nlocation = "kept"\ntrust = ["public", "ed25519:00"]\nsign_with = "private"\n'
        written(folder, keys + MODEL + 'controlnets = ["net", "owner/net"]\n')
        monkeypatch.chdir(tmp_path)
        deployment = load_deployment("etc/deploy.toml")
        assert deployment.cache.location == "etc/kept"
        assert deployment.cache.trust == ("etc/public", "ed25519:00") and deployment.cache.sign_with == "etc/private"
        assert deployment.models[0].model == "etc/models/sdxl"
        assert deployment.models[0].controlnets == ("etc/net", "owner/net")

    def test_a_model_that_is_no_folder_stays_a_hub_id(self, tmp_path: Path) -> None:
        assert load(tmp_path, MODEL).models[0].model == "models/sdxl"

    def test_sizes_of_a_family(self, tmp_path: Path) -> None:
        text = MODEL.replace('sizes = ["1024x1024"]', "aspect_ratios = { scale = 1.0 }")
        sizes = load(tmp_path, text).models[0].pixel_sizes()
        assert len(sizes) == len(set(sizes)) == 40 and (1024, 1024) in sizes and (832, 1216) in sizes

    def test_the_same_size_twice_counts_once(self, tmp_path: Path) -> None:
        text = MODEL.replace('["1024x1024"]', '["1024x1024", "1024X1024"]\naspect_ratios = {}')
        assert len(load(tmp_path, text).models[0].pixel_sizes()) == 40

    def test_models_by_name(self, tmp_path: Path) -> None:
        deployment = load(tmp_path, MODEL + MODEL.replace('"base"', '"other"'))
        assert deployment.model().name == "base" and deployment.model("other").name == "other"
        with pytest.raises(ah.BadInput, match="expected one of base, other, got 'none'"):
            deployment.model("none")

    def test_what_counts_as_a_deploy_file(self, tmp_path: Path) -> None:
        folder = tmp_path / "model.toml"
        folder.mkdir()
        assert is_deploy_file("missing.toml") and not is_deploy_file(str(folder)) and not is_deploy_file("owner/name")


TABLES = [
    ("", "models: expected at least one [[models]] table, got none"),
    (MODEL.replace("[[models]]", "[models]"), "expected [[models]], an array of tables, got [models]"),
    ("models = 3\n", "expected [[models]]"),
    ("models = [3]\n", "models: expected a table, got int"),
    ('cache = "here"\n' + MODEL, "cache: expected a table, got str"),
    (MODEL + "[caches]\n", "caches: expected the tables cache, models, service"),
    (MODEL + "[cache]\nplace = 1\n", "cache.place: expected one of location, remote"),
    (MODEL + "[service]\nports = 1\n", "service.ports: expected one of host, port"),
    (MODEL + "size = 1\n", "models.size: expected one of name, model, sizes"),
    (MODEL + "aspect_ratios = { ratio = 1 }\n", "models.aspect_ratios.ratio: expected one of scale, multiple"),
    (MODEL + MODEL, "models.name: expected unique names, got 'base' twice"),
    (MODEL.replace('name = "base"\n', ""), "models.name: expected a value, got none"),
    (MODEL.replace('model = "models/sdxl"\n', ""), "models.model: expected a value, got none"),
    (MODEL.replace('sizes = ["1024x1024"]\n', ""), "models.sizes: expected at least one size for base, got none"),
    ("name = base", "expected TOML"),
    ("\udcff", "expected TOML"),
]

FIELDS: list[tuple[str, str, str]] = [
    ("models", "name = 'a b'", "models.name: expected letters, digits"),
    ("models", "name = 3", "models.name: expected text, got 3"),
    ("models", "model = ' '", "models.model: expected text, got ' '"),
    ("models", "sizes = '1024x1024'", "models.sizes: expected a list of texts"),
    ("models", "sizes = [1024]", "models.sizes: expected text, got 1024"),
    ("models", "sizes = ['1024']", "models.sizes: expected WIDTHxHEIGHT in pixels"),
    ("models", "sizes = ['1024x1001']", "multiple of 8"),
    ("models", "sizes = ['0x1024']", "positive"),
    ("models", "aspect_ratios = 2.0", "models.aspect_ratios: expected a table with scale, got 2.0"),
    ("models", "aspect_ratios = { scale = 0 }", "aspect_ratios.scale: expected a number in 0.1..8, got 0"),
    ("models", "aspect_ratios = { multiple = 12 }", "aspect_ratios.multiple: expected a multiple of 8 pixels, got 12"),
    ("models", "steps = 30", "models.steps: expected a list with at least one number, got 30"),
    ("models", "steps = []", "models.steps: expected a list with at least one number, got ()"),
    ("models", "steps = [0]", "steps: expected an integer of at least 1, got 0"),
    ("models", "steps = ['30']", "steps: expected an integer of at least 1, got '30'"),
    ("models", "steps = [true]", "steps: expected an integer of at least 1, got True"),
    ("models", "batch_sizes = [0]", "models.batch_sizes: expected an integer of at least 1, got 0"),
    ("models", "batch_sizes = [1.5]", "models.batch_sizes: expected an integer of at least 1, got 1.5"),
    ("models", "strengths = [1.5]", "models.strengths: expected a number in 0..1, got 1.5"),
    ("models", "strengths = ['half']", "models.strengths: expected a number in 0..1, got 'half'"),
    ("models", "strengths = [0.01]", "strength: expected one that leaves a step"),
    ("models", "controlnets = 'net'", "models.controlnets: expected a list of texts"),
    ("models", "family = 'sd3'", "models.family: expected one of sd15"),
    ("models", "task = 'draw'", "models.task: expected one of text2img"),
    ("models", "dtype = 'int8'", "models.dtype: expected one of float32"),
    ("models", "scheduler = 3", "models.scheduler: expected text, got 3"),
    ("models", "device = 0", "models.device: expected text, got 0"),
    ("models", "cfgpp = 7.5", "lambda: expected a number in 0..1, got 7.5"),
    ("models", "backend = 'tensorrt'", "models.backend: expected one of aot, inductor, onediff, eager"),
    ("models", "backend = ['aot']", "models.backend: expected one of aot, inductor, onediff, eager"),
    ("models", "regions = 'all'", "models.regions: expected one of blocks, whole"),
    ("models", "shapes = 'any'", "models.shapes: expected one of symbolic, exact"),
    ("models", "on_miss = 'compile'", "models.on_miss: expected one of background, eager, error"),
    ("cache", "location = ''", "cache.location: expected text, got ''"),
    ("cache", "remote = 3", "cache.remote: expected text, got 3"),
    ("cache", "push = 'yes'", "cache.push: expected true or false, got 'yes'"),
    ("cache", "push = true", "cache.push: expected cache.remote with it, got none"),
    ("cache", "trust = 'ed25519:00'", "cache.trust: expected a list of texts"),
    ("cache", "sign_with = 3", "cache.sign_with: expected text, got 3"),
    ("cache", "max_bytes = 0", "cache.max_bytes: expected an integer of at least 1, got 0"),
    ("cache", "max_bytes = '1GB'", "cache.max_bytes: expected an integer of at least 1, got '1GB'"),
    ("service", "port = 70000", "service.port: expected 0 to 65535, got 70000"),
    ("service", "port = true", "service.port: expected an integer of at least 0, got True"),
    ("service", "queue = 0", "service.queue: expected an integer of at least 1, got 0"),
    ("service", "timeout = 0", "service.timeout: expected a number in 0.001..86400, got 0"),
    ("service", "timeout = nan", "service.timeout: expected a number in 0.001..86400, got nan"),
    ("service", "any_size = 1", "service.any_size: expected true or false, got 1"),
]


class TestBadFiles:
    @pytest.mark.parametrize(("text", "expected"), TABLES)
    def test_tables(self, tmp_path: Path, text: str, expected: str) -> None:
        file = tmp_path / "deploy.toml"
        file.write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(ah.BadInput) as caught:
            load_deployment(file)
        message = str(caught.value)
        assert expected in message and message.startswith(f"{file}: ") and "\n" not in message

    @pytest.mark.parametrize(("table", "line", "expected"), FIELDS, ids=[f"{t}.{line}" for t, line, _ in FIELDS])
    def test_fields(self, tmp_path: Path, table: str, line: str, expected: str) -> None:
        values = {"name": "name = 'base'", "model": "model = 'models/sdxl'", "sizes": "sizes = ['1024x1024']"}
        if table == "models":
            text = "[[models]]\n" + "\n".join((values | {line.partition(" =")[0]: line}).values()) + "\n"
        else:
            text = f"{MODEL}[{table}]\n{line}\n"
        assert expected in refused(tmp_path, text)

    @pytest.mark.parametrize("name", ["missing.toml", "."])
    def test_files_that_cannot_be_read(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(ah.BadInput, match="expected a deploy file, cannot read it"):
            load_deployment(tmp_path / name)


@pytest.mark.parametrize("values", [{"steps": [30]}, {"sizes": ["8x8"], "steps": [30]}])
def test_tables_made_in_python_are_checked_as_well(values: dict[str, Any]) -> None:
    with pytest.raises(ah.BadInput, match=r"models\.s"):
        ModelTable("base", "models/sdxl", **values)
