"""shards in a store ─► bytes: ranges of files through time-outs, retries that resume, and the local cache.

A range is asked for once when all is well. When it breaks, what came is kept and the rest asked for: over http from the
byte where it broke, from S3 and GCS (Arrow hands over a whole range or nothing) in smaller parts from then on. Each
range ends in bounded time, with its bytes or with an error that names the address.
"""

from __future__ import annotations

import functools
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import pyarrow as pa
from pyarrow import fs as pafs

from medtl_dist.data.cache import BlockCache
from medtl_dist.data.web import Fetched, HttpSource, another_length
from medtl_dist.errors import DataError, Interrupted
from medtl_dist.storage import (
    StorageOptions,
    Transient,
    bounded,
    classify,
    environment,
    filesystem,
    parse_place,
)

CAREFUL_BYTES = 256 * 2**10  # the parts in which a broken range is asked for again
MAX_WHOLE_BYTES = 2**30
_OPEN_FILES = 4096
_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 10.0
T = TypeVar("T")


class Source(Protocol):
    """Raw access to the files of one place, a request per call and no second try. Called by several threads."""

    def size(self, name: str) -> int | None:
        """Its length; None: no such file. Raises: Transient; DataError; UserError, access refused."""
        ...

    def fetch(self, name: str, start: int, stop: int, size: int) -> Fetched:
        """Bytes ``[start, stop)`` of a file of ``size``. Raises: as ``size``; DataError, missing or of another length."""
        ...

    def names(self) -> list[str] | None:
        """What lies in the folder; None: a web server does not say. Raises: as ``size``."""
        ...


@dataclass(frozen=True)
class Clock:
    """Time and chance, so that tests need neither."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    draw: Callable[[], float] = random.random


@dataclass(frozen=True)
class Patience:
    """How long a failing read is tried: ``retries`` times without a byte gained, and ``total_s`` in all, twice the time-out
    for each try."""

    retries: int
    timeout_s: float

    @property
    def total_s(self) -> float:
        return (self.retries + 1) * 2 * self.timeout_s

    def pause(self, failures: int, asked_s: float, chance: float) -> float:
        """Seconds before the next try: doubling from 0.2 to 10, at least what the server asked for (10 at most), the
        upper half by chance so that a thousand readers don't come back at once."""
        pause = min(_LONGEST_PAUSE_S, _PAUSE_S * 2.0 ** min(failures - 1, 16))
        return max(pause * (0.5 + chance / 2), min(asked_s, _LONGEST_PAUSE_S))


class _Tries:
    """The tries of one read so far. ``failures``: without a byte gained since; ``troubles``: all that went wrong."""

    def __init__(self, url: str, patience: Patience, clock: Clock) -> None:
        self._url, self._patience, self._clock = url, patience, clock
        self._begun = clock.now()
        self.failures = self.troubles = 0

    def failed(self, problem: Transient, *, gained: bool = False) -> None:
        """Waits until the next try; ``gained``: some bytes came all the same. Raises: Interrupted, out of patience."""
        self.failures = 0 if gained else self.failures + 1
        self.troubles += 1
        pause = self._patience.pause(max(1, self.failures), problem.wait_s, self._clock.draw())
        spent = self._clock.now() - self._begun
        if self.failures > self._patience.retries or spent + pause >= self._patience.total_s:
            tries = "1 try" if self.troubles == 1 else f"{self.troubles} tries"
            raise Interrupted(
                f"{self._url} can't be read ({problem}; {tries} in {spent:.0f} s): check the network and the server, "
                "then run the same command again (a training run: with --resume)"
            ) from None
        self._clock.sleep(pause)


