"""Bundles: entries in one compressed file, to ship a cache.

A bundle is a ZIP file with one record per entry (``v1/actions/<digest>.json``) and their blobs (``v1/blobs/<sha256>``).
No name in it is ever used as a path: names are matched, and files are stored under the digests that were checked. Every
record and every signature is checked before a blob is unpacked, every blob before anything is stored. ZIP in place of a
compressed tar: its directory is read without unpacking, and a lying header cannot ask for memory.
"""

from __future__ import annotations

import re
import stat
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .errors import BundleError, DamagedEntry, one_line
from .files import hash_file, remove, rename, sync_directory
from .records import BadRecord, BlobRef, Record, decode_record, encode_record
from .signing import PublicKey, SigningKey, refusal
from .store import BlobStore, Damage

MAX_BYTES: Final = 64 << 30
"""What an import unpacks at most, in all, unless told otherwise."""
_MAX_RECORD: Final = 16 << 20
_MAX_MEMBERS: Final = 1_000_000
_CHUNK: Final = 1 << 20
_DATE: Final = (1980, 1, 1, 0, 0, 0)  # the same entries give the same bundle, byte for byte
_RECORD: Final = re.compile(r"v1/actions/([0-9a-f]{64})\.json")
_BLOB: Final = re.compile(r"v1/blobs/([0-9a-f]{64})")

_HOSTILE: Final = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, KeyError)

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class BundleReport:
    """What a bundle held, and what came of it.

    Attributes:
        entries: digests that were written or stored.
        kept: digests that an import left as they were, because a sound entry was there.
        bytes: of the blobs, unpacked.
        size: of the bundle.
    """

    entries: tuple[str, ...]
    kept: tuple[str, ...]
    bytes: int
    size: int


