"""data/remote_file.py: any walk reads what the file holds; parts bounded, once each, hashed whole."""

from __future__ import annotations

import hashlib
import io

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from time_limit import within

from medtl_dist.data.ranges import Ranges
from medtl_dist.data.remote_file import RemoteFile
from medtl_dist.data.web import Fetched
from medtl_dist.errors import DataError
from medtl_dist.storage import StorageOptions

DATA = hashlib.shake_256(b"file").digest(5000)


class Store:
    """A source of one file that notes what is asked of it."""

    def __init__(self, data: bytes = DATA) -> None:
        self.data = data
        self.asked: list[tuple[int, int]] = []

    def size(self, name: str) -> int:
        del name
        return len(self.data)

    def names(self) -> None:
        return

    def fetch(self, name: str, start: int, stop: int, size: int) -> Fetched:
        del name, size
        self.asked.append((start, stop))
        if len(self.data) < stop:
            raise DataError("gone")
        return Fetched(self.data[start:stop])


def opened(store: Store, size: int = len(DATA), part_bytes: int = 700) -> RemoteFile:
    return RemoteFile(Ranges("http://host/set", store, StorageOptions()), "a.tar", size, part_bytes)


@given(
    st.lists(st.tuples(st.integers(0, 5200), st.integers(0, 3000)), max_size=12), st.sampled_from([1, 64, 700, 9000])
)
@settings(max_examples=50, deadline=None, phases=[Phase.generate])  # no shrinking: a walk that hangs fails once
def test_any_walk_reads_what_a_file_would(walk: list[tuple[int, int]], part_bytes: int) -> None:
    plain = io.BytesIO(DATA)
    with within(5), opened(Store(), part_bytes=max(part_bytes, 50)) as file:
        for place, count in walk:
            plain.seek(place)
            file.seek(place)
            assert file.read(count) == plain.read(count)
            assert file.read(7) == plain.read(7)
        assert file.sha256() == hashlib.sha256(DATA).hexdigest()


def test_a_walk_forwards_asks_for_each_part_once_and_one_ahead() -> None:
    store = Store()
    with opened(store) as file:
        assert file.read(10) == DATA[:10]
        assert file._next is not None
        file._next.result()
        assert store.asked == [(0, 700), (700, 1400)]
        file.seek(3000)
        file.read(600)
        assert file.sha256() == hashlib.sha256(DATA).hexdigest()
    assert store.asked == [(start, min(start + 700, 5000)) for start in range(0, 5000, 700)]


def test_an_empty_file_has_a_checksum() -> None:
    with opened(Store(b""), 0) as file:
        assert file.read(100) == b""
        assert file.sha256() == hashlib.sha256(b"").hexdigest()


def test_errors_come_where_the_bytes_are_read() -> None:
    with opened(Store(DATA[:1000])) as file:
        assert file.read(700) == DATA[:700]
        with pytest.raises(DataError, match="gone"):
            file.read(1)
