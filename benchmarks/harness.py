"""Shared by all benchmarks: arguments, models and inputs, verification, interleaved timing, JSON records.

Every benchmark goes setup, verify, run: a wrong output raises `WrongOutput` before anything is timed. Contestants are
timed in turns within one process, so that another tenant of the machine disturbs all of them alike; what is compared is
the ratio of their medians. `_cpu_` figures are processor time of all threads, which other tenants disturb much less; on
one thread (`--threads 1`) they are what the wall clock shows on a quiet machine. Figures end in `_ms`, `_us`, `_s` or
`_mb`; ratios in `_ratio`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import accel_hidiff as ah
from accel_hidiff.benching.facts import machine, versions
from accel_hidiff.compiling.child import import_path
from accel_hidiff.demo import build_pipeline, tiny_config
from accel_hidiff.files import whole_file
from accel_hidiff.topology import Topology
from compile_cache.errors import one_line

ROOT = Path(__file__).resolve().parent.parent
NUM_STEPS = 50
GUIDANCE_BATCH = 2  # one image with classifier-free guidance
_MEASURED = ("accel_hidiff", "compile_cache", "benchmarks", ":!benchmarks/results")
# Their values name places on this machine and stay out of the record; of a file, the name is kept.
_PATH_OPTIONS = ("--cache", "--out", "--plot", "--markdown", "--python", "--pictures", "--model")
_FILES = (".json", ".png", ".md")


class WrongOutput(RuntimeError):
    """A contestant's output differs from the reference: its speed means nothing."""


class Size(NamedTuple):
    """An image size in pixels; written WIDTHxHEIGHT."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @classmethod
    def parse(cls, text: str) -> Size:
        """Inverse of `str`."""
        width, height = map(int, text.lower().split("x"))
        return cls(width, height)


DEMO_SIZES = (Size(512, 512), Size(640, 384), Size(384, 640))
TINY_SIZES = (Size(128, 128), Size(160, 96), Size(96, 160))


# Arguments


def arguments(description: str | None, *, repeats: int = 15) -> argparse.ArgumentParser:
    """The options that every benchmark takes."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--tiny", action="store_true", help="a tiny model at small sizes: a smoke run")
    parser.add_argument("--size", type=Size.parse, action="append", metavar="WIDTHxHEIGHT", help="repeatable")
    parser.add_argument("--threads", type=int, help="torch's CPU threads; default: its own choice")
    parser.add_argument("--repeats", type=int, default=repeats, help="timed turns of each contestant")
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options; sets torch's threads."""
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return options


def sizes_of(options: argparse.Namespace) -> tuple[Size, ...]:
    """The sizes to run."""
    return tuple(options.size or (TINY_SIZES if options.tiny else DEMO_SIZES))


