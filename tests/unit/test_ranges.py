"""Ranges from a store: whatever breaks, the bytes are the file's, in bounded time (data/ranges.py)."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medtl_dist.data.ranges import CAREFUL_BYTES, Clock, Fetched, Patience, Ranges
from medtl_dist.errors import DataError, Interrupted
from medtl_dist.storage import StorageOptions, Transient

BROKEN = Transient("broken")


@dataclass
class FakeTime:
    """Time that passes only where somebody waits."""

    now: float = 0.0
    pauses: list[float] = field(default_factory=list)

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds

    def clock(self, chance: float = 1.0) -> Clock:
        return Clock(lambda: self.now, self.sleep, lambda: chance)


@dataclass
class FakeSource:
    """A file that gives, request by request, so many bytes of what was asked (None: all; -1: raises)."""

    data: bytes
    course: list[int | None]
    time: FakeTime = field(default_factory=FakeTime)
    costs_s: float = 0.0
    asked: list[tuple[int, int]] = field(default_factory=list)

    def size(self, name: str) -> int | None:
        return len(self.data)

    def names(self) -> list[str] | None:
        if self.course and self.course.pop(0) is not None:
            raise BROKEN
        return ["x"]

    def fetch(self, name: str, start: int, stop: int, size: int) -> Fetched:
        self.asked.append((start, stop))
        self.time.now += self.costs_s
        given = self.course.pop(0) if self.course else None
        if given is None:
            return Fetched(self.data[start:stop])
        if given < 0:
            raise BROKEN
        return Fetched(self.data[start : min(stop, start + given)], BROKEN)


def ranges_over(source: FakeSource, **options: float) -> Ranges:
    chosen = StorageOptions(**{"retries": 2, "timeout_s": 10.0, **options})  # pyright: ignore[reportArgumentType]
    return Ranges("s3://b/set", source, chosen, clock=source.time.clock())


@given(
    st.binary(min_size=1, max_size=200),
    st.data(),
    st.lists(st.one_of(st.none(), st.integers(0, 60)), max_size=12),
)
@settings(max_examples=50, deadline=None)
def test_a_resumed_range_is_the_files_bytes_each_asked_for_once(data: bytes, draw: st.DataObject, course: list) -> None:
    start = draw.draw(st.integers(0, len(data)))
    stop = draw.draw(st.integers(start, len(data)))
    source = FakeSource(data, course)
    assert bytes(ranges_over(source, retries=20).read("x", start, stop, len(data))) == data[start:stop]
    begins = [begin for begin, _ in source.asked]
    assert begins == sorted(begins)  # never back: what came is kept
    assert all(end == stop for _, end in source.asked)


def test_a_healthy_range_is_one_request_and_no_wait() -> None:
    source = FakeSource(bytes(3 * CAREFUL_BYTES), [])
    assert len(ranges_over(source).read("x", 0, 3 * CAREFUL_BYTES, 3 * CAREFUL_BYTES)) == 3 * CAREFUL_BYTES
    assert source.asked == [(0, 3 * CAREFUL_BYTES)]
    assert source.time.pauses == []
    assert ranges_over(source).read_whole("x") == source.data


def test_once_broken_the_rest_comes_in_small_parts() -> None:
    """A store that hands over a whole range or nothing would never get past a link that breaks after each megabyte."""
    size = 4 * CAREFUL_BYTES + 5
    source = FakeSource(bytes(range(256)) * (size // 256 + 1), [-1])
    assert bytes(ranges_over(source).read("x", 0, size, size)) == source.data[:size]
    assert source.asked[1:] == [(low, min(low + CAREFUL_BYTES, size)) for low in range(0, size, CAREFUL_BYTES)]


def test_failures_in_a_row_are_counted_and_progress_forgives_them() -> None:
    source = FakeSource(b"abcdef", [-1, -1, 1, -1, -1, 2, 0, 0, None])
    assert bytes(ranges_over(source).read("x", 0, 6, 6)) == b"abcdef"
    assert len(source.asked) == 9
    source = FakeSource(b"abcdef", [1, -1, -1, -1])
    with pytest.raises(
        Interrupted, match=r"^s3://b/set/x can't be read \(broken; 4 tries in 1 s\): check the network .* --resume"
    ):
        ranges_over(source).read("x", 0, 6, 6)


def test_the_time_is_bounded_even_where_a_byte_comes_now_and_then() -> None:
    source = FakeSource(bytes(1000), [1] * 1000, costs_s=9.0)
    with pytest.raises(Interrupted):
        ranges_over(source).read("x", 0, 1000, 1000)
    assert source.time.now <= 3 * 2 * 10.0 + 9.0


def test_pauses_double_to_a_limit_and_heed_the_server() -> None:
    patience = Patience(retries=9, timeout_s=60)
    assert [patience.pause(failures, 0, 1.0) for failures in (1, 2, 3, 6, 7, 60)] == [0.2, 0.4, 0.8, 6.4, 10.0, 10.0]
    assert patience.pause(3, 0, 0.0) == pytest.approx(0.4)  # chance takes up to half of it
    assert patience.pause(1, 7.0, 1.0) == 7.0
    assert patience.pause(1, 1e9, 1.0) == 10.0
    source = FakeSource(b"ab", [-1, -1])
    ranges_over(source).read("x", 0, 2, 2)
    assert source.time.pauses == [0.2, 0.4]


def test_what_can_not_pass_is_not_tried_again() -> None:
    class Gone(FakeSource):
        def fetch(self, name: str, start: int, stop: int, size: int) -> Fetched:
            self.asked.append((start, stop))
            raise DataError("gone")

    source = Gone(b"", [])
    with pytest.raises(DataError, match="gone"):
        ranges_over(source).read("x", 0, 1, 1)
    assert len(source.asked) == 1


def test_a_whole_file_that_is_none_or_far_too_large() -> None:
    class Sized(FakeSource):
        def size(self, name: str) -> int | None:
            return None if name == "none" else 2**40

    assert ranges_over(Sized(b"", [])).read_whole("none") is None
    with pytest.raises(DataError, match=r"1,099,511,627,776 bytes: not a file of a set"):
        ranges_over(Sized(b"", [])).read_whole("large")


def test_a_length_and_a_listing_are_asked_for_again() -> None:
    source = FakeSource(b"abc", [-1, None])
    assert ranges_over(source).names() == ["x"]
    assert ranges_over(source).size("x") == 3
    with pytest.raises(Interrupted, match="3 tries"):
        ranges_over(FakeSource(b"", [-1] * 9)).names()
