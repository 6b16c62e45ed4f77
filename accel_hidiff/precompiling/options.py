"""The options of `precompile` that concern a deploy file, and which of the others go with one. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from accel_hidiff.errors import BadInput
from accel_hidiff.precompiling.machine import Workers, this_machine, workers
from compile_cache import commands

_FILE_ONLY = ("check", "dry_run", "max_memory")
_BOTH = ("model", "jobs", "target", "as_json")


@dataclass(frozen=True)
class Options:
    """Of the command line.

    Attributes:
        check: only say what is missing.
        dry_run: only estimate.
        target: GPU to compile for, in place of what the file says; None: what it says.
        jobs: compiling processes; None: see `machine.workers`.
        max_memory: bytes of each, as text such as "8GB"; None: see `machine.workers`.
        as_json: JSON on stdout.

    Raises:
        BadInput: options that exclude each other.
    """

    check: bool = False
    dry_run: bool = False
    target: str | None = None
    jobs: int | None = None
    max_memory: str | None = None
    as_json: bool = False

    def __post_init__(self) -> None:
        if self.check and self.dry_run:
            raise BadInput("--check: expected it without --dry-run, got both; the first looks, the second estimates")

    @classmethod
    def of(cls, context: Any, *, file: bool) -> Options:
        """The options of a command line.

        Args:
            context: typer's, of the running command.
            file: it names a deploy file; else a model.

        Raises:
            BadInput: one that does not go with a deploy file, or with a model.
        """
        for name in context.params:
            option = f"--{_NAMES.get(name, name.replace('_', '-'))}"
            if "COMMANDLINE" not in str(context.get_parameter_source(name)) or name in _BOTH:
                continue
            if file and name not in _FILE_ONLY:
                raise BadInput(f"{option}: expected no such option with a deploy file, got it; say it in the file")
            if not file and name in _FILE_ONLY:
                raise BadInput(f"{option}: expected a deploy file (.toml) with it, got a model; see docs/deploy.md")
        return cls(**{name: context.params[name] for name in (*_FILE_ONLY, "jobs", "target", "as_json")})

    def workers(self) -> Workers:
        """The compiling processes that they ask for on this machine."""
        try:
            memory = None if self.max_memory is None else commands.parse_bytes(self.max_memory)
        except commands.BadInput as problem:
            raise BadInput(f"--max-memory: {problem}") from problem
        return workers(this_machine(), self.jobs, memory)


_NAMES = {"as_json": "json"}
