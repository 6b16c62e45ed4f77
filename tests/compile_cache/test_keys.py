"""Keys: the same facts give the same digest, other facts another one, and what has no stable form is refused."""

from __future__ import annotations

import hashlib
import math
import pickle
import subprocess
import sys
from enum import Enum
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import compile_cache
from compile_cache import ABSENT, CacheKey, CompileCacheError, FactorDifference, UnstableFactor

ROOT = Path(compile_cache.__file__).parents[1]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=8
)
FACTORS = st.dictionaries(st.text(), VALUES, max_size=5)


def same(a: object, b: object) -> bool:
    """Equality that tells 1, 1.0 and True, and 0.0 and -0.0 apart: written without JSON on purpose."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return a == b and math.copysign(1, a) == math.copysign(1, b)
    return type(a) is type(b) and a == b


def shuffled(value: object) -> object:
    if isinstance(value, dict):
        return {name: shuffled(value[name]) for name in reversed(list(value))}
    if isinstance(value, list):
        return tuple(shuffled(item) for item in value)
    return value


@given(FACTORS)
def test_order_and_tuples_do_not_count(factors):
    assert CacheKey(factors) == CacheKey(shuffled(factors))
    assert same(CacheKey(factors).factors, factors)


@given(FACTORS, FACTORS)
def test_equal_exactly_when_the_factors_are(a, b):
    one, other = CacheKey(a), CacheKey(b)
    assert (one == other) == same(a, b) == (one.digest == other.digest) == (one.diff(other) == ())


@given(FACTORS, st.text(), VALUES, VALUES)
def test_one_changed_factor_is_the_one_difference(factors, name, before, after):
    first, second = CacheKey({**factors, name: before}), CacheKey({**factors, name: after})
    if same(before, after):
        assert first == second
    else:
        assert first != second
        assert all(d.name == name or d.name.startswith(name) for d in first.diff(second))
        for difference in first.diff(second.factors):
            assert len(str(difference)) < 400 + len(difference.name)


def test_digest_is_sha256_of_prefix_and_canonical_json():
    text = 'compile_cache key v1\n{"a":[1,true,null],"b":{"c":1.0}}'
    key = CacheKey({"b": {"c": 1.0}, "a": (1, True, None)})
    assert key.digest == hashlib.sha256(text.encode()).hexdigest() == str(key)
    assert key.short == key.digest[:12]


def test_digest_is_the_same_in_another_process():
    code = "from compile_cache import CacheKey; print(CacheKey({'x': ['\\u00e9', 0.1], 'a': {'z': 1, 'b': None}}))"
    for seed in ("1", "2"):
        run = [sys.executable, "-c", code]
        env = {"PYTHONHASHSEED": seed}
        out = subprocess.run(run, capture_output=True, text=True, check=True, env=env, cwd=ROOT)
        assert out.stdout.strip() == str(CacheKey({"a": {"b": None, "z": 1}, "x": ["é", 0.1]}))


def test_one_true_and_one_point_zero_are_three_keys():
    assert len({CacheKey({"x": value}) for value in (1, True, 1.0, "1", [1], None)}) == 6


class Colour(Enum):
    RED = 1


@pytest.mark.parametrize(
    ("value", "in_text"),
    [
        ({1, 2}, "set"),
        (b"x", "bytes"),
        (object(), "object"),
        (math.nan, "nan"),
        (math.inf, "inf"),
        ({1: 2}, "int key 1"),
        (Colour.RED, "Colour"),
        (1j, "complex"),
        ("\ud800", "surrogate"),
        (1 << 10000, "10001 bits"),
        (range(3), "range"),
    ],
)
def test_unstable_values_are_refused_with_path_type_and_advice(value, in_text):
    with pytest.raises(UnstableFactor) as caught:
        CacheKey({"model": {"layers": [0, {"kind": value}]}})
    text = str(caught.value)
    assert "model.layers.1.kind" in text and in_text in text and "; " in text and "\n" not in text
    assert isinstance(caught.value, CompileCacheError)


def test_cycles_and_non_mappings_are_refused():
    cycle: dict[str, object] = {}
    cycle["self"] = cycle
    with pytest.raises(UnstableFactor, match="cycle"):
        CacheKey(cycle)
    with pytest.raises(UnstableFactor, match="mapping"):
        CacheKey([("a", 1)])  # type: ignore[arg-type]


def test_subclasses_become_plain_values():
    class Version(str):
        def __str__(self) -> str:
            return "something else"

    assert CacheKey({"torch": Version("2.13.0")}) == CacheKey({"torch": "2.13.0"})


def test_nobody_can_change_a_key():
    source = {"a": {"b": [1]}}
    key = CacheKey(source)
    digest = key.digest
    source["a"]["b"].append(2)
    key.factors["a"]["b"].append(3)  # type: ignore[index,call-overload,union-attr]
    assert key.factors == {"a": {"b": [1]}} and key.digest == digest == CacheKey({"a": {"b": [1]}}).digest
    for change in (lambda: setattr(key, "_digest", "x"), lambda: delattr(key, "_digest")):
        with pytest.raises(AttributeError):
            change()
    assert pickle.loads(pickle.dumps(key)) == key and hash(pickle.loads(pickle.dumps(key))) == hash(key)


def test_differences_read_well():
    here = CacheKey({"environment": {"torch": "2.13.0", "libc": "glibc 2.36"}, "n": 1, "flags": ["a", "b"], "s": 1})
    there = {"environment": {"torch": "2.12.1"}, "n": 1, "flags": ["b", "c"], "s": "1", "new": None}
    assert [str(difference) for difference in here.diff(there)] == [
        "environment.libc: glibc 2.36 here, absent there",
        "environment.torch: 2.13.0 here, 2.12.1 there",
        "flags: a only here, c only there",
        "new: absent here, null there",
        's: 1 here, "1" there',
    ]
    assert here.diff(there)[3] == FactorDifference("new", ABSENT, None)


def test_long_values_are_shortened_around_what_differs():
    text = str(CacheKey({"graph": "x" * 500 + "1"}).diff(CacheKey({"graph": "x" * 500 + "2"}))[0])
    assert len(text) < 120 and "1" in text and "2" in text


def test_names_with_dots_do_not_hide_a_difference():
    assert CacheKey({"a.b": 1}).diff({"a": {"b": 1}})
