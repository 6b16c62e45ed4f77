"""The second tier: any file system that fsspec knows (s3, gs, hf, file, memory, ...), with the same layout.

A remote is a convenience, never a dependency: every wait is bounded, a remote that fails costs one warning and is then
left alone for a while, and what comes from it is checked like everything else before it is stored.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any, Final, TypeVar

from .bounded import Beat, ByteCount, CallFailed, Progress, call_bounded, side_by_side
from .errors import RemoteError, RemoteWarning, one_line
from .files import hash_file, remove
from .records import MAX_RECORD, BadRecord, BlobRef, ForeignRecord, decode_record, is_sha256
from .stats import CacheStats

LOG: Final = logging.getLogger("compile_cache.remote")
CHUNK: Final = 4 << 20  # bytes asked for at a time
_USER: Final = re.compile(r"://[^/\s]*@")  # user and password in a URL

_T = TypeVar("_T")


@dataclass(frozen=True)
class Remote:
    """Where the second tier lies, and how long it may take.

    Args:
        url: of its directory, such as ``s3://bucket/cache`` or ``file:///mnt/cache``. On S3 a reader needs the right
            s3:ListBucket besides s3:GetObject: without it, S3 says of what is missing that access is denied.
        push: write-back: what is built or stored here goes there as well, at once.
        timeout: seconds without an answer or progress after which the remote counts as down; for a file that is sent,
            seconds for each 4 MiB, as not every file system tells of its progress.
        patience: seconds that one look-up, or one file that is sent, may take in all, however well it progresses.
        retry_after: seconds for which a remote that was down, and a key that it did not have, are not asked for again.
        workers: number of files that are copied side by side.
        options: for the fsspec file system (endpoint, credentials, ...).

    Raises:
        RemoteError: if a value is out of its range.
    """

    url: str
    push: bool = False
    timeout: float = 10.0
    patience: float = 120.0
    retry_after: float = 60.0
    workers: int = 4
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.url, str) or not self.url.strip():
            raise RemoteError(f"url: expected the URL of a directory, got {self.url!r}; give one such as s3://bucket/x")
        for name, least in (("timeout", 0.01), ("patience", 0.01), ("retry_after", 0), ("workers", 1)):
            value = getattr(self, name)
            kind = int if name == "workers" else int | float
            if isinstance(value, bool) or not isinstance(value, kind) or not value >= least:
                raise RemoteError(f"{name}: expected a number of at least {least}, got {value!r}; give such a number")

    def __repr__(self) -> str:
        return f"Remote({_without_user(self.url)!r}, push={self.push})"  # options and URL may hold credentials


class RemoteTier:
    """Copies records and blobs from and to a remote. Thread safe; keeps no lock while it waits.

    Args:
        remote: where.
        stats: counters to keep.

    Raises:
        RemoteError: if the URL names no file system that is installed here, or the options do not fit it.
    """

    def __init__(self, remote: Remote, stats: CacheStats) -> None:
        self.remote = remote
        self.stats = stats
        self._opened: tuple[int, Any] | None = None  # process, file system
        self._root = ""
        self._lock = threading.Lock()
        self._down_until = 0.0
        self._absent: dict[str, float] = {}  # digest -> until when it is not asked for
        self._damaged: set[str] = set()  # blobs that came with other bytes than their name says
        try:
            self._bounded(lambda fs, beat: None)
        except CallFailed as failed:
            if not isinstance(failed.__cause__, ImportError | ValueError | TypeError | KeyError):
                self._down(failed)  # some connect when they are made: that one is down is no reason not to start
                return
            got = f"{remote.url}: {one_line(failed.__cause__, 120)}"
            raise RemoteError(
                f"expected a URL that fsspec can open, got {_without_user(got)}; install what its protocol needs "
                "(for s3: pip install s3fs), and check the options"
            ) from failed.__cause__

    # ---- reading -------------------------------------------------------------------------------------------------

    def record(self, digest: str, *, strict: bool = False) -> bytes | None:
        """The bytes of a record; None if the remote has none, is down, or is not asked for now.

        Args:
            digest: of the key.
            strict: ask in any case, for a person who waits for it.

        Raises:
            RemoteError: with ``strict``, if the remote does not answer.
        """
        if not strict and monotonic() < max(self._down_until, self._absent.get(digest, 0.0)):
            return None
        with self._strict() if strict else self._forgiving():
            try:
                return self._read(_record(digest), 0, MAX_RECORD + 1)
            except _Absent:
                self.leave(digest)
            except _Unusable as problem:
                self.reject(digest, str(problem))
        return None

    def blobs(
        self,
        digest: str,
        refs: Iterable[BlobRef],
        directory: Path,
        progress: Progress | None = None,
        patience: float | None = None,
    ) -> dict[str, Path] | None:
        """Copy the blobs of an entry into a directory, checked; what an earlier try left there is continued.

        Nobody else may fetch that entry into that directory at the same time.

        Args:
            digest: of the entry.
            refs: what to copy.
            directory: local, on the disk of the cache.
            progress: told of the bytes.
            patience: seconds in all, for a person who waits for it; None: as the remote says.

        Returns:
            SHA-256 -> path; None if the remote could not give all of them (what came stays for the next try).

        Raises:
            RemoteError: with ``patience``, if the remote does not answer.
            OSError: if they cannot be written.
        """
        wanted = list({ref.sha256: ref for ref in refs}.values())
        deadline = monotonic() + (self.remote.patience if patience is None else patience)
        counter = ByteCount(sum(ref.size for ref in wanted), progress)
        got: dict[str, Path] = {}

        def one(ref: BlobRef) -> None:
            part = directory / f"partial-{digest}-{ref.sha256}"
            self._download(ref, part, deadline, counter)
            got[ref.sha256] = part

        with self._forgiving() if patience is None else self._strict():
            try:
                side_by_side(one, wanted, self.remote.workers, counter)
            except _Unusable as problem:
                self.reject(digest, str(problem))
            else:
                return got
        return None

    def reject(self, digest: str, reason: str) -> None:
        """What the remote has under a key cannot be used: one warning, and it is not asked for again for a while."""
        self.stats.add("remote_errors")
        self.leave(digest)
        self._warn(f"expected entry {digest[:12]} as stored at {self.remote.url}, got {reason}; it counts as missing")

    def leave(self, digest: str) -> None:
        """Do not ask for a key again for a while."""
        now = monotonic()
        with self._lock:
            if len(self._absent) > 10_000:
                self._absent = {key: until for key, until in self._absent.items() if until > now}
            self._absent[digest] = now + self.remote.retry_after

    def digests(self) -> list[str]:
        """The digests of all records, sorted.

        Raises:
            RemoteError: if the remote does not answer.
        """

        def find(fs: Any, beat: Beat) -> list[str]:
            fs.invalidate_cache()
            return [str(name) for name in fs.find(f"{self._root}/v1/actions")]

        with self._strict():
            names = self._bounded(find, self.remote.patience)
        found = (name.rsplit("/", 1)[-1].removesuffix(".json") for name in names)
        return sorted(digest for digest in found if is_sha256(digest))

    # ---- writing -------------------------------------------------------------------------------------------------

    def push(self, digest: str, record: bytes, blobs: Mapping[BlobRef, Path]) -> bool:
        """Store a record and its blobs; a blob that is there already is not sent again. The record goes last.

        Returns:
            False if the remote is down (one warning).
        """
        if monotonic() < self._down_until:
            return False
        with self._forgiving():
            self._push(digest, record, blobs, None, self.remote.patience)
            return True
        return False

    def push_strict(self, digest: str, record: bytes, blobs: Mapping[BlobRef, Path], progress: Progress | None) -> None:
        """As :meth:`push`, for a person who waits for it.

        Raises:
            RemoteError: if the remote does not take it.
        """
        with self._strict():
            self._push(digest, record, blobs, progress, float("inf"))

    def _push(
        self, digest: str, record: bytes, blobs: Mapping[BlobRef, Path], progress: Progress | None, patience: float
    ) -> None:
        counter = ByteCount(sum(ref.size for ref in blobs), progress)

        def one(item: tuple[BlobRef, Path]) -> None:
            ref, source = item
            place = _blob(ref.sha256)
            if ref.sha256 in self._damaged or self._size(place) != ref.size:
                limit = min(self.remote.timeout * (1 + ref.size // CHUNK), patience)
                self._write(place, lambda fs, to, beat: fs.put_file(str(source), to, callback=_beating(beat)), limit)
                self._damaged.discard(ref.sha256)
                self.stats.add("pushed_bytes", ref.size)
            counter.add(ref.size)

        side_by_side(one, list(blobs.items()), self.remote.workers, counter)
        if self._is_better(digest, record):
            self._write(_record(digest), lambda fs, to, beat: fs.pipe_file(to, record))
            self.stats.add("pushed_bytes", len(record))
        with self._lock:
            self._absent.pop(digest, None)

    def _is_better(self, digest: str, data: bytes) -> bool:
        """Whether a record is to replace what the remote has: not one that says the same, of a later version of this
        package, or with signatures that this one lacks."""
        try:
            there = self._read(_record(digest), 0, MAX_RECORD + 1)
        except (_Absent, _Unusable):
            return True
        try:
            old, new = decode_record(there, digest), decode_record(data, digest)
        except ForeignRecord:
            return False
        except BadRecord:
            return True
        return old != new and {one.key for one in old.signatures} <= {one.key for one in new.signatures}

    # ---- inside --------------------------------------------------------------------------------------------------

    def _download(self, ref: BlobRef, part: Path, deadline: float, counter: ByteCount) -> None:
        with open(part, "ab", opener=_no_link) as file:
            if file.tell() > ref.size:
                file.truncate(0)
                file.seek(0)
            counter.add(have := file.tell())
            while have < ref.size:
                if monotonic() > deadline:
                    raise _Unusable(f"{have} of {ref.size} bytes in the time allowed; the rest is fetched next time")
                try:
                    data = self._read(_blob(ref.sha256), have, min(have + CHUNK, ref.size))
                except _Absent:
                    raise _Unusable(f"no blob {ref.sha256[:12]}") from None
                if not data:
                    raise _Unusable(f"blob {ref.sha256[:12]}: {have} bytes in place of {ref.size}")
                counter.add(len(data))
                file.write(data)
                file.flush()  # it outlives this process
                have += len(data)
                self.stats.add("pulled_bytes", len(data))
        if hash_file(part, sync=True)[0] != ref:
            remove(part)
            self._damaged.add(ref.sha256)
            raise _Unusable(f"blob {ref.sha256[:12]}: other bytes than its SHA-256 says")

    def _read(self, place: str, start: int, end: int) -> bytes:
        def read(fs: Any, beat: Beat) -> bytes:
            path = self._path(place)
            fs.invalidate_cache(path)  # some look into listings that they keep, and others may have pushed since
            return bytes(fs.cat_file(path, start=start, end=end)[: end - start])

        try:
            return self._bounded(read)
        except _Absent:
            raise
        except CallFailed as failed:
            if isinstance(failed.__cause__, TimeoutError) or not self._answers(place):
                raise
            # The trouble is with this file alone: it is empty (S3: no such range), a directory, not to be read, ...
            raise _Unusable(f"{place.rsplit('/', 1)[-1][:12]}: {failed}") from failed

    def _answers(self, place: str) -> bool:
        try:
            self._size(place)
        except CallFailed:
            return False
        return True

    def _size(self, place: str) -> int | None:
        """The size of a file; None if there is none."""

        def size(fs: Any, beat: Beat) -> int | None:
            path = self._path(place)
            fs.invalidate_cache(path)
            info = fs.info(path)
            return None if info.get("type") == "directory" else info.get("size")

        try:
            return self._bounded(size)
        except _Absent:
            return None

    def _write(self, place: str, send: Callable[[Any, str, Beat], Any], limit: float | None = None) -> None:
        def write(fs: Any, beat: Beat) -> None:
            target = self._path(place)
            if "file" not in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,)):
                send(fs, target, beat)  # a store of objects: one is seen when it is whole
                return
            part = f"{target}.{uuid.uuid4().hex}.part"
            fs.makedirs(os.path.dirname(target), exist_ok=True)
            try:
                send(fs, part, beat)
                os.replace(part, target)
            finally:
                remove(Path(part))

        self._bounded(write, limit)

    def _path(self, place: str) -> str:
        return f"{self._root}/v1/{place}"

    def _file_system(self) -> Any:
        """A child that was forked opens its own: one that asyncio serves does not survive a fork."""
        if self._opened is None or self._opened[0] != os.getpid():
            import fsspec

            fs, self._root = fsspec.core.url_to_fs(self.remote.url, **self.remote.options)
            self._opened = os.getpid(), fs
        return self._opened[1]

    def _bounded(self, work: Callable[[Any, Beat], _T], limit: float | None = None) -> _T:
        """Give `work` the file system, and wait for it as long as `limit` (seconds; None: the remote's) allows.

        Raises:
            CallFailed: whatever went wrong, or took too long; _Absent if it says that there is no such file.
        """
        try:
            with self.stats.seconds("remote_seconds"):
                return call_bounded(
                    lambda beat: work(self._file_system(), beat), self.remote.timeout if limit is None else limit
                )
        except CallFailed as failed:
            if isinstance(failed.__cause__, FileNotFoundError) and self._opened is not None:  # no file of credentials
                raise _Absent(str(failed)) from failed.__cause__
            raise

    @contextmanager
    def _strict(self) -> Iterator[None]:
        try:
            yield
        except CallFailed as failed:
            self.stats.add("remote_errors")
            text = f"expected {self.remote.url} to answer, got {failed}; check it, then run it again"
            raise RemoteError(_without_user(text)) from failed.__cause__
        self._down_until = 0.0

    @contextmanager
    def _forgiving(self) -> Iterator[None]:
        """A remote that fails in the block costs one warning; it is then left alone for a while."""
        try:
            yield
        except CallFailed as failed:
            self._down(failed)

    def _down(self, failed: CallFailed) -> None:
        self.stats.add("remote_errors")
        with self._lock:
            known = monotonic() < self._down_until  # another thread has said so
            self._down_until = monotonic() + self.remote.retry_after
        if not known:
            self._warn(
                f"expected {self.remote.url} to answer, got {failed}; "
                f"the cache goes on without it for {self.remote.retry_after:g} s"
            )

    def _warn(self, text: str) -> None:
        text = _without_user(text)
        LOG.warning(text, extra={"event": "remote", "url": _without_user(self.remote.url)})
        warnings.warn(text, RemoteWarning, stacklevel=2)


class _Absent(CallFailed):
    """The remote says that there is no such file."""


class _Unusable(Exception):
    """The remote answered with something that cannot be used."""


def _no_link(path: str, flags: int) -> int:
    """Nothing is written through a link, or into a pipe, that somebody put into ``tmp``."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def _record(digest: str) -> str:
    return f"actions/{digest[:2]}/{digest}.json"


def _blob(sha256: str) -> str:
    return f"blobs/{sha256[:2]}/{sha256}"


def _without_user(text: str) -> str:
    return _USER.sub("://***@", text)


def _beating(beat: Beat) -> Any:
    from fsspec.callbacks import Callback

    class Beating(Callback):
        def call(self, hook_name: str | None = None, **kwargs: Any) -> None:
            beat()

    return Beating()
