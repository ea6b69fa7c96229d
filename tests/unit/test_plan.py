"""Who reads what, and when (data/plan.py)."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from medtl_dist.data.plan import (
    EpochPlan,
    Piece,
    Weighting,
    check_world_size,
    eval_plan,
    lanes_for,
    run_length_for,
    train_plan,
    weigh,
)
from medtl_dist.errors import DataError, UserError

COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=8)
PLANS = {
    "counts": COUNTS,
    "batch": st.integers(1, 24),
    "lanes": st.integers(1, 12),
    "run": st.integers(1, 20),
    "seed": st.integers(0, 2**63),
    "epoch": st.integers(0, 1000),
}
MODEST = settings(deadline=None, max_examples=60)


def make(*, counts: list[int], batch: int, lanes: int, run: int, seed: int, epoch: int) -> EpochPlan:
    assume(sum(counts) >= batch)
    return train_plan(counts, global_batch_size=batch, seed=seed, epoch=epoch, max_lanes=lanes, run_length=run)


def every(counts: list[int]) -> set[tuple[int, int]]:
    return {(shard, row) for shard, count in enumerate(counts) for row in range(count)}


def used(plan: EpochPlan) -> list[tuple[int, int]]:
    return [sample for lane in range(plan.num_lanes) for sample in plan.samples(lane)]


@MODEST
@given(**PLANS)
def test_an_epoch_uses_each_sample_at_most_once_and_leaves_out_fewer_than_a_batch(**given_plan: Any) -> None:
    plan = make(**given_plan)
    seen = used(plan)
    assert len(seen) == len(set(seen)) == plan.num_steps * plan.global_batch_size
    assert set(seen) <= every(given_plan["counts"])
    assert 0 <= plan.num_left_out < plan.global_batch_size
    assert len(seen) + plan.num_left_out == sum(given_plan["counts"])


@MODEST
@given(**PLANS, data=st.data())
def test_a_step_holds_the_same_samples_in_the_same_order_at_every_world_size(data: Any, **given_plan: Any) -> None:
    plan = make(**given_plan)
    world_size = data.draw(st.integers(1, plan.num_lanes))
    step = data.draw(st.integers(0, plan.num_steps - 1))
    parts = [plan.step(step, rank, world_size) for rank in range(world_size)]
    assert [sample for part in parts for sample in part] == plan.step(step)
    assert all(parts), "every rank has samples at every step"
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= plan.lane_batch


@MODEST
@given(**PLANS, data=st.data())
def test_resuming_at_a_step_continues_the_lane_as_if_never_stopped(data: Any, **given_plan: Any) -> None:
    plan = make(**given_plan)
    lane = data.draw(st.integers(0, plan.num_lanes - 1))
    start = data.draw(st.integers(0, plan.num_steps))
    assert list(plan.samples(lane, start)) == list(plan.samples(lane))[start * plan.lane_batch :]


@MODEST
@given(**PLANS)
def test_a_run_is_read_in_at_most_two_ranges_and_windows_are_bounded(**given_plan: Any) -> None:
    plan = make(**given_plan)
    pieces: list[Piece] = []
    for lane in range(plan.num_lanes):
        for window, order in plan.windows(lane):
            assert len(window) <= 2
            assert sorted(order.tolist()) == list(range(sum(len(piece) for piece in window)))
            assert all(1 <= len(piece) <= plan.run_length for piece in window)
            pieces += window
    # A lane boundary cuts a run, and so does the turn of the ring: runs + lanes + 1 ranges in all.
    runs = sum(-(-count // plan.run_length) for count in given_plan["counts"])
    assert len(pieces) <= runs + plan.num_lanes + 1


@MODEST
@given(**PLANS)
def test_a_plan_is_a_pure_function(**given_plan: Any) -> None:
    assert used(make(**given_plan)) == used(make(**given_plan))


def test_epochs_and_seeds_differ_in_order_and_in_what_is_left_out() -> None:
    counts = [50, 50, 57]
    plans = [
        train_plan(counts, global_batch_size=32, seed=seed, epoch=epoch, run_length=8)
        for seed in range(2)
        for epoch in range(6)
    ]
    orders = {tuple(used(plan)) for plan in plans}
    left_out = {frozenset(every(counts) - set(order)) for order in orders}
    assert len(orders) == len(left_out) == 12


def test_even_a_single_run_leaves_out_other_samples_each_epoch() -> None:
    left_out = Counter(
        sample
        for epoch in range(200)
        for sample in every([40]) - set(used(train_plan([40], global_batch_size=32, seed=0, epoch=epoch)))
    )
    # 8 of 40 are left out: each sample is expected 40 times in 200 epochs (sd ~ 5.7, and neighbours go together).
    assert len(left_out) == 40
    assert min(left_out.values()) > 10
    assert max(left_out.values()) < 80


def test_small_sets_mix_so_that_any_two_samples_can_meet_in_a_step() -> None:
    num_samples, batch = 48, 8
    run = run_length_for(num_samples, 10_000, lanes_for(batch))
    met = {
        (a, b)
        for epoch in range(250)
        for step in range(num_samples // batch)
        for plan in [train_plan([num_samples], global_batch_size=batch, seed=1, epoch=epoch, run_length=run)]
        for rows in [[row for _, row in plan.step(step)]]
        for a in rows
        for b in rows
        if a < b
    }
    assert len(met) == num_samples * (num_samples - 1) // 2


def test_the_order_is_the_same_for_ever() -> None:
    """Golden numbers: a resumed run on another machine or NumPy must find the same samples. Never update these."""
    plan = train_plan([300, 41, 0, 500], global_batch_size=48, seed=7, epoch=3, max_lanes=16, run_length=60)
    assert (plan.num_lanes, plan.lane_batch, plan.num_steps) == (16, 3, 17)
    assert plan.step(0)[:6] == GOLDEN_STEP
    text = json.dumps([plan.step(step) for step in range(plan.num_steps)])
    assert hashlib.sha256(text.encode()).hexdigest() == GOLDEN_SHA256


GOLDEN_STEP = [(0, 145), (0, 149), (0, 168), (1, 23), (1, 2), (1, 34)]
GOLDEN_SHA256 = "8272f1719c4ee400fcf5a780e117d066644b9dc391bba85588b3df270b762ffd"


@pytest.mark.parametrize(
    ("batch", "lanes", "expected"), [(32, 64, 32), (64, 64, 64), (96, 64, 48), (256, 64, 64), (67, 64, 1), (1, 64, 1)]
)
def test_lanes_are_the_largest_divisor_of_the_batch(batch: int, lanes: int, expected: int) -> None:
    assert lanes_for(batch, lanes) == expected


def test_fewer_samples_than_a_batch_is_an_error_that_says_what_to_lower() -> None:
    with pytest.raises(UserError, match=r"12 training samples .*global_batch_size = 32: lower .* at most 12,"):
        train_plan([5, 7], global_batch_size=32, seed=0, epoch=0)
    with pytest.raises(UserError, match="training split is empty"):
        train_plan([0, 0], global_batch_size=1, seed=0, epoch=0)
    with pytest.raises(UserError, match="training split is empty"):
        train_plan([], global_batch_size=1, seed=0, epoch=0)


def test_more_ranks_than_lanes_is_an_error_that_says_what_to_change() -> None:
    plan = train_plan([100], global_batch_size=6, seed=0, epoch=0)
    with pytest.raises(UserError, match=r"7 workers .* 6 lanes .* multiple of 7"):
        plan.lanes_of(0, 7)
    check_world_size(6, 6, 6)


@pytest.mark.parametrize(("batch", "lanes"), [(0, 64), (-4, 64), (8, 0)])
def test_impossible_batches_are_refused(batch: int, lanes: int) -> None:
    with pytest.raises(UserError, match="1 or more"):
        train_plan([100], global_batch_size=batch, seed=0, epoch=0, max_lanes=lanes)
    with pytest.raises(UserError, match="1 or more"):
        eval_plan([3], min(batch, lanes, 0))


@MODEST
@given(counts=COUNTS, batch_size=st.integers(1, 50), world_size=st.integers(1, 9))
def test_evaluation_covers_every_sample_once_in_the_same_batches_at_every_world_size(
    counts: list[int], batch_size: int, world_size: int
) -> None:
    plan = eval_plan(counts, batch_size)
    numbers = [number for rank in range(world_size) for number in plan.batches_of(rank, world_size)]
    assert numbers == list(range(plan.num_batches))
    batches = [
        [(piece.shard, row) for piece in plan.batch(number) for row in range(piece.start, piece.stop)]
        for number in numbers
    ]
    assert [sample for batch in batches for sample in batch] == sorted(every(counts))
    assert all(len(batch) == batch_size for batch in batches[:-1])


def test_run_length_follows_bytes_and_the_size_of_the_set() -> None:
    assert run_length_for(10**6, 10_000, 64) == 128
    assert run_length_for(10**6, 200_000, 64) == 10
    assert run_length_for(10**6, 50e6, 64) == 1
    assert run_length_for(5_000, 10_000, 32) == 19
    assert run_length_for(10, 0, 64) == 1


def test_a_rank_of_a_hundred_million_samples_plans_within_memory_of_its_runs() -> None:
    """10^8 samples are 800,000 runs: counted in array sizes, as a clock would not be a test."""
    plan = train_plan(np.full(10**5, 1000), global_batch_size=1024, seed=0, epoch=0, max_lanes=1024)
    assert plan.num_steps == 10**8 // 1024
    assert len(plan._edge) <= 800_002
    window, order = next(plan.windows(plan.lanes_of(1023, 1024)[0], start_step=90_000))
    assert len(window) <= 2
    assert 0 < len(order) <= 256


def test_the_module_needs_neither_torch_nor_webdataset() -> None:
    code = "import sys, medtl_dist.data.plan; print({'torch', 'webdataset', 'ray', 'cv2'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


STRATA = st.lists(st.lists(st.integers(0, 12), min_size=3, max_size=3), min_size=1, max_size=6)
WEIGHTS = st.lists(st.floats(0, 4), min_size=3, max_size=3)


def drawn(weighting: Weighting, seed: int, epoch: int) -> list[Counter[int]]:
    """Per shard, how often each of its samples appears; a shard's strata lie shuffled."""
    found = []
    for shard, counts in enumerate(weighting.counts):
        strata = np.random.default_rng(shard).permutation(np.repeat(np.arange(3), counts))
        rows = weighting.virtual_rows(shard, strata, seed, epoch)
        seen = Counter(rows.tolist())
        found.append(Counter({row: seen[row] for row in range(len(strata))}))
    return found


