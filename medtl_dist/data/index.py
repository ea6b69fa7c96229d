"""index.parquet ─► rows of one or several shards, from a folder or a store.

From a store the row groups asked for come as whole ranges, one request for each run of neighbours, and Parquet then reads
from memory: asked to read from the store itself it would make a request for every column.

The footer of a large index is never read whole (see ``data/index_footer.py``): it describes every row group, one per shard.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from medtl_dist.data.ahead import Shared
from medtl_dist.data.index_footer import Spans, footer_of_one
from medtl_dist.data.ranges import Ranges, ranges_of
from medtl_dist.data.web import looks_like_html
from medtl_dist.errors import DataError
from medtl_dist.storage import StorageOptions, is_remote

_HASHED_BYTES = 64 * 2**20
_TAIL_BYTES = 64 * 2**10
_MOST_BYTES = 16 * 2**20
_MAGIC = b"PAR1"
# Up to here the whole footer is fetched and parsed once per process: 10 MiB of memory, and one request fewer per shard.
WHOLE_FOOTER_BYTES = 2**20
_footers: Shared[tuple[Ranges, Index, bool], pq.FileMetaData] = Shared(8)
# Arrow raises IndexError or an OSError for a row group or page that is not there.
_DAMAGE = (OSError, pa.ArrowException, IndexError, ValueError, OverflowError)


@dataclass(frozen=True)
class Index:
    """An index: ``sha256`` and ``num_bytes`` as ``dataset.json`` has them, ``set_sha256`` of the whole set."""

    folder: str
    name: str
    num_bytes: int
    sha256: str
    set_sha256: str
    storage: StorageOptions

    @property
    def path(self) -> str:
        return os.path.join(self.folder, self.name)


def read_row_groups(
    index: Index, groups: Sequence[int], columns: Sequence[str] | None, spans: Spans | None = None
) -> pa.Table:
    """The rows of these row groups, of all columns or the named ones. ``spans``: of the footer, where they are known.

    Raises: DataError, the index is damaged; from a store see also ``Ranges.read``.
    """
    wanted = None if columns is None else list(columns)
    if spans is not None and len(groups) == 1 and spans.after[1] - spans.before[0] > WHOLE_FOOTER_BYTES:
        return _read_by_spans(index, groups[0], wanted, spans)
    if not is_remote(index.folder):
        try:
            footer = _local_footer(index.path, index.sha256)
            return _read(index.path, footer, groups, wanted)
        except _DAMAGE as error:
            raise _damaged(index, error) from None
    ranges = ranges_of(index.folder, index.storage, index.set_sha256)
    try:
        return _read_remote(ranges, index, groups, wanted, fresh=False)
    except _DAMAGE:
        _footers.clear()
    try:
        return _read_remote(ranges, index, groups, wanted, fresh=True)
    except _DAMAGE as error:
        raise _damaged(index, error) from None


def _read_by_spans(index: Index, group: int, columns: list[str] | None, spans: Spans) -> pa.Table:
    """The rows of one row group, by its own description alone."""
    ranges = ranges_of(index.folder, index.storage, index.set_sha256) if is_remote(index.folder) else None
    failure: BaseException | None = None
    for fresh in (False, True) if ranges is not None else (True,):
        try:
            before, after = (_part_of(index, ranges, span, fresh) for span in (spans.before, spans.after))
            footer = footer_of_one(before, _part_of(index, ranges, spans.row_groups[group], fresh), after)
            if ranges is None:
                return _read(index.path, footer, [0], columns)
            start, end = _extent(footer.row_group(0), index.num_bytes)
            data = ranges.read(index.name, start, end, index.num_bytes, fresh=fresh)
            return _read(pa.PythonFile(_Part(start, data, index.num_bytes), mode="r"), footer, [0], columns)
        except _DAMAGE as error:
            failure = error
    assert failure is not None
    raise _damaged(index, failure) from None


def _part_of(index: Index, ranges: Ranges | None, span: tuple[int, int], fresh: bool) -> bytes:
    if ranges is not None:
        return bytes(ranges.read(index.name, *span, index.num_bytes, fresh=fresh))
    with open(index.path, "rb") as file:
        file.seek(span[0])
        return file.read(span[1] - span[0])


def _read(source: Any, footer: pq.FileMetaData, groups: Sequence[int], columns: list[str] | None) -> pa.Table:
    # No threads: many loader processes read at once, each a row group.
    with pq.ParquetFile(source, metadata=footer, page_checksum_verification=True) as file:
        return file.read_row_groups(list(groups), columns=columns, use_threads=False)


@functools.lru_cache(maxsize=8)
def _local_footer(path: str, sha256: str) -> pq.FileMetaData:
    """The index's footer, parsed once per process. ``sha256`` also tells two sets at one path apart.

    Pages have checksums, the footer has none, and could be damaged so that it takes a page for another column's: an
    index of ordinary size is compared with its sha256 as a whole (45 ms for 64 MiB), a larger one by ``verify`` only.
    """
    with open(path, "rb") as file:
        small = os.fstat(file.fileno()).st_size <= _HASHED_BYTES
        if small and hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise OSError("its sha256 differs")
        file.seek(0)
        return pq.read_metadata(file)


def _remote_footer(ranges: Ranges, index: Index, fresh: bool) -> pq.FileMetaData:
    return _footers.get((ranges, index, fresh), lambda: _fetch_footer(ranges, index, fresh))


def _fetch_footer(ranges: Ranges, index: Index, fresh: bool) -> pq.FileMetaData:
    """Two requests at most: the file's end, and what of the footer lies before it."""
    size = index.num_bytes
    start = max(0, size - _TAIL_BYTES)
    tail = bytes(ranges.read(index.name, start, size, size, fresh=fresh))
    if tail[-4:] != _MAGIC:
        if looks_like_html(tail):
            raise OSError("an HTML page came instead")
        raise OSError("no footer")
    length = int.from_bytes(tail[-8:-4], "little") + 8
    if not 12 < length <= size:
        raise OSError("no footer")
    if length > len(tail):
        tail = bytes(ranges.read(index.name, size - length, start, size, fresh=fresh)) + tail
    return pq.read_metadata(pa.BufferReader(tail[-length:]))


