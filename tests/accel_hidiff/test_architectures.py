"""Published architectures without weights: what precompiling needs of a model, and nothing to run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

import accel_hidiff as ah
from accel_hidiff.architectures import NAMES, configs_of
from accel_hidiff.errors import BadInput, NotAPipeline
from accel_hidiff.models import load_pipeline, load_skeleton
from benchmarks.unets import SD15, SDXL

PUBLISHED = {"sdxl": SDXL, "sd15": SD15}


@pytest.mark.parametrize("name", NAMES)
def test_an_architecture_is_the_published_one(name: str) -> None:
    pipe, device = load_skeleton(f"arch:{name}", "float32", "cpu", [f"arch:{name}"])
    with torch.device("meta"):
        published = UNet2DConditionModel(**PUBLISHED[name])
    shapes = {key: value.shape for key, value in published.state_dict().items()}
    assert {key: value.shape for key, value in pipe.unet.state_dict().items()} == shapes
    assert pipe.unet.device.type == "meta" and device.type == "cpu"
    own = {key: value.shape for key, value in pipe.controlnet.state_dict().items()}
    assert {key: shape for key, shape in shapes.items() if key.startswith("down_blocks")}.items() <= own.items()
    assert pipe.vae.config.block_out_channels == [128, 256, 512, 512] and pipe.tokenizer is None


def test_a_checkpoint_has_the_keys_of_its_architecture(tmp_path: Path) -> None:
    """A model that was saved with a config of its own (another name, more entries) needs the same artifacts."""

    def digests(model: str) -> set[str]:
        pipe, _ = load_skeleton(model, "float32", "cpu")
        handle: Any = ah.accelerate(pipe, hidiffusion=ah.HiDiffusionConfig(), cache=tmp_path / "cache")
        handle.meant_for = torch.device("cpu")
        return set(handle.needed([(1024, 1024)]).distinct)

    pipe, _ = load_skeleton("arch:sd15", "float32", "cpu")
    for part in ("unet", "vae"):
        getattr(pipe, part).register_to_config(_name_or_path="somebody/finetune")
        getattr(pipe, part).save_config(tmp_path / "model" / part)
    pipe.scheduler.save_pretrained(tmp_path / "model" / "scheduler")
    source = Path(configs_of("arch:sd15"), "model_index.json").read_text()
    (tmp_path / "model" / "model_index.json").write_text(source)
    assert digests(str(tmp_path / "model")) == digests("arch:sd15")


@pytest.mark.parametrize(("name", "dtype"), [("sdxl", torch.float32), ("sd15", torch.float16)])
def test_the_decoders_graph_is_in_the_dtype_that_the_pipeline_decodes_in(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """SDXL's pipelines raise a float16 VAE to float32; SD 1.5's do not, though its config does not say so."""
    pipe, _ = load_skeleton(f"arch:{name}", "float16", "cpu")
    handle: Any = ah.accelerate(pipe, hidiffusion=ah.HiDiffusionConfig(), cache=tmp_path / "cache")
    handle.meant_for = torch.device("cpu")
    graphs = handle.needed([(1024, 1024)]).distinct.values()
    assert [graph.dtype for graph in graphs if graph.region.kind == "decoder"] == [dtype]
    assert pipe.vae.dtype == torch.float16


def test_what_is_none() -> None:
    with pytest.raises(BadInput, match=r"expected an architecture among sd15, sdxl behind 'arch:', got 'flux'"):
        load_skeleton("arch:flux")
    with pytest.raises(NotAPipeline, match="expected one with weights, got the architecture 'arch:sdxl'"):
        load_pipeline("arch:sdxl")
