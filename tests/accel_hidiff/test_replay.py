"""Whole UNet calls, captured at load and replayed: right numbers, for as long as they are right."""

from __future__ import annotations

import dataclasses
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import accel_hidiff as ah
from accel_hidiff import dispatch, pipeline
from accel_hidiff.call import UNetCall
from accel_hidiff.replay import StepInputs, capturer
from accel_hidiff.replay.inputs import StaticInputs, zero_inputs
from accel_hidiff.replay.judge import is_worth_it
from accel_hidiff.replay.replays import Recording
from accel_hidiff.serving import service
from accel_hidiff.stats import Stats
from accel_hidiff.topology import Topology
from tests import models
from tests.conftest import STEPS
from tests.replaying import PIECE, StandInBackend, Tape, storage_of

SIZES = [(128, 128), (128, 192)]
BATCHES = (2,)
KINDS = {"sdxl": 3, "sd15": 2}  # topologies of these sizes


@pytest.fixture(autouse=True)
def tapes(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """Every capturer that is made from now on; the CPU can capture."""
    made: list[Tape] = []

    def make(device: torch.device) -> Tape:
        made.append(Tape(device))
        return made[-1]

    monkeypatch.setattr(capturer, "capturer_for", make)
    return made


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> StandInBackend:
    backend = StandInBackend()
    monkeypatch.setattr(pipeline, "create_backend", lambda *args, **kwargs: backend)
    return backend


Make = Callable[..., Any]


@pytest.fixture
def make(backend: StandInBackend, tmp_path: Path) -> Iterator[Make]:
    """Accelerated pipelines over stand-ins for packages."""
    handles = []

    def accelerate(family: str = "sdxl", task: str = "text2img", pipe: Any = None, **options: Any) -> Any:
        pipe = models.build(family, task) if pipe is None else pipe
        options = {"on_miss": "error", "cuda_graphs": "on", **options}
        handles.append(ah.accelerate(pipe, hidiffusion=ah.HiDiffusionConfig(), cache=tmp_path / "cache", **options))
        return handles[-1]

    yield accelerate
    for handle in handles:
        if vars(handle.pipe).get("_accel_hidiff_handle") is handle:
            handle.remove()


def only(tapes: list[Tape]) -> Tape:
    """The capturer that something was captured with."""
    (tape,) = [tape for tape in tapes if tape.captured]
    return tape


def load(handle: Any, sizes: Any = ((128, 192),), **options: Any) -> Any:
    return handle.load(sizes, STEPS, **{"batch_sizes": BATCHES, **options})


def latents(pipe: Any, family: str = "sdxl", task: str = "text2img", size: Any = (128, 192), **changes: Any) -> Tensor:
    given = {"num_inference_steps": STEPS, "output_type": "latent", **changes}
    out: Tensor = pipe(**models.arguments(family, task, *size, **given)).images
    return out


def unet_call(handle: Any, step: int = 2, size: Any = (16, 24), shifts: Any = None, batch: int = 2) -> Tensor:
    """One call of the UNet by hand, over random inputs."""
    (sample, _, text), kwargs = zero_inputs(handle.pipe.unet, batch, *size, 77)
    draw = torch.Generator().manual_seed(3)
    for tensor in (sample, text, *kwargs.get("added_cond_kwargs", {}).values()):
        tensor.normal_(generator=draw)
    with torch.no_grad(), handle.patch.phase(step, STEPS, shifts):
        out: Tensor = handle.pipe.unet(sample, 300 + step, text, **kwargs)[0]
    return out


class TestNumbers:
    @pytest.mark.parametrize("regions", ["blocks", "whole"])
    @pytest.mark.parametrize("family", ["sdxl", "sd15"])
    def test_requests_are_what_they_are_without_graphs_at_every_size_and_topology(
        self, make: Make, backend: StandInBackend, family: str, regions: str
    ) -> None:
        handle = make(family, regions=regions)
        want = [latents(handle.pipe, family, size=size) for size in SIZES]
        assert handle.stats.captures == handle.stats.replays == 0
        report = load(handle, SIZES)
        assert (report.captured, report.not_captured) == (KINDS[family] * 2, ())
        calls, requests = dict(backend.calls), len(SIZES) * (STEPS + (family == "sd15"))  # PNDM calls once more
        with handle.stats.expect(replays=requests, hits=requests, eager_calls=0, captures=0):
            got = [latents(handle.pipe, family, size=size) for size in SIZES]
        assert backend.calls == calls, "a replay runs no Python of the model"
        assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))

    @pytest.mark.parametrize("step", [0, 1, 2])
    def test_shifts_that_change_take_effect(self, make: Make, step: int) -> None:
        handle = make()
        blocks = len(handle.patch.windowed_blocks)
        different = [[(number + block) % 4 for block in range(blocks)] for number in range(4)]
        want = [unet_call(handle, step, shifts=shifts) for shifts in different]
        load(handle)
        with handle.stats.expect(replays=4):
            got = [unet_call(handle, step, shifts=shifts) for shifts in different]
        assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
        assert not torch.equal(got[0], got[1])

    def test_each_call_has_an_output_of_its_own(self, make: Make) -> None:
        handle = make()
        load(handle)
        first = unet_call(handle, 2)
        kept = first.clone()
        second = unet_call(handle, 3)
        assert handle.stats.replays == 2
        assert torch.equal(first, kept) and not torch.equal(first, second)
        assert storage_of(first) != storage_of(second)
        held = {storage_of(one) for r in handle._dispatcher.replays.held().values() for one in r.held()}
        assert not held & {storage_of(first), storage_of(second)}

    @pytest.mark.parametrize("kind", ["number", "float64", "int64", "float32"])
    def test_every_kind_of_timestep_is_copied(self, make: Make, kind: str) -> None:
        handle = make()
        (sample, _, text), kwargs = zero_inputs(handle.pipe.unet, 2, 16, 24, 77)

        def outputs() -> list[Tensor]:
            found = []
            for time in (7, 901):
                given = time if kind == "number" else torch.tensor(time, dtype=getattr(torch, kind))
                with torch.no_grad(), handle.patch.phase(2, STEPS):
                    found.append(handle.pipe.unet(sample, given, text, **kwargs)[0])
            return found

        want = outputs()
        load(handle)
        with handle.stats.expect(replays=2):
            got = outputs()
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]) and not torch.equal(got[0], got[1])

    def test_a_call_returns_what_it_is_asked_for(self, make: Make) -> None:
        handle = make()
        load(handle)
        inputs, kwargs = zero_inputs(handle.pipe.unet, 2, 16, 24, 77)
        with torch.no_grad(), handle.patch.phase(2, STEPS):
            as_tuple = handle.pipe.unet(*inputs, **kwargs)
            kwargs.pop("return_dict")
            with torch.inference_mode():
                named = handle.pipe.unet(*inputs, **kwargs)
        assert handle.stats.replays == 2
        assert isinstance(as_tuple, tuple) and torch.equal(named.sample, as_tuple[0])


