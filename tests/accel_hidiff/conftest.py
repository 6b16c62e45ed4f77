"""Fixtures shared by the tests of accel_hidiff: a tiny SDXL pipeline, module snapshots, and the golden cases."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

from accel_hidiff.clock import PipelineClock
from accel_hidiff.demo import build_pipeline, tiny_config
from tests.tensors import read_tensors

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
STEPS = 7  # the smallest number of steps with all of SDXL's phases: [0, 1) dilated, [1, 2) pooled, [2, 7) windowed only


@pytest.fixture(scope="session")
def build() -> Callable[[], StableDiffusionXLPipeline]:
    """Builds a tiny pipeline (70 ms), always with the same weights."""

    def make() -> StableDiffusionXLPipeline:
        pipeline = build_pipeline(config=tiny_config())
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return make


@pytest.fixture
def pipe(build: Any) -> StableDiffusionXLPipeline:
    return build()


@pytest.fixture
def unet(build: Any) -> UNet2DConditionModel:
    return build().unet


@pytest.fixture(scope="session")
def generate() -> Callable[..., torch.Tensor]:
    """The latents (1, 4, 16, 24) of one request; `generator="global"` draws them from torch's global generator."""

    def run(pipe: Any, seed: int = 0, steps: int = STEPS, **kwargs: Any) -> torch.Tensor:
        if "generator" not in kwargs:
            kwargs["generator"] = torch.Generator().manual_seed(seed)
        elif kwargs["generator"] == "global":
            del kwargs["generator"]
        arguments = {"height": 128, "width": 192, "num_inference_steps": steps, "output_type": "latent", **kwargs}
        return pipe("a red circle", **arguments).images

    return run


@pytest.fixture(scope="module")
def plain_image(one_thread: None, build: Any, generate: Any) -> torch.Tensor:
    """What a pipeline that was never patched makes of seed 0."""
    return generate(build())


@pytest.fixture(scope="module")
def patched_image(one_thread: None, build: Any, generate: Any) -> torch.Tensor:
    """What a fresh patched pipeline makes of seed 0."""
    from accel_hidiff import apply_hidiffusion

    pipe = build()
    apply_hidiffusion(pipe)
    return generate(pipe)


@pytest.fixture(scope="session")
def inputs() -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
    """(args, kwargs) of a call of the tiny pipeline's UNet, seeded."""

    def make(height: int = 16, width: int = 24, batch: int = 1) -> tuple[tuple[Any, ...], dict[str, Any]]:
        draw = torch.Generator().manual_seed(height * 1000 + width)
        added = {
            "text_embeds": torch.randn(batch, 16, generator=draw),
            "time_ids": torch.randn(batch, 6, generator=draw),
        }
        sample = torch.randn(batch, 4, height, width, generator=draw)
        text = torch.randn(batch, 7, 32, generator=draw)
        return (sample, torch.tensor(500), text), {"added_cond_kwargs": added}

    return make


_CONTAINERS = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks")


@pytest.fixture(scope="session")
def snapshot() -> Callable[[Any], dict[str, list[tuple[str, Any]]]]:
    """Attribute names, in order, and values of an object, and of all submodules where it is a module."""

    def take(owner: Any) -> dict[str, list[tuple[str, Any]]]:
        if not isinstance(owner, torch.nn.Module):
            return {"": list(vars(owner).items())}
        seen: dict[str, list[tuple[str, Any]]] = {}
        for path, module in owner.named_modules():
            seen[path] = [("__class__", type(module)), *vars(module).items()]
            for name in _CONTAINERS:
                seen[f"{path}:{name}"] = list(vars(module)[name].items())
        return seen

    return take


@pytest.fixture(scope="session")
def assert_identical() -> Callable[[Any, Any], None]:
    """Compares two snapshots: the same names in the same order, and the very same objects."""

    def check(before: dict[str, list[tuple[str, Any]]], after: dict[str, list[tuple[str, Any]]]) -> None:
        assert list(before) == list(after)
        for path, items in before.items():
            assert [name for name, _ in items] == [name for name, _ in after[path]], path
            for (name, old), (_, new) in zip(items, after[path], strict=True):
                assert old is new, f"{path}.{name}"

    return check


@pytest.fixture
def positions(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Every (step, N) that a clock gives from now on."""
    seen: list[tuple[int, int]] = []
    real = PipelineClock.position

    def position(self: PipelineClock, timestep: Any) -> Any:
        found = real(self, timestep)
        seen.append(tuple(found))
        return found

    monkeypatch.setattr(PipelineClock, "position", position)
    return seen


@pytest.fixture(scope="session")
def run_all() -> Callable[[list[threading.Thread]], None]:
    """Runs threads to their end."""

    def run(threads: list[threading.Thread]) -> None:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
            assert not thread.is_alive()

    return run


Install = Callable[[str, str, dict[str, str]], Path]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Install:
    """Puts a package of these files, with a name and a version, on the path; tells its folder."""

    def put(name: str, version: str, files: dict[str, str]) -> Path:
        folder = tmp_path / f"{name}-{version}"
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        for path, text in {**files, f"{name}-{version}.dist-info/METADATA": metadata}.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text)
        monkeypatch.syspath_prepend(str(folder))
        return folder

    return put


class Golden:
    """The recorded cases of the official patch; see tests/data/golden/README.md."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        self.unet_configs = manifest["unet_configs"]
        self.phase_table = manifest["phase_table"]
        self.cases = {case["file"].removesuffix(".safetensors"): case for case in manifest["cases"]}

    def unet(self, arch: str) -> UNet2DConditionModel:
        """The UNet of an arch, float32."""
        weights = read_tensors(self.folder / f"weights_{arch.split('_', maxsplit=1)[0]}.safetensors")
        if arch == "sdxl_inpaint":
            weights |= read_tensors(self.folder / "weights_sdxl_inpaint_delta.safetensors")
        unet = UNet2DConditionModel(**self.unet_configs[arch]).eval()
        unet.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
        return unet

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of a case, floating ones as float32."""
        tensors = read_tensors(self.folder / f"{name}.safetensors")
        return {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}

    @staticmethod
    def options(mode: str) -> dict[str, Any]:
        """What a user has to say to get a mode of the table: family, task and `aggressive`."""
        task = "text2img"
        if "controlnet" in mode:
            task = "controlnet_img2img" if "img2img" in mode else "controlnet"
        elif "inpainting" in mode:
            task = "inpaint"
        return {
            "family": "sdxl_turbo" if "turbo" in mode else None,
            "task": task,
            "aggressive": False if "playground" in mode else None,
        }


@pytest.fixture(scope="session")
def golden() -> Golden:
    return Golden(GOLDEN)
