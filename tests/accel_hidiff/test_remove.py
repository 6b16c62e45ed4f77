"""Removing HiDiffusion gives back a model that was never patched: outputs, classes, hooks, attributes, bit for bit."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch

import accel_hidiff as ah
from accel_hidiff import AccelHiDiffError, HiDiffusionConfig
from tests import models

SIZE = 128, 192
# Three steps with all phases: SDXL dilates, pools, and has windows only; SD 1.5 does both, dilates, has windows only.
STEPS = 3
CONFIG = HiDiffusionConfig(t1_ratio=2 / 3, t2_ratio=1 / 3)
STEP_OF_PHASE = {"dilated": 0, "pooled": 1, "windowed": 2}


@dataclass(frozen=True)
class Kind:
    """A kind of pipeline: how to build it, and what to ask it."""

    build: Callable[[], Any]
    family: str
    task: str

    def run(self, pipe: Any, **changes: Any) -> torch.Tensor:
        """The latents of one request."""
        steps = STEPS if "img2img" not in self.task else 5  # of which 3 run
        return pipe(
            **models.arguments(self.family, self.task, *SIZE, **{"num_inference_steps": steps, **changes})
        ).images


def kind(family: str, task: str) -> Kind:
    return Kind(functools.partial(models.build, family, task), family, task)


KINDS = {
    "sdxl": kind("sdxl", "text2img"),
    "sd15": kind("sd15", "text2img"),
    "sd15 controlnet": kind("sd15", "controlnet"),
    "sdxl controlnet": kind("sdxl", "controlnet"),
    "sdxl controlnet img2img": kind("sdxl", "controlnet_img2img"),
    "sdxl multi-controlnet": kind("sdxl", "multi_controlnet"),
    "sdxl t2i-adapter": Kind(models.build_adapter, "sdxl", "controlnet"),
}


def start(name: str) -> Any:
    """A pipeline of a kind after a first short request: what a pipeline makes at its first call is there."""
    pipe = KINDS[name].build()
    KINDS[name].run(pipe, num_inference_steps=2)
    return pipe


def controlnets(pipe: Any) -> list[torch.nn.Module]:
    controlnet = getattr(pipe, "controlnet", None)
    return [] if controlnet is None else list(getattr(controlnet, "nets", [controlnet]))


def parts(pipe: Any) -> list[torch.nn.Module]:
    """The models that HiDiffusion might touch."""
    return [pipe.components[name] for name in ("unet", "controlnet", "adapter") if name in pipe.components]


def described(value: Any) -> str:
    """What two objects of different pipelines have in common if they are in the same state: the values of a tensor, the
    name of a function, the class of a module, and a container of such."""
    if isinstance(value, torch.Tensor):
        values = value.detach().cpu().numpy().tobytes()
        return f"{value.dtype}{tuple(value.shape)} {hashlib.sha256(values).hexdigest()}"
    if isinstance(value, torch.nn.Module):
        return str(type(value))
    if isinstance(value, Mapping):
        return f"{type(value)}{[f'{name}: {described(inner)}' for name, inner in value.items()]}"
    if isinstance(value, list | tuple):
        return f"{type(value)}{[described(inner) for inner in value]}"
    if value is None or isinstance(value, bool | int | float | str | bytes | torch.dtype | torch.device):
        return repr(value)
    return str(getattr(value, "__qualname__", type(value)))


def state(pipe: Any) -> dict[str, str]:
    """The attributes, in order, of a pipeline, its scheduler, its models and all their modules, hooks included."""
    components = [id(part) for part in pipe.components.values()]
    own = {name: type(value) if id(value) in components else value for name, value in vars(pipe).items()}
    found = {"pipe": described(own), "scheduler": described(vars(pipe.scheduler))}
    for number, part in enumerate(parts(pipe)):
        for path, module in part.named_modules():
            found[f"{number}.{path}"] = f"{type(module)} {described(vars(module))}"
    return found


def assert_same_state(pipe: Any, wanted: dict[str, str]) -> None:
    got = state(pipe)
    different = [path for path in {**wanted, **got} if got.get(path) != wanted.get(path)]
    assert different == []
    assert list(got) == list(wanted)


@dataclass(frozen=True)
class Never:
    """A pipeline that was never patched, after one request, and what it made."""

    latents: torch.Tensor
    state: dict[str, str]


@pytest.fixture(scope="module")
def never_patched(one_thread: None) -> Callable[..., Never]:
    """What a pipeline of a kind gives and becomes without HiDiffusion, with one of `CHANGES` or without."""

    @functools.cache
    def make(name: str, change: str | None = None) -> Never:
        pipe = start(name)
        extra = CHANGES[change](pipe) if change else {}
        latents = KINDS[name].run(pipe, **extra)
        return Never(latents, state(pipe))

    return make


def differs(got: torch.Tensor, plain: torch.Tensor) -> bool:
    """By more than rounding: HiDiffusion did something."""
    return bool((got - plain).abs().max() > 1e-2 * plain.abs().max())


@pytest.mark.parametrize("name", KINDS)
def test_applied_and_removed_twice_is_never_patched(
    name: str, never_patched: Any, snapshot: Any, assert_identical: Any
) -> None:
    pipe, plain = start(name), never_patched(name)
    assert torch.equal(KINDS[name].run(pipe), plain.latents)
    before = [snapshot(part) for part in parts(pipe)]
    for _ in range(2):
        patch = ah.apply_hidiffusion(pipe, config=CONFIG)
        assert differs(KINDS[name].run(pipe), plain.latents)
        for net in controlnets(pipe):
            assert "forward" in vars(net), "otherwise nothing here is about ControlNets"
        patch.remove()
        for part, earlier in zip(parts(pipe), before, strict=True):
            assert_identical(earlier, snapshot(part))
        assert "prepare_extra_step_kwargs" not in vars(pipe)
    assert torch.equal(KINDS[name].run(pipe), plain.latents)
    assert_same_state(pipe, plain.state)


def test_the_comparison_sees_what_a_patch_leaves(pipe: Any) -> None:
    """Each of these must show, or the tests of this file would show nothing."""
    clean = state(pipe)
    assert state(pipe) == clean
    block = pipe.unet.down_blocks[1].attentions[0]
    block.forward = block.forward
    assert state(pipe) != clean
    del block.forward
    assert state(pipe) == clean
    hook = pipe.unet.mid_block.register_forward_hook(lambda *_: None)
    assert state(pipe) != clean
    hook.remove()
    pipe.leftover = 1
    assert state(pipe) != clean
    del pipe.leftover
    with torch.no_grad():
        pipe.unet.conv_in.bias[0] += 1e-6
    assert state(pipe) != clean


# ---- after an exception in a step


class Boom(Exception):
    pass


@contextmanager
def failing(module: torch.nn.Module, call: int) -> Iterator[None]:
    """A module that raises in its call-th call."""
    calls: list[None] = []

    def hook(module: Any, args: Any) -> None:
        calls.append(None)
        if len(calls) == call + 1:
            raise Boom

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def fail_in(path: str) -> Callable[[Any, str, int], None]:
    """A submodule of the UNet raises at a step. All phases run it once in a call."""

    def run(pipe: Any, name: str, step: int) -> None:
        with failing(pipe.unet.get_submodule(path), step):
            KINDS[name].run(pipe)

    return run


def fail_in_the_callback(pipe: Any, name: str, step: int) -> None:
    def callback(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if index == step:
            raise Boom
        return tensors

    def legacy(index: int, timestep: Any, latents: torch.Tensor) -> None:
        callback(None, index, timestep, {})

    adapter = "adapter" in pipe.components  # the one of these pipelines that has the older callback only
    KINDS[name].run(pipe, **({"callback": legacy} if adapter else {"callback_on_step_end": callback}))


FAILURES = {
    "callback": fail_in_the_callback,
    "first convolution": fail_in("conv_in"),
    "inside a window": fail_in("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"),
    "between pool and resize": fail_in("mid_block.attentions.0"),
    "last convolution": fail_in("conv_out"),
}


def check_after_failure(
    name: str, step: int, fail: Callable[[Any, str, int], None], plain: Never, snapshot: Any, assert_identical: Any
) -> None:
    """Fails twice under two patches; after removing, everything is as it was never patched."""
    pipe = KINDS[name].build()
    before = [snapshot(part) for part in parts(pipe)]
    for _ in range(2):
        patch = ah.apply_hidiffusion(pipe, config=CONFIG)
        with pytest.raises(Boom):
            fail(pipe, name, step)
        assert patch.scope.call is None
        patch.remove()
        for part, earlier in zip(parts(pipe), before, strict=True):
            assert_identical(earlier, snapshot(part))
    assert torch.equal(KINDS[name].run(pipe), plain.latents)
    assert_same_state(pipe, plain.state)


@pytest.mark.parametrize("phase", STEP_OF_PHASE)
@pytest.mark.parametrize("failure", FAILURES)
def test_removed_after_an_exception_is_never_patched(
    phase: str, failure: str, never_patched: Any, snapshot: Any, assert_identical: Any
) -> None:
    step = STEP_OF_PHASE[phase]
    patch = ah.apply_hidiffusion(models.build("sdxl", "text2img"), config=CONFIG)
    others = {"dilated", "pooled"} - {phase}
    topology = patch.plan(*SIZE, STEPS).at(step)
    assert getattr(topology, phase) and not any(getattr(topology, other) for other in others)
    check_after_failure("sdxl", step, FAILURES[failure], never_patched("sdxl"), snapshot, assert_identical)


def fail_in_the_controlnet(pipe: Any, name: str, step: int) -> None:
    with failing(controlnets(pipe)[-1].mid_block, step):
        KINDS[name].run(pipe)


@pytest.mark.parametrize(
    ("name", "failure"),
    [
        *product(
            ["sd15 controlnet", "sdxl controlnet", "sdxl multi-controlnet"],
            ["callback", "between pool and resize", "controlnet"],
        ),
        ("sdxl t2i-adapter", "callback"),
        ("sdxl t2i-adapter", "between pool and resize"),
    ],
)
def test_removed_after_an_exception_beside_a_controlnet_is_never_patched(
    name: str, failure: str, never_patched: Any, snapshot: Any, assert_identical: Any
) -> None:
    fail = {**FAILURES, "controlnet": fail_in_the_controlnet}[failure]
    check_after_failure(name, 1, fail, never_patched(name), snapshot, assert_identical)


def test_a_failed_apply_leaves_nothing(snapshot: Any, assert_identical: Any) -> None:
    """The second of two ControlNets cannot be patched, after everything else was."""
    pipe = models.build("sdxl", "multi_controlnet")
    pipe.controlnet.nets[1].forward = lambda sample: sample
    before = [snapshot(part) for part in (pipe, *parts(pipe))]
    with pytest.raises(AccelHiDiffError, match="cannot patch ControlNet"):
        ah.apply_hidiffusion(pipe, config=CONFIG)
    for part, earlier in zip((pipe, *parts(pipe)), before, strict=True):
        assert_identical(earlier, snapshot(part))


# ---- with what users do to their models


def add_lora(pipe: Any, adapter: str = "default", seed: int = 0) -> dict[str, Any]:
    """LoRA layers, none of them zero, on all attention and on convolutions, the dilated downsampler's included."""
    peft = pytest.importorskip("peft", reason="LoRA layers need peft")
    attention, convolutions = ["to_q", "to_k", "to_v", "to_out.0"], ["conv1", "conv2", "conv"]
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=[*attention, *convolutions])
    pipe.unet.add_adapter(config, adapter_name=adapter)
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in pipe.unet.named_parameters():
        if "lora_" in name and adapter in name:
            torch.nn.init.normal_(parameter, std=0.2, generator=draw)
    pipe.unet.eval()
    return {}


