"""The command line: `accel-hidiff {demo,precompile,serve,generate,explain,inspect,tune,doctor,bench}`.

Exit codes: 0 done, 1 the work failed, 2 bad usage or bad input, with one line on stderr.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from accel_hidiff.benching.names import BENCHED, PEERS
from accel_hidiff.benching.options import Options as BenchOptions
from accel_hidiff.config import CFGPlusPlusConfig, DecodeConfig, HiDiffusionConfig, check_steps
from accel_hidiff.deploy import is_deploy_file, load_deployment, parse_size
from accel_hidiff.errors import AccelHiDiffError, BadInput, BenchFailed, CompileFailed, DemoFailed, PatchConflict
from accel_hidiff.files import whole_file
from accel_hidiff.packages.command import inspect
from accel_hidiff.precompiling.options import Options
from accel_hidiff.schedule import running_steps
from compile_cache import CompileCache, CompileCacheError, RemoteError, SigningKey, commands
from compile_cache import Remote as SecondTier
from compile_cache.commands import open_cache
from compile_cache.console import run_app

app = typer.Typer(add_completion=False, help="Compiled HiDiffusion for diffusers pipelines.")
app.command()(inspect)

Model = Annotated[str, typer.Argument(help="A diffusers folder or a hub id (owner/name).", show_default=False)]
Sizes = Annotated[
    list[str], typer.Option("--size", help="WIDTHxHEIGHT in pixels; repeat for more.", show_default=False)
]
Steps = Annotated[int, typer.Option("--steps", help="Denoising steps of a request.")]
CacheDir = Annotated[Path, typer.Option("--cache", help="Directory of the compile cache.")]
Backend = Annotated[str, typer.Option(help="aot, inductor, onediff or eager.")]
Regions = Annotated[str, typer.Option(help="blocks or whole.")]
Shapes = Annotated[str, typer.Option(help="symbolic or exact.")]
Dtype = Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; the best one here by default.")]
Strength = Annotated[float, typer.Option(help="Of image-to-image and inpainting: the share of the steps that runs.")]
Family = Annotated[str | None, typer.Option(help="sd15, sdxl or sdxl_turbo; told from the model by default.")]
Task = Annotated[
    str | None,
    typer.Option(help="text2img, img2img, inpaint, controlnet or controlnet_img2img; told from the model by default."),
]
CFGPP = Annotated[
    float | None, typer.Option("--cfgpp", help="CFG++ guidance with this lambda, 0..1 (which changes no graph).")
]
DecodeTiles = Annotated[
    str, typer.Option("--decode-tiles", help="auto (where memory is short), never or always: the VAE decodes in tiles.")
]
DecodeMemory = Annotated[
    str | None, typer.Option("--decode-memory", help="What a decode may take, such as 8GB; what is free by default.")
]
DecodeDtype = Annotated[
    str | None, typer.Option("--decode-dtype", help="bfloat16: the VAE decodes in it; as the pipeline does by default.")
]
ControlNets = Annotated[
    list[str], typer.Option("--controlnet", help="A ControlNet's folder or hub id; repeat for more.")
]
Remote = Annotated[
    str | None,
    typer.Option(
        "--remote", help="URL of a second cache, such as s3://bucket/cache: what is missing comes from there."
    ),
]
Trust = Annotated[
    list[str],
    typer.Option("--trust", help="Load only what this public key signed: ed25519:... or a file of keys. Repeatable."),
]
TargetName = Annotated[
    str | None,
    typer.Option(
        "--target", help="GPU to compile for, which need not be here: sm_90, h200, l4/x86-64-v2 (with the host's CPU)."
    ),
]
MemoryFormat = Annotated[
    str | None, typer.Option(help="channels_last or contiguous: of the convolutions; as the model has it by default.")
]
Variant = Annotated[
    str | None, typer.Option(help="tuned: artifacts that `tune` found better on this device come first.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]

_CACHE = Path("compile-cache")


@app.callback()
def quiet() -> None:
    """Compiled HiDiffusion for diffusers pipelines."""
    # This process is ours: hints and progress bars of the model libraries stay out of its output.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)


@app.command()
def precompile(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(help="A diffusers folder, a hub id (owner/name) or a deploy file (.toml).", show_default=False),
    ],
    size: Sizes = [],  # noqa: B006
    steps: Steps = 30,
    cache: CacheDir = _CACHE,
    regions: Regions = "blocks",
    shapes: Shapes = "symbolic",
    batch: Annotated[list[int], typer.Option(help="UNet batch, guidance counted; repeat for more.")] = [1, 2],  # noqa: B006
    strength: Strength = 1.0,
    family: Family = None,
    task: Task = None,
    controlnet: ControlNets = [],  # noqa: B006
    cfgpp: CFGPP = None,
    decode_tiles: DecodeTiles = "auto",
    decode_memory: DecodeMemory = None,
    decode_dtype: DecodeDtype = None,
    remote: Remote = None,
    push: Annotated[bool, typer.Option("--push", help="Send what is stored here to the remote as well.")] = False,
    trust: Trust = [],  # noqa: B006
    sign_with: Annotated[
        Path | None,
        typer.Option(help="Private key (compile-cache keygen) that signs; what it did not sign is compiled anew."),
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    target: TargetName = None,
    memory_format: MemoryFormat = None,
    check: Annotated[bool, typer.Option("--check", help="Of a deploy file: only say what is missing.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Of a deploy file: only estimate minutes, bytes.")] = False,
    jobs: Annotated[int | None, typer.Option(help="Compiling processes; of a deploy file, one per core.")] = None,
    max_memory: Annotated[str | None, typer.Option(help="Of a deploy file: of each process, such as 8GB.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compile every graph that requests of these sizes need, or all of a deploy file. Can be stopped, and goes on."""
    options = Options.of(context, file=is_deploy_file(model))
    if is_deploy_file(model):
        from accel_hidiff.precompiling.command import precompile_file

        raise typer.Exit(precompile_file(model, options))
    if not size:
        raise BadInput("--size: expected at least one WIDTHxHEIGHT, got none; give it, or a deploy file (.toml)")
    sizes = [parse_size(text) for text in size]
    running_steps(steps, strength)
    decode = _decode(decode_tiles, decode_memory, decode_dtype)
    signer = None if sign_with is None else SigningKey.load(sign_with)
    store = _open_cache(cache, remote, trust, push=push, sign_with=signer)
    settings = {"cache": store, "regions": regions, "shapes": shapes, "family": family, "task": task}
    settings |= {"guidance": _cfgpp(cfgpp), "memory_format": memory_format, "decode": decode}
    handle = _compilable((model, dtype, device, controlnet), target, settings)
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        MofNCompleteColumn(),
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        progress = bar.add_task("looking for graphs", total=None)

        def show(event: Any) -> None:
            finished = event.state != "compiling"
            bar.update(progress, total=event.total, completed=event.number - (not finished))
            bar.update(progress, description=f"{event.region} {event.state}")
            if finished:
                line = f"{event.number:3} of {event.total}  {event.state:8} {event.seconds:6.1f} s  {event.region}"
                console.print(line, highlight=False)

        report = handle.precompile(sizes, steps, batch_sizes=batch, strength=strength, jobs=jobs, progress=show)
    _print(report.to_json() if as_json else report.table())


