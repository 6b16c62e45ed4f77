"""Entries on their way: signed in place, unpacked from a bundle, fetched from a remote, sent there."""

from __future__ import annotations

import errno
import uuid
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from filelock import FileLock, Timeout

from .bounded import Progress
from .bundle import BundleReader, BundleReport
from .errors import DamagedEntry, RemoteWarning, one_line
from .files import remove
from .leases import Lease, busy_directory
from .records import BadRecord, BlobRef, Record, decode_record, encode_record, is_sha256
from .remote import RemoteTier
from .signing import PublicKey, SigningKey, refusal
from .store import BlobStore, Damage


def sign_entries(store: BlobStore, key: SigningKey, digests: Iterable[str] | None) -> int:
    """See :meth:`compile_cache.CompileCache.sign`."""
    store.prepare(sweep=False)
    signed = 0
    for digest in list(store.digests() if digests is None else digests):
        if not is_sha256(digest):  # it names a lock file
            got = one_line(ascii(digest), 80)
            raise DamagedEntry(f"expected the 64 hexadecimal digits of an entry, got {got}; list the entries with ls")
        with FileLock(store.locks / f"{digest}.lock"), store.publishing():  # nobody builds it anew, or removes it
            record, lease = _checked(store, digest)
            lease.release()
            mine = [signature for signature in record.signatures if signature.key == key.public.hex]
            if not any(key.public.verifies(record, signature) for signature in mine):
                store.publish(key.sign(record), {})
                signed += 1
    return signed


def import_records(
    store: BlobStore, reader: BundleReader, is_sound: Callable[[str], bool], progress: Progress | None
) -> BundleReport:
    """See :meth:`compile_cache.CompileCache.import_bundle`."""
    store.prepare(sweep=False)
    kept = tuple(digest for digest in reader.digests if is_sound(digest))
    new = sorted(set(reader.digests).difference(kept))
    refs = {ref for digest in new for ref in reader.record(digest).files.values()}
    directory = store.new_temporary("import")
    try:
        directory.mkdir()
        with busy_directory(directory):
            paths = reader.unpack(refs, lambda: directory / uuid.uuid4().hex, progress)
            with store.publishing():
                for digest in new:
                    _publish(store, reader.record(digest), paths)
    finally:
        remove(directory)
    size = sum(ref.size for ref in refs)
    return BundleReport(tuple(new), kept, size, reader.bundle.stat().st_size)


def pull(
    store: BlobStore,
    tier: RemoteTier,
    digest: str,
    trust: frozenset[PublicKey] | None,
    progress: Progress | None = None,
    patience: float | None = None,
) -> bool:
    """Fetch one entry from the remote and store it, checked; of several that ask for one, one fetches it.

    Args:
        patience: seconds in all, of a person who asked for it and wants to be told; None: as the remote says.

    Returns:
        False if the remote does not have it, is down, has something unusable, or it cannot be stored here; whatever
        is not a plain "no" has cost a warning.

    Raises:
        RemoteError, CacheWriteError: with ``patience`` only, if the remote is down or it cannot be stored here.
    """
    data = tier.record(digest, strict=patience is not None)
    if data is None:
        return False
    try:
        record = decode_record(data, digest)
        reason = None if trust is None else refusal(record, trust)
        refs = set(record.files.values())
        if len({ref.sha256 for ref in refs}) < len(refs):
            reason = "a record that gives one blob two sizes"
    except BadRecord as error:
        reason = str(error)
    if reason is not None:
        tier.reject(digest, reason)
        return False
    limit = tier.remote.patience if patience is None else patience
    try:
        store.prepare(sweep=False)
        with FileLock(store.locks / f"{digest}.pull.lock", timeout=min(limit, 1e6)):
            return _fetch(store, tier, record, progress, patience)
    except Timeout:
        return False
    except OSError as error:
        failed = store.write_error("an entry of the remote", error)
        if patience is not None:
            raise failed from error
        tier.leave(digest)
        warnings.warn(one_line(failed, 600), RemoteWarning, stacklevel=3)
        return False


def _fetch(
    store: BlobStore, tier: RemoteTier, record: Record, progress: Progress | None, patience: float | None
) -> bool:
    refs = set(record.files.values())
    missing = [ref for ref in refs if not _is_stored(store, ref)]
    if not missing and _is_current(store, record):  # fetched while this one waited; who uses it holds that very file
        return True
    paths = tier.blobs(record.digest, missing, store.tmp, progress, patience)
    if paths is None:
        return False
    try:
        with store.publishing():
            gone = [ref for ref in refs if ref.sha256 not in paths and not _is_stored(store, ref, contents=False)]
            if gone:  # a limit removed it meanwhile: the next request fetches all
                return False
            _publish(store, record, paths)
    finally:
        for path in paths.values():
            remove(path)
    return True


def push_entries(store: BlobStore, tier: RemoteTier, digests: Iterable[str], progress: Progress | None) -> int:
    """See :meth:`compile_cache.CompileCache.push`."""
    count = 0
    for digest in digests:
        record, lease = _checked(store, digest)
        blobs = {ref: store.blob_path(ref.sha256) for ref in record.files.values()}
        tier.push_strict(digest, encode_record(record), blobs, progress)
        lease.release()
        count += 1
    return count


def _checked(store: BlobStore, digest: str) -> tuple[Record, Lease]:
    """The record of an entry that is in use from now on, with every byte of its files checked."""
    try:
        stored = store.read_record(digest)
        if stored is None:
            raise DamagedEntry(f"expected entry {digest[:12]}, got nothing; list the entries with ls")
        record, _, lease = stored
        for ref in record.files.values():
            store.check_blob(ref)
    except Damage as found:
        raise DamagedEntry(
            f"expected entry {digest[:12]} as stored, got {found.reason}; run verify --repair"
        ) from found
    return record, lease


def _publish(store: BlobStore, record: Record, paths: Mapping[str, Path]) -> None:
    """Store a record and those of its blobs that lie in ``paths`` (SHA-256 -> new file), each moved once."""
    names: dict[str, str] = {}
    for name, ref in record.files.items():
        names.setdefault(ref.sha256, name)
    built = {name: paths[sha256] for sha256, name in names.items() if sha256 in paths and paths[sha256].exists()}
    for name, ref in record.files.items():  # moved for an earlier record, or swept away because a clock jumped
        if names[ref.sha256] not in built and not _is_stored(store, ref, contents=False):
            raise FileNotFoundError(errno.ENOENT, f"no unpacked file for {one_line(ascii(name), 60)}")
    store.publish(record, built)


def _is_current(store: BlobStore, record: Record) -> bool:
    try:
        stored = store.read_record(record.digest)
    except Damage:
        return False
    return stored is not None and stored[0] == record


def _is_stored(store: BlobStore, ref: BlobRef, *, contents: bool = True) -> bool:
    try:
        store.check_blob(ref, contents=contents)
    except Damage:
        return False
    return True
