from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.room import room_on


def _node(name: str, cpus: float, gpus: float = 0.0, alive: bool = True) -> dict[str, Any]:
    return {"NodeID": name, "Alive": alive, "Resources": {"CPU": cpus, "GPU": gpus, "memory": 1e9}}


def test_a_worker_lies_on_one_node_whole() -> None:
    nodes = [_node("a", 3), _node("b", 1), _node("c", 1)]
    assert room_on(nodes, (), {"CPU": 1}) == 5
    assert room_on(nodes, (), {"CPU": 2}) == 1
    assert room_on(nodes, (), {"CPU": 0.5}) == 10


def test_the_scarcest_resource_decides() -> None:
    assert room_on([_node("a", 16, gpus=2), _node("b", 16)], (), {"CPU": 4, "GPU": 1}) == 2


def test_dead_nodes_and_those_that_leave_hold_nothing() -> None:
    nodes = [_node("a", 2), _node("b", 2, alive=False), _node("c", 2)]
    assert room_on(nodes, {"c"}, {"CPU": 1}) == 2
    assert room_on([], (), {"CPU": 1}) == 0


@given(
    cpus=st.lists(st.integers(0, 8), max_size=5), need=st.integers(1, 4), leaving=st.sets(st.integers(0, 4), max_size=5)
)
@settings(max_examples=50, deadline=None)
def test_it_is_what_placing_workers_one_by_one_gives(cpus: list[int], need: int, leaving: set[int]) -> None:
    left, placed = {i: c for i, c in enumerate(cpus) if i not in leaving}, 0
    while any(free >= need for free in left.values()):
        node = next(i for i, free in left.items() if free >= need)
        left[node] -= need
        placed += 1
    nodes = [_node(str(i), c) for i, c in enumerate(cpus)]
    assert room_on(nodes, {str(i) for i in leaving}, {"CPU": need}) == placed
