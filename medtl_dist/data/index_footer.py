"""index.parquet's footer ─► the footer of one row group: what lets a reader stay small however many shards there are.

Parquet's footer describes all row groups (about 12 KiB of memory each once parsed), and there is one per shard: for 10^5
shards every loader process would parse for seconds and hold a gigabyte. So ``dataset.json`` records where each row group's
description lies, and a reader puts together a footer with just the one it needs. The file stays plain Parquet.

The footer is a Thrift struct in the compact protocol (Apache Thrift, "Thrift compact protocol encoding"; Parquet's
``parquet.thrift``: ``FileMetaData``, whose field 4 is the list of row groups).
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

MAGIC = b"PAR1"
_ROW_GROUPS = 4
# Thrift's compact types.
_TRUE, _FALSE, _BYTE, _I64, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = 1, 2, 3, 6, 7, 8, 9, 10, 12
_FIXED = {_TRUE: 0, _FALSE: 0, _BYTE: 1, _DOUBLE: 8}
_MAX_DEPTH = 16


class Spans(NamedTuple):
    """Byte ranges of the file: ``before`` and ``after`` the list of row groups, and each row group's description."""

    before: tuple[int, int]
    after: tuple[int, int]
    row_groups: list[tuple[int, int]]


def spans_of(tail: bytes, length: int) -> Spans:
    """Where things lie in a Parquet file of ``length`` bytes whose last bytes are ``tail`` (the whole footer at least).

    Raises: ValueError, no such footer.
    """
    if len(tail) < 8 or tail[-4:] != MAGIC:
        raise ValueError("not a Parquet file")
    footer_bytes = struct.unpack("<I", tail[-8:-4])[0]
    start = len(tail) - 8 - footer_bytes
    if start < 0:
        raise ValueError("a Parquet footer longer than what was read")
    shift = length - len(tail)
    try:
        return _walk(tail, start, len(tail) - 8, shift)
    except (IndexError, RecursionError):
        raise ValueError("a damaged Parquet footer") from None


def footer_of_one(before: bytes, row_group: bytes, after: bytes) -> pq.FileMetaData:
    """A footer with one row group only; its data are still where they were in the file.

    Raises: ValueError, bytes that are no footer.
    """
    # 0x19: the field after the last one, a list; 0x1C: of one struct.
    footer = before + b"\x19\x1c" + row_group + after
    file = MAGIC + footer + struct.pack("<I", len(footer)) + MAGIC
    try:
        return pq.read_metadata(pa.BufferReader(file))
    except (OSError, ValueError, IndexError, OverflowError, pa.ArrowException) as error:
        raise ValueError(f"a damaged Parquet footer ({type(error).__name__})") from None


def _walk(data: bytes, at: int, end: int, shift: int) -> Spans:
    begin, field = at, 0
    while data[at]:
        head = at
        kind = data[at] & 0x0F
        at += 1
        if not data[head] >> 4:
            raise ValueError("a Parquet footer of an unknown layout")
        field += data[head] >> 4
        if field == _ROW_GROUPS:
            if data[head] >> 4 != 1 or kind != _LIST:
                raise ValueError("a Parquet footer of an unknown layout")
            count, element, at = _list_head(data, at)
            groups = []
            for _ in range(count if element == _STRUCT else 0):
                stop = _skip(data, at, _STRUCT, 0)
                groups.append((shift + at, shift + stop))
                at = stop
            if at > end:
                raise IndexError
            return Spans((shift + begin, shift + head), (shift + at, shift + end), groups)
        at = _skip(data, at, kind, 0)
    raise ValueError("a Parquet footer without row groups")


def _skip(data: bytes, at: int, kind: int, depth: int) -> int:
    """The end of a value of the compact type ``kind`` that begins at ``at``."""
    if depth > _MAX_DEPTH:
        raise RecursionError
    if kind == _STRUCT:
        return _skip_struct(data, at, depth)
    if kind in (_LIST, _SET):
        return _skip_list(data, at, depth)
    if _BYTE < kind <= _I64:
        return _skip_varint(data, at)
    if kind == _BINARY:
        size, at = _varint(data, at)
        return at + size
    if kind not in _FIXED:  # maps do not occur in FileMetaData
        raise ValueError("a Parquet footer of an unknown layout")
    return at + _FIXED[kind]


def _skip_struct(data: bytes, at: int, depth: int) -> int:
    while head := data[at]:
        at += 1
        if head < 0x10:  # a long field number follows
            at = _skip_varint(data, at)
        at = _skip(data, at, head & 0x0F, depth + 1)
    return at + 1


def _skip_list(data: bytes, at: int, depth: int) -> int:
    count, element, at = _list_head(data, at)
    if element in (_TRUE, _FALSE):  # a field's boolean is in its type; a list's takes a byte
        return at + count
    for _ in range(count):
        at = _skip(data, at, element, depth + 1)
    return at


def _list_head(data: bytes, at: int) -> tuple[int, int, int]:
    head = data[at]
    if head >> 4 == 15:
        count, at = _varint(data, at + 1)
        return count, head & 0x0F, at
    return head >> 4, head & 0x0F, at + 1


def _skip_varint(data: bytes, at: int) -> int:
    while data[at] & 0x80:
        at += 1
    return at + 1


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
