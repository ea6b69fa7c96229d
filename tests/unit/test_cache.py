"""The local cache of a store's ranges (data/cache.py)."""

from __future__ import annotations

import errno
import os
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medtl_dist.data import cache as module
from medtl_dist.data.cache import BLOCK_BYTES, BlockCache
from medtl_dist.errors import UserError

DATA = bytes((7 * i + i // 251) % 256 for i in range(4 * BLOCK_BYTES + 1000))


class Store:
    """Where the bytes come from; counts."""

    def __init__(self, data: bytes = DATA) -> None:
        self.data = data
        self.asked: list[tuple[int, int]] = []

    def fetch(self, start: int, stop: int) -> bytes:
        self.asked.append((start, stop))
        return self.data[start:stop]


def read(cache: BlockCache, store: Store, start: int, stop: int, name: str = "a.tar", *, fresh: bool = False) -> bytes:
    return cache.read(name, start, stop, len(store.data), store.fetch, fresh=fresh)


def blocks_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "lock")


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in blocks_in(folder))


def test_what_is_there_is_not_fetched_and_the_rest_in_one_piece(tmp_path: Path) -> None:
    cache, store = BlockCache(tmp_path, 2**30, "set"), Store()
    middle = (BLOCK_BYTES + 10, BLOCK_BYTES + 20)
    assert read(cache, store, *middle) == DATA[slice(*middle)]
    assert store.asked == [(BLOCK_BYTES, 2 * BLOCK_BYTES)]
    assert read(cache, store, 5, len(DATA)) == DATA[5:]
    assert store.asked[1:] == [(0, len(DATA))]  # one request, though the second block was there
    assert read(BlockCache(tmp_path, 2**30, "set"), store, 0, len(DATA)) == DATA  # another process, say
    assert len(store.asked) == 2
    assert read(cache, store, 3, 9, "b.tar") == DATA[3:9]  # another file
    assert read(BlockCache(tmp_path, 2**30, "other"), store, 3, 9) == DATA[3:9]  # another set of that name
    assert len(store.asked) == 4
    assert not [path for path in blocks_in(tmp_path) if path.name.count(".")]  # no parts left


@given(st.lists(st.tuples(st.integers(0, len(DATA)), st.integers(0, len(DATA))), min_size=1, max_size=6))
@settings(max_examples=25, deadline=None)
def test_any_ranges_in_any_order(tmp_path_factory: pytest.TempPathFactory, ranges: list[tuple[int, int]]) -> None:
    cache, store = BlockCache(tmp_path_factory.mktemp("cache"), 2**30, "set"), Store()
    for one, other in ranges:
        start, stop = sorted((one, other))
        if start < stop:
            assert read(cache, store, start, stop) == DATA[start:stop]
    assert sum(stop - start for start, stop in store.asked) <= 6 * len(DATA)


def test_a_damaged_block_is_fetched_again(tmp_path: Path) -> None:
    cache, store = BlockCache(tmp_path, 2**30, "set"), Store()
    read(cache, store, 0, 100)
    (block,) = blocks_in(tmp_path)
    whole = block.read_bytes()
    short = b"mtb1" + zlib.crc32(b"short").to_bytes(4, "big") + b"short"  # whole in itself, but another length
    for damage in (whole[:50] + bytes([whole[50] ^ 1]) + whole[51:], whole[:-1], b"", b"xxxx" + whole[4:], short):
        block.write_bytes(damage)
        assert read(cache, store, 0, 100) == DATA[:100]
        assert block.read_bytes() == whole
    assert len(store.asked) == 6
    assert read(cache, store, 0, 100, fresh=True) == DATA[:100]
    assert len(store.asked) == 7


def test_the_least_recently_used_go_when_the_limit_is_passed(tmp_path: Path) -> None:
    limit = 20 * BLOCK_BYTES
    cache, store = BlockCache(tmp_path, limit, "set"), Store(bytes(60 * BLOCK_BYTES))
    read(cache, store, 0, 1)
    for number in range(1, 60):
        read(cache, store, number * BLOCK_BYTES, number * BLOCK_BYTES + 1)
        for place, path in enumerate(sorted(blocks_in(tmp_path), key=lambda path: path.stat().st_mtime_ns)):
            os.utime(path, ns=(place, place))  # as far apart as a clock could tell
        read(cache, store, 0, 1)  # always in use
        assert size_of(tmp_path) <= limit * 1.1
    assert store.asked.count((0, BLOCK_BYTES)) == 1  # so it never went
    assert len(store.asked) == 60
    for number in range(45, 60):
        read(cache, store, number * BLOCK_BYTES, number * BLOCK_BYTES + 1)
    assert len(store.asked) == 60  # nor did the latest
    read(cache, store, BLOCK_BYTES, BLOCK_BYTES + 1)
    assert len(store.asked) == 61  # the oldest did go


def test_the_limit_holds_for_what_earlier_runs_left(tmp_path: Path) -> None:
    store = Store(bytes(70 * BLOCK_BYTES))
    read(BlockCache(tmp_path, 2**30, "set"), store, 0, len(store.data))
    assert len(blocks_in(tmp_path)) == 70
    read(BlockCache(tmp_path, 64 * BLOCK_BYTES, "other"), Store(), 0, 1)
    assert len(blocks_in(tmp_path)) <= 0.9 * 64 + 1


def test_a_full_disk_is_told_once_and_the_reading_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, store = BlockCache(tmp_path, 2**30, "set"), Store()
    read(cache, store, 0, 1)

    def full(self: Path, mode: str = "r", *args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.Path, "open", full)
    assert read(cache, store, BLOCK_BYTES, 3 * BLOCK_BYTES) == DATA[BLOCK_BYTES : 3 * BLOCK_BYTES]
    assert read(cache, store, BLOCK_BYTES, 3 * BLOCK_BYTES) == DATA[BLOCK_BYTES : 3 * BLOCK_BYTES]
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "can't be written (No space left on device); going on without" in said
    monkeypatch.undo()
    assert read(cache, store, 0, 1) == DATA[:1]
    assert store.asked.count((0, BLOCK_BYTES)) == 1  # what was there is still used


def test_a_folder_that_can_not_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data.cache_dir .*/file: can't be made"):
        BlockCache(tmp_path / "file", 1, "set")
