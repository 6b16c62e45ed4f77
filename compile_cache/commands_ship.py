"""Commands for entries on their way: keygen, sign, export, import, push, pull."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .bundle import MAX_BYTES, BundleReport
from .commands import (
    AsJson,
    Keys,
    Location,
    Trust,
    bytes_shown,
    full_digests,
    open_cache,
    parse_bytes,
    print_json,
    show_bytes,
)
from .signing import SigningKey

Bundle = Annotated[Path, typer.Argument(help="The bundle: one compressed file.", show_default=False)]
Url = Annotated[str, typer.Argument(help="URL of the remote, such as s3://bucket/cache.", show_default=False)]
PrivateKey = Annotated[Path, typer.Option(help="File of the private key, from keygen.")]


def keygen(
    path: Annotated[Path, typer.Argument(help="File for the private key; the public one is put beside it, as .pub.")],
    as_json: AsJson = False,
) -> None:
    """Make a signing key, and print its public half, which trust is given to."""
    key = SigningKey.generate()
    key.save(path)
    public = path.with_name(path.name + ".pub")
    public.write_text(f"{key.public}\n", "ascii")
    if as_json:
        print_json({"private": str(path), "public": str(public), "key": str(key.public)})
    else:
        print(key.public)


def sign(location: Location, key_file: PrivateKey, key: Keys = None, as_json: AsJson = False) -> None:
    """Sign entries, after a check of every byte of them."""
    signer = SigningKey.load(key_file)
    cache = open_cache(location)
    count = cache.sign(signer, full_digests(cache, key))
    if as_json:
        print_json({"signed": count, "key": str(signer.public)})
    else:
        print(f"{count} entries signed by {signer.public}")


def export_bundle(
    location: Location,
    bundle: Bundle,
    key: Keys = None,
    key_file: Annotated[Path | None, typer.Option(help="Sign the entries in the bundle with this private key.")] = None,
    trust: Trust = None,
    as_json: AsJson = False,
) -> None:
    """Write entries into one compressed file."""
    cache = open_cache(location, trust=trust)
    signer = None if key_file is None else SigningKey.load(key_file)
    with bytes_shown("exporting") as progress:
        report = cache.export_bundle(bundle, full_digests(cache, key), sign_with=signer, progress=progress)
    _print_report(report, "written", bundle, as_json)


def import_bundle(
    location: Location,
    bundle: Bundle,
    trust: Trust = None,
    max_bytes: Annotated[str, typer.Option(help="Refuse a bundle that unpacks to more.")] = f"{MAX_BYTES >> 30}GiB",
    as_json: AsJson = False,
) -> None:
    """Store the entries of a bundle; it is checked in full before anything is stored."""
    cache = open_cache(location, new=True, trust=trust)
    with bytes_shown("importing") as progress:
        report = cache.import_bundle(bundle, max_bytes=parse_bytes(max_bytes), progress=progress)
    _print_report(report, "stored", bundle, as_json)


def push(location: Location, url: Url, key: Keys = None, as_json: AsJson = False) -> None:
    """Copy entries to a remote; what is there already is not sent again."""
    cache = open_cache(location, remote=url)
    with bytes_shown("sending") as progress:
        count = cache.push(full_digests(cache, key), progress=progress)
    _print_moved(count, int(cache.stats.pushed_bytes), "sent to", url, as_json)


def pull(location: Location, url: Url, trust: Trust = None, as_json: AsJson = False) -> None:
    """Fetch entries from a remote that are not here."""
    cache = open_cache(location, new=True, trust=trust, remote=url)
    with bytes_shown("fetching") as progress:
        count = len(cache.pull(progress=progress))
    _print_moved(count, int(cache.stats.pulled_bytes), "fetched from", url, as_json)


def register(app: typer.Typer) -> None:
    """Add these commands."""
    for command in (keygen, sign, push, pull):
        app.command()(command)
    app.command("export")(export_bundle)
    app.command("import")(import_bundle)


def _print_report(report: BundleReport, word: str, bundle: Path, as_json: bool) -> None:
    if as_json:
        counts = {"entries": list(report.entries), "kept": list(report.kept), "bytes": report.bytes}
        print_json({**counts, "bundle": str(bundle), "bundle_bytes": report.size})
        return
    kept = f", {len(report.kept)} were there" if report.kept else ""
    size = f"{show_bytes(report.bytes)} in a bundle of {show_bytes(report.size)}"
    print(f"{len(report.entries)} entries {word}{kept}; {size}")


def _print_moved(count: int, size: int, word: str, url: str, as_json: bool) -> None:
    if as_json:
        print_json({"entries": count, "bytes": size, "url": url})
    else:
        print(f"{count} entries {word} {url}, {show_bytes(size)} transferred")
