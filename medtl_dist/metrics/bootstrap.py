"""labels, scores and patients → bootstrap intervals of an AUC, patients drawn with replacement within their class.

Source: Efron & Tibshirani, An Introduction to the Bootstrap (1993), percentile interval; the patient is the unit that
is drawn, as in Rutter, Academic Radiology 7 (2000) 413-419.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medtl_dist.metrics.ranking import checked
from medtl_dist.metrics.scores import group_codes, label_range

CHUNK_CELLS = 2_000_000  # replicate x row cells worked on at once: about 100 MB whatever the size of the data
MAX_CELLS = 400_000_000  # above this much work the number of replicates falls, to MIN_REPLICATES at the least
MIN_REPLICATES = 200


class _Ranked(NamedTuple):
    """One scoring, sorted once, so that each replicate is a few passes over weights and no sort.

    Patient of each negative and of each positive, in the order of the scores; and for each positive the number of
    negatives below it and of those not above it.
    """

    negative_codes: NDArray[np.int64]
    positive_codes: NDArray[np.int64]
    below: NDArray[np.int64]
    not_above: NDArray[np.int64]


def _rank(positive: NDArray[np.bool_], scores: NDArray[np.float64], codes: NDArray[np.int64]) -> _Ranked:
    order = np.argsort(scores[~positive], kind="stable")
    negatives = scores[~positive][order]
    order_positive = np.argsort(scores[positive], kind="stable")  # so that a replicate walks its sums in order
    positives = scores[positive][order_positive]
    below = np.searchsorted(negatives, positives, side="left")
    not_above = np.searchsorted(negatives, positives, side="right")
    return _Ranked(codes[~positive][order], codes[positive][order_positive], below, not_above)


def _weighted_aucs(ranked: _Ranked, weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """AUC of each replicate; ``weights`` float64 [r, G] says how often each patient was drawn. NaN: a class absent."""
    negatives = np.zeros((len(weights), len(ranked.negative_codes) + 1))
    np.cumsum(weights.take(ranked.negative_codes, axis=1), axis=1, out=negatives[:, 1:])
    positives = weights.take(ranked.positive_codes, axis=1)
    # Sums of whole numbers below 2^53: exact, so the order of the rows cannot change a replicate.
    twice = np.einsum(
        "rp,rp->r", positives, negatives.take(ranked.below, axis=1) + negatives.take(ranked.not_above, axis=1)
    )
    pairs = 2 * positives.sum(axis=1) * negatives[:, -1]
    return np.divide(twice, pairs, out=np.full(len(weights), np.nan), where=pairs > 0)


def replicate_aucs(
    strata_labels: ArrayLike,
    scorings: Sequence[tuple[ArrayLike, ArrayLike]],
    groups: ArrayLike | None = None,
    *,
    num_replicates: int = 2000,
    seed: int = 0,
    known: Sequence[NDArray[np.bool_]] | None = None,
) -> NDArray[np.float64]:
    """AUCs of several scorings of the same rows over the same bootstrap draws of patients.

    Patients are drawn with replacement within their class: those of each single label, and those of mixed labels, so
    every replicate has as many of each as the data. Memory is bounded; the result depends on the seed and the data
    alone, not on the order of the rows.

    Args:
        strata_labels: int [n], the labels that say a patient's class.
        scorings: (labels {0, 1} [n], scores [n]) for each AUC wanted.
        groups: [n] patient of each row; None: every row is its own patient (then the order of the rows does matter).
        known: bool [n] for each scoring, the rows that it has; None: all of them.
        num_replicates: how many; fewer are made when rows x replicates x scorings passes ``MAX_CELLS``.

    Returns:
        float64 [num_replicates, len(scorings)]; NaN where a replicate lacks a class.
    """
    labels = np.asarray(strata_labels, dtype=np.int64)
    codes = np.arange(len(labels)) if groups is None else group_codes(groups)[1]
    size = int(codes.max()) + 1
    work = max(1, len(labels) * len(scorings))
    num_replicates = min(num_replicates, max(MIN_REPLICATES, MAX_CELLS // work))
    rows_of = known if known is not None else [np.ones(len(labels), bool)] * len(scorings)
    ranked_all = [
        _rank(*checked(np.asarray(one)[rows], np.asarray(values)[rows]), codes[rows])
        for (one, values), rows in zip(scorings, rows_of, strict=True)
    ]
    low, high = label_range(labels, codes, size)
    stratum = np.where(low == high, low, -1)
    chunk = max(1, CHUNK_CELLS // max(len(labels), size))
    result = np.empty((num_replicates, len(scorings)))
    done = 0
    for weights in _draws(stratum, num_replicates, chunk, seed):
        for column, ranked in enumerate(ranked_all):
            result[done : done + len(weights), column] = _weighted_aucs(ranked, weights)
        done += len(weights)
    return result


def in_and_out_of_bag(
    strata_labels: ArrayLike,
    scorings: Sequence[tuple[ArrayLike, ArrayLike]],
    groups: ArrayLike | None = None,
    *,
    num_replicates: int,
    seed: int = 0,
    known: Sequence[NDArray[np.bool_]] | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """AUCs of several scorings over each bootstrap draw of patients, and over the patients that it left out.

    Arguments as ``replicate_aucs``; exactly ``num_replicates`` are made. Returns two float64 [num_replicates,
    len(scorings)], NaN where a class is absent.
    """
    labels = np.asarray(strata_labels, dtype=np.int64)
    codes = np.arange(len(labels)) if groups is None else group_codes(groups)[1]
    size = int(codes.max()) + 1
    rows_of = known if known is not None else [np.ones(len(labels), bool)] * len(scorings)
    ranked_all = [
        _rank(*checked(np.asarray(one)[rows], np.asarray(values)[rows]), codes[rows])
        for (one, values), rows in zip(scorings, rows_of, strict=True)
    ]
    low, high = label_range(labels, codes, size)
    stratum = np.where(low == high, low, -1)
    inside, outside = (np.empty((num_replicates, len(scorings))) for _ in range(2))
    done = 0
    for weights in _draws(stratum, num_replicates, max(1, CHUNK_CELLS // max(len(labels), size)), seed):
        left_out = (weights == 0).astype(np.float64)
        for column, ranked in enumerate(ranked_all):
            inside[done : done + len(weights), column] = _weighted_aucs(ranked, weights)
            outside[done : done + len(weights), column] = _weighted_aucs(ranked, left_out)
        done += len(weights)
    return inside, outside


def _draws(stratum: NDArray[np.int64], num: int, chunk: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """Weights float64 [<= chunk, G] of the patients, in all ``num`` rows; a stratum has its own random stream."""
    members = [np.flatnonzero(stratum == value) for value in np.unique(stratum)]
    streams = [np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(len(members))]
    for start in range(0, num, chunk):
        rows = min(chunk, num - start)
        weights = np.zeros((rows, len(stratum)))
        for indices, stream in zip(members, streams, strict=True):
            picks = stream.integers(0, len(indices), size=(rows, len(indices)))
            picks += np.arange(rows)[:, None] * len(indices)
            counts = np.bincount(picks.reshape(-1), minlength=rows * len(indices))
            weights[:, indices] = counts.reshape(rows, len(indices))
        yield weights


def percentile_interval(replicates: ArrayLike, level: float = 0.95) -> tuple[float, float] | None:
    """Percentile interval of replicates, float [r]. None when they are all equal, or undefined in half of them."""
    values = np.asarray(replicates, dtype=np.float64)
    defined = values[~np.isnan(values)]
    if len(defined) < max(2, len(values) / 2) or np.ptp(defined) < 1e-12:
        return None
    low, high = np.quantile(defined, [0.5 - level / 2, 0.5 + level / 2])
    return float(low), float(high)


def bootstrap_auc(
    labels: ArrayLike,
    scores: ArrayLike,
    groups: ArrayLike | None = None,
    *,
    num_replicates: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float] | None:
    """Percentile interval of an AUC, patients drawn within their class. None: a class is absent, or no spread."""
    positive, _ = checked(labels, scores)
    if positive.all() or not positive.any():
        return None
    draws = replicate_aucs(positive, [(positive, scores)], groups, num_replicates=num_replicates, seed=seed)
    return percentile_interval(draws[:, 0], level)


def bootstrap_difference(
    labels: ArrayLike,
    scores_a: ArrayLike,
    scores_b: ArrayLike,
    groups: ArrayLike | None = None,
    *,
    num_replicates: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float] | None:
    """Percentile interval of auc_b - auc_a over common draws of patients. None as ``bootstrap_auc``."""
    positive, _ = checked(labels, scores_a)
    if positive.all() or not positive.any():
        return None
    scorings = [(positive, scores_a), (positive, scores_b)]
    draws = replicate_aucs(positive, scorings, groups, num_replicates=num_replicates, seed=seed)
    return percentile_interval(draws[:, 1] - draws[:, 0], level)
