"""The command line: ``compile-cache {ls,verify,explain,prune,clean,pin,unpin,keygen,sign,export,import,push,pull}``.

Exit codes: 0 done, 1 the work failed (damage was found, a bundle was refused), 2 bad usage or bad input, with one line
on stderr.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

import typer

from . import commands_limits, commands_look, commands_ship
from .commands import BadInput
from .console import run_app
from .errors import BundleError, CacheWriteError, CompileCacheError, DamagedEntry, RemoteError, one_line

app = typer.Typer(add_completion=False, help="Look at a compile cache, check it, limit it, sign it and ship it.")
for commands in (commands_look, commands_limits, commands_ship):
    commands.register(app)

FAILED = (BundleError, CacheWriteError, DamagedEntry, RemoteError)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; never raises for bad usage, bad input or damage."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *rest, **more: print(
            f"compile-cache: {one_line(message, 1000)}", file=sys.stderr
        )
        return run_app(app, "compile-cache", arguments, bad_input=(BadInput, CompileCacheError), failed=FAILED)


def main() -> None:
    """Console entry point."""
    sys.exit(run())


if __name__ == "__main__":
    main()
