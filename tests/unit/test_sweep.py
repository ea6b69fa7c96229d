"""Ranking of trials against independent comparisons, the one-standard-error rule, the table's way there and back, the summary."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from example_sweep import keep_scores, macro_auc, made_up_logits, made_up_val, write_example, write_trials
from hypothesis import given, settings
from hypothesis import strategies as st

from medtl_dist.errors import DataError
from medtl_dist.metrics.bootstrap import replicate_aucs
from medtl_dist.metrics.intervals import auc_interval, compare_auc
from medtl_dist.metrics.paired import compare_over_seeds
from medtl_dist.sweep.knobs import knobs_of
from medtl_dist.sweep.outcome import Epoch, Outcome
from medtl_dist.sweep.ranking import interval_of, rank, variance_of_difference
from medtl_dist.sweep.scores import Scores, Val, read_scores
from medtl_dist.sweep.summary import cache_savings, read_summary, stops_by_depth, sweep_summary, write_sweep
from medtl_dist.sweep.table import read_table, write_table


def outcome(number: int, *aucs: float | None, loss: float = 0.5, depth: int = 0, **keys: Any) -> Outcome:
    curve = tuple(Epoch(epoch, auc, loss, 0.6, 10.0 * (epoch + 1)) for epoch, auc in enumerate(aucs))
    keys = {"state": "finished", "reason": None, "cached_s": None, "attempts": 1} | keys
    return Outcome(
        number=number, overrides={"optim.lr": 0.1}, curve=curve, frozen_depth=depth, num_stages=5, seconds=10.0 * len(aucs),
        cpu_hours=0.0, gpu_hours=0.0, folder=f"trials/{number:05d}", **keys,
    )  # fmt: skip


def scored(
    qualities: list[float], depths: list[int], *, num_patients: int = 150, seed: int = 0
) -> tuple[list[Outcome], Scores]:
    """A one-epoch trial per quality, with its scores; most of the noise is common, as networks on the same images have it."""
    rng = np.random.default_rng(seed)
    labels, groups = made_up_val(num_patients, 2, rng)
    common = made_up_logits(labels, groups, 0.0, 2, rng)
    outcomes, epochs = [], {}
    for number, (quality, depth) in enumerate(zip(qualities, depths, strict=True)):
        own = 0.3 * made_up_logits(labels, groups, 0.0, 2, rng)
        signal = quality * np.stack([labels == 0, labels == 1], axis=1) / 2
        logits = (common + own + signal).astype(np.float32)
        epochs[number] = {0: logits}
        outcomes.append(outcome(number, macro_auc(labels, logits), depth=depth))
    return outcomes, Scores(Val(labels, groups, ("a", "b"), binary=True), epochs)


# ---- order and who is in it


def test_order_is_by_auc_then_loss_then_number() -> None:
    outcomes = [
        outcome(3, 0.8),
        outcome(1, 0.9, loss=0.4),
        outcome(0, 0.9, loss=0.5),
        outcome(2, 0.9, loss=0.4),
        outcome(4, 0.95),
    ]
    assert rank(outcomes, None).order == (4, 1, 2, 0, 3)
    assert rank(list(reversed(outcomes)), None).order == (4, 1, 2, 0, 3)


def test_failed_undefined_and_unfinished_trials_are_never_ranked_and_listed_with_a_reason() -> None:
    outcomes = [
        outcome(0, 0.99, state="failed", reason="TrainingError: out of memory"),
        outcome(1, None, None, reason="undefined: no positive images"),
        outcome(2, 0.6),
        outcome(3, 0.98, state="running"),
        outcome(4, state="waiting"),
        outcome(5, 0.7, 0.5, state="stopped", reason="asha"),
        outcome(6, None),
        outcome(7, state="stopped"),
    ]
    found = rank(outcomes, None)
    assert found.order == (5, 2)
    assert (found.best, found.chosen) == (5, 5)
    assert found.unranked == (
        (0, "TrainingError: out of memory"),
        (1, "undefined: no positive images"),
        (3, "not ended: running"),
        (4, "not ended: waiting"),
        (6, "its AUC is undefined"),
        (7, "no epoch ended"),
    )


def test_nothing_to_rank() -> None:
    found = rank([outcome(0, None)], None)
    assert (found.order, found.best, found.chosen) == ((), None, None)


def test_a_loss_that_is_no_number_comes_last_among_equals() -> None:
    assert rank([outcome(0, 0.9, loss=math.nan), outcome(1, 0.9, loss=5.0)], None).order == (1, 0)


# ---- comparisons with the best


def test_gaps_and_intervals_are_those_of_the_paired_clustered_comparison() -> None:
    outcomes, scores = scored([2.0, 1.6, 1.0, 0.2], [0, 1, 2, 3])
    found, val = rank(outcomes, scores), scores.val
    assert found.order == (0, 1, 2, 3)
    for number in (1, 2, 3):
        expected = compare_auc(val.labels, scores.epochs[number][0][:, 1], scores.epochs[0][0][:, 1], val.groups)
        assert expected.variance is not None
        assert expected.p_value is not None
        gap = found.gaps[number]
        assert gap.difference == pytest.approx(expected.difference, abs=1e-12)
        assert gap.error == pytest.approx(math.sqrt(expected.variance), rel=1e-9)
        assert gap.p_value == pytest.approx(expected.p_value, rel=1e-9)
        assert (number in found.indistinguishable) == (expected.p_value >= 0.05)
    assert found.intervals[0].interval == auc_interval(val.labels, scores.epochs[0][0][:, 1], val.groups).interval
    assert 3 not in found.indistinguishable
    assert 0 not in found.indistinguishable


def test_several_classes_are_compared_by_their_mean() -> None:
    rng = np.random.default_rng(1)
    labels, groups = made_up_val(120, 3, rng)
    a, b = (made_up_logits(labels, groups, quality, 3, rng) for quality in (1.0, 1.5))
    val = Val(labels, groups, ("a", "b", "c"), binary=False)
    expected = compare_over_seeds(labels, [a], [b], groups, binary=False)
    assert variance_of_difference(val, a, b) == pytest.approx(expected.variance_patients, rel=1e-9)
    interval = interval_of(val, a)
    assert interval is not None
    assert interval.auc == pytest.approx(expected.auc_a)
    # As label sets, all known, it is the same question.
    sets = Val((labels[:, None] == np.arange(3)).astype(np.int64), groups, ("a", "b", "c"), binary=False)
    assert variance_of_difference(sets, a, b) == pytest.approx(expected.variance_patients, rel=1e-9)


def test_unknown_labels_are_no_rows_of_their_class() -> None:
    """Against the patient bootstrap of the same difference."""
    rng = np.random.default_rng(2)
    labels, groups = made_up_val(250, 3, rng)
    a, b = (made_up_logits(labels, groups, quality, 3, rng) for quality in (1.0, 1.4))
    sets = (labels[:, None] == np.arange(3)).astype(np.int64)
    sets[rng.random(sets.shape) < 0.3] = -1
    val = Val(sets, groups, ("a", "b", "c"), binary=False)
    known = [sets[:, k] != -1 for k in range(3)]
    draws = [
        replicate_aucs(
            np.zeros(len(sets), int),
            [(sets[:, k] == 1, z[:, k]) for k in range(3)],
            groups,
            num_replicates=1500,
            known=known,
        ).mean(axis=1)
        for z in (a, b)
    ]
    for k, parts in enumerate(val.components(a)):  # each patient has its place in every class
        expected = [(sets[groups == patient, k] == 1).any() for patient in range(groups.max() + 1)]
        assert parts.has_positive.tolist() == expected
        assert not parts.positive[~parts.has_positive].any()
    variance = variance_of_difference(val, a, b)
    assert variance == pytest.approx(float(np.var(draws[1] - draws[0])), rel=0.15)


# ---- the one-standard-error rule


def test_the_winner_is_the_deepest_frozen_within_one_standard_error() -> None:
    outcomes, scores = scored([2.0, 1.97, 1.97, 0.5], [0, 3, 1, 5], seed=6)
    found = rank(outcomes, scores)
    assert found.best == 0
    near = {number for number, gap in found.gaps.items() if gap.difference <= (gap.error or 0)}
    assert near == {1, 2}, "the example should have two trials near the best"
    assert found.chosen == 1
    assert near <= found.indistinguishable


def test_of_equally_frozen_trials_the_one_with_fewer_epochs_wins() -> None:
    outcomes = [outcome(0, 0.7, 0.8, 0.9, depth=2), outcome(1, 0.8, 0.9, depth=2, loss=0.7), outcome(2, 0.9, depth=1)]
    found = rank(outcomes, None)
    assert found.order == (0, 2, 1)
    assert found.chosen == 1  # equal AUC: as deep as 0, an epoch fewer; deeper than 2


def test_without_scores_only_an_equal_auc_is_near() -> None:
    found = rank([outcome(0, 0.9), outcome(1, 0.8999, depth=5)], None)
    assert found.chosen == 0
    assert found.indistinguishable == {1}  # nothing tells them apart
    assert found.intervals == {}


def test_depth_counts_as_a_share_of_the_networks_own_stages() -> None:
    shallow = dataclasses.replace(outcome(0, 0.9, depth=5), num_stages=10)
    assert rank([shallow, outcome(1, 0.9, depth=4, loss=0.7)], None).chosen == 1


def test_perfect_and_equal_trials() -> None:
    labels = np.array([0, 1] * 12)
    logits = np.stack([-labels, labels], axis=1).astype(np.float32)
    scores = Scores(Val(labels, np.arange(24), ("a", "b"), binary=True), {0: {0: logits}, 1: {0: 2 * logits}})
    found = rank([outcome(0, 1.0), outcome(1, 1.0, depth=3)], scores)
    assert found.chosen == 1
    assert found.intervals[0].interval is not None
    assert found.intervals[0].interval[1] == 1.0


# ---- what trials leave


def test_scores_are_read_by_epoch_and_what_is_damaged_is_told(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels, groups = made_up_val(30, 2, rng)
    logits = {epoch: made_up_logits(labels, groups, 1.0, 2, rng) for epoch in range(3)}
    outcomes = []
    for number in range(5):
        outcomes.append(outcome(number, *[macro_auc(labels, one) for one in logits.values()]))
        best = outcomes[-1].best
        assert best is not None
        finished = None if number == 4 else best.epoch
        own, patients = (labels, groups) if number != 3 else (labels[::-1].copy(), groups)
        keep_scores(tmp_path / outcomes[-1].folder, own, patients, logits, ["a", "b"], best=finished)
    (tmp_path / "trials/00001/predictions/epochs/0001.npy").write_bytes(b"\x93NUMPY broken")
    np.save(tmp_path / "trials/00001/predictions/epochs/0002.npy", np.full((len(labels), 2), np.nan, np.float32))
    (tmp_path / "trials/00002/predictions/val.parquet").write_bytes(b"PAR1")
    found = read_scores(tmp_path, outcomes)
    assert found is not None
    assert found.val.binary
    assert np.array_equal(found.val.labels, labels)
    of_the_damaged = sorted({0, max(range(3), key=lambda epoch: outcomes[1].curve[epoch].val_auc or 0)})
    kept = {number: sorted(logits) for number, logits in found.epochs.items()}
    assert kept == {0: [0, 1, 2], 1: of_the_damaged, 4: [0, 1, 2]}
    np.testing.assert_array_equal(found.epochs[4][2], logits[2])
    assert [note.split(":")[0] for note in found.notes] == ["Trial 2", "Trial 3", "Trial 1"]
    assert "other images" in found.notes[1]
    assert "2 of its epochs" in found.notes[2]


class Hostile:
    """Unpickled, it would leave a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_an_epoch_file_is_never_unpickled(tmp_path: Path) -> None:
    outcomes = write_trials(tmp_path / "s", num_trials=3, epochs=2, num_patients=30, faults=False)
    hostile = np.array([Hostile(tmp_path / "owned")], dtype=object)
    np.save(tmp_path / "s/trials/00000/predictions/epochs/0000.npy", hostile, allow_pickle=True)
    found = read_scores(tmp_path / "s", outcomes)
    assert found is not None
    assert "can't be read" in found.notes[0]
    assert not (tmp_path / "owned").exists()


