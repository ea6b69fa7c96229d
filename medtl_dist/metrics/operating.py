"""val scores → an operating threshold; scores and threshold → confusion, sensitivity, specificity and the like."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medtl_dist.errors import UserError
from medtl_dist.metrics.proportions import proportion
from medtl_dist.metrics.ranking import Cumulative, cumulative_counts
from medtl_dist.metrics.scores import probability

YOUDEN_CAUTION = (
    "chosen on val for the largest sum of sensitivity and specificity, which weighs a missed case like a false alarm; "
    "name the sensitivity that the use needs"
)
MIN_CASES = 10


def choose_threshold(labels: ArrayLike, logits: ArrayLike, *, sensitivity: float | None = None) -> dict:
    """Threshold of a binary classifier, fixed on val; a row is called positive when its log-odds reach ``logit``.

    With ``sensitivity``: the highest threshold that reaches it on val (so the highest specificity). Without: Youden's
    J = sensitivity + specificity - 1, of equals the one with the higher sensitivity. The threshold lies half-way
    between two neighbouring scores, so that the last bits of a score never decide. Choose it from the unit that it
    will be used on: for patients pass the labels and log-odds of ``scores.by_patient``.

    Args:
        labels: {0, 1} [n].
        logits: float [n] log-odds of the positive class, or [n, 2] (column 1 is used).
        sensitivity: in (0, 1], or None for Youden.

    Returns:
        ``{"value": probability, "logit", "rule", "fixed_on": "val", "caution": str | None}``. Without a class to learn
        from, the rule falls back to probability 0.5 and the caution says so.

    Raises:
        UserError: sensitivity outside (0, 1].
    """
    if sensitivity is not None and not 0 < sensitivity <= 1:
        raise UserError(
            f"sensitivity of the threshold = {sensitivity}; expected above 0 and at most 1, for example 0.95"
        )
    positive, scores = np.asarray(labels) == 1, np.asarray(logits, dtype=np.float64)
    scores = scores[:, 1] if scores.ndim == 2 else scores
    num_positive, num_negative = int(positive.sum()), int((~positive).sum())
    if num_positive == 0 or num_negative == 0:
        absent = "positive" if num_positive == 0 else "negative"
        return _threshold(
            0.0, "probability 0.5", f"val has no {absent} case: no threshold can be chosen on it, 0.5 is used"
        )
    counts = cumulative_counts(positive, scores)
    if sensitivity is None:
        # In whole numbers, so that equals are equal; the last of equals has the higher sensitivity.
        youden = counts.tp * num_negative - counts.fp * num_positive
        best = len(youden) - 1 - int(np.argmax(youden[::-1]))
        return _threshold(_between(counts, best), "youden", _few_cases(num_positive, num_negative, YOUDEN_CAUTION))
    # The margin keeps 0.56 of 25 cases at 14 of them: in floating point 0.56 * 25 is a little more than 14.
    best = int(np.argmax(counts.tp >= sensitivity * num_positive - 1e-9))
    return _threshold(_between(counts, best), f"sensitivity >= {sensitivity:g}", _few_cases(num_positive, num_negative))


def _few_cases(num_positive: int, num_negative: int, caution: str | None = None) -> str | None:
    fewest, sign = min((num_positive, "positive"), (num_negative, "negative"))
    if fewest >= MIN_CASES:
        return caution
    few = f"fixed on only {fewest} {sign} case{'' if fewest == 1 else 's'} of val"
    return few if caution is None else f"{caution}; {few}"


def _between(counts: Cumulative, index: int) -> float:
    """Half-way from the threshold at ``index`` to the next lower score; the lowest stays as it is."""
    upper = float(counts.thresholds[index])
    if index + 1 == len(counts.thresholds):
        return upper
    middle = upper / 2 + float(counts.thresholds[index + 1]) / 2
    return middle if middle > counts.thresholds[index + 1] else upper


def _threshold(logit: float, rule: str, caution: str | None) -> dict:
    return {"value": float(probability(logit)), "logit": logit, "rule": rule, "fixed_on": "val", "caution": caution}


def confusion(labels: ArrayLike, predicted: ArrayLike, num_classes: int) -> list[list[int]]:
    """Counts [K][K], rows the true class, columns the predicted one; binary: ``[[tn, fp], [fn, tp]]``."""
    cells = np.asarray(labels, dtype=np.int64) * num_classes + np.asarray(predicted, dtype=np.int64)
    counts = np.bincount(cells, minlength=num_classes * num_classes)
    return counts.reshape(num_classes, num_classes).tolist()


def rates(is_class: NDArray[np.bool_], called: NDArray[np.bool_], groups: ArrayLike | None = None) -> dict:
    """Sensitivity, specificity, ppv, npv (as ``proportion`` gives them) and f1 (float or None) of a class and the rest.

    Args:
        is_class, called: bool [n], truth and prediction; groups: [n] patient of each row, or None.
    """
    patients = None if groups is None else np.asarray(groups)

    def share(hits: NDArray[np.bool_], among: NDArray[np.bool_]) -> dict:
        return proportion(hits[among], None if patients is None else patients[among])

    right, found = int(np.sum(is_class & called)), int(is_class.sum() + called.sum())
    return {
        "sensitivity": share(called, is_class),
        "specificity": share(~called, ~is_class),
        "ppv": share(is_class, called),
        "npv": share(~is_class, ~called),
        "f1": 2 * right / found if found else None,
    }
