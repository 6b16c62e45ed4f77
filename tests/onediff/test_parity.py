"""The same numbers as patched eager in every phase, at three sizes, and no compilation when one of them changes."""

from __future__ import annotations

import pytest
import torch

import accel_hidiff as ah
from tests import models
from tests.compiled.conftest import relative_difference, unet_inputs
from tests.onediff.conftest import SIZES, STEPS, Pair

LIMIT = 1e-3  # max|compiled - eager| / max|eager|


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_phase(pair: Pair, size: tuple[int, int], nothing_compiled: None) -> None:
    phases = pair.handle.patch.plan(*size, STEPS)
    assert len({phase.topology for phase in phases}) > 1
    inputs = unet_inputs(pair.eager.unet, *size, 2)
    for phase in phases:
        at = {"step": phase.start, "num_steps": STEPS}
        with torch.no_grad(), pair.patch.phase(**at):
            want = pair.eager.unet(**inputs).sample
        with (
            torch.no_grad(),
            pair.handle.patch.phase(**at),
            pair.handle.stats.expect(hits=1, eager_calls=0, compiles=0),
        ):
            got = pair.served.unet(**inputs).sample
        assert relative_difference(got, want) < LIMIT


def test_requests_of_changing_sizes(pair: Pair, nothing_compiled: None) -> None:
    """The user's own call, VAE included; every request runs through T1 and T2."""
    for size in (*SIZES, SIZES[0], SIZES[2]):
        with pair.handle.stats.expect(eager_calls=0, compiles=0, hits=STEPS + 1 + _extra(pair)):
            got, want = pair.images(*size, output_type="pt")
        assert relative_difference(torch.as_tensor(got), torch.as_tensor(want)) < 5e-3


def _extra(pair: Pair) -> int:
    """PNDM, SD 1.5's scheduler, calls the UNet once more."""
    return int(pair.layout == "sd15")


def test_equal_regions_share_a_program(sdxl: Pair) -> None:
    """34 regions in three topologies at three sizes, and a decoder at each."""
    graphs = {
        binder.key(graph).digest
        for size in SIZES
        for phase in sdxl.handle.patch.plan(*size, STEPS)
        for graph, _ in sdxl.handle._graphs.unet(phase.topology, *size, 2)
        for binder in (sdxl.handle._dispatcher.binder,)
    }
    assert sdxl.handle.stats.compiles == len(graphs) + len(SIZES) < 28 * len(SIZES)
    assert sdxl.handle.stats.bindings > sdxl.handle.stats.compiles


def test_another_checkpoint_of_the_architecture_compiles_nothing(sdxl: Pair, nothing_compiled: None) -> None:
    served, eager = (models.build("sdxl", "text2img", seed=1) for _ in range(2))
    handle = ah.accelerate(served, hidiffusion=ah.HiDiffusionConfig(), backend="onediff", on_miss="error")
    ah.apply_hidiffusion(eager)
    asked = {"num_inference_steps": STEPS}
    with handle.stats.expect(compiles=0, eager_calls=0):
        got = served(**models.arguments("sdxl", "text2img", *SIZES[2], **asked)).images
    want = eager(**models.arguments("sdxl", "text2img", *SIZES[2], **asked)).images
    assert relative_difference(got, want) < 5e-3
    handle.remove()


def test_explain_tells_what_compiles_at_start(sdxl: Pair) -> None:
    assert {row.state for row in sdxl.before.rows} == {"compiles at start"} and not sdxl.before.ready
    now = sdxl.handle.explain(*SIZES[1], STEPS)
    assert {row.state for row in now.rows} == {"loaded"} and now.ready
    assert "height 16, width 24" in now.rows[-1].bucket


def test_a_size_that_was_not_loaded_is_refused(sdxl: Pair, nothing_compiled: None) -> None:
    """Nothing compiles in a request, and no program is fed with another size: the first one was square."""
    with pytest.raises(ah.GraphMiss, match=r"not compiled in this process.*handle\.load"):
        sdxl.images(192, 192)


def test_cfgpp_and_whole_models(no_programs: None) -> None:
    """A whole UNet as one program, and the compiled step of CFG++."""
    served, eager = models.build("sdxl", "text2img"), models.build("sdxl", "text2img")
    options = {"hidiffusion": ah.HiDiffusionConfig(), "guidance": ah.CFGPlusPlusConfig(0.6)}
    handle = ah.accelerate(served, backend="onediff", on_miss="error", regions="whole", **options)
    handle.load([(128, 192)], 1, batch_sizes=[2])
    compared = ah.accelerate(eager, backend="eager", **options)
    asked = {"num_inference_steps": 1}
    with handle.stats.expect(eager_calls=0, compiles=0):
        got = served(**models.arguments("sdxl", "text2img", 128, 192, **asked)).images
    want = eager(**models.arguments("sdxl", "text2img", 128, 192, **asked)).images
    assert relative_difference(got, want) < 5e-3
    assert handle.stats.compiles == 3  # UNet, step, decoder
    compared.remove()


def test_a_controlnet() -> None:
    served, eager = models.build("sdxl", "controlnet"), models.build("sdxl", "controlnet")
    handle = ah.accelerate(served, hidiffusion=ah.HiDiffusionConfig(), backend="onediff")
    ah.apply_hidiffusion(eager)
    asked = {"num_inference_steps": 2}
    got = served(**models.arguments("sdxl", "controlnet", 128, 128, **asked)).images
    want = eager(**models.arguments("sdxl", "controlnet", 128, 128, **asked)).images
    assert relative_difference(got, want) < 5e-3
    assert handle.stats.eager_calls == 0