def test_no_patients_known_no_scores_kept(tmp_path: Path) -> None:
    outcomes = write_trials(tmp_path / "a", num_trials=3, epochs=2, num_patients=30, faults=False, known_patients=False)
    found = read_scores(tmp_path / "a", outcomes)
    assert found is not None
    assert found.val.groups is None
    assert any(text.startswith("Patients unknown") for text in sweep_summary(tmp_path / "a", outcomes)["cautions"])
    assert read_scores(tmp_path / "nowhere", outcomes) is None


# ---- sweep.parquet


finite = st.floats(-1e6, 1e6)
epochs = st.builds(Epoch, st.integers(0, 500), st.none() | st.floats(0, 1), finite, finite, st.floats(0, 1e6))
values = (
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | finite
    | st.text(max_size=9)
    | st.lists(st.integers(0, 9), max_size=3)
)
outcomes_ = st.builds(
    Outcome,
    number=st.integers(0, 10**6),
    overrides=st.dictionaries(st.sampled_from(["optim.lr", "model.frozen_depth", "augment.name"]), values),
    state=st.sampled_from(["waiting", "running", "finished", "stopped", "failed"]),
    reason=st.none() | st.text(max_size=30),
    curve=st.lists(epochs, max_size=4).map(tuple),
    frozen_depth=st.integers(0, 9),
    num_stages=st.integers(1, 9),
    seconds=st.floats(0, 1e6),
    cpu_hours=st.floats(0, 1e3),
    gpu_hours=st.floats(0, 1e3),
    attempts=st.integers(0, 9),
    cached_s=st.none() | st.floats(0, 1e5),
    folder=st.text(max_size=20),
)


