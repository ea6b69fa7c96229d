"""Each image is in exactly one part, whatever the counts and sizes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medtl_dist.data.partition import parts_of, whole_batches
from medtl_dist.errors import UserError


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 300), max_size=5), st.integers(1, 64))
def test_every_image_is_in_one_part_in_order_and_parts_are_full_but_the_last(counts: list[int], size: int) -> None:
    parts = parts_of(counts, size)
    told = [(part.source, image) for part in parts for image in range(part.start, part.stop)]
    assert told == [(source, image) for source, count in enumerate(counts) for image in range(count)]
    for part in parts:
        assert part.start % size == 0
        assert 0 < len(part) <= size
        assert len(part) == size or part.stop == counts[part.source]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 10_000), st.integers(1, 512))
def test_a_part_is_whole_batches_and_no_more_than_one_longer_than_asked(size: int, batch: int) -> None:
    found = whole_batches(size, batch)
    assert found % batch == 0
    assert size <= found < size + batch


def test_a_part_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="--part-size 0: at least 1"):
        parts_of([3], 0)