def fused_lora(pipe: Any) -> dict[str, Any]:
    add_lora(pipe)
    pipe.unet.fuse_lora(lora_scale=0.7)
    return {}


def unloaded_lora(pipe: Any) -> dict[str, Any]:
    add_lora(pipe)
    pipe.unet.unload_lora()
    return {}


def fuse_qkv(pipe: Any) -> dict[str, Any]:
    pipe.fuse_qkv_projections()
    return {}


def unfused_qkv(pipe: Any) -> dict[str, Any]:
    pipe.fuse_qkv_projections()
    pipe.unfuse_qkv_projections()
    return {}


def slice_attention(pipe: Any) -> dict[str, Any]:
    pipe.enable_attention_slicing()
    return {}


def add_ip_adapter(pipe: Any) -> dict[str, Any]:
    models.with_ip_adapter(pipe)
    return models.ip_adapter_arguments()


CHANGES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "lora": add_lora,
    "fused lora": fused_lora,
    "unloaded lora": unloaded_lora,
    "fused qkv": fuse_qkv,
    "unfused qkv": unfused_qkv,
    "attention slicing": slice_attention,
    "ip-adapter": add_ip_adapter,
}


CHANGED = [*(("sdxl", change) for change in CHANGES), ("sd15", "lora"), ("sdxl multi-controlnet", "lora")]


