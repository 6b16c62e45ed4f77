"""`accel-hidiff precompile deploy.toml`: check, estimate or compile everything in a deploy file."""

from __future__ import annotations

import json
import logging
import shlex
import sys
import warnings

from rich.console import Console
from rich.table import Table

from accel_hidiff.compiling.pool import CompilePool
from accel_hidiff.deploy import load_deployment
from accel_hidiff.errors import CompileFailed
from accel_hidiff.precompiling.check import check, estimate
from accel_hidiff.precompiling.estimate import Estimator, samples_of
from accel_hidiff.precompiling.machine import Workers
from accel_hidiff.precompiling.options import Options
from accel_hidiff.precompiling.plan import Plan, costs_of, make_plan
from accel_hidiff.precompiling.run import run
from accel_hidiff.precompiling.table import shown
from compile_cache.errors import one_line


def precompile_file(file: str, options: Options) -> int:
    """Does what the options say with a deploy file; reports on stdout, progress on stderr.

    Args:
        file: its path.
        options: of the command line.

    Returns:
        The exit code: 0; or 1 where `check` found something missing.

    Raises:
        BadInput, CompileCacheError: the file, a model or the cache is not what it should be.
        CompileFailed: artifacts could not be compiled, and the report is on stdout by then; or Ctrl-C was pressed.
    """
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *rest, **more: print(one_line(message, 1000), file=sys.stderr)
        return _precompile(file, options)


def _precompile(file: str, options: Options) -> int:
    deployment = load_deployment(file)
    if options.target is not None:
        deployment = deployment.for_target(options.target)
    chosen = options.workers()
    plan = make_plan(shlex.quote(file), deployment, storing=not options.check)
    if options.check:
        report = check(plan)
        _tell(options, report.to_json(), None, [str(report)])
        return 0 if report.ready else 1
    if options.dry_run:
        foreseen = estimate(plan, chosen.jobs)
        _tell(options, foreseen.to_json(), foreseen.table(), foreseen.lines())
        return 0
    _compile(plan, chosen, options)
    return 0


def _compile(plan: Plan, chosen: Workers, options: Options) -> None:
    console = Console(stderr=True)
    log = logging.getLogger("accel_hidiff")
    if not log.hasHandlers():
        log.addHandler(logging.NullHandler())  # each failure gets its line below
    estimator = Estimator(samples_of(plan.cache))
    costs = [costs_of(model, estimator) for model in plan.models]
    rows = [
        (model.name, len(model.needed.distinct) - len(model.missing), cost)
        for model, cost in zip(plan.models, costs, strict=True)
        if not model.note
    ]
    pool = CompilePool(chosen.jobs, max_memory=chosen.max_memory, niceness=0)
    try:
        with shown(console, rows, chosen.jobs) as board, pool:
            report = run(plan, pool, costs, board)
    except KeyboardInterrupt:
        raise CompileFailed(
            "stopped; what was compiled until now is in the cache, and the same command goes on from there"
        ) from None
    _tell(options, report.to_json(), report.table(), report.lines())
    report.raise_failed()


def _tell(options: Options, value: object, table: Table | None, lines: list[str]) -> None:
    if options.as_json:
        print(json.dumps(value, indent=1))
        return
    if table is not None:
        Console().print(table)
    for line in lines:
        print(line)
