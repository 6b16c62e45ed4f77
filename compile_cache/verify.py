"""A check of every byte of a cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .entry import VerifyReport
from .files import Identity, hash_file, identity_of
from .records import BlobRef, is_sha256
from .store import BlobStore, Damage


def verify(store: BlobStore, *, repair: bool = False) -> VerifyReport:
    """Read every record and every blob, and report what is not what was written.

    Other processes may read and build meanwhile: what they add is seen or not, and is never reported as damage.

    Args:
        store: the store to check.
        repair: move damaged files, and the records that need them, into ``v1/damaged``.

    Raises:
        OSError: if a directory of the cache cannot be listed.
    """
    damage: list[Damage] = []
    sound: dict[str, int] = {}  # SHA-256 -> size
    for path in _files(store.blobs, damage):
        try:
            sound[path.name] = _check_blob(path)
        except FileNotFoundError:  # set aside by another process since the listing
            continue
        except Damage as found:
            damage.append(found)
    entries, used = 0, set[str]()
    for path in _files(store.actions, damage):
        try:
            refs = _check_record(store, path, sound)
        except Damage as found:
            damage.append(found)
            continue
        if refs is not None:
            entries += 1
            used.update(ref.sha256 for ref in refs)
    orphans = tuple(_relative(store, store.blob_path(sha256)) for sha256 in sorted(sound) if sha256 not in used)
    if repair:
        for item in damage:
            if item.identity is not None:
                store.set_aside(item.path, item.identity)
    report = tuple((_relative(store, item.path), item.reason) for item in damage)
    return VerifyReport(entries, len(sound), sum(sound.values()), report, orphans, repaired=repair)


def _files(directory: Path, damage: list[Damage]) -> Iterator[Path]:
    """Yield what lies in the two-digit directories below ``directory``; note whatever else lies there as damage."""
    if not directory.exists():
        return
    for shard in sorted(directory.iterdir()):
        if shard.is_dir():
            yield from sorted(shard.iterdir())
        else:
            damage.append(_stray(shard))


def _stray(path: Path) -> Damage:
    return Damage(path, "it does not belong here", _identity(path))


def _identity(path: Path) -> Identity | None:
    return identity_of(path.stat()) if path.exists() else None


def _check_blob(path: Path) -> int:
    if not is_sha256(path.name) or path.parent.name != path.name[:2]:
        raise _stray(path)
    if not path.is_file():
        if not path.exists():
            raise FileNotFoundError(path)
        raise Damage(path, "something that is not a regular file", _identity(path))
    try:
        found, identity = hash_file(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Damage(path, f"it cannot be read ({error.strerror})") from error
    if found.sha256 != path.name:
        raise Damage(path, "other bytes than its SHA-256 says", identity)
    return found.size


def _check_record(store: BlobStore, path: Path, sound: dict[str, int]) -> tuple[BlobRef, ...] | None:
    if path != store.record_path(path.stem) or not is_sha256(path.stem):
        raise _stray(path)
    stored = store.read_record(path.stem)
    if stored is None:  # set aside by another process since the listing
        return None
    record, identity = stored
    for name, ref in record.files.items():
        if sound.get(ref.sha256) == ref.size:
            continue
        try:
            store.check_blob(ref)  # damaged, or stored since the blobs were listed
        except Damage as found:
            raise Damage(path, f"its file {name} is {found.reason}", identity) from found
    return tuple(record.files.values())


def _relative(store: BlobStore, path: Path) -> str:
    return path.relative_to(store.location).as_posix()
