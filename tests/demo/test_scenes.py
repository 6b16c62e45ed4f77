"""The drawn scenes: the same from the same seed, at any size, with captions that say what is there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from accel_hidiff.demo.model import assemble
from accel_hidiff.demo.scenes import SHAPES, caption, captions, draw, random_scene, silhouette, vocabulary
from accel_hidiff.demo.training.recipe import CANVASES, model_config, scene_of

SIZES = [(128, 128), (96, 160), (160, 96), (256, 256), (192, 320)]


def test_a_seed_is_a_scene() -> None:
    first, second = scene_of(0, 5, (128, 128)), scene_of(0, 5, (128, 128))
    assert first[0] == second[0] and np.array_equal(first[1], second[1])
    others = [scene_of(*numbers, (128, 128))[1] for numbers in ((0, 6), (1, 5))]
    assert not any(np.array_equal(first[1], other) for other in others)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_a_scene_is_the_same_at_twice_the_size(height: int, width: int) -> None:
    for number in range(5):
        scene = random_scene(np.random.default_rng(number), aspect=width / height)
        small, large = draw(scene, height, width), draw(scene, 2 * height, 2 * width)
        assert small.shape == (height, width, 3) and small.dtype == np.uint8
        halved = np.asarray(Image.fromarray(large).reduce(2)).astype(float)
        assert np.abs(halved - small).mean() < 1.5  # of 255


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_objects_lie_on_the_canvas_and_apart(height: int, width: int) -> None:
    middle = (width / min(height, width) / 2, height / min(height, width) / 2)
    for number in range(60):
        scene = random_scene(np.random.default_rng((9, number)), aspect=width / height)
        masks = [silhouette(thing, 4 * height, 4 * width) for thing in scene.things]
        for thing, mask in zip(scene.things, masks, strict=True):
            whole = silhouette(replace(thing, centre=middle), 4 * height, 4 * width)
            assert mask.sum() == pytest.approx(whole.sum(), rel=0.03)  # of rounding to cells
        assert sum(masks, np.zeros_like(masks[0], int)).max() == 1
        if len(masks) == 1:
            rows, columns = (np.flatnonzero(masks[0].any(axis)) for axis in (1, 0))
            extent = max(np.ptp(rows), np.ptp(columns)) / (4 * min(height, width))
            assert 0.56 < extent < 0.95


def test_captions_use_the_vocabulary_and_are_told_apart_by_their_tokens() -> None:
    pipe = assemble(0, model_config())
    known = set(vocabulary())
    texts = captions() + [caption(random_scene(np.random.default_rng(number))) for number in range(300)]
    assert len(set(captions())) == len(captions()) == len(SHAPES) * 6 * 5
    assert all(known.issuperset(text.split()) for text in texts)
    for tokenizer in (pipe.tokenizer, pipe.tokenizer_2):
        tokens = {text: tuple(tokenizer(text).input_ids) for text in texts}
        assert len(set(tokens.values())) == len(tokens)
        assert max(map(len, tokens.values())) <= tokenizer.model_max_length


def test_canvases_halve_twice() -> None:
    assert sum(share for _, share in CANVASES) == pytest.approx(1)
    assert all(side % 32 == 0 for size, _ in CANVASES for side in size)
