"""Commands that remove, or keep from being removed: prune, clean, pin, unpin."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated

import typer

from .commands import (
    AsJson,
    BadInput,
    DryRun,
    Location,
    full_digest,
    open_cache,
    parse_bytes,
    parse_seconds,
    print_json,
    show_bytes,
)
from .environment import environment_factors
from .errors import CompileCacheError
from .keys import JSON
from .limits import PruneReport

Entry = Annotated[str, typer.Argument(help="Key digest, or a beginning of it that only one entry has.")]


def prune(
    location: Location,
    max_bytes: Annotated[str | None, typer.Option(help="What may stay, such as 20GiB; least recently used go.")] = None,
    max_age: Annotated[str | None, typer.Option(help="Time since the last use that may stay, such as 30d.")] = None,
    foreign: Annotated[
        bool,
        typer.Option("--foreign", help="Remove what was compiled for another environment (torch, processor, ...)."),
    ] = False,
    superseded: Annotated[
        list[str] | None,
        typer.Option(help="Factor name, such as versions: of entries that differ only there, the newest stays."),
    ] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Remove what is of no use any more, then what is over the limits; never what is in use or pinned."""
    cache = open_cache(location)
    report = cache.prune(
        environment=_environments() if foreign else None,
        superseded=superseded or (),
        max_bytes=None if max_bytes is None else parse_bytes(max_bytes),
        max_age=None if max_age is None else parse_seconds(max_age),
        dry_run=dry_run,
    )
    _print(report, as_json)


def clean(
    location: Location,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Remove every entry that no process uses, pinned or not. What it held has to be compiled again."""
    cache = open_cache(location)
    if not (yes or dry_run):
        typer.confirm(f"Remove every entry of {cache.location}?", abort=True, err=True)
    _print(cache.clean(dry_run=dry_run), as_json)


def pin(location: Location, key: Entry) -> None:
    """Keep an entry whatever the limits say."""
    cache = open_cache(location)
    cache.pin(full_digest(cache, key))


def unpin(location: Location, key: Entry) -> None:
    """Leave an entry to the limits again."""
    cache = open_cache(location)
    cache.unpin(full_digest(cache, key))


def register(app: typer.Typer) -> None:
    """Add these commands."""
    for command in (prune, clean, pin, unpin):
        app.command()(command)


def _environments() -> list[dict[str, JSON]]:
    """The environments of this machine: of its processor and, if it has one, of its accelerator."""
    try:
        found = [environment_factors("cpu")]
    except ImportError as error:
        raise BadInput(
            "expected torch, whose version is a part of the environment, got none; leave out --foreign"
        ) from error
    with suppress(CompileCacheError):  # no accelerator here: entries for one stay
        found.append(environment_factors("cuda"))
    return found


def _print(report: PruneReport, as_json: bool) -> None:
    if as_json:
        removed = [{"digest": one.digest, "reason": one.reason, "freed": one.freed} for one in report.removed]
        counts = {"entries": report.entries, "bytes": report.bytes, "freed": report.freed, "orphans": report.orphans}
        print_json({"removed": removed, "in_use": list(report.in_use), "dry_run": report.dry_run, **counts})
        return
    would = "would be " if report.dry_run else ""
    for one in report.removed:
        print(f"{would}removed {one.digest[:12]} ({show_bytes(one.freed)}): {one.reason}")
    for digest in report.in_use:
        print(f"kept {digest[:12]}: in use or pinned")
    done = f"{len(report.removed)} entries and {report.orphans} blobs without an entry {would}removed"
    print(f"{done}, {show_bytes(report.freed)} freed; {report.entries} entries, {show_bytes(report.bytes)} left")
