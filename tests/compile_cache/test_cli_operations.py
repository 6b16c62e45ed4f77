"""The commands that change, sign and ship a cache: what they do, what they print, and how they refuse."""

from __future__ import annotations

import io
import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

import compile_cache
from compile_cache import CacheKey, CompileCache
from compile_cache.cli import run
from compile_cache.commands import BadInput, parse_bytes, parse_seconds, show_bytes, show_seconds

pytest.importorskip("cryptography")

KEYS = [CacheKey({"model": "tiny", "n": n, "versions": {"lib": f"1.{n}"}}) for n in range(3)]


def build_of(number: int):
    def build(directory: Path) -> None:
        (directory / "code.so").write_bytes(bytes([number]) * 1000)

    return build


@pytest.fixture
def location(tmp_path):
    cache = CompileCache(tmp_path / "cache")
    for number, key in enumerate(KEYS):
        cache.get_or_build(key, build_of(number))
        used = cache.location / "v1/used" / key.digest[:2] / key.digest
        cache.get(key)
        os.utime(used, (time.time() - 3600 * (3 - number),) * 2)
    return str(cache.location)


@pytest.fixture
def private(tmp_path, capsys):
    path = tmp_path / "key"
    assert run(["keygen", str(path)]) == 0
    return path, capsys.readouterr().out.strip()


