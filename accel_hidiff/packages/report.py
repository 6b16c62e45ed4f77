"""What the packages of a compile cache hold, as a table: `accel-hidiff inspect`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from rich.table import Table

from accel_hidiff.packages.facts import read_package
from compile_cache import CompileCache, Entry

_PACKAGE: Final = "package.pt2"
_SIDES: Final = (2, 3)  # height and width of an image (N, C, H, W)


@dataclass(frozen=True)
class PackageRow:
    """One package.

    Attributes:
        artifact: first digits of its file's SHA-256.
        region, dtype: what it computes, and in what.
        image: sizes of its image input that bytes are counted for.
        made_for, tuned: the profile that it was compiled for and how its kernels' configurations were chosen; "" on a
            CPU.
        kernels, calls: Triton kernels, and how often they are called.
        externs: operator -> calls: products, convolutions, attention.
        moved_mb, least_mb, over_least: megabytes (10^6) that kernels read and write, the least possible, and their
            ratio; products, convolutions and attention are not in them (see `facts.Passes`).
        transposed_share: share, 0..1, of the moved bytes that kernels move which read along one axis and write along
            another.
        flat_convolutions: convolutions over NCHW images.
        int64_kernels: that work out indices in 64 bits.
        divisions: by run-time values for each number, in all kernels.
        registers, stack_bytes: the most that a thread has, and spills.
        size_mb: of the file.
    """

    artifact: str
    region: str
    dtype: str
    image: tuple[int, ...]
    made_for: str
    tuned: str
    kernels: int
    calls: int
    externs: Mapping[str, int]
    moved_mb: float
    least_mb: float
    over_least: float
    transposed_share: float
    flat_convolutions: int
    int64_kernels: int
    divisions: int
    registers: int
    stack_bytes: int
    size_mb: float

    def to_json(self) -> dict[str, Any]:
        """A plain JSON mapping."""
        return asdict(self)


def inspect(cache: CompileCache, scale: int = 4) -> list[PackageRow]:
    """A row for each package in a cache, by region, dtype and size.

    Args:
        cache: what to look into.
        scale: images are so many times higher and wider than those that a symbolic package was compiled with.

    Raises:
        CompileFailed: a package whose source has another form than the known ones.
    """
    found: dict[str, PackageRow] = {}
    for entry in _packages(cache):
        digest = entry.files[_PACKAGE].sha256
        if digest not in found:
            found[digest] = _row(entry, digest, scale)
    return sorted(found.values(), key=lambda row: (row.made_for, row.dtype, row.region, row.image, row.artifact))


def table(rows: Sequence[PackageRow]) -> Table:
    """As a rich table."""
    shown = Table(box=None, pad_edge=False)
    for name in ("package", "region", "image", "made for"):
        shown.add_column(name, overflow="fold")
    right = (
        "kernels",
        "calls",
        "MB moved",
        "/ least",
        "transposed",
        "NCHW",
        "int64",
        "divisions",
        "regs",
        "spill B",
        "MB",
    )
    for name in right:
        shown.add_column(name, justify="right")
    shown.add_column("products, convolutions, attention", overflow="fold")
    for row in rows:
        numbers = (
            row.kernels, row.calls, f"{row.moved_mb:.1f}", f"{row.over_least:.2f}", f"{row.transposed_share:.0%}",
            row.flat_convolutions, row.int64_kernels, row.divisions, row.registers, row.stack_bytes,
            f"{row.size_mb:.2f}",
        )  # fmt: skip
        externs = ", ".join(f"{count} {name}" for name, count in row.externs.items())
        image = "x".join(map(str, row.image))
        shown.add_row(row.artifact, f"{row.region} {row.dtype}", image, row.made_for, *map(str, numbers), externs)
    return shown


def markdown(rows: Sequence[PackageRow]) -> str:
    """As a Markdown table."""
    head = (
        "region", "image", "kernels", "calls", "MB moved", "/ least", "transposed", "NCHW conv.", "int64", "divisions",
        "registers", "spilled B", "MB", "products, convolutions, attention",
    )  # fmt: skip
    lines = [f"| {' | '.join(head)} |", f"| --- | --- |{' ---: |' * (len(head) - 3)} --- |"]
    for row in rows:
        externs = ", ".join(f"{count} {name.strip('_')}" for name, count in row.externs.items())
        cells = (
            f"{row.region} {row.dtype}", "x".join(map(str, row.image)), row.kernels, row.calls, f"{row.moved_mb:.1f}",
            f"{row.over_least:.2f}", f"{row.transposed_share:.0%}", row.flat_convolutions, row.int64_kernels,
            row.divisions, row.registers, row.stack_bytes, f"{row.size_mb:.2f}", externs,
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def _packages(cache: CompileCache) -> Iterator[Entry]:
    for entry in cache.entries():
        if _PACKAGE in entry.files and "inputs" in entry.notes:
            yield entry


def _row(entry: Entry, digest: str, scale: int) -> PackageRow:
    notes: Mapping[str, Any] = entry.notes
    inputs = [_scaled(sizes, dtype, strides, notes["serves"], scale) for sizes, dtype, strides in notes["inputs"]]
    facts = read_package(Path(entry.path) / _PACKAGE, inputs)
    passes = facts.passes()
    calls = [call for call in facts.wrapper.calls if call.kind == "triton"]
    return PackageRow(
        artifact=digest[:12],
        region=str(notes["region"]),
        dtype=str(inputs[0][1]).removeprefix("torch."),
        image=tuple(inputs[0][0]),
        made_for=str(notes.get("made_for", "")),
        tuned=str(notes.get("tuned", "")),
        kernels=len(facts.kernels),
        calls=len(calls),
        externs=dict(sorted(facts.externs.items())),
        moved_mb=round(passes.triton_bytes / 1e6, 3),
        least_mb=round(passes.least_bytes / 1e6, 3),
        over_least=passes.over_least,
        transposed_share=round(passes.transposed_bytes / passes.triton_bytes, 3) if passes.triton_bytes else 0.0,
        flat_convolutions=sum(not call.arguments[0].channels_last for call in facts.convolutions if call.arguments[0]),
        int64_kernels=sum(kernel.int64 for kernel in facts.kernels.values()),
        divisions=sum(kernel.divisions for kernel in facts.kernels.values()),
        registers=facts.registers,
        stack_bytes=facts.stack_bytes,
        size_mb=round(facts.size / 1e6, 3),
    )


def _scaled(
    sizes: Sequence[int], dtype: str, strides: Sequence[int], serves: Mapping[str, Any], scale: int
) -> tuple[tuple[int, ...], str, tuple[int, ...]]:
    """An input with larger sides, where the package serves them; its layout stays what it is."""
    symbolic = [serves[side]["minimum"] < serves[side]["maximum"] for side in ("height", "width") if side in serves]
    if len(sizes) != len(_SIDES) + 2 or not all(symbolic):
        return tuple(sizes), dtype, tuple(strides)
    batch, channels, height, width = sizes[0], sizes[1], sizes[2] * scale, sizes[3] * scale
    last = (height * width * channels, 1, width * channels, channels)
    flat = (channels * height * width, height * width, width, 1)
    return (batch, channels, height, width), dtype, last if strides[1] == 1 else flat
