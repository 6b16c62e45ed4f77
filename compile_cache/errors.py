"""The errors and the warning of :mod:`compile_cache`.

The text of every one of them is a single line that says what was expected, what came, and what to do.
"""

from __future__ import annotations


class CompileCacheError(Exception):
    """Base class: catch this to catch every error that the cache raises on its own account."""


class UnstableFactor(CompileCacheError):
    """A key factor (or a note) has no stable JSON form, so the same fact could give two different keys."""


class CacheLocationError(CompileCacheError):
    """The location cannot be a cache directory: it is empty, is a file, or lies below a file."""


class CacheWriteError(CompileCacheError):
    """Nothing can be stored: opened read-only, no permission, a read-only file system, or a full disk."""


class DamagedEntry(CompileCacheError):
    """Bytes that were stored earlier are missing or are no longer the same bytes."""


class BuildFailed(CompileCacheError):
    """A build callback returned without an error, but what it left cannot be stored."""


class TrustError(CompileCacheError):
    """A key cannot be used, or an entry cannot be stored in a cache that only loads signed ones."""


class BundleError(CompileCacheError):
    """A bundle is refused: damaged, tampered with, unsigned where a signature is needed, or larger than allowed."""


class RemoteError(CompileCacheError):
    """The remote cannot be used: its URL, its answers, or its files."""


class DamagedEntryWarning(UserWarning):
    """A damaged entry was found and is treated as missing."""


class UntrustedEntryWarning(UserWarning):
    """An entry that no trusted key signed was found and is treated as missing."""


class RemoteWarning(UserWarning):
    """The remote does not answer, or answers with damage; the cache goes on without it."""


class PermissionsWarning(UserWarning):
    """Other users may change what the cache holds."""


def one_line(value: object, limit: int = 200) -> str:
    """Return ``str(value)`` with every run of white space made one space, cut to at most ``limit`` characters."""
    text = " ".join(str(value).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."
