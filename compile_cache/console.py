"""How a command line of this project runs: exit codes, and one line on stderr instead of a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Final

import typer

from .errors import one_line

_INTERRUPTED: Final = 130  # what typer returns after Ctrl-C


def run_app(
    app: typer.Typer,
    name: str,
    arguments: Sequence[str] | None,
    *,
    bad_input: tuple[type[Exception], ...],
    failed: tuple[type[Exception], ...],
) -> int:
    """Run one command of a typer app and return its exit code.

    Args:
        app: the commands.
        name: the program's name, in front of every message.
        arguments: the command line without the program; None: that of the process.
        bad_input: exceptions that mean bad usage or bad input: exit code 2.
        failed: exceptions that mean that the work failed: exit code 1. They are looked at first.
    """
    command = typer.main.get_command(app)
    try:
        outcome = command.main(arguments, prog_name=name, standalone_mode=False)
        sys.stdout.flush()
    except failed as error:
        return complain(name, error, 1)
    except (KeyboardInterrupt, typer.Abort):  # of releases of typer that let them through
        return complain(name, "interrupted", 1)
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except bad_input as error:
        return complain(name, error, 2)
    except OSError as error:
        return complain(name, f"expected to read and write files, got {error}; check paths, permissions and space", 1)
    except Exception as error:
        message = getattr(error, "format_message", None)  # a usage error of the parser; its class is not public
        if message is None:
            raise
        return complain(name, f"{message()} Try {name} --help.", 2)
    if outcome == _INTERRUPTED:
        return complain(name, "interrupted", 1)
    return outcome if isinstance(outcome, int) else 0


def complain(name: str, message: object, code: int = 0) -> int:
    """Print one line on stderr; returns `code`."""
    print(f"{name}: {one_line(message, 1000)}", file=sys.stderr)
    return code
