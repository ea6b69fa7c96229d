"""a file in a store ─► a binary file that seeks: streamed once from its beginning, hashed as it comes.

For readers that walk a file once, such as ``data/tars.py``: parts of 8 MiB, the next one on its way while this one is
looked at, and no more than three of them in memory. What lies behind the current parts is asked for again.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from medtl_dist.data.ranges import Ranges

PART_BYTES = 8 * 2**20


class RemoteFile:
    """``size`` bytes of a file, by ranges of ``part_bytes`` (0: 8 MiB). Close it: it has a thread. Every call raises as
    ``Ranges.read`` does."""

    def __init__(self, ranges: Ranges, name: str, size: int, part_bytes: int = 0) -> None:
        self._ranges, self._name, self._size, self._part_bytes = ranges, name, size, part_bytes or PART_BYTES
        self._place = 0
        self._start = 0  # of the part in hand
        self._part: memoryview = memoryview(b"")
        self._hash = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="medtl-stream")
        self._next: Future[bytes | memoryview] | None = None

    def __enter__(self) -> RemoteFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def seek(self, offset: int) -> int:
        self._place = offset
        return offset

    def read(self, count: int) -> bytes:
        """Up to ``count`` bytes, fewer at the end of the file only."""
        stop = min(self._place + count, self._size)
        parts: list[bytes] = []
        if self._place < min(self._start, stop):
            end = min(self._start, stop)
            parts.append(bytes(self._ranges.read(self._name, self._place, end, self._size)))
            self._place = end
        while self._place < stop:
            if self._place >= self._start + len(self._part):
                self._advance()
                continue
            piece = self._part[self._place - self._start : stop - self._start]
            parts.append(bytes(piece))
            self._place += len(piece)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def sha256(self) -> str:
        """Of the whole file; what was not read yet is read now."""
        while self._start + len(self._part) < self._size:
            self._advance()
        return self._hash.hexdigest()

    def _advance(self) -> None:
        """Takes the next part into hand."""
        start = self._start + len(self._part)
        coming = self._next or self._ask(start)
        self._part = memoryview(b"")
        part = memoryview(coming.result())
        self._start, self._part = start, part
        following = start + len(part)
        self._next = self._ask(following) if following < self._size else None
        self._hash.update(part)

    def _ask(self, start: int) -> Future[bytes | memoryview]:
        stop = min(start + self._part_bytes, self._size)
        return self._thread.submit(self._ranges.read, self._name, start, stop, self._size)