def test_the_lora_is_on_what_is_patched(pipe: Any) -> None:
    peft = pytest.importorskip("peft")
    add_lora(pipe)
    down = pipe.unet.down_blocks[1]
    for layer in (down.downsamplers[0].conv, down.attentions[0].transformer_blocks[0].attn1.to_q):
        assert isinstance(layer, peft.tuners.lora.LoraLayer)
        assert layer.lora_B["default"].weight.abs().max() > 0


@pytest.mark.parametrize(("name", "change"), CHANGED)
def test_removed_from_a_changed_model_is_never_patched(
    name: str, change: str, never_patched: Any, snapshot: Any, assert_identical: Any
) -> None:
    pipe = start(name)
    extra = CHANGES[change](pipe)
    plain = never_patched(name, change)
    before = [snapshot(part) for part in parts(pipe)]
    patch = ah.apply_hidiffusion(pipe, config=CONFIG)
    assert differs(KINDS[name].run(pipe, **extra), plain.latents)
    for again in range(2):
        patch.remove()
        for part, earlier in zip(parts(pipe), before, strict=True):
            assert_identical(earlier, snapshot(part))
        if not again:
            patch = ah.apply_hidiffusion(pipe, config=CONFIG)
    assert torch.equal(KINDS[name].run(pipe, **extra), plain.latents)
    assert_same_state(pipe, plain.state)


