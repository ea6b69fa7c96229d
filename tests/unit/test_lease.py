"""Leases: one holder at a time, a fence that only grows, whatever the order of the steps and however slow an actor is."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lease_shelves import MemoryShelf, Turns

from medtl_dist.create_only import create
from medtl_dist.errors import Interrupted, UserError
from medtl_dist.storage import Folder
from medtl_dist.train import lease
from medtl_dist.train.lease import FolderShelf, Holder, Lease, acquire, check_fence, held_lease
from medtl_dist.train.process_mark import has_ended, mark_of_this_process

TTL_S = 10.0


def taken(shelf: MemoryShelf, owner: str = "a") -> Lease:
    found = acquire(shelf, owner=owner, ttl_s=TTL_S)
    assert isinstance(found, Lease)
    return found


def test_a_lease_is_refused_while_it_is_renewed_and_taken_over_when_it_has_run_out() -> None:
    shelf = MemoryShelf(now=1e9)
    first = taken(shelf)
    assert first.fence == 1
    for beat in range(1, 5):
        shelf.now += TTL_S * 0.9
        first.renew()
        found = acquire(shelf, owner="b", ttl_s=TTL_S)
        assert isinstance(found, Holder)
        assert (found.owner, found.number) == ("a", 1)
        assert found.beat == beat
    shelf.now += TTL_S + 1.9  # S3 tells whole seconds
    assert isinstance(acquire(shelf, owner="b", ttl_s=TTL_S), Holder)
    shelf.now += 0.2
    second = taken(shelf, "b")
    assert second.fence == 2
    second.check()
    for act in (first.check, first.renew):
        with pytest.raises(Interrupted, match=r"another process has taken over this run \(lease 2, ours was 1\)"):
            act()
    first.release()  # too late to matter
    assert isinstance(acquire(shelf, owner="c", ttl_s=TTL_S), Holder)
    assert not [name for name in shelf.files if not name.isdigit()]  # no probe left


def test_a_released_lease_is_free_at_once_and_numbers_are_never_used_again() -> None:
    shelf = MemoryShelf()
    fences = []
    for _ in range(5):
        held = taken(shelf)
        fences.append(held.fence)
        held.release()
    assert fences == [1, 2, 3, 4, 5]
    assert sorted(shelf.files) == ["00000004", "00000005"]  # the highest is never removed


def test_a_lease_that_is_half_written_counts_as_held() -> None:
    shelf = MemoryShelf()
    shelf.files["00000003"] = (b'{"own', 0.0)
    found = acquire(shelf, owner="b", ttl_s=TTL_S)
    assert isinstance(found, Holder)
    shelf.now += TTL_S + 3
    assert taken(shelf).fence == 4


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0.0, 0.0, 0.0, 0.0, 4.0, 13.0])), max_size=150))
def test_in_every_order_of_steps_fences_are_unique_and_only_the_newest_holder_passes_the_check(
    schedule: list[tuple[int, float]],
) -> None:
    shelf = MemoryShelf()
    got: list[int] = []
    highest = [0]

    def live() -> None:
        for _ in range(3):
            found = acquire(shelf, owner="x", ttl_s=TTL_S)
            if isinstance(found, Holder):
                continue
            got.append(found.fence)
            try:
                found.renew()
                found.check()
                found.release()
            except Interrupted:
                continue

    turns = Turns([live] * 4)
    shelf.before = turns.wait
    for actor, seconds in schedule:
        turns.step(actor)
        shelf.now += seconds
        numbers = [int(name) for name in shelf.files if name.isdigit()]
        assert max(numbers, default=0) >= highest[0]  # what was highest stays, or a higher one is there
        highest[0] = max(numbers, default=0)
    for actor in range(4):  # let them all end
        while not turns.ended[actor]:
            turns.step(actor)
            shelf.now += 1
    assert not turns.errors
    assert len(set(got)) == len(got)
    shelf.before = lambda call: None
    for fence in got:
        if fence < highest[0]:
            with pytest.raises(Interrupted):
                check_fence(shelf, fence)


def _race(folder: str, start: float, queue: Any) -> None:
    place = Folder.local(folder)
    for number in range(40):
        while time.time() < start + number * 0.01:
            pass
        queue.put((number, create(place, f"{number:04d}", str(os.getpid()).encode())))


def test_of_processes_that_make_the_same_file_at_once_one_wins(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    start = time.time() + 0.3
    racers = [context.Process(target=_race, args=(str(tmp_path / "f"), start, queue)) for _ in range(4)]
    for racer in racers:
        racer.start()
    found = [queue.get(timeout=30) for _ in range(160)]
    for racer in racers:
        racer.join(30)
    assert sorted(number for number, won in found if won) == list(range(40))


def test_on_disk_the_second_is_refused_at_the_firsts_next_renewal(tmp_path: Path) -> None:
    folder = Folder.local(tmp_path)
    with held_lease(folder, owner="process 1", ttl_s=0.4) as held:
        said: list[str] = []
        with (
            pytest.raises(UserError, match="process 1 is writing in this run folder"),
            held_lease(folder, owner="process 2", ttl_s=0.4, say=said.append),
        ):
            raise AssertionError
        assert said == ["waiting up to 0 s for process 1, who may have been killed, to renew its lease"]
        with (
            pytest.raises(UserError, match="runs out after 0 s"),
            held_lease(folder, owner="process 2", ttl_s=0.4, wait=False),
        ):
            raise AssertionError
        held.check()
    with held_lease(folder, owner="process 3", ttl_s=60) as held:
        assert held.fence == 2
    row = json.loads((tmp_path / ".lease" / "00000002").read_bytes())
    assert (row["owner"], row["released"]) == ("process 3", True)


def test_a_killed_holders_lease_is_taken_over_when_it_has_run_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder.local(tmp_path)
    place = tmp_path / ".lease" / "00000007"
    place.parent.mkdir()
    place.write_bytes(lease._content("process 1", 5.0, "token", 3, released=False))
    waits: list[float] = []

    def pause(seconds: float) -> None:
        waits.append(seconds)
        written = place.stat().st_mtime - seconds * 4  # as if four times as much had passed
        os.utime(place, (written, written))

    with held_lease(folder, owner="process 2", ttl_s=60, pause=pause) as held:
        assert held.fence == 8
    assert 0 < sum(waits) * 4 <= 5 + 2 + 4 * max(waits)


def test_the_lease_of_a_process_killed_on_this_machine_is_taken_over_at_once(tmp_path: Path) -> None:
    code = """
