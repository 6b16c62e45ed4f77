"""What the compile cache costs with 10, 1,000 and 100,000 entries: opening, finding, missing, explaining, storing.

Method. Each cache is filled with entries of one small file that all of them share (what is measured is the number of
entries, not of bytes): 10 are stored by `get_or_build`, the rest by writing the very records that it writes, without
flushing each to the disk. Then, per cache and interleaved among the caches:

- `open_us`: `CompileCache(location)`;
- `hit_us`: `get` of a key that is there, every byte of record and file checked, in random order over all entries;
- `miss_us`: `get` of keys that are not there;
- `store_us`: `get_or_build` of a new key with a build that writes 4 KiB, flushed to the disk (this disk's speed);

and once per cache, in milliseconds: `explain_ms` of a missing key (bounded by design: it looks at records for 0.25 s),
`limits_ms` (a look at all entries by `prune(dry_run=True)`), and `ls_ms` (all entries listed).
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from itertools import count
from pathlib import Path

from benchmarks import harness as h
from compile_cache import CacheKey, CompileCache
from compile_cache.records import Record, encode_record

ENTRIES = (10, 1_000, 100_000)
STORED = 10  # by get_or_build
CALLS = 200  # per timed turn
STORES = 10
_new = count()


def key(number: int | str) -> CacheKey:
    """A key with as many factors as a compiled region has."""
    environment = {"torch": "2.13.0", "device": "cpu", "flags": [f"flag{i}" for i in range(60)]}
    shapes = {name: {"minimum": 16, "maximum": 512, "multiple": 8} for name in ("height", "width", "batch")}
    return CacheKey({"number": number, "environment": environment, "shapes": shapes, "options": {"threads": True}})


def build(directory: Path) -> None:
    """4 KiB."""
    (directory / "code.so").write_bytes(b"x" * 4096)


def filled(location: Path, entries: int) -> CompileCache:
    """Setup: a cache of so many entries."""
    cache = CompileCache(location)
    for number in range(STORED):
        cache.get_or_build(key(number), build)
    pattern = cache.get(key(0))
    if pattern is None:
        raise h.WrongOutput("expected a stored entry, got none")
    for number in range(STORED, entries):
        digest = key(number).digest
        path = location / "v1/actions" / digest[:2] / f"{digest}.json"
        path.parent.mkdir(exist_ok=True)
        record = Record(digest, key(number).factors, dict(pattern.files), {}, pattern.created)
        path.write_bytes(encode_record(record))
    if (found := sum(1 for _ in cache.digests())) != entries:
        raise h.WrongOutput(f"expected {entries} entries, got {found}")
    return cache


def hits(cache: CompileCache, entries: int) -> Callable[[], None]:
    keys = [key(number) for number in random.Random(0).choices(range(entries), k=CALLS)]

    def turn() -> None:
        if not all(cache.get(one) for one in keys):
            raise h.WrongOutput("expected every key to be there")

    return turn


def misses(cache: CompileCache) -> Callable[[], None]:
    keys = [key(f"missing {number}") for number in range(CALLS)]

    def turn() -> None:
        if any(cache.get(one) for one in keys):
            raise h.WrongOutput("expected no key to be there")

    return turn


def opens(location: Path) -> Callable[[], None]:
    def turn() -> None:
        for _ in range(CALLS):
            CompileCache(location)

    return turn


def stores(cache: CompileCache) -> Callable[[], None]:
    def turn() -> None:
        for _ in range(STORES):
            cache.get_or_build(key(f"new {next(_new)}"), build)

    return turn


def main() -> None:
    options = h.parsed(h.arguments(__doc__, repeats=9))
    sizes = (10, 100) if options.tiny else ENTRIES
    report = h.Report(options.out, options.tiny)
    with ExitStack() as stack:
        runs: dict[str, Callable[[], None]] = {}
        caches = {}
        for entries in sizes:
            location = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "cache"
            caches[entries] = cache = filled(location, entries)
            runs[f"{entries} hit"] = hits(cache, entries)
            runs[f"{entries} miss"] = misses(cache)
            runs[f"{entries} open"] = opens(location)
            runs[f"{entries} store"] = stores(cache)
        once = {}
        for entries, cache in caches.items():
            missing = key("asked for")
            once[entries] = {
                "explain_ms": h.timed(lambda: cache.explain(missing))[0] * 1e3,  # noqa: B023
                "limits_ms": h.timed(lambda: cache.prune(max_bytes=1 << 50, dry_run=True))[0] * 1e3,  # noqa: B023
                "ls_ms": h.timed(lambda: sum(1 for _ in cache.entries()))[0] * 1e3,  # noqa: B023
            }
        times = h.interleave(runs, options.repeats, warmup=1)
        for entries in sizes:
            fields = {}
            for name, calls in (("open", CALLS), ("hit", CALLS), ("miss", CALLS), ("store", STORES)):
                fields |= times[f"{entries} {name}"].fields(name, "us", calls)
            report.add(entries=entries, **fields, **{name: h.rounded(value) for name, value in once[entries].items()})


if __name__ == "__main__":
    main()
