"""How optimistic the best of many is: exact against brute force, unbiased under pure noise, nothing where one dominates."""

from __future__ import annotations

import time

import numpy as np
import pytest
from example_sweep import macro_auc, made_up_logits, made_up_val
from numpy.typing import NDArray

from medtl_dist.metrics.bootstrap import _draws, in_and_out_of_bag, replicate_aucs
from medtl_dist.metrics.ranking import roc_auc
from medtl_dist.sweep.importance import importance
from medtl_dist.sweep.optimism import optimism
from medtl_dist.sweep.outcome import Epoch, Outcome
from medtl_dist.sweep.scores import Scores, Val


def sweep_of(
    labels: NDArray, groups: NDArray | None, logits: dict[int, dict[int, NDArray]], *, binary: bool = True
) -> tuple[list[Outcome], Scores]:
    num_classes = next(iter(logits[0].values())).shape[1]
    outcomes = [
        Outcome(n, {}, "finished", None, tuple(Epoch(e, macro_auc(labels, z), 0.5, 0.5, 1.0) for e, z in kept.items()),
                0, 5, 1.0, 0.0, 0.0, 1, None, "")
        for n, kept in logits.items()
    ]  # fmt: skip
    return outcomes, Scores(Val(labels, groups, tuple("abcdef"[:num_classes]), binary), logits)


def noise(
    rng: np.random.Generator, num: int, epochs: int, num_patients: int, num_classes: int = 2, quality: float = 0.0
):
    labels, groups = made_up_val(num_patients, num_classes, rng)
    logits = {
        n: {e: made_up_logits(labels, groups, quality, num_classes, rng) for e in range(epochs)} for n in range(num)
    }
    return sweep_of(labels, groups, logits, binary=num_classes == 2)


def test_in_and_out_of_bag_against_brute_force() -> None:
    rng = np.random.default_rng(0)
    labels, groups = made_up_val(25, 2, rng)
    labels[3] = 1 - labels[3]  # a patient of both classes
    scorings = [(labels == 1, rng.integers(0, 9, len(labels)).astype(float)) for _ in range(3)]  # with ties
    inside, outside = in_and_out_of_bag(labels, scorings, groups, num_replicates=40, seed=5)
    np.testing.assert_array_equal(inside, replicate_aucs(labels, scorings, groups, num_replicates=40, seed=5))
    low = np.array([labels[groups == g].min() for g in range(25)])
    high = np.array([labels[groups == g].max() for g in range(25)])
    (weights,) = _draws(np.where(low == high, low, -1), 40, 40, 5)
    for row in range(40):
        times = weights[row][groups].astype(int)
        for column, (positive, values) in enumerate(scorings):
            drawn = roc_auc(np.repeat(positive, times), np.repeat(values, times))
            left = roc_auc(positive[times == 0], values[times == 0])
            assert inside[row, column] == pytest.approx(drawn, abs=1e-12)
            assert outside[row, column] == pytest.approx(np.nan if left is None else left, abs=1e-12, nan_ok=True)


def test_under_pure_noise_what_is_left_is_one_half() -> None:
    """12 trials of 4 epochs that know nothing, 40 times: the best looks good, what is left of it is 0.5 within its error."""
    rng = np.random.default_rng(1)
    found = [optimism(*noise(rng, 12, 4, 60), range(12), num_replicates=120) for _ in range(40)]
    assert all(one.value is not None and one.value > 0 for one in found)
    left = np.array([one.corrected for one in found])
    best = np.array([one.best_auc for one in found])
    assert best.min() > 0.52
    assert best.mean() > 0.58
    assert abs(left.mean() - 0.5) < 3 * left.std(ddof=1) / np.sqrt(len(left))


def test_equal_trials_are_corrected_to_their_true_auc() -> None:
    """As above, with signal: 10 equally good trials; their mean AUC is the truth."""
    rng = np.random.default_rng(2)
    gaps = []
    for _ in range(25):
        outcomes, scores = noise(rng, 10, 1, 70, quality=1.2)
        truth = np.mean([one.best.val_auc for one in outcomes if one.best is not None and one.best.val_auc is not None])
        found = optimism(outcomes, scores, range(10), num_replicates=120)
        assert found.corrected is not None
        gaps.append(found.corrected - truth)
    assert abs(np.mean(gaps)) < 3 * np.std(gaps, ddof=1) / np.sqrt(len(gaps)) + 1e-3


def test_where_one_trial_dominates_there_is_no_optimism() -> None:
    rng = np.random.default_rng(3)
    _, scores = noise(rng, 12, 3, 150)
    labels, groups = scores.val.labels, scores.val.groups
    assert groups is not None
    logits = {n: dict(kept) for n, kept in scores.epochs.items()}
    logits[4][1] = made_up_logits(labels, groups, 3.0, 2, rng)
    found = optimism(*sweep_of(labels, groups, logits), range(12))
    assert found.stays_best == 1.0
    assert found.value is not None
    assert found.error is not None
    assert abs(found.value) < max(3 * found.error, 0.003)


def test_several_classes_and_unknown_patients() -> None:
    rng = np.random.default_rng(4)
    outcomes, scores = noise(rng, 6, 2, 80, num_classes=3)
    found = optimism(outcomes, scores, range(6), num_replicates=100)
    assert found.value is not None
    assert found.value > 0.01
    assert found.candidates == 12
    alone = Scores(Val(scores.val.labels, None, scores.val.classes, binary=False), scores.epochs)
    assert optimism(outcomes, alone, range(6), num_replicates=100).value is not None