class TestWhatIsNotReplayed:
    def test_another_size_batch_or_text_length(self, make: Make) -> None:
        handle = make()
        load(handle, [(128, 128)])
        with handle.stats.expect(replays=0, hits=3):
            unet_call(handle, size=(16, 24))
            unet_call(handle, size=(16, 16), batch=1)
            (sample, time, _), kwargs = zero_inputs(handle.pipe.unet, 2, 16, 16, 77)
            with torch.no_grad(), handle.patch.phase(2, STEPS):
                handle.pipe.unet(sample, time, torch.zeros(2, 154, 32), **kwargs)
        with handle.stats.expect(replays=1):
            unet_call(handle, size=(16, 16))

    @pytest.mark.parametrize(
        ("changed", "why"),
        [
            ({"time_ids": torch.zeros(2, 6, dtype=torch.float64)}, "another dtype"),
            ({"time_ids": torch.zeros(1, 6)}, "another shape, which a copy would spread"),
            ({"text_embeds": None}, "one is missing"),
            ({"more": torch.zeros(2)}, "one that a graph does not know"),
        ],
    )
    def test_added_conditions_that_do_not_fit(self, make: Make, changed: dict[str, Any], why: str) -> None:
        unet = make().pipe.unet
        (sample, time, text), kwargs = zero_inputs(unet, 2, 16, 16, 77)
        added, call = kwargs["added_cond_kwargs"], UNetCall(Topology())
        static = StaticInputs(StepInputs(call, sample, time, text, added))
        assert static.takes(StepInputs(call, sample, time, text, added))
        assert not static.takes(StepInputs(call, sample, time, text, {**added, **changed})), why

    @pytest.mark.parametrize("timestep", [torch.zeros(1), torch.zeros(2), "500", None])
    def test_timesteps_that_are_no_number(self, timestep: Any) -> None:
        sample, text, call = torch.zeros(2, 4, 8, 8), torch.zeros(2, 7, 8), UNetCall(Topology())
        static = StaticInputs(StepInputs(call, sample, 1, text))
        assert static.takes(StepInputs(call, sample, 2.5, text))
        assert not static.takes(StepInputs(call, sample, timestep, text))

    def test_calls_with_residuals_of_a_controlnet(self, make: Make) -> None:
        handle = make("sdxl", "controlnet")
        want = latents(handle.pipe, task="controlnet")
        load(handle)
        with handle.stats.expect(replays=STEPS - 5, eager_calls=0):  # steps before 0.6 N have residuals
            got = latents(handle.pipe, task="controlnet")
        assert torch.equal(got, want)

    def test_calls_with_attention_arguments_are_refused_as_ever(self, make: Make) -> None:
        handle = make(on_miss="eager")
        load(handle)
        with handle.stats.expect(replays=0, eager_calls=STEPS):
            latents(handle.pipe, cross_attention_kwargs={"scale": 0.5})

    def test_nothing_is_captured_in_a_request(self, make: Make, tapes: list[Tape]) -> None:
        handle = make()
        latents(handle.pipe)
        load(handle, [(128, 128)])
        captured = sum(tape.captured for tape in tapes)
        with handle.stats.expect(captures=0, replays=0):
            latents(handle.pipe)
        assert sum(tape.captured for tape in tapes) == captured == KINDS["sdxl"]

    def test_off_captures_nothing(self, make: Make, tapes: list[Tape]) -> None:
        handle = make(cuda_graphs="off")
        assert load(handle).captured == 0 and not tapes and handle._dispatcher.replays is None
        latents(handle.pipe)

    def test_the_eager_backend_has_nothing_to_capture(self, tapes: list[Tape]) -> None:
        handle = ah.accelerate(models.build("sdxl", "text2img"), backend="eager", cuda_graphs="auto")
        report = load(handle)
        assert (report.captured, report.not_captured) == (0, ()) and not any(tape.captured for tape in tapes)
        handle.remove()


