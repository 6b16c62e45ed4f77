"""The guard accepts what compiled graphs compute and refuses the rest with a reason that says what to do."""

from __future__ import annotations

import dataclasses
import re
from itertools import product
from typing import Any

import pytest

from accel_hidiff.guard import ACCEPT, Accept, CallFacts, Reject, judge_call, judge_sizes
from accel_hidiff.topology import Topology
from compile_cache import Range, ShapeBucket

BLOCKS_REFUSE = ("cross_attention_kwargs", "attention_mask", "encoder_attention_mask", "image_embeds")
ONLY_WHOLE_REFUSES = ("class_labels", "timestep_cond", "down_intrablock_additional_residuals", "guess_mode")
RESIDUALS = ("down_block_additional_residuals", "mid_block_additional_residual")


def facts(**changes: Any) -> CallFacts:
    plain = CallFacts(Topology(True), height=64, width=64, batch=2, tokens=77, dtype="torch.float32", device="cpu")
    return dataclasses.replace(plain, **changes)


@pytest.mark.parametrize("regions", ["blocks", "whole"])
def test_an_ordinary_call_is_accepted(regions: str) -> None:
    assert judge_call(facts(whole=regions == "whole")) is ACCEPT
    assert judge_call(facts(tokens=256)) == Accept()


@pytest.mark.parametrize("topology", [Topology(*flags) for flags in product((False, True), repeat=3)], ids=str)
def test_no_topology_is_refused(topology: Topology) -> None:
    assert judge_call(facts(topology=topology)) is ACCEPT


@pytest.mark.parametrize("regions", ["blocks", "whole"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"grad": True}, r"gradients are on.*torch\.no_grad\(\)"),
        ({"autocast": True}, r"autocast is on.*dtype"),
        ({"tensor_text": False}, "encoder_hidden_states"),
    ],
)
def test_what_graphs_do_not_have_is_refused_with_what_to_do(regions: str, change: dict[str, Any], reason: str) -> None:
    decision = judge_call(facts(whole=regions == "whole", **change))
    assert isinstance(decision, Reject)
    assert re.search(reason, decision.reason)


@pytest.mark.parametrize("name", BLOCKS_REFUSE)
def test_what_changes_blocks_is_refused_everywhere(name: str) -> None:
    for whole in (False, True):
        decision = judge_call(facts(extras=(name,), whole=whole))
        assert isinstance(decision, Reject) and name in decision.reason
        assert "regions=" not in decision.reason, "no other choice of regions would help"


@pytest.mark.parametrize("name", ONLY_WHOLE_REFUSES)
def test_what_enters_between_blocks_is_refused_for_the_whole_unet_only(name: str) -> None:
    assert judge_call(facts(extras=(name,))) is ACCEPT
    decision = judge_call(facts(extras=(name,), whole=True))
    assert isinstance(decision, Reject) and name in decision.reason and 'regions="blocks" serves it' in decision.reason


@pytest.mark.parametrize("whole", [False, True])
def test_residuals_of_a_controlnet_are_inputs_of_every_graph(whole: bool) -> None:
    assert judge_call(facts(extras=RESIDUALS, whole=whole)) is ACCEPT


def test_a_sample_that_the_model_does_not_take_is_refused() -> None:
    decision = judge_call(facts(channels=(4, 9)))
    assert decision == Reject("expected a sample of 9 channels, got 4")


def test_sizes_are_judged_by_the_bucket_of_the_artifact() -> None:
    bucket = ShapeBucket({"height": Range(16, 64, 8), "batch": Range.exactly(2)})
    assert judge_sizes("mid_block", bucket, {"height": 32, "batch": 2}) is ACCEPT
    for sizes, reason in (
        ({"height": 33, "batch": 2}, "33 is not a multiple of 8"),
        ({"height": 72, "batch": 2}, "72 is over the maximum 64"),
        ({"height": 8, "batch": 2}, "8 is under the minimum 16"),
        ({"height": 32, "batch": 1}, "1 is not 2"),
    ):
        decision = judge_sizes("mid_block", bucket, sizes)
        assert isinstance(decision, Reject)
        assert decision.reason.startswith("mid_block: ") and reason in decision.reason


def test_missing_and_unknown_sizes_are_refused() -> None:
    bucket = ShapeBucket({"height": Range(16, 64, 8)})
    assert isinstance(judge_sizes("r", bucket, {}), Reject)
    assert isinstance(judge_sizes("r", bucket, {"height": 32, "depth": 1}), Reject)


def test_decisions_and_facts_are_values() -> None:
    assert Reject("a") == Reject("a") != Reject("b")
    assert hash(facts()) == hash(facts()) and facts() != facts(batch=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        facts().batch = 3  # type: ignore[misc]