@app.command()
def tune(
    model: Model,
    size: Sizes,
    steps: Steps = 30,
    cache: CacheDir = _CACHE,
    batch: Annotated[list[int], typer.Option(help="UNet batch, guidance counted; repeat for more.")] = [2],  # noqa: B006
    rounds: Annotated[int, typer.Option(help="Timed turns of each artifact.")] = 15,
    family: Family = None,
    task: Task = None,
    controlnet: ControlNets = [],  # noqa: B006
    dtype: Dtype = None,
    device: Device = None,
    memory_format: MemoryFormat = None,
    as_json: AsJson = False,
) -> None:
    """Compile each artifact once more on the device that it runs on, and keep the faster one as the variant "tuned"."""
    from accel_hidiff.models import load_pipeline
    from accel_hidiff.tuning import Tuned
    from accel_hidiff.tuning import tune as tune_handle

    sizes = [parse_size(text) for text in size]
    options = {"cache": open_cache(cache), "family": family, "task": task, "memory_format": memory_format}
    handle = _accelerate(load_pipeline(model, dtype, device, controlnet), **options)

    def show(tuned: Tuned) -> None:
        times = f"{tuned.before_ms:9.3f} -> {tuned.after_ms:9.3f} ms" if tuned.before_ms else ""
        Console(stderr=True).print(f"{tuned.state:8} {times}  {tuned.region}", highlight=False)

    rows = tune_handle(handle, sizes, steps, batch_sizes=batch, rounds=rounds, progress=show)
    if as_json:
        _print([row.to_json() for row in rows])
        return
    counts = {state: sum(row.state == state for row in rows) for state in ("tuned", "kept", "known", "missing")}
    print(", ".join(f"{count} {state}" for state, count in counts.items() if count))


