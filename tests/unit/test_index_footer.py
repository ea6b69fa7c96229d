"""The footer of one row group (data/index_footer.py), against pyarrow reading the whole one."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medtl_dist.data.index_footer import Spans, footer_of_one, spans_of

MODEST = settings(deadline=None, max_examples=40)


def table(rows: int, start: int) -> pa.Table:
    return pa.table(
        {
            "key": pa.array([number.to_bytes(16, "big") for number in range(start, start + rows)], pa.binary(16)),
            "domain": pa.array([None if number % 3 else "a" for number in range(start, start + rows)], pa.string()),
            "label": pa.array(range(start, start + rows), pa.int64()),
            "age": pa.array([number / 7 for number in range(start, start + rows)], pa.float64()),
            "flag": pa.array([number % 2 == 0 for number in range(start, start + rows)], pa.bool_()),
            "views": pa.array([[number, 1] for number in range(start, start + rows)], pa.list_(pa.int32())),
        }
    )


def written(groups: list[int], **options: Any) -> bytes:
    sink = io.BytesIO()
    start = 0
    with pq.ParquetWriter(sink, table(0, 0).schema, **options) as writer:
        for rows in groups:
            writer.write_table(table(rows, start), row_group_size=max(rows, 1))
            start += rows
    return sink.getvalue()


def read_one(file: bytes, spans: Spans, number: int) -> pa.Table:
    parts = (file[slice(*span)] for span in (spans.before, spans.row_groups[number], spans.after))
    return pq.ParquetFile(io.BytesIO(file), metadata=footer_of_one(*parts)).read_row_groups([0])


@MODEST
@given(
    groups=st.lists(st.integers(1, 9), min_size=1, max_size=20),
    options=st.fixed_dictionaries(
        {
            "compression": st.sampled_from(["zstd", "none", "snappy"]),
            "write_statistics": st.booleans(),
            "store_schema": st.booleans(),
            "write_page_checksum": st.booleans(),
            "write_page_index": st.booleans(),
        }
    ),
)
def test_each_row_group_reads_as_by_the_whole_footer(groups: list[int], options: dict[str, Any]) -> None:
    file = written(groups, **options)
    spans = spans_of(file, len(file))
    whole = pq.ParquetFile(io.BytesIO(file))
    assert len(spans.row_groups) == whole.num_row_groups == len(groups)
    for number in range(len(groups)):
        assert read_one(file, spans, number).equals(whole.read_row_group(number))


def test_the_tail_of_the_file_is_enough() -> None:
    file = written([3, 4])
    footer_bytes = int.from_bytes(file[-8:-4], "little")
    assert spans_of(file[-footer_bytes - 8 :], len(file)) == spans_of(file, len(file))
    with pytest.raises(ValueError, match="longer than what was read"):
        spans_of(file[-footer_bytes - 7 :], len(file))


@pytest.mark.parametrize("file", [b"", b"<html>not here</html>", b"PAR1" * 4])
def test_what_is_no_parquet_file_is_refused(file: bytes) -> None:
    with pytest.raises(ValueError, match="Parquet"):
        spans_of(file, len(file))


@settings(deadline=None, max_examples=300)
@given(place=st.integers(0, 10**6), value=st.integers(0, 255))
def test_a_damaged_footer_is_an_error_or_read_the_same_but_never_a_crash(place: int, value: int) -> None:
    file = bytearray(DAMAGED)
    start = len(file) - 8 - int.from_bytes(file[-8:-4], "little")
    file[start + place % (len(file) - 8 - start)] = value
    with contextlib.suppress(ValueError):
        spans = spans_of(bytes(file), len(file))
        for number in range(min(1, len(spans.row_groups))):
            parts = (bytes(file[slice(*span)]) for span in (spans.before, spans.row_groups[number], spans.after))
            assert footer_of_one(*parts).num_row_groups == 1


DAMAGED = written([3, 4, 2])
