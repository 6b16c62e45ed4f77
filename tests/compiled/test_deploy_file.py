"""`accel-hidiff precompile deploy.toml`: check, estimate, compile; shared, signed, stopped and started again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

import accel_hidiff as ah
from accel_hidiff.cli import run
from accel_hidiff.compiling.blueprint import CompileJob, materialized
from accel_hidiff.compiling.worker import _Bench
from accel_hidiff.demo import save_model, tiny_config
from accel_hidiff.deploy import load_deployment
from accel_hidiff.precompiling.estimate import samples_of
from accel_hidiff.precompiling.plan import make_plan
from compile_cache import CompileCache, SigningKey
from tests import models
from tests.compiled.conftest import STEPS
from tests.compiled.test_background import children, until, without
from tests.conftest import ARTIFACTS, KINDS

MODEL = '[[models]]\nname = "{name}"\nmodel = "{model}"\nsizes = ["128x128", "192x128", "128x256"]\nsteps = [{steps}]\n'


@pytest.fixture
def deploy(tmp_path: Path) -> Callable[..., Path]:
    """Writes a deploy file; each model is its folder and what else its table says."""

    def write(cache: Path | None, *tables: tuple[Path, str], cache_says: str = "", name: str = "deploy.toml") -> Path:
        text = f'[cache]\nlocation = "{cache or tmp_path / "none"}"\n{cache_says}\n'
        for number, (model, says) in enumerate(tables):
            text += MODEL.format(name=f"m{number}", model=model, steps=STEPS) + says + "\n"
        file = tmp_path / name
        file.write_text(text)
        return file

    return write


@pytest.fixture(scope="session")
def configs(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model without its weights."""
    bare = tmp_path_factory.mktemp("configs") / "tiny"
    shutil.copytree(model_folder, bare, ignore=shutil.ignore_patterns("*.safetensors", "*.bin"))
    return bare


