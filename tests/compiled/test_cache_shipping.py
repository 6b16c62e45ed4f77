"""From the machine that compiles to one that serves: signed, through a remote or a bundle, without a compilation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import accel_hidiff as ah
import compile_cache.cli
from accel_hidiff.cli import run
from compile_cache import CompileCache, TrustError, UntrustedEntryWarning
from tests.compiled.conftest import STEPS, relative_difference, request
from tests.conftest import ARTIFACTS

pytest.importorskip("cryptography")

SIZE = ["--size", "192x128", "--steps", str(STEPS)]
SERVED = {"compiles": 0, "eager_calls": 0, "misses": 0}


@pytest.fixture
def signed(own_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[Path, str, Path]:
    """A cache whose entries are signed; the public key, and the private one's file."""
    key = tmp_path / "key"
    assert compile_cache.cli.run(["keygen", str(key)]) == 0
    public = capsys.readouterr().out.strip()
    assert compile_cache.cli.run(["sign", str(own_cache), "--key-file", str(key)]) == 0
    return own_cache, public, key


def strict(pipe: Any, cache: CompileCache) -> Any:
    return ah.accelerate(pipe, hidiffusion=ah.HiDiffusionConfig(), cache=cache, on_miss="error")


def test_a_replica_fetches_what_is_signed_and_compiles_nothing(
    signed: Any, tmp_path: Path, make_pipe: Any, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    location, public, key = signed
    url = f"file://{tmp_path}/remote"
    arguments = ["precompile", str(model_folder), "--cache", str(location), *SIZE, "--json"]
    capsys.readouterr()
    assert run([*arguments, "--remote", url, "--push", "--sign-with", str(key)]) == 0
    assert json.loads(capsys.readouterr().out)["compiled"] == 0  # what was here is sent, too
    cache = CompileCache(tmp_path / "replica", remote=url, trust=public)
    handle = strict(make_pipe(), cache)
    eager = make_pipe()
    ah.apply_hidiffusion(eager)
    with handle.stats.expect(**SERVED):
        assert relative_difference(request(handle.pipe), request(eager)) < 5e-3
    assert cache.stats.remote_hits == ARTIFACTS - 1 and cache.stats.remote_errors == 0
    again = strict(make_pipe(), CompileCache(tmp_path / "replica", read_only=True, trust=public))
    with again.stats.expect(**SERVED):
        request(again.pipe)


def test_a_bundle_serves(signed: Any, tmp_path: Path, make_pipe: Any) -> None:
    location, public, _ = signed
    CompileCache(location).export_bundle(tmp_path / "bundle.zip")
    cache = CompileCache(tmp_path / "replica", trust=public)
    cache.import_bundle(tmp_path / "bundle.zip")
    handle = strict(make_pipe(), cache)
    with handle.stats.expect(**SERVED):
        request(handle.pipe)


@pytest.mark.filterwarnings("ignore::compile_cache.UntrustedEntryWarning")
def test_what_nobody_signed_serves_no_request(own_cache: Path, make_pipe: Any) -> None:
    cache = CompileCache(own_cache, trust="ed25519:" + "d7" * 32)
    handle = strict(make_pipe(), cache)
    with pytest.raises(ah.GraphMiss, match=r"untrusted: it is not signed by a trusted key \(ed25519:d7d7d7d7d7d7\)"):
        request(handle.pipe)
    handle = ah.accelerate(make_pipe(), hidiffusion=ah.HiDiffusionConfig(), cache=cache, on_miss="eager")
    request(handle.pipe)
    assert handle.stats.hits == 0 and handle.stats.loads == 0 and handle.stats.eager_calls == STEPS
    handle = ah.accelerate(make_pipe(), hidiffusion=ah.HiDiffusionConfig(), cache=cache)
    with pytest.raises(TrustError, match="expected a signing key to store entries"):
        handle.precompile([(128, 192)], STEPS)


def test_pushing_needs_somewhere_to_push_to(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["precompile", str(model_folder), *SIZE, "--push"]) == 2
    assert "--remote" in capsys.readouterr().err


def test_untrusted_is_told_once_for_each_entry(own_cache: Path) -> None:
    cache = CompileCache(own_cache, trust="ed25519:" + "d7" * 32)
    with pytest.warns(UntrustedEntryWarning, match="ed25519:d7d7") as caught:
        assert list(cache.entries()) == []
    assert len(caught) == len(list(cache.digests()))
