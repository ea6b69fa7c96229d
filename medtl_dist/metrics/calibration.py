"""probabilities and labels → calibration: reliability bins, expected calibration error, Brier score.

Sources: Brier, Monthly Weather Review 78 (1950) 1-3; Guo, Pleiss, Sun & Weinberger, ICML (2017), for the error and
for the confidence of the predicted class with several classes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from medtl_dist.metrics.proportions import proportion

NUM_BINS = 10


def reliability(
    hits: ArrayLike, probabilities: ArrayLike, groups: ArrayLike | None = None, num_bins: int = NUM_BINS
) -> list[dict]:
    """Bins of equal width over [0, 1], empty ones left out, lowest first.

    Args:
        hits: bool [n], whether the event came (binary: the image is positive; several classes: the top class is right).
        probabilities: float [n] in [0, 1], the event's probability.
        groups: [n] patient of each row, or None.

    Returns:
        ``[{"score_mean", "observed", "n", "ci"}]``: mean probability, share of events, rows, interval of the share.
        A probability on an inner edge belongs to the lower bin.
    """
    events = np.asarray(hits, dtype=bool)
    scores = np.asarray(probabilities, dtype=np.float64)
    bin_of = np.searchsorted(np.linspace(0, 1, num_bins + 1)[1:-1], scores)
    bins = []
    for index in range(num_bins):
        rows = bin_of == index
        if not rows.any():
            continue
        share = proportion(events[rows], None if groups is None else np.asarray(groups)[rows])
        bins.append(
            {
                "score_mean": float(scores[rows].mean()),
                "observed": share["value"],
                "n": int(rows.sum()),
                "ci": share["ci"],
            }
        )
    return bins


def expected_calibration_error(bins: list[dict]) -> float | None:
    """``sum over bins of n/N |observed - score_mean|`` of ``reliability``'s bins; None without any."""
    total = sum(row["n"] for row in bins)
    if total == 0:
        return None
    return float(sum(row["n"] * abs(row["observed"] - row["score_mean"]) for row in bins) / total)


def brier_score(labels: ArrayLike, probabilities: ArrayLike) -> float | None:
    """Mean squared error of probabilities; None without rows.

    Args:
        labels: int [n] in 0 … K-1.
        probabilities: float [n, K]. K = 2: the error of column 1 alone, in [0, 1]. K > 2: Brier's sum over classes,
            in [0, 2].
    """
    classes = np.asarray(labels, dtype=np.int64)
    scores = np.asarray(probabilities, dtype=np.float64)
    if len(classes) == 0:
        return None
    if scores.shape[1] == 2:
        return float(np.mean((scores[:, 1] - classes) ** 2))
    return float(np.mean(np.sum((scores - np.eye(scores.shape[1])[classes]) ** 2, axis=1)))
