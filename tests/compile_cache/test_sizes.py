"""Families of size buckets: one bucket or a reason for every size, and the nearest size by brute force."""

from __future__ import annotations

import copy
import itertools
import json
import math
import pickle
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compile_cache import CacheKey, Range, sizes
from compile_cache.sizes import SDXL_TRAINING_SIZES, Match, ShapeBuckets, SizeBucket

SDXL = ShapeBuckets.aspect_ratios()
examples = settings(max_examples=200, deadline=None)


@st.composite
def sides(draw):
    multiple = draw(st.integers(1, 12))
    low = draw(st.integers(1, 6))
    return Range(low * multiple, draw(st.integers(low, low + 14)) * multiple, multiple)


@st.composite
def size_buckets(draw, name="a"):
    width, height = draw(sides()), draw(sides())
    if draw(st.booleans()):
        width, height = Range.exactly(width.minimum), Range.exactly(height.minimum)
    least, most = width.minimum * height.minimum, width.maximum * height.maximum
    return SizeBucket(name, width, height, draw(st.none() | st.integers(least, most + 5)))


@st.composite
def families(draw):
    return ShapeBuckets([draw(size_buckets(name)) for name in "abcd"[: draw(st.integers(1, 4))]])


requests = st.tuples(st.integers(1, 200), st.integers(1, 200))


def inside(bucket: SizeBucket) -> list[tuple[int, int]]:
    ranges = (range(side.minimum, side.maximum + 1, side.multiple) for side in (bucket.width, bucket.height))
    limit = math.inf if bucket.max_area is None else bucket.max_area
    return [(width, height) for width, height in itertools.product(*ranges) if width * height <= limit]


def distance(size, wanted) -> float:
    ratio, area = size[0] / size[1], size[0] * size[1]
    return 4 * abs(math.log(ratio * wanted[1] / wanted[0])) + abs(math.log(area / wanted[0] / wanted[1]))


def exact_order(size, wanted):
    """What orders the sizes, ties included: exp(distance), the pixels, the width."""
    ratio, area = Fraction(size[0] * wanted[1], size[1] * wanted[0]), size[0] * size[1]
    area_factor = Fraction(area, wanted[0] * wanted[1])
    ratio, area_factor = (factor if factor >= 1 else 1 / factor for factor in (ratio, area_factor))
    return ratio * ratio * ratio * ratio * area_factor, area, size[0]


def one_line(text: str) -> bool:
    return bool(text) and text.isprintable()


# The table of the paper's Appendix I, for the check of the constant: height, width, ratio (height / width).
PAPER = """
512 2048 0.25  512 1984 0.26  512 1920 0.27  512 1856 0.28  576 1792 0.32  576 1728 0.33  576 1664 0.35  640 1600 0.4
640 1536 0.42  704 1472 0.48  704 1408 0.5   704 1344 0.52  768 1344 0.57  768 1280 0.6   832 1216 0.68  832 1152 0.72
896 1152 0.78  896 1088 0.82  960 1088 0.88  960 1024 0.94  1024 1024 1.0  1024 960 1.07  1088 960 1.13  1088 896 1.21
1152 896 1.29  1152 832 1.38  1216 832 1.46  1280 768 1.67  1344 768 1.75  1408 704 2.0   1472 704 2.09  1536 640 2.4
1600 640 2.5   1664 576 2.89  1728 576 3.0   1792 576 3.11  1856 512 3.62  1920 512 3.75  1984 512 3.88  2048 512 4.0
"""


def test_sdxl_sizes_are_those_of_the_paper():
    rows = list(zip(*[iter(PAPER.split())] * 3, strict=True))
    assert tuple((int(width), int(height)) for height, width, _ in rows) == SDXL_TRAINING_SIZES
    for (width, height), (_, _, ratio) in zip(SDXL_TRAINING_SIZES, rows, strict=True):
        assert width % 64 == height % 64 == 0 and abs(height / width - float(ratio)) < 0.006
    assert len(set(SDXL_TRAINING_SIZES)) == 40 and len(SDXL) == 40
    assert SDXL.find(1344, 704) and not SDXL.find(704, 1344)  # the table of the paper is not symmetric


@examples
@given(size_buckets(), requests)
def test_reject_count_and_area_agree_with_the_set(bucket, size):
    sizes = inside(bucket)
    reason = bucket.reject(*size)
    assert (reason is None) == (size in sizes) and bucket.count == len(sizes) >= 1
    assert reason is None or (one_line(reason) and reason.split(":")[0] in ("width", "height", "area"))


