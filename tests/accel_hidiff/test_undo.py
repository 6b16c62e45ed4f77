"""The log of replacements gives back what was there, in reverse order, or refuses and changes nothing."""

from __future__ import annotations

import pytest

from accel_hidiff.errors import PatchConflict
from accel_hidiff.undo import UndoLog


class Thing:
    kind = "class attribute"

    def method(self) -> str:
        return "method"


def test_undo_restores_names_order_and_identity() -> None:
    thing, value = Thing(), object()
    thing.first, thing.second = value, 2  # type: ignore[attr-defined]
    before = list(vars(thing).items())
    log = UndoLog()
    log.replace(thing, "first", 10, "a")
    log.replace(thing, "method", lambda: "ours", "b")
    log.replace(thing, "kind", "instance", "c")
    assert (thing.first, thing.method(), thing.kind) == (10, "ours", "instance")  # type: ignore[attr-defined]
    log.undo()
    after = list(vars(thing).items())
    assert [name for name, _ in after] == [name for name, _ in before]
    assert all(a is b for (_, a), (_, b) in zip(after, before, strict=True))
    assert thing.method() == "method" and thing.kind == "class attribute"
    assert Thing.kind == "class attribute"


def test_one_attribute_replaced_twice_goes_back_to_the_first_value() -> None:
    thing, log = Thing(), UndoLog()
    log.replace(thing, "method", lambda: "one", "one")
    inner = thing.method
    log.replace(thing, "method", lambda: inner() + "two", "two")
    assert thing.method() == "onetwo"
    assert log.labels() == ("one", "two")
    log.undo()
    assert "method" not in vars(thing) and log.labels() == ()


def test_undo_twice_is_undo_once() -> None:
    thing, log = Thing(), UndoLog()
    log.replace(thing, "x", 1, "x")
    log.undo()
    vars(thing)["x"] = 5
    log.undo()
    assert vars(thing) == {"x": 5}


@pytest.mark.parametrize("theirs", ["replaced", "removed"])
def test_a_change_by_somebody_else_is_refused_and_nothing_is_undone(theirs: str) -> None:
    thing, other, log = Thing(), Thing(), UndoLog()
    log.replace(thing, "x", ours := object(), "the x patch")
    log.replace(other, "y", 2, "the y patch")
    if theirs == "replaced":
        vars(thing)["x"] = foreign = object()
    else:
        del vars(thing)["x"]
    with pytest.raises(PatchConflict, match=r"cannot remove the x patch: Thing\.x .* undo that first"):
        log.undo()
    assert vars(other) == {"y": 2} and log.labels() == ("the x patch", "the y patch")
    if theirs == "replaced":
        assert vars(thing)["x"] is foreign
    vars(thing)["x"] = ours  # they undo their change
    log.undo()
    assert vars(thing) == {} == vars(other)


def test_an_equal_object_is_not_ours() -> None:
    """Identity counts: a foreign value that compares equal is foreign."""
    thing, log = Thing(), UndoLog()
    log.replace(thing, "x", [1], "x")
    vars(thing)["x"] = [1]
    with pytest.raises(PatchConflict):
        log.undo()


def test_ids_name_what_was_put_in_place() -> None:
    thing, log = Thing(), UndoLog()
    ours = thing.method
    log.replace(thing, "method", ours, "m")
    assert log.function_ids() == {id(ours)}
