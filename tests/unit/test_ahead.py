"""Reading ahead: order, bounds and errors (data/ahead.py)."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from medtl_dist.data.ahead import Ahead, Shared

LONG = 30.0


class Loads:
    """A load that waits until it is let go, and remembers."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.changed = threading.Condition()
        self.free = 0

    def __call__(self, key: int) -> int:
        with self.changed:
            self.begun.append(key)
            self.changed.notify_all()
            assert self.changed.wait_for(lambda: self.free > 0, LONG)
            self.free -= 1
        if key < 0:
            raise ValueError(key)
        return 10 * key

    def let(self, count: int) -> None:
        with self.changed:
            self.free += count
            self.changed.notify_all()

    def wait(self, condition: Callable[[list[int]], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: condition(self.begun), LONG)


def test_announced_keys_are_loaded_in_order_within_the_budget() -> None:
    load = Loads()
    ahead = Ahead(load, num_threads=2, budget=25)
    for key in range(1, 6):
        ahead.announce(key, 10)
    ahead.announce(1, 10)  # once is enough
    load.wait(lambda begun: len(begun) == 2)
    load.let(2)
    assert ahead.take(1) == 10  # its room goes to the third
    load.wait(lambda begun: len(begun) == 3)
    assert sorted(load.begun[:2]) == [1, 2]
    assert load.begun[2:] == [3]
    load.let(3)
    assert [ahead.take(key) for key in (2, 3, 4)] == [20, 30, 40]
    load.let(1)
    assert ahead.take(5) == 50
    assert sorted(load.begun) == [1, 2, 3, 4, 5]
    ahead.close()


def test_what_is_not_begun_or_never_announced_is_loaded_by_who_asks() -> None:
    load = Loads()
    ahead = Ahead(load, num_threads=1, budget=10)
    ahead.announce(1, 10)
    ahead.announce(2, 10)
    load.wait(lambda begun: begun == [1])
    load.let(3)
    assert ahead.take(2) == 20  # although there is no room for it
    assert ahead.take(7) == 70
    assert ahead.take(1) == 10
    ahead.close()


def test_one_larger_than_the_budget_is_loaded_alone() -> None:
    load = Loads()
    load.let(2)
    ahead = Ahead(load, num_threads=2, budget=10)
    ahead.announce(1, 1000)
    ahead.announce(2, 5)
    load.wait(lambda begun: begun == [1])
    assert ahead.take(1) == 10
    assert ahead.take(2) == 20
    ahead.close()


def test_an_error_is_raised_where_the_key_is_asked_for() -> None:
    load = Loads()
    load.let(2)
    ahead = Ahead(load, num_threads=1, budget=100)
    ahead.announce(-1, 1)
    ahead.announce(2, 1)
    load.wait(lambda begun: len(begun) == 2)
    assert ahead.take(2) == 20
    with pytest.raises(ValueError, match="-1"):
        ahead.take(-1)
    ahead.close()


def test_its_threads_end_with_it() -> None:
    load = Loads()
    ahead = Ahead(load, num_threads=3, budget=100)
    for key in range(6):
        ahead.announce(key, 1)
    load.wait(lambda begun: len(begun) == 3)
    threads = [thread for thread in threading.enumerate() if thread.name == "medtl-ahead"]
    assert len(threads) == 3
    ahead.close()
    load.let(3)
    for thread in threads:
        thread.join(LONG)
    assert not any(thread.is_alive() for thread in threads)
    assert len(load.begun) == 3  # nothing more was loaded
    ahead.announce(9, 1)
    assert not [thread for thread in threading.enumerate() if thread.name == "medtl-ahead"]


def test_a_shared_result_is_made_once_for_all_who_ask_meanwhile_and_a_failure_is_forgotten() -> None:
    shared: Shared[str, int] = Shared(10)
    inside, go_on = threading.Event(), threading.Event()
    results: list[object] = []

    def failing() -> int:
        inside.set()
        assert go_on.wait(LONG)
        raise OSError("no")

    def get() -> None:
        try:
            results.append(shared.get("a", failing))
        except OSError as error:
            results.append(str(error))

    first = threading.Thread(target=get)
    first.start()
    assert inside.wait(LONG)
    second = threading.Thread(target=lambda: results.append(_failure(lambda: shared.get("a", lambda: 8))))
    second.start()
    go_on.set()
    first.join(LONG)
    second.join(LONG)
    assert results[0] == "no"
    assert results[1] in ("no", 8)  # it waited for the first, or came after it
    assert shared.get("a", lambda: 7) in (7, 8)
    assert shared.get("a", lambda: 9) in (7, 8)


def _failure(act: Callable[[], int]) -> int | str:
    try:
        return act()
    except OSError as error:
        return str(error)


def test_shared_results_of_too_much_weight_go_the_oldest_first() -> None:
    shared: Shared[int, int] = Shared(10)
    made: list[int] = []

    def get(key: int, weight: int) -> int:
        return shared.get(key, lambda: made.append(key) or key, weight)

    get(1, 4)
    get(2, 4)
    get(1, 4)
    get(3, 4)  # so 2 goes
    get(1, 4)
    get(2, 4)
    assert made == [1, 2, 3, 2]
    get(4, 100)  # alone too heavy, and kept all the same
    get(4, 100)
    assert made == [1, 2, 3, 2, 4]
    shared.clear()
    get(4, 100)
    assert made == [1, 2, 3, 2, 4, 4]
