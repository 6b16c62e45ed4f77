"""One GPU, SDXL in full size with random weights: bfloat16, channels_last, batch 2 as with guidance.

Needs no pipeline on disk: a `StableDiffusionXLPipeline` of a random UNet, a small VAE and no text encoders is what
`accelerate` takes, and `patch.phase` names the steps. All UNets share one set of weights. Each stage records its
failure and the next one runs; results are on disk after every record; `--minutes` bounds the whole, compilation
included. `--tiny` runs the same on a CPU in float32.

Stages: `ceiling` (matmul), `precompile` (blocks, symbolic), `load` (in a new process), `step` per size and topology
(eager unpatched, eager patched, compiled), `torch_compile` (whole patched UNet, one topology, one size, through
`backend="inductor"`), `exact` (blocks compiled for one size). TFLOP are counted on the eager call by
`torch.utils.flop_counter`.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

import accel_hidiff as ah
from benchmarks import harness as h
from benchmarks.step import call
from compile_cache import CompileCache

GPU_SIZES = (h.Size(1024, 1024), h.Size(2048, 2048), h.Size(2688, 1536))
ERROR_LIMIT = 0.1  # max|diff|/max|ref| between two bfloat16 runs
SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "norm_num_groups": 32,
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
TINY: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (16, 16, 16),
    "transformer_layers_per_block": (1, 1, 1),
    "attention_head_dim": (2, 2, 2),
    "cross_attention_dim": 32,
    "norm_num_groups": 4,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
}


class OutOfTime(RuntimeError):
    """The budget of `--minutes` is used up."""


class Clock:
    """Minutes that are left."""

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes

    def check(self, *_: object) -> None:
        """Raises OutOfTime once nothing is left; a `progress` callback of `precompile`, too."""
        if time.monotonic() > self._end:
            raise OutOfTime("the budget of --minutes is used up")


def device_and_dtype() -> tuple[torch.device, torch.dtype]:
    """CUDA in bfloat16 where there is one, else the CPU in float32."""
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.bfloat16
    return torch.device("cpu"), torch.float32


def make_unet(tiny: bool) -> UNet2DConditionModel:
    """SDXL's UNet with random weights."""
    device, dtype = device_and_dtype()
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(
            in_channels=4,
            out_channels=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=2,
            use_linear_projection=True,
            addition_embed_type="text_time",
            **(TINY if tiny else SDXL),
        )
    return unet.to(dtype=dtype, memory_format=torch.channels_last).eval().requires_grad_(False)


