"""When an entry was last used, how often, and whether it is pinned.

One byte is appended to ``v1/used/ab/<digest>`` at each use: the size counts, the modification time dates. Appending a
byte is atomic, so processes need no lock; what cannot be written (a read-only disk) is not counted, and nothing fails.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Use:
    """What is known of the use of an entry.

    Attributes:
        count: how often it was handed out.
        last: when, seconds since 1970; None if never.
    """

    count: int = 0
    last: float | None = None


class Usage:
    """The use records below ``v1``."""

    def __init__(self, root: Path) -> None:
        self._used, self._pins = root / "used", root / "pins"

    def note(self, digest: str) -> None:
        """Count one use, now."""
        path = self._path(digest)
        with suppress(OSError):
            try:
                descriptor = self._open(path)
            except FileNotFoundError:
                path.parent.mkdir(parents=True, exist_ok=True)
                descriptor = self._open(path)
            try:
                os.write(descriptor, b".")
            finally:
                os.close(descriptor)

    def freshen(self, digest: str) -> None:
        """The entry was stored anew: its age starts again."""
        with suppress(OSError):
            os.utime(self._path(digest))

    def of(self, digest: str) -> Use:
        """The use of an entry so far."""
        try:
            status = os.stat(self._path(digest))
        except OSError:
            return Use()
        return Use(status.st_size, status.st_mtime)

    def forget(self, digest: str) -> None:
        """Drop what was noted; the entry is gone."""
        for path in (self._path(digest), self._pins / digest):
            with suppress(OSError):
                path.unlink()

    def pin(self, digest: str) -> None:
        """Keep the entry whatever the limits say.

        Raises:
            OSError: if that cannot be written.
        """
        self._pins.mkdir(parents=True, exist_ok=True)
        os.close(self._open(self._pins / digest))

    def unpin(self, digest: str) -> None:
        """Leave the entry to the limits again.

        Raises:
            OSError: if that cannot be written.
        """
        (self._pins / digest).unlink(missing_ok=True)

    def is_pinned(self, digest: str) -> bool:
        """Whether the entry is kept whatever the limits say."""
        return (self._pins / digest).exists()

    def _path(self, digest: str) -> Path:
        return self._used / digest[:2] / digest

    @staticmethod
    def _open(path: Path) -> int:
        # Whoever can write here may have put a link to another file, or a pipe that would wait for a reader.
        safely = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | safely, 0o666)


def age(moment: float) -> float:
    """Seconds since a moment; 0 for one in the future, as a clock that was set back gives."""
    return max(0.0, time.time() - moment)
