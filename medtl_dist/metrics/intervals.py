"""labels, scores and patients → intervals of an AUC: DeLong, patient-clustered DeLong, paired comparison.

Sources: DeLong, DeLong & Clarke-Pearson, Biometrics 44 (1988) 837-845; Obuchowski, Biometrics 53 (1997) 567-578;
mid-rank computation as in Sun & Xu, IEEE Signal Processing Letters 21 (2014) 1389-1393. Rules and measured coverage:
docs/intervals.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medtl_dist.metrics.ranking import checked
from medtl_dist.metrics.scores import count_groups, group_codes

CLUSTERED = "patient-clustered DeLong (Obuchowski), logit scale"
INDEPENDENT = "DeLong, logit scale, assumes independent images"
ONE_EACH = "DeLong, logit scale, assumes independent images (every patient has one)"
ONE_SIDED = "one-sided bound for AUC = {auc}: {alpha:g}^(1/m), m = {pairs} disjoint {unit} pairs"
NO_SPREAD = 1e-20  # a variance below this is rounding: 10^9 images still have 1e-10
MIN_PATIENTS = 10  # of either class, below which an interval is called unreliable


class Components(NamedTuple):
    """DeLong's structural components of one AUC, summed by patient.

    positive, negative: float64 [G], each patient's share of ``AUC - E[AUC]`` through its positive and its negative
    images: ``sum_j (V10(x_ij) - auc) / M`` and ``sum_j (V01(y_ij) - auc) / N`` with M positive, N negative images.
    has_positive, has_negative: bool [G].
    """

    auc: float
    positive: NDArray[np.float64]
    negative: NDArray[np.float64]
    has_positive: NDArray[np.bool_]
    has_negative: NDArray[np.bool_]


@dataclass(frozen=True)
class AucInterval:
    """An AUC with its interval. ``auc`` is None when undefined; ``interval`` is None when it cannot be computed.

    ``reason`` says why either is None, ``warning`` why the interval should not be trusted, ``method`` how it was made.
    ``variance`` is that of the AUC (not of its logit).
    """

    auc: float | None
    interval: tuple[float, float] | None
    variance: float | None
    method: str
    reason: str | None = None
    warning: str | None = None


def components(labels: ArrayLike, scores: ArrayLike, groups: ArrayLike | None = None) -> Components | None:
    """Structural components by patient, O(n log n) by mid-ranks. None when a class is absent.

    Args:
        labels: bool or {0, 1} [n].
        scores: float [n], finite.
        groups: [n] patient of each row (any sortable type); None: every row is its own patient.
    """
    positive, values = checked(labels, scores)
    num_positive = int(positive.sum())
    num_negative = len(positive) - num_positive
    if num_positive == 0 or num_negative == 0:
        return None
    _, tie = np.unique(values, return_inverse=True)
    tie = tie.reshape(-1)
    positives_at = np.bincount(tie[positive], minlength=tie.max() + 1)
    negatives_at = np.bincount(tie[~positive], minlength=tie.max() + 1)
    negatives_below = np.cumsum(negatives_at) - negatives_at
    positives_above = num_positive - np.cumsum(positives_at)
    v10 = (negatives_below + 0.5 * negatives_at)[tie[positive]] / num_negative
    v01 = (positives_above + 0.5 * positives_at)[tie[~positive]] / num_positive
    # From whole counts, so that the value is the same as roc_auc's to the last bit.
    twice = int(np.sum(positives_at * (2 * negatives_below + negatives_at)))
    auc = twice / (2 * num_positive * num_negative)
    codes = np.arange(len(values)) if groups is None else group_codes(groups)[1]
    size = int(codes.max()) + 1
    return Components(
        auc=auc,
        positive=np.bincount(codes[positive], weights=v10 - auc, minlength=size) / num_positive,
        negative=np.bincount(codes[~positive], weights=v01 - auc, minlength=size) / num_negative,
        has_positive=np.bincount(codes[positive], minlength=size) > 0,
        has_negative=np.bincount(codes[~positive], minlength=size) > 0,
    )


def clustered_variance(parts: Components) -> float | None:
    """Obuchowski's variance of an AUC.

    ``I10/(I10-1) sum a_i^2 + I01/(I01-1) sum b_i^2 + 2 I/(I-1) sum a_i b_i`` with a, b the patient's components and
    I10, I01, I the patients with a positive image, with a negative image, and all. With one image a patient it is
    DeLong's variance. None with fewer than two patients in a class.
    """
    return _quadratic(parts.positive, parts.negative, parts.has_positive, parts.has_negative)


def _quadratic(
    a: NDArray[np.float64], b: NDArray[np.float64], has_a: NDArray[np.bool_], has_b: NDArray[np.bool_]
) -> float | None:
    num_a, num_b, num_all = int(has_a.sum()), int(has_b.sum()), len(a)
    if num_a < 2 or num_b < 2:
        return None
    squares = num_a / (num_a - 1) * float(a @ a) + num_b / (num_b - 1) * float(b @ b)
    # Never negative: the cross term's factor is the smallest of the three. max() only mops up rounding.
    return max(0.0, squares + 2 * num_all / (num_all - 1) * float(a @ b))


def auc_interval(
    labels: ArrayLike, scores: ArrayLike, groups: ArrayLike | None = None, *, level: float = 0.95, unit: str = "image"
) -> AucInterval:
    """AUC with the interval ``expit(logit(auc) ± z se / (auc (1 - auc)))``, clustered by patient.

    Args:
        labels, scores, groups: as ``components``; groups None means that nothing is known about patients.
        level: two-sided confidence level.
        unit: what a row is, "image" or "patient": only for the wording.

    AUC = 1 (or 0) has no two-sided interval, see ``one_sided_interval``.
    """
    parts = components(labels, scores, groups)
    if parts is None:
        num_positive = int(np.sum(np.asarray(labels) == 1))
        num_negative = np.size(labels) - num_positive
        absent = "positive" if num_positive == 0 else "negative"
        reason = f"undefined: no {absent} {unit}s ({num_positive} positive, {num_negative} negative)"
        return AucInterval(None, None, None, method_name(groups, unit), reason=reason)
    counted = unit if groups is None else "patient"
    warning = small_sample_warning(parts, counted)
    interval = mean_interval([parts], level=level, method=method_name(groups, unit), counted=counted)
    return AucInterval(**{**vars(interval), "warning": warning})


def method_name(groups: ArrayLike | None, unit: str = "image") -> str:
    """How the interval of rows of this kind is made, for ``ci_method``."""
    if unit == "patient":
        return "DeLong over patients, logit scale"
    if groups is None:
        return INDEPENDENT
    return ONE_EACH if count_groups(groups) == np.size(groups) else CLUSTERED


def small_sample_warning(parts: Components, unit: str = "patient", name: str = "") -> str | None:
    """ "unreliable: …" when fewer than 10 patients of a class carry the interval, else None."""
    few = [
        f"{int(has.sum())} {sign} {unit}{'' if has.sum() == 1 else 's'}"
        for sign, has in (("positive", parts.has_positive), ("negative", parts.has_negative))
        if has.sum() < MIN_PATIENTS
    ]
    if not few:
        return None
    return f"unreliable: {' and '.join(few)}{f' for class {name}' if name else ''} (fewer than {MIN_PATIENTS})"


def mean_interval(
    several: Sequence[Components], *, level: float = 0.95, method: str = CLUSTERED, counted: str = "patient"
) -> AucInterval:
    """Interval of the unweighted mean of AUCs of the same rows (one AUC, or the macro one-vs-rest of K classes).

    With one AUC the variance is Obuchowski's. With more, a patient's share of the mean is the mean of its shares, each
    first scaled by its class's root of I/(I-1), and the variance is the sum of squares over patients.
    ``method`` and ``counted`` (what is independent: "patient", or "image" when patients are unknown) are wording only.
    """
    auc = float(np.mean([parts.auc for parts in several]))
    if auc in (0.0, 1.0):
        return one_sided_interval(auc, min(disjoint_pairs(parts) for parts in several), level=level, counted=counted)
    variance = variance_of_mean(several)
    if variance is None:
        reason = "no interval: fewer than two patients in a class"
        return AucInterval(auc, None, None, method, reason=reason)
    if variance < NO_SPREAD:
        return AucInterval(auc, None, 0.0, method, reason="no interval: the scores do not vary")
    return AucInterval(auc, logit_interval(auc, variance, level), variance, method)


def variance_of_mean(several: Sequence[Components]) -> float | None:
    """Variance of the mean of several AUCs (or differences of AUCs) of the same patients, as ``mean_interval`` says."""
    return clustered_variance(several[0]) if len(several) == 1 else _mean_variance(several)


def _mean_variance(several: Sequence[Components]) -> float | None:
    share = np.zeros_like(several[0].positive)
    for parts in several:
        num_positive, num_negative = int(parts.has_positive.sum()), int(parts.has_negative.sum())
        if num_positive < 2 or num_negative < 2:
            return None
        share += math.sqrt(num_positive / (num_positive - 1)) * parts.positive
        share += math.sqrt(num_negative / (num_negative - 1)) * parts.negative
    share /= len(several)
    return float(share @ share)


def logit_interval(value: float, variance: float, level: float = 0.95) -> tuple[float, float]:
    """Normal interval on the logit scale (delta method), back in (0, 1). ``value`` strictly between 0 and 1."""
    centre = math.log(value / (1 - value))
    half = NormalDist().inv_cdf(0.5 + level / 2) * math.sqrt(variance) / (value * (1 - value))
    return _expit(centre - half), _expit(centre + half)


def _expit(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def disjoint_pairs(parts: Components) -> int:
    """How many (positive patient, negative patient) pairs can be formed with each patient used once."""
    return min(int(parts.has_positive.sum()), int(parts.has_negative.sum()), len(parts.positive) // 2)


def one_sided_interval(auc: float, pairs: int, *, level: float = 0.95, counted: str = "patient") -> AucInterval:
    """One-sided bound for an AUC of exactly 1 (lower) or 0 (upper), whose estimated variance is 0.

    Pair the patients off into m disjoint (positive, negative) pairs; they are independent, each ordered rightly with
    probability AUC. All m being right is seen with probability AUC^m, so every AUC below ``alpha^(1/m)``,
    alpha = 1 - level, is refuted at that level (for 95 % about 1 - 3/m). Conservative; it needs no model.
    """
    alpha = 1 - level
    bound = alpha ** (1 / pairs) if pairs > 0 else 0.0
    interval = (bound, 1.0) if auc == 1.0 else (0.0, 1 - bound)
    method = ONE_SIDED.format(auc=int(auc), alpha=round(alpha, 6), pairs=pairs, unit=counted)
    return AucInterval(auc, interval, 0.0, method)


@dataclass(frozen=True)
class Comparison:
    """Two models on the same rows: ``difference`` = auc_b - auc_a, its interval, z and two-sided p value."""

    auc_a: float | None
    auc_b: float | None
    difference: float | None
    interval: tuple[float, float] | None
    variance: float | None
    z: float | None
    p_value: float | None
    method: str
    reason: str | None = None
    warning: str | None = None


def compare_auc(
    labels: ArrayLike,
    scores_a: ArrayLike,
    scores_b: ArrayLike,
    groups: ArrayLike | None = None,
    *,
    level: float = 0.95,
    unit: str = "image",
) -> Comparison:
    """Paired comparison of two AUCs on the same images, clustered by patient (Obuchowski's covariance).

    The interval is normal on the scale of the difference. Rows of the arrays must belong together: join by key first.

    Args:
        labels: bool or {0, 1} [n]; scores_a, scores_b: float [n]; groups: [n] or None, as ``components``.
    """
    method = method_name(groups, unit).replace(", logit scale", "") + ", paired difference"
    first, second = components(labels, scores_a, groups), components(labels, scores_b, groups)
    if first is None or second is None:
        reason = auc_interval(labels, scores_a, groups, unit=unit).reason
        return Comparison(None, None, None, None, None, None, None, method, reason=reason)
    warning = small_sample_warning(first, unit if groups is None else "patient")
    difference = second.auc - first.auc
    # The estimator is a quadratic form, so the difference of the components gives var_a + var_b - 2 cov.
    variance = _quadratic(
        second.positive - first.positive, second.negative - first.negative, first.has_positive, first.has_negative
    )
    if variance is None or variance < NO_SPREAD:
        reason = (
            "no interval: fewer than two patients in a class"
            if variance is None
            else "no interval: the two models do not differ by chance in any patient"
        )
        return Comparison(first.auc, second.auc, difference, None, variance, None, None, method, reason, warning)
    error = math.sqrt(variance)
    half = NormalDist().inv_cdf(0.5 + level / 2) * error
    z = difference / error
    return Comparison(
        first.auc,
        second.auc,
        difference,
        (max(-1.0, difference - half), min(1.0, difference + half)),
        variance,
        z,
        math.erfc(abs(z) / math.sqrt(2)),
        method,
        warning=warning,
    )