@examples
@given(families(), requests)
def test_a_request_has_exactly_one_bucket_or_a_reason(family, size):
    match = family.find(*size)
    serving = [bucket for bucket in family if size in inside(bucket)]
    assert bool(match) == bool(serving) and one_line(match.reason) and "{}x{}".format(*size) in match.reason
    if serving:
        # False sorts first: exact buckets, then the fewest sizes; min() keeps the first of equals.
        assert match.bucket is min(serving, key=lambda bucket: (not bucket.is_exact, len(inside(bucket))))
    else:
        assert match.bucket is None and "in no bucket" in match.reason


@examples
@given(families(), requests)
def test_snap_is_the_nearest_size_and_idempotent(family, size):
    snapped = family.snap(*size)
    got = (snapped.width, snapped.height)
    served = {each for bucket in family for each in inside(bucket)}
    assert got in served and family.find(*got).bucket is snapped.bucket and one_line(snapped.reason)
    assert got == min(served, key=lambda each: exact_order(each, size))
    assert distance(got, size) <= min(distance(each, size) for each in served) + 1e-9
    assert (got == size) == (size in served) == bool(family.find(*size))
    again = family.snap(*got)
    assert (again.width, again.height, again.bucket) == (*got, snapped.bucket)


@examples
@given(size_buckets(), st.tuples(st.integers(1, 10**6), st.integers(1, 10**6)))
def test_nearest_of_far_requests(bucket, size):
    assert bucket.nearest(*size) == min(inside(bucket), key=lambda each: exact_order(each, size))


@examples
@given(st.tuples(st.integers(1, 4096), st.integers(1, 4096)))
def test_nearest_in_a_realistic_range_respects_the_area(size):
    family = ShapeBuckets.symbolic(minimum=512, maximum=2048, max_area=2**20)
    snapped = family.snap(*size)
    assert snapped.width * snapped.height <= 2**20 and family.find(snapped.width, snapped.height)
    served = inside(snapped.bucket)
    assert (snapped.width, snapped.height) == min(served, key=lambda each: exact_order(each, size))


@examples
@given(st.tuples(st.integers(1, 900), st.integers(1, 900)), st.integers(2, 9))
def test_how_far_the_area_is_off_does_not_change_the_aspect_ratio(size, factor):
    near, far = (
        ShapeBuckets.exact((width * times, height * times) for width, height in SDXL_TRAINING_SIZES).snap(*size)
        for times in (1, factor)
    )
    assert (near.width * factor, near.height * factor) == (far.width, far.height)


@examples
@given(st.tuples(st.integers(1, 10**5), st.integers(1, 10**5)))
def test_nearest_looks_at_few_sizes(size):
    looked = []
    rank = sizes._rank
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sizes, "_rank", lambda *each: looked.append(each) or rank(*each))
        SizeBucket("a", Range(256, 8192, 8), Range(256, 8192, 8), 2**21).nearest(*size)
    assert len(looked) < 100  # of 993 columns


@pytest.mark.parametrize(
    ("size", "nearest"),
    [
        ((832, 1216), (832, 1216)),
        ((1000, 1500), (832, 1216)),
        ((1920, 1080), (1344, 768)),
        ((256, 256), (1024, 1024)),
        ((4096, 4096), (1024, 1024)),
        ((704, 1344), (704, 1408)),
        ((1, 10**9), (512, 2048)),
    ],
)
def test_snap_to_the_sdxl_sizes(size, nearest):
    snapped = SDXL.snap(*size)
    assert (snapped.width, snapped.height, snapped.bucket.name) == (*nearest, "{}x{}".format(*nearest))


@pytest.mark.parametrize(
    ("sizes", "size", "nearest"),
    [
        ([(120, 100), (100, 120)], (110, 110), (100, 120)),  # same distance and area: the smaller width
        ([(200, 200), (50, 50)], (100, 100), (50, 50)),  # same distance: fewer pixels
        ([(120, 60), (400, 200)], (90, 45), (120, 60)),  # same aspect ratio: the area decides
        ([(100, 100), (300, 200)], (150, 101), (300, 200)),  # the aspect ratio before the area
    ],
)
def test_ties_and_weights(sizes, size, nearest):
    for order in (sizes, sizes[::-1]):
        snapped = ShapeBuckets.exact(order).snap(*size)
        assert (snapped.width, snapped.height) == nearest


