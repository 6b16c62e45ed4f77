"""A log of attribute replacements that is undone in strict reverse order."""

from __future__ import annotations

from types import FunctionType
from typing import Any, NamedTuple

from accel_hidiff.errors import PatchConflict

_ABSENT = object()


def refuse_copy() -> PatchConflict:
    """The error of a deep copy of a patched model, whose copied forwards would run the original's weights."""
    return PatchConflict("cannot copy a patched model: remove HiDiffusion, copy, and apply it to both")


class _Installed:
    """A forward in the place of another one."""

    __slots__ = ("__wrapped__", "_function")

    def __init__(self, function: FunctionType) -> None:
        self._function = function
        self.__wrapped__ = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __deepcopy__(self, memo: Any) -> Any:
        raise refuse_copy()


class _Replacement(NamedTuple):
    owner: Any
    attribute: str
    ours: Any
    previous: Any  # what the instance's own __dict__ held, _ABSENT if nothing
    label: str


class UndoLog:
    """Replaces instance attributes and takes the replacements back; afterwards `vars(owner)` is what it was."""

    def __init__(self) -> None:
        self._log: list[_Replacement] = []

    def replace(self, owner: Any, attribute: str, value: Any, label: str) -> None:
        """Sets `owner.attribute = value` on the instance and remembers what its `__dict__` held before."""
        if isinstance(value, FunctionType):
            value = _Installed(value)
        previous = vars(owner).get(attribute, _ABSENT)
        vars(owner)[attribute] = value
        self._log.append(_Replacement(owner, attribute, value, previous, label))

    def undo(self) -> None:
        """Undoes every replacement in reverse order.

        Raises:
            PatchConflict: somebody replaced one of the attributes since; nothing is undone then.
        """
        self.check()
        while self._log:
            entry = self._log.pop()
            if entry.previous is _ABSENT:
                del vars(entry.owner)[entry.attribute]
            else:
                vars(entry.owner)[entry.attribute] = entry.previous

    def check(self) -> None:
        """PatchConflict if `undo` would destroy what somebody else put in place since."""
        for entry in self._log:
            if self._current(entry) is not self._last_ours(entry):
                raise PatchConflict(
                    f"cannot remove {entry.label}: {type(entry.owner).__name__}.{entry.attribute} was replaced by "
                    "something else since; undo that first, then remove again"
                )

    def _current(self, entry: _Replacement) -> Any:
        return vars(entry.owner).get(entry.attribute, _ABSENT)

    def _last_ours(self, entry: _Replacement) -> Any:
        same = [e for e in self._log if e.owner is entry.owner and e.attribute == entry.attribute]
        return same[-1].ours

    def labels(self) -> tuple[str, ...]:
        """What is installed, in order."""
        return tuple(entry.label for entry in self._log)

    def function_ids(self) -> frozenset[int]:
        """Ids of everything that was put in place, to tell our forwards from foreign ones."""
        return frozenset(id(entry.ours) for entry in self._log)


def is_installed(value: Any) -> bool:
    """Whether a value is a forward that an `UndoLog` put in place."""
    return isinstance(value, _Installed)
