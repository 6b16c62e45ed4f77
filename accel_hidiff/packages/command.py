"""`accel-hidiff inspect CACHE`: what the packages in a compile cache hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from accel_hidiff.errors import BadInput
from accel_hidiff.files import whole_file
from compile_cache.commands import open_cache


def inspect(
    cache: Annotated[Path, typer.Argument(help="Directory of the compile cache.", show_default=False)],
    scale: Annotated[
        int, typer.Option(help="Count bytes for images so many times higher and wider than those compiled with.")
    ] = 4,
    markdown: Annotated[Path | None, typer.Option(help="A file for the table, as Markdown.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Show what compiled packages hold: kernels, passes over memory, layouts, registers, operators. Loads none."""
    from accel_hidiff.packages.report import inspect as look
    from accel_hidiff.packages.report import markdown as as_markdown
    from accel_hidiff.packages.report import table

    if scale < 1:
        raise BadInput(f"--scale: expected a number of at least 1, got {scale}")
    rows = look(open_cache(cache), scale)
    if markdown is not None:
        with whole_file(markdown) as part:
            part.write_text(as_markdown(rows), encoding="utf-8")
    if as_json:
        print(json.dumps([row.to_json() for row in rows], indent=1))
    elif rows:
        Console(width=200).print(table(rows))
    else:
        print(f"no packages of AOTInductor in {cache}")
