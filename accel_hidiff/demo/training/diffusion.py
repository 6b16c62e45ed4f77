"""Training of the UNet, together with both text encoders, on latents of drawn scenes.

As SDXL was, it is trained on canvases of several shapes. The numbers of SDXL's size conditioning (original and target
size) are drawn at random, once, twice or four times the real ones, so that the model learns that they tell nothing:
what it does above the training size then comes from its layers, not from an embedding that it never met.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file, save_file

from accel_hidiff.demo.scenes import captions
from accel_hidiff.demo.training.autoencoder import save_grid
from accel_hidiff.demo.training.loop import Training
from accel_hidiff.demo.training.recipe import CANVASES, DiffusionRecipe, Size, pixels, scene_of
from accel_hidiff.demo.training.start import start_as_identity
from accel_hidiff.files import whole_file

_ENCODED_AT_ONCE = 100
_SAMPLES = 16
_SAMPLE_STEPS = 20
_SCALES = (1, 2, 4)


@dataclass
class Encoded:
    """Encoded scenes of one canvas: `moments` (N, 2, 4, h, w), float16 (mean and standard deviation); N captions."""

    canvas: Size
    moments: torch.Tensor
    captions: list[str]


def train_diffusion(pipe: Any, recipe: DiffusionRecipe, folder: Path, device: torch.device) -> Training:
    """Train the UNet and the text encoders of `pipe` in place, its autoencoder being trained; return the record.

    Sample grids (averaged weights, 20 steps, guidance 3) and the encoded scenes are written to `folder`.
    """
    data = encoded_scenes(pipe.vae, recipe, folder, device)
    shares = [share for _, share in CANVASES]
    tokens = _Tokens(pipe, device)
    noiser = DDPMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    modules = {name: getattr(pipe, name) for name in ("unet", "text_encoder", "text_encoder_2")}
    start_as_identity(pipe.unet)
    pipe.unet.to(memory_format=torch.channels_last)

    def loss_of(step: int) -> torch.Tensor:
        rng = numpy.random.default_rng((recipe.seed, 2, step))
        noise_of = torch.Generator().manual_seed(int(rng.integers(2**31)))
        part = data[int(rng.choice(len(data), p=shares))]
        chosen = rng.integers(len(part.captions), size=recipe.batch)
        mean, std = part.moments[torch.from_numpy(chosen)].float().unbind(1)
        latents = (mean + std * torch.randn(mean.shape, generator=noise_of)) * pipe.vae.config.scaling_factor
        noise = torch.randn(mean.shape, generator=noise_of)
        times = torch.randint(noiser.config.num_train_timesteps, (recipe.batch,), generator=noise_of)
        noisy = noiser.add_noise(latents, noise, times)
        target = noiser.get_velocity(latents, noise, times) if _by_velocity(noiser) else noise
        height, width = part.canvas
        scale = rng.choice(_SCALES, size=(recipe.batch, 2))
        sizes = [[a * height, a * width, 0, 0, b * height, b * width] for a, b in scale.tolist()]
        with torch.autocast(device.type, torch.bfloat16):
            hidden, pooled = tokens.encode([part.captions[number] for number in chosen])
            kept = torch.from_numpy(rng.random(recipe.batch) >= recipe.without_caption).to(device, hidden.dtype)
            predicted = pipe.unet(
                noisy.to(device, memory_format=torch.channels_last),
                times.to(device),
                encoder_hidden_states=hidden * kept[:, None, None],
                added_cond_kwargs={
                    "text_embeds": pooled * kept[:, None],
                    "time_ids": torch.tensor(sizes, dtype=torch.float32, device=device),
                },
                return_dict=False,
            )[0]
        return (predicted.float() - target.to(device)).square().mean()

    def pictures(step: int) -> None:
        save_grid(samples(pipe, recipe.seed), 8, folder / f"samples-{step:06d}.png")

    training = Training(
        name="diffusion",
        folder=folder,
        modules=modules,
        loss_of=loss_of,
        steps=recipe.steps,
        rate=recipe.rate,
        warm_up=recipe.warm_up,
        settings=asdict(recipe) | {"encoder": _digest(pipe.vae)},
        weight_decay=recipe.weight_decay,
        average=recipe.average,
        pictures=pictures,
    )
    training.run()
    return training


def samples(pipe: Any, seed: int, *, size: Size = (128, 128)) -> torch.Tensor:
    """Images of captions spread over all of them: (16, 3, H, W) in [-1, 1]; modules keep their modes."""
    names = captions()
    prompts = [names[(number * 37 + 11) % len(names)] for number in range(_SAMPLES)]
    training = [module for module in (pipe.unet, pipe.text_encoder, pipe.text_encoder_2) if module.training]
    for module in training:
        module.eval()
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        prompts,
        height=size[0],
        width=size[1],
        num_inference_steps=_SAMPLE_STEPS,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
    ).images
    for module in training:
        module.train()
    images = torch.as_tensor(images)
    return images.float().mul(2).sub(1)


def encoded_scenes(vae: Any, recipe: DiffusionRecipe, folder: Path, device: torch.device) -> list[Encoded]:
    """The scenes of the training, one item per canvas, from `folder` if it has those that this autoencoder made."""
    found = []
    digest = _digest(vae)
    for number, (canvas, share) in enumerate(CANVASES):
        count = round(recipe.scenes * share)
        name = f"scenes-{canvas[1]}x{canvas[0]}-{count}-{recipe.seed}-{digest}"
        path, words = folder / f"{name}.safetensors", folder / f"{name}.json"
        if not (path.is_file() and words.is_file()):
            seed = recipe.seed * 100 + number
            made = _encode(vae, seed, count, canvas, device)
            with whole_file(words) as part:
                part.write_text(json.dumps(made.captions))
            with whole_file(path) as part:
                save_file({"moments": made.moments}, part)
            print(f"encoded {count} scenes of {canvas[1]}x{canvas[0]}", flush=True)
        found.append(Encoded(canvas, load_file(path)["moments"], json.loads(words.read_text())))
    return found


def _encode(vae: Any, seed: int, count: int, canvas: Size, device: torch.device) -> Encoded:
    moments, words = [], []
    for start in range(0, count, _ENCODED_AT_ONCE):
        drawn = [scene_of(seed, number, canvas) for number in range(start, min(start + _ENCODED_AT_ONCE, count))]
        words += [text for text, _ in drawn]
        images = pixels([image for _, image in drawn]).to(device, memory_format=torch.channels_last)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            latents = vae.encode(images).latent_dist
        moments.append(torch.stack([latents.mean, latents.std], 1).to("cpu", torch.float16))
    return Encoded(canvas, torch.cat(moments).contiguous(), words)


def _digest(vae: Any) -> str:
    """Of the encoder's weights, and of how scenes are drawn: they are encoded again if either changes."""
    whole = hashlib.sha256()
    for module in (vae.encoder, vae.quant_conv):
        for name, value in sorted(module.state_dict().items()):
            whole.update(name.encode())
            whole.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    for canvas, _ in CANVASES:
        text, image = scene_of(0, 0, canvas)
        whole.update(text.encode() + image.tobytes())
    return whole.hexdigest()[:16]


def _by_velocity(noiser: Any) -> bool:
    return bool(noiser.config.prediction_type == "v_prediction")


class _Tokens:
    """Captions as both text encoders of SDXL give them to its UNet: second-to-last layers, and the pooled text."""

    def __init__(self, pipe: Any, device: torch.device) -> None:
        self.pipe, self.device = pipe, device
        self._known: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def _ids(self, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        if text not in self._known:
            pair = [
                tokenizer(text, padding="max_length", truncation=True, return_tensors="pt").input_ids[0]
                for tokenizer in (self.pipe.tokenizer, self.pipe.tokenizer_2)
            ]
            self._known[text] = (pair[0], pair[1])
        return self._known[text]

    def encode(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states (N, 77, both widths) and pooled text (N, second width), with gradients."""
        first, second = (torch.stack(ids).to(self.device) for ids in zip(*map(self._ids, texts), strict=True))
        one = self.pipe.text_encoder(first, output_hidden_states=True)
        two = self.pipe.text_encoder_2(second, output_hidden_states=True)
        return torch.cat([one.hidden_states[-2], two.hidden_states[-2]], -1), two[0]
