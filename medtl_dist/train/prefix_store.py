"""boundary activations ↔ files of one node, shared by every process on it: written once, checked, read in place.

An entry is a folder ``NAME``: ``data.bin`` (rows of equal length, in index order), ``marks/NNNNN`` (a file per chunk of rows:
who computes the chunk holds its lock; the chunk's sha256 once it is whole) and ``manifest.json``, written last. Locks
are the kernel's (flock), so what a killed process held is free, and its half chunk, unmarked, is made anew. Whoever reads an
entry holds a shared lock on its ``in_use``: only entries that nobody holds are removed to make room, the least recently
used first. Nothing here is ever unpickled, or trusted before its checksum has been compared.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import mmap
import os
import shutil
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from medtl_dist.errors import UserError

FORMAT_VERSION = 1
FOLDER = "medtl-prefix"
_SHARE_OF_FREE = 0.5

Bytes = npt.NDArray[np.uint8]


@dataclass
class Store:
    """Entries below ``folder``; ``limit_bytes`` for all of them, None: half of what is free on the disk at first use.

    Raises: UserError, the folder can't be made.
    """

    folder: Path
    limit_bytes: int | None = None

    def __post_init__(self) -> None:
        self.folder = Path(self.folder).expanduser().absolute() / FOLDER
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"prefix cache: {self.folder} can't be made ({error.strerror}); name a folder on a local disk, or turn it off"
            ) from None

    @property
    def limit(self) -> int:
        """The limit in bytes, what is kept already included."""
        if self.limit_bytes is None:
            self.limit_bytes = int(self.used() + _SHARE_OF_FREE * shutil.disk_usage(self.folder).free)
        return self.limit_bytes

    def used(self) -> int:
        """Bytes of all entries, those included that are still being written."""
        return sum(_length(path) for path in self._entries())

    def is_complete(self, name: str) -> bool:
        return (self.folder / name / "manifest.json").is_file()

    def about(self, name: str) -> dict[str, Any] | None:
        """What was said of a complete entry when it was opened; None: it is not there, or not complete."""
        try:
            about = json.loads((self.folder / name / "manifest.json").read_bytes())["about"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return about if isinstance(about, dict) else None

    def open(self, name: str, shape: Shape, about: Mapping[str, Any] | None = None) -> Entry | None:
        """The entry, made where it is not there yet; None: there is no room. It stays until it is closed.

        ``about``: plain values to be found beside it. Raises: OSError, the disk.
        """
        path = self.folder / name
        with self._locked():
            if not (path / "data.bin").is_file() or _length(path) != shape.num_bytes:
                shutil.rmtree(path, ignore_errors=True)
                if not self._make_room(shape.num_bytes):
                    return None
                (path / "marks").mkdir(mode=0o700, parents=True)
                with (path / "data.bin").open("xb") as file:
                    file.truncate(shape.num_bytes)
            held = os.open(path / "in_use", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(held, fcntl.LOCK_SH)
            os.utime(path / "in_use")
        return Entry(path, shape, dict(about or {}), held)

    def _make_room(self, num_bytes: int) -> bool:
        """Remove entries that nobody holds, the least recently used first, until so many bytes fit."""
        missing = self.used() + num_bytes - self.limit
        if missing > 0 and num_bytes <= self.limit:
            for path in sorted(self._entries(), key=_last_used):
                missing -= self._removed(path)
                if missing <= 0:
                    break
        return missing <= 0

    def _removed(self, path: Path) -> int:
        """Bytes gained by removing an entry: 0 where somebody holds it."""
        with (path / "in_use").open("ab") as held:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return 0
            length = _length(path)
            shutil.rmtree(path, ignore_errors=True)
            return length

    def _entries(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if path.is_dir()]

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time makes or removes entries; nothing long is done meanwhile."""
        with (self.folder / "lock").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


