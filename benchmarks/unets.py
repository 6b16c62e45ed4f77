"""Configs of the published UNets, and of tiny ones of the same layouts."""

from __future__ import annotations

from typing import Any, Final

SDXL: Final[dict[str, Any]] = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SDXL_TINY: Final[dict[str, Any]] = {
    **SDXL,
    "sample_size": 16,
    "block_out_channels": (16, 16, 16),
    "transformer_layers_per_block": (1, 1, 1),
    "attention_head_dim": (2, 2, 2),
    "cross_attention_dim": 32,
    "norm_num_groups": 4,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
}
SD15: Final[dict[str, Any]] = {"sample_size": 64, "cross_attention_dim": 768}
SD15_TINY: Final[dict[str, Any]] = {
    "sample_size": 16,
    "block_out_channels": (16, 16, 16, 16),
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
    "norm_num_groups": 4,
}
