"""What runs when an entry is loaded: no pickle, and no cryptography where nothing is signed."""

from __future__ import annotations

import ast
import pickle

import pytest

from compile_cache import CompileCache
from tests.entries import FILES, KEY, OTHER, ROOT, python, signer

MINE = signer(1)

# ---- without cryptography --------------------------------------------------------------------------------------------

BLOCKED = """
import sys
from pathlib import Path
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "cryptography":
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Block())
from compile_cache import CacheKey, CompileCache, SigningKey, TrustError, public_keys
from tests.entries import KEY
location, text = Path(sys.argv[1]), sys.argv[2]
cache = CompileCache(location / "new")
entry = cache.get_or_build(CacheKey({"n": 1}), lambda directory: (directory / "x").write_bytes(b"x") and None)
assert entry.read("x") == b"x" and (entry.path / "x").read_bytes() == b"x" and cache.verify().ok
assert CompileCache(location / "cache").get(KEY).signed_by == (text,)
cache.export_bundle(location / "bundle")
assert CompileCache(location / "imported").import_bundle(location / "bundle").entries
for refused in (
    lambda: CompileCache(location, trust=text),
    lambda: public_keys([text]),
    lambda: SigningKey.generate(),
    lambda: SigningKey.load(location / "key"),
):
    try:
        refused()
    except TrustError as error:
        assert "pip install cryptography" in str(error) and "\\n" not in str(error)
    else:
        raise AssertionError("not refused")
print("unsigned use works")
"""


def test_without_cryptography_only_signatures_are_missing(signed):
    MINE.save(signed.parent / "key")
    assert python(BLOCKED, signed.parent, MINE.public) == "unsigned use works\n"


# ---- nothing is unpickled --------------------------------------------------------------------------------------------

FORBIDDEN = {
    "pickle",
    "_pickle",
    "cPickle",
    "marshal",
    "shelve",
    "dill",
    "cloudpickle",
    "joblib",
    "jsonpickle",
    "numpy",
}
LOAD_PATH = [
    *sorted((ROOT / "compile_cache").glob("*.py")),
    *map(
        ROOT.joinpath,
        ("accel_hidiff/backends/aot.py", "accel_hidiff/backends/aot_package.py", "accel_hidiff/binder.py"),
    ),
]


@pytest.mark.parametrize("path", LOAD_PATH, ids=lambda path: path.stem)
def test_no_module_of_the_load_path_can_unpickle(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            names = [f"{node.func.id}()"]
        for name in names:
            assert name.split(".")[0] not in FORBIDDEN, f"line {node.lineno}: {name}"
            assert name not in ("torch.load", "torch.serialization.load", "torch.hub.load"), f"line {node.lineno}"
            assert name not in ("eval()", "exec()", "__import__()", "compile()"), f"line {node.lineno}"


def test_an_entry_is_loaded_without_pickle(signed, tmp_path, monkeypatch):
    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("pickle was used")

    for name in ("load", "loads", "Unpickler", "_Unpickler", "_load", "_loads"):
        monkeypatch.setattr(pickle, name, forbidden)
    cache = CompileCache(signed, trust=MINE.public)
    entry = cache.get(KEY)
    assert entry.read("code.so") == (entry.path / "code.so").read_bytes() == FILES["code.so"]
    assert cache.verify().ok and list(cache.entries()) and cache.explain(OTHER)
    cache.export_bundle(tmp_path / "bundle")
    assert CompileCache(tmp_path / "other", trust=MINE.public).import_bundle(tmp_path / "bundle").entries
    pulled = CompileCache(tmp_path / "third", trust=MINE.public, remote=signed.as_uri())
    assert pulled.get(KEY) == entry