@app.command()
def generate(
    model: Model,
    size: Sizes,
    prompt: Annotated[str, typer.Option(help="What to draw.")] = "a red circle on blue",
    out: Annotated[Path, typer.Option(help="Folder for the PNGs.")] = Path("images"),
    steps: Steps = 30,
    cache: CacheDir = _CACHE,
    backend: Backend = "aot",
    on_miss: Annotated[str, typer.Option(help="compile, eager or error.")] = "compile",
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance; 1 and below: off.")] = 5.0,
    seed: Annotated[int, typer.Option(help="Seed of the generator.")] = 0,
    regions: Regions = "blocks",
    shapes: Shapes = "symbolic",
    family: Family = None,
    cfgpp: CFGPP = None,
    decode_tiles: DecodeTiles = "auto",
    decode_memory: DecodeMemory = None,
    decode_dtype: DecodeDtype = None,
    remote: Remote = None,
    trust: Trust = [],  # noqa: B006
    dtype: Dtype = None,
    device: Device = None,
    memory_format: MemoryFormat = None,
    variant: Variant = None,
    as_json: AsJson = False,
) -> None:
    """Generate one PNG per size."""
    import torch

    from accel_hidiff.models import load_pipeline

    sizes = [parse_size(text) for text in size]
    check_steps(steps)
    guidance = _cfgpp(cfgpp)
    decode = _decode(decode_tiles, decode_memory, decode_dtype)
    store = _open_cache(cache, remote, trust)
    out.mkdir(parents=True, exist_ok=True)
    options = {"cache": store, "backend": backend, "on_miss": on_miss, "regions": regions, "shapes": shapes}
    options |= {"memory_format": memory_format, "variant": variant, "decode": decode}
    handle = _accelerate(load_pipeline(model, dtype, device), family=family, guidance=guidance, **options)
    pipe = handle.pipe
    pipe.set_progress_bar_config(disable=as_json)
    written = []
    for height, width in sizes:
        generator = torch.Generator(device="cpu").manual_seed(seed)
        arguments = {"height": height, "width": width, "num_inference_steps": steps, "guidance_scale": guidance_scale}
        image = pipe(prompt, generator=generator, **arguments).images[0]
        path = out / f"{width}x{height}.png"
        with whole_file(path) as part:
            image.save(part)
        written.append(str(path))
    if as_json:
        _print({"images": written, "stats": handle.stats.to_json()})
        return
    for path_text in written:
        print(path_text)
    for reason, count in handle.stats.rejected.items():
        print(f"{count} calls ran eager: {reason}", file=sys.stderr)


@app.command()
def serve(
    deploy_file: Annotated[Path, typer.Argument(help="A deploy file (TOML).", show_default=False)],
    host: Annotated[str | None, typer.Option(help="In place of service.host.")] = None,
    port: Annotated[int | None, typer.Option(help="In place of service.port; 0: any free one.")] = None,
    as_json: AsJson = False,
) -> int:
    """Serve the models of a deploy file over HTTP, until SIGTERM or SIGINT."""
    from accel_hidiff.serving.command import serve as run_service

    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    deployment = load_deployment(deploy_file)
    service = deployment.service
    service = dataclasses.replace(service, host=host or service.host, port=service.port if port is None else port)

    def announce(url: str) -> None:
        print(json.dumps({"serving": url}) if as_json else f"serving on {url}", flush=True)

    return run_service(dataclasses.replace(deployment, service=service), announce)