class Ran:
    """A run of the command in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str], file: Path, *arguments: str) -> None:
        capsys.readouterr()
        self.code = run(["precompile", str(file), *arguments])
        self.out, self.err = capsys.readouterr()

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def precompile(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    return lambda *arguments: Ran(capsys, *arguments)


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if "usage" not in str(path)}


class TestCheck:
    def test_a_whole_cache(self, precompile: Any, deploy: Any, configs: Path, cache_dir: Path) -> None:
        ran = precompile(deploy(cache_dir, (configs, "")), "--check", "--json")
        assert ran.code == 0 and ran.json["ready"] and ran.json["missing"] == []
        assert ran.json["models"] == [{"name": "m0", "artifacts": ARTIFACTS, "missing": 0, "note": ""}]

    def test_what_is_missing_has_a_reason_and_a_command(
        self, precompile: Any, deploy: Any, configs: Path, own_cache: Path
    ) -> None:
        file = deploy(without(own_cache, "decoder", shared=False), (configs, ""))
        before = files(own_cache)
        ran = precompile(file, "--check", "--json")
        (missing,) = ran.json["missing"]
        assert ran.code == 1 and not ran.json["ready"] and ran.json["command"] == f"accel-hidiff precompile {file}"
        assert (missing["model"], missing["region"], missing["kind"]) == ("m0", "vae.decoder", "decoder")
        assert len(missing["key"]) == 64 and "missing: the nearest entry" in missing["reason"]
        text = precompile(file, "--check")
        assert text.code == 1 and f"1 of {ARTIFACTS} artifacts are missing" in text.out and text.err == ""
        assert "vae.decoder (decoder, batch 1..8" in text.out and f"accel-hidiff precompile {file}" in text.out
        assert files(own_cache) == before, "nothing was compiled or written"

    def test_another_version_is_told(self, precompile: Any, deploy: Any, configs: Path, cache_dir: Path) -> None:
        ran = precompile(deploy(cache_dir, (configs, 'shapes = "exact"\n')), "--check", "--json")
        assert ran.code == 1 and "differs in bucket" in ran.json["missing"][0]["reason"]

    def test_no_cache_at_all(self, precompile: Any, deploy: Any, configs: Path, tmp_path: Path) -> None:
        ran = precompile(deploy(None, (configs, "")), "--check", "--json")
        assert ran.code == 1 and len(ran.json["missing"]) == ran.json["artifacts"] == ARTIFACTS
        assert not (tmp_path / "none").exists()

    def test_what_two_models_lack_is_listed_once(self, precompile: Any, deploy: Any, configs: Path) -> None:
        ran = precompile(deploy(None, (configs, ""), (configs, "cfgpp = 0.6\n")), "--check")
        assert f"m1: {ARTIFACTS + 1} artifacts, 0 in the cache, {ARTIFACTS + 1} missing, {ARTIFACTS} of them" in ran.out
        assert f"{ARTIFACTS + 1} of {ARTIFACTS + 1} artifacts are missing" in ran.out

    def test_all_that_a_table_says_counts(self, precompile: Any, deploy: Any, configs: Path, tmp_path: Path) -> None:
        """A scheduler, a ControlNet, image-to-image strengths, a family of sizes: planned from configs."""
        models.build("sdxl", "controlnet").controlnet.save_pretrained(tmp_path / "net")
        says = f'controlnets = ["{tmp_path / "net"}"]\nscheduler = "DDIMScheduler"\ntask = "controlnet"\n'
        ran = precompile(deploy(None, (configs, says)), "--dry-run", "--json")
        (with_net,) = ran.json["models"]
        ran = precompile(deploy(None, (configs, "strengths = [0.3, 1.0]\naspect_ratios = {}\n")), "--dry-run", "--json")
        (with_family,) = ran.json["models"]
        ran = precompile(deploy(None, (configs, "")), "--dry-run", "--json")
        (plain,) = ran.json["models"]
        assert with_net["graphs"] == plain["graphs"] + 3 * 2, "a ControlNet's at three sizes and two batches"
        assert with_family["graphs"] > 10 * plain["graphs"]
        assert with_net["artifacts"] == with_family["artifacts"] == plain["artifacts"], "all share one set"

    @pytest.mark.parametrize("backend", ["inductor", "eager"])
    def test_a_backend_with_nothing_to_precompile(
        self, precompile: Any, deploy: Any, configs: Path, cache_dir: Path, backend: str
    ) -> None:
        file = deploy(cache_dir, (configs, ""), (configs, f'backend = "{backend}"\n'))
        for arguments in (["--check"], ["--dry-run"], []):
            ran = precompile(file, *arguments)
            assert ran.code == 0 and f'm1: nothing to precompile: backend "{backend}"' in ran.out

    def test_what_the_remote_has_is_not_missing(
        self, precompile: Any, deploy: Any, configs: Path, own_cache: Path, tmp_path: Path
    ) -> None:
        remote = f'remote = "{tmp_path / "remote"}"\n'
        assert precompile(deploy(own_cache, (configs, ""), cache_says=remote + "push = true"), "--json").code == 0
        assert files(tmp_path / "remote")
        empty = deploy(tmp_path / "empty", (configs, ""), cache_says=remote)
        assert precompile(empty, "--check").code == 0
        assert CompileCache(tmp_path / "empty").verify().ok


class TestEstimate:
    def test_from_the_table(self, precompile: Any, deploy: Any, configs: Path, tmp_path: Path) -> None:
        file = deploy(None, (configs, ""))
        one, four = (precompile(file, "--dry-run", "--json", "--jobs", jobs) for jobs in ("1", "4"))
        assert one.code == four.code == 0 and not (tmp_path / "none").exists()
        assert one.json["compile"] == ARTIFACTS and one.json["bases"] == {"table": ARTIFACTS}
        assert one.json["minutes"] > four.json["minutes"] > 0 and one.json["bytes"] == four.json["bytes"] > 1e6
        text = precompile(file, "--dry-run", "--jobs", "1").out
        assert "minutes with 1 job" in text and "from the table (benchmarks/results/compile.json" in text

    def test_from_this_cache(self, precompile: Any, deploy: Any, configs: Path, own_cache: Path) -> None:
        """What the tiny model really took foretells the same artifacts at exact sizes."""
        measured = samples_of(CompileCache(own_cache))
        assert {sample.region for sample in measured} == KINDS
        assert all(sample.seconds > 0.5 and sample.device == "cpu" for sample in measured)
        ran = precompile(deploy(own_cache, (configs, 'shapes = "exact"\n')), "--dry-run", "--json", "--jobs", "1")
        assert set(ran.json["bases"]) == {"same kind"} and ran.json["measured"] == len(measured)
        (model,) = ran.json["models"]
        mean = sum(sample.seconds for sample in measured) / len(measured)
        assert 0.3 * mean < model["seconds"] / model["compile"] < 3 * mean
        assert "compiled into this cache, of the same kind" in ran.json["base"]

    def test_nothing_to_do(self, precompile: Any, deploy: Any, configs: Path, cache_dir: Path) -> None:
        ran = precompile(deploy(cache_dir, (configs, "")), "--dry-run")
        assert ran.code == 0 and "nothing to compile" in ran.out and "estimated" not in ran.out


class TestCompile:
    def test_in_two_processes_from_configs_alone(
        self, precompile: Any, deploy: Any, configs: Path, own_cache: Path, cache_dir: Path
    ) -> None:
        whole = set(CompileCache(cache_dir).digests())
        file = deploy(without(own_cache, "resnet", "transformer"), (configs, ""))
        ran = precompile(file, "--jobs", "2", "--json")
        assert ran.code == 0, ran.err
        (model,) = ran.json["models"]
        assert (model["artifacts"], model["compiled"], model["found"], model["missing"]) == (ARTIFACTS, 0, ARTIFACTS, 0)
        assert ran.json["jobs"] == 2 and ran.json["ready"] and ran.json["bytes"] > 1e6
        lines = [line for line in ran.err.splitlines() if " of 5" in line]  # resnets and transformers
        assert len(lines) == 5 and all(" found " in line and " m0  unet." in line for line in lines)
        assert set(CompileCache(own_cache).digests()) == whole and children() == []
        assert precompile(file, "--check").code == 0

    @pytest.mark.slow
    def test_what_two_models_need_is_compiled_once(
        self, precompile: Any, deploy: Any, configs: Path, own_cache: Path, tmp_path: Path
    ) -> None:
        other = save_model(tmp_path / "other", seed=1, config=tiny_config())
        file = deploy(own_cache, (configs, "cfgpp = 0.6\n"), (other, "cfgpp = 0.3\n"))
        ran = precompile(file, "--jobs", "2", "--json")
        assert ran.code == 0, ran.err
        first, second = ran.json["models"]
        assert (first["compiled"], first["found"], first["shared"]) == (1, ARTIFACTS, 0)
        assert (second["compiled"], second["found"], second["shared"]) == (0, ARTIFACTS, 1)
        assert ran.err.count("compiled") == 1
        again = precompile(file, "--json")
        assert [m["found"] for m in again.json["models"]] == [ARTIFACTS + 1] * 2 and again.json["compiled"] == 0
        (sample,) = [sample for sample in samples_of(CompileCache(own_cache)) if sample.region == "cfgpp step"]
        assert 0.5 < sample.seconds < 600 and sample.weights == 0

    @pytest.mark.slow
    def test_one_that_fails_leaves_the_others(
        self, precompile: Any, deploy: Any, configs: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        without(own_cache, "resnet")
        file = deploy(without(own_cache, "decoder", shared=False), (configs, ""))
        monkeypatch.setenv("CXX", "/no/such/compiler")
        ran = precompile(file, "--jobs", "2", "--json")
        assert ran.code == 1
        (failed,) = ran.json["failed"]
        assert (failed["model"], failed["region"]) == ("m0", "vae.decoder") and "AOTInductor failed" in failed["error"]
        assert not ran.json["ready"] and ran.json["models"][0]["found"] == ARTIFACTS - 1
        last = ran.err.splitlines()[-1]
        assert last.startswith("accel-hidiff: m0: vae.decoder: AOTInductor failed")
        assert "(1 of 4 artifacts failed; the others are in the cache" in last
        assert precompile(file, "--check", "--json").json["missing"][0]["region"] == "vae.decoder"

    def test_over_its_memory(self, precompile: Any, deploy: Any, configs: Path, own_cache: Path) -> None:
        file = deploy(without(own_cache, "decoder"), (configs, ""))
        ran = precompile(file, "--jobs", "1", "--max-memory", "10MB")
        assert ran.code == 1 and "of memory, 0.01 GB are allowed" in ran.err.splitlines()[-1]
        assert "failed" in ran.err and children() == []

    @pytest.mark.slow
    def test_a_cache_that_is_too_small(self, precompile: Any, deploy: Any, configs: Path, own_cache: Path) -> None:
        file = deploy(without(own_cache, "resnet"), (configs, ""), cache_says="max_bytes = 1000")
        ran = precompile(file, "--jobs", "1")
        assert ran.code == 1 and "give cache.max_bytes more room" in ran.err.splitlines()[-1]

    def test_half_precision_is_compiled_under_the_same_keys(self, deploy: Any, configs: Path, tmp_path: Path) -> None:
        """SDXL's VAE decodes in float32 also where the rest is float16; a compiling process has to find these keys."""
        half = Path(shutil.copytree(configs, tmp_path / "half"))
        config = dict(AutoencoderKL.load_config(half / "vae")) | {"force_upcast": True}
        (half / "vae" / "config.json").write_text(json.dumps(config))
        file = str(deploy(None, (half, 'dtype = "float16"\n')))
        (model,) = make_plan(file, load_deployment(file), storing=False).models
        bench = _Bench(model.handle.describe())
        dtypes = set()
        for digest, graph in model.own.items():
            job = CompileJob.of(graph, digest)
            region = bench.regions[job.path]
            with materialized(region.module, torch.device("cpu")):
                assert job.graph(region).key(bench.backend.factors(torch.device("cpu"))).digest == digest
            dtypes.add((graph.region.kind == "decoder", graph.dtype))
        assert dtypes == {(True, torch.float32), (False, torch.float16)}


