"""Bundles: entries in one compressed file, to ship a cache.

A bundle is a ZIP file with one record per entry (``v1/actions/<digest>.json``) and their blobs (``v1/blobs/<sha256>``).
No name in it is ever used as a path: names are matched, and files are stored under the digests that were checked. Every
record and every signature is checked before a blob is unpacked, every blob before anything is stored. ZIP in place of a
compressed tar: its directory is read without unpacking, and a lying header cannot ask for memory. What a hostile file
can cost is bounded: its directory, its records and what it unpacks to by the limits below, no byte of it is part of two
files, and memory holds the records as text and one of them parsed.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import stat
import struct
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .bounded import Progress
from .errors import BundleError, DamagedEntry, TrustError, one_line
from .files import hash_file, remove, rename, sync_directory
from .records import MAX_RECORD, BadRecord, BlobRef, Record, decode_record, encode_record
from .signing import PublicKey, SigningKey, refusal
from .store import BlobStore, Damage

MAX_BYTES: Final = 64 << 30
"""What an import unpacks at most, in all, unless told otherwise."""
_MAX_MEMBERS: Final = 100_000
_MAX_DIRECTORY: Final = 16 << 20  # bytes: room for so many members
_MAX_RECORDS: Final = 64 << 20  # bytes of all records
_CHUNK: Final = 1 << 20
_LOCAL: Final = 30  # bytes before the name of a member, in front of its data at least
_ENCRYPTED: Final = 0x2041  # bits of the flags: encrypted, strongly encrypted, with hidden headers
_DATE: Final = (1980, 1, 1, 0, 0, 0)  # the same entries give the same bundle, byte for byte
_RECORD: Final = re.compile(r"v1/actions/([0-9a-f]{64})\.json")
_BLOB: Final = re.compile(r"v1/blobs/([0-9a-f]{64})")

_HOSTILE: Final[tuple[type[Exception], ...]] = (
    *(zipfile.BadZipFile, zlib.error, struct.error),
    *(ArithmeticError, EOFError, LookupError, RuntimeError, ValueError),
)


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
    trust: frozenset[PublicKey] | None = None,
    sign_with: SigningKey | None = None,
    progress: Progress | None = None,
) -> BundleReport:
    """Write entries into a new file; it appears when it is whole.

    Args:
        store: where they lie.
        digests: which.
        bundle: the file; one that is there is replaced.
        trust: keys, one of which has to have signed each of them; None: signatures are not looked at.
        sign_with: signs the records in the bundle.
        progress: told of (bytes done, bytes in all).

    Raises:
        DamagedEntry: one of them is missing or damaged.
        TrustError: no trusted key signed one of them.
        BundleError: they are more than one bundle holds.
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
        if trust is not None and (reason := refusal(record, trust)) is not None:
            raise TrustError(f"expected entry {digest[:12]} signed by a trusted key, got: {reason}; leave it out")
        records[digest] = sign_with.sign(record) if sign_with else record
    blobs = {ref.sha256: (ref, digest) for digest, record in records.items() for ref in record.files.values()}
    total, done = sum(ref.size for ref, _ in blobs.values()), 0
    texts = {digest: encode_record(record) for digest, record in records.items()}
    if len(texts) + len(blobs) > _MAX_MEMBERS or sum(map(len, texts.values())) > _MAX_RECORDS:
        raise BundleError(
            f"expected at most {_MAX_MEMBERS} files in a bundle, and records of {_MAX_RECORDS} bytes, "
            f"got {len(texts)} records and {len(blobs)} blobs; export them in parts"
        )
    partial = bundle.with_name(f"{bundle.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        with zipfile.ZipFile(partial, "x", zipfile.ZIP_DEFLATED, compresslevel=6) as out:
            for digest, text in texts.items():
                out.writestr(_info(f"v1/actions/{digest}.json"), text)
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
    path = store.blob_path(ref.sha256)
    try:
        store.check_blob(ref, contents=False)
        with open(path, "rb") as source:  # checked through the handle that is copied from: what lies there may change
            if hashlib.file_digest(source, "sha256").hexdigest() != ref.sha256:
                raise Damage(path, "other bytes than its SHA-256 says")
            source.seek(0)
            with out.open(_info(f"v1/blobs/{ref.sha256}"), "w", force_zip64=True) as target:
                shutil.copyfileobj(source, target, _CHUNK)
    except Damage as found:
        raise _damaged(digest, f"{found.path.name[:12]}: {found.reason}") from found


def _damaged(digest: str, got: str) -> DamagedEntry:
    return DamagedEntry(
        f"expected entry {digest[:12]} as stored, got {one_line(got)}; run verify --repair, then export again"
    )


class _Bounded(io.BufferedReader):
    """A file that no header can make ``zipfile`` read much of at once."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _MAX_DIRECTORY:
            raise zipfile.BadZipFile(f"a directory of {size} bytes")
        return super().read(size)


class BundleReader:
    """A bundle that was opened and whose records were checked; nothing was unpacked yet.

    Attributes:
        bundle: the file.
    """

    def __init__(self, bundle: Path, trust: frozenset[PublicKey] | None, max_bytes: int = MAX_BYTES) -> None:
        self.bundle = bundle
        self._texts: dict[str, bytes] = {}  # records as text: parsed, a hostile one takes up twenty times as much
        self._file = _opened(bundle)
        try:
            with self._told(OSError):  # such as a seek to nowhere
                self._zip = zipfile.ZipFile(self._file)
                self._check(trust, max_bytes)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> BundleReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    @property
    def digests(self) -> tuple[str, ...]:
        """The digests of its records."""
        return tuple(self._texts)

    def record(self, digest: str) -> Record:
        """A record of the bundle; it was checked."""
        return decode_record(self._texts[digest], digest)

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
        with open(path, "xb") as target, self._told(), self._zip.open(f"v1/blobs/{ref.sha256}") as source:
            while chunk := source.read(_CHUNK):  # ends at the size in the directory, which is that of the record
                target.write(chunk)
        if hash_file(path, sync=True)[0] != ref:
            raise self._refused(f"blob {ref.sha256[:12]} with other bytes than its SHA-256 says")

    def _check(self, trust: frozenset[PublicKey] | None, max_bytes: int) -> None:
        members = self._zip.infolist()
        if len(members) > _MAX_MEMBERS or len({info.filename for info in members}) != len(members):
            raise self._refused(f"{len(members)} files, some of them with one name" if members else "no files")
        blobs: dict[str, int] = {}
        records: dict[str, zipfile.ZipInfo] = {}
        end, length = 0, os.fstat(self._file.fileno()).st_size
        for info in sorted(members, key=lambda info: info.header_offset):
            record, blob = _RECORD.fullmatch(info.orig_filename), _BLOB.fullmatch(info.orig_filename)
            if not _is_plain(info) or (record is None and blob is None):
                raise self._refused(f"the file {one_line(ascii(info.orig_filename), 80)}, which no bundle holds")
            begin, end = end, info.header_offset + _LOCAL + len(info.filename) + info.compress_size
            if info.header_offset < begin or end > length:
                raise self._refused("files that overlap, or that end after it does")
            if record is not None:
                records[record[1]] = info
            elif blob is not None:
                blobs[blob[1]] = info.file_size
        total, texts = sum(info.file_size for info in members), sum(info.file_size for info in records.values())
        if total > max_bytes or texts > _MAX_RECORDS:
            raise self._refused(f"{total} bytes unpacked, {texts} of them records, over {max_bytes} or {_MAX_RECORDS}")
        named: set[str] = set()
        for digest, info in records.items():
            named |= self._match(self._record(digest, info, trust), blobs)
        if not records:
            raise self._refused("no records")
        if extra := set(blobs) - named:
            raise self._refused(f"blob {min(extra)[:12]}, which no record names")

    def _record(self, digest: str, info: zipfile.ZipInfo, trust: frozenset[PublicKey] | None) -> Record:
        with self._zip.open(info) as file:
            data = file.read(MAX_RECORD + 1)
        try:
            record = decode_record(data, digest)
        except BadRecord as error:
            raise self._refused(f"record {digest[:12]}: {error}") from error
        if trust is not None and (reason := refusal(record, trust)) is not None:
            raise self._refused(f"entry {digest[:12]}: {reason}")
        self._texts[digest] = data
        return record

    def _match(self, record: Record, blobs: dict[str, int]) -> set[str]:
        for ref in record.files.values():
            if (got := blobs.get(ref.sha256, "no")) != ref.size:
                raise self._refused(f"{got} bytes of blob {ref.sha256[:12]} in place of {ref.size}")
        return {ref.sha256 for ref in record.files.values()}

    def _refused(self, got: str) -> BundleError:
        where = one_line(self.bundle, 300)
        return BundleError(f"expected a sound bundle in {where}, got {got}; nothing was imported: get it again")

    @contextmanager
    def _told(self, *more: type[Exception]) -> Iterator[None]:
        """What a damaged or hostile file can make of ``zipfile``, as one line."""
        try:
            yield
        except (*_HOSTILE, *more) as error:
            raise self._refused(one_line(error, 100)) from error


def _is_plain(info: zipfile.ZipInfo) -> bool:
    """Whether a member is a file of the kind that a bundle is made of."""
    regular = stat.S_IFMT(info.external_attr >> 16) in (0, stat.S_IFREG)
    method = info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # others are unpacked all at once
    return regular and method and not info.flag_bits & _ENCRYPTED and info.filename == info.orig_filename


def _opened(bundle: Path) -> _Bounded:
    try:
        file = io.FileIO(bundle, opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK))  # no wait for a pipe
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            file.close()
            raise OSError(f"not a regular file: {str(bundle)!r}")
    except (OSError, ValueError) as error:
        raise BundleError(f"expected a bundle, got {one_line(error, 300)}; give the path of one") from error
    return _Bounded(file)
