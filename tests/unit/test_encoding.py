"""Worker processes: results in order, a bounded window, and an end to it when one dies."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from image_folders import write_image

from medtl_dist.data.encoding import (
    Coloured,
    Failure,
    Look,
    Picture,
    Recipe,
    Stored,
    Workers,
    look,
    open_workers,
    store,
)
from medtl_dist.errors import Interrupted

GREY = Recipe(image_size_px=16, channels=1, only_grey=True, encoding="png")


def name_and_process(pictures: Sequence[Picture]) -> list[tuple[str, int]]:
    """Stands in for storing: says what was asked for, and who did it."""
    return [(picture.file, os.getpid()) for picture in pictures]


def die(pictures: Sequence[Picture]) -> list[None]:
    """Stands in for storing: ends the process as the kernel does when memory runs out."""
    del pictures
    os._exit(9)


def test_one_image_is_stored_or_says_why_not(tmp_path: Path) -> None:
    grey = store(Picture(str(write_image(tmp_path / "1.png", 1)), -1), GREY)
    assert isinstance(grey, Stored)
    assert (grey.width, grey.height, grey.channels) == (21, 16, 1)
    coloured = Picture(str(write_image(tmp_path / "2.png", 2, color=True)), -1)
    assert store(coloured, GREY) == Coloured()
    assert store(Picture(str(tmp_path / "none.png"), -1), GREY) == Failure("missing file")
    assert look(coloured, GREY) == Look(16, grey=False)
    assert look(Picture(str(tmp_path / "none.png"), -1), GREY) is None


def test_a_row_of_an_array_is_an_image(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(3 * 20 * 20, dtype=np.uint8).reshape(3, 20, 20))
    looks = [look(Picture(str(tmp_path / "a.npy"), row), GREY) for row in range(3)]
    assert looks == [Look(16, grey=True)] * 3


def test_results_keep_their_order_and_the_window_is_bounded() -> None:
    asked = 0

    def pictures() -> Iterator[Picture]:
        nonlocal asked
        for number in range(500):
            asked += 1
            yield Picture(str(number), -1)

    with open_workers(2, 500) as workers:
        processes = set()
        for done, (name, process) in enumerate(workers.ordered(name_and_process, pictures(), 4)):
            assert name == str(done)
            assert asked - done <= 2 * 4 * 4 + 4  # workers x tasks each x images per task, and the one being filled
            processes.add(process)
    assert os.getpid() not in processes


def test_few_images_start_no_process() -> None:
    with open_workers(2, 10) as workers:
        assert list(workers.ordered(name_and_process, [Picture("x", -1)], 4)) == [("x", os.getpid())]


def test_a_worker_that_dies_ends_the_pack_with_advice() -> None:
    with (
        open_workers(2, 500) as workers,
        pytest.raises(Interrupted, match="run the command again with fewer --workers"),
    ):
        list(workers.ordered(die, [Picture("x", -1)] * 20, 4))


def test_a_pool_is_not_kept_open() -> None:
    with open_workers(2, 500) as workers:
        pass
    assert isinstance(workers, Workers)
    with pytest.raises(RuntimeError, match="cannot schedule new futures"):
        list(workers.ordered(name_and_process, [Picture("x", -1)], 1))