def _read_remote(
    ranges: Ranges, index: Index, groups: Sequence[int], columns: list[str] | None, *, fresh: bool
) -> pa.Table:
    footer = _remote_footer(ranges, index, fresh)
    extents = [_extent(footer.row_group(group), index.num_bytes) for group in groups]
    tables = []
    for first, stop in _neighbours(extents):
        start, end = extents[first][0], extents[stop - 1][1]
        part = _Part(start, ranges.read(index.name, start, end, index.num_bytes, fresh=fresh), index.num_bytes)
        tables.append(_read(pa.PythonFile(part, mode="r"), footer, groups[first:stop], columns))
    if not tables:
        return footer.schema.to_arrow_schema().empty_table().select(columns or footer.schema.to_arrow_schema().names)
    return pa.concat_tables(tables)


def _extent(group: pq.RowGroupMetaData, size: int) -> tuple[int, int]:
    """First byte and end of a row group. Raises: OSError, not within the file."""
    chunks = [group.column(number) for number in range(group.num_columns)]
    starts = [
        chunk.data_page_offset if chunk.dictionary_page_offset is None
        else min(chunk.data_page_offset, chunk.dictionary_page_offset)
        for chunk in chunks
    ]  # fmt: skip
    start = min(starts)
    end = max(begin + chunk.total_compressed_size for begin, chunk in zip(starts, chunks, strict=True))
    if not 0 <= start < end <= size:
        raise OSError("a row group outside the file")
    return start, end


def _neighbours(extents: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Extents that follow one another, as ``(first, stop)`` of their positions, 16 MiB of them at most."""
    runs: list[tuple[int, int]] = []
    for position, (start, end) in enumerate(extents):
        if runs:
            first = runs[-1][0]
            if start == extents[position - 1][1] and end - extents[first][0] <= _MOST_BYTES:
                runs[-1] = (first, position + 1)
                continue
        runs.append((position, position + 1))
    return runs


class _Part:
    """A file of which one range is there: what else is asked for is an error."""

    closed = False

    def __init__(self, start: int, data: bytes | memoryview, size: int) -> None:
        self._start, self._data, self._size = start, memoryview(data), size
        self._place = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        return self._place

    def read(self, length: int = -1) -> bytes:
        begin = self._place - self._start
        end = len(self._data) if length < 0 else begin + length
        if not 0 <= begin <= end <= len(self._data):
            raise OSError("a page outside its row group")
        self._place += end - begin
        return bytes(self._data[begin:end])

    def close(self) -> None:
        self.closed = True


def _damaged(index: Index, error: BaseException) -> DataError:
    why = (
        str(error) if type(error) is OSError and error.errno is None and len(str(error)) < 40 else type(error).__name__
    )
    return DataError(f"{index.path} is damaged ({why}): copy the set again or pack it again")
