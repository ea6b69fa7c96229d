"""out-of-fold scores → one AUC: pairs within folds only, with an interval that counts patients.

Each fold has a model of its own, whose scores have a level of their own: a pair of images from two folds compares two models.
Under no signal the AUC of scores pooled over folds is even below 0.5, since a fold that holds more of a class has a model that
saw less of it. So only pairs within a fold are counted: the AUC of a repeat is the concordant pairs within folds over all pairs
within folds, and over repeats the mean.

The interval: a patient's share of ``AUC - E[AUC]`` is that of DeLong's components, with each fold's comparisons in place of the
whole sample's, ``sum over the patient's positives x of N_f (V10_f(x) - AUC) / P`` with N_f negatives in the fold and P pairs in
all (and likewise for its negatives); shares are averaged over the repeats, and Obuchowski's variance is taken of them as in
``metrics.intervals``. In small folds it errs on the wide side (docs/intervals.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medtl_dist.metrics import intervals, ranking
from medtl_dist.metrics.intervals import AucInterval, Components

METHOD = "patient-clustered, of pairs within folds (DeLong's components by fold), logit scale"
METHOD_IMAGES = "of pairs within folds (DeLong's components by fold), logit scale, assumes independent images"


class FoldAuc(NamedTuple):
    """One fold of one repeat: its AUC (None without both classes), positive and negative rows."""

    fold: int
    auc: float | None
    num_positive: int
    num_negative: int

    @property
    def pairs(self) -> int:
        return self.num_positive * self.num_negative


@dataclass(frozen=True)
class Within:
    """One repeat: ``parts`` as ``intervals.Components`` over all patients, of the AUC of pairs within folds; None where no fold
    has both classes. ``bound_pairs``: how many disjoint pairs of patients there are within folds."""

    folds: list[FoldAuc]
    parts: Components | None
    bound_pairs: int

    @property
    def auc(self) -> float | None:
        return None if self.parts is None else self.parts.auc


def within_folds(labels: ArrayLike, scores: ArrayLike, codes: ArrayLike, folds: ArrayLike, num_patients: int) -> Within:
    """The AUC of one repeat with its components.

    Args:
        labels: bool or {0, 1} [n].
        scores: float [n], finite; higher means more positive.
        codes: int [n], the patient of each row, below ``num_patients``; a patient is in one fold.
        folds: int [n].
    """
    positive, values = ranking.checked(labels, scores)
    patient, fold = np.asarray(codes, np.int64), np.asarray(folds, np.int64)
    found: list[tuple[NDArray[np.bool_], Components]] = []
    listed: list[FoldAuc] = []
    for number in np.unique(fold).tolist():
        rows = fold == number
        parts = intervals.components(positive[rows], values[rows], patient[rows])
        num_positive = int(positive[rows].sum())
        listed.append(FoldAuc(number, parts and parts.auc, num_positive, int(rows.sum()) - num_positive))
        if parts is not None:
            found.append((rows, parts))
    if not found:
        return Within(listed, None, 0)
    pairs = sum(one.pairs for one in listed)
    # Twice the concordant pairs is a whole number, so the AUC does not depend on the order of the folds.
    auc = sum(round(2 * one.auc * one.pairs) for one in listed if one.auc is not None) / (2 * pairs)
    shares = np.zeros((2, num_patients))
    has = np.zeros((2, num_patients), bool)
    for rows, parts in found:
        here = np.unique(patient[rows])
        count = [np.bincount(patient[rows & sign], minlength=num_patients)[here] for sign in (positive, ~positive)]
        size = [int(one.sum()) for one in count]
        for side, own in enumerate((parts.positive, parts.negative)):
            # The fold's own components are centred at its AUC and are means over its rows.
            shares[side, here] = (size[0] * size[1] * own + size[1 - side] * (parts.auc - auc) * count[side]) / pairs
            has[side, here] = count[side] > 0
    bound_pairs = sum(intervals.disjoint_pairs(parts) for _, parts in found)
    return Within(listed, Components(auc, shares[0], shares[1], has[0], has[1]), bound_pairs)


def over_repeats(repeats: Sequence[Within]) -> Components | None:
    """The mean of the repeats' AUCs with the mean of the patients' shares; None where no repeat has one."""
    several = [one.parts for one in repeats if one.parts is not None]
    if not several:
        return None
    return Components(
        auc=float(np.mean([parts.auc for parts in several])),
        positive=np.mean([parts.positive for parts in several], axis=0),
        negative=np.mean([parts.negative for parts in several], axis=0),
        has_positive=np.any([parts.has_positive for parts in several], axis=0),
        has_negative=np.any([parts.has_negative for parts in several], axis=0),
    )


def within_interval(
    classes: Sequence[Sequence[Within]], *, level: float = 0.95, counted: str = "patient", names: Sequence[str] = ()
) -> AucInterval:
    """The AUC over the repeats, for several classes the unweighted mean of theirs, with its interval.

    Args:
        classes: for each class its repeats.
        counted: "patient", or "image" where patients are unknown.
        names: of the classes, for the warning.
    """
    method = METHOD if counted == "patient" else METHOD_IMAGES
    defined = [(number, parts) for number, one in enumerate(classes) if (parts := over_repeats(one)) is not None]
    if not defined:
        return AucInterval(None, None, None, method, reason=f"undefined: no fold has {counted}s of both classes")
    several = [parts for _, parts in defined]
    few = [
        intervals.small_sample_warning(parts, counted, names[number] if len(classes) > 1 else "")
        for number, parts in defined
    ]
    auc = float(np.mean([parts.auc for parts in several]))
    if auc in (0.0, 1.0):
        pairs = min(one.bound_pairs for number, _ in defined for one in classes[number] if one.parts is not None)
        found = intervals.one_sided_interval(auc, pairs, level=level, counted=counted)
    else:
        if len(several) == 1:
            several = [_contributing(several[0])]
        found = intervals.mean_interval(several, level=level, method=method, counted=counted)
    warning = "; ".join(dict.fromkeys(text for text in few if text is not None)) or None
    return AucInterval(**{**vars(found), "warning": warning})


def _contributing(parts: Components) -> Components:
    """Without the patients that are in no pair: those of folds of one class."""
    seen = parts.has_positive | parts.has_negative
    return Components(
        parts.auc, parts.positive[seen], parts.negative[seen], parts.has_positive[seen], parts.has_negative[seen]
    )


class MeanCurve(NamedTuple):
    """A ROC curve as x (rising) and y, float64 [T] each."""

    x: NDArray[np.float64]
    y: NDArray[np.float64]


def mean_roc(curves: Sequence[tuple[ArrayLike, ArrayLike, float]]) -> MeanCurve:
    """The weighted mean of ROC curves at each false-positive rate; its area is the weighted mean of theirs, exactly.

    With a repeat's curves weighted by their pairs that is the AUC of pairs within folds.

    Args:
        curves: for each curve its false-positive rates (rising from 0 to 1), true-positive rates and weight.
    """
    knots = np.unique(np.concatenate([np.asarray(x, float) for x, _, _ in curves]))
    total = sum(weight for _, _, weight in curves)
    low, high = np.zeros(len(knots)), np.zeros(len(knots))
    for x, y, weight in curves:
        fpr, tpr = np.asarray(x, float), np.asarray(y, float)
        # A step up at a knot has two values there: the curve arrives at one and leaves from the other.
        first, last = np.searchsorted(fpr, knots, side="left"), np.searchsorted(fpr, knots, side="right") - 1
        between = np.interp(knots, fpr, tpr)
        there = fpr[last] == knots
        low += weight / total * np.where(there, tpr[np.minimum(first, len(tpr) - 1)], between)
        high += weight / total * np.where(there, tpr[last], between)
    points = np.stack([np.repeat(knots, 2), np.stack([low, high], axis=1).ravel()])
    kept = np.append(True, (np.diff(points) != 0).any(axis=0))
    return MeanCurve(points[0, kept], points[1, kept])