@MODEST
@given(STRATA, WEIGHTS, st.integers(0, 99), st.integers(0, 99))
def test_a_sample_of_weight_w_appears_floor_or_ceil_of_w_times_and_a_stratum_equally_often_every_epoch(
    counts: list[list[int]], weights: list[float], seed: int, epoch: int
) -> None:
    weighting = weigh(np.array(counts), weights)
    samples = np.sum(counts, axis=0)
    totals = np.zeros(3, int)
    for shard, times in enumerate(drawn(weighting, seed, epoch)):
        strata = np.random.default_rng(shard).permutation(np.repeat(np.arange(3), counts[shard]))
        for row, number in times.items():
            stratum = strata[row]
            realised = weighting.totals[stratum] / samples[stratum]
            assert number in (math.floor(realised), math.ceil(realised))
            totals[stratum] += number
    assert totals.tolist() == weighting.totals.tolist()
    assert np.all(np.abs(totals - np.array(weights) * samples) <= 0.5)


@MODEST
@given(STRATA, WEIGHTS, st.integers(1, 9), st.integers(1, 6), st.integers(1, 9), st.integers(0, 99), st.integers(0, 9))
def test_a_weighted_epoch_covers_every_appearance_once_and_resumes_and_deals_like_any_other(
    counts: list[list[int]], weights: list[float], batch: int, lanes: int, run: int, seed: int, epoch: int
) -> None:
    weighting = weigh(np.array(counts), weights)
    assume(int(weighting.totals.sum()) >= batch)
    sizes = np.sum(counts, axis=1)
    plan = train_plan(
        sizes, global_batch_size=batch, seed=seed, epoch=epoch, max_lanes=lanes, run_length=run, weighting=weighting
    )
    seen = used(plan)
    virtual = {
        (shard, row) for shard, times in enumerate(drawn(weighting, seed, epoch)) for row in range(times.total())
    }
    assert len(seen) == len(set(seen)) == plan.num_steps * batch
    assert set(seen) <= virtual
    assert plan.num_samples == len(virtual) == int(weighting.totals.sum())
    step, world_size = plan.num_steps // 2, plan.num_lanes
    parts = [plan.step(step, rank, world_size) for rank in range(world_size)] if plan.num_steps > step else []
    assert [sample for part in parts for sample in part] == (plan.step(step) if parts else [])
    for lane in range(plan.num_lanes):
        whole = list(plan.samples(lane))
        assert list(plan.samples(lane, step)) == whole[step * plan.lane_batch :]


