"""Tests that need onediff and nexfort, which need an environment of their own: `scripts/test-onediff.sh` makes it."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from typing import Any

import pytest

try:
    metadata.version("nexfort")
except metadata.PackageNotFoundError:
    collect_ignore_glob = ["test_*.py"]

SIZES = [(128, 128), (128, 192), (256, 128)]  # (height, width): square, which is compiled first, landscape, portrait
STEPS = 7
LAYOUTS = ("sdxl", "sd15")


class Pair:
    """A pipeline that nexfort's programs serve, and the patched eager one of the same weights."""

    def __init__(self, layout: str) -> None:
        import accel_hidiff as ah
        from tests import models

        self.layout = layout
        self.served, self.eager = models.build(layout, "text2img"), models.build(layout, "text2img")
        self.handle = ah.accelerate(self.served, hidiffusion=ah.HiDiffusionConfig(), backend="onediff", on_miss="error")
        self.patch = ah.apply_hidiffusion(self.eager)
        self.before = self.handle.explain(*SIZES[1], STEPS)
        self.handle.load(SIZES, STEPS, batch_sizes=[2])

    def images(self, height: int, width: int, **changes: Any) -> tuple[Any, Any]:
        """Latents of one request: (served, eager)."""
        from tests import models

        asked = {"num_inference_steps": STEPS, **changes}
        return tuple(  # type: ignore[return-value]
            pipe(**models.arguments(self.layout, "text2img", height, width, **asked)).images
            for pipe in (self.served, self.eager)
        )


_pairs: dict[str, Pair] = {}


@pytest.fixture(params=LAYOUTS)
def pair(request: pytest.FixtureRequest) -> Pair:
    """One pair for each layout, compiled once for the whole session."""
    if request.param not in _pairs:
        _pairs[request.param] = Pair(request.param)
    return _pairs[request.param]


@pytest.fixture
def sdxl() -> Pair:
    """The pair of SDXL's layout."""
    if "sdxl" not in _pairs:
        _pairs["sdxl"] = Pair("sdxl")
    return _pairs["sdxl"]


@pytest.fixture
def no_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the programs that other tests left in this process."""
    from accel_hidiff.backends import nexfort, programs

    monkeypatch.setattr(nexfort, "_programs", programs.Programs())


@pytest.fixture
def nothing_compiled() -> Iterator[None]:
    """Fails a test in which Dynamo compiled something."""
    from torch._dynamo.utils import counters

    before = counters["stats"]["unique_graphs"]
    yield
    assert counters["stats"]["unique_graphs"] == before, "something was compiled"


@pytest.fixture
def few_regions(monkeypatch: pytest.MonkeyPatch, no_programs: None) -> None:
    """Two regions are compiled, one of them windowed; the rest runs eager, for time."""
    from accel_hidiff import served

    def two(unet: Any) -> Any:
        return [(path, unet.get_submodule(path)) for path in ("down_blocks.1.attentions.0", "mid_block.resnets.0")]

    monkeypatch.setattr(served, "find_blocks", two)