@settings(max_examples=30, deadline=None)
@given(st.lists(outcomes_, max_size=5, unique_by=lambda one: one.number))
def test_the_table_gives_back_what_it_was_given(
    tmp_path_factory: pytest.TempPathFactory, several: list[Outcome]
) -> None:
    folder = tmp_path_factory.mktemp("table")
    write_table(folder, several)
    assert read_table(folder) == sorted(several, key=lambda one: one.number)


def test_the_table_has_ranks_intervals_and_a_column_per_key(tmp_path: Path) -> None:
    outcomes = write_trials(tmp_path, num_trials=6, epochs=3, num_patients=60, faults=False)
    write_sweep(tmp_path, outcomes)
    rows = pq.read_table(tmp_path / "sweep.parquet").to_pylist()
    assert sorted(row["rank"] for row in rows) == [1, 2, 3, 4, 5, 6]
    top = next(row for row in rows if row["rank"] == 1)
    assert top["auc"] == max(max(row["val_auc"]) for row in rows)
    assert top["auc_low"] < top["auc"] < top["auc_high"]
    assert len(top["val_auc"]) == len(top["epoch_end_s"]) == 3
    assert rows[1]["optim.lr"] == outcomes[1].overrides["optim.lr"]
    assert rows[1]["model.frozen_depth"] == str(
        outcomes[1].overrides["model.frozen_depth"]
    )  # numbers and "all": as text
    assert rows[0]["optim.lr"] is None  # the base config itself
    assert not list(tmp_path.glob(".sweep*"))