@app.command()
def explain(
    model: Model,
    size: Sizes,
    steps: Steps = 30,
    cache: CacheDir = _CACHE,
    backend: Backend = "aot",
    regions: Regions = "blocks",
    shapes: Shapes = "symbolic",
    strength: Strength = 1.0,
    family: Family = None,
    task: Task = None,
    controlnet: ControlNets = [],  # noqa: B006
    cfgpp: CFGPP = None,
    decode_tiles: DecodeTiles = "auto",
    decode_memory: DecodeMemory = None,
    decode_dtype: DecodeDtype = None,
    plot: Annotated[
        Path | None, typer.Option(help="A PNG of the phases, and of the size that each block runs at.")
    ] = None,
    remote: Remote = None,
    trust: Trust = [],  # noqa: B006
    dtype: Dtype = None,
    device: Device = None,
    target: TargetName = None,
    memory_format: MemoryFormat = None,
    variant: Variant = None,
    as_json: AsJson = False,
) -> None:
    """Show which graph runs at which step, and whether the cache holds it. Loads no weights."""
    sizes = [parse_size(text) for text in size]
    running_steps(steps, strength)
    decode = _decode(decode_tiles, decode_memory, decode_dtype)
    store = _open_cache(cache, remote, trust)
    options = {"cache": store, "backend": backend, "regions": regions, "shapes": shapes, "memory_format": memory_format}
    options |= {"family": family, "task": task, "guidance": _cfgpp(cfgpp), "variant": variant, "decode": decode}
    handle = _skeleton((model, dtype, device, controlnet), target, options)
    explanations = [handle.explain(height, width, steps, strength=strength) for height, width in sizes]
    if plot is not None:
        from accel_hidiff.plot import plot_plans

        plot_plans(handle.patch, sizes, running_steps(steps, strength), plot)
    if as_json:
        _print([explanation.to_json() for explanation in explanations])
        return
    for explanation in explanations:
        print(explanation)


