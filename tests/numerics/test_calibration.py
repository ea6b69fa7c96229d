"""Reliability bins, calibration error, Brier score and proportions against scikit-learn, scipy and plain loops."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.calibration import calibration_curve
from sklearn.metrics import balanced_accuracy_score, brier_score_loss

from medtl_dist.metrics.calibration import brier_score, expected_calibration_error, reliability
from medtl_dist.metrics.proportions import balanced_accuracy, effective_number, proportion, wilson_interval


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(2, 200), st.booleans())
def test_bins_error_and_brier_score_equal_their_references(seed: int, size: int, rounded: bool) -> None:
    rng = np.random.default_rng(seed)
    probabilities = rng.random(size)
    if rounded:
        probabilities = np.round(probabilities, 1)  # on the edges of the bins, 0 and 1 included
    labels = (rng.random(size) < probabilities**2).astype(int)
    labels[:2] = 0, 1
    bins = reliability(labels, probabilities)
    observed, predicted = calibration_curve(labels, probabilities, n_bins=10, strategy="uniform")
    assert [row["observed"] for row in bins] == pytest.approx(observed.tolist())
    assert [row["score_mean"] for row in bins] == pytest.approx(predicted.tolist())
    assert sum(row["n"] for row in bins) == size

    edges, error = np.linspace(0, 1, 11), 0.0
    for low, high in pairwise(edges):
        rows = [i for i in range(size) if low < probabilities[i] <= high or (low == 0 and probabilities[i] == 0)]
        if rows:
            gap = sum(labels[i] for i in rows) / len(rows) - sum(probabilities[i] for i in rows) / len(rows)
            error += len(rows) / size * abs(gap)
    assert expected_calibration_error(bins) == pytest.approx(error)
    both = np.stack([1 - probabilities, probabilities], axis=1)
    assert brier_score(labels, both) == pytest.approx(brier_score_loss(labels, probabilities))


def test_brier_score_of_several_classes_is_the_sum_over_classes() -> None:
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet([1, 1, 1], 50)
    labels = rng.integers(0, 3, 50)
    wanted = np.mean(
        [sum((p[k] - (k == y)) ** 2 for k in range(3)) for p, y in zip(probabilities, labels, strict=True)]
    )
    assert brier_score(labels, probabilities) == pytest.approx(wanted)
    assert brier_score([], np.empty((0, 3))) is None
    assert expected_calibration_error([]) is None


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 500), st.data())
def test_wilson_interval_is_scipys(num: int, data: st.DataObject) -> None:
    hits = data.draw(st.integers(0, num))
    wanted = binomtest(hits, num).proportion_ci(0.95, method="wilson")
    assert wilson_interval(hits / num, num) == pytest.approx((wanted.low, wanted.high), abs=1e-12)
    assert proportion(np.arange(num) < hits)["ci"] == pytest.approx([wanted.low, wanted.high], abs=1e-12)


def test_the_design_effect_is_rao_and_scotts() -> None:
    rng = np.random.default_rng(3)
    groups = np.repeat(np.arange(25), rng.integers(1, 6, 25))
    hits = rng.random(len(groups)) < rng.beta(1, 1, 25)[groups]
    p, n, num_patients = hits.mean(), len(hits), 25
    residuals = [sum(hits[groups == g]) - p * sum(groups == g) for g in range(num_patients)]
    variance = num_patients / (num_patients - 1) * sum(r**2 for r in residuals) / n**2
    design_effect = variance / (p * (1 - p) / n)
    assert design_effect > 1.3
    assert effective_number(hits, groups) == pytest.approx(n / design_effect)
    found = proportion(hits, groups)
    assert found["ci"] == pytest.approx(wilson_interval(p, n / design_effect))
    assert found["method"] == "Wilson with the patients' design effect (Rao & Scott)"


def test_the_effective_number_lies_between_patients_worth_and_images() -> None:
    groups = np.repeat(np.arange(10), 4)
    assert effective_number(np.ones(40, bool), groups) == 10  # nothing to estimate from: a patient is one trial
    assert effective_number(np.tile([0, 1, 0, 1], 10), groups) == 40  # less spread than chance gains nothing
    whole_patients = np.repeat(np.arange(10) % 2, 4)  # a patient's images always agree
    assert effective_number(whole_patients, groups) == pytest.approx(9)
    assert effective_number(np.tile([0, 1], 20), np.arange(40)) == 40  # one image each: plain Wilson
    assert effective_number(np.tile([0, 1], 20), np.zeros(40)) == 1


def test_a_proportion_says_how_its_interval_was_made() -> None:
    hits = np.tile([True, False, True], 5)
    assert proportion(hits)["method"] == "Wilson, assumes independent images"
    assert proportion(hits, np.arange(15))["method"] == "Wilson over patients"
    assert proportion(hits, np.arange(15))["ci"] == proportion(hits)["ci"]
    assert proportion([]) == {"value": None, "ci": None, "method": "Wilson, assumes independent images"}


def test_balanced_accuracy_is_scikit_learns_with_the_jackknifes_error() -> None:
    rng = np.random.default_rng(7)
    groups = np.repeat(np.arange(90), 3)
    labels = (np.arange(90) % 3)[groups]
    wrong = rng.random(270) < rng.beta(1, 3, 90)[groups]
    predicted = np.where(wrong, (labels + 1) % 3, labels)
    found = balanced_accuracy(labels, predicted, 3, groups)
    assert found["value"] == pytest.approx(balanced_accuracy_score(labels, predicted))
    left_out = np.array([balanced_accuracy_score(labels[groups != g], predicted[groups != g]) for g in range(90)])
    error = np.sqrt(89 / 90 * np.sum((left_out - left_out.mean()) ** 2))
    # The logit interval is nearly symmetric here; its half width is 1.96 errors to a few percent.
    assert (found["ci"][1] - found["ci"][0]) / 2 == pytest.approx(1.96 * error, rel=0.05)


def test_balanced_accuracy_without_a_variance_has_no_interval() -> None:
    labels = np.array([0, 0, 1, 1])
    assert balanced_accuracy(labels, labels, 2)["ci"] is None
    assert balanced_accuracy(labels, np.array([0, 1, 1, 0]), 2, ["a", "a", "b", "c"])["ci"] is None
    assert balanced_accuracy(np.array([1, 1]), np.array([1, 0]), 2)["value"] == 0.5
    assert balanced_accuracy(np.empty(0, np.int64), np.empty(0, np.int64), 2)["value"] is None