@dataclass(frozen=True)
class Shape:
    """Rows of an entry, and how many of them make a chunk."""

    num_rows: int
    row_bytes: int
    chunk_rows: int

    @property
    def num_bytes(self) -> int:
        return self.num_rows * self.row_bytes

    @property
    def num_chunks(self) -> int:
        return -(-self.num_rows // self.chunk_rows)

    def rows_of(self, chunk: int) -> tuple[int, int]:
        """First row and end of a chunk."""
        return chunk * self.chunk_rows, min((chunk + 1) * self.chunk_rows, self.num_rows)


@dataclass
class Entry:
    """One entry, held: it is not removed until it is closed."""

    path: Path
    shape: Shape
    about: dict[str, Any]
    _held: int  # a descriptor
    _done: set[int] = field(default_factory=set)
    _mapped: Bytes | None = None

    def __post_init__(self) -> None:
        self._let_go = weakref.finalize(self, os.close, self._held)

    def close(self) -> None:
        """Let go of it: it may be removed now. What was read from it in place stays readable."""
        self._mapped = None
        self._let_go()

    def fill_one(self, compute: Callable[[int, int], Bytes], turn: int = 0) -> str:
        """Compute one chunk that is missing and that nobody else is at.

        Args:
            compute: the rows [start, stop), uint8 [stop - start, row_bytes].
            turn: where to begin to look, so that several processes take different ones.

        Returns:
            "filled"; "waiting", where others are at all that is missing; "complete".

        Raises: OSError, the disk; what ``compute`` raises.
        """
        waiting = False
        for step in range(self.shape.num_chunks):
            chunk = (turn + step) % self.shape.num_chunks
            if chunk in self._done:
                continue
            with self._mark(chunk) as mark:
                if mark is None:
                    waiting = True
                elif len(mark.read()) == 64:
                    self._done.add(chunk)
                else:
                    self._write(chunk, mark, compute(*self.shape.rows_of(chunk)))
                    return "filled"
        if waiting:
            return "waiting"
        self._commit()
        return "complete"

    def rows(self) -> Bytes | None:
        """The whole entry in place, uint8 [num_rows, row_bytes], read-only; None: a chunk was damaged, fill it again.

        Every chunk's checksum is compared before the first use. Raises: OSError, the disk.
        """
        if self._mapped is None and self.shape.num_rows > 0:
            with (self.path / "data.bin").open("rb") as file:
                data = np.frombuffer(mmap.mmap(file.fileno(), self.shape.num_bytes, access=mmap.ACCESS_READ), np.uint8)
            data = data.reshape(self.shape.num_rows, self.shape.row_bytes)
            damaged = self._damaged(data)
            if damaged:
                (self.path / "manifest.json").unlink(missing_ok=True)
                for chunk in damaged:
                    self._forget(chunk, data)
                return None
            self._mapped = data
        return self._mapped

    def _damaged(self, data: Bytes) -> list[int]:
        try:
            listed = json.loads((self.path / "manifest.json").read_bytes())["sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            listed = []
        if not isinstance(listed, list) or len(listed) != self.shape.num_chunks:
            return list(range(self.shape.num_chunks))
        return [chunk for chunk in range(self.shape.num_chunks) if self._digest(data, chunk) != listed[chunk]]

    def _digest(self, data: Bytes, chunk: int) -> str:
        start, stop = self.shape.rows_of(chunk)
        return hashlib.sha256(data[start:stop].data).hexdigest()

    def _forget(self, chunk: int, data: Bytes) -> None:
        """Unmark a chunk, unless another process is at it, or has made it anew meanwhile."""
        self._done.discard(chunk)
        with self._mark(chunk) as mark:
            if mark is not None and mark.read() != self._digest(data, chunk).encode():
                mark.truncate(0)

    @contextlib.contextmanager
    def _mark(self, chunk: int) -> Iterator[IO[bytes] | None]:
        """The chunk's mark, held; None: another process holds it."""
        descriptor = os.open(self.path / "marks" / f"{chunk:05d}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "r+b", buffering=0) as mark:
            try:
                fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
                return
            yield mark

    def _write(self, chunk: int, mark: IO[bytes], rows: Bytes) -> None:
        start, stop = self.shape.rows_of(chunk)
        if rows.shape != (stop - start, self.shape.row_bytes):
            raise ValueError(f"rows of shape {rows.shape} for {(stop - start, self.shape.row_bytes)}")
        mark.truncate(0)
        whole = data = np.ascontiguousarray(rows).data.cast("B")
        with (self.path / "data.bin").open("r+b", buffering=0) as file:
            place = start * self.shape.row_bytes
            while data:
                written = os.pwrite(file.fileno(), data, place)
                data, place = data[written:], place + written
        mark.seek(0)
        mark.write(hashlib.sha256(whole).hexdigest().encode())
        self._done.add(chunk)

    def _commit(self) -> None:
        """Write the manifest, whoever comes first."""
        target = self.path / "manifest.json"
        if target.is_file():
            return
        digests = [(self.path / "marks" / f"{chunk:05d}").read_text() for chunk in range(self.shape.num_chunks)]
        content = {"format_version": FORMAT_VERSION, "about": self.about, "sha256": digests}
        part = target.with_name(f"manifest.{os.getpid()}.tmp")
        part.write_text(json.dumps(content))
        part.replace(target)


def remove_store(folder: Path) -> None:
    """Delete all that a store kept below ``folder``, at the end of what it served; nothing where there is none."""
    shutil.rmtree(Path(folder).expanduser().absolute() / FOLDER, ignore_errors=True)


def _length(path: Path) -> int:
    try:
        return (path / "data.bin").stat().st_size
    except OSError:
        return 0


def _last_used(path: Path) -> float:
    try:
        return (path / "in_use").stat().st_mtime
    except OSError:
        return 0.0
