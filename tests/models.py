"""Tiny stock diffusers pipelines with random weights: one per model family and task that HiDiffusion supports.

    pipe = build("sd15", "controlnet")
    latents = pipe(**arguments("sd15", "controlnet", height=128, width=192)).images

All families have the demo model's tiny widths, so the residual and transformer blocks of their UNets and ControlNets
are structurally alike and compiled code serves many of them. For one seed, the parts that two tasks or families have in
common have the same weights; `build("sdxl", "text2img")` has those of the tiny demo model.
"""

from __future__ import annotations

import atexit
import functools
import io
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from accel_hidiff.demo import model as demo

__all__ = ["PAIRS", "SUPPORTED", "arguments", "build", "build_adapter", "ip_adapter_arguments", "with_ip_adapter"]

PROMPT = "a red circle"
_TINY = demo.tiny_config()
_WIDTH = _TINY.block_out_channels[0]
_CONTEXT = _TINY.text_width + _TINY.text_width_2  # cross_attention_dim
_CONTROL_STD = 0.1  # of a ControlNet's last convolutions: residuals that visibly change the image and do not drown it
_IMAGE_EMBEDDING, _IMAGE_TOKENS = 12, 4  # of an IP-Adapter; 4 is what diffusers assumes for the plain one
_GLM_HEADS, _GLM_WIDTH = 6, 48  # wider than cross_attention_dim, so that the UNet's projection has work to do

_CLASS_ENDINGS = {
    "text2img": "Pipeline",
    "img2img": "Img2ImgPipeline",
    "inpaint": "InpaintPipeline",
    "inpaint9": "InpaintPipeline",
    "controlnet": "ControlNetPipeline",
    "controlnet_img2img": "ControlNetImg2ImgPipeline",
    "multi_controlnet": "ControlNetPipeline",
}
_SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
_KOLORS_BETAS = {**_SD_BETAS, "beta_end": 0.014, "num_train_timesteps": 1100}
_PLAYGROUND_LATENTS = {
    "latents_mean": (-1.6574, 0.886, -1.383, 0.7155),
    "latents_std": (8.4927, 5.9022, 6.5498, 5.2299),
    "scaling_factor": 0.5,
}
_SD_LEVELS = {
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "block_out_channels": (_WIDTH,) * 4,
    "transformer_layers_per_block": 1,
    "attention_head_dim": _TINY.attention_heads[0],  # the number of heads: diffusers' historical misnomer
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "projection_class_embeddings_input_dim": None,
}


@dataclass(frozen=True)
class _Family:
    """How a family differs from SDXL."""

    prefix: str  # of its pipeline classes
    scheduler: Callable[[], Any]
    guidance_scale: float
    tasks: tuple[str, ...] = tuple(_CLASS_ENDINGS)
    unet: Mapping[str, Any] = field(default_factory=dict)
    vae: Mapping[str, Any] = field(default_factory=dict)
    text_act: str = "quick_gelu"
    pad_token: str = demo._EOS


_FAMILIES = {
    "sd15": _Family(
        prefix="StableDiffusion",
        scheduler=lambda: diffusers.PNDMScheduler(**_SD_BETAS, skip_prk_steps=True, set_alpha_to_one=False),
        guidance_scale=7.5,
        unet={**_SD_LEVELS, "use_linear_projection": False},
        vae={"scaling_factor": 0.18215},
    ),
    "sd21": _Family(
        prefix="StableDiffusion",
        scheduler=lambda: diffusers.DDIMScheduler(
            **_SD_BETAS, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False
        ),
        guidance_scale=7.5,
        unet=_SD_LEVELS,
        vae={"scaling_factor": 0.18215},
        text_act="gelu",
        pad_token="!",
    ),
    "sdxl": _Family(prefix="StableDiffusionXL", scheduler=demo._scheduler, guidance_scale=5.0),
    "sdxl_turbo": _Family(
        prefix="StableDiffusionXL",
        scheduler=lambda: diffusers.EulerAncestralDiscreteScheduler(**_SD_BETAS, timestep_spacing="trailing"),
        guidance_scale=0.0,
    ),
    "sdxl_lightning": _Family(
        prefix="StableDiffusionXL",
        scheduler=lambda: diffusers.EulerDiscreteScheduler(**_SD_BETAS, timestep_spacing="trailing"),
        guidance_scale=0.0,
    ),
    "playground": _Family(
        prefix="StableDiffusionXL",
        scheduler=lambda: diffusers.EDMDPMSolverMultistepScheduler(
            sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, num_train_timesteps=1000, prediction_type="epsilon"
        ),
        guidance_scale=3.0,
        vae=_PLAYGROUND_LATENTS,
    ),
    "kolors": _Family(
        prefix="Kolors",
        scheduler=lambda: diffusers.EulerDiscreteScheduler(**_KOLORS_BETAS, timestep_spacing="leading"),
        guidance_scale=5.0,
        tasks=("text2img", "img2img"),
        unet={
            "encoder_hid_dim": _GLM_WIDTH,
            "encoder_hid_dim_type": "text_proj",
            "projection_class_embeddings_input_dim": 6 * _TINY.time_ids_width + _GLM_WIDTH,
        },
    ),
}

