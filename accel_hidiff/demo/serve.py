"""The serving half of the demo, run as a process of its own: `python -m accel_hidiff.demo.serve CONFIG.json`.

Loads the demo model and the compile cache, and serves every size under `on_miss="error"`: what is not in the cache
fails. Then the same requests run patched but eager, on a second pipeline, for comparison; with the
trained model, some captions are also drawn by the model as it was, beside what is served.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

_PROMPTS = ("a red house on grey", "a blue person on pink", "a green tree on yellow", "an orange fish on blue")
_SCALE = 3.0  # of guidance
_SEED = 0
_ROUNDS = 2


def serve(config: dict[str, Any]) -> dict[str, Any]:
    """Serves the sizes of `config` and returns the figures: seconds, milliseconds per step, counters, differences."""
    started = config["started"]
    import torch

    from accel_hidiff import HiDiffusionConfig, accelerate, apply_hidiffusion
    from accel_hidiff.demo.plot import contact_sheet
    from accel_hidiff.models import load_pipeline

    def request(pipe: Any, height: int, width: int, prompt: str = _PROMPTS[0]) -> dict[str, Any]:
        stamps: list[float] = []

        def stamp(pipe: Any, _step: int, _timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            if pipe.device.type == "cuda":
                torch.cuda.synchronize(pipe.device)  # the step has run, not only begun
            stamps.append(time.perf_counter())
            return kwargs

        began = time.perf_counter()
        image = pipe(
            prompt,
            height=height,
            width=width,
            num_inference_steps=config["steps"],
            guidance_scale=_SCALE,
            generator=torch.Generator().manual_seed(_SEED),
            callback_on_step_end=stamp,
            output_type="np",
        ).images[0]
        steps = [(b - a) * 1e3 for a, b in zip([stamps[0], *stamps], stamps, strict=False)][1:]
        first_ms = (stamps[0] - began) * 1e3  # text encoders included: not a step time
        return {"image": image, "seconds": time.perf_counter() - began, "steps_ms": steps, "first_ms": first_ms}

    def picture(image: Any) -> Any:
        return pipe.numpy_to_pil(image)[0]

    pipe = load_pipeline(config["model"], "float32", config["device"])
    pipe.set_progress_bar_config(disable=True)
    model_loaded = time.time()
    handle = accelerate(pipe, hidiffusion=HiDiffusionConfig(), cache=config["cache"], on_miss="error")
    sizes = [tuple(size) for size in config["sizes"]]
    handle.load(sizes, config["steps"])
    graphs_loaded = time.time()

    served = [request(pipe, *size) for size in sizes[:1]]
    first_image = time.time()
    eager = load_pipeline(config["model"], "float32", config["device"])
    eager.set_progress_bar_config(disable=True)
    if config["before"]:
        pictures = [
            (f"{width}x{height}\n{label}", [picture(request(one, height, width, text)["image"]) for text in _PROMPTS])
            for height, width in sizes
            for label, one in (("as it was", eager), ("HiDiffusion,\ncompiled", pipe))
        ]
        contact_sheet(pictures, _PROMPTS).save(Path(config["out"]) / "before-after.png")
    apply_hidiffusion(eager)
    rows = []
    for index, size in enumerate(sizes):
        runs: dict[str, list[dict[str, Any]]] = {"compiled": served if index == 0 else [], "eager": []}
        for _ in range(_ROUNDS):
            runs["compiled"].append(request(pipe, *size))
            runs["eager"].append(request(eager, *size))
        compiled_image, eager_image = runs["compiled"][-1]["image"], runs["eager"][-1]["image"]
        picture(compiled_image).save(Path(config["out"]) / f"{size[1]}x{size[0]}.png")
        difference = abs(compiled_image - eager_image).max() / abs(eager_image).max()
        rows.append(
            {
                "height": size[0],
                "width": size[1],
                "compiled_s": min(run["seconds"] for run in runs["compiled"]),
                "eager_s": min(run["seconds"] for run in runs["eager"]),
                "compiled_steps_ms": _fastest([run["steps_ms"] for run in runs["compiled"]]),
                "eager_steps_ms": _fastest([run["steps_ms"] for run in runs["eager"]]),
                "relative_difference": float(difference),
                "phases": [[p.start, p.stop, str(p.topology)] for p in handle.patch.plan(*size, config["steps"])],
            }
        )
    return {
        "start_to_model_s": model_loaded - started,
        "load_graphs_s": graphs_loaded - model_loaded,
        "start_to_first_image_s": first_image - started,
        "stats": handle.stats.to_json(),
        "compiler_imported": "torch._inductor.compile_fx" in sys.modules,
        "sizes": rows,
    }


def _fastest(runs: list[list[float]]) -> list[float]:
    """Step by step the fastest of several runs of one request."""
    return [min(times) for times in zip(*runs, strict=True)]


if __name__ == "__main__":
    settings = json.loads(Path(sys.argv[1]).read_text())
    Path(settings["report"]).write_text(json.dumps(serve(settings), indent=1))
