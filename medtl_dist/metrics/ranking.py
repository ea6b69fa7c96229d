"""labels and scores → AUC, average precision, ROC and PR curves: exact, ties included, O(n log n)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray


class Cumulative(NamedTuple):
    """Counts at each distinct score, from the highest down (``score >= threshold`` is called positive).

    thresholds: float64 [T], falling; tp, fp: int64 [T], positives and negatives at or above each threshold.
    """

    thresholds: NDArray[np.float64]
    tp: NDArray[np.int64]
    fp: NDArray[np.int64]


class Curve(NamedTuple):
    """Points of a curve: x, y, thresholds, float64 [T] each. The point that no threshold makes has threshold inf."""

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    thresholds: NDArray[np.float64]


def cumulative_counts(labels: ArrayLike, scores: ArrayLike) -> Cumulative:
    """True and false positives at every distinct score.

    Args:
        labels: bool or {0, 1} [n].
        scores: float [n], finite; higher means more positive.

    Raises:
        ValueError: shapes differ, labels other than 0 and 1, or a score that is not finite.
    """
    positive, values = checked(labels, scores)
    order = np.argsort(-values, kind="stable")
    values = values[order]
    tp = np.cumsum(positive[order], dtype=np.int64)
    last_of_tie = np.flatnonzero(np.append(values[1:] != values[:-1], True)) if len(values) else np.empty(0, np.int64)
    tp = tp[last_of_tie]
    return Cumulative(values[last_of_tie], tp, last_of_tie + 1 - tp)


def checked(labels: ArrayLike, scores: ArrayLike) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Labels as bool [n] and scores as float64 [n]. Raises ValueError as ``cumulative_counts`` says."""
    given, values = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    if given.ndim != 1 or given.shape != values.shape:
        raise ValueError(f"labels {given.shape} and scores {values.shape} must be two vectors of one length")
    positive = given.astype(bool)
    if given.dtype != np.bool_ and not np.array_equal(given, positive):
        raise ValueError("labels must be 0 or 1")
    if not np.isfinite(values).all():
        raise ValueError("scores must be finite")
    return positive, values


def roc_auc(labels: ArrayLike, scores: ArrayLike) -> float | None:
    """Area under the ROC curve: the share of (positive, negative) pairs ranked rightly, a tie counting one half.

    The pairs are counted in whole numbers (Mann-Whitney U), so the order of the rows cannot change the result.
    Returns None when a class is absent. Arguments and errors: ``cumulative_counts``.
    """
    counts = cumulative_counts(labels, scores)
    num_positive, num_negative = _totals(counts)
    if num_positive == 0 or num_negative == 0:
        return None
    twice = int(np.sum(np.diff(counts.fp, prepend=0) * (counts.tp + np.append(0, counts.tp[:-1]))))
    return twice / (2 * num_positive * num_negative)


def average_precision(labels: ArrayLike, scores: ArrayLike) -> float | None:
    """Average precision ``sum over thresholds of (R_t - R_{t-1}) P_t`` (no interpolation, ties as one threshold).

    Its value by chance is the prevalence. Returns None without a positive. Arguments and errors: ``cumulative_counts``.
    """
    counts = cumulative_counts(labels, scores)
    num_positive, _ = _totals(counts)
    if num_positive == 0:
        return None
    gained = np.diff(counts.tp, prepend=0)
    return float(np.sum(gained * (counts.tp / (counts.tp + counts.fp)))) / num_positive


def roc_curve(labels: ArrayLike, scores: ArrayLike, max_points: int | None = None) -> Curve | None:
    """ROC curve: x = false positive rate, y = true positive rate, from (0, 0) to (1, 1).

    With ``max_points`` the curve is thinned to at most that many of its own points, evenly along the curve.
    Returns None when a class is absent. Arguments and errors: ``cumulative_counts``.
    """
    counts = cumulative_counts(labels, scores)
    num_positive, num_negative = _totals(counts)
    if num_positive == 0 or num_negative == 0:
        return None
    x = np.append(0.0, counts.fp / num_negative)
    y = np.append(0.0, counts.tp / num_positive)
    keep = _thin(x + y, max_points)
    return Curve(x[keep], y[keep], np.append(np.inf, counts.thresholds)[keep])


def pr_curve(labels: ArrayLike, scores: ArrayLike, max_points: int | None = None) -> Curve | None:
    """Precision-recall curve: x = recall (rising), y = precision; begins at (0, 1), where nothing is called positive.

    Thinned as ``roc_curve``. Returns None without a positive. Arguments and errors: ``cumulative_counts``.
    """
    counts = cumulative_counts(labels, scores)
    num_positive, _ = _totals(counts)
    if num_positive == 0:
        return None
    # Past full recall only the precision falls: those points say nothing about the classifier.
    end = int(np.searchsorted(counts.tp, num_positive)) + 1
    tp, fp = counts.tp[:end], counts.fp[:end]
    x = np.append(0.0, tp / num_positive)
    y = np.append(1.0, tp / (tp + fp))
    keep = _thin(x, max_points)
    return Curve(x[keep], y[keep], np.append(np.inf, counts.thresholds[:end])[keep])


def _totals(counts: Cumulative) -> tuple[int, int]:
    if len(counts.tp) == 0:
        return 0, 0
    return int(counts.tp[-1]), int(counts.fp[-1])


def _thin(along: NDArray[np.float64], max_points: int | None) -> NDArray[np.int64]:
    """Positions of at most ``max_points`` points, evenly spread over the non-falling ``along``, both ends kept.

    The end stays because both curves stop at the first point where ``along`` is largest.
    """
    if max_points is None or len(along) <= max_points:
        return np.arange(len(along))
    wanted = np.linspace(along[0], along[-1], max_points)
    return np.unique(np.searchsorted(along, wanted))
