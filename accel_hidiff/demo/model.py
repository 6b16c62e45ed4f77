"""Small, real `StableDiffusionXLPipeline`s, built without any download.

Every part is the stock class of diffusers or transformers, with SDXL's layout and small widths: the UNet has
SDXL's blocks, samplers, `text_time` conditioning and transformer depths, so HiDiffusion, the graph keys and the
compiler meet what they would meet in SDXL itself. The weights are random, from a fixed seed. Images are therefore
textures, not pictures: they show that two ways of running a model agree, and how fast each is. The model whose pictures
mean something is `accel_hidiff.demo.trained.trained_model`, which begins as `assemble` gives it.

Everything that uses the demo model reads an ordinary diffusers folder, the one that `save_model` returns. A folder with
trained weights (made by `save_pretrained`, or a snapshot of a published SDXL model) in that place is used as it is;
`save_model` never overwrites a complete folder.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from accel_hidiff.compat import clip_tokenizer

__all__ = ["DemoModelConfig", "build_pipeline", "save_model", "tiny_config"]

_RECIPE_FILE = "demo_model.json"
_RECIPE_VERSION = 1  # raised whenever the same seed and configuration would give other weights

_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"
_MAX_TOKENS = 77
# Words that become one token each, so that prompts of the demo differ in more than their letters.
_WORDS = ("a", "an", "the", "of", "in", "on", "at", "and", "red", "green", "blue", "circle", "square", "photo", "light")

_SILU_MEAN_SQUARE = 0.3557  # E[silu(z)^2] for z ~ N(0, 1): the input of the last convolution, behind norm and SiLU
_QK_GAIN = 2.0  # torch's default gives attention logits of std 1/3, a nearly flat softmax; this makes it 4/3
_IMAGE_STD = 0.35  # of the decoder's output, whose range is [-1, 1]: few pixels are clipped


@dataclass(frozen=True)
class DemoModelConfig:
    """Sizes of the demo model; the layout (which blocks, in which order) is always SDXL's.

    `block_out_channels` and `transformer_layers` have one entry per UNet level, from the finest. The entry of
    `transformer_layers` for the first level is kept for SDXL's sake: that level has no attention. `head_width` is the
    number of channels per attention head; the number of heads follows from the widths. `sample_size` is the latent side
    that diffusers takes when a request gives no size. `vae_channels` has four entries, which makes the factor
    between pixels and latents 8; `vae_attention` is the self-attention in the middle of both of its halves. The
    tokenizers merge the letters of `words`: a word becomes one token, or a few where it begins like another one.

    >>> DemoModelConfig().attention_heads
    (2, 4, 8)
    >>> DemoModelConfig(head_width=24)
    Traceback (most recent call last):
    ...
    ValueError: block_out_channels: expected multiples of head_width=24, got 32; change one of the two
    """

    block_out_channels: tuple[int, int, int] = (32, 64, 128)
    transformer_layers: tuple[int, int, int] = (1, 2, 10)
    head_width: int = 16
    norm_groups: int = 8
    sample_size: int = 64
    time_ids_width: int = 32
    text_width: int = 32
    text_layers: int = 2
    text_width_2: int = 64
    text_layers_2: int = 2
    vae_channels: tuple[int, int, int, int] = (16, 32, 32, 32)
    vae_norm_groups: int = 8
    vae_attention: bool = True
    prediction_type: str = "epsilon"
    words: tuple[str, ...] = _WORDS

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name in ("vae_attention", "prediction_type", "words"):
                continue
            numbers = value if isinstance(value, tuple) else (value,)
            if not all(type(number) is int and number > 0 for number in numbers):
                raise ValueError(f"{name}: expected positive integers, got {value!r}")
        for name, length in (("block_out_channels", 3), ("transformer_layers", 3), ("vae_channels", 4)):
            value = getattr(self, name)
            if not isinstance(value, tuple) or len(value) != length:
                raise ValueError(f"{name}: expected a tuple of {length} integers, got {value!r}")
        self._check_multiples("block_out_channels", self.block_out_channels, "head_width")
        self._check_multiples("block_out_channels", self.block_out_channels, "norm_groups")
        self._check_multiples("vae_channels", self.vae_channels, "vae_norm_groups")
        self._check_multiples("text_width", (self.text_width,), "head_width")
        self._check_multiples("text_width_2", (self.text_width_2,), "head_width")
        # Sinusoidal embeddings are made of pairs of a sine and a cosine.
        if self.time_ids_width % 2 or self.block_out_channels[0] % 2:
            raise ValueError(
                "time_ids_width and block_out_channels[0]: expected even numbers, "
                f"got {self.time_ids_width} and {self.block_out_channels[0]}"
            )

    def _check_multiples(self, name: str, widths: Iterable[int], divisor_name: str) -> None:
        divisor = getattr(self, divisor_name)
        for width in widths:
            if width % divisor:
                raise ValueError(
                    f"{name}: expected multiples of {divisor_name}={divisor}, got {width}; change one of the two"
                )

    @property
    def attention_heads(self) -> tuple[int, ...]:
        """Heads per UNet level (diffusers calls this number `attention_head_dim` in SDXL's configuration)."""
        return tuple(width // self.head_width for width in self.block_out_channels)


def tiny_config() -> DemoModelConfig:
    """The smallest model of the layout, for tests: equal widths and depth 1, so that few regions differ."""
    return DemoModelConfig(
        block_out_channels=(16, 16, 16),
        transformer_layers=(1, 1, 1),
        head_width=8,
        norm_groups=4,
        sample_size=16,
        time_ids_width=8,
        text_width=16,
        text_layers=1,
        text_width_2=16,
        text_layers_2=1,
        vae_channels=(8, 8, 8, 8),
        vae_norm_groups=4,
    )


def build_pipeline(seed: int = 0, *, config: DemoModelConfig | None = None) -> StableDiffusionXLPipeline:
    """Build the demo pipeline on the CPU, in float32 and evaluation mode.

    The same seed and configuration give the same weights, bit for bit. The random state of torch (CPU and accelerators)
    is left as it was.
    """
    pipe = assemble(seed, config or DemoModelConfig())
    _rescale(pipe.unet, pipe.vae)
    return pipe


def assemble(seed: int, config: DemoModelConfig) -> StableDiffusionXLPipeline:
    """The pipeline as `build_pipeline` has it, with torch's own first weights: where training begins."""
    tokenizer, tokenizer_2 = _tokenizer(_EOS, config.words), _tokenizer("!", config.words)
    # `torch.manual_seed` would also reseed accelerators, which `fork_rng(devices=[])` does not restore.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        unet = UNet2DConditionModel(**_unet_arguments(config))
        vae = AutoencoderKL(**_vae_arguments(config))
        text_encoder = CLIPTextModel(
            _text_config(tokenizer, config.text_width, config.text_layers, config.head_width, act="quick_gelu")
        )
        text_encoder_2 = CLIPTextModelWithProjection(
            _text_config(tokenizer_2, config.text_width_2, config.text_layers_2, config.head_width, act="gelu")
        )
    for module in (unet, vae, text_encoder, text_encoder_2):
        module.eval()
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=unet,
        scheduler=_scheduler(config.prediction_type),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def save_model(directory: str | Path, seed: int = 0, *, config: DemoModelConfig | None = None) -> Path:
    """Write the demo model to `directory` as an ordinary diffusers folder, and return its path.

    A complete diffusers folder that is already there is reused unchanged. The folder is written under a temporary name
    next to `directory` and renamed, so nobody sees half of it; of two processes that write at once, one wins and the
    other reuses the winner's folder.

    Raises `ValueError` when the folder holds a demo model of another seed or configuration, and `FileExistsError` when
    it holds something that is not a complete diffusers folder.
    """
    target = Path(directory)
    recipe = _recipe(seed, config or DemoModelConfig())
    if _reusable(target, recipe):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex}.tmp"
    try:
        build_pipeline(seed, config=config).save_pretrained(temporary)
        (temporary / _RECIPE_FILE).write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
        try:
            os.rename(temporary, target)
        except OSError:
            # Either another process was faster, or the rename really failed.
            if not _reusable(target, recipe):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _recipe(seed: int, config: DemoModelConfig) -> dict[str, Any]:
    """What the weights depend on, in the form in which JSON gives it back."""
    recipe = {"version": _RECIPE_VERSION, "seed": seed, "config": asdict(config)}
    read_back: dict[str, Any] = json.loads(json.dumps(recipe))
    return read_back


def _reusable(target: Path, recipe: dict[str, Any]) -> bool:
    """True for a folder to reuse, False where one has to be written; raises where neither would be right."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    if not _is_complete(target):
        raise FileExistsError(
            f"{target}: expected a complete diffusers folder or nothing, found something else; "
            "remove it or choose another directory"
        )
    recipe_path = target / _RECIPE_FILE
    if recipe_path.is_file():
        found = json.loads(recipe_path.read_text(encoding="utf-8"))
        if found != recipe:
            raise ValueError(
                f"{target}: expected the demo model {json.dumps(recipe)}, found {json.dumps(found)}; "
                "remove the folder or choose another directory"
            )
    return True


def _is_complete(folder: Path) -> bool:
    """Whether `folder` has a pipeline index and a subfolder for every component that the index names."""
    index = folder / "model_index.json"
    if not index.is_file():
        return False
    components = json.loads(index.read_text(encoding="utf-8"))
    return all(
        (folder / name).is_dir()
        for name, entry in components.items()
        if isinstance(entry, list) and entry and entry[0] is not None
    )


def _unet_arguments(config: DemoModelConfig) -> dict[str, Any]:
    return {
        "sample_size": config.sample_size,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": config.block_out_channels,
        "layers_per_block": 2,
        "transformer_layers_per_block": config.transformer_layers,
        "attention_head_dim": config.attention_heads,
        "cross_attention_dim": config.text_width + config.text_width_2,
        "norm_num_groups": config.norm_groups,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": config.time_ids_width,
        # The six numbers of `time_ids` (original size, crop, target size), and the pooled text embedding.
        "projection_class_embeddings_input_dim": 6 * config.time_ids_width + config.text_width_2,
    }


def _vae_arguments(config: DemoModelConfig) -> dict[str, Any]:
    levels = len(config.vae_channels)
    return {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": config.vae_channels,
        "layers_per_block": 1,
        "norm_num_groups": config.vae_norm_groups,
        "sample_size": config.sample_size * 2 ** (levels - 1),
        "scaling_factor": 0.13025,
        "force_upcast": False,
        "mid_block_add_attention": config.vae_attention,
    }


def _text_config(tokenizer: CLIPTokenizer, width: int, layers: int, head_width: int, *, act: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // head_width,
        max_position_embeddings=_MAX_TOKENS,
        hidden_act=act,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _scheduler(prediction_type: str = "epsilon") -> EulerDiscreteScheduler:
    """SDXL's scheduler."""
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
        prediction_type=prediction_type,
    )


