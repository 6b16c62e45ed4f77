"""The record of one action: readable JSON that names the blobs of a key and proves that it is whole.

Two checks cover every byte of a record. The ``checksum`` field is the SHA-256 of the canonical JSON of all the other
fields; and the file has to be, byte for byte, the text that this module writes for those fields, so that even a
changed space or a doubled field is seen.

A checksum tells damage, not who wrote the record: that is what ``signatures`` are for (see :mod:`.signing`). They lie
in the record itself, so that signing is one atomic replacement and a copied entry keeps them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Final, NoReturn

from .errors import BuildFailed, UnstableFactor, one_line
from .keys import JSON, CacheKey, canonical_json, plain_json

RECORD_FORMAT: Final = 1
SIGNED_PREFIX: Final = b"compile_cache manifest v1\n"
MAX_RECORD: Final = 4 << 20
"""Bytes of a record at most, so that a hostile one costs little memory and time: some twenty thousand files."""
_FIELDS: Final = {"format", "key", "factors", "files", "notes", "created", "checksum"}
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_SIGNATURE: Final = re.compile(r"[0-9a-f]{128}")
_CREATED: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[-+.:0-9Z]{5,30}")
_CONTROL: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # would break a message into lines, or hide in it
_MAX_NAME, _MAX_PART = 1024, 255  # bytes; what file systems take
_MAX_SIZE: Final = 1 << 60


class BadRecord(Exception):
    """A record is not what was written. The text is the reason, without the path."""


class ForeignRecord(BadRecord):
    """A record of a later format than this version reads. It is not damaged: a later version serves it."""


@dataclass(frozen=True)
class BlobRef:
    """Names the bytes of one file.

    Attributes:
        sha256: SHA-256 of the bytes, 64 lower-case hexadecimal digits; also the name of the blob.
        size: length in bytes.
    """

    sha256: str
    size: int

    @classmethod
    def of(cls, data: bytes) -> BlobRef:
        """Return the name of ``data``."""
        return cls(hashlib.sha256(data).hexdigest(), len(data))


@dataclass(frozen=True, order=True)
class Signature:
    """An Ed25519 signature over :meth:`Record.signed_bytes`.

    Attributes:
        key: the public key, 64 hexadecimal digits.
        value: the signature, 128 hexadecimal digits.
    """

    key: str
    value: str


@dataclass(frozen=True)
class Record:
    """What is stored under a key: its factors, its files, and the notes of who built it.

    Attributes:
        digest: digest of the key.
        factors: the factors of the key.
        files: file name (POSIX, relative) -> blob.
        notes: plain JSON, not part of the key.
        created: UTC time in ISO 8601.
        signatures: who vouches for all of the above; at most one of each key.
    """

    digest: str
    factors: dict[str, JSON]
    files: dict[str, BlobRef]
    notes: dict[str, JSON]
    created: str
    signatures: tuple[Signature, ...] = ()

    def signed_bytes(self) -> bytes:
        """What a signature covers: everything but checksum and signatures, in canonical form."""
        return SIGNED_PREFIX + canonical_json(_body(self)).encode("ascii")

    def with_signature(self, signature: Signature) -> Record:
        """The same record with one signature more; an earlier one of the same key is replaced."""
        others = tuple(old for old in self.signatures if old.key != signature.key)
        return replace(self, signatures=tuple(sorted((*others, signature))))


def is_sha256(text: object) -> bool:
    """Whether ``text`` is 64 lower-case hexadecimal digits."""
    return isinstance(text, str) and _SHA256.fullmatch(text) is not None


def is_file_name(name: object) -> bool:
    """Whether ``name`` is a relative POSIX path that stays inside its directory, without control characters."""
    if not isinstance(name, str) or not name or "\\" in name or _CONTROL.search(name):
        return False
    try:
        encoded = name.encode("utf-8")
    except UnicodeEncodeError:  # bytes on disk that are not UTF-8
        return False
    return len(encoded) <= _MAX_NAME and all(
        part not in (b"", b".", b"..") and len(part) <= _MAX_PART for part in encoded.split(b"/")
    )


def encode_record(record: Record) -> bytes:
    """Return the text of a record: JSON with an indent of 1, sorted names, ASCII, a line feed at the end.

    Raises:
        BuildFailed: if it is longer than any reader accepts.
    """
    data = _text(record)
    if len(data) > MAX_RECORD:
        raise BuildFailed(
            f"expected a record of at most {MAX_RECORD} bytes for {record.digest[:12]}, got {len(data)}; "
            "store fewer files or shorter notes"
        )
    return data


def _text(record: Record) -> bytes:
    body = _body(record)
    if record.signatures:
        body["signatures"] = {signature.key: signature.value for signature in record.signatures}
    body["checksum"] = hashlib.sha256(canonical_json(body).encode("ascii")).hexdigest()
    return (json.dumps(body, indent=1, sort_keys=True, ensure_ascii=True, allow_nan=False) + "\n").encode("ascii")


def _body(record: Record) -> dict[str, JSON]:
    return {
        "format": RECORD_FORMAT,
        "key": record.digest,
        "factors": record.factors,
        "files": {name: {"sha256": ref.sha256, "size": ref.size} for name, ref in record.files.items()},
        "notes": record.notes,
        "created": record.created,
    }


def decode_record(data: bytes, digest: str) -> Record:
    """Return the record that ``data`` holds, checked in full.

    Args:
        data: the bytes of the file.
        digest: the key digest that the file is named after.

    Raises:
        ForeignRecord: if it is whole, and of another format.
        BadRecord: if any byte is not what :func:`encode_record` wrote for that key.
    """
    if len(data) > MAX_RECORD:
        raise BadRecord(f"longer than the {MAX_RECORD} bytes that a record may have")
    try:
        body = json.loads(data.decode("ascii"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"not a JSON record ({one_line(error, 80)})") from error
    if not isinstance(body, dict) or not {"format", "checksum"} <= set(body):
        got = sorted(body) if isinstance(body, dict) else type(body).__name__
        raise BadRecord(f"not the fields of a record ({one_line(got, 80)})")
    try:
        checksum = hashlib.sha256(canonical_json(_without_checksum(body)).encode("ascii")).hexdigest()
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"no canonical form ({one_line(error, 80)})") from error
    if checksum != body["checksum"]:
        raise BadRecord("its checksum does not match its fields")
    version = body["format"]
    if type(version) is not int or version < RECORD_FORMAT:
        shown = version if isinstance(version, int | float) else type(version).__name__
        raise BadRecord(f"record format {one_line(shown, 40)}, which no version writes")
    if version != RECORD_FORMAT:
        raise ForeignRecord(f"record format {one_line(version, 40)}, this version reads format {RECORD_FORMAT}")
    if set(body) - {"signatures"} != _FIELDS:
        raise BadRecord(f"not the fields of a record ({one_line(sorted(body), 80)})")
    record = _checked(body, digest)
    if _text(record) != data:
        raise BadRecord("its bytes are not the ones that were written")
    return record


def skim_record(data: bytes, digest: str) -> Record:
    """Return what ``data`` says, unchecked: a fifth of the time, for decisions that serve nothing.

    Raises:
        ForeignRecord: if it is of a later format.
        BadRecord: if it cannot be read as a record at all.
    """
    try:
        body = json.loads(data)
        if body["format"] != RECORD_FORMAT:
            raise ForeignRecord(f"record format {one_line(body['format'], 40)}")
        files = {name: BlobRef(str(ref["sha256"]), int(ref["size"])) for name, ref in body["files"].items()}
        return Record(digest, dict(body["factors"]), files, dict(body["notes"]), str(body["created"]))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BadRecord(f"not a JSON record ({one_line(error, 80)})") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _without_checksum(body: Mapping[str, JSON]) -> dict[str, JSON]:
    return {name: value for name, value in body.items() if name != "checksum"}


def _checked(body: dict[str, object], digest: str) -> Record:
    factors, files, notes, created = (body[name] for name in ("factors", "files", "notes", "created"))
    if not isinstance(factors, dict) or not isinstance(notes, dict) or not isinstance(created, str):
        raise BadRecord("its fields have the wrong types")
    if not _CREATED.fullmatch(created):
        raise BadRecord(f"its time {one_line(ascii(created), 60)} is none")
    if not isinstance(files, dict) or not files:
        raise BadRecord("it names no files")
    try:
        named_by_factors = CacheKey(factors).digest
        plain_json(notes, "notes")  # so deep at most that everybody can write it again
    except UnstableFactor as error:
        raise BadRecord(one_line(error, 120)) from error
    if body["key"] != digest or named_by_factors != digest:
        raise BadRecord("it belongs to another key than the one it is named after")
    refs = {name: _blob_ref(name, ref) for name, ref in files.items()}
    for name in refs:
        if any(str(parent) in refs for parent in PurePosixPath(name).parents):
            raise BadRecord(f"its file {one_line(ascii(name), 60)} lies below another file")
    return Record(digest, factors, refs, notes, created, _signatures(body.get("signatures", {})))


def _signatures(found: object) -> tuple[Signature, ...]:
    if not isinstance(found, dict) or not all(
        is_sha256(key) and isinstance(value, str) and _SIGNATURE.fullmatch(value) for key, value in found.items()
    ):
        raise BadRecord("its signatures are not well formed")
    return tuple(sorted(Signature(key, value) for key, value in found.items()))


def _blob_ref(name: str, ref: object) -> BlobRef:
    if not is_file_name(name) or not isinstance(ref, dict) or set(ref) != {"sha256", "size"}:
        raise BadRecord(f"its file {one_line(ascii(name), 60)} is not well described")
    sha256, size = ref["sha256"], ref["size"]
    if not is_sha256(sha256) or type(size) is not int or not 0 <= size <= _MAX_SIZE:
        raise BadRecord(f"its file {one_line(ascii(name), 60)} is not well described")
    return BlobRef(sha256, size)