def test_reasons():
    nearest = "1000x1500 is in no bucket; nearest is 832x1216 (aspect ratio 0.684 for 0.667, 67 % of the area)"
    assert SDXL.snap(1000, 1500).reason == nearest
    assert SDXL.find(1000, 1500) == Match(None, f"{nearest}; bucket 832x1216: width: 1000 is not 832")
    assert SDXL.find(832, 1216).reason == SDXL.snap(832, 1216).reason == "832x1216 is in bucket 832x1216"
    area = ShapeBuckets.symbolic(minimum=512, maximum=2048, max_area=2**20)
    reason = area.find(2048, 1024).reason
    assert reason.endswith("bucket symbolic: area: 2048x1024 is 2097152 pixels, over the maximum 1048576")
    assert area.find(512, 520).reason.endswith("height: 520 is not a multiple of 64")


def test_which_bucket_wins():
    wide = ShapeBuckets.symbolic(minimum=64, maximum=4096, name="a wide one")
    limited = ShapeBuckets.symbolic(minimum=64, maximum=4096, max_area=2**20, name="limited")
    same = ShapeBuckets.symbolic(minimum=64, maximum=4096, max_area=2**20, name="same")
    family = wide + limited + same + SDXL
    got = [family.find(*size).bucket for size in ((1024, 1024), (1024, 512), (4096, 4096))]
    assert [bucket and bucket.name for bucket in got] == ["1024x1024", "limited", "a wide one"]
    one = Range.exactly(8)
    first, second = SizeBucket("first", one, one), SizeBucket("second", one, one)
    assert ShapeBuckets([first, second]).find(8, 8).bucket is first


def test_aspect_ratios_scale_round_and_merge():
    assert [bucket.name for bucket in ShapeBuckets.aspect_ratios(0.5, 8)][:2] == ["1024x256", "992x256"]
    halved = ShapeBuckets.aspect_ratios(0.5)
    sizes = [(bucket.width.minimum, bucket.height.minimum) for bucket in halved]
    assert len(set(sizes)) == len(sizes) < 40 and all(side % 64 == 0 for size in sizes for side in size)
    assert halved.find(448, 640)  # 416 and 608 lie half-way between multiples
    assert str(ShapeBuckets.aspect_ratios(0.001)) == "size buckets: 64x64"
    assert len(ShapeBuckets.aspect_ratios(2)) == 40 and ShapeBuckets.aspect_ratios(2).find(1664, 2432)
    assert ShapeBuckets.aspect_ratios(1.5, 1, [(3, 5)]).find(5, 8)


@examples
@given(st.floats(0.05, 4), st.integers(1, 130))
def test_scaled_sides_are_the_nearest_multiples(scale, multiple):
    family = ShapeBuckets.aspect_ratios(scale, multiple)
    got = [(bucket.width.minimum, bucket.height.minimum) for bucket in family]
    assert all(side % multiple == 0 for size in got for side in size) and len(set(got)) == len(got)
    for size in SDXL_TRAINING_SIZES:
        wanted = [Fraction(scale) * side for side in size]
        # A side lies in (wanted - multiple / 2, wanted + multiple / 2]; the smallest one is the multiple itself.
        near = [
            [
                -multiple < 2 * (side - want) <= multiple or want < side == multiple
                for side, want in zip(each, wanted, strict=True)
            ]
            for each in got
        ]
        assert near.count([True, True]) == 1


def test_joining():
    other = ShapeBuckets.exact([(64, 64), (1024, 1024), (64, 64)])
    both = other + SDXL
    assert [bucket.name for bucket in both][:3] == ["64x64", "1024x1024", "2048x512"] and len(both) == 41
    assert both == other + SDXL and hash(both) == hash(other + SDXL) and both != SDXL + other
    with pytest.raises(ValueError, match="unique"):
        ShapeBuckets.symbolic(minimum=64, maximum=128) + ShapeBuckets.symbolic(minimum=64, maximum=192)
    with pytest.raises(TypeError):
        SDXL + 1  # type: ignore[operator]


def test_text():
    assert str(SDXL) == "size buckets: 2048x512; 1984x512; 1920x512; 1856x512; and 36 more"
    area = ShapeBuckets.symbolic(minimum=512, maximum=2048, max_area=2**20)
    sides = "512..2048 step 64"
    assert str(area) == f"size buckets: symbolic (width {sides}, height {sides}, area up to 1048576)"
    assert str(SizeBucket("square", Range.exactly(64), Range.exactly(64))) == "square (64x64)"


