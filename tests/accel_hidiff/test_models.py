"""A pipeline's skeleton, made of its configs, names the very graphs that the whole pipeline needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import accel_hidiff as ah
from accel_hidiff.models import load_pipeline, load_skeleton
from tests import models, needs


def keys_of(pipe: Any, cache: Path, device: torch.device) -> list[list[str]]:
    """The digests of all region graphs of a request in three phases."""
    handle = ah.accelerate(pipe, hidiffusion=ah.HiDiffusionConfig(), cache=cache, backend=needs.BACKEND)
    handle.meant_for = device
    binder = handle._dispatcher.binder
    return [
        [binder.key(graph).digest for graph, _ in graphs] for graphs in handle._graphs.all([(256, 320)], 20, [1, 2])
    ]


@pytest.mark.parametrize(
    ("family", "task"),
    [
        ("sd15", "text2img"),
        ("sd15", "multi_controlnet"),
        ("sdxl", "controlnet"),
        ("playground", "inpaint9"),
        ("kolors", "img2img"),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("float16", marks=pytest.mark.slow)])
def test_a_skeleton_names_the_graphs_of_its_pipeline(family: str, task: str, dtype: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "model")
    models.build(family, task).save_pretrained(folder)
    whole = load_pipeline(folder, dtype, "cpu")
    skeleton, device = load_skeleton(folder, dtype, "cpu")
    assert {parameter.device.type for parameter in skeleton.unet.parameters()} == {"meta"}
    assert skeleton.text_encoder is None and device == torch.device("cpu")
    assert keys_of(skeleton, tmp_path / "cache", device) == keys_of(whole, tmp_path / "cache", device)
    assert type(skeleton) is type(whole) and ah.apply_hidiffusion(models.build(family, task)).task == tell(skeleton)


def tell(pipe: Any) -> str:
    return vars(pipe)["_accel_hidiff_handle"].patch.task


def test_controlnets_can_be_added_to_a_base_model(tmp_path: Path) -> None:
    models.build("sdxl", "text2img").save_pretrained(tmp_path / "model")
    models.build("sdxl", "controlnet").controlnet.save_pretrained(tmp_path / "net")
    for nets in ([str(tmp_path / "net")], [str(tmp_path / "net")] * 2):
        whole = load_pipeline(str(tmp_path / "model"), "float32", "cpu", nets)
        skeleton, device = load_skeleton(str(tmp_path / "model"), "float32", "cpu", nets)
        assert type(whole).__name__ == type(skeleton).__name__ == "StableDiffusionXLControlNetPipeline"
        keys = keys_of(skeleton, tmp_path / "cache", device)
        assert keys == keys_of(whole, tmp_path / "cache", device)
        assert len(keys) == 2 * (3 + len(nets)) + 1, "batches x (topologies + ControlNets), and the decoder"


def test_a_model_that_is_none_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "NoSuchPipeline", "unet": ["diffusers", "Nothing"]}')
    for load in (load_skeleton, load_pipeline):
        with pytest.raises(ah.NotAPipeline, match="cannot be loaded") as caught:
            load(str(tmp_path), "float32", "cpu")
        assert "\n" not in str(caught.value)
