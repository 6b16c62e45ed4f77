"""For every test that runs a model: one tiny model, and one cache that is compiled once for the whole test session."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

pytest.register_assert_rewrite("tests.bundles", "tests.entries", "tests.remotes")

STEPS = 7  # [0, 1) windowed+dilated, [1, 2) windowed+pooled, [2, 7) windowed
# 3 resnets, transformer plain and windowed, both ends, downsampler plain and dilated, upsampler by 2 and 4, decoder
ARTIFACTS = 12
KINDS = {"resnet", "transformer", "head", "tail", "downsampler", "upsampler", "decoder"}
BOUND = 37  # 28 blocks, both ends, 4 samplers of which one each has two forms, decoder
SIZES = [(128, 128), (128, 192), (256, 128)]  # (height, width): square, landscape, portrait


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With several workers, a file runs in one of them; all files that fill the cache of the families, in the same."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    families = {item.location[0] for item in items if "families_cache" in getattr(item, "fixturenames", ())}
    for item in items:
        file = item.location[0]
        item.add_marker(pytest.mark.xdist_group("families" if file in families else file))


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny models are fastest on one thread, and then do not disturb each other."""
    torch = sys.modules.get("torch")  # tests without torch stay without it
    if torch is None:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from accel_hidiff.demo import save_model, tiny_config

    return save_model(tmp_path_factory.mktemp("model") / "tiny", config=tiny_config())


@pytest.fixture(scope="session")
def make_pipe() -> Callable[..., Any]:
    from accel_hidiff.demo import build_pipeline, tiny_config

    def make(seed: int = 0) -> Any:
        pipe = build_pipeline(seed, config=tiny_config())
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture(scope="session")
def precompiled(tmp_path_factory: pytest.TempPathFactory, make_pipe: Any) -> tuple[Path, Any]:
    """A cache with every graph of the three sizes, and the report of how it was made.

    One of several workers makes it; each has a copy of its own.
    """
    from tests import needs

    needs.aot()
    location = tmp_path_factory.mktemp("session") / "cache"
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return location, _precompile(location, make_pipe())
    made, report = (tmp_path_factory.getbasetemp().parent / name for name in ("made", "made.pickle"))
    with FileLock(made.with_name("made.lock")):
        if not report.exists():
            shutil.rmtree(made, ignore_errors=True)  # of a worker that failed
            report.write_bytes(pickle.dumps(_precompile(made, make_pipe())))
    return Path(shutil.copytree(made, location)), pickle.loads(report.read_bytes())


def _precompile(location: Path, pipe: Any) -> Any:
    import accel_hidiff as ah

    handle = ah.accelerate(pipe, hidiffusion=ah.HiDiffusionConfig(), cache=location)
    report = handle.precompile(SIZES, STEPS)
    handle.remove()
    return report


@pytest.fixture(scope="session")
def cache_dir(precompiled: Any) -> Path:
    """The session's cache; read it, do not change it."""
    location: Path = precompiled[0]
    return location


@pytest.fixture
def own_cache(cache_dir: Path, tmp_path: Path) -> Path:
    """A copy of the session's cache, to be damaged."""
    return Path(shutil.copytree(cache_dir, tmp_path / "cache"))
