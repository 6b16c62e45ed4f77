"""The process of `against` that compiles and times steps: what an earlier checkout has too is all that it imports.

PART MODEL CACHE are its arguments: "compile" fills the cache and "steps" serves from it, "decoder" puts the VAE's
decoder alone into it; MODEL is a folder, or "random" for the demo's wider model with random weights.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections import defaultdict
from typing import Any

import torch
from diffusers import DiffusionPipeline

import accel_hidiff as ah
from accel_hidiff.demo import build_pipeline

SIZES = ((512, 512), (384, 640), (640, 384))  # (height, width)
STEPS = 50
CALLS = 7


def cpu_seconds() -> float:
    """Processor time of this process and of those that it waited for."""
    return sum(os.times()[:4])


def compile_seconds(handle: Any) -> dict[str, float]:
    """Processor time of compiling a region, the median of each kind; of all that is compiled, and how much that is."""
    spent: dict[str, list[float]] = defaultdict(list)
    began = 0.0

    def progress(event: Any) -> None:
        nonlocal began
        if event.state == "compiling":
            began = cpu_seconds()
        elif event.state == "compiled":
            kind = next((name for name in ("resnets", "attentions", "decoder") if name in event.region), "others")
            spent[kind].append(cpu_seconds() - began)

    handle.precompile(list(SIZES), STEPS, batch_sizes=(2,), progress=progress)
    everything = [seconds for found in spent.values() for seconds in found]
    told = {f"compile_{kind}_s": statistics.median(found) for kind, found in spent.items() if kind != "others"}
    return {**told, "compile_all_s": sum(everything), "artifacts": len(everything)}


def decoder_seconds(handle: Any) -> dict[str, float]:
    """Processor time of compiling the decoder."""
    graphs = handle.needed([SIZES[0]], (STEPS,), batch_sizes=(2,)).distinct.values()
    (graph,) = (graph for graph in graphs if graph.region.kind == "decoder")
    began = cpu_seconds()
    handle._dispatcher.binder.prepare(graph)
    return {"compile_decoder_s": cpu_seconds() - began}


def step_ms(handle: Any) -> dict[str, float]:
    """Processor time of a UNet call in each topology of each size, the median of some."""
    unet, found = handle.pipe.unet, {}
    draw = torch.Generator().manual_seed(0)
    text = torch.randn(2, 77, unet.config.cross_attention_dim, generator=draw)
    width = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    added = {"text_embeds": torch.randn(2, width, generator=draw), "time_ids": torch.zeros(2, 6)}
    for height, width in SIZES:
        sample = torch.randn(2, 4, height // 8, width // 8, generator=draw)
        for phase in handle.patch.plan(height, width, STEPS):
            turns = []
            with handle.patch.phase(step=phase.start, num_steps=STEPS), torch.no_grad():
                for _ in range(CALLS + 1):
                    start = time.process_time()
                    unet(sample, torch.tensor(500), text, added_cond_kwargs=added, return_dict=False)
                    turns.append((time.process_time() - start) * 1e3)
            found[f"{width}x{height}_{phase.topology}_cpu_ms"] = statistics.median(turns[1:])
    return found


def main() -> None:
    part, model, cache = sys.argv[1:4]
    torch.set_num_threads(1)
    pipe = build_pipeline() if model == "random" else DiffusionPipeline.from_pretrained(model)
    handle = ah.accelerate(pipe, hidiffusion=ah.HiDiffusionConfig(), cache=cache)
    figures = {"compile": compile_seconds, "steps": step_ms, "decoder": decoder_seconds}[part](handle)
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