def _rescale(unet: UNet2DConditionModel, vae: AutoencoderKL) -> None:
    """Bring the random weights to useful magnitudes, in place.

    Attention gets a softmax that is not flat, the UNet predicts noise of about unit variance, and the decoder's pixels
    spread over the range of an image. Factors are constants, not measured, so no result depends on the machine.
    """
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if name.endswith((".to_q.weight", ".to_k.weight")):
                parameter.mul_(_QK_GAIN)
        # torch's default for a convolution is a uniform distribution of variance 1 / (3 fan_in).
        unit_gain = math.sqrt(3 / _SILU_MEAN_SQUARE)
        unet.conv_out.weight.mul_(unit_gain)
        vae.decoder.conv_out.weight.mul_(_IMAGE_STD * unit_gain)


def _tokenizer(pad_token: str, words: Iterable[str] = _WORDS) -> CLIPTokenizer:
    """A CLIP tokenizer of 512 byte tokens, a few words and two special tokens; any text can be encoded."""
    alphabet = _byte_alphabet()
    tokens = alphabet + [character + "</w>" for character in alphabet]
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        left, *rest = [*word[:-1], word[-1] + "</w>"]
        for right in rest:
            merges[left, right] = None
            left += right
            tokens.append(left)
    tokens += [_BOS, _EOS]
    vocab = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return clip_tokenizer(vocab, list(merges), pad_token=pad_token, model_max_length=_MAX_TOKENS)


def _byte_alphabet() -> list[str]:
    """One printable character per byte, "!" first: the alphabet of byte-level BPE (GPT-2's, which CLIP took over).

    Printable bytes stand for themselves; byte number n of the others is written as the character 256 + n.

    >>> alphabet = _byte_alphabet()
    >>> len(set(alphabet)), alphabet[0]
    (256, '!')
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = 256 - len(printable)
    return [chr(code) for code in [*printable, *range(256, 256 + others)]]
