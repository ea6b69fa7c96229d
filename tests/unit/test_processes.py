"""data/processes.py: results in order, from here or from processes, and a death that is told."""

from __future__ import annotations

import os

import pytest

from medtl_dist.data.processes import in_order, num_cores
from medtl_dist.errors import Interrupted


@pytest.mark.parametrize("num_workers", [1, 2])
def test_results_come_in_order(num_workers: int) -> None:
    assert list(in_order(abs, range(-20, 0), num_workers)) == list(range(20, 0, -1))
    assert list(in_order(abs, [], num_workers)) == []


@pytest.mark.parametrize("num_workers", [1, 2])
def test_what_all_items_share_goes_to_each_process_once(num_workers: int) -> None:
    common = Counted(3)
    assert list(in_order(add, range(20), num_workers, common, 100)) == list(range(103, 123))
    assert common.sent == (num_workers if num_workers > 1 else 0)


class Counted:
    """A number that counts how often it is sent."""

    def __init__(self, value: int) -> None:
        self.value = value
        self.sent = 0

    def __reduce__(self) -> tuple[type[Counted], tuple[int]]:
        self.sent += 1
        return Counted, (self.value,)


def add(first: Counted, second: int, item: int) -> int:
    return first.value + second + item


def test_errors_come_through() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        list(in_order(int, ["1", "x", "3"], 2))


def test_a_process_that_dies_is_told() -> None:
    with pytest.raises(Interrupted, match="a worker process died"):
        list(in_order(os._exit, [3, 3], 2))


def test_there_is_a_core() -> None:
    assert 1 <= num_cores() <= (os.cpu_count() or 1)
