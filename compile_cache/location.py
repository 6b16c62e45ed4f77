"""The directory of a cache, before anything is read from it: is it one, and who can change it?"""

from __future__ import annotations

import os
import stat
import warnings
from pathlib import Path

from .errors import CacheLocationError, PermissionsWarning, one_line


def checked_location(location: str | os.PathLike[str], *, signed: bool) -> Path:
    """Return the absolute path of a cache.

    Args:
        location: the directory; it does not have to exist.
        signed: only signed entries are loaded from it, so that it matters less who can write there.

    Warns:
        PermissionsWarning: if other users may write there and entries are not signed.

    Raises:
        CacheLocationError: if it is empty, is a file, or lies below a file.
    """
    text = os.fspath(location)
    if not isinstance(text, str) or not text or "\0" in text:
        raise CacheLocationError(f"expected the path of a directory, got {text!r}; give one such as ./cache")
    path = Path(os.path.abspath(text))
    for place in (path, *path.parents):
        try:
            if place.is_dir():
                break
            if place.exists():
                raise CacheLocationError(
                    f"expected a directory, got the file {place}; give another location for the cache"
                )
        except OSError as error:
            got = one_line(error.strerror or error)
            raise CacheLocationError(f"expected a usable path, got {path}: {got}; give another location") from error
    if not signed:
        _warn_of_writers(path)
    return path


def _warn_of_writers(path: Path) -> None:
    for place in (path, path / "v1"):
        try:
            status = place.stat()
        except OSError:
            return
        mode = stat.S_IMODE(status.st_mode)
        if mode & (stat.S_IWGRP | stat.S_IWOTH):
            got, advice = f"mode {mode:o}", f"chmod go-w {place}, or use a new directory below it"
        elif status.st_uid not in (os.geteuid(), 0):
            got, advice = f"one of user {status.st_uid}", "use a directory of your own"
        elif mode & (stat.S_IXGRP | stat.S_IXOTH):
            continue
        else:  # nobody else can enter it
            return
        warnings.warn(
            f"expected a cache that only its owner can write (mode 700) at {place}, got {got}: whoever can write there "
            f"chooses the code that runs here; {advice}, or load signed entries only (trust=)",
            PermissionsWarning,
            stacklevel=5,
        )
        return
