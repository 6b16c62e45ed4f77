"""Contestants of a bench that are not this project's: names, where they can run, how torch's records are read."""

from __future__ import annotations

import sys
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from accel_hidiff.benching.compilations import Compilations, compilations, watch
from accel_hidiff.benching.found import find
from accel_hidiff.benching.names import BENCHED, PEERS, Contender
from accel_hidiff.benching.options import Case, Options
from accel_hidiff.benching.subjects import Published, Stock, seed_of_shifts
from accel_hidiff.errors import BadInput, CompileFailed
from accel_hidiff.shifts import window_shifts
from tests import models


@pytest.mark.parametrize("name", [*BENCHED, *PEERS, "aot/whole", "inductor/exact/blocks", "torch-compile/exact"])
def test_a_name_is_taken_apart_and_kept(name: str) -> None:
    contender = Contender.parse(name)
    assert contender.name == name and contender.ours == (name.split("/", maxsplit=1)[0] in BENCHED)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "vllm",
        "stock/whole",
        "eager/exact",
        "aot/",
        "aot/whole/blocks",
        "aot/exact/exact",
        "aot/fast",
        "torch-compile/whole",
    ],
)
def test_a_name_that_nobody_knows_is_refused(name: str) -> None:
    with pytest.raises(BadInput, match="--backends: expected names among eager,inductor,aot,onediff,stock"):
        Contender.parse(name)


def test_a_variant_changes_what_the_bench_says() -> None:
    assert Contender.parse("aot/exact") == Contender("aot/exact", "aot", None, "exact")
    assert Contender.parse("aot/symbolic/whole") == Contender("aot/symbolic/whole", "aot", "whole", "symbolic")


def test_a_python_of_its_own_is_looked_for(tmp_path: Path) -> None:
    (tmp_path / "python").write_text("")
    for text in ("aot", f"aot={tmp_path}", f"aot={tmp_path / 'none'}", f"aot={tmp_path / 'python'}"):
        with pytest.raises(BadInput, match="--python: expected NAME=PATH"):
            Options.parse_pythons([text])
    with pytest.raises(BadInput, match="--backends: expected names among"):
        Options.parse_pythons([f"vllm={sys.executable}"])
    pythons = Options.parse_pythons([f"hidiffusion={sys.executable}"])
    options = Options(pythons=pythons)
    assert options.python_of("hidiffusion") == Path(sys.executable) and options.python_of("aot") is None
    assert options.command() == "accel-hidiff bench --python hidiffusion=PYTHON", "no place on this machine is told"


def test_what_is_here_is_found_and_what_is_not_has_a_reason() -> None:
    assert find("stock").usable and find("eager").usable
    for name, package in (("tensorrt", "torch_tensorrt"), ("hidiffusion", "hidiffusion")):
        found = find(name)
        assert package not in sys.modules, "it is imported in another process"
        if not found.usable:
            assert package in found.detail and "\n" not in found.detail


def test_an_environment_without_what_a_worker_needs_has_a_reason(tmp_path: Path) -> None:
    venv.create(tmp_path / "empty", with_pip=False)
    found = find("eager", tmp_path / "empty" / "bin" / "python")
    assert not found.usable and found.detail.startswith("ModuleNotFoundError: No module named")


@pytest.fixture
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    watch()
    yield
    torch.compiler.reset()


def compiled_since(before: Compilations) -> dict[str, Any]:
    made = vars(compilations() - before)
    assert made.pop("seconds") >= 0
    return made


def test_compilations_are_counted_by_torchs_records(fresh: None) -> None:
    def scaled(x: torch.Tensor, factor: int) -> torch.Tensor:
        y = x.sin() * factor
        torch._dynamo.graph_break()
        return y.cos()

    before, run = compilations(), torch.compile(scaled, backend="eager", dynamic=False)
    run(torch.ones(3), 1)
    first = compiled_since(before)
    assert first == {"graphs": 2, "frames": 2, "recompilations": 0, "graph_breaks": 1, "gave_up": 0}
    run(torch.ones(3), 1)
    assert compiled_since(before) == first
    run(torch.ones(3), 2)  # the first half again; the second one fits
    assert compiled_since(before) == {**first, "graphs": 3, "frames": 3, "recompilations": 1, "graph_breaks": 2}


def test_a_function_that_reached_the_limit_is_told(fresh: None) -> None:
    before, run = compilations(), torch.compile(lambda x, n: x * n, backend="eager", dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=2):
        for number in range(5):
            run(torch.ones(2), number)
    made = compiled_since(before)
    assert (made["frames"], made["recompilations"], made["gave_up"]) == (2, 1, 1)


def test_a_peer_that_ran_eager_is_not_taken_for_compiled(fresh: None) -> None:
    subject = Stock(models.build("sdxl", "text2img"))
    subject.require_served(subject.counters() | {"eager_calls": 0})
    with pytest.raises(CompileFailed, match="limit of recompilations"):
        subject.require_served({"eager_calls": 1})


@pytest.mark.parametrize("step", [0, 7])
def test_a_seed_gives_the_authors_package_the_shifts_of_this_project(step: int) -> None:
    shifts = window_shifts(0, step, 5)
    torch.manual_seed(seed_of_shifts(shifts))
    draws = [torch.rand(1).item() for _ in shifts]
    assert tuple(0 if r <= 0.25 else 1 if r <= 0.5 else 2 if r <= 0.75 else 3 for r in draws) == shifts


def test_the_authors_package_is_stood_at_a_step_before_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package: it counts steps on modules and draws from the global generator, as that one does."""
    seen: list[tuple[int, int, float]] = []

    def apply_published(pipe: Any) -> None:
        assert pipe.name_or_path == "stabilityai/stable-diffusion-xl-base-1.0"
        block = pipe.unet.down_blocks[1]

        class Counting(type(block)):  # type: ignore[misc]
            timestep, max_timestep = 0, 50

            def forward(self, *args: Any, **kwargs: Any) -> Any:
                seen.append((self.timestep, pipe._num_timesteps, torch.rand(1).item()))
                self.timestep += 1
                return super().forward(*args, **kwargs)

        block.__class__ = Counting

    stand_in = type(sys)("hidiffusion")
    stand_in.apply_hidiffusion = apply_published  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "hidiffusion", stand_in)
    subject = Published(models.build("sdxl", "text2img"), None)
    from accel_hidiff.benching.inputs import unet_inputs

    inputs = unet_inputs(subject.pipe.unet, 64, 64, 1)
    with torch.no_grad(), subject.standing(Case(64, 64, "windowed", 12, 30), 30) as call:
        call(inputs)
        call(inputs)
    assert [(step, steps) for step, steps, _ in seen] == [(12, 30)] * 2 and seen[0] == seen[1]
