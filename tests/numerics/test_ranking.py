"""AUC, average precision and curves against scikit-learn, ties included."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from sklearn.metrics import roc_curve as sklearn_roc_curve

from medtl_dist.metrics.ranking import average_precision, cumulative_counts, pr_curve, roc_auc, roc_curve


@st.composite
def labelled_scores(draw: st.DrawFn, both_classes: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Labels and scores with many ties (few different values) or none."""
    size = draw(st.integers(2, 60))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scores = (
        rng.integers(0, draw(st.integers(1, 8)), size).astype(float) if draw(st.booleans()) else rng.normal(size=size)
    )
    labels = rng.integers(0, 2, size)
    if both_classes:
        labels[0], labels[1] = 0, 1
    return labels, scores


@settings(deadline=None, max_examples=80)
@given(labelled_scores())
def test_auc_and_average_precision_equal_scikit_learns(case: tuple[np.ndarray, np.ndarray]) -> None:
    labels, scores = case
    # Same quantity by another order of additions: equal up to rounding.
    assert roc_auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert average_precision(labels, scores) == pytest.approx(average_precision_score(labels, scores), abs=1e-12)


@settings(deadline=None, max_examples=50)
@given(labelled_scores())
def test_curves_equal_scikit_learns_point_for_point(case: tuple[np.ndarray, np.ndarray]) -> None:
    labels, scores = case
    roc, pr = roc_curve(labels, scores), pr_curve(labels, scores)
    assert roc is not None
    assert pr is not None
    fpr, tpr, thresholds = sklearn_roc_curve(labels, scores, drop_intermediate=False)
    np.testing.assert_allclose(roc.x, fpr, atol=1e-12)
    np.testing.assert_allclose(roc.y, tpr, atol=1e-12)
    np.testing.assert_array_equal(roc.thresholds, thresholds)
    precision, recall, _ = precision_recall_curve(labels, scores)
    # scikit-learn's runs the other way and goes on past full recall; ours stops where recall is first 1.
    precision, recall = precision[::-1], recall[::-1]
    end = int(np.argmax(recall >= 1.0)) + 1
    np.testing.assert_allclose(pr.x, recall[:end], atol=1e-12)
    np.testing.assert_allclose(pr.y, precision[:end], atol=1e-12)


@settings(deadline=None, max_examples=50)
@given(labelled_scores(), st.randoms(use_true_random=False))
def test_the_order_of_the_rows_changes_no_bit(case: tuple[np.ndarray, np.ndarray], random) -> None:
    labels, scores = case
    order = np.array(random.sample(range(len(labels)), len(labels)))
    assert roc_auc(labels[order], scores[order]) == roc_auc(labels, scores)
    assert average_precision(labels[order], scores[order]) == average_precision(labels, scores)


def test_auc_is_the_share_of_pairs_by_count() -> None:
    labels = [1, 1, 0, 0, 0]
    scores = [2.0, 1.0, 1.0, 0.0, 3.0]
    # Pairs: 2>1, 2>0, 2<3, 1=1 (half), 1>0, 1<3: 3.5 of 6.
    assert roc_auc(labels, scores) == 3.5 / 6
    assert roc_auc(labels, [5.0] * 5) == 0.5
    assert roc_auc([0, 0, 1], [1.0, 2.0, 3.0]) == 1.0
    assert roc_auc([1, 1, 0], [1.0, 2.0, 3.0]) == 0.0


def test_large_and_imbalanced_counts_do_not_overflow() -> None:
    rng = np.random.default_rng(5)
    labels = rng.random(400_000) < 0.5
    scores = np.round(rng.normal(size=len(labels)) + labels, 3)
    assert roc_auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    counts = cumulative_counts(labels, scores)
    assert counts.tp.dtype == counts.fp.dtype == np.int64


@pytest.mark.parametrize("labels", [[0, 0], [1, 1], []])
def test_one_class_is_none_never_nan(labels: list[int]) -> None:
    scores = np.linspace(0, 1, len(labels))
    assert roc_auc(labels, scores) is None
    assert roc_curve(labels, scores) is None
    has_positive = 1 in labels
    assert (average_precision(labels, scores) is not None) == has_positive
    assert (pr_curve(labels, scores) is not None) == has_positive


@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([0, 1], [1.0], "one length"),
        ([[0, 1]], [[1.0, 2.0]], "one length"),
        ([0, 2], [1.0, 2.0], "0 or 1"),
        ([0.2, 1.0], [1.0, 0.0], "0 or 1"),  # scores given in place of labels
        ([0, 1], [1.0, np.nan], "finite"),
    ],
)
def test_what_is_not_labels_and_scores_is_refused(labels: list, scores: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        roc_auc(labels, scores)


def test_a_thinned_curve_keeps_its_ends_and_lies_on_the_curve() -> None:
    rng = np.random.default_rng(3)
    labels = rng.random(20_000) < 0.02
    scores = rng.normal(size=len(labels)) + 2 * labels
    for whole, thin in [
        (roc_curve(labels, scores), roc_curve(labels, scores, 500)),
        (pr_curve(labels, scores), pr_curve(labels, scores, 500)),
    ]:
        assert whole is not None
        assert thin is not None
        assert 250 < len(thin.x) <= 500 < len(whole.x)
        assert (thin.x[0], thin.y[0], thin.x[-1], thin.y[-1]) == (whole.x[0], whole.y[0], whole.x[-1], whole.y[-1])
        points = set(zip(whole.x, whole.y, strict=True))
        assert all(point in points for point in zip(thin.x, thin.y, strict=True))
    roc = roc_curve(labels, scores, 500)
    assert roc is not None
    # The area that a reader sees under the thinned curve is the AUC to the width of a line.
    assert np.trapezoid(roc.y, roc.x) == pytest.approx(roc_auc(labels, scores), abs=2e-3)
