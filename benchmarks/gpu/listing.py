"""What a compile cache holds for a run: `python -m benchmarks.gpu.listing NAME CACHE TARGET FOLDER`, without weights.

Run in the checkout that filled the cache: keys hold its sources. TARGET "cpu" lists the tiny models, and compiles what
the cache lacks of them. A cache may serve several dtypes and memory formats, each of which is a variant.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any, Final

import torch

import accel_hidiff as ah
from accel_hidiff.errors import AccelHiDiffError
from accel_hidiff.models import load_skeleton
from accel_hidiff.target import Target
from benchmarks import harness as h
from benchmarks.gpu.carried import LISTING
from benchmarks.gpu.lab import BATCHES, packages_in
from benchmarks.gpu.model import ARCHITECTURE, make_unet, make_vae, pipeline_of
from benchmarks.gpu.setting import FULL, TINY, Variant
from compile_cache import CompileCache, CompileCacheError

_DTYPES: Final = ("bfloat16", "float16", "float32")
_PARTS: Final = ("dtype", "memory_format")  # of a variant's name, where a cache has several
_FORMATS: Final = ("channels_last", "contiguous")


def main() -> int:
    """The exit code; the last line of stderr says what is wrong."""
    name, cache, target, folder = sys.argv[1:]
    try:
        if target == "cpu":
            write(name, CompileCache(cache), None, Path(folder))
        elif not Path(cache).is_dir():
            raise LookupError(f"expected a compile cache, found no folder {cache}")
        else:
            write(name, CompileCache(cache), Target.parse(target), Path(folder))
    except (AccelHiDiffError, CompileCacheError, LookupError) as problem:
        print(str(problem).splitlines()[0], file=sys.stderr)
        return 1
    return 0


def write(name: str, cache: CompileCache, target: Target | None, folder: Path) -> None:
    """Writes the variants of a cache to a folder: a listing, and the files that it names.

    Raises:
        LookupError: it serves every size in no dtype and memory format.
    """
    found, closest = [], ""
    fewest = sys.maxsize
    for variant, handle in _ways(name, cache, target):
        packages, lacking = packages_in(cache, handle, (FULL if target else TINY).all_pixels, target)
        if not lacking:
            found.append((variant, packages))
        elif len(lacking) < fewest:
            fewest = len(lacking)
            closest = f"{len(lacking)} lack in {variant.dtype}, {variant.memory_format}: {lacking[0]} and others"
    if not found:
        raise LookupError(f"expected {cache.location} to serve every size of the run, {closest}; precompile them")
    rows = []
    several = [len({getattr(variant, part) for variant, _ in found}) > 1 for part in _PARTS]
    for variant, packages in found:
        parts = (getattr(variant, part) for part, tells in zip(_PARTS, several, strict=True) if tells)
        named = "_".join([variant.name, *parts])
        row: dict[str, Any] = {**asdict(variant), "name": named, "packages": []}
        for package in packages:
            place = folder / named / package.slot
            place.mkdir(parents=True)
            for file, source in package.files.items():
                shutil.copy(source, place / file)
            row["packages"].append({"slot": package.slot, "key": package.key, "notes": dict(package.notes)})
        rows.append(row)
    (folder / LISTING).write_text(json.dumps(rows), encoding="utf-8")


def _ways(name: str, cache: CompileCache, target: Target | None) -> Iterator[tuple[Variant, ah.Handle]]:
    """The dtypes and memory formats that may be in a cache, each with a handle on a pipeline of it."""
    settings: dict[str, Any] = {"hidiffusion": ah.HiDiffusionConfig(), "cache": cache}
    if target is None:
        device, dtype = torch.device("cpu"), torch.float32
        pipe = pipeline_of(make_unet(True, device, dtype), make_vae(True, device, dtype))
        handle = ah.accelerate(pipe, **settings)
        handle.precompile(TINY.all_pixels, h.NUM_STEPS, batch_sizes=BATCHES)
        yield Variant(name, "float32", "channels_last"), handle
        return
    for dtype_name, memory_format in product(_DTYPES, _FORMATS):
        skeleton, meant_for = load_skeleton(ARCHITECTURE, dtype_name, elsewhere=True)
        handle = ah.accelerate(skeleton, target=target, memory_format=memory_format, **settings)
        handle.meant_for = meant_for
        yield Variant(name, dtype_name, memory_format), handle


if __name__ == "__main__":
    sys.exit(main())