SUPPORTED: tuple[tuple[str, str], ...] = tuple(
    (name, task) for name, family in _FAMILIES.items() for task in family.tasks
)

# For `pytest.mark.parametrize`: text-to-image of each family and each task of SDXL always, the rest of the matrix slow.
PAIRS = tuple(
    pytest.param(*pair, marks=() if pair[0] == "sdxl" or pair[1] == "text2img" else pytest.mark.slow)
    for pair in SUPPORTED
)


def build(family_name: str, task: str, seed: int = 0) -> Any:
    """A stock pipeline of a pair in `SUPPORTED`: float32, CPU, evaluation mode, no progress bar.

    The same seed gives the same weights, and the random state of torch is left as it was.
    """
    family = _check(family_name, task)
    with _seeded(seed):
        parts = _parts(family, in_channels=9 if task == "inpaint9" else 4)
        if task in ("controlnet", "controlnet_img2img"):
            parts["controlnet"] = _controlnet(parts["unet"])
        if task == "multi_controlnet":
            parts["controlnet"] = [_controlnet(parts["unet"]) for _ in range(2)]
    return _assemble(getattr(diffusers, family.prefix + _CLASS_ENDINGS[task]), parts)


def arguments(family_name: str, task: str, height: int, width: int, seed: int = 0, **overrides: Any) -> dict[str, Any]:
    """The keyword arguments of one request to the pipeline of `build(family_name, task)`, for an image of this size.

    The same arguments give the same request. Its generator is used up by one run, so every run needs a new request.
    """
    family = _check(family_name, task)
    picture, control, control_2 = (_picture(height, width, 3 * seed + number) for number in range(3))
    chosen: dict[str, Any] = {
        "prompt": PROMPT,
        "num_inference_steps": 7,
        "guidance_scale": family.guidance_scale,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "latent",
    }
    if task != "img2img" or family.prefix == "Kolors":  # the other img2img pipelines take the size of their image
        chosen |= {"height": height, "width": width}
    if task in ("img2img", "inpaint", "controlnet_img2img"):
        chosen |= {"image": picture, "strength": 0.6, "num_inference_steps": 10}
    if task == "inpaint9":  # made for starting from pure noise
        chosen |= {"image": picture, "strength": 1.0}
    if task in ("inpaint", "inpaint9"):
        chosen["mask_image"] = _mask(height, width)
    if task == "controlnet_img2img":
        chosen["control_image"] = control
    if task in ("controlnet", "multi_controlnet"):
        chosen["image"] = control if task == "controlnet" else [control, control_2]
    return chosen | overrides


def build_adapter(seed: int = 0) -> Any:
    """A tiny SDXL pipeline with a T2I-Adapter, called with `arguments("sdxl", "controlnet", ...)`.

    Height and width must be multiples of 16.
    """
    with _seeded(seed):
        parts = _parts(_FAMILIES["sdxl"], in_channels=4)
        parts["adapter"] = diffusers.T2IAdapter(
            channels=[_WIDTH] * 4, num_res_blocks=1, downscale_factor=16, adapter_type="full_adapter_xl"
        )
    del parts["add_watermarker"]  # the one SDXL pipeline without this argument
    return _assemble(diffusers.StableDiffusionXLAdapterPipeline, parts)


def with_ip_adapter(pipe: Any, seed: int = 0) -> Any:
    """Give a pipeline of this module an IP-Adapter with random weights, in place; returns the pipeline.

    Requests then need `ip_adapter_arguments` too.
    """
    layers = [name for name in pipe.unet.attn_processors if name.endswith("attn2.processor")]
    with _seeded(seed):
        projection = diffusers.models.embeddings.ImageProjection(_IMAGE_EMBEDDING, _CONTEXT, _IMAGE_TOKENS)
        attention = {
            # Published adapters number all attention layers, and cross-attention has the odd numbers.
            f"{2 * number + 1}.{name}.weight": torch.nn.Linear(_CONTEXT, _WIDTH, bias=False).weight.detach()
            for number in range(len(layers))
            for name in ("to_k_ip", "to_v_ip")
        }
        image = {name.replace("image_embeds", "proj"): value for name, value in projection.state_dict().items()}
        pipe.unet._load_ip_adapter_weights([{"image_proj": image, "ip_adapter": attention}], low_cpu_mem_usage=False)
    pipe.unet.eval()
    return pipe


def ip_adapter_arguments(seed: int = 0, *, guided: bool = True) -> dict[str, Any]:
    """What a request to a pipeline with an IP-Adapter needs besides `arguments`.

    `guided`: whether the request has a guidance scale above 1; the negative embedding comes first then.
    """
    positive = torch.randn(1, 1, _IMAGE_EMBEDDING, generator=torch.Generator().manual_seed(seed))
    embedding = torch.cat([torch.zeros_like(positive), positive]) if guided else positive
    return {"ip_adapter_image_embeds": [embedding]}


