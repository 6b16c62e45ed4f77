"""The process of `against`: what an earlier checkout has too is all that it imports. MODEL CACHE are its arguments."""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from waiting import watched  # beside this file: `benchmarks` itself is the other checkout's

import accel_hidiff as ah

_SIZE = 512  # of the requests beside which a thread waits
DEEP: dict[str, Any] = {  # SDXL's blocks, few channels: as many modules and tensors
    "sample_size": 16, "block_out_channels": (16, 16, 16), "transformer_layers_per_block": (1, 2, 10),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": (2, 2, 2),
    "cross_attention_dim": 32, "norm_num_groups": 4, "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64,
}  # fmt: skip


def longest_wait_ms(model: str, cache: str) -> float:
    """The longest wait of a thread that wants to wake every millisecond, beside compiled requests."""
    pipe = DiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    ah.accelerate(pipe, hidiffusion=ah.HiDiffusionConfig(), cache=cache, on_miss="error")

    def request() -> None:
        pipe("a red circle", height=_SIZE, width=_SIZE, num_inference_steps=4, output_type="latent")

    request()
    with watched() as gaps:
        for _ in range(3):
            request()
    return max(gaps) * 1e3


def entrance_ms() -> float:
    """Processor time that the first call of a request takes more than its second."""
    unet = UNet2DConditionModel(**DEEP).eval().requires_grad_(False)
    unet.forward = lambda sample, timestep, encoder_hidden_states, **rest: (sample,)  # the patch wraps it
    parts = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipe = StableDiffusionXLPipeline(unet=unet, scheduler=EulerDiscreteScheduler(), add_watermarker=False, **parts)
    handle = ah.accelerate(pipe, hidiffusion=ah.HiDiffusionConfig(), backend="eager")
    sample, text = torch.zeros(2, 4, 16, 16), torch.zeros(2, 77, 32)
    added = {"text_embeds": torch.zeros(2, 16), "time_ids": torch.zeros(2, 6)}

    def call_ms() -> float:
        start = time.process_time()
        unet(sample, torch.tensor(500), text, added_cond_kwargs=added, return_dict=False)
        return (time.process_time() - start) * 1e3

    found = []
    for _ in range(60):
        with handle.patch.phase(step=0, num_steps=50):
            found.append(call_ms() - call_ms())
    return statistics.median(found[10:])


if __name__ == "__main__":
    torch.set_num_threads(1)
    waited = longest_wait_ms(*sys.argv[1:3])
    print(json.dumps({"longest_wait_ms": round(waited, 2), "entrance_cpu_ms": round(entrance_ms(), 3)}))
