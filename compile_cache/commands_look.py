"""Commands that only look: ls, verify, explain."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .commands import (
    AsJson,
    BadInput,
    Location,
    Trust,
    full_digest,
    open_cache,
    print_json,
    show_bytes,
    show_seconds,
)
from .entry import Entry
from .errors import DamagedEntry, UnstableFactor, one_line
from .keys import CacheKey

_NEAREST = 3


def list_entries(location: Location, trust: Trust = None, as_json: AsJson = False) -> None:
    """List the entries. Damaged and untrusted ones are named on stderr; run verify to check every byte."""
    cache = open_cache(location, trust=trust)
    entries = list(cache.entries())
    if as_json:
        print_json({"location": str(cache.location), "entries": [_as_json(entry) for entry in entries]})
        return
    table = Table(box=None, pad_edge=False, expand=True)
    for title in ("key", "files", "size", "hits", "used", "created", ""):
        table.add_column(title, no_wrap=True, justify="right" if title in ("files", "size", "hits", "used") else "left")
    table.add_column("factors", no_wrap=True, ratio=1)
    for entry in entries:
        marks = " ".join(mark for mark, on in (("pinned", entry.pinned), ("signed", entry.signed_by)) if on)
        table.add_row(
            entry.digest[:12],
            str(len(entry.files)),
            show_bytes(entry.size),
            str(entry.hits),
            "never" if entry.last_used is None else f"{_ago(entry.last_used)} ago",
            f"{_ago(entry.created)} ago",
            marks,
            Text(one_line(json.dumps(entry.factors), 300)),
        )
    console = Console()
    console.print(table)
    blobs = {ref.sha256: ref.size for entry in entries for ref in entry.files.values()}
    console.print(f"{len(entries)} entries, {show_bytes(sum(blobs.values()))} (what entries share counted once)")


def verify_cache(
    location: Location,
    trust: Trust = None,
    repair: Annotated[bool, typer.Option("--repair", help="Move what is damaged into v1/damaged.")] = False,
    as_json: AsJson = False,
) -> None:
    """Read and check every byte. Exit code 1 if something is damaged (repaired or not) or not trusted."""
    cache = open_cache(location, trust=trust)
    with Console(stderr=True).status("checking every byte"):
        report = cache.verify(repair=repair)
    if as_json:
        lists = {
            name: [{"path": path, "reason": reason} for path, reason in getattr(report, name)]
            for name in ("damaged", "untrusted", "foreign")
        }
        counts = {"entries": report.entries, "blobs": report.blobs, "bytes": report.bytes}
        orphans = list(report.orphan_blobs)
        print_json({"ok": report.ok, **counts, **lists, "orphan_blobs": orphans, "repaired": repair})
    else:
        moved = " (moved to v1/damaged)" if repair else ""
        for word, found, more in (
            ("damaged", report.damaged, moved),
            ("untrusted", report.untrusted, ""),
            ("of another version", report.foreign, ""),
        ):
            for path, reason in found:
                print(f"{word}: {path}: {reason}{more}")
        sound = f"{report.entries} entries, {report.blobs} blobs, {report.bytes} bytes sound"
        bad = f"{len(report.damaged)} damaged" + (f"; {len(report.untrusted)} untrusted" if trust else "")
        print(f"{sound}; {bad}; {len(report.orphan_blobs)} blobs without an entry")
    if not report.ok:
        raise typer.Exit(1)


def explain_entry(
    location: Location,
    key: Annotated[
        str,
        typer.Argument(
            help="Key digest, a beginning of it that only one entry has, or a JSON file of factors (- for stdin)."
        ),
    ],
    trust: Trust = None,
    as_json: AsJson = False,
) -> None:
    """Show one entry after a check of its bytes; for factors that are not stored, how the nearest entries differ."""
    cache = open_cache(location, trust=trust)
    asked = _key_of_factors(key)
    if asked is not None and (found := cache.find(asked.digest)) is None:
        near = cache.nearest(asked, _NEAREST)
        if as_json:
            differ = [
                {"digest": one.entry.digest, "differences": [str(difference) for difference in one.differences]}
                for one in near
            ]
            print_json({"digest": asked.digest, "state": "missing", "nearest": differ})
            return
        print(f"key      {asked.digest}\nstate    missing; {len(near)} nearest entries:")
        for one in near:
            print(f"{one.entry.digest[:12]} differs in {len(one.differences)} factors")
            for difference in one.differences:
                print(f"  {one_line(difference, 300)}")
        return
    entry = found if asked is not None else cache.find(full_digest(cache, key))
    if entry is None:
        raise DamagedEntry(f"expected entry {key[:12]}, got nothing: it was removed just now; run it again")
    if as_json:
        print_json(_as_json(entry))
        return
    print(f"key      {entry.digest}\ncreated  {entry.created}\nsize     {entry.size} bytes")
    print(f"used     {entry.hits} times, last {entry.last_used or 'never'}{', pinned' if entry.pinned else ''}")
    for signer in entry.signed_by:
        print(f"signed   {signer}")
    for title, values in (("factors", entry.factors), ("notes", entry.notes)):
        print(title)
        for name, value in sorted(values.items()):
            print(f"  {one_line(name)}: {json.dumps(value)}")
    print("files")
    for name, ref in sorted(entry.files.items()):
        print(f"  {one_line(name)}: {ref.size} bytes, sha256 {ref.sha256}")


def register(app: typer.Typer) -> None:
    """Add these commands."""
    app.command("ls")(list_entries)
    app.command("verify")(verify_cache)
    app.command("explain")(explain_entry)


def _key_of_factors(text: str) -> CacheKey | None:
    """The key of a JSON file of factors; None if the text names no file."""
    try:
        if text == "-":
            data = sys.stdin.read()
        elif Path(text).is_file():
            data = Path(text).read_text("utf-8")
        else:
            return None
        return CacheKey(json.loads(data))
    except (OSError, ValueError, UnstableFactor) as error:
        raise BadInput(
            f"expected a JSON object of factors in {text}, got {one_line(error, 120)}; see ls --json"
        ) from error


def _ago(moment: str) -> str:
    return show_seconds(max(0.0, (datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds()))


def _as_json(entry: Entry) -> dict[str, object]:
    files = {name: {"sha256": ref.sha256, "size": ref.size} for name, ref in entry.files.items()}
    rest = {"factors": entry.factors, "files": files, "notes": entry.notes}
    used = {"hits": entry.hits, "last_used": entry.last_used, "pinned": entry.pinned}
    facts = {"digest": entry.digest, "created": entry.created, "size": entry.size, "signed_by": list(entry.signed_by)}
    return {**facts, **used, **rest}