def twin(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Another UNet over the same weights."""
    with torch.device("meta"):
        other = UNet2DConditionModel.from_config(unet.config)
    other.load_state_dict(unet.state_dict(), assign=True)
    return other.to(unet.dtype).eval().requires_grad_(False)


def pipeline_of(unet: UNet2DConditionModel) -> StableDiffusionXLPipeline:
    """The smallest pipeline around a UNet."""
    levels = 4
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8,) * levels,
        norm_num_groups=4,
        force_upcast=False,
    )
    parts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    vae = vae.to(unet.device, unet.dtype).eval()
    scheduler = EulerDiscreteScheduler()
    return StableDiffusionXLPipeline(vae=vae, unet=unet, scheduler=scheduler, add_watermarker=False, **parts)


def inputs_of(unet: UNet2DConditionModel, size: h.Size) -> h.UNetInputs:
    """A call's inputs, the sample in channels_last as the UNet's weights are."""
    given = h.unet_inputs(unet, size)
    return given._replace(sample=given.sample.contiguous(memory_format=torch.channels_last))


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """|got - want| / |want| in the Euclidean norm."""
    return h.rounded(((got.float() - want.float()).norm() / want.float().norm()).item(), 3)


def tflop_of(run: Callable[[], object]) -> float:
    """TFLOP of one call."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e12


def load_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Seconds from `accelerate` until all regions of all topologies are bound; the UNet's forward is a stand-in."""
    unet = make_unet(config["tiny"])
    unet.forward = h.TrivialUNet()
    pipe = pipeline_of(unet)
    sizes = [h.Size(*size) for size in config["sizes"]]
    inputs = [inputs_of(unet, size) for size in sizes]
    h.synchronize()
    start = time.perf_counter()
    cache = CompileCache(config["cache"])
    handle = ah.accelerate(pipe, hidiffusion=ah.HiDiffusionConfig(), cache=cache, on_miss="error")
    with torch.no_grad():
        for size, given in zip(sizes, inputs, strict=True):
            for step in h.topology_steps(handle.patch, size).values():
                call(handle.patch, given, step)
    h.synchronize()
    return {"load_s": h.rounded(time.perf_counter() - start), "bindings": handle.stats.bindings}


class Bench:
    """The stages; what one leaves behind for the next is an attribute."""

    def __init__(self, report: h.Report, tiny: bool, sizes: tuple[h.Size, ...], repeats: int, clock: Clock) -> None:
        self.report, self.tiny, self.sizes, self.repeats, self.clock = report, tiny, sizes, repeats, clock
        self.ceiling_tflops = float("nan")

    def build(self) -> None:
        """The weights, and the UNet that runs eager."""
        self.unet = make_unet(self.tiny)
        self.eager = ah.apply_hidiffusion(pipeline_of(twin(self.unet)))
        weights = sum(parameter.nbytes for parameter in self.unet.parameters())
        self.report.add(stage="build", unet_weights_mb=h.rounded(weights / 1e6), dtype=str(self.unet.dtype))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Records a failure, with its stage, and goes on."""
        try:
            self.clock.check()
            yield
        except Exception as problem:
            lines = str(problem).strip().splitlines()
            self.report.add(stage=name, failed=f"{type(problem).__name__}: {lines[0][:300] if lines else ''}")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def accelerate(self, cache: Path | None, **options: Any) -> ah.Handle:
        """A handle on a UNet of its own."""
        pipe = pipeline_of(twin(self.unet))
        kept = CompileCache(cache) if cache is not None else None
        return ah.accelerate(pipe, hidiffusion=ah.HiDiffusionConfig(), cache=kept, **options)

    def ceiling(self) -> None:
        """TFLOP/s of a large square matmul."""
        device, dtype = device_and_dtype()
        n = 512 if self.tiny else 8192
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        seconds = h.interleave({"matmul": lambda: a @ b}, repeats=20)["matmul"].median
        self.ceiling_tflops = 2 * n**3 / seconds / 1e12
        self.report.add(stage="ceiling", matmul_tflop_per_s=h.rounded(self.ceiling_tflops), n=n, dtype=str(dtype))

    def precompile(self, cache: Path, sizes: tuple[h.Size, ...], shapes: str, stage: str) -> None:
        """Fills the cache; stops at the end of the budget, what is compiled stays."""
        made = self.accelerate(cache, shapes=shapes).precompile(
            [(size.height, size.width) for size in sizes],
            h.NUM_STEPS,
            batch_sizes=(h.GUIDANCE_BATCH,),
            progress=self.clock.check,
        )
        self.report.add(
            stage=stage, shapes=shapes, artifacts=made.artifacts, compiled=made.compiled, graphs=made.graphs,
            compile_s=h.rounded(made.seconds), artifacts_mb=h.rounded(made.bytes / 1e6),
        )  # fmt: skip

    def load(self, cache: Path) -> None:
        """A new process over the filled cache."""
        config = {"tiny": self.tiny, "sizes": self.sizes, "cache": str(cache)}
        self.report.add(stage="load", **h.worker("benchmarks.gpu", config))

    def steps(self, handle: ah.Handle, size: h.Size, stage: str, label: str) -> None:
        """One size: every topology, contestants in turns."""
        inputs = inputs_of(self.unet, size)
        plain = partial(inputs.call, self.unet)
        plain_tflop = tflop_of(plain)
        for topology, step in h.topology_steps(self.eager, size).items():
            self.clock.check()
            eager, compiled = partial(call, self.eager, inputs, step), partial(call, handle.patch, inputs, step)
            want, got = eager(), compiled()
            worst = h.verify(f"{stage} {topology}", got, want, ERROR_LIMIT)
            error = relative_error(got, want)
            del want, got
            times = h.interleave({"unpatched": plain, "patched": eager, label: compiled}, self.repeats)
            tflop = tflop_of(eager)
            speeds = {name: (plain_tflop if name == "unpatched" else tflop) / t.median for name, t in times.items()}
            fields: dict[str, Any] = {"stage": stage, "size": str(size), "topology": str(topology)}
            for name, timing in times.items():
                fields |= timing.fields(name)
                fields[f"{name}_tflop_per_s"] = h.rounded(speeds[name])
            self.report.add(
                **fields,
                tflop=h.rounded(tflop),
                **times[label].ratios(f"{label}_over_patched", times["patched"]),
                ceiling_share_ratio=h.rounded(speeds[label] / self.ceiling_tflops, 3),
                relative_error=error,
                max_error=h.rounded(worst, 2),
            )

    def compare(self, cache: Path, sizes: tuple[h.Size, ...], shapes: str, stage: str, label: str) -> None:
        """`steps` at each size over a strict handle; a size that fails does not stop the next."""
        handle = self.accelerate(cache, shapes=shapes, on_miss="error")
        for size in sizes:
            with self.stage(stage):
                self.steps(handle, size, stage, label)

    def torch_compile(self) -> None:
        """The whole patched UNet under `torch.compile`, first topology of the first size."""
        size = self.sizes[0]
        topology, step = next(iter(h.topology_steps(self.eager, size).items()))
        inputs = inputs_of(self.unet, size)
        handle = self.accelerate(None, backend="inductor", regions="whole", shapes="exact")
        compiled, eager = partial(call, handle.patch, inputs, step), partial(call, self.eager, inputs, step)
        first, _ = h.timed(compiled)
        want, got = eager(), compiled()
        h.verify("torch_compile", got, want, ERROR_LIMIT)
        times = h.interleave({"patched": eager, "torch_compile": compiled}, self.repeats)
        fields = {**times["patched"].fields("patched"), **times["torch_compile"].fields("torch_compile")}
        self.report.add(
            stage="torch_compile", size=str(size), topology=str(topology), first_call_s=h.rounded(first), **fields,
            **times["torch_compile"].ratios("torch_compile_over_patched", times["patched"]),
            relative_error=relative_error(got, want),
        )  # fmt: skip


def main() -> None:
    if (config := h.worker_config()) is not None:
        print(json.dumps(load_worker(config)))
        return
    parser = h.arguments(__doc__, repeats=10)
    parser.add_argument("--minutes", type=float, default=20.0, help="budget of the whole run")
    parser.add_argument("--cache", type=Path, help="compile cache to use and fill; default: a temporary one")
    options = h.parsed(parser)
    sizes = tuple(options.size or (h.TINY_SIZES if options.tiny else GPU_SIZES))
    report = h.Report(options.out, options.tiny)
    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        cache = (options.cache or Path(directory)).resolve()
        bench = Bench(report, options.tiny, sizes, options.repeats, Clock(options.minutes))
        with bench.stage("ceiling"):
            bench.ceiling()
        with bench.stage("build"):
            bench.build()
        with bench.stage("precompile"):
            bench.precompile(cache, sizes, "symbolic", "precompile")
        with bench.stage("load"):
            bench.load(cache)
        with bench.stage("step"):
            bench.compare(cache, sizes, "symbolic", "step", "compiled")
        with bench.stage("torch_compile"):
            bench.torch_compile()
        with bench.stage("exact"):
            bench.precompile(cache, sizes[:1], "exact", "precompile_exact")
            bench.compare(cache, sizes[:1], "exact", "exact", "exact")
        if torch.cuda.is_available():
            report.add(stage="memory", peak_mb=h.rounded(torch.cuda.max_memory_allocated() / 1e6))


if __name__ == "__main__":
    main()
