"""Layouts are recognised by structure, and every feature size is known without running the UNet."""

from __future__ import annotations

from itertools import product
from typing import Any, ClassVar

import pytest
import torch
from diffusers import UNet2DConditionModel

from accel_hidiff import HiDiffusionConfig, Phase, PhasePlan, apply_hidiffusion, patching
from accel_hidiff.errors import BadInput, UnknownLayout
from accel_hidiff.families import (
    SD15,
    SDXL,
    SDXL_TURBO,
    Layout,
    adapter_sizes,
    feature_sizes,
    identify,
    skip_sizes,
)
from accel_hidiff.topology import Topology

CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
SD15_CONFIG: dict[str, Any] = {
    "down_block_types": [CROSS_DOWN] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + [CROSS_UP] * 3,
    "layers_per_block": 2,
    "in_channels": 4,
}
SDXL_CONFIG: dict[str, Any] = {
    "down_block_types": ["DownBlock2D", CROSS_DOWN, CROSS_DOWN],
    "up_block_types": [CROSS_UP, CROSS_UP, "UpBlock2D"],
    "layers_per_block": 2,
    "in_channels": 4,
}


def tiny(config: dict[str, Any], **changes: Any) -> UNet2DConditionModel:
    widths = (8,) * len(config["down_block_types"])
    sizes = {"norm_num_groups": 4, "cross_attention_dim": 8, "attention_head_dim": 2, "block_out_channels": widths}
    return UNet2DConditionModel(**config, out_channels=4, **sizes, **changes).eval()


def test_families_are_told_from_the_block_types() -> None:
    assert identify(Layout.from_config(SD15_CONFIG)) is SD15
    assert identify(Layout.from_config(SDXL_CONFIG)) is SDXL
    assert identify(Layout.from_config({**SDXL_CONFIG, "in_channels": 9})) is SDXL


def test_turbo_has_sdxls_structure_and_must_be_named() -> None:
    layout = Layout.from_config(SDXL_CONFIG)
    assert identify(layout, "sdxl_turbo") is SDXL_TURBO
    assert identify(layout, "sdxl") is SDXL
    same = {name: value for name, value in vars(SDXL).items() if name != "name"}
    assert {name: value for name, value in vars(SDXL_TURBO).items() if name != "name"} == same


def test_layers_may_be_given_per_block() -> None:
    assert Layout.from_config({**SDXL_CONFIG, "layers_per_block": [2, 3, 2]}).layers_per_block == (2, 3, 2)
    assert Layout.from_config(SD15_CONFIG).layers_per_block == (2, 2, 2, 2)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({**SDXL_CONFIG, "down_block_types": ["DownBlock2D"] * 3}, "got down DownBlock2D, DownBlock2D, DownBlock2D"),
        ({**SDXL_CONFIG, "up_block_types": ["UpBlock2D"] * 3}, "up UpBlock2D, UpBlock2D, UpBlock2D"),
        ({**SDXL_CONFIG, "layers_per_block": 1}, r"with \(1, 1, 1\) layers per block"),
        ({**SD15_CONFIG, "layers_per_block": [2, 2, 1, 2]}, r"with \(2, 2, 1, 2\) layers per block"),
    ],
)
def test_an_unknown_layout_is_refused_with_what_was_found_and_expected(config: dict[str, Any], found: str) -> None:
    with pytest.raises(UnknownLayout, match=found) as raised:
        identify(Layout.from_config(config))
    assert "sd15: down CrossAttnDownBlock2D" in str(raised.value)
    assert "sdxl: down DownBlock2D, CrossAttnDownBlock2D" in str(raised.value)


def test_a_named_family_must_fit() -> None:
    with pytest.raises(UnknownLayout, match="expected sd15"):
        identify(Layout.from_config(SDXL_CONFIG), "sd15")
    with pytest.raises(UnknownLayout, match="expected sdxl_turbo"):
        identify(Layout.from_config(SD15_CONFIG), "sdxl_turbo")
    with pytest.raises(BadInput, match="family: expected one of sd15, sdxl, sdxl_turbo"):
        identify(Layout.from_config(SDXL_CONFIG), "sd3")


def observed(patch: Any, height: int, width: int, topology: Topology) -> tuple[dict[str, Any], list[Any]]:
    """Feature sizes seen by hooks on a live UNet, by path, and the sizes of its skips in order."""
    unet: UNet2DConditionModel = patch.unet
    sizes: dict[str, Any] = {}
    skips: list[Any] = []
    handles = []

    def entering(path: str) -> Any:
        return lambda module, args: sizes.__setitem__(path, tuple(args[0].shape[-2:]))

    def leaving(path: str) -> Any:
        def hook(module: Any, args: Any, out: Any) -> None:
            hidden = out[0] if isinstance(out, tuple) else out
            sizes[path] = tuple(hidden.shape[-2:])
            if path.startswith("down_blocks"):
                skips.extend(tuple(skip.shape[-2:]) for skip in out[1])

        return hook

    for path, module in unet.named_modules():
        parts = path.split(".")
        if len(parts) >= 3 and parts[-2] in ("resnets", "attentions"):
            handles.append(module.register_forward_pre_hook(entering(path)))
        elif path == "mid_block" or (len(parts) == 2 and parts[0] in ("down_blocks", "up_blocks")):
            handles.append(module.register_forward_hook(leaving(path)))
    step = next(step for step in range(10) if patch.plan(8 * height, 8 * width, 10).at(step) == topology)
    with torch.no_grad(), patch.phase(step=step, num_steps=10):
        out = unet(torch.zeros(1, 4, height, width), 0, torch.zeros(1, 3, 8)).sample
    assert out.shape[-2:] == (height, width)
    for handle in handles:
        handle.remove()
    return sizes, [(height, width), *skips]