def call(capsys, *arguments: object) -> tuple[int, str, str]:
    code = run([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def left(location: str) -> list[str]:
    return sorted(CompileCache(location).digests())


def digests(*keys: CacheKey) -> list[str]:
    return sorted(key.digest for key in keys)


def test_prune_by_bytes_takes_the_least_recently_used(capsys, location):
    code, out, _ = call(capsys, "prune", location, "--max-bytes", "2500", "--dry-run")
    assert code == 0 and f"would be removed {KEYS[0].short}" in out and left(location) == digests(*KEYS)
    code, out, _ = call(capsys, "prune", location, "--max-bytes", "3KB", "--json")
    report = json.loads(out)
    assert [one["digest"] for one in report["removed"]] == [KEYS[0].digest] and report["bytes"] <= 3000
    assert left(location) == digests(*KEYS[1:]) and CompileCache(location).verify().ok


def test_prune_by_age_and_pins(capsys, location):
    assert call(capsys, "pin", location, KEYS[0].short)[0] == 0
    code, out, _ = call(capsys, "prune", location, "--max-age", "90m")
    assert code == 0 and f"kept {KEYS[0].short}" in out and left(location) == digests(KEYS[0], KEYS[2])
    assert "pinned" in call(capsys, "ls", location)[1]
    assert call(capsys, "unpin", location, KEYS[0].short)[0] == 0
    call(capsys, "prune", location, "--max-age", "90m")
    assert left(location) == digests(KEYS[2])


def test_prune_superseded(capsys, location):
    assert call(capsys, "prune", location, "--superseded", "versions")[0] == 0 and len(left(location)) == 3  # n differs
    code, out, _ = call(capsys, "prune", location, "--superseded", "versions", "--superseded", "n")
    assert code == 0 and len(left(location)) == 1 and out.count("superseded by") == 2


def test_prune_foreign(capsys, tmp_path):
    pytest.importorskip("torch")
    here = compile_cache.environment_factors("cpu")
    cache = CompileCache(tmp_path / "cache")
    mine, old, other = (
        CacheKey({"environment": environment})
        for environment in (here, {**here, "torch": "2.1.0"}, {"device": "cuda", "capability": "sm_80"})
    )
    for key in (mine, old, other):
        cache.get_or_build(key, build_of(1))
    code, out, _ = call(capsys, "prune", cache.location, "--foreign")
    assert code == 0 and "torch: " in out and "2.1.0 there" in out
    assert left(str(cache.location)) == digests(mine, other)  # of a device that is not here, nothing can be said


def test_clean_asks(capsys, location, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    code, _, err = call(capsys, "clean", location)
    assert code == 1 and len(left(location)) == 3 and "interrupted" in err  # nobody answers
    held = CompileCache(location).get(KEYS[1])
    code, out, _ = call(capsys, "clean", location, "--yes")
    assert code == 0 and left(location) == digests(KEYS[1]) and "in use" in out
    assert held.read("code.so") == bytes([1]) * 1000
    del held
    assert call(capsys, "clean", location, "--yes")[0] == 0 and left(location) == []
    assert not list(Path(location, "v1/blobs").glob("*/*")) and not list(Path(location, "v1/used").glob("*/*"))


def test_keygen(capsys, tmp_path, private):
    path, public = private
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and public.startswith("ed25519:")
    assert (tmp_path / "key.pub").read_text().strip() == public
    before = path.read_bytes()
    code, _, err = call(capsys, "keygen", path)
    assert code == 2 and "exists" in err and err.count("\n") == 1 and path.read_bytes() == before


def test_sign_and_trust(capsys, tmp_path, location, private):
    path, public = private
    code, out, err = call(capsys, "verify", location, "--trust", public)
    assert code == 1 and "3 untrusted" in out and out.count("not signed by a trusted key") == 3
    code, out, err = call(capsys, "ls", location, "--trust", tmp_path / "key.pub")
    assert code == 0 and "0 entries" in out and err.count("not signed") == 3
    assert call(capsys, "sign", location, "--key-file", path, "--key", KEYS[0].short)[1].startswith("1 entries signed")
    assert call(capsys, "sign", location, "--key-file", path)[1].startswith("2 entries signed")  # the others
    code, out, _ = call(capsys, "verify", location, "--trust", public)
    assert code == 0 and "0 untrusted" in out
    assert "signed" in call(capsys, "ls", location)[1]
    code, out, _ = call(capsys, "explain", location, KEYS[0].short, "--json")
    assert json.loads(out)["signed_by"] == [public]


def test_bundle_round_trip(capsys, tmp_path, location, private):
    path, public = private
    bundle, copy = tmp_path / "bundle.zip", tmp_path / "copy"
    code, out, _ = call(capsys, "export", location, bundle, "--key-file", path)
    assert code == 0 and out.startswith("3 entries written")
    code, out, _ = call(capsys, "import", copy, bundle, "--trust", public)
    assert code == 0 and out.startswith("3 entries stored") and left(str(copy)) == digests(*KEYS)
    assert stat.S_IMODE(copy.stat().st_mode) == 0o700
    code, out, _ = call(capsys, "import", copy, bundle, "--json")
    assert json.loads(out)["entries"] == [] and sorted(json.loads(out)["kept"]) == digests(*KEYS)
    code, _, err = call(capsys, "import", tmp_path / "other", bundle, "--trust", "ed25519:" + "1" * 64)
    assert code == 1 and err.count("\n") == 1 and "not by a trusted key" in err
    assert not (tmp_path / "other").exists()


def test_push_and_pull(capsys, tmp_path, location):
    url = f"file://{tmp_path}/remote"
    code, out, _ = call(capsys, "push", location, url)
    assert code == 0 and out.startswith("3 entries sent")
    assert "0 B transferred" not in out and json.loads(call(capsys, "push", location, url, "--json")[1])["entries"] == 3
    code, out, _ = call(capsys, "pull", tmp_path / "copy", url)
    assert code == 0 and out.startswith("3 entries fetched") and left(str(tmp_path / "copy")) == digests(*KEYS)
    code, _, err = call(capsys, "push", location, "nosuch://bucket")
    assert code in (1, 2) and err.count("\n") == 1 and "nosuch" in err


def test_explain_tells_why_a_key_is_missing(capsys, tmp_path, location):
    factors = tmp_path / "factors.json"
    factors.write_text(json.dumps({**KEYS[0].factors, "versions": {"lib": "2.0"}}))
    code, out, _ = call(capsys, "explain", location, factors)
    assert code == 0 and "missing" in out and "versions.lib: 2.0 here, 1.0 there" in out
    code, out, _ = call(capsys, "explain", location, factors, "--json")
    assert json.loads(out)["nearest"][0]["digest"] == KEYS[0].digest
    factors.write_text(json.dumps(KEYS[0].factors))
    assert KEYS[0].digest in call(capsys, "explain", location, factors)[1]
    for text in ("[1]", "{", '{"a": NaN}'):
        factors.write_text(text)
        code, _, err = call(capsys, "explain", location, factors)
        assert code == 2 and err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("prune", "LOCATION", "--max-bytes", "many"),
        ("prune", "LOCATION", "--max-age", "0d"),
        ("prune", "LOCATION", "--max-bytes", "5 parsecs"),
        ("pin", "LOCATION", "zz"),
        ("sign", "LOCATION", "--key-file", "LOCATION/none"),
        ("sign", "LOCATION"),
        ("verify", "LOCATION", "--trust", "ed25519:12"),
        ("verify", "LOCATION", "--trust", "LOCATION/none.pub"),
        ("export", "LOCATION", "LOCATION/b.zip", "--key", "zz"),
        ("push", "LOCATION"),
    ],
)
def test_bad_input(capsys, location, arguments):
    before = left(location)
    code, out, err = call(capsys, *(argument.replace("LOCATION", location) for argument in arguments))
    assert code == 2 and out == "" and err.count("\n") == 1 and err.startswith("compile-cache: ")
    assert left(location) == before


@pytest.mark.parametrize("command", ["import", "export"])
def test_a_bundle_that_cannot_be(capsys, tmp_path, location, command):
    bundle = tmp_path / "missing" / "b.zip"
    code, out, err = call(capsys, command, location, bundle)
    assert code == 1 and out == "" and err.count("\n") == 1 and not bundle.parent.exists()


def test_sizes_and_times_as_text():
    assert [parse_bytes(text) for text in ("500", "2kB", "1KiB", "1.5 GiB", "1g")] == [
        500,
        2000,
        1024,
        1610612736,
        1 << 30,
    ]
    assert [parse_seconds(text) for text in ("90", "2m", "1h", "30d")] == [90, 120, 3600, 2592000]
    for text in ("", "-1", "0", "1 parsec", "h"):
        with pytest.raises(BadInput, match="expected"):
            parse_seconds(text)
    assert show_bytes(0) == "0 B" and show_bytes(1536) == "1.5 KiB" and show_bytes(5 << 40) == "5.0 TiB"
    assert [show_seconds(s) for s in (5, 600, 7200, 864000)] == ["5 s", "10 min", "2 h", "10 d"]


def test_commands_need_no_torch(location):
    code = "import sys; sys.modules['torch'] = None\nfrom compile_cache.cli import run\n"
    code += f"sys.exit(run(['ls', {location!r}]))"
    root = Path(compile_cache.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0 and "3 entries" in done.stdout, done.stderr
    done = subprocess.run(
        [sys.executable, "-c", code.replace("'ls', ", "'prune', '--foreign', ")],
        capture_output=True,
        text=True,
        check=False,
        cwd=root,
    )
    assert done.returncode == 2 and "torch" in done.stderr and done.stderr.count("\n") == 1
