"""A GPU machine for a quarter of an hour: SDXL in full size, packages that were compiled without one.

On a machine without a GPU, in the environment that compiled them, what is to be compared is packed: compile caches of
one or several variants, and wheels of what the other machine lacks. Refused is what does not serve every size, or is
too much to carry:

    python -m benchmarks.gpu.quarter_hour --pack luggage --wheels ./wheels \\
        --variant head=./cache --variant idea=./other-cache@../other-checkout

On the GPU machine, from the root of the repository, nothing installed but torch, Triton and transformers:

    python -m benchmarks.gpu.quarter_hour --carried luggage --out benchmarks/results/gpu/h200.jsonl --minutes 9

`--dry-run` does both on a CPU with tiny models. Every figure is on disk as soon as it is measured (JSON lines, and a
page beside them in the end); a case has a limit of its own, and says why it did not end well. `--render FILE` writes
the page anew. The exit code is 1 if a case was wrong, failed or late.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

if not __package__:  # run as a file: its own folder must not hide modules, the root has the packages
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.gpu import journal
from benchmarks.gpu.carried import BadLuggage, Package, pack, read_listing, unpack
from benchmarks.gpu.journal import DONE, FACTS, SKIPPED, Journal
from benchmarks.gpu.page import render
from benchmarks.gpu.programme import BY_NAME, chosen
from benchmarks.gpu.setting import FULL, TINY, Variant
from benchmarks.gpu.supervisor import ROOT, Supervisor

_GPU_FILES: Final = ("/dev/nvidiactl", "/dev/dxg")  # of NVIDIA's driver on Linux, and of Linux under Windows
_OUT: Final = Path("bench-out", "quarter_hour.jsonl")
_MODES: Final = ("pack", "carried", "dry_run", "render")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code."""
    parser = _arguments()
    options = parser.parse_args(arguments)
    if sum(bool(getattr(options, mode)) for mode in _MODES) != 1:
        parser.error("expected one of --pack, --carried, --dry-run and --render; --help shows a run")
    try:
        if options.render:
            _write_page(options.render)
            return 0
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
            if options.pack:
                return _pack(options, Path(scratch))
            if options.dry_run:
                _pack_tiny(options, Path(scratch))
            return _run(options, Path(scratch))
    except (BadLuggage, ValueError) as problem:
        parser.error(str(problem))


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pack", type=Path, metavar="DIR", help="write what is carried to this folder")
    parser.add_argument(
        "--variant", action="append", default=[], metavar="NAME=CACHE[@CHECKOUT]",
        help="repeatable: a compile cache, and the checkout that filled it if it is not this one",
    )  # fmt: skip
    parser.add_argument("--target", default="sm_90", help="what the caches were compiled for")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="wheels to carry")
    parser.add_argument("--carried", type=Path, metavar="DIR", help="measure with what --pack wrote")
    parser.add_argument("--dry-run", action="store_true", help="pack and measure tiny models on this CPU")
    parser.add_argument("--render", type=Path, metavar="FILE", help="write the page of a file of records anew")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", default=_OUT, help=f"JSON lines to write, and the page beside them; {_OUT}"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="after which nothing runs any more")
    parser.add_argument("--only", metavar="STAGE[,STAGE]", help=f"of {', '.join(BY_NAME)}")
    return parser


def _pack(options: argparse.Namespace, scratch: Path) -> int:
    variants: dict[Variant, list[Package]] = {}
    trees: dict[str, Path] = {}
    for number, text in enumerate(options.variant):
        name, _, place = text.partition("=")
        cache, _, checkout = place.partition("@")
        if not name.isidentifier() or not cache:
            raise BadLuggage(f"--variant: expected NAME=CACHE, a name of letters and digits, got {text!r}")
        found = _listed(name, Path(cache), Path(checkout or ROOT), options.target, scratch / str(number))
        if twice := {variant.name for variant in variants} & {variant.name for variant in found}:
            raise BadLuggage(f"--variant: expected a name of its own for each, got {', '.join(sorted(twice))} twice")
        if checkout:
            trees[name] = Path(checkout)
        variants |= {replace(variant, tree=name if checkout else ""): packages for variant, packages in found.items()}
    if not any(not variant.tree for variant in variants):
        raise BadLuggage("--pack: expected a --variant NAME=CACHE of this checkout with it, got none")
    wheels = sorted(options.wheels.glob("*.whl")) if options.wheels else []
    size = pack(options.pack, variants, wheels, ROOT, trees)
    names = ", ".join(f"{variant.name} ({len(packages)} packages)" for variant, packages in variants.items())
    print(f"{options.pack}: {names}, {len(wheels)} wheels; with the repository {size / 2**20:.1f} MiB")
    return 0


def _listed(name: str, cache: Path, checkout: Path, target: str, folder: Path) -> dict[Variant, list[Package]]:
    """The variants in a cache, as its own checkout finds them."""
    command = [sys.executable, "-m", "benchmarks.gpu.listing", name, str(cache.resolve()), target, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve()), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        raise BadLuggage(f"--variant {name}: {said[-1] if said else 'its checkout said nothing'}")
    return read_listing(folder)


def _pack_tiny(options: argparse.Namespace, scratch: Path) -> None:
    """Compiles the tiny models for this CPU and packs them as for another machine, also as another checkout's."""
    cache = Path(options.variant[0].partition("=")[2]) if options.variant else scratch / "cache"
    variants = _listed("tiny", cache, ROOT, "cpu", scratch / "listing")
    again = {replace(variant, name="again", tree="again"): packages for variant, packages in variants.items()}
    options.carried = scratch / "luggage"
    pack(options.carried, variants | again, (), ROOT, {"again": ROOT})


def _run(options: argparse.Namespace, scratch: Path) -> int:
    variants = unpack(options.carried, scratch)
    plain = TINY if options.dry_run else FULL
    if plain.device == "cuda" and not any(map(os.path.exists, _GPU_FILES)):
        raise BadLuggage("--carried: expected a GPU on this machine, found none; --dry-run measures on a CPU")
    setting = replace(plain, variants=variants, carried=str(scratch), caches=str(scratch / "caches"))
    tasks = chosen(setting, options.only)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.unlink(missing_ok=True)
    began = time.time()
    book = Journal(options.out, began)
    command = "python -m benchmarks.gpu.quarter_hour " + shlex.join(_shown(sys.argv[1:]))
    book.write(FACTS, figures={"command": command, "date": datetime.now(UTC).isoformat(timespec="seconds")})
    try:
        Supervisor(setting, book, began + 60 * options.minutes, [scratch / "site"]).run(tasks)
    finally:
        _write_page(options.out)
    over = list(journal.ends(journal.read(options.out)))
    for line in over:
        print(f"{line.event:8} {line.took_s:6.1f} s  {line.stage} {' '.join(line.case.values())}  {line.reason}")
    print(f"records: {options.out}; page: {options.out.with_suffix('.md')}")
    return 0 if all(line.event in (DONE, SKIPPED) for line in over) else 1


def _shown(words: Sequence[str]) -> list[str]:
    """Arguments without the places that they name."""
    return [Path(word).name if "/" in word else word for word in words]


def _write_page(path: Path) -> None:
    text = render(journal.read(path))
    path.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
