"""The command line: output, JSON, and the exit codes 0 (done), 1 (damage) and 2 (bad input), each with one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import compile_cache
from compile_cache import CacheKey, CompileCache
from compile_cache.cli import run

KEYS = [CacheKey({"model": "tiny", "n": n}) for n in range(3)]


def build(directory: Path) -> dict[str, object]:
    (directory / "code.so").write_bytes(b"code")
    return {"seconds": 2}


@pytest.fixture
def location(tmp_path):
    cache = CompileCache(tmp_path / "cache")
    for key in KEYS:
        cache.get_or_build(key, build)
    return str(cache.location)


def damage(location: str) -> None:
    for path in Path(location, "v1/blobs").rglob("*"):
        if path.is_file():
            path.write_bytes(b"c0de")


def call(capsys, *arguments: str) -> tuple[int, str, str]:
    code = run(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_ls(capsys, location):
    code, out, err = call(capsys, "ls", location)
    assert code == 0 and err == "" and "3 entries, 4 B (what" in out and all(key.short in out for key in KEYS)
    code, out, err = call(capsys, "ls", location, "--json")
    entries = json.loads(out)["entries"]
    assert code == 0 and sorted(key.digest for key in KEYS) == [entry["digest"] for entry in entries]
    assert all(CacheKey(entry["factors"]).digest == entry["digest"] for entry in entries)


def test_ls_names_damage_on_stderr(capsys, location):
    Path(location, "v1/actions", KEYS[0].digest[:2], f"{KEYS[0].digest}.json").write_bytes(b"")
    code, out, err = call(capsys, "ls", location, "--json")
    assert code == 0 and len(json.loads(out)["entries"]) == 2 and KEYS[0].short in err and err.count("\n") == 1


def test_verify(capsys, location):
    code, out, err = call(capsys, "verify", location)
    assert code == 0 and out == "3 entries, 1 blobs, 4 bytes sound; 0 damaged; 0 blobs without an entry\n" and err == ""
    assert json.loads(call(capsys, "verify", location, "--json")[1])["ok"] is True


def test_verify_finds_and_repairs(capsys, location):
    damage(location)
    code, out, _ = call(capsys, "verify", location)
    assert code == 1 and "4 damaged" in out
    code, out, _ = call(capsys, "verify", location, "--json", "--repair")
    report = json.loads(out)
    assert code == 1 and not report["ok"] and len(report["damaged"]) == 4 and report["repaired"]
    code, out, _ = call(capsys, "verify", location, "--json")
    assert code == 0 and json.loads(out)["entries"] == 0


def test_explain(capsys, location):
    code, out, err = call(capsys, "explain", location, KEYS[1].digest[:10])
    assert code == 0 and err == "" and KEYS[1].digest in out and "n: 1" in out and "code.so: 4 bytes" in out
    code, out, _ = call(capsys, "explain", location, KEYS[1].digest.upper(), "--json")
    assert code == 0 and json.loads(out)["factors"] == {"model": "tiny", "n": 1}
    assert json.loads(out)["files"]["code.so"]["size"] == 4 and json.loads(out)["notes"] == {"seconds": 2}


def test_explain_damaged(capsys, location):
    damage(location)
    code, out, err = call(capsys, "explain", location, KEYS[1].digest)
    assert code == 1 and out == "" and err.count("\n") == 1 and "SHA-256" in err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--nonsense"],
        ["prune-everything"],
        ["ls"],
        ["ls", "{tmp}/absent"],
        ["ls", "{tmp}"],
        ["ls", "{tmp}/file"],
        ["verify", ""],
        ["verify", "{cache}", "--fix"],
        ["explain", "{cache}"],
        ["explain", "{cache}", ""],
        ["explain", "{cache}", "zzz"],
        ["explain", "{cache}", "../../etc"],
        ["explain", "{cache}", "0" * 64],
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, location, tmp_path, arguments):
    (tmp_path / "file").write_bytes(b"")
    code, out, err = call(capsys, *[text.format(tmp=tmp_path, cache=location) for text in arguments])
    assert code == 2 and out == "" and err.count("\n") == 1 and err.startswith("compile-cache: ")


def test_ambiguous_prefix(capsys, tmp_path):
    cache = CompileCache(tmp_path)
    for n in range(17):  # 17 digests cannot all begin differently
        cache.get_or_build(CacheKey({"n": n}), build)
    first = [digest[0] for digest in cache.digests()]
    twice = next(letter for letter in first if first.count(letter) > 1)
    code, _, err = call(capsys, "explain", str(tmp_path), twice)
    assert code == 2 and f"{first.count(twice)} entries" in err


def test_help_and_a_real_process(location):
    def real(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "compile_cache.cli", *arguments]
        root = Path(compile_cache.__file__).parents[1]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=30, check=False)

    done = real("--help")
    assert done.returncode == 0 and all(name in done.stdout for name in ("ls", "verify", "explain"))
    damage(location)
    done = real("verify", location)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    done = real("explain", location, "zzz")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stdout == ""


def test_ctrl_c_is_one_line_and_exit_code_1(capsys, monkeypatch, location):
    def interrupted(self, repair=False):
        raise KeyboardInterrupt

    monkeypatch.setattr(CompileCache, "verify", interrupted)
    assert call(capsys, "verify", location) == (1, "", "compile-cache: interrupted\n")
