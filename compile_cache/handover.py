"""A cache handed to a child process: what it takes to open the same one there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Handover:
    """Location, options and keys of a cache, for a process of the same user; :class:`CompileCache` makes and opens it.

    It holds the private key of a cache that signs: send it over a pipe of your own, keep it in no file.
    """

    location: str
    options: Mapping[str, Any] = field(repr=False)
    private: bytes | None = field(repr=False)