def write_bundle(
    store: BlobStore,
    digests: Iterable[str],
    bundle: Path,
    *,
    sign_with: SigningKey | None = None,
    progress: Progress | None = None,
) -> BundleReport:
    """Write entries into a new file; it appears when it is whole.

    Args:
        store: where they lie.
        digests: which.
        bundle: the file; one that is there is replaced.
        sign_with: signs the records in the bundle.
        progress: told of (bytes done, bytes in all).

    Raises:
        DamagedEntry: one of them is missing or damaged.
        OSError: the file cannot be written.
    """
    leases, records = [], dict[str, Record]()
    for digest in sorted(set(digests)):
        try:
            stored = store.read_record(digest)
        except Damage as found:
            raise _damaged(digest, found.reason) from found
        if stored is None:
            raise _damaged(digest, "nothing there")
        record, _, lease = stored
        leases.append(lease)  # held until the bundle is whole
        records[digest] = sign_with.sign(record) if sign_with else record
    blobs = {ref.sha256: (ref, digest) for digest, record in records.items() for ref in record.files.values()}
    total, done = sum(ref.size for ref, _ in blobs.values()), 0
    partial = bundle.with_name(f"{bundle.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        with zipfile.ZipFile(partial, "x", zipfile.ZIP_DEFLATED, compresslevel=6) as out:
            for digest, record in records.items():
                out.writestr(_info(f"v1/actions/{digest}.json"), encode_record(record))
            for _, (ref, digest) in sorted(blobs.items()):
                _add_blob(store, out, ref, digest)
                done += ref.size
                if progress is not None:
                    progress(done, total)
        hash_file(partial, sync=True)
        rename(partial, bundle)
        sync_directory(bundle.parent)
    finally:
        remove(partial)
    return BundleReport(tuple(records), (), total, bundle.stat().st_size)


def _info(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, _DATE)
    info.compress_type = zipfile.ZIP_DEFLATED
    info.external_attr = (stat.S_IFREG | 0o644) << 16
    return info


def _add_blob(store: BlobStore, out: zipfile.ZipFile, ref: BlobRef, digest: str) -> None:
    try:
        store.check_blob(ref)
        member = _info(f"v1/blobs/{ref.sha256}")
        with open(store.blob_path(ref.sha256), "rb") as source, out.open(member, "w", force_zip64=True) as target:
            while chunk := source.read(_CHUNK):
                target.write(chunk)
    except Damage as found:
        raise _damaged(digest, f"{found.path.name[:12]}: {found.reason}") from found


def _damaged(digest: str, got: str) -> DamagedEntry:
    return DamagedEntry(
        f"expected entry {digest[:12]} as stored, got {one_line(got)}; run verify --repair, then export again"
    )


class BundleReader:
    """A bundle that was opened and whose records were checked; nothing was unpacked yet.

    Attributes:
        records: digest -> record.
    """

    def __init__(self, bundle: Path, trust: frozenset[PublicKey] | None, max_bytes: int = MAX_BYTES) -> None:
        self.bundle = bundle
        self.records: dict[str, Record] = {}
        with self._told():
            self._zip = zipfile.ZipFile(bundle)
        try:
            with self._told():
                self._check(trust, max_bytes)
        except BaseException:
            self._zip.close()
            raise

    def __enter__(self) -> BundleReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self._zip.close()

    def unpack(self, refs: Iterable[BlobRef], place: Callable[[], Path], progress: Progress | None) -> dict[str, Path]:
        """Unpack blobs into new files, each byte checked.

        Args:
            refs: which.
            place: gives the path of a new file.
            progress: told of (bytes done, bytes in all).

        Raises:
            BundleError: if the bytes are not the ones that the records name; what was unpacked is removed.
        """
        wanted = {ref.sha256: ref for ref in refs}
        total, done = sum(ref.size for ref in wanted.values()), 0
        paths: dict[str, Path] = {}
        try:
            for sha256, ref in wanted.items():
                paths[sha256] = path = place()
                with self._told():
                    self._unpack(ref, path)
                done += ref.size
                if progress is not None:
                    progress(done, total)
        except BaseException:
            for path in paths.values():
                remove(path)
            raise
        return paths

    def _unpack(self, ref: BlobRef, path: Path) -> None:
        size = 0
        with self._zip.open(f"v1/blobs/{ref.sha256}") as source, open(path, "xb") as target:
            while chunk := source.read(_CHUNK):
                size += len(chunk)
                if size > ref.size:
                    raise self._refused(f"blob {ref.sha256[:12]} longer than the {ref.size} bytes that its record says")
                target.write(chunk)
        if hash_file(path, sync=True)[0] != ref:
            raise self._refused(f"blob {ref.sha256[:12]} with other bytes than its SHA-256 says")

    def _check(self, trust: frozenset[PublicKey] | None, max_bytes: int) -> None:
        members = self._zip.infolist()
        if len(members) > _MAX_MEMBERS or len({info.filename for info in members}) != len(members):
            raise self._refused(f"{len(members)} files, some of them with one name" if members else "no files")
        blobs: dict[str, int] = {}
        names: dict[str, zipfile.ZipInfo] = {}
        for info in members:
            record, blob = _RECORD.fullmatch(info.filename), _BLOB.fullmatch(info.filename)
            kind = stat.S_IFMT(info.external_attr >> 16)
            if (record is None and blob is None) or kind not in (0, stat.S_IFREG) or info.flag_bits & 1:
                raise self._refused(f"the file {one_line(ascii(info.filename), 80)}, which no bundle holds")
            if record is not None:
                names[record[1]] = info
            elif blob is not None:
                blobs[blob[1]] = info.file_size
        total = sum(info.file_size for info in members)
        if total > max_bytes:
            raise self._refused(f"{total} bytes unpacked, over the limit of {max_bytes}")
        for digest, info in names.items():
            self.records[digest] = self._record(digest, info, trust)
        self._match({ref for record in self.records.values() for ref in record.files.values()}, blobs)

    def _record(self, digest: str, info: zipfile.ZipInfo, trust: frozenset[PublicKey] | None) -> Record:
        with self._zip.open(info) as file:
            data = file.read(_MAX_RECORD + 1)
        if len(data) > _MAX_RECORD:
            raise self._refused(f"a record of more than {_MAX_RECORD} bytes")
        try:
            record = decode_record(data, digest)
        except BadRecord as error:
            raise self._refused(f"record {digest[:12]}: {error}") from error
        if trust is not None and (reason := refusal(record, trust)) is not None:
            raise self._refused(f"entry {digest[:12]}: {reason}")
        return record

    def _match(self, named: set[BlobRef], blobs: dict[str, int]) -> None:
        if not self.records:
            raise self._refused("no records")
        for ref in named:
            if blobs.get(ref.sha256) != ref.size:
                raise self._refused(
                    f"{blobs.get(ref.sha256, 'no')} bytes of blob {ref.sha256[:12]} in place of {ref.size}"
                )
        if extra := set(blobs) - {ref.sha256 for ref in named}:
            raise self._refused(f"blob {min(extra)[:12]}, which no record names")

    def _refused(self, got: str) -> BundleError:
        return BundleError(f"expected a sound bundle in {self.bundle}, got {got}; nothing was imported: get it again")

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What a damaged or hostile file can make of ``zipfile``, as one line."""
        try:
            yield
        except BundleError:
            raise
        except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
            raise BundleError(f"expected a bundle, got {one_line(error, 160)}; give the path of one") from error
        except _HOSTILE as error:
            raise self._refused(one_line(error, 100)) from error