def test_every_run_of_a_weighted_epoch_reads_forward() -> None:
    counts = np.array([[30, 5], [10, 25]])
    weighting = weigh(counts, [0.5, 3.2])
    plan = train_plan(counts.sum(axis=1), global_batch_size=4, seed=1, epoch=0, run_length=8, weighting=weighting)
    for lane in range(plan.num_lanes):
        for pieces, _ in plan.windows(lane):
            for piece in pieces:
                strata = np.repeat([0, 1], counts[piece.shard])
                rows = weighting.virtual_rows(piece.shard, strata, 1, 0)[piece.start : piece.stop]
                assert (np.diff(rows) > 0).all(), "a run holds a sample once, in the order of the shard"


def test_over_many_epochs_every_sample_of_a_stratum_appears_equally_often() -> None:
    counts = np.array([[7, 3], [1, 11], [12, 0]])
    weighting = weigh(counts, [0.3, 1.7])
    epochs = 2000
    totals = [Counter() for _ in counts]
    for epoch in range(epochs):
        for shard, times in enumerate(drawn_in_order(weighting, 5, epoch)):
            totals[shard].update(times)
    for shard, times in enumerate(totals):
        for row in range(int(counts[shard].sum())):
            stratum = int(row >= counts[shard, 0])
            weight = weighting.totals[stratum] / counts[:, stratum].sum()
            spread = 5 * math.sqrt(0.25 * epochs)  # five standard errors of a fair draw, at most
            assert abs(times[row] - weight * epochs) < spread


