"""Cache keys: everything that an artifact depends on, as plain JSON, and its SHA-256.

A key is a *value*: the same facts give the same digest in every process, on every machine and in every Python
version. What has no stable JSON form is refused instead of being turned into text by ``repr`` or ``str``.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final, TypeAlias, cast

from .errors import UnstableFactor, one_line

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"

KEY_VERSION: Final = "compile_cache key v1\n"
"""Hashed in front of every key. Change it when the canonical form changes, and every old entry becomes a miss."""

_MAX_DEPTH: Final = 64
_MAX_INT_BITS: Final = 8192  # well inside the limit of 4300 digits that Python sets on text <-> int
_SHOWN: Final = 48  # characters of a value that a difference prints


class Absent(Enum):
    """The type of :data:`ABSENT`, which stands for a factor that one of two keys does not have."""

    ABSENT = "absent"

    def __str__(self) -> str:
        return "absent"


ABSENT: Final = Absent.ABSENT


def plain_json(value: object, path: str = "") -> JSON:
    """Return a private copy of ``value`` made of plain JSON types only.

    Args:
        value: str, int, bool, None, finite float, list or tuple of these, or mapping from str to these. A tuple
            becomes a list. An instance of a subclass of str, int or float becomes the plain value.
        path: dotted path of ``value``, for the error text.

    Raises:
        UnstableFactor: for anything else; the message names the dotted path and the type.
    """
    return _plain(value, path, 0)


def _plain(value: object, path: str, depth: int) -> JSON:
    if depth > _MAX_DEPTH:
        raise _unstable(path, f"values nested at most {_MAX_DEPTH} deep", "deeper ones (or a cycle)", "flatten it")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        text = str.__str__(value)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise _unstable(
                path, "text that UTF-8 can hold", "a str with a lone surrogate", "decode it first"
            ) from None
        return text
    if isinstance(value, int):
        if value.bit_length() > _MAX_INT_BITS:
            got = f"an int of {value.bit_length()} bits"
            raise _unstable(path, f"an int of at most {_MAX_INT_BITS} bits", got, "pass a SHA-256 of it")
        return int.__int__(value)
    if isinstance(value, float):
        number = float.__float__(value)
        if not math.isfinite(number):
            raise _unstable(path, "a finite float", f"float {number}", "pass None or a word in its place")
        return number
    if isinstance(value, list | tuple):
        return [_plain(item, _join(path, str(index)), depth + 1) for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        return _plain_mapping(value, path, depth)
    advice = "pass a sorted list" if isinstance(value, set | frozenset) else "pass its stable fields or a SHA-256 of it"
    raise _unstable(path, "str, int, bool, None, finite float, list or dict", _type_name(value), advice)


def _plain_mapping(value: Mapping[object, object], path: str, depth: int) -> dict[str, JSON]:
    plain: dict[str, JSON] = {}
    for key, item in value.items():
        if not isinstance(key, str):
            got = f"the {_type_name(key)} key {one_line(repr(key), 40)}"
            raise _unstable(path, "a mapping with str keys", got, "turn its keys into str")
        name = cast(str, _plain(key, _join(path, one_line(ascii(key), 40)), depth + 1))
        if name in plain:
            raise _unstable(_join(path, name), "each name once", "two equal names", "rename one of them")
        plain[name] = _plain(item, _join(path, name), depth + 1)
    return plain


def _unstable(path: str, expected: str, got: str, advice: str) -> UnstableFactor:
    return UnstableFactor(f"factor {one_line(path or '(top level)')}: expected {expected}, got {got}; {advice}")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _type_name(value: object) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def canonical_json(value: JSON) -> str:
    """Return the one JSON text of ``value``: sorted keys, no white space, ASCII only, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


@dataclass(frozen=True)
class FactorDifference:
    """One factor in which two keys differ.

    Attributes:
        name: dotted path of the factor, for instance ``environment.torch``.
        here: its value in the key that was asked, or :data:`ABSENT`.
        there: its value in the other one, or :data:`ABSENT`.
    """

    name: str
    here: JSON | Absent
    there: JSON | Absent

    def __str__(self) -> str:
        if isinstance(self.here, list) and isinstance(self.there, list):
            only_here = [item for item in self.here if item not in self.there]
            only_there = [item for item in self.there if item not in self.here]
            if only_here or only_there:  # long lists (processor flags) differ in a few items: show these
                return f"{self.name}: {_only(only_here)} only here, {_only(only_there)} only there"
        here, there = _show(self.here), _show(self.there)
        if here == there:  # 1 and "1", or long texts with the same beginning
            here, there = _show_apart(self.here, self.there)
        return f"{self.name}: {here} here, {there} there"


