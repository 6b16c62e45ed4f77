"""The second tier: any file system that fsspec knows (s3, gs, hf, file, memory, ...), with the same layout.

A remote is a convenience, never a dependency: every wait is bounded, a remote that fails costs one warning and is then
left alone for a while, and what comes from it is checked like everything else before it is stored.
"""

from __future__ import annotations

import logging
import queue
import threading
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any, Final, TypeVar

from .errors import RemoteError, RemoteWarning, one_line
from .files import hash_file, remove, rename
from .leases import held_alone
from .records import BlobRef, is_sha256
from .stats import CacheStats

LOG: Final = logging.getLogger("compile_cache.remote")
CHUNK: Final = 4 << 20  # bytes asked for at a time
MAX_RECORD: Final = 16 << 20  # bytes; a longer file is no record

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all), from several threads one at a time."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class Remote:
    """Where the second tier lies, and how long it may take.

    Args:
        url: of its directory, such as ``s3://bucket/cache`` or ``file:///mnt/cache``.
        push: write-back: what is built or stored here goes there as well, at once.
        timeout: seconds without an answer or progress after which the remote counts as down.
        patience: seconds that one look-up may take in all, however well it progresses.
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
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)  # may hold credentials

    def __post_init__(self) -> None:
        if not isinstance(self.url, str) or not self.url.strip():
            raise RemoteError(f"url: expected the URL of a directory, got {self.url!r}; give one such as s3://bucket/x")
        for name, least in (("timeout", 0.01), ("patience", 0.01), ("retry_after", 0), ("workers", 1)):
            if not getattr(self, name) >= least:
                raise RemoteError(f"{name}: expected at least {least}, got {getattr(self, name)}; give a larger number")


class RemoteTier:
    """Copies records and blobs from and to a remote. Thread safe; keeps no lock while it waits.

    Args:
        remote: where.
        stats: counters to keep.

    Raises:
        RemoteError: if the URL names no file system that is installed here.
    """

    def __init__(self, remote: Remote, stats: CacheStats) -> None:
        import fsspec

        self.remote = remote
        self.stats = stats
        try:
            self._fs, self._root = fsspec.core.url_to_fs(remote.url, **remote.options)
        except (ImportError, ValueError) as error:
            raise RemoteError(
                f"expected a URL that fsspec can open, got {remote.url}: {one_line(error, 120)}; install what its "
                "protocol needs (for s3: pip install s3fs)"
            ) from error
        protocol = self._fs.protocol
        self._renames = "file" in (protocol if isinstance(protocol, tuple) else (protocol,))
        self._down_until = 0.0
        self._absent: dict[str, float] = {}  # digest -> until when it is not asked for

    # ---- reading -------------------------------------------------------------------------------------------------

    def record(self, digest: str) -> bytes | None:
        """The bytes of a record; None if the remote has none, is down, or is not asked for now. Never raises."""
        if monotonic() < max(self._down_until, self._absent.get(digest, 0.0)):
            return None
        path = self._path("actions", digest, ".json")
        with self._forgiving():
            try:
                return self._bounded(lambda beat: self._fs.cat_file(path, start=0, end=MAX_RECORD))
            except FileNotFoundError:
                self._leave(digest)
        return None

    def blobs(
        self,
        digest: str,
        refs: Iterable[BlobRef],
        directory: Path,
        progress: Progress | None = None,
        patience: float | None = None,
    ) -> dict[str, Path] | None:
        """Copy the blobs of an entry into a directory, checked; parts that an earlier try left there are continued.

        Args:
            digest: of the entry.
            refs: what to copy.
            directory: local, on the disk of the cache.
            progress: told of the bytes.
            patience: seconds in all; None: as the remote says.

        Returns:
            SHA-256 -> path that nobody else uses; None if the remote could not give all of them (the parts stay for
            the next try).
        """
        wanted = list({ref.sha256: ref for ref in refs}.values())
        deadline = monotonic() + (self.remote.patience if patience is None else patience)
        counter = _Bytes(sum(ref.size for ref in wanted), progress)
        got: dict[str, Path] = {}

        def one(ref: BlobRef) -> None:
            got[ref.sha256] = self._download(ref, directory, deadline, counter)

        with self._forgiving():
            try:
                self._side_by_side(one, wanted)
            except _Unusable as problem:
                self.reject(digest, str(problem))
            else:
                return got
        for path in got.values():
            remove(path)
        return None

    def reject(self, digest: str, reason: str) -> None:
        """What the remote has under a key cannot be used: one warning, and it is not asked for again for a while."""
        self.stats.add("remote_errors")
        self._leave(digest)
        self._warn(f"expected entry {digest[:12]} as stored at {self.remote.url}, got {reason}; it counts as missing")

    def digests(self) -> list[str]:
        """The digests of all records, sorted.

        Raises:
            RemoteError: if the remote does not answer.
        """
        with self._strict():
            names = self._bounded(lambda beat: self._fs.find(f"{self._root}/v1/actions"), self.remote.patience)
        found = (str(name).rsplit("/", 1)[-1].removesuffix(".json") for name in names)
        return sorted(digest for digest in found if is_sha256(digest))

    # ---- writing -------------------------------------------------------------------------------------------------

    def push(self, digest: str, record: bytes, blobs: Mapping[BlobRef, Path], progress: Progress | None = None) -> bool:
        """Store a record and its blobs; what is there already is not sent again. The record goes last.

        Returns:
            False if the remote is down (one warning).
        """
        if monotonic() < self._down_until:
            return False
        with self._forgiving():
            self._push(digest, record, blobs, _Bytes(sum(ref.size for ref in blobs), progress))
            return True
        return False

    def push_strict(self, digest: str, record: bytes, blobs: Mapping[BlobRef, Path], progress: Progress | None) -> None:
        """As :meth:`push`, for a person who waits for it.

        Raises:
            RemoteError: if the remote does not take it.
        """
        with self._strict():
            self._push(digest, record, blobs, _Bytes(sum(ref.size for ref in blobs), progress))

    def _push(self, digest: str, record: bytes, blobs: Mapping[BlobRef, Path], counter: _Bytes) -> None:
        def one(item: tuple[BlobRef, Path]) -> None:
            ref, source = item
            target = self._path("blobs", ref.sha256)
            if self._size(target) != ref.size:
                self._put(source, target)
                self.stats.add("pushed_bytes", ref.size)
            counter.add(ref.size)

        self._side_by_side(one, list(blobs.items()))
        self._absent.pop(digest, None)
        target = self._path("actions", digest, ".json")
        if self._renames:
            self._rename_into(target, lambda part: self._bounded(lambda beat: self._fs.pipe_file(part, record)))
        else:
            self._bounded(lambda beat: self._fs.pipe_file(target, record))
        self.stats.add("pushed_bytes", len(record))

    def _put(self, source: Path, target: str) -> None:
        def put(place: str) -> None:
            self._bounded(lambda beat: self._fs.put_file(str(source), place, callback=_beating(beat)))

        if self._renames:
            self._rename_into(target, put)
        else:
            put(target)

    def _rename_into(self, target: str, write: Callable[[str], Any]) -> None:
        """For file systems where a file can be seen half-written."""
        part = f"{target}.{threading.get_ident():x}.part"
        self._bounded(lambda beat: self._fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True))
        try:
            write(part)
            self._bounded(lambda beat: self._fs.mv(part, target))
        except BaseException:
            remove(Path(part))
            raise

    # ---- inside --------------------------------------------------------------------------------------------------

    def _download(self, ref: BlobRef, directory: Path, deadline: float, counter: _Bytes) -> Path:
        done = directory / f"blob-{uuid.uuid4().hex}"
        part = directory / f"partial-{ref.sha256}"
        part.touch()
        with held_alone(part) as alone:
            if not alone:  # another process fetches it too: each its own
                part = directory / f"partial-{uuid.uuid4().hex}"
            self._continue(ref, part, deadline, counter)
            if hash_file(part, sync=True)[0] != ref:
                remove(part)
                raise _Unusable(f"blob {ref.sha256[:12]}: other bytes than its SHA-256 says")
            rename(part, done)
        return done

    def _continue(self, ref: BlobRef, part: Path, deadline: float, counter: _Bytes) -> None:
        source = self._path("blobs", ref.sha256)
        with open(part, "ab") as file:
            if file.tell() > ref.size:
                file.truncate(0)
            counter.add(have := file.tell())
            while have < ref.size:
                if monotonic() > deadline:
                    raise TimeoutError(f"{have} of {ref.size} bytes in the time allowed; the rest is fetched next time")
                data = self._range(source, have, min(have + CHUNK, ref.size))
                if not data:
                    raise _Unusable(f"blob {ref.sha256[:12]}: {have} bytes in place of {ref.size}")
                file.write(data)
                have += len(data)
                counter.add(len(data))
                self.stats.add("pulled_bytes", len(data))

    def _range(self, path: str, start: int, end: int) -> bytes:
        try:
            return self._bounded(lambda beat: self._fs.cat_file(path, start=start, end=end))[: end - start]
        except FileNotFoundError:
            raise _Unusable(f"no blob {path.rsplit('/', 1)[-1][:12]}") from None

    def _size(self, path: str) -> int | None:
        try:
            info = self._bounded(lambda beat: self._fs.info(path, refresh=True))
        except FileNotFoundError:
            return None
        return info.get("size")

    def _path(self, kind: str, name: str, suffix: str = "") -> str:
        return f"{self._root}/v1/{kind}/{name[:2]}/{name}{suffix}"

    def _leave(self, digest: str) -> None:
        if len(self._absent) > 10_000:
            self._absent = {key: until for key, until in self._absent.items() if until > monotonic()}
        self._absent[digest] = monotonic() + self.remote.retry_after

    def _side_by_side(self, work: Callable[[Any], _T], items: list[Any]) -> list[_T]:
        if len(items) < 2:
            return [work(item) for item in items]
        with ThreadPoolExecutor(min(self.remote.workers, len(items)), "compile-cache-remote") as pool:
            return list(pool.map(work, items))

    def _bounded(self, work: Callable[[Callable[[], None]], _T], limit: float | None = None) -> _T:
        """Run `work` in a thread of its own, and wait for it as long as it answers or calls its `beat` in time.

        A call that hangs is left behind: its thread ends with the process.
        """
        limit = self.remote.timeout if limit is None else limit
        results: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
        last = [monotonic()]

        def beat() -> None:
            last[0] = monotonic()

        def run() -> None:
            try:
                results.put((True, work(beat)))
            except BaseException as error:
                results.put((False, error))

        with self.stats.seconds("remote_seconds"):
            threading.Thread(target=run, daemon=True, name="compile-cache-remote-call").start()
            while True:
                try:
                    done, value = results.get(timeout=max(0.0, last[0] + limit - monotonic()))
                    break
                except queue.Empty:
                    if monotonic() >= last[0] + limit:
                        raise TimeoutError(f"no answer for {limit:g} s") from None
        if not done:
            raise value
        return value

    @contextmanager
    def _strict(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.stats.add("remote_errors")
            got = f"{type(error).__name__}: {one_line(error, 160)}"
            raise RemoteError(
                f"expected {self.remote.url} to answer, got {got}; check it, then run it again"
            ) from error

    @contextmanager
    def _forgiving(self) -> Iterator[None]:
        """What goes wrong in the block costs one warning; the remote is then left alone for a while."""
        try:
            yield
        except Exception as error:  # whatever a file system of fsspec may raise
            self.stats.add("remote_errors")
            self._down_until = monotonic() + self.remote.retry_after
            got = f"{type(error).__name__}: {one_line(error, 160)}"
            self._warn(
                f"expected {self.remote.url} to answer, got {got}; "
                f"the cache goes on without it for {self.remote.retry_after:g} s"
            )

    def _warn(self, text: str) -> None:
        LOG.warning(text, extra={"event": "remote", "url": self.remote.url})
        warnings.warn(text, RemoteWarning, stacklevel=2)


class _Unusable(Exception):
    """The remote answered with something that cannot be used."""


class _Bytes:
    """Adds up bytes from several threads."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total, self.done = total, 0
        self._progress = progress
        self._lock = threading.Lock()

    def add(self, size: int) -> None:
        with self._lock:
            self.done += size
            if self._progress is not None:
                self._progress(self.done, self.total)


def _beating(beat: Callable[[], None]) -> Any:
    from fsspec.callbacks import Callback

    class Beating(Callback):
        def call(self, hook_name: str | None = None, **kwargs: Any) -> None:
            beat()

    return Beating()
