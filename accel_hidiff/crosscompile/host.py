"""The code of a package that runs on the CPU: for the target's instruction set, and without this machine's paths."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final
from unittest import mock

_PATHLESS: Final = ("Wno-builtin-macro-redefined", "D__FILE__='\"package\"'")  # else it is in each error's text
_SIMD_BITS: Final = {"x86-64-v2": 1, "x86-64-v3": 256, "x86-64-v4": 512}  # of its vectors; 1: none


@contextmanager
def compiling_for_host(host: str) -> Iterator[None]:
    """g++ is told the host's instructions in the place of this machine's, inside of the block.

    Args:
        host: one of `compile_cache.environment.HOST_LEVELS`, or a machine's name, which is left to the compiler.
    """
    from torch._inductor import config, cpp_builder

    plain = cpp_builder._get_optimization_cflags

    def flags(*args: Any, **kwargs: Any) -> tuple[list[str], list[str]]:
        compiling, linking = plain(*args, **kwargs)
        march = [f"march={host}" if flag == "march=native" and host in _SIMD_BITS else flag for flag in compiling]
        return [*march, *_PATHLESS], [*linking, "s", "Wl,--build-id=none"]  # and no table of local names

    vectors = {"cpp.simdlen": _SIMD_BITS[host], "cpp.vec_isa_ok": True} if host in _SIMD_BITS else {}
    with mock.patch.object(cpp_builder, "_get_optimization_cflags", flags), config.patch(vectors):
        yield