def _only(items: list[JSON]) -> str:
    return _cut(", ".join(_text(item) for item in items)) or "nothing"


def _text(value: JSON | Absent) -> str:
    if isinstance(value, Absent):
        return str(value)
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return text[1:-1] if isinstance(value, str) and value else text


def _show(value: JSON | Absent) -> str:
    return _cut(_text(value))


def _show_apart(here: JSON | Absent, there: JSON | Absent) -> tuple[str, str]:
    texts = [str(value) if isinstance(value, Absent) else canonical_json(value) for value in (here, there)]
    same = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    start = max(0, same - 8) if max(map(len, texts)) > _SHOWN else 0
    first, second = (_cut(("..." if start else "") + text[start:]) for text in texts)
    return first, second


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


class CacheKey:
    """An immutable, hashable name for an artifact: its factors and their SHA-256.

    Two keys are equal exactly when their digests are. The order of mapping keys does not count; ``1``, ``1.0`` and
    ``True`` are three different values; a tuple and a list of the same items are the same value.

    Args:
        factors: what the artifact depends on; see :func:`plain_json` for the values allowed.

    Raises:
        UnstableFactor: if a factor has no stable JSON form.
    """

    __slots__ = ("_canonical", "_digest")

    _canonical: str
    _digest: str

    def __init__(self, factors: Mapping[str, object]) -> None:
        if not isinstance(factors, Mapping):
            raise _unstable("", "a mapping from factor name to value", _type_name(factors), "pass a dict")
        canonical = canonical_json(plain_json(factors))
        object.__setattr__(self, "_canonical", canonical)
        object.__setattr__(self, "_digest", hashlib.sha256((KEY_VERSION + canonical).encode("ascii")).hexdigest())

    @property
    def factors(self) -> dict[str, JSON]:
        """The factors as plain JSON. Every access returns a new copy: changing it does not change the key."""
        return cast("dict[str, JSON]", json.loads(self._canonical))

    @property
    def digest(self) -> str:
        """The full SHA-256, 64 lower-case hexadecimal digits."""
        return self._digest

    @property
    def short(self) -> str:
        """The first 12 digits of the digest. For display only: never look anything up by it."""
        return self._digest[:12]

    def diff(self, other: CacheKey | Mapping[str, object]) -> tuple[FactorDifference, ...]:
        """Return what differs between this key ("here") and another key or its factors ("there"), sorted by name.

        Mappings are compared factor by factor; a list is one factor. The result is empty exactly if the keys are equal.

        Raises:
            UnstableFactor: if ``other`` is a mapping that could not be a key.
        """
        there = (other if isinstance(other, CacheKey) else CacheKey(other)).factors
        return tuple(_differences("", self.factors, there))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a CacheKey never changes: cannot set {name!r}; make a new key")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a CacheKey never changes: cannot delete {name!r}; make a new key")

    def __reduce__(self) -> tuple[type[CacheKey], tuple[dict[str, JSON]]]:
        return CacheKey, (self.factors,)

    def __eq__(self, other: object) -> bool:
        return self._digest == other._digest if isinstance(other, CacheKey) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._digest)

    def __str__(self) -> str:
        return self._digest

    def __repr__(self) -> str:
        return f"CacheKey({one_line(self._canonical, 120)})"


def _differences(path: str, here: dict[str, JSON], there: dict[str, JSON]) -> list[FactorDifference]:
    found: list[FactorDifference] = []
    for name in sorted(here.keys() | there.keys()):
        a: JSON | Absent = here.get(name, ABSENT)
        b: JSON | Absent = there.get(name, ABSENT)
        if isinstance(a, dict) and isinstance(b, dict):
            found.extend(_differences(_join(path, name), a, b))
        elif isinstance(a, Absent) or isinstance(b, Absent) or canonical_json(a) != canonical_json(b):
            found.append(FactorDifference(_join(path, name), a, b))
    return found
