"""Explanations and reports: which graph runs at which step, from where, and what a precompilation did."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class ExplainRow:
    """One phase of a request, or the VAE decoder after it.

    Attributes:
        steps: "[start, stop)".
        topology: its name.
        bucket: the sizes that its graphs serve.
        key: first digits of the graph key, for display.
        regions, artifacts: regions that the graph covers, distinct artifacts that serve them.
        state: "loaded", "cached", "missing n of m artifacts", "compiles at start" or "eager".
        reason: why something is missing.
    """

    steps: str
    topology: str
    bucket: str
    key: str
    regions: int
    artifacts: int
    state: str
    reason: str = ""


@dataclass(frozen=True)
class Explanation:
    """The table of a request; `print` it.

    Attributes:
        height, width: image size in pixels.
        num_steps: steps that run.
        model: the family, and what it was told from.
        rows: one for each phase, ControlNet and decoder.
        notice: what the size costs, if it does.
        made_elsewhere: that artifacts were made for another device of this architecture, if they were.
    """

    height: int
    width: int
    num_steps: int
    model: str
    rows: tuple[ExplainRow, ...]
    notice: str | None = None
    made_elsewhere: str | None = None

    @property
    def ready(self) -> bool:
        """True if the request can be served without compiling."""
        return all(row.state in ("loaded", "cached", "eager") for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """A plain JSON mapping."""
        return {**asdict(self), "ready": self.ready}

    def table(self) -> Table:
        """As a rich table."""
        table = Table(title=f"{self.width}x{self.height}, {self.num_steps} steps, {self.model}", title_justify="left")
        for column in ("steps", "topology", "bucket", "graph", "regions", "artifacts", "state"):
            table.add_column(column, overflow="fold")
        for row in self.rows:
            counts = str(row.regions), str(row.artifacts)
            table.add_row(row.steps, row.topology, row.bucket, row.key, *counts, row.state)
        return table

    def __str__(self) -> str:
        text = _render(self.table())
        reasons = dict.fromkeys(row.reason for row in self.rows if row.reason)
        reasons |= {notice: None for notice in (self.notice, self.made_elsewhere) if notice is not None}
        return text + "".join(f"{reason}\n" for reason in reasons)


@dataclass(frozen=True)
class PrecompileEvent:
    """Progress of precompiling: artifact `number` of `total` is ready, or about to be made (`state` "compiling")."""

    number: int
    total: int
    region: str
    state: str
    seconds: float = 0.0


@dataclass(frozen=True)
class PrecompileReport:
    """What a precompilation did.

    Attributes:
        graphs: UNet graphs (size x topology) and VAE decoders that are servable now.
        regions: region calls in them.
        artifacts: distinct artifacts that serve all of them.
        compiled, found: of these, compiled now, and found in the cache.
        bytes: size of the artifacts.
        seconds: wall time.
    """

    graphs: int
    regions: int
    artifacts: int
    compiled: int
    found: int
    bytes: int
    seconds: float

    @property
    def shared(self) -> int:
        """Region calls that needed no artifact of their own."""
        return self.regions - self.artifacts

    def to_json(self) -> dict[str, Any]:
        """A plain JSON mapping."""
        return {**asdict(self), "shared": self.shared}

    def table(self) -> Table:
        """As a rich table."""
        table = Table()
        names = ("graphs", "region calls", "artifacts", "shared", "compiled", "found in cache", "MB", "seconds")
        for name in names:
            table.add_column(name, justify="right")
        numbers = self.graphs, self.regions, self.artifacts, self.shared, self.compiled, self.found
        table.add_row(*map(str, numbers), f"{self.bytes / 1e6:.1f}", f"{self.seconds:.1f}")
        return table

    def __str__(self) -> str:
        return _render(self.table())


def _render(table: Table) -> str:
    out = io.StringIO()
    Console(file=out, width=140).print(table)
    return out.getvalue()
