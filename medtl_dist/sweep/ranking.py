"""outcomes and val scores → the order of the trials, the winner, and which trials can't be told apart from the best.

The plain best has the highest exact val AUC, ties by the lower val loss, then the smaller number. The winner is by the
one-standard-error rule (Breiman, Friedman, Olshen & Stone, Classification and Regression Trees, 1984, section 3.4.3; Hastie,
Tibshirani & Friedman, The Elements of Statistical Learning, 2009, section 7.10): of the trials within one standard error of
the best, the simplest. Their standard error is that of the best's own score. Here it is that of the *difference* from the
best, paired by image and clustered by patient (Obuchowski 1997), as Vehtari, Gelman & Gabry (Statistics and Computing 27,
2017, section 5.2) compare models on one data set: all trials are scored on the same patients, so how hard those are is common
to both and says nothing of which trial is better. It is the smaller of the two, so the rule gives away less AUC.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from medtl_dist.metrics.intervals import (
    NO_SPREAD,
    AucInterval,
    Components,
    mean_interval,
    method_name,
    small_sample_warning,
    variance_of_mean,
)
from medtl_dist.sweep.outcome import Outcome
from medtl_dist.sweep.scores import Scores, Val

LEVEL = 0.95
ALPHA = 0.05  # of the paired tests against the best, unadjusted: fewer trials are marked than if it were adjusted


@dataclass(frozen=True)
class Gap:
    """How far a trial is behind the best: ``difference`` = best - trial, on the same images.

    ``error`` is its standard error over patients, None where it can't be known; ``p_value`` is two-sided.
    """

    difference: float
    error: float | None
    p_value: float | None

    @property
    def within_one_error(self) -> bool:
        return self.difference <= (self.error or 0.0)

    @property
    def can_be_told(self) -> bool:
        return self.difference > 0 and self.p_value is not None and self.p_value < ALPHA


@dataclass(frozen=True)
class Ranking:
    """Trials by number.

    Attributes:
        order: the ranked ones, best first.
        best: the plain best; chosen: the winner by the one-standard-error rule. None where nothing is ranked.
        indistinguishable: ranked trials, the best aside, that the paired test can't tell apart from it, or that have no
            scores to be told apart by.
        unranked: (number, why) of the others, by number.
        intervals: of each ranked trial's AUC at its best epoch, where its scores were kept.
        gaps: behind the best, likewise.
    """

    order: tuple[int, ...]
    best: int | None
    chosen: int | None
    indistinguishable: frozenset[int]
    unranked: tuple[tuple[int, str], ...]
    intervals: dict[int, AucInterval] = field(default_factory=dict)
    gaps: dict[int, Gap] = field(default_factory=dict)


def rank(outcomes: Sequence[Outcome], scores: Scores | None) -> Ranking:
    """Order the trials and choose. ``scores`` None: no intervals, and only equal AUCs count as within one error.

    Finished and stopped trials with a defined AUC are ranked, each by its best epoch.
    """
    unranked = tuple((one.number, reason) for one in _by_number(outcomes) if (reason := why_unranked(one)) is not None)
    left_out = {number for number, _ in unranked}
    ranked = sorted((one for one in outcomes if one.number not in left_out), key=_key)
    if not ranked:
        return Ranking((), None, None, frozenset(), unranked)
    best = ranked[0]
    intervals = {one.number: found for one in ranked if (found := _interval(one, scores)) is not None}
    gaps = {one.number: _gap(best, one, scores) for one in ranked[1:]}
    near = [one for one in ranked if one is best or gaps[one.number].within_one_error]
    return Ranking(
        order=tuple(one.number for one in ranked),
        best=best.number,
        chosen=min(near, key=simplicity).number,
        indistinguishable=frozenset(number for number, gap in gaps.items() if not gap.can_be_told),
        unranked=unranked,
        intervals=intervals,
        gaps=gaps,
    )


def why_unranked(outcome: Outcome) -> str | None:
    """Why a trial has no rank, or None where it has one."""
    if outcome.state == "failed":
        return outcome.reason or "failed"
    if outcome.state in ("waiting", "running"):
        return outcome.reason or f"not ended: {outcome.state}"
    if outcome.best is None:
        return outcome.reason or ("no epoch ended" if not outcome.curve else "its AUC is undefined")
    return None


def simplicity(outcome: Outcome) -> tuple[float, int, float, float, int]:
    """Sorts the simpler first: the larger share of frozen stages, then fewer epochs to its best, then the better."""
    epochs = outcome.best.epoch + 1 if outcome.best is not None else 0
    return (-outcome.frozen_depth / max(outcome.num_stages, 1), epochs, *_key(outcome))


def _key(outcome: Outcome) -> tuple[float, float, int]:
    best = outcome.best
    assert best is not None
    assert best.val_auc is not None
    return -best.val_auc, best.val_loss if math.isfinite(best.val_loss) else math.inf, outcome.number


def _by_number(outcomes: Sequence[Outcome]) -> list[Outcome]:
    return sorted(outcomes, key=lambda one: one.number)


def _interval(outcome: Outcome, scores: Scores | None) -> AucInterval | None:
    logits = None if scores is None else scores.at_best(outcome)
    if scores is None or logits is None:
        return None
    return interval_of(scores.val, logits)


def interval_of(val: Val, logits: NDArray) -> AucInterval | None:
    """The AUC of some logits with its interval, clustered by patient; None where it is undefined."""
    parts = val.components(logits)
    if not parts:
        return None
    counted = "image" if val.groups is None else "patient"
    found = mean_interval(parts, level=LEVEL, method=method_name(val.groups), counted=counted)
    few = [small_sample_warning(one, counted) for one in parts]
    return AucInterval(**{**vars(found), "warning": next((text for text in few if text), None)})


def _gap(best: Outcome, other: Outcome, scores: Scores | None) -> Gap:
    assert best.best is not None
    assert other.best is not None
    difference = (best.best.val_auc or 0.0) - (other.best.val_auc or 0.0)
    pair = (None, None) if scores is None else (scores.at_best(best), scores.at_best(other))
    if scores is None or pair[0] is None or pair[1] is None:
        return Gap(difference, None, None)
    variance = variance_of_difference(scores.val, pair[0], pair[1])
    if variance is None or variance < NO_SPREAD:
        return Gap(difference, None if variance is None else 0.0, None)
    error = math.sqrt(variance)
    return Gap(difference, error, math.erfc(abs(difference) / error / math.sqrt(2)))


def variance_of_difference(val: Val, one: NDArray, other: NDArray) -> float | None:
    """Variance over patients of the difference of two AUCs (means over classes) of the same images.

    An AUC's components are linear in it, so those of the difference are the differences (``metrics.intervals``).
    """
    several = [
        Components(
            auc=b.auc - a.auc,
            positive=np.subtract(b.positive, a.positive),
            negative=np.subtract(b.negative, a.negative),
            has_positive=a.has_positive,
            has_negative=a.has_negative,
        )
        for a, b in zip(val.components(one), val.components(other), strict=True)
    ]
    return variance_of_mean(several) if several else None
