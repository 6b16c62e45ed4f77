"""A cache handed to a child process: what it takes to open the same one there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .signing import SigningKey

if TYPE_CHECKING:
    from .cache import CompileCache


@dataclass(frozen=True)
class Handover:
    """Location, options and keys of a cache, for another process of this user; see :meth:`CompileCache.handover`.

    It holds the private key of a cache that signs: send it over a pipe of your own, keep it in no file.
    """

    location: str
    options: Mapping[str, Any] = field(repr=False)
    private: bytes | None = field(repr=False)

    def open(self) -> CompileCache:
        """The same cache, in this process; with counters, and a connection to its remote, of its own."""
        from .cache import CompileCache

        signer = None if self.private is None else SigningKey.from_private_bytes(self.private)
        return CompileCache(self.location, sign_with=signer, **self.options)