@pytest.mark.parametrize(("name", "change"), CHANGED)
def test_changed_while_patched_and_removed_is_the_changed_model(name: str, change: str, never_patched: Any) -> None:
    pipe, plain = KINDS[name].build(), never_patched(name, change)
    patch = ah.apply_hidiffusion(pipe, config=CONFIG)
    KINDS[name].run(pipe, num_inference_steps=2)
    extra = CHANGES[change](pipe)
    assert differs(KINDS[name].run(pipe, **extra), plain.latents)
    patch.remove()
    assert torch.equal(KINDS[name].run(pipe, **extra), plain.latents)
    assert_same_state(pipe, plain.state)
    ah.apply_hidiffusion(pipe, config=CONFIG).remove()
    assert_same_state(pipe, plain.state)


def test_a_lora_loaded_before_and_unloaded_while_patched_is_gone(never_patched: Any) -> None:
    pipe, plain = start("sdxl"), never_patched("sdxl", "unloaded lora")
    add_lora(pipe)
    patch = ah.apply_hidiffusion(pipe, config=CONFIG)
    KINDS["sdxl"].run(pipe)
    pipe.unet.unload_lora()
    patch.remove()
    assert torch.equal(KINDS["sdxl"].run(pipe), plain.latents)
    assert not differs(plain.latents, never_patched("sdxl").latents)
    assert_same_state(pipe, plain.state)
