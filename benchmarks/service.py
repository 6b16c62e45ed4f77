"""The HTTP service: how long until it is ready, and how much it serves with eight clients against one.

Readiness: processes of their own over a filled cache, from the start of the process to the first 200 of /healthz. It is
taken apart by what the service tells: importing torch and diffusers, building the model and reading its weights,
loading and binding all graphs; the rest is the interpreter, the web framework, and threads that wait for one another.
A process that imports a diffusers pipeline and nothing else runs in turns with them, for comparison.

Throughput: the same requests from one client, one after the other, and from eight clients at once, in turns, against
one service. A pipeline serves one request at a time, so what concurrency can win is what lies between two requests:
reading and writing HTTP, and encoding PNGs. `_cpu_` is processor time of the service.

`--cache` keeps a compile cache between runs.
"""

from __future__ import annotations

import base64
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import torch
from PIL import Image

import accel_hidiff as ah
from accel_hidiff.demo import save_model, tiny_config
from benchmarks import harness as h
from compile_cache import CompileCache

STARTS = 3  # processes of each kind; medians are reported
CLIENTS = 8
PROMPT, SEED = "a red circle", 7


def main() -> None:
    if (config := h.worker_config()) is not None:
        print(json.dumps(compile_worker(config)))
        return
    parser = h.arguments(__doc__, repeats=3)
    parser.add_argument("--cache", type=Path, help="a compile cache that is kept")
    parser.add_argument("--steps", type=int, default=4, help="denoising steps of a request")
    parser.add_argument("--requests", type=int, default=16, help="requests of a turn")
    options = h.parsed(parser)
    sizes = h.sizes_of(options)
    report = h.Report(options.out, options.tiny)
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        model = save_model(place / "model", config=tiny_config() if options.tiny else None)
        cache = (options.cache or place / "cache").resolve()
        common = {"tiny": options.tiny, "threads": options.threads, "sizes": sizes, "cache": str(cache)}
        h.worker("benchmarks.service", {**common, "steps": options.steps})
        file = deploy_file(place, cache, model, sizes, options.steps)
        threads = {} if options.threads is None else {"OMP_NUM_THREADS": str(options.threads)}
        report.add(**readiness(file, threads))
        with service(file, threads) as (url, told):
            error = verify(url, options.tiny, sizes, options.steps)
            report.add(**throughput(url, told["pid"], sizes, options), largest_pixel_difference=error)


def compile_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Fills the cache."""
    handle = ah.accelerate(
        h.demo_pipeline(config["tiny"]), hidiffusion=ah.HiDiffusionConfig(), cache=CompileCache(config["cache"])
    )
    done = handle.precompile([(height, width) for width, height in config["sizes"]], config["steps"])
    return {"artifacts": done.artifacts}


def deploy_file(place: Path, cache: Path, model: Path, sizes: Sequence[h.Size], steps: int) -> Path:
    """The service that is measured: strict, so that nothing runs eager unseen."""
    file = place / "deploy.toml"
    lines = [
        *("[cache]", f"location = {json.dumps(str(cache))}"),
        *("[service]", "port = 0", f"queue = {4 * CLIENTS}"),
        *("[[models]]", 'name = "demo"', f"model = {json.dumps(str(model))}", 'dtype = "float32"', 'device = "cpu"'),
        *(f"sizes = {json.dumps([str(size) for size in sizes])}", f"steps = [{steps}]", 'on_miss = "error"'),
    ]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


@contextmanager
def service(file: Path, threads: dict[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A ready service: its URL, and the seconds of its start."""
    command = [sys.executable, "-m", "accel_hidiff.cli", "serve", str(file), "--json"]
    began = time.perf_counter()
    environment = {**os.environ, **threads}
    process = subprocess.Popen(
        command, cwd=h.ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        url = json.loads(process.stdout.readline())["serving"]
        listening = time.perf_counter() - began
        while (answer := httpx.get(f"{url}/healthz", timeout=60)).status_code != 200:
            if process.poll() is not None:
                raise RuntimeError(f"the service ended with {process.returncode}")
            time.sleep(0.05)  # more often would slow down what is measured
        ready = time.perf_counter() - began
        told = answer.json()["models"]["demo"]
        yield url, {"pid": process.pid, "listening_s": listening, "ready_s": ready, "cpu_s": cpu_s(process.pid), **told}
    finally:
        process.terminate()
        _, errors = process.communicate(timeout=60)
    if process.returncode:
        raise RuntimeError(f"the service ended with {process.returncode}: ...{errors[-2000:]}")


def cpu_s(pid: int) -> float:
    """Processor seconds of a process by now."""
    used = psutil.Process(pid).cpu_times()
    return float(used.user + used.system)


def readiness(file: Path, threads: dict[str, str]) -> dict[str, Any]:
    """Medians over processes."""
    rows, bare = [], []
    for _ in range(STARTS):
        began = time.perf_counter()
        code = "from diffusers import StableDiffusionXLPipeline"
        subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, **threads}, capture_output=True)
        bare.append({"bare_imports_s": time.perf_counter() - began})
        with service(file, threads) as (_, told):
            parts = told["seconds"]
            row = {name: told[name] for name in ("listening_s", "ready_s")}
            row["ready_cpu_s"] = told["cpu_s"]
            row |= {f"{part}_s": seconds for part, seconds in parts.items()}
            row["rest_s"] = told["ready_s"] - sum(parts.values())
            row["ready_without_weights_s"] = told["ready_s"] - parts["model"]
            row["ready_without_weights_and_imports_s"] = told["ready_s"] - parts["model"] - parts["imports"]
            rows.append(row)
    fields = {name: h.median_of(rows, name) for name in rows[0]}
    fields["bare_imports_s"] = h.median_of(bare, "bare_imports_s")
    return {"scenario": "readiness", "graphs": told["graphs"], **fields}


