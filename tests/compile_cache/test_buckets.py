"""Ranges and buckets: what is inside, why something is not, and the JSON round trip."""

from __future__ import annotations

import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compile_cache import CacheKey, Range, ShapeBucket


@st.composite
def ranges(draw):
    multiple = draw(st.integers(1, 8))
    low = draw(st.integers(1, 10))
    return Range(low * multiple, draw(st.integers(low, 20)) * multiple, multiple)


def inside(allowed: Range) -> set[int]:
    return set(range(allowed.minimum, allowed.maximum + 1, allowed.multiple))


@given(ranges(), ranges())
def test_intersect_holds_exactly_what_both_hold(a, b):
    both = a.intersect(b)
    assert (set() if both is None else inside(both)) == inside(a) & inside(b)
    assert both == b.intersect(a)


@given(ranges(), st.integers(-5, 200))
def test_reject_agrees_with_the_set(allowed, size):
    reason = allowed.reject(size)
    assert (reason is None) == (size in inside(allowed)) == (size in allowed)
    assert reason is None or str(size) in reason


@pytest.mark.parametrize(
    ("allowed", "size", "reason"),
    [
        (Range(2, 64, 2), 33, "33 is not a multiple of 2"),
        (Range(16, 512, 8), 640, "640 is over the maximum 512"),
        (Range(16, 512, 8), 8, "8 is under the minimum 16"),
        (Range.exactly(64), 65, "65 is not 64"),
        (Range(1, 4), True, "True is not a whole number"),
        (Range(1, 4), 2.0, "2.0 is not a whole number"),
    ],
)
def test_reasons(allowed, size, reason):
    assert allowed.reject(size) == reason


@pytest.mark.parametrize("values", [(0, 4), (4, 2), (1, 4, 0), (3, 8, 2), (2, 7, 2), (-1, 4), (1, 4, -1)])
def test_impossible_ranges(values):
    with pytest.raises(ValueError, match="expected"):
        Range(*values)


@pytest.mark.parametrize("values", [(1.0, 4), (True, 4), (1, "4"), (1, 4, None)])
def test_ranges_of_something_else(values):
    with pytest.raises(TypeError, match="expected an int"):
        Range(*values)


def test_ranges_with_the_same_numbers_are_equal():
    assert Range(64, 64, 8) == Range.exactly(64) and Range.exactly(64).is_exact and not Range(1, 2).is_exact


BUCKET = ShapeBucket({"width": Range.exactly(64), "batch": Range(1, 16), "height": Range(16, 512, 8)})


def test_bucket_text_and_order():
    assert str(BUCKET) == "batch 1..16, height 16..512 step 8, width 64"
    assert list(BUCKET) == list(BUCKET.dims) == ["batch", "height", "width"]


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"batch": 2, "height": 24, "width": 64}, None),
        ({"batch": 2, "height": 28, "width": 64}, "height: 28 is not a multiple of 8"),
        ({"batch": 2, "height": 24}, "width: missing, expected 64"),
        ({"batch": 2, "height": 24, "width": 64, "depth": 1}, "depth: unexpected, the bucket has batch, height, width"),
    ],
)
def test_bucket_reasons(sizes, reason):
    assert BUCKET.reject(sizes) == reason


def test_bucket_is_a_value():
    source = {"a": Range(1, 2)}
    bucket = ShapeBucket(source)
    source["b"] = Range(1, 2)
    assert list(bucket) == ["a"]
    with pytest.raises(TypeError):
        bucket.dims["b"] = Range(1, 2)  # type: ignore[index]
    other = ShapeBucket({name: BUCKET.dims[name] for name in reversed(list(BUCKET))})
    assert other == BUCKET and hash(other) == hash(BUCKET) and pickle.loads(pickle.dumps(BUCKET)) == BUCKET
    assert CacheKey({"shapes": other.to_json()}) == CacheKey({"shapes": BUCKET.to_json()})


@given(st.dictionaries(st.text(), ranges(), max_size=4))
def test_json_round_trip(dims):
    bucket = ShapeBucket(dims)
    assert ShapeBucket.from_json(json.loads(json.dumps(bucket.to_json()))) == bucket


@pytest.mark.parametrize("data", [{"a": {"minimum": 1}}, {"a": 3}, {"a": {"minimum": 1, "maximum": 2, "step": 1}}, [1]])
def test_json_of_something_else(data):
    with pytest.raises((ValueError, TypeError), match="expected"):
        ShapeBucket.from_json(data)


def test_bucket_of_something_else():
    with pytest.raises(TypeError, match="Range"):
        ShapeBucket({"a": 64})  # type: ignore[dict-item]
