"""bytes from a store ─► local disk ─► the same bytes again: a cache shared by the processes of a node.

Blocks of 512 KiB at fixed places of a file, one file each, under a name made of the set's sha256, the file's name and the
block's number. So ranges that lane boundaries cut differently in each epoch, another batch size, another rank and the
evaluation all find the same blocks; nothing is fetched that the set does not hold twice; and a set packed anew finds nothing old.
A block carries a CRC-32: one damaged on the disk is fetched again. Written under another name and renamed, so no reader
sees a part. The least recently used go first; the size is looked at after every so many bytes written.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import os
import struct
import sys
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

from medtl_dist.errors import UserError

BLOCK_BYTES = 512 * 2**10
_HEAD = struct.Struct(">4sI")
_MAGIC = b"mtb1"
_FILL_AFTER_EVICTION = 0.9
_LOOKS = 32  # looks at the folder's size while the limit is written once

Fetch = Callable[[int, int], bytes | memoryview]


class BlockCache:
    """Blocks of one set's files in ``folder``, which other sets and processes may share; ``limit_bytes`` for all.

    Raises: UserError, the folder can't be made.
    """

    def __init__(self, folder: str | Path, limit_bytes: int, identity: str) -> None:
        self.folder = Path(folder).expanduser().absolute() / "medtl-blocks"
        self._limit = limit_bytes
        self._identity = identity
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._unseen = limit_bytes  # look at what is there already before the first block is written
        self._writing = True
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"data.cache_dir {folder}: can't be made ({error.strerror}); name a folder on a local disk, or null"
            ) from None

    def read(self, name: str, start: int, stop: int, size: int, fetch: Fetch, *, fresh: bool = False) -> bytes:
        """Bytes ``[start, stop)`` of a file of ``size``; ``fetch(start, stop)`` gets, in one call, what is missing.

        ``fresh``: all from ``fetch``, replacing what is here. Raises: what ``fetch`` raises.
        """
        numbers = range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES))
        blocks = {} if fresh else {number: block for number in numbers if (block := self._load(name, number, size))}
        lacking = [number for number in numbers if number not in blocks]
        if lacking:
            first, last = lacking[0], lacking[-1]
            begin = first * BLOCK_BYTES
            data = memoryview(fetch(begin, min(size, (last + 1) * BLOCK_BYTES)))
            for number in range(first, last + 1):
                place = number * BLOCK_BYTES - begin
                block = data[place : place + BLOCK_BYTES]
                if number not in blocks:
                    self._store(name, number, block)
                blocks[number] = block
        skip = start - numbers[0] * BLOCK_BYTES
        return b"".join(blocks[number] for number in numbers)[skip : skip + stop - start]

    def _path(self, name: str, number: int) -> Path:
        digest = hashlib.sha256(f"{self._identity}\0{name}\0{number}".encode()).hexdigest()
        return self.folder / digest[:2] / digest[2:40]

    def _load(self, name: str, number: int, size: int) -> memoryview | None:
        """The block, or None where there is none that is whole."""
        path = self._path(name, number)
        try:
            raw = path.read_bytes()
            os.utime(path)  # used just now
        except OSError:
            return None
        block = memoryview(raw)[_HEAD.size :]
        expected = min(size, (number + 1) * BLOCK_BYTES) - number * BLOCK_BYTES
        if len(block) != expected or raw[: _HEAD.size] != _HEAD.pack(_MAGIC, zlib.crc32(block)):
            return None
        return block

    def _store(self, name: str, number: int, block: memoryview) -> None:
        if not self._writing:
            return
        length = _HEAD.size + len(block)
        with self._lock:
            self._unseen += length
            look = self._unseen * _LOOKS >= self._limit
            if look:
                self._unseen = 0
            mark = next(self._numbers)
        path = self._path(name, number)
        part = path.with_name(f"{path.name}.{os.getpid()}.{mark}")
        try:
            if look:
                self.evict()
            path.parent.mkdir(mode=0o700, exist_ok=True)
            try:
                with part.open("xb") as file:
                    file.write(_HEAD.pack(_MAGIC, zlib.crc32(block)))
                    file.write(block)
                part.replace(path)
            except OSError:
                with contextlib.suppress(OSError):
                    part.unlink()
                raise
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        with self._lock:
            told, self._writing = not self._writing, False
        if not told:
            why = error.strerror or type(error).__name__
            print(f"note: the cache in {self.folder} can't be written ({why}); going on without", file=sys.stderr)

    def evict(self) -> None:
        """Remove the least recently used blocks until nine tenths of the limit are left; one process at a time."""
        with (self.folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return  # somebody else is at it
            found = sorted(self._files())
            total = sum(length for _, length, _ in found)
            if total <= self._limit * (1 - 1 / _LOOKS):
                return
            for _, length, path in found:
                if total <= self._limit * _FILL_AFTER_EVICTION:
                    break
                with contextlib.suppress(OSError):
                    os.unlink(path)
                total -= length

    def _files(self) -> list[tuple[int, int, str]]:
        """Time of last use, length and path of each block there is, parts of killed writers included."""
        found = []
        for folder in os.scandir(self.folder):
            if not folder.is_dir(follow_symlinks=False):
                continue
            for entry in os.scandir(folder.path):
                with contextlib.suppress(OSError):  # another process has removed it
                    status = entry.stat(follow_symlinks=False)
                    found.append((status.st_mtime_ns, status.st_size, entry.path))
        return found
