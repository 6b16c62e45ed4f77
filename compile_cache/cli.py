"""The command line: ``compile-cache {ls,verify,explain}``.

Exit codes: 0 done, 1 the work failed (damage was found), 2 bad usage or bad input, with one line on stderr.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .cache import CompileCache
from .console import complain, run_app
from .entry import Entry
from .errors import CompileCacheError, DamagedEntry, one_line

app = typer.Typer(add_completion=False, help="Look at a compile cache and check it.")

Location = Annotated[Path, typer.Argument(help="Directory of the cache.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class BadInput(Exception):
    """What the user gave cannot be used. The text is one line for stderr; the exit code is 2."""


@app.command("ls")
def list_entries(location: Location, as_json: AsJson = False) -> None:
    """List the entries. Damaged ones are named on stderr; run verify to check every byte."""
    cache = _open(location)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        entries = list(cache.entries())
    for warning in caught:
        complain("compile-cache", warning.message)
    if as_json:
        _print_json({"location": str(cache.location), "entries": [_as_json(entry) for entry in entries]})
        return
    table = Table(box=None, pad_edge=False)
    for title in ("key", "files", "bytes", "created", "factors"):
        table.add_column(title, no_wrap=True, justify="right" if title in ("files", "bytes") else "left")
    for entry in entries:
        factors = Text(one_line(json.dumps(entry.factors), 300))
        table.add_row(entry.digest[:12], str(len(entry.files)), str(entry.size), entry.created, factors)
    console = Console()
    console.print(table)
    console.print(f"{len(entries)} entries, {sum(entry.size for entry in entries)} bytes")


@app.command("verify")
def verify_cache(
    location: Location,
    repair: Annotated[bool, typer.Option("--repair", help="Move what is damaged into v1/damaged.")] = False,
    as_json: AsJson = False,
) -> None:
    """Read and check every byte. Exit code 1 if something is damaged, repaired or not."""
    cache = _open(location)
    with Console(stderr=True).status("checking every byte"):
        report = cache.verify(repair=repair)
    if as_json:
        damaged = [{"path": path, "reason": reason} for path, reason in report.damaged]
        counts = {"entries": report.entries, "blobs": report.blobs, "bytes": report.bytes}
        orphans = list(report.orphan_blobs)
        _print_json({"ok": report.ok, **counts, "damaged": damaged, "orphan_blobs": orphans, "repaired": repair})
    else:
        for path, reason in report.damaged:
            print(f"damaged: {path}: {reason}{' (moved to v1/damaged)' if repair else ''}")
        found = f"{report.entries} entries, {report.blobs} blobs, {report.bytes} bytes"
        print(f"{found} sound; {len(report.damaged)} damaged; {len(report.orphan_blobs)} blobs without an entry")
    if not report.ok:
        raise typer.Exit(1)


@app.command("explain")
def explain_entry(
    location: Location,
    digest: Annotated[str, typer.Argument(help="Key digest, or a beginning of it that only one entry has.")],
    as_json: AsJson = False,
) -> None:
    """Show the factors, files and notes of one entry, after a check of its bytes."""
    cache = _open(location)
    matches = [full for full in cache.digests() if full.startswith(digest.lower())] if digest else []
    if len(matches) != 1:
        got = f"{digest!r}, which {len(matches) or 'no'} entries have"
        raise BadInput(f"expected a key digest or a beginning that one entry has, got {got}; list them with ls")
    entry = cache.find(matches[0])
    if entry is None:
        raise DamagedEntry(f"expected entry {matches[0][:12]}, got nothing: it was moved away just now; run it again")
    if as_json:
        _print_json(_as_json(entry))
        return
    print(f"key      {entry.digest}\ncreated  {entry.created}\nsize     {entry.size} bytes")
    for title, values in (("factors", entry.factors), ("notes", entry.notes)):
        print(title)
        for name, value in sorted(values.items()):
            print(f"  {one_line(name)}: {json.dumps(value)}")
    print("files")
    for name, ref in sorted(entry.files.items()):
        print(f"  {one_line(name)}: {ref.size} bytes, sha256 {ref.sha256}")


def _open(location: Path) -> CompileCache:
    cache = CompileCache(location)
    if not (cache.location / "v1").is_dir():
        state = "a directory without one" if cache.location.is_dir() else "nothing there"
        raise BadInput(f"expected a compile cache at {location}, got {state}; give the directory that holds v1/")
    return cache


def _as_json(entry: Entry) -> dict[str, object]:
    files = {name: {"sha256": ref.sha256, "size": ref.size} for name, ref in entry.files.items()}
    rest = {"factors": entry.factors, "files": files, "notes": entry.notes}
    return {"digest": entry.digest, "created": entry.created, "size": entry.size, **rest}


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=1, sort_keys=True))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; never raises for bad usage, bad input or damage."""
    return run_app(app, "compile-cache", arguments, bad_input=(BadInput, CompileCacheError), failed=(DamagedEntry,))


def main() -> None:
    """Console entry point."""
    sys.exit(run())


if __name__ == "__main__":
    main()