def verify(url: str, tiny: bool, sizes: Sequence[h.Size], steps: int) -> int:
    """The largest difference of a pixel (0..255) from the eager pipeline.

    Raises:
        h.WrongOutput: it is more than rounding.
    """
    pipe = h.demo_pipeline(tiny)
    ah.apply_hidiffusion(pipe)
    worst = 0
    for size in sizes:
        generator = torch.Generator().manual_seed(SEED)
        options = {"width": size.width, "height": size.height, "num_inference_steps": steps, "generator": generator}
        want = np.asarray(pipe(PROMPT, **options).images[0]).astype(int)
        (image,) = ask(url, size, steps)["data"]
        got = np.asarray(Image.open(io.BytesIO(base64.b64decode(image["b64_json"])))).astype(int)
        worst = max(worst, int(np.abs(got - want).max()))
    if worst > 2:
        raise h.WrongOutput(f"expected images within 2 of 255, got a difference of {worst}; nothing was timed")
    return worst


def ask(url: str, size: h.Size, steps: int, client: httpx.Client | None = None) -> dict[str, Any]:
    """One image."""
    body = {"prompt": PROMPT, "seed": SEED, "size": str(size), "steps": steps}
    post = httpx.post if client is None else client.post
    answer = post(f"{url}/v1/images/generations", json=body, timeout=600)
    if answer.status_code != 200:
        raise h.WrongOutput(f"expected an image, got {answer.status_code}: {answer.text[:300]}")
    told: dict[str, Any] = answer.json()
    if told["served"]["eager"]:
        raise h.WrongOutput(f"expected compiled calls only, got {told['served']}")
    return told


def throughput(url: str, pid: int, sizes: Sequence[h.Size], options: Any) -> dict[str, Any]:
    """The same requests from one client and from eight."""
    asked = [sizes[number % len(sizes)] for number in range(options.requests)]
    clients = [httpx.Client() for _ in range(CLIENTS)]
    latencies: dict[int, list[float]] = {1: [], CLIENTS: []}
    drawn: dict[int, list[float]] = {1: [], CLIENTS: []}
    used: dict[int, list[float]] = {1: [], CLIENTS: []}

    def run(number: int) -> None:
        def share(client: int) -> None:
            for size in asked[client::number]:
                began = time.perf_counter()
                told = ask(url, size, options.steps, clients[client])
                latencies[number].append(time.perf_counter() - began)
                drawn[number].append(told["timing"]["drawn_s"])

        before = cpu_s(pid)
        with ThreadPoolExecutor(number) as threads:
            list(threads.map(share, range(number)))
        used[number].append((cpu_s(pid) - before) / options.requests)

    turns = h.interleave({"one": lambda: run(1), "eight": lambda: run(CLIENTS)}, options.repeats, warmup=1, limit_s=600)
    for client in clients:
        client.close()
    one, eight = turns["one"].median, turns["eight"].median
    return {
        "scenario": "throughput",
        "requests": options.requests,
        "steps": options.steps,
        "one_client_images_per_s": h.rounded(options.requests / one),
        "eight_clients_images_per_s": h.rounded(options.requests / eight),
        "throughput_ratio": h.rounded(one / eight, 3),
        "one_client_cpu_s_per_image": h.rounded(statistics.median(used[1])),
        "eight_clients_cpu_s_per_image": h.rounded(statistics.median(used[CLIENTS])),
        "one_client_latency_s": h.rounded(statistics.median(latencies[1])),
        "eight_clients_latency_s": h.rounded(statistics.median(latencies[CLIENTS])),
        "one_client_over_drawing_ms": h.rounded(
            1e3 * statistics.median(a - b for a, b in zip(latencies[1], drawn[1], strict=True))
        ),
    }


if __name__ == "__main__":
    main()