class TestWhatDropsThem:
    """`change` is made after a load; the next request is right, and runs without graphs until the next load."""

    @staticmethod
    def check(handle: Any, tape: Tape, fresh: Tensor) -> None:
        assert tape.alive and torch.equal(latents(handle.pipe), fresh)
        assert handle.stats.replays == 0 and tape.alive == [] and handle.stats.graph_bytes == 0
        load(handle)
        with handle.stats.expect(replays=STEPS):
            assert torch.equal(latents(handle.pipe), fresh)

    def test_parameters_with_other_data(self, make: Make, tapes: list[Tape]) -> None:
        handle = make()
        load(handle)
        other = models.build("sdxl", "text2img", seed=1).unet
        for mine, its in zip(handle.pipe.unet.parameters(), other.parameters(), strict=True):
            mine.data = its.data
        self.check(handle, only(tapes), latents(make(pipe=_with(models.build("sdxl", "text2img"), unet=other)).pipe))

    def test_a_module_that_was_moved(self, make: Make, tapes: list[Tape]) -> None:
        handle = make()
        fresh = latents(handle.pipe)
        load(handle)
        handle.pipe.unet.to(torch.float64).to(torch.float32)
        self.check(handle, only(tapes), fresh)

    def test_a_unet_that_was_exchanged(self, make: Make, tapes: list[Tape]) -> None:
        handle = make()
        load(handle)
        other, pipe = (models.build("sdxl", "text2img", seed=seed) for seed in (1, 0))
        fresh = latents(make(pipe=_with(pipe, unet=models.build("sdxl", "text2img", seed=1).unet)).pipe)
        handle.pipe.unet = other.unet
        self.check(handle, only(tapes), fresh)

    def test_another_structure(self, make: Make, tapes: list[Tape]) -> None:
        class Scaled(nn.Module):  # as a LoRA layer that is not fused
            def __init__(self, base: nn.Module) -> None:
                super().__init__()
                self.base = base
                self.in_features: Any = base.in_features
                self.scale = 2.0

            def forward(self, hidden: Tensor) -> Tensor:
                out: Tensor = self.base(hidden) * self.scale
                return out

        handle = make()
        plain = latents(handle.pipe)
        load(handle)
        attention = handle.pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
        attention.to_q = layer = Scaled(attention.to_q)
        changed = latents(handle.pipe)
        assert handle.stats.replays == 0 and not torch.equal(changed, plain) and only(tapes).alive == []
        load(handle)
        with handle.stats.expect(replays=STEPS):
            assert torch.equal(latents(handle.pipe), changed)
        layer.scale = 1.0
        with handle.stats.expect(replays=0):
            assert torch.equal(latents(handle.pipe), plain)

    def test_weights_that_change_in_place_stay(self, make: Make) -> None:
        handle = make()
        load(handle)
        plain = latents(handle.pipe)
        weight = handle.pipe.unet.conv_in.weight
        with torch.no_grad():
            weight.mul_(1.5)
        with handle.stats.expect(replays=STEPS):
            changed = latents(handle.pipe)
        handle._dispatcher.replays.run = lambda *args: None
        assert not torch.equal(changed, plain) and torch.equal(changed, latents(handle.pipe))

    def test_an_artifact_that_fails(self, make: Make, backend: StandInBackend, tapes: list[Tape]) -> None:
        handle = make(on_miss="eager")
        load(handle)
        assert len(only(tapes).alive) == KINDS["sdxl"]

        def fail(path: str) -> None:
            raise RuntimeError("no such kernel")

        backend.fail = fail
        unet_call(handle, size=(16, 16), batch=1)  # has no graph
        backend.fail = lambda path: None
        assert only(tapes).alive == [] and handle.stats.graph_bytes == 0 and not handle._dispatcher.replays.held()
        handle.verify()
        load(handle)
        assert len(only(tapes).alive) == KINDS["sdxl"]

    def test_a_check_that_finds_nothing_wrong_keeps_them(self, make: Make) -> None:
        handle = make()
        load(handle)
        assert handle.verify() == {}
        with handle.stats.expect(replays=STEPS):
            latents(handle.pipe)

    def test_a_table_that_is_full(self, make: Make, tapes: list[Tape], monkeypatch: pytest.MonkeyPatch) -> None:
        handle = make(on_miss="compile")
        load(handle, [(128, 128)])
        monkeypatch.setattr(dispatch, "_MAX_NAMES", 4)
        for size in ((16, 24), (16, 32)):
            unet_call(handle, size=size)
        held = handle._dispatcher.replays.held()
        assert 0 < len(held) < KINDS["sdxl"] and len(only(tapes).alive) == len(held)
        assert handle.stats.graph_bytes == PIECE * len(held)
        assert all(handle._dispatcher.serves(name) is one.graph for name, one in held.items())

    @pytest.mark.parametrize("how", ["remove", "close"])
    def test_the_end_gives_everything_back(self, make: Make, tapes: list[Tape], how: str) -> None:
        handle = make()
        report = load(handle)
        tape = only(tapes)
        assert report.graph_bytes == handle.stats.graph_bytes == PIECE * len(tape.alive) == PIECE * report.captured
        kept = [weakref.ref(one) for r in handle._dispatcher.replays.held().values() for one in r._static.held()]
        handle.remove() if how == "remove" else handle._dispatcher.close()
        assert tape.alive == [] and tape.given_back and handle.stats.graph_bytes == 0
        gc.collect()
        assert kept and not any(ref() for ref in kept)

    def test_a_graph_keeps_alive_whatever_it_has_the_address_of(self, make: Make, tapes: list[Tape]) -> None:
        for family in ("sdxl", "sd15"):
            handle = make(family)
            load(handle)
            recordings = handle._dispatcher.replays.held().values()
            assert len(recordings) == KINDS[family]
            for recording in recordings:
                held = {storage_of(tensor) for tensor in recording.held()}
                assert recording._captured.foreign.keys() <= held


