"""Entries with a number each, for tests of what many of them become."""

from __future__ import annotations

import os
import random

from compile_cache import CacheKey


def key(n):
    return CacheKey({"n": n})


def data(n):
    return {"one": random.Random(n).randbytes(3000), "two": b"shared"}


def writes(n):
    def build(directory):
        for name, content in data(n).items():
            (directory / name).write_bytes(content)

    return build


def fill(cache, *numbers):
    for n in numbers:
        cache.get_or_build(key(n), writes(n))
    return cache


def right(entry, n):
    return {name: entry.read(name) for name in entry.files} == data(n)


def kept(cache):
    """The numbers of the entries that are there."""
    return [n for n in range(60) if key(n).digest in set(cache.digests())]


def set_used(cache, n, moment):
    """Say when an entry was used last; its record is as old."""
    digest = key(n).digest
    for path in (f"used/{digest[:2]}/{digest}", f"actions/{digest[:2]}/{digest}.json"):
        os.utime(cache.location / "v1" / path, (moment, moment))