def _check(family_name: str, task: str) -> _Family:
    if (family_name, task) not in SUPPORTED:
        raise ValueError(f"expected a family and a task in {SUPPORTED}, got {(family_name, task)}")
    return _FAMILIES[family_name]


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Random weights on the CPU from a seed; afterwards the random state of torch is what it was."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        yield


def _parts(family: _Family, in_channels: int) -> dict[str, Any]:
    """The components of a text-to-image pipeline."""
    unet = diffusers.UNet2DConditionModel(**{**demo._unet_arguments(_TINY), **family.unet, "in_channels": in_channels})
    vae = diffusers.AutoencoderKL(**{**demo._vae_arguments(_TINY), **family.vae})
    demo._rescale(unet, vae)
    parts: dict[str, Any] = {"unet": unet, "vae": vae, "scheduler": family.scheduler()}
    if family.prefix == "StableDiffusion":
        no_checker = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return parts | _clip(family) | no_checker
    if family.prefix == "StableDiffusionXL":
        return parts | _two_clips() | {"force_zeros_for_empty_prompt": True, "add_watermarker": False}
    return parts | _chat_glm()


def _clip(family: _Family) -> dict[str, Any]:
    tokenizer = demo._tokenizer(family.pad_token)
    config = demo._text_config(tokenizer, _CONTEXT, _TINY.text_layers, _TINY.head_width, act=family.text_act)
    return {"tokenizer": tokenizer, "text_encoder": CLIPTextModel(config)}


def _two_clips() -> dict[str, Any]:
    first, second = demo._tokenizer(demo._EOS), demo._tokenizer("!")
    config = demo._text_config(first, _TINY.text_width, _TINY.text_layers, _TINY.head_width, act="quick_gelu")
    config_2 = demo._text_config(second, _TINY.text_width_2, _TINY.text_layers_2, _TINY.head_width, act="gelu")
    return {
        "tokenizer": first,
        "tokenizer_2": second,
        "text_encoder": CLIPTextModel(config),
        "text_encoder_2": CLIPTextModelWithProjection(config_2),
    }


def _chat_glm() -> dict[str, Any]:
    """Kolors' text encoder and tokenizer, diffusers' own classes; diffusers has them only where sentencepiece is."""
    from diffusers.pipelines.kolors import ChatGLMModel, ChatGLMTokenizer
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, RMSNorm

    tokenizer = ChatGLMTokenizer(str(_sentencepiece_model()))
    config = ChatGLMConfig(
        num_layers=3,  # the prompt embedding is the input of the last but one: of two, it would be bare tokens
        padded_vocab_size=tokenizer.vocab_size,
        hidden_size=_GLM_WIDTH,
        ffn_hidden_size=2 * _GLM_WIDTH,
        kv_channels=_GLM_WIDTH // _GLM_HEADS,
        num_attention_heads=_GLM_HEADS,
        seq_length=256,  # the pipelines pad every prompt to this
        add_qkv_bias=True,
        multi_query_attention=True,
        multi_query_group_num=2,
        original_rope=True,
        use_cache=True,
    )
    text_encoder = ChatGLMModel(config, empty_init=False)
    for module in text_encoder.modules():
        if isinstance(module, RMSNorm):  # its weights are left uninitialised
            torch.nn.init.ones_(module.weight)
    # Zeros for an empty prompt would leave the pipelines without a negative pooled embedding.
    return {"tokenizer": tokenizer, "text_encoder": text_encoder, "force_zeros_for_empty_prompt": False}


@functools.cache
def _sentencepiece_model() -> Path:
    """A file with a sentencepiece model of bytes and the demo's words; it stays until the process ends."""
    import sentencepiece

    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(demo._WORDS)] * 4),
        model_writer=trained,
        model_type="bpe",
        byte_fallback=True,
        vocab_size=320,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    path = Path(folder.name, "tokenizer.model")
    path.write_bytes(trained.getvalue())
    return path


def _controlnet(unet: Any) -> Any:
    """A ControlNet of the UNet's layout, whose last convolutions are not zero, unlike those of an untrained one."""
    controlnet = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 8, 8))
    last = [controlnet.controlnet_cond_embedding.conv_out, controlnet.controlnet_mid_block]
    for convolution in [*last, *controlnet.controlnet_down_blocks]:
        torch.nn.init.normal_(convolution.weight, std=_CONTROL_STD)
    return controlnet


def _assemble(pipeline_class: Any, parts: dict[str, Any]) -> Any:
    pipe = pipeline_class(**parts)
    for part in pipe.components.values():  # among them the container of several ControlNets, made by the pipeline
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _picture(height: int, width: int, seed: int) -> Image.Image:
    """Soft blobs of random colours."""
    coarse = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return Image.fromarray((255 * smooth[0]).round().byte().permute(1, 2, 0).numpy())


def _mask(height: int, width: int) -> Image.Image:
    """White, which is to be painted anew, in the middle."""
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, (width // 4, height // 4, 3 * width // 4, 3 * height // 4))
    return mask
