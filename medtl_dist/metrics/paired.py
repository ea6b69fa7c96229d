"""labels and two models' scores, from several seeds → one comparison: paired by image, clustered by patient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtr, stdtrit

from medtl_dist.metrics.intervals import (
    NO_SPREAD,
    Components,
    _mean_variance,
    clustered_variance,
    components,
    method_name,
    small_sample_warning,
)


@dataclass(frozen=True)
class PairedAucs:
    """Two recipes on the same images: their mean AUCs over seeds, and ``difference`` = b - a with its interval.

    ``variance_patients`` is that of the mean difference over other patients with these trained models,
    ``variance_seeds`` over other seeds on these patients (None: one seed tells nothing of it); the interval has both.
    ``reason`` says why a number is None, ``warning`` why the interval should not be trusted.
    """

    auc_a: float | None
    auc_b: float | None
    difference: float | None
    interval: tuple[float, float] | None
    p_value: float | None
    variance_patients: float | None
    variance_seeds: float | None
    num_seeds: int
    method: str
    reason: str | None = None
    warning: str | None = None


def compare_over_seeds(
    labels: ArrayLike,
    logits_a: Sequence[ArrayLike],
    logits_b: Sequence[ArrayLike],
    groups: ArrayLike | None = None,
    *,
    binary: bool,
    level: float = 0.95,
    unit: str = "image",
) -> PairedAucs:
    """Compare two recipes, each trained with the same seeds, on the same images.

    A model's AUC is that of its class 1 where ``binary``, else the unweighted one-vs-rest mean over the classes that have
    images and don't have all. An AUC's components (`intervals.components`) are linear in it, so those of the mean
    difference over seeds are the mean of the seeds' differences, and Obuchowski's estimator of them is its variance over
    patients. To it comes ``s² / S``, s² the sample variance of the S seeds' differences (law of total variance). With one
    seed and two classes this is `intervals.compare_auc`.

    Args:
        labels: int [n].
        logits_a, logits_b: per seed float [n, classes], the same seeds in the same order. Join by key first.
        groups: [n] patients, or None where nothing is known of them.

    Raises:
        ValueError: no seeds, or not equally many.
    """
    if not logits_a or len(logits_a) != len(logits_b):
        raise ValueError(f"{len(logits_a)} and {len(logits_b)} seeds: expected equally many, one or more")
    y = np.asarray(labels)
    a, b = (np.stack([np.asarray(one, np.float64) for one in several]) for several in (logits_a, logits_b))
    columns = [1] if binary else list(range(a.shape[2]))
    columns = [k for k in columns if 0 < int((y == k).sum()) < len(y)]
    seeds = a.shape[0]
    method = method_name(groups, unit).replace(", logit scale", "") + ", paired difference"
    if seeds > 1:
        method += f", mean over {seeds} seeds, plus the variance between seeds"
    if not columns:
        reason = f"undefined: all {unit}s are of one class"
        return PairedAucs(None, None, None, None, None, None, None, seeds, method, reason=reason)
    pairs = [[_pair(y == k, a[s, :, k], b[s, :, k], groups) for s in range(seeds)] for k in columns]
    auc_a, auc_b = (float(np.mean([[pair[i].auc for pair in per_seed] for per_seed in pairs])) for i in (0, 1))
    by_class = [_mean_difference(per_seed) for per_seed in pairs]
    difference = float(np.mean([one.auc for one in by_class]))
    patients = clustered_variance(by_class[0]) if len(by_class) == 1 else _mean_variance(by_class)
    per_seed = np.mean([[second.auc - first.auc for first, second in one] for one in pairs], axis=0)
    between = float(np.var(per_seed, ddof=1)) / seeds if seeds > 1 else None
    warnings = [small_sample_warning(one, unit if groups is None else "patient") for one in by_class]
    known = PairedAucs(auc_a, auc_b, difference, None, None, patients, between, seeds, method)
    return _with_interval(known, level, next((text for text in warnings if text), None))


def _pair(
    positive: NDArray[np.bool_], a: NDArray[np.float64], b: NDArray[np.float64], groups: ArrayLike | None
) -> tuple[Components, Components]:
    first, second = components(positive, a, groups), components(positive, b, groups)
    assert first is not None
    assert second is not None
    return first, second


def _mean_difference(pairs: Sequence[tuple[Components, Components]]) -> Components:
    """Components of the mean over seeds of ``auc_b - auc_a``; which patients have which class is the same in all."""
    return Components(
        auc=float(np.mean([second.auc - first.auc for first, second in pairs])),
        positive=np.mean([second.positive - first.positive for first, second in pairs], axis=0),
        negative=np.mean([second.negative - first.negative for first, second in pairs], axis=0),
        has_positive=pairs[0][0].has_positive,
        has_negative=pairs[0][0].has_negative,
    )


def _with_interval(known: PairedAucs, level: float, warning: str | None) -> PairedAucs:
    known = replace(known, warning=warning)
    if known.variance_patients is None:
        return replace(known, reason="no interval: fewer than two patients in a class")
    variance = known.variance_patients + (known.variance_seeds or 0.0)
    if variance < NO_SPREAD:
        return replace(known, reason="no interval: the two do not differ by chance in any patient or seed")
    assert known.difference is not None
    error = math.sqrt(variance)
    # Few seeds know their variance badly: Student's t with Satterthwaite's degrees of freedom, the patients' part as known.
    seeds = known.variance_seeds or 0.0
    freedom = (known.num_seeds - 1) * (variance / seeds) ** 2 if seeds > 0 else math.inf
    half = float(stdtrit(freedom, 0.5 + level / 2)) * error
    interval = (max(-1.0, known.difference - half), min(1.0, known.difference + half))
    p_value = 2 * float(stdtr(freedom, -abs(known.difference) / error))
    return replace(known, interval=interval, p_value=p_value)