class TestSigned:
    def test_signed_by_one_and_trusted_by_another(
        self, precompile: Any, deploy: Any, configs: Path, own_cache: Path, tmp_path: Path
    ) -> None:
        key = SigningKey.generate()
        key.save(tmp_path / "key")
        CompileCache(own_cache).sign(key)
        without(own_cache, "resnet")
        signing = f'sign_with = "{tmp_path / "key"}"\ntrust = ["{key.public}"]\n'
        assert precompile(deploy(own_cache, (configs, ""), cache_says=signing), "--jobs", "1").code == 0
        trusting = deploy(own_cache, (configs, ""), cache_says=f'trust = ["{key.public}"]\n')
        assert precompile(trusting, "--check").code == 0
        stranger = deploy(own_cache, (configs, ""), cache_says=f'trust = ["{SigningKey.generate().public}"]\n')
        ran = precompile(stranger, "--check", "--json")
        assert ran.code == 1 and len(ran.json["missing"]) == ARTIFACTS
        assert all("untrusted: it is signed by ed25519:" in missing["reason"] for missing in ran.json["missing"])
        assert "Warning" not in ran.err

    def test_without_the_key_nothing_is_stored(
        self, precompile: Any, deploy: Any, configs: Path, own_cache: Path
    ) -> None:
        file = deploy(own_cache, (configs, ""), cache_says=f'trust = ["{SigningKey.generate().public}"]\n')
        ran = precompile(file)
        assert ran.code == 2 and "expected a signing key to store entries" in ran.err.splitlines()[-1]