def drawn_in_order(weighting: Weighting, seed: int, epoch: int) -> list[Counter[int]]:
    return [
        Counter(weighting.virtual_rows(shard, np.repeat([0, 1], counts), seed, epoch).tolist())
        for shard, counts in enumerate(weighting.counts)
    ]


def test_balanced_strata_appear_equally_often_and_the_epoch_keeps_its_length() -> None:
    weighting = weigh(np.array([[90, 10, 0], [0, 11, 0]]))
    assert weighting.totals.tolist() == [56, 55, 0]


def test_weights_of_one_are_no_weights() -> None:
    counts = np.array([[30, 5], [10, 25], [0, 0], [3, 4]])
    sizes = counts.sum(axis=1)
    options: dict[str, Any] = {"global_batch_size": 4, "seed": 3, "epoch": 2, "run_length": 8}
    weighting = weigh(counts, [1, 1])
    assert used(train_plan(sizes, weighting=weighting, **options)) == used(train_plan(sizes, **options))
    assert weighting.virtual_rows(1, np.repeat([0, 1], [10, 25]), 3, 2).tolist() == list(range(35))


@pytest.mark.parametrize(("weights", "says"), [([-1, 1], "numbers from 0 on"), ([float("nan"), 1], "numbers from 0")])
def test_weights_that_are_none_are_refused(weights: list[float], says: str) -> None:
    with pytest.raises(UserError, match=says):
        weigh(np.array([[3, 4]]), weights)


def test_a_class_too_rare_to_balance_is_refused() -> None:
    with pytest.raises(UserError, match=r"would appear 500 times an epoch, more than 100"):
        weigh(np.array([[999, 1]]))


def test_strata_that_differ_from_the_plans_are_refused() -> None:
    weighting = weigh(np.array([[3, 4]]))
    with pytest.raises(DataError, match="differ from those"):
        weighting.virtual_rows(0, np.array([0, 1, 1]), 0, 0)
    with pytest.raises(ValueError, match="do not add up"):
        train_plan([8], global_batch_size=1, seed=0, epoch=0, weighting=weighting)


def test_batches_of_a_set_that_lies_class_by_class_are_as_mixed_as_by_chance() -> None:
    counts, batch = [500] * 12, 48
    plan = train_plan(counts, global_batch_size=batch, seed=0, epoch=0, run_length=run_length_for(6000, 10_000, 48))
    positive = np.arange(6000) < 1500
    found = [sum(positive[500 * shard + row] for shard, row in plan.step(step)) for step in range(0, plan.num_steps, 2)]
    by_chance = batch * 0.25 * 0.75 * (6000 - batch) / 5999
    assert np.var(found) < 2 * by_chance, "read in order, it would be about 48 times as much"
    assert abs(np.mean(found) - batch / 4) < 1


def test_weights_that_leave_too_little_are_named() -> None:
    weighting = weigh(np.array([[30, 10]]), [0, 0.1])
    with pytest.raises(UserError, match=r"^data\.sampling_weights leave 1 appearances of 40 training samples"):
        train_plan([40], global_batch_size=4, seed=0, epoch=0, weighting=weighting)