class Ranges:
    """Files below one address. Thread-safe; one per process and set (``ranges_of``)."""

    def __init__(
        self,
        folder: str,
        source: Source,
        options: StorageOptions,
        cache: BlockCache | None = None,
        clock: Clock = Clock(),
    ) -> None:
        self.folder = folder
        self._at = f" at {options.endpoint}" if folder.startswith("s3://") and options.endpoint else ""
        self._source = source
        self._patience = Patience(options.retries, options.timeout_s)
        self._cache = cache
        self._clock = clock

    def url(self, name: str) -> str:
        """The file's address, to be shown."""
        return f"{self.folder}/{name}{self._at}"

    def read(self, name: str, start: int, stop: int, size: int, *, fresh: bool = False) -> bytes | memoryview:
        """Bytes ``[start, stop)`` of a file of ``size`` bytes. ``fresh``: from the store, whatever is cached.

        Raises:
            DataError: the file is missing, of another length, or something else came in its place.
            UserError: access refused.
            Interrupted: the store can't be reached, or not in time.
        """
        if self._cache is None:
            return self._fetch(name, start, stop, size)
        return self._cache.read(name, start, stop, size, lambda a, b: self._fetch(name, a, b, size), fresh=fresh)

    def size(self, name: str) -> int | None:
        """The length of a file as the store tells it; None: there is none. Raises: as ``read``."""
        return self._ask(name, lambda: self._source.size(name))

    def names(self) -> list[str] | None:
        """What lies in the folder, in no order; None: a web server does not say. Raises: as ``read``."""
        return self._ask("", self._source.names)

    def read_whole(self, name: str) -> bytes | None:
        """A whole small file, of a length not known before; None: there is none. Raises: as ``read``."""
        size = self.size(name)
        if size is None:
            return None
        if size > MAX_WHOLE_BYTES:
            raise DataError(f"{self.url(name)} has {size:,} bytes: not a file of a set; check the address")
        return bytes(self._fetch(name, 0, size, size))

    def _ask(self, name: str, act: Callable[[], T]) -> T:
        tries = self._tries(name)
        while True:
            try:
                return act()
            except Transient as problem:
                tries.failed(problem)

    def _tries(self, name: str) -> _Tries:
        return _Tries(self.url(name), self._patience, self._clock)

    def _fetch(self, name: str, start: int, stop: int, size: int) -> bytes | memoryview:
        parts: list[bytes | memoryview] = []
        tries = self._tries(name)
        while start < stop:
            end = min(stop, start + CAREFUL_BYTES) if tries.troubles else stop
            try:
                got = self._source.fetch(name, start, end, size)
            except Transient as problem:
                got = Fetched(b"", problem)
            if len(got.data):
                parts.append(got.data)
                start += len(got.data)
                tries.failures = 0
            if start < end:
                tries.failed(got.problem or Transient("a short answer"), gained=len(got.data) > 0)
        return parts[0] if len(parts) == 1 else b"".join(parts)


class ArrowSource:
    """S3 and GCS. A file is opened (a HEAD request) once per process, then read by as many requests as ranges."""

    def __init__(self, folder: str, options: StorageOptions) -> None:
        self._place = parse_place(folder)
        self._at = f" at {options.endpoint}" if self._place.scheme == "s3" and options.endpoint else ""
        self._fs = filesystem(self._place, options, attempts=1)
        self._limit_s = 2 * options.timeout_s
        self._files: OrderedDict[str, pa.NativeFile] = OrderedDict()
        self._lock = threading.Lock()
        self._opening = [threading.Lock() for _ in range(64)]

    def size(self, name: str) -> int | None:
        try:
            return bounded(lambda: self._open(name).size(), self._limit_s)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise classify(error, self._url(name)) from None

    def fetch(self, name: str, start: int, stop: int, size: int) -> Fetched:
        file = self._call(name, lambda: self._open(name))
        found = file.size()
        if found != size:
            with self._lock:
                self._files.pop(name, None)
            raise another_length(self._url(name), found, size, _content_type(file))
        data = self._call(name, lambda: file.read_at(stop - start, start))
        return Fetched(data)

    def names(self) -> list[str]:
        selector = pafs.FileSelector(self._place.path, allow_not_found=True)
        infos = self._call("", lambda: self._fs.get_file_info(selector))
        return [info.base_name for info in infos]

    def _url(self, name: str) -> str:
        return f"{self._place.url}/{name}{self._at}"

    def _call(self, name: str, act: Callable[[], T]) -> T:
        try:
            return bounded(act, self._limit_s)
        except OSError as error:
            raise classify(error, self._url(name)) from None

    def _open(self, name: str) -> pa.NativeFile:
        with self._opening[hash(name) % len(self._opening)]:  # several readers of a new file ask for its length once
            with self._lock:
                file = self._files.get(name)
                if file is not None:
                    self._files.move_to_end(name)
                    return file
            file = self._fs.open_input_file(f"{self._place.path}/{name}")
            with self._lock:
                self._files[name] = file
                if len(self._files) > _OPEN_FILES:
                    self._files.popitem(last=False)
            return file


@functools.lru_cache(maxsize=8)
def _ranges(made_for: tuple[object, ...], folder: str, options: StorageOptions, identity: str) -> Ranges:
    del made_for
    place = parse_place(folder)
    source = HttpSource(folder, options) if place.scheme in ("http", "https") else ArrowSource(folder, options)
    cache = None
    if options.cache_dir is not None and identity:
        cache = BlockCache(options.cache_dir, options.cache_mib * 2**20, identity)
    return Ranges(folder, source, options, cache)


def ranges_of(folder: str, options: StorageOptions, identity: str = "") -> Ranges:
    """The reader of a remote folder, one per process, made when it is first asked for. ``identity``: of the set (its
    sha256), by which cached ranges are found again; '' caches nothing.

    Raises: UserError, a bad address, endpoint, CA bundle or cache folder.
    """
    return _ranges(environment(), folder, options, identity)


def _content_type(file: pa.NativeFile) -> str | None:
    try:
        kind = file.metadata().get(b"Content-Type") or file.metadata().get("Content-Type")
    except (OSError, AttributeError, pa.ArrowException):
        return None
    return kind.decode("latin-1") if isinstance(kind, bytes) else kind