def demo_pipeline(tiny: bool, config: Any = None) -> Any:
    """The demo pipeline; two calls share no tensor, and have the same weights bit for bit."""
    pipe = build_pipeline(config=tiny_config() if tiny else config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# Inputs of a UNet call


class UNetInputs(NamedTuple):
    """Arguments of one UNet call."""

    sample: Tensor  # (B, 4, H/8, W/8)
    timestep: Tensor  # ()
    text: Tensor  # (B, 77, D)
    added: dict[str, Tensor]  # text_embeds (B, E), time_ids (B, 6)

    def call(self, unet: Any) -> Tensor:
        """Runs the UNet; (B, 4, H/8, W/8)."""
        out: Tensor = unet(self.sample, self.timestep, self.text, added_cond_kwargs=self.added, return_dict=False)[0]
        return out


def unet_inputs(unet: Any, size: Size, batch: int = GUIDANCE_BATCH, tokens: int = 77) -> UNetInputs:
    """Random inputs from a fixed seed, on the UNet's device and in its dtype."""
    config, options = unet.config, {"device": unet.device, "dtype": unet.dtype}
    generator = torch.Generator().manual_seed(size.width * 10_000 + size.height)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(**options)

    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    width, height = size
    ids = torch.tensor([height, width, 0, 0, height, width]).expand(batch, 6).contiguous().to(**options)
    return UNetInputs(
        sample=randn(batch, config.in_channels, height // 8, width // 8),
        timestep=torch.tensor(500, device=unet.device),
        text=randn(batch, tokens, config.cross_attention_dim),
        added={"text_embeds": randn(batch, pooled), "time_ids": ids},
    )


def topology_steps(patch: ah.Patch, size: Size, num_steps: int = NUM_STEPS) -> dict[Topology, int]:
    """For each topology of a request: its first step."""
    steps: dict[Topology, int] = {}
    for phase in patch.plan(size.height, size.width, num_steps):
        steps.setdefault(phase.topology, phase.start)
    return steps


class TrivialUNet:
    """Stands in for a UNet's own forward, so that what is around it can be run and timed alone.

    Set it as `unet.forward` before `accelerate`: the patch then wraps it, and naming, guarding and binding of graphs
    take place as ever, but nothing is computed.
    """

    def __init__(self) -> None:
        self.inside: Callable[[], Any] | None = None

    def __call__(self, sample: Tensor, timestep: Any, encoder_hidden_states: Any, **kwargs: Any) -> tuple[Tensor]:
        if self.inside is not None:
            self.inside()
        return (sample,)


# Verification


def verify(name: str, got: Tensor, want: Tensor, limit: float = 1e-3) -> float:
    """max|got - want| / max|want|.

    Raises:
        WrongOutput: it is not below `limit`, or not a number.
    """
    error = ((got.double() - want.double()).abs().max() / want.double().abs().max()).item()
    if got.shape != want.shape or not error < limit:
        raise WrongOutput(f"{name}: expected max|diff|/max|ref| < {limit:g}, got {error:.3g}; nothing was timed")
    return error


# Timing


@dataclass(frozen=True)
class Timing:
    """Seconds of each turn of one contestant: on the wall, and of the processor."""

    wall: tuple[float, ...]
    cpu: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median wall time, in seconds."""
        return statistics.median(self.wall)

    @property
    def cpu_median(self) -> float:
        """Median processor time, in seconds."""
        return statistics.median(self.cpu)

    def fields(self, name: str, unit: str = "ms", calls: int = 1) -> dict[str, float]:
        """Median and spread (third minus first quartile) of one call, as record fields."""
        scale = {"s": 1.0, "ms": 1e3, "us": 1e6}[unit] / calls
        low, _, high = statistics.quantiles(self.wall, n=4) if len(self.wall) > 1 else (0.0, 0.0, 0.0)
        return {
            f"{name}_{unit}": rounded(self.median * scale),
            f"{name}_spread_{unit}": rounded((high - low) * scale),
            f"{name}_cpu_{unit}": rounded(self.cpu_median * scale),
        }

    def ratios(self, name: str, other: Timing) -> dict[str, float]:
        """Medians over another's medians, as record fields."""
        return {
            f"{name}_ratio": rounded(self.median / other.median, 3),
            f"{name}_cpu_ratio": rounded(self.cpu_median / other.cpu_median, 3),
        }


def interleave(
    contestants: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 2, limit_s: float = 60.0
) -> dict[str, Timing]:
    """Times each contestant `repeats` times, in turns; every other round runs in reverse order.

    A busy machine ends it earlier: after `limit_s` seconds, but not before five rounds. A `StepCall` runs inside of one
    request all the time: what a request does once, at its entrance, is not a step's.
    """
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    order = list(contestants.items())
    with ExitStack() as stack:
        for run in contestants.values():
            if isinstance(run, StepCall):
                stack.enter_context(run.entered())
        for _ in range(warmup):
            for run in contestants.values():
                run()
        start = time.perf_counter()
        for done in range(repeats):
            if done >= 5 and time.perf_counter() - start > limit_s:
                break
            for name, run in order:
                turns[name].append(timed(run))
            order.reverse()
    return {name: Timing(*zip(*values, strict=True)) for name, values in turns.items()}


class StepCall:
    """One step of a request: a UNet call with the dispatch that belongs to it.

    Called alone it is a request of its own, entrance included; inside of `entered` it is one step of a request.

    Args:
        patch: on the UNet.
        inputs: of the call.
        step, steps: which one of how many.
    """

    def __init__(self, patch: Any, inputs: UNetInputs, step: int, steps: int) -> None:
        self.patch, self.inputs = patch, inputs
        self._step, self._steps = step, steps
        self._inside = False

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Inside of the block, all calls are of one request."""
        with self.patch.phase(step=self._step, num_steps=self._steps):
            self._inside = True
            try:
                yield
            finally:
                self._inside = False

    def __call__(self) -> Tensor:
        if self._inside:
            return self.inputs.call(self.patch.unet)
        with self.entered():
            return self.inputs.call(self.patch.unet)


def entrance(handle: Any, repeats: int) -> Timing:
    """What a request does once before its first call: its begin, and the look at whether the models were changed."""

    def enter() -> None:
        with handle.patch.phase(step=0, num_steps=1):
            handle._enter()

    enter()
    return Timing(*zip(*(timed(enter) for _ in range(repeats)), strict=True))


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Wall and processor seconds of one call, work on a GPU included in the former."""
    synchronize()
    start, cpu = time.perf_counter(), time.process_time()
    run()
    synchronize()
    return time.perf_counter() - start, time.process_time() - cpu


def synchronize() -> None:
    """Waits for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def cpu_seconds() -> float:
    """Processor time of this process and of the compilers that it started."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def rounded(value: float, digits: int = 4) -> float:
    """Four significant digits: more would be noise."""
    return float(f"{value:.{digits}g}")


def rounded_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """The same record with its floats rounded."""
    return {name: rounded(value) if isinstance(value, float) else value for name, value in row.items()}


# Subprocesses


class WorkerFailed(RuntimeError):
    """A process ended without an answer; the message, one line, ends with what it wrote last."""


def worker(
    module: str,
    config: Mapping[str, Any],
    environment: Mapping[str, str] | None = None,
    limit_s: float | None = None,
    python: Path | None = None,
) -> dict[str, Any]:
    """Runs `python -m MODULE --worker JSON` in a process of its own and returns the JSON object that it prints last.

    Args:
        module: its main program answers `worker_config`.
        config: JSON values.
        environment: more variables.
        limit_s: seconds after which it is ended, with all that it started; None: none.
        python: an executable with an environment of its own; None: this one.

    Raises:
        WorkerFailed: it printed no such line.
        subprocess.TimeoutExpired: it took longer than `limit_s`; `output` is what it had printed by then.
    """
    command = [str(python or sys.executable), "-m", module, "--worker", json.dumps(dict(config))]
    full = {**import_path(python), **(environment or {})}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        out, log = Path(folder) / "out", Path(folder) / "log"
        with out.open("wb") as stdout, log.open("wb") as stderr:
            process = subprocess.Popen(
                command, cwd=ROOT, env=full, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, process_group=0
            )
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired as late:
            late.output = out.read_bytes()
            raise
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if (answer := last_answer(out.read_bytes())) is not None:
            return answer
        told = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    last = one_line(told[-1], 400) if told else "it said nothing"
    raise WorkerFailed(f"{module}: its process ended with {code}: {last}")


def last_answer(printed: bytes) -> dict[str, Any] | None:
    """The last line that is a JSON object; what a library printed after it does not count."""
    for line in reversed(printed.decode(errors="replace").splitlines()):
        with suppress(ValueError):
            if isinstance(answer := json.loads(line), dict):
                return answer
    return None


def worker_config() -> dict[str, Any] | None:
    """In a process that `worker` started: its configuration, with its threads set; else None."""
    if sys.argv[1:2] != ["--worker"]:
        return None
    config: dict[str, Any] = json.loads(sys.argv[2])
    if config.get("threads") is not None:
        torch.set_num_threads(config["threads"])
    return config


# Records


class Report:
    """Records of one benchmark run, written to disk after each one.

    Args:
        out: JSON file.
        tiny: a smoke run.
    """

    def __init__(self, out: Path, tiny: bool) -> None:
        self._out = out
        self._content: dict[str, Any] = {
            "command": command_line(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "smoke_run": tiny,
            "commit": git_commit(),
            "source_sha256": source_digest(),
            "machine": machine(),
            "versions": versions(),
            "records": [],
        }
        self._write()

    def add(self, **fields: Any) -> None:
        """Adds a record, prints it and writes the file."""
        self.keep(fields)
        print(json.dumps(fields), flush=True)

    def keep(self, record: Mapping[str, Any]) -> None:
        """Adds a record and writes the file."""
        self._content["records"].append(dict(record))
        self._write()

    def _write(self) -> None:
        self._content["load_average"] = rounded(os.getloadavg()[0], 2)
        write_whole(self._out, json.dumps(self._content, indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that whoever reads it finds all of it, or what was there before."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def command_line() -> str:
    """The command of this process, without names of places on this machine."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    words = ["python", "-m", spec.name.removesuffix(".__main__")] if spec else ["python", Path(sys.argv[0]).name]
    before = ""
    for word in sys.argv[1:]:
        name, equals, value = word.partition("=")
        if before in _PATH_OPTIONS:
            words.append(_shown(before, word))
        elif equals and name in _PATH_OPTIONS:
            words.append(f"{name}={_shown(name, value)}")
        else:
            words.append(_shown(before, word) if Path(word).is_absolute() else word)
        before = word
    return " ".join(words)


def _shown(option: str, value: str) -> str:
    """The value of an option without the place that it names."""
    if option == "--python":
        return f"{value.partition('=')[0]}=PYTHON"
    path = Path(value)
    return path.name if path.suffix in _FILES else "DIR"


def git_commit() -> str | None:
    """The commit, with "+" for a changed tree; None where nothing is committed."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    changed = commit is not None and git("status", "--porcelain", "--", *_MEASURED)
    return f"{commit}+" if changed else commit


def source_digest(folders: Sequence[str] = ("accel_hidiff", "compile_cache")) -> str:
    """SHA-256 over the sources of both packages: tells which code was measured, committed or not."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(ROOT).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def median_of(rows: Sequence[Mapping[str, float]], name: str) -> float:
    """Median of one field over the answers of several processes."""
    return rounded(statistics.median(row[name] for row in rows))