def started(file: Path, log: Path, *arguments: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(ah.__file__).parents[1])}
    command = [sys.executable, "-m", "accel_hidiff.cli", "precompile", str(file), *arguments]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's child would ignore it
    try:
        with log.open("wb") as stream:
            return subprocess.Popen(command, stderr=stream, stdout=stream, env=environment)
    finally:
        signal.signal(signal.SIGINT, before)


class TestStopped:
    @pytest.mark.parametrize("how", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
    def test_it_goes_on_where_it_was_stopped(
        self, precompile: Any, deploy: Any, configs: Path, own_cache: Path, tmp_path: Path, how: signal.Signals
    ) -> None:
        file = deploy(without(own_cache, "resnet"), (configs, ""))
        log = tmp_path / "log"
        process = started(file, log, "--jobs", "1")
        until(lambda: " found " in log.read_text() or process.poll() is not None, 240)
        process.send_signal(how)
        text = ""
        if how == signal.SIGINT:
            assert process.wait(60) == 1
            text = log.read_text()
            assert "accel-hidiff: stopped; what was compiled until now is in the cache" in text.splitlines()[-1]
            assert list((own_cache / "v1" / "tmp").iterdir()) == []
        else:
            assert process.wait(60) == -signal.SIGKILL
        assert "Traceback" not in text and CompileCache(own_cache).verify().ok
        left = len(precompile(file, "--check", "--json").json["missing"])
        assert 0 < left < 3, "what was there before stays"
        ran = precompile(file, "--jobs", "1")
        assert ran.code == 0 and f"{left} of {left}  found" in ran.err

    @pytest.mark.slow
    def test_killed_while_compilers_work(
        self, precompile: Any, deploy: Any, configs: Path, own_cache: Path, tmp_path: Path
    ) -> None:
        file = deploy(without(own_cache, "resnet", shared=False), (configs, "cfgpp = 0.6\n"))
        log = tmp_path / "log"
        for seconds in (3.0, 15.0):
            process = started(file, log, "--jobs", "2")
            until(lambda: "compiling" in log.read_text(), 120)
            time.sleep(seconds)
            process.kill()
            process.wait()
            assert CompileCache(own_cache).verify().ok
        ran = precompile(file, "--jobs", "2", "--json")
        assert ran.code == 0 and ran.json["ready"], ran.err
        assert precompile(file, "--check").code == 0


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            (["--size", "128x128"], "--size: expected no such option with a deploy file"),
            (["--steps", "3"], "--steps: expected no such option"),
            (["--sign-with", "key"], "--sign-with: expected no such option"),
            (["--cache", "c"], "--cache: expected no such option"),
            (["--check", "--dry-run"], "got both"),
            (["--jobs", "0"], "--jobs: expected 1 to"),
            (["--jobs", "many"], "Invalid value"),
            (["--max-memory", "much"], "--max-memory: expected a size such as 500MB"),
        ],
    )
    def test_options(
        self, precompile: Any, deploy: Any, configs: Path, tmp_path: Path, arguments: list[str], expected: str
    ) -> None:
        self.refused(precompile(deploy(None, (configs, "")), *arguments), expected)
        assert not (tmp_path / "none").exists()

    def test_files(self, precompile: Any, deploy: Any, configs: Path, tmp_path: Path) -> None:
        self.refused(precompile(tmp_path / "gone.toml", "--check"), "cannot read it: No such file")
        self.refused(precompile(deploy(None, (configs, 'backend = "onediff"\n'))), "onediff/nexfort: unavailable: ")
        gone = deploy(None, (tmp_path / "gone", ""))
        self.refused(precompile(gone), "model 'm0': model: expected a diffusers folder")
        self.refused(precompile(deploy(None, (configs, 'scheduler = "Euler"\n'))), "model 'm0': models.scheduler")
        self.refused(precompile(deploy(None, (configs, "family = 'sd15'\n"))), "model 'm0': the UNet")
        key = 'sign_with = "gone"\n'
        self.refused(precompile(deploy(None, (configs, ""), cache_says=key)), "expected a signing key at")
        self.refused(precompile(deploy(None, (configs, ""), cache_says='trust = ["x"]\n'), "--check"), "public keys")

    @pytest.mark.parametrize("option", ["--check", "--dry-run", "--max-memory=1GB"])
    def test_a_model_in_the_place_of_a_file(self, precompile: Any, configs: Path, option: str) -> None:
        expected = f"{option.partition('=')[0]}: expected a deploy file (.toml) with it"
        self.refused(precompile(configs, "--size", "128x128", option), expected)
        self.refused(precompile(configs), "--size: expected at least one WIDTHxHEIGHT, got none")

    @staticmethod
    def refused(ran: Ran, expected: str) -> None:
        lines = [line for line in ran.err.splitlines() if line.startswith("accel-hidiff: ")]
        assert ran.code == 2 and len(lines) == 1 and expected in lines[0], ran.err
        assert ran.out == "" and "Traceback" not in ran.err
