"""What the commands of the command line share: their arguments, sizes and times as text, and opening a cache."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from .cache import CompileCache
from .signing import PublicKey

Location = Annotated[Path, typer.Argument(help="Directory of the cache.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Trust = Annotated[
    list[str] | None,
    typer.Option("--trust", help="Public key (ed25519:...) or file of keys that entries have to be signed by."),
]
Keys = Annotated[
    list[str] | None,
    typer.Option("--key", help="Only this entry: its key digest, or a beginning that only one has. Repeatable."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")]

_BYTES: Final = {
    **{"": 1, "b": 1},
    **{f"{unit}b": 1000**i for i, unit in enumerate("kmgt", 1)},
    **{f"{unit}{end}": 1024**i for i, unit in enumerate("kmgt", 1) for end in ("", "ib")},
}
_SECONDS: Final = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


class BadInput(Exception):
    """What the user gave cannot be used. The text is one line for stderr; the exit code is 2."""


def parse_bytes(text: str) -> int:
    """Return the bytes of "500", "20GB" (powers of 1000) or "1.5GiB" (powers of 1024)."""
    return int(_parse(text, _BYTES, "a size such as 500MB or 20GiB"))


def parse_seconds(text: str) -> float:
    """Return the seconds of "90", "12h", "30d" or "4w"."""
    return _parse(text, _SECONDS, "a time such as 12h or 30d")


def _parse(text: str, units: dict[str, int], expected: str) -> float:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in units or float(match[1]) <= 0:
        raise BadInput(f"expected {expected}, got {text!r}; units are {', '.join(filter(None, units))}")
    return float(match[1]) * units[match[2].lower()]


def show_bytes(size: float) -> str:
    """Return bytes as a short text, such as "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def show_seconds(seconds: float) -> str:
    """Return a time span as a short text, such as "3 h"."""
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86400:.0f} d"


def open_cache(
    location: Path, *, new: bool = False, trust: Sequence[str] | None = None, **options: Any
) -> CompileCache:
    """Return the cache at a path.

    Args:
        location: its directory.
        new: it need not be there yet.
        trust: texts of public keys, or paths of files of them.
        options: of :class:`CompileCache`.

    Raises:
        BadInput: if no cache is there.
    """
    keys = (
        None if not trust else [PublicKey.parse(text) if text.startswith("ed25519:") else Path(text) for text in trust]
    )
    cache = CompileCache(location, trust=keys, **options)
    if not new and not (cache.location / "v1").is_dir():
        state = "a directory without one" if cache.location.is_dir() else "nothing there"
        raise BadInput(f"expected a compile cache at {location}, got {state}; give the directory that holds v1/")
    return cache


def full_digest(cache: CompileCache, text: str) -> str:
    """Return the digest that begins with a text.

    Raises:
        BadInput: if none or several do.
    """
    matches = [digest for digest in cache.digests() if digest.startswith(text.lower())] if text else []
    if len(matches) != 1:
        got = f"{text!r}, which {len(matches) or 'no'} entries have"
        raise BadInput(f"expected a key digest or a beginning that one entry has, got {got}; list them with ls")
    return matches[0]


def full_digests(cache: CompileCache, texts: Sequence[str] | None) -> list[str] | None:
    """Return the digests that begin with these texts; None for none: all."""
    return [full_digest(cache, text) for text in texts] if texts else None


def print_json(value: object) -> None:
    """Print JSON, sorted."""
    print(json.dumps(value, indent=1, sort_keys=True))


@contextmanager
def bytes_shown(text: str) -> Iterator[Any]:
    """Give a progress callback that draws a bar on stderr, where that is a terminal."""
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(text, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
