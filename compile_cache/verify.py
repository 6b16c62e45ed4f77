"""A check of every byte of a cache."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

from .entry import VerifyReport
from .files import Identity, again_if_stale, hash_file, identity_of
from .records import Record, is_sha256
from .signing import PublicKey, refusal
from .store import BlobStore, Damage

_SILLY = ".nfs"  # an NFS client keeps a removed file under such a name as long as somebody has it open


def verify(store: BlobStore, *, repair: bool = False, trust: frozenset[PublicKey] | None = None) -> VerifyReport:
    """Read every record and every blob, and report what is not what was written.

    Other processes may read and build meanwhile: what they add is seen or not, and is never reported as damage.

    Args:
        store: the store to check.
        repair: move damaged files, and the records that need them, into ``v1/damaged``.
        trust: keys, one of which has to have signed each record; None: signatures are not looked at.

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
    untrusted: list[tuple[str, str]] = []
    foreign: list[tuple[str, str]] = []
    for path in _files(store.actions, damage):
        try:
            record = _check_record(store, path, sound)
        except Damage as found:
            if found.foreign:
                foreign.append((_relative(store, path), found.reason))
            else:
                damage.append(found)
            continue
        if record is None:
            continue
        used.update(ref.sha256 for ref in record.files.values())
        reason = None if trust is None else refusal(record, trust)
        if reason is None:
            entries += 1
        else:
            untrusted.append((_relative(store, path), reason))
    orphans = tuple(_relative(store, store.blob_path(sha256)) for sha256 in sorted(sound) if sha256 not in used)
    if repair:
        for item in damage:
            if item.identity is not None:
                store.set_aside(item.path, item.identity)
    report = tuple((_relative(store, item.path), item.reason) for item in damage)
    counts = entries, len(sound), sum(sound.values())
    return VerifyReport(*counts, report, orphans, repair, tuple(untrusted), tuple(foreign))


def _files(directory: Path, damage: list[Damage]) -> Iterator[Path]:
    """Yield what lies in the two-digit directories below ``directory``; note whatever else lies there as damage."""
    if not directory.exists():
        return
    for shard in sorted(directory.iterdir()):
        if shard.is_dir() and not shard.is_symlink():
            yield from (path for path in sorted(shard.iterdir()) if not path.name.startswith(_SILLY))
        elif not shard.name.startswith(_SILLY):
            damage.append(_stray(shard))


def _stray(path: Path) -> Damage:
    return Damage(path, "it does not belong here", _identity(path))


def _identity(path: Path) -> Identity | None:
    return identity_of(path.stat()) if path.exists() else None


def _check_blob(path: Path) -> int:
    if not is_sha256(path.name) or path.parent.name != path.name[:2]:
        raise _stray(path)
    try:
        status = again_if_stale(path.stat)
        if not stat.S_ISREG(status.st_mode):
            raise Damage(path, "something that is not a regular file", identity_of(status))
        found, identity = again_if_stale(lambda: hash_file(path))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Damage(path, f"it cannot be read ({error.strerror})", unreadable=True) from error
    if found.sha256 != path.name:
        raise Damage(path, "other bytes than its SHA-256 says", identity)
    return found.size


def _check_record(store: BlobStore, path: Path, sound: dict[str, int]) -> Record | None:
    if path != store.record_path(path.stem) or not is_sha256(path.stem):
        raise _stray(path)
    stored = store.read_record(path.stem)
    if stored is None:  # set aside by another process since the listing
        return None
    record, identity, _ = stored
    for name, ref in record.files.items():
        if sound.get(ref.sha256) == ref.size:
            continue
        try:
            store.check_blob(ref)  # damaged, or stored since the blobs were listed
        except Damage as found:
            moved = None if found.unreadable else identity
            raise Damage(path, f"its file {name} is {found.reason}", moved) from found
    return record


def _relative(store: BlobStore, path: Path) -> str:
    return path.relative_to(store.location).as_posix()