@pytest.mark.parametrize(
    ("config", "pooled", "dilated"),
    [
        *((SD15_CONFIG, pooled, dilated) for pooled, dilated in product((False, True), repeat=2)),
        # SDXL pools and dilates in one step from 4096 pixels on only; the golden case sdxl_4096 has that.
        *((SDXL_CONFIG, pooled, dilated) for pooled, dilated in ((False, False), (True, False), (False, True))),
    ],
)
@pytest.mark.parametrize("size", [(16, 24), (13, 21), (17, 8)])
def test_feature_sizes_are_those_of_a_live_unet(
    config: dict[str, Any], pooled: bool, dilated: bool, size: tuple[int, int]
) -> None:
    # SD15: both parts are on for the whole request, or off. SDXL dilates below T2 and pools from there on.
    t2 = 1.0 if config is SD15_CONFIG else 0.5 if dilated else 0.0
    changes = HiDiffusionConfig(t1_ratio=1.0, t2_ratio=t2, pooled=pooled, dilated=dilated)
    patch = apply_hidiffusion(tiny(config), config=changes)
    topology = Topology(windowed=True, pooled=pooled, dilated=dilated)
    sizes, skips = observed(patch, *size, topology)
    layout = Layout.from_config(config)
    assert feature_sizes(layout, patch.family, *size, topology) == sizes
    assert skip_sizes(layout, patch.family, *size, topology) == skips


class AdapterFeature(torch.Tensor):
    """A residual that notes the size of each feature map that it is added to."""

    met: ClassVar[list[tuple[int, ...]]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__.strip("_") not in ("add", "iadd", "radd"):
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        with torch._C.DisableTorchFunctionSubclass():
            (feature_map,) = (arg for arg in args if not isinstance(arg, cls))
            cls.met.append(tuple(feature_map.shape[-2:]))
            return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("config", [SD15_CONFIG, SDXL_CONFIG], ids=["sd15", "sdxl"])
@pytest.mark.parametrize("topology", [Topology(*parts) for parts in product((False, True), repeat=3)], ids=str)
@pytest.mark.parametrize("size", [(16, 24), (13, 21), (17, 8)])
def test_adapter_features_are_added_where_they_are_told_to_be(
    monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], topology: Topology, size: tuple[int, int]
) -> None:
    """One for each down block and one for the mid block, given at a size of none of them."""
    patch = apply_hidiffusion(tiny(config))
    monkeypatch.setattr(patching, "plan_latent", lambda *request: PhasePlan((Phase(0, 1, topology),)))
    monkeypatch.setattr(AdapterFeature, "met", [])
    count = len(config["down_block_types"]) + 1
    features = [torch.ones(1, 8, 6, 10).as_subclass(AdapterFeature) for _ in range(count)]
    with torch.no_grad(), patch.phase(step=0, num_steps=1):
        arguments = torch.zeros(1, 4, *size), 0, torch.zeros(1, 3, 8)
        out = patch.unet(*arguments, down_intrablock_additional_residuals=features).sample
    assert type(out) is torch.Tensor and tuple(out.shape[-2:]) == size
    assert adapter_sizes(Layout.from_config(config), patch.family, *size, topology) == AdapterFeature.met
    assert len(AdapterFeature.met) == count


def test_adapter_sizes_by_hand() -> None:
    """Before the downsampler of a block with attention, after that of another; then the mid block."""
    sdxl, sd15 = Layout.from_config(SDXL_CONFIG), Layout.from_config(SD15_CONFIG)
    assert adapter_sizes(sdxl, SDXL, 18, 27, Topology()) == [(9, 14), (9, 14), (5, 7), (5, 7)]
    assert adapter_sizes(sdxl, SDXL, 18, 27, Topology(pooled=True)) == [(9, 14), (5, 7), (3, 4), (3, 4)]
    assert adapter_sizes(sdxl, SDXL, 18, 27, Topology(dilated=True)) == [(9, 14), (9, 14), (3, 4), (3, 4)]
    assert adapter_sizes(sd15, SD15, 18, 27, Topology()) == [(18, 27), (9, 14), (5, 7), (3, 4), (3, 4)]
    assert adapter_sizes(sd15, SD15, 18, 27, Topology(pooled=True)) == [(18, 27), (5, 7), (3, 4), (2, 2), (2, 2)]
    assert adapter_sizes(sd15, SD15, 18, 27, Topology(dilated=True)) == [(18, 27), (5, 7), (3, 4), (2, 2), (2, 2)]


@pytest.mark.parametrize("config", [SD15_CONFIG, SDXL_CONFIG], ids=["sd15", "sdxl"])
@pytest.mark.parametrize("layers", [1, 3, 4])
def test_other_numbers_of_layers_are_refused(config: dict[str, Any], layers: int) -> None:
    """The pool and its resize sit at fixed layers: with three per block, the skip behind the resize is still pooled."""
    with pytest.raises(UnknownLayout, match="layers per block"):
        apply_hidiffusion(tiny({**config, "layers_per_block": layers}))


def test_windows_move_no_size() -> None:
    layout = Layout.from_config(SDXL_CONFIG)
    for pooled, dilated in product((False, True), repeat=2):
        plain = feature_sizes(layout, SDXL, 35, 45, Topology(False, pooled, dilated))
        assert feature_sizes(layout, SDXL, 35, 45, Topology(True, pooled, dilated)) == plain


def test_one_latent_cell_stays_one_cell() -> None:
    sizes = feature_sizes(Layout.from_config(SD15_CONFIG), SD15, 1, 1, Topology(True, True, True))
    assert set(sizes.values()) == {(1, 1)}
