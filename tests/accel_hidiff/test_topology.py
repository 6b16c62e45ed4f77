"""A topology is a value: hashable, ordered, and its text names it uniquely."""

from __future__ import annotations

from itertools import product

import pytest

from accel_hidiff.topology import PLAIN, Topology

ALL = [Topology(*flags) for flags in product((False, True), repeat=3)]


@pytest.mark.parametrize("topology", ALL, ids=str)
def test_parse_is_the_inverse_of_str(topology: Topology) -> None:
    assert Topology.parse(str(topology)) == topology
    assert hash(Topology.parse(str(topology))) == hash(topology)


def test_eight_topologies_have_eight_names() -> None:
    assert len({str(topology) for topology in ALL}) == len(set(ALL)) == 8
    assert sorted(ALL) == ALL


def test_the_texts_are_stable() -> None:
    """Keys of stored graphs contain them."""
    assert str(PLAIN) == "plain"
    assert str(Topology(windowed=True, dilated=True)) == "windowed+dilated"
    assert str(Topology(True, True, True)) == "windowed+pooled+dilated"


@pytest.mark.parametrize("text", ["", "window", "plain+pooled", "windowed+", "windowed,pooled"])
def test_unknown_parts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected parts among windowed, pooled, dilated"):
        Topology.parse(text)