@pytest.mark.parametrize("content", [None, b"", b"PAR1 nothing"])
def test_a_table_that_is_not_one(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "sweep.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"sweep\.parquet: (there is none|damaged)"):
        read_table(tmp_path)


# ---- sweep.json


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_example(tmp_path_factory.mktemp("sweeps") / "pneumonia", num_trials=16, seed=3)


def test_the_summary_says_it_all(example: Path) -> None:
    content = read_summary(example)
    assert content == json.loads(json.dumps(sweep_summary(example, read_table(example))))
    assert content["states"] == {"failed": 1, "finished": 13, "stopped": 2}
    assert [row["trial"] for row in content["unranked"]] == [5, 7]
    assert "checksum" in content["unranked"][0]["reason"]
    assert content["winner"]["within_one_error"]
    assert content["winner"]["frozen_depth"] >= content["best"]["frozen_depth"]
    assert content["best"]["auc"] == max(row["auc"] for row in content["ranking"])
    assert content["optimism"]["value"] > 0
    assert len(content["ranking"]) + len(content["unranked"]) == content["num_trials"] == 16
    assert sum(row["trials"] for row in content["stops_by_depth"]) == 16
    titles = [text.split(":")[0] for text in content["cautions"]]
    assert titles[:3] == [
        "Chosen on val",
        "The interval leaves out the choice",
        f"Optimistic by about {content['optimism']['value']:.3f}",
    ]


def test_knobs_are_named_as_the_space_names_them(example: Path) -> None:
    outcomes = read_table(example)
    rows = knobs_of(example, outcomes)
    assert {row["augmentation"] for row in rows} <= {"none", "light", "usual", "strong"}
    assert not any(key.startswith("augment.") for row in rows for key in row)
    assert rows[0]["optim.lr"] == 1e-3  # of the base config
    assert rows[0]["augmentation"] == "usual"


def test_no_ranked_trial_says_so(tmp_path: Path) -> None:
    content = sweep_summary(tmp_path, [outcome(0, None, state="failed", reason="it broke")])
    assert content["winner"] is None
    assert content["cautions"][0].startswith("No trial can be ranked")


def test_stops_that_differ_by_depth_are_cautioned_of(tmp_path: Path) -> None:
    stopped = [outcome(n, 0.6 + n / 100, depth=0, state="stopped", reason="asha") for n in range(3)]
    ended = [outcome(n, 0.7, depth=5) for n in range(3, 6)]
    found = [
        text for text in sweep_summary(tmp_path, stopped + ended)["cautions"] if text.startswith("Stopped by depth")
    ]
    assert len(found) == 1
    assert "3 of 3 trials frozen to depth 0" in found[0]
    assert "0 of 3 to depth 5" in found[0]
    assert [row["stopped"] for row in stops_by_depth(stopped + ended)] == [3, 0]
    even = [outcome(n, 0.7, depth=n % 2, state="stopped") for n in range(4)]
    assert not [text for text in sweep_summary(tmp_path, even)["cautions"] if text.startswith("Stopped by depth")]


def test_savings_of_the_cache() -> None:
    """Depth 4: filled for 20 s, three trials of 5 epochs: 15 epochs at 20 s, less what was spent. Depth 5 saved nothing."""
    aucs = [0.8] * 5
    outcomes = [outcome(n, *aucs, depth=4, cached_s=20.0 if n == 0 else 0.5) for n in range(3)]
    outcomes += [outcome(3, 0.8, depth=5, cached_s=10.0), outcome(4, 0.8)]
    found = cache_savings(outcomes, 1)
    assert [(row["frozen_depth"], row["saved_s"]) for row in found["by_depth"]] == [(4, 15 * 20 - 21.0), (5, 0.0)]
    assert cache_savings(outcomes, 5)["by_depth"][0]["saved_s"] == 15 * 4 - 21.0
    assert cache_savings([outcome(0, 0.8)], None) == {"views": 1, "by_depth": [], "saved_s": 0.0}


@pytest.mark.parametrize("content", [None, "", "[]", '{"schema_version": 9}', "{}"])
def test_a_summary_that_is_not_one(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(DataError, match=r"sweep\.json: (there is none|damaged|schema version 9)"):
        read_summary(tmp_path)
