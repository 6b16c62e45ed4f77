"""The directory of a cache, before anything is read from it: is it one, and who can change it?"""

from __future__ import annotations

import os
import stat
import warnings
from pathlib import Path

from .errors import CacheLocationError, PermissionsWarning, one_line

_LAYOUT = ("v1", *(f"v1/{name}" for name in ("actions", "blobs", "tmp", "locks", "damaged", "used", "pins", "held")))


def checked_location(location: str | os.PathLike[str], *, signed: bool) -> Path:
    """Return the absolute path of a cache.

    Args:
        location: the directory; it does not have to exist.
        signed: only signed entries are loaded from it, so that it matters less who can write there.

    Warns:
        PermissionsWarning: if other users may write there and entries are not signed.

    Raises:
        CacheLocationError: if it is empty, is a file, or lies below a file; or if a directory of its layout is a
            symbolic link, so that files would be written, moved and removed elsewhere.
    """
    text = os.fspath(location)
    if not isinstance(text, str) or not text or "\0" in text:
        raise CacheLocationError(f"expected the path of a directory, got {text!r}; give one such as ./cache")
    path = Path(os.path.abspath(text))
    for place in (path, *path.parents):
        try:
            mode = place.stat().st_mode  # asked once: another process may create the directory now
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            got = one_line(error.strerror or error)
            raise CacheLocationError(f"expected a usable path, got {path}: {got}; give another location") from error
        if stat.S_ISDIR(mode):
            break
        raise CacheLocationError(f"expected a directory, got the file {place}; give another location for the cache")
    for place in (path / name for name in _LAYOUT):
        if os.path.islink(place):
            raise CacheLocationError(f"expected a directory, got the symbolic link {place}; remove it")
    if not signed and (found := _other_writers(path)) is not None:
        place, got, advice = found
        warnings.warn(
            f"expected a cache that only its owner can write (mode 700) at {place}, got {got}: whoever can write there "
            f"chooses the code that runs here; {advice}, or load signed entries only (trust=)",
            PermissionsWarning,
            stacklevel=4,
        )
    return path


def _other_writers(path: Path) -> tuple[Path, str, str] | None:
    """A directory that lets other users choose what is loaded, what is wrong with it, and what to do."""
    for place in dict.fromkeys((*path.parents, *Path(os.path.realpath(path)).parents)):
        mode = _mode(place)
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:  # whatever lies in it can be replaced as a whole
            return place, f"mode {mode:o}", f"chmod o-w {place}"
    for place in (path, *(path / name for name in _LAYOUT[:4])):
        try:
            status = place.stat()
        except OSError:
            return None
        mode = stat.S_IMODE(status.st_mode)
        if mode & (stat.S_IWGRP | stat.S_IWOTH):
            return place, f"mode {mode:o}", f"chmod go-w {place}"
        if status.st_uid not in (os.geteuid(), 0):
            return place, f"one of user {status.st_uid}", "use a directory of your own"
        if not mode & (stat.S_IXGRP | stat.S_IXOTH):  # nobody else can enter it
            return None
    return None


def _mode(place: Path) -> int:
    try:
        return stat.S_IMODE(place.stat().st_mode)
    except OSError:
        return 0
