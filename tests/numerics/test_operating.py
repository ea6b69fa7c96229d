"""Threshold rules against a search over every threshold; confusion and rates against scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix, f1_score, precision_score, recall_score

from medtl_dist.errors import UserError
from medtl_dist.metrics.operating import choose_threshold, confusion, rates


@st.composite
def val_scores(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size = draw(st.integers(2, 60))
    labels = rng.integers(0, 2, size)
    labels[:2] = 0, 1
    return labels, np.round(rng.normal(size=size) + labels, draw(st.integers(0, 3)))


def at(labels: np.ndarray, logits: np.ndarray, threshold: float) -> tuple[float, float]:
    called = logits >= threshold
    return float(called[labels == 1].mean()), float((~called[labels == 0]).mean())


@settings(deadline=None, max_examples=80)
@given(val_scores())
def test_youden_finds_the_best_of_all_thresholds(case: tuple[np.ndarray, np.ndarray]) -> None:
    labels, logits = case
    found = choose_threshold(labels, logits)
    reached = [at(labels, logits, value) for value in sorted(set(logits.tolist()))]
    best = max(sensitivity + specificity for sensitivity, specificity in reached)
    sensitivity, specificity = at(labels, logits, found["logit"])
    assert sensitivity + specificity == pytest.approx(best)
    equals = [s for s, c in reached if s + c > best - 1e-9]
    assert sensitivity == max(equals)
    assert found["rule"] == "youden"
    assert "name the sensitivity" in found["caution"]


@settings(deadline=None, max_examples=80)
@given(val_scores(), st.sampled_from([0.5, 0.8, 0.9, 0.95, 1.0]))
def test_a_named_sensitivity_is_reached_at_the_best_specificity(
    case: tuple[np.ndarray, np.ndarray], wanted: float
) -> None:
    labels, logits = case
    found = choose_threshold(labels, np.stack([-logits, logits], axis=1), sensitivity=wanted)
    sensitivity, specificity = at(labels, logits, found["logit"])
    assert sensitivity >= wanted - 1e-9
    reached = [at(labels, logits, value) for value in set(logits.tolist())]
    assert specificity == max(c for s, c in reached if s >= wanted - 1e-9)
    assert found["rule"] == f"sensitivity >= {wanted:g}"
    assert found["fixed_on"] == "val"
    assert found["value"] == pytest.approx(1 / (1 + math.exp(-found["logit"])))


@pytest.mark.parametrize(("wanted", "num_positive"), [(0.95, 20), (0.56, 25)])  # 0.56 * 25 > 14 in floating point
def test_a_sensitivity_that_is_met_exactly_is_met(wanted: float, num_positive: int) -> None:
    labels = np.repeat([1, 0], [num_positive, 20])
    logits = np.concatenate([np.arange(float(num_positive)), np.full(20, -1.0)])
    assert at(labels, logits, choose_threshold(labels, logits, sensitivity=wanted)["logit"])[0] == wanted


def test_the_threshold_lies_between_scores_so_that_a_last_bit_does_not_decide() -> None:
    labels, logits = np.array([0, 0, 1, 1]), np.array([-2.0, -1.0, 1.0, 2.0])
    assert choose_threshold(labels, logits)["logit"] == 0.0
    lowest = choose_threshold(labels, -logits, sensitivity=1.0)  # the lowest score is the threshold: nothing below it
    assert lowest["logit"] == -2.0


def test_few_cases_and_absent_classes_are_said() -> None:
    labels = np.repeat([1, 0], [3, 40])
    logits = np.random.default_rng(0).normal(size=43)
    assert choose_threshold(labels, logits, sensitivity=0.9)["caution"] == "fixed on only 3 positive cases of val"
    assert choose_threshold(labels, logits)["caution"].endswith("; fixed on only 3 positive cases of val")
    assert choose_threshold(np.repeat([1, 0], 20), np.arange(40.0), sensitivity=0.9)["caution"] is None
    empty = choose_threshold(np.zeros(5), np.arange(5.0), sensitivity=0.9)
    assert (empty["value"], empty["logit"], empty["rule"]) == (0.5, 0.0, "probability 0.5")
    assert "val has no positive case" in empty["caution"]


@pytest.mark.parametrize("value", [0, -0.1, 1.5, math.nan])
def test_an_impossible_sensitivity_is_the_users_mistake(value: float) -> None:
    with pytest.raises(UserError, match="expected above 0 and at most 1"):
        choose_threshold([0, 1], [0.0, 1.0], sensitivity=value)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(2, 4), st.integers(1, 80))
def test_confusion_and_rates_are_scikit_learns(seed: int, num_classes: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    labels, predicted = rng.integers(0, num_classes, size), rng.integers(0, num_classes, size)
    assert (
        confusion(labels, predicted, num_classes)
        == confusion_matrix(labels, predicted, labels=range(num_classes)).tolist()
    )
    for k in range(num_classes):
        truth, called = labels == k, predicted == k
        found = rates(truth, called)
        wanted = {
            "sensitivity": (recall_score, truth, called, truth),
            "specificity": (recall_score, ~truth, ~called, ~truth),
            "ppv": (precision_score, truth, called, called),
            "npv": (precision_score, ~truth, ~called, ~called),
        }
        for name, (score, y, y_called, trials) in wanted.items():
            assert found[name]["value"] == (pytest.approx(score(y, y_called)) if trials.any() else None)
        assert found["f1"] == (pytest.approx(f1_score(truth, called)) if (truth | called).any() else None)