import sys, time
from medtl_dist.storage import Folder
from medtl_dist.train.lease import held_lease
with held_lease(Folder.local(sys.argv[1]), owner="process 1", ttl_s=60):
    print("held", flush=True)
    time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        shelf = FolderShelf(Folder.local(tmp_path / ".lease"))
        assert isinstance(acquire(shelf, owner="process 2", ttl_s=60), Holder)
    finally:
        holder.kill()
    holder.stdout.close()

    def pause(_seconds: float) -> None:
        raise AssertionError("nothing is to be waited for")

    # A zombie until here, which writes no more than a process that is gone.
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    with held_lease(Folder.local(tmp_path), owner="process 2", ttl_s=60, pause=pause) as held:
        assert held.fence == 2
    holder.wait()


def test_of_a_process_elsewhere_nothing_is_known() -> None:
    mark = mark_of_this_process()
    assert mark is not None
    place, pid, started = mark.rsplit(" ", 2)
    name, boot, namespace = place.split(" ")
    assert not has_ended(mark)
    assert has_ended(f"{place} {pid} {int(started) + 1}")  # its number went to another
    assert has_ended(f"{place} {2**30} {started}")
    gone = f"{2**30} {started}"
    for other in (f"other {boot} {namespace}", f"{name} {boot[:-1]}x {namespace}", f"{name} {boot} {namespace}1"):
        assert not has_ended(f"{other} {gone}")
    for damaged in ("", " ", place, f"{place} x {started}", f"{place} {pid}"):
        assert not has_ended(damaged)