def test_label_sets_with_unknown_answers() -> None:
    rng = np.random.default_rng(5)
    outcomes, scores = noise(rng, 6, 1, 120, num_classes=3)
    sets = (scores.val.labels[:, None] == np.arange(3)).astype(np.int64)
    sets[rng.random(sets.shape) < 0.3] = -1
    found = optimism(
        outcomes,
        Scores(Val(sets, scores.val.groups, ("a", "b", "c"), False), scores.epochs),
        range(6),
        num_replicates=100,
    )
    assert found.corrected is not None
    assert abs(found.corrected - 0.5) < 0.08


def test_only_ranked_trials_count() -> None:
    rng = np.random.default_rng(6)
    outcomes, scores = noise(rng, 5, 2, 60)
    assert optimism(outcomes, scores, [0, 1], num_replicates=50).candidates == 4


@pytest.mark.parametrize(
    ("ranked", "patients", "says"),
    [([0], 60, "fewer than two epochs"), ([], 60, "fewer than two"), ([0, 1], 2, "too few patients")],
)
def test_when_it_can_not_be_known_it_says_why(ranked: list[int], patients: int, says: str) -> None:
    outcomes, scores = noise(np.random.default_rng(7), 2, 1, patients)
    found = optimism(outcomes, scores, ranked, num_replicates=50)
    assert found.value is None
    assert found.reason is not None
    assert says in found.reason
    assert optimism(outcomes, None, ranked).reason == "no trial left its val scores"


def test_one_class_only_is_undefined() -> None:
    outcomes, scores = noise(np.random.default_rng(7), 2, 1, 20)
    val = Val(np.zeros_like(scores.val.labels), scores.val.groups, ("a", "b"), True)
    assert optimism(outcomes, Scores(val, scores.epochs), [0, 1]).reason == "the AUC is undefined"


def test_it_is_fast_and_the_same_each_time() -> None:
    """12 trials of 10 epochs on 600 images: at most 5 seconds of one core (1.4 measured)."""
    outcomes, scores = noise(np.random.default_rng(8), 12, 10, 300, quality=1.0)
    start = time.process_time()
    found = optimism(outcomes, scores, range(12))
    assert time.process_time() - start < 5
    assert found.considered == found.candidates == 120
    assert found.replicates == 500
    assert optimism(outcomes, scores, range(12), num_replicates=60) == optimism(
        outcomes, scores, range(12), num_replicates=60
    )


def test_very_many_images_are_drawn_over_the_best_candidates_only(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes, scores = noise(np.random.default_rng(9), 12, 10, 100)
    monkeypatch.setattr("medtl_dist.sweep.optimism.MAX_CELLS", 400_000)
    found = optimism(outcomes, scores, range(12))
    assert found.candidates == 120
    assert 8 <= found.considered < 20
    assert found.replicates == 200
    best = max(one.best.val_auc for one in outcomes if one.best is not None and one.best.val_auc is not None)
    assert found.best_auc == pytest.approx(best, abs=1e-6)


# ---- which knob mattered


def test_the_knob_that_decides_is_found_and_the_others_are_not_beyond_chance() -> None:
    rng = np.random.default_rng(0)
    rows = [{"optim.lr": 10 ** rng.uniform(-4, -1), "augmentation": str(rng.choice(["a", "b", "c"])), "fixed": 1,
             "train.seed": int(rng.integers(0, 99))} for _ in range(30)]  # fmt: skip
    aucs = [0.9 - 0.05 * (np.log10(row["optim.lr"]) + 2.5) ** 2 + 0.003 * rng.normal() for row in rows]
    found = importance(rows, aucs)
    assert found.knobs[0].knob == "optim.lr"
    assert {one.knob for one in found.knobs} == {"optim.lr", "augmentation", "train.seed"}
    assert found.chance is not None
    assert found.knobs[0].value > 2 * found.chance
    assert all(one.value < found.chance for one in found.knobs[1:])
    assert all(one.low <= one.value <= one.high for one in found.knobs)
    assert importance(rows, aucs) == found


def test_a_choice_of_names_can_decide_too() -> None:
    rng = np.random.default_rng(1)
    rows = [
        {"schedule.name": ["step", "cosine"][n % 2], "model.frozen_depth": [0, "all", 3][n % 3], "x": rng.random()}
        for n in range(24)
    ]
    found = importance(rows, [0.8 + 0.1 * (row["schedule.name"] == "cosine") + 0.005 * rng.normal() for row in rows])
    assert found.knobs[0].knob == "schedule.name"


def test_under_noise_no_knob_is_beyond_chance_most_of_the_time() -> None:
    rng = np.random.default_rng(2)
    beyond = 0
    for seed in range(4):
        rows = [{"a": rng.random(), "b": int(rng.integers(0, 3)), "c": rng.random()} for _ in range(12)]
        found = importance(rows, list(rng.random(12)), seed=seed)
        assert found.chance is not None
        beyond += found.knobs[0].value > found.chance
    assert beyond <= 1


@pytest.mark.parametrize(
    ("rows", "aucs", "says"),
    [
        (
            [{"a": n} for n in range(7)],
            [0.5 + n / 100 for n in range(7)],
            "too few trials: 7 ranked, expected 8 or more",
        ),
        ([{"a": 1}] * 9, [0.5 + n / 100 for n in range(9)], "no knob took more than one value"),
        ([{"a": n} for n in range(9)], [0.5] * 9, "all trials reached the same AUC"),
        ([], [], "too few trials"),
    ],
)
def test_when_no_knob_can_be_told_to_matter(rows: list[dict], aucs: list[float], says: str) -> None:
    found = importance(rows, aucs)
    assert found.knobs == ()
    assert found.reason is not None
    assert says in found.reason