@examples
@given(families())
def test_round_trips(family):
    again = ShapeBuckets.from_json(json.loads(json.dumps(family.to_json())))
    assert again == family and list(again) == list(family) and hash(again) == hash(family)
    assert again.find(60, 60) == family.find(60, 60)
    assert pickle.loads(pickle.dumps(family)) == copy.deepcopy(family) == family
    assert CacheKey({"sizes": again.to_json()}) == CacheKey({"sizes": family.to_json()})


def test_a_family_is_a_value():
    source = list(SDXL)
    family = ShapeBuckets(source)
    source.clear()
    assert family == SDXL and len(family) == 40


EXACTLY = Range.exactly(64)
JSON = SizeBucket("a", EXACTLY, EXACTLY).to_json()


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: SDXL.find(1024.0, 1024), TypeError),
        (lambda: SDXL.snap(1024, True), TypeError),
        (lambda: SDXL.find("1024", 1024), TypeError),
        (lambda: SDXL.find(0, 1024), ValueError),
        (lambda: SDXL.snap(1024, -1), ValueError),
        (lambda: SDXL.snap(1 << 100_000, 1), ValueError),
        (lambda: next(iter(SDXL)).nearest(1024, None), TypeError),
        (lambda: SizeBucket("", EXACTLY, EXACTLY), ValueError),
        (lambda: SizeBucket("a\nb", EXACTLY, EXACTLY), ValueError),
        (lambda: SizeBucket(7, EXACTLY, EXACTLY), TypeError),
        (lambda: SizeBucket("a", 64, EXACTLY), TypeError),
        (lambda: SizeBucket("a", EXACTLY, (64, 64)), TypeError),
        (lambda: SizeBucket("a", EXACTLY, EXACTLY, 64 * 64 - 1), ValueError),
        (lambda: SizeBucket("a", EXACTLY, EXACTLY, 0), ValueError),
        (lambda: SizeBucket("a", EXACTLY, EXACTLY, 1e6), TypeError),
        (lambda: ShapeBuckets([]), ValueError),
        (lambda: ShapeBuckets([EXACTLY]), TypeError),
        (lambda: ShapeBuckets([SizeBucket("a", EXACTLY, EXACTLY), SizeBucket("a", Range(1, 2), EXACTLY)]), ValueError),
        (lambda: ShapeBuckets.exact([]), ValueError),
        (lambda: ShapeBuckets.exact([64, 64]), TypeError),
        (lambda: ShapeBuckets.exact([(64, 64, 64)]), TypeError),
        (lambda: ShapeBuckets.exact([(64, 0)]), ValueError),
        (lambda: ShapeBuckets.exact(["64"]), TypeError),
        (lambda: ShapeBuckets.symbolic(minimum=100, maximum=2048), ValueError),
        (lambda: ShapeBuckets.symbolic(minimum=512, maximum=2048, max_area=100), ValueError),
        (lambda: ShapeBuckets.aspect_ratios(0.0), ValueError),
        (lambda: ShapeBuckets.aspect_ratios(math.nan), ValueError),
        (lambda: ShapeBuckets.aspect_ratios(math.inf), ValueError),
        (lambda: ShapeBuckets.aspect_ratios("1"), TypeError),
        (lambda: ShapeBuckets.aspect_ratios(1.0, 0), ValueError),
        (lambda: ShapeBuckets.aspect_ratios(1.0, 64, [(1, "2")]), TypeError),
        (lambda: ShapeBuckets.from_json({"buckets": []}), TypeError),
        (lambda: ShapeBuckets.from_json([{"name": "a"}]), ValueError),
        (lambda: ShapeBuckets.from_json([{**JSON, "more": 1}]), ValueError),
        (lambda: ShapeBuckets.from_json([{**JSON, "name": None}]), TypeError),
        (lambda: ShapeBuckets.from_json([{**JSON, "width": 64}]), ValueError),
        (lambda: ShapeBuckets.from_json("ab"), ValueError),
    ],
)
def test_bad_input_is_one_line(make, error):
    with pytest.raises(error, match="expected") as caught:
        make()
    assert one_line(str(caught.value)) and "; " in str(caught.value)