def _with(pipe: Any, **parts: Any) -> Any:
    for name, part in parts.items():
        setattr(pipe, name, part)
    return pipe


class TestFailures:
    @staticmethod
    def failing(error: Exception, times: int = 1) -> Callable[[str], None]:
        left = [error] * times

        def fail(what: str) -> None:
            if left:
                raise left.pop()

        return fail

    def test_a_replay_that_raises_drops_its_graph_and_the_call_runs_without(
        self, make: Make, tapes: list[Tape], caplog: pytest.LogCaptureFixture
    ) -> None:
        handle = make()
        want = latents(handle.pipe)
        load(handle)
        tape = only(tapes)
        with handle.stats.expect(replays=2, hits=STEPS, eager_calls=0):  # of the windowed kind's five steps none
            tape_before = len(tape.alive)
            tape.fail = _at_replay(3, RuntimeError("no such graph\nand more"), tape)
            assert torch.equal(latents(handle.pipe), want)
        assert len(tape.alive) == tape_before - 1 and handle.stats.graph_bytes == PIECE * len(tape.alive)
        assert "RuntimeError: no such graph; such calls run without" in caplog.text and tape.given_back
        with handle.stats.expect(replays=2):
            latents(handle.pipe)

    def test_without_memory_all_graphs_make_room(self, make: Make, tapes: list[Tape]) -> None:
        handle = make()
        want = latents(handle.pipe)
        load(handle)
        tape = only(tapes)
        tape.fail = self.failing(torch.OutOfMemoryError("CUDA out of memory"))
        with handle.stats.expect(replays=0, hits=STEPS):
            assert torch.equal(latents(handle.pipe), want)
        assert tape.alive == [] and handle.stats.graph_bytes == 0

    def test_a_lost_device_is_told(self, make: Make, tapes: list[Tape]) -> None:
        handle = make()
        load(handle)
        tape = only(tapes)
        tape.fail = self.failing(RuntimeError("CUDA error: an illegal memory access was encountered"))
        with pytest.raises(ah.DeviceLost, match="a UNet call in a CUDA graph: expected cpu to answer"):
            latents(handle.pipe)
        assert tape.alive == [] and handle.stats.graph_bytes == 0

    def test_what_comes_from_outside_goes_through_and_leaves_the_graph(self, make: Make, tapes: list[Tape]) -> None:
        class Timeout(Exception):
            pass

        handle = make()
        load(handle)
        tape = only(tapes)
        tape.fail = self.failing(Timeout())
        with pytest.raises(Timeout):
            latents(handle.pipe)
        with handle.stats.expect(replays=STEPS):
            latents(handle.pipe)

    def test_a_capture_that_fails_is_told_and_the_calls_run_without(self, make: Make, monkeypatch: Any) -> None:
        def broken(device: torch.device) -> Tape:
            tape = Tape(device)
            tape.fail = self.failing(RuntimeError("operation not permitted when stream is capturing"))
            return tape

        monkeypatch.setattr(capturer, "capturer_for", broken)
        handle = make()
        want = latents(handle.pipe)
        report = load(handle)
        (told,) = report.not_captured
        assert told.endswith("2x4x16x24: RuntimeError: operation not permitted when stream is capturing")
        assert report.captured == KINDS["sdxl"] - 1 and ", 1 in none" in str(report)
        assert torch.equal(latents(handle.pipe), want) and not handle.stats.rejected

    def test_a_call_that_reads_a_number_of_the_device_cannot_be_captured(
        self, make: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        handle = make()
        own = handle.pipe.unet.time_proj.forward
        monkeypatch.setattr(handle.pipe.unet.time_proj, "forward", lambda t: own(t * t.max().item()))
        report = load(handle)
        assert report.captured == 0 and len(report.not_captured) == KINDS["sdxl"]
        assert "it reads a number of the device's" in report.not_captured[0]

    def test_an_artifact_that_fails_while_it_is_captured_is_out_of_service(
        self, make: Make, backend: StandInBackend
    ) -> None:
        handle = make(on_miss="eager")
        left = [RuntimeError("no such kernel")]

        def fail(path: str) -> None:
            if left and path.startswith("unet.mid_block"):
                raise left.pop()

        backend.fail = fail
        report = load(handle)
        assert (report.captured, report.graph_bytes, handle._dispatcher.replays.held()) == (0, 0, {})
        (told,) = report.not_captured  # the other kinds run eager from here on, too
        assert told.endswith("what it was captured of is not used any more")
        with handle.stats.expect(hits=0, eager_calls=STEPS, replays=0):
            latents(handle.pipe)

    def test_a_call_that_would_be_refused_is_told(self, make: Make) -> None:
        handle = make()
        with torch.autocast("cpu", torch.bfloat16):
            report = load(handle)
        assert report.captured == 0 and len(report.not_captured) == KINDS["sdxl"]
        assert "autocast is on" in report.not_captured[0]


def _at_replay(number: int, error: Exception, tape: Tape) -> Callable[[str], None]:
    last = tape.replayed + number

    def fail(what: str) -> None:
        if tape.replayed == last:
            raise error

    return fail


class TestAuto:
    @pytest.mark.parametrize(
        ("plain", "replayed", "worth"), [(1.0, 0.95, True), (1.0, 0.951, False), (1.0, 2.0, False), (0.0, 0.0, True)]
    )
    def test_five_percent_decide(self, plain: float, replayed: float, worth: bool) -> None:
        assert is_worth_it([plain, 9.0, plain], [replayed, replayed, 99.0]) is worth

    @pytest.mark.parametrize(("replay_s", "kept"), [(0.094, True), (0.096, False)])
    def test_only_what_gains_is_kept(
        self,
        make: Make,
        backend: StandInBackend,
        monkeypatch: pytest.MonkeyPatch,
        replay_s: float,
        kept: bool,
    ) -> None:
        tape = Tape()
        tape.replay_s = replay_s

        def tick(path: str) -> None:  # a call takes 0.1 s by this clock
            tape.now += 0.1 * (path == "unet.mid_block.resnets.0")

        backend.fail = tick
        monkeypatch.setattr(capturer, "capturer_for", lambda device: tape)
        handle = make(cuda_graphs="auto")
        handle._dispatcher.replays.clock = lambda: tape.now
        report = load(handle, [(128, 128)])
        kinds = KINDS["sdxl"]
        assert (report.captured, handle.stats.captures, len(tape.alive)) == ((kinds,) * 3 if kept else (0, 0, 0))
        assert handle.stats.replays == handle.stats.hits == 0
        if kept:
            assert report.not_captured == () and f"{kinds} kinds of UNet calls in CUDA graphs of 3 MiB" in str(report)
            return
        assert report.not_captured[0].endswith("2x4x16x16: it saves 4.0% of the time") and report.graph_bytes == 0
        captured = tape.captured
        load(handle, [(128, 128)])
        assert tape.captured == captured, "what was measured once is not measured again"
        with handle.stats.expect(replays=0):
            latents(handle.pipe, size=(128, 128))

    def test_what_is_captured_already_is_not_captured_again(self, make: Make, tapes: list[Tape]) -> None:
        handle = make()
        load(handle, [(128, 128)])
        assert load(handle, SIZES).captured == KINDS["sdxl"] * 2
        assert sum(tape.captured for tape in tapes) == handle.stats.captures == KINDS["sdxl"] * 2


class TestOnTheCPU:
    @pytest.fixture(autouse=True)
    def no_tapes(self, monkeypatch: pytest.MonkeyPatch, tapes: Any) -> None:
        monkeypatch.setattr(capturer, "capturer_for", lambda device: None)

    def test_on_is_refused(self, make: Make) -> None:
        with pytest.raises(ah.BadInput) as caught:
            make(cuda_graphs="on")
        assert str(caught.value) == (
            'cuda_graphs: expected "auto" or "off" for a pipeline on cpu, got "on"; move the pipeline to a CUDA device '
            "first"
        )

    def test_a_pipeline_that_left_its_device_is_refused_at_load(
        self, make: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as there:
            there.setattr(capturer, "capturer_for", Tape)
            handle = make(cuda_graphs="on")
        with pytest.raises(ah.BadInput, match=r"cuda_graphs: expected .* on cpu"):
            load(handle)

    def test_auto_does_nothing(self, make: Make) -> None:
        handle = make(cuda_graphs="auto")
        report = load(handle)
        assert (report.captured, report.graph_bytes, report.not_captured) == (0, 0, ())
        assert "CUDA" not in str(report)
        with handle.stats.expect(replays=0):
            latents(handle.pipe)

    @pytest.mark.parametrize("mode", ["yes", True, None])
    def test_other_words_are_refused(self, make: Make, mode: Any) -> None:
        with pytest.raises(ah.BadInput, match="cuda_graphs: expected"):
            make(cuda_graphs=mode)


class TestTogether:
    def test_two_pipelines_on_one_device_have_pools_of_their_own(self, make: Make, tapes: list[Tape]) -> None:
        base = models.build("sdxl", "text2img")
        one, two = make(pipe=ah.replica(base)), make(pipe=base)
        want = latents(one.pipe)
        for handle in (one, two):
            load(handle, [(128, 192)])
        first, second = (tape for tape in tapes if tape.captured)
        assert len(first.alive) == len(second.alive) == KINDS["sdxl"]
        one.remove()
        assert first.alive == [] and len(second.alive) == KINDS["sdxl"]
        with two.stats.expect(replays=STEPS):
            assert torch.equal(latents(two.pipe), want)

    def test_threads_take_turns_over_the_static_tensors(self, make: Make, run_all: Any) -> None:
        handle = make()
        blocks = len(handle.patch.windowed_blocks)
        mine = [[number] * blocks for number in range(4)]
        want = [unet_call(handle, shifts=shifts) for shifts in mine]
        load(handle, [(128, 192)])
        wrong: list[int] = []

        def work(number: int) -> None:
            for _ in range(8):
                if not torch.equal(unet_call(handle, shifts=mine[number]), want[number]):
                    wrong.append(number)

        with handle.stats.expect(replays=32):
            run_all([threading.Thread(target=work, args=(number,)) for number in range(4)])
        assert wrong == []

    def test_a_graph_that_is_dropped_before_its_turn_comes_is_not_replayed(
        self, make: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        handle = make()
        want = unet_call(handle)
        load(handle)

        def takes(recording: Recording, inputs: StepInputs) -> bool:
            handle._dispatcher._keep({})  # as another thread may
            return True

        monkeypatch.setattr(Recording, "takes", takes)
        with handle.stats.expect(replays=0, hits=1):
            assert torch.equal(unet_call(handle), want)

    def test_graphs_may_be_dropped_while_others_replay(self, make: Make, run_all: Any) -> None:
        handle = make()
        want = unet_call(handle)
        load(handle, [(128, 192)])
        wrong: list[bool] = []

        def work() -> None:
            for _ in range(8):
                if not torch.equal(unet_call(handle), want):
                    wrong.append(True)

        def drop() -> None:
            dispatcher = handle._dispatcher
            for name in list(dispatcher.replays.held()):
                with dispatcher._lock:
                    dispatcher._keep({key: graph for key, graph in dispatcher._graphs.items() if key != name})

        run_all([threading.Thread(target=work), threading.Thread(target=drop), threading.Thread(target=work)])
        assert wrong == [] and not handle._dispatcher.replays.held() and handle.stats.graph_bytes == 0


def test_a_call_hands_on_every_tensor_that_it_carries() -> None:
    """A field that is added to `UNetCall` and holds tensors has to go into `tensors` and `over`."""
    shifts = torch.arange(4)
    call = UNetCall(Topology(windowed=True), shifts, 0, {0: shifts[:2], 2: shifts[2:]})
    carried = {"shifts", "shifts_from"}
    state = {"topology", "first_shift", "tables_from", "tables", "regions", "window", "before_pool"}
    assert {field.name for field in dataclasses.fields(UNetCall)} == carried | state
    places = [torch.empty_like(one) for one in call.tensors()]
    over = call.over(places)
    assert over.shifts is places[0] and list(over.shifts_from) == [0, 2]
    assert over.tensors() == places and over.topology == call.topology
    assert UNetCall(Topology()).tensors() == [] and UNetCall(Topology()).over([]).shifts is None


def test_the_counters_are_in_the_statistics_and_the_metrics_name_only_counters_that_are_there() -> None:
    counters = Stats().to_json()
    assert {"captures": 0, "replays": 0, "graph_bytes": 0}.items() <= counters.items()
    assert {"captures", "replays"} <= service._STATS.keys() <= counters.keys()