@app.command()
def doctor(target: TargetName = None, as_json: AsJson = False) -> None:
    """Tell which backends and devices are usable here, and for each that is not, why; or what a target needs."""
    from accel_hidiff.doctor import examine, examine_target

    findings = examine() if target is None else examine_target(target)
    if as_json:
        _print([finding.to_json() for finding in findings])
        return
    table = Table(box=None, pad_edge=False)
    for column in ("part", "usable", "detail"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        table.add_row(finding.part, "yes" if finding.usable else "no", Text(finding.detail))
    _print(table)


@app.command()
def bench(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A diffusers folder or a hub id (owner/name); the project's tiny SDXL model, with random weights, by "
            "default.",
            show_default=False,
        ),
    ] = None,
    size: Annotated[
        list[str],
        typer.Option(
            "--size", help="WIDTHxHEIGHT in pixels; repeat for more. The model's own by default.", show_default=False
        ),
    ] = [],  # noqa: B006
    steps: Annotated[int, typer.Option("--steps", help="Of a request: they decide which topologies occur.")] = 30,
    backends: Annotated[
        str,
        typer.Option(
            help="With commas between them; eager is the reference, and always runs. Variants: /whole, /blocks, /exact "
            f"or /symbolic behind a name. Peers: {', '.join(PEERS)}."
        ),
    ] = ",".join(BENCHED),
    repeats: Annotated[int, typer.Option(help="Timed turns of each backend.")] = 15,
    batch: Annotated[int, typer.Option(help="UNet batch, guidance counted.")] = 2,
    cache: Annotated[
        Path | None,
        typer.Option("--cache", help="Compile cache to load from and to fill; an empty one, for this run, by default."),
    ] = None,
    regions: Regions = "blocks",
    shapes: Shapes = "symbolic",
    dtype: Dtype = None,
    device: Device = None,
    threads: Annotated[int | None, typer.Option(help="Of torch on the CPU; its own choice by default.")] = None,
    python: Annotated[
        list[str],
        typer.Option(
            "--python",
            help="NAME=PATH: the Python, with an environment of its own, that runs a backend or peer; repeat for more.",
            show_default=False,
        ),
    ] = [],  # noqa: B006
    jobs: Annotated[int, typer.Option(help="Backends that compile at the same time; turns are taken one by one.")] = 1,
    out: Annotated[Path | None, typer.Option(help="File for the report, as JSON.")] = None,
    as_json: AsJson = False,
) -> None:
    """Run every backend that is usable here over the same UNet calls: set up, verify against eager, time in turns."""
    from accel_hidiff.benching.command import bench as run_bench

    options = BenchOptions(
        model=model,
        sizes=tuple(parse_size(text) for text in size),
        steps=steps,
        backends=BenchOptions.parse_backends(backends),
        repeats=repeats,
        batch=batch,
        cache=cache if cache is None else _open_cache(cache, None, []).location,
        regions=regions,
        shapes=shapes,
        dtype=dtype,
        device=device,
        threads=threads,
        pythons=BenchOptions.parse_pythons(python),
        jobs=jobs,
    )
    raise typer.Exit(run_bench(options, out, as_json))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the model, the cache, the images and the plot.")] = Path(
        "demo-out"
    ),
    steps: Steps = 20,
    size: Annotated[
        list[str] | None,
        typer.Option("--size", help="WIDTHxHEIGHT; repeat for more. Default: three of four times the trained area."),
    ] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="A wider model with random weights: times, but no pictures.")
    ] = False,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Precompile a small SDXL model for three sizes, serve them in a new process; write pictures and a plot."""
    from accel_hidiff.demo.run import run_demo

    sizes = [parse_size(text) for text in size] if size else None
    console = Console(stderr=True)
    report = run_demo(out, sizes, check_steps(steps), console, random_weights=random_weights, device=device)
    _print(report.to_json() if as_json else report.table())


def _accelerate(pipe: Any, **options: Any) -> Any:
    from accel_hidiff.pipeline import accelerate

    return accelerate(pipe, hidiffusion=HiDiffusionConfig(), **options)


def _compilable(model: tuple[Any, ...], target: str | None, options: dict[str, Any]) -> Any:
    """A handle that can compile: of the pipeline on its device, or of one without weights for a target."""
    from accel_hidiff.architectures import is_architecture
    from accel_hidiff.models import load_pipeline

    if target is not None or is_architecture(model[0]):
        return _skeleton(model, target, options)
    return _accelerate(load_pipeline(*model), **options)


def _skeleton(model: tuple[Any, ...], target: str | None, options: dict[str, Any]) -> Any:
    """A handle of a pipeline without weights, for the target or the device that is asked for."""
    from accel_hidiff.models import load_skeleton

    if target is not None and model[2] is not None:
        raise BadInput(f"--device: expected none with --target, got {model[2]}; the target says what it is for")
    pipe, meant_for = load_skeleton(*model, elsewhere=target is not None)
    handle = _accelerate(pipe, target=target, **options)
    handle.meant_for = meant_for
    return handle


def _open_cache(
    location: Path, url: str | None, trust: list[str], *, push: bool = False, sign_with: SigningKey | None = None
) -> CompileCache:
    if push and url is None:
        raise BadInput("--push: expected --remote URL with it, got none; say where to send what is stored")
    remote = None if url is None else SecondTier(url, push=push)
    if sign_with is not None and not trust:
        trust = [str(sign_with.public)]  # a signature under what somebody else put there would be worth nothing
    return open_cache(location, new=True, trust=trust, remote=remote, sign_with=sign_with)


def _cfgpp(scale: float | None) -> CFGPlusPlusConfig | None:
    return None if scale is None else CFGPlusPlusConfig(scale)


def _decode(tiles: str, memory: str | None, dtype: str | None) -> DecodeConfig:
    try:
        limit = None if memory is None else commands.parse_bytes(memory)
    except commands.BadInput as problem:
        raise BadInput(f"--decode-memory: {problem}") from problem
    return DecodeConfig(tiles=tiles, max_memory=limit, dtype=dtype)


def _print(value: Any) -> None:
    if isinstance(value, Table):
        Console().print(value)
    else:
        print(json.dumps(value, indent=1))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    bad_input = (AccelHiDiffError, CompileCacheError)
    failed = (BenchFailed, CompileFailed, DemoFailed, PatchConflict, RemoteError)
    return run_app(app, "accel-hidiff", arguments, bad_input=bad_input, failed=failed)


def main() -> None:
    """Console entry point."""
    sys.exit(run())


if __name__ == "__main__":
    main()
