"""hits and patients → proportions (sensitivity, accuracy, …) with intervals that know about patients.

Sources: Wilson, Journal of the American Statistical Association 22 (1927) 209-212; design effect and effective number
of clustered proportions: Rao & Scott, Biometrics 48 (1992) 577-585.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medtl_dist.metrics.intervals import NO_SPREAD, logit_interval
from medtl_dist.metrics.scores import count_groups, group_codes

CLUSTERED = "Wilson with the patients' design effect (Rao & Scott)"
ONE_EACH = "Wilson over patients"
INDEPENDENT = "Wilson, assumes independent images"
LINEARISED = "normal on the logit scale, clustered by patient"
LINEARISED_INDEPENDENT = "normal on the logit scale, assumes independent images"


def wilson_interval(proportion: float, num: float, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion seen in ``num`` (possibly effective, > 0) independent trials."""
    z = NormalDist().inv_cdf(0.5 + level / 2)
    centre = proportion + z * z / (2 * num)
    half = z * math.sqrt(proportion * (1 - proportion) / num + z * z / (4 * num * num))
    scale = 1 + z * z / num
    low = 0.0 if proportion == 0.0 else max(0.0, (centre - half) / scale)
    high = 1.0 if proportion == 1.0 else min(1.0, (centre + half) / scale)
    return low, high


def effective_number(hits: ArrayLike, groups: ArrayLike) -> float:
    """Number of independent trials that n clustered ones are worth: n / design effect, within [1, n].

    Design effect = variance of the ratio ``sum x_i / sum n_i`` over patients, ``I/(I-1) sum (x_i - p n_i)^2 / n^2``,
    over the binomial ``p (1-p) / n``; below 1 it is taken as 1, and with one trial a patient it is 1. Where it cannot
    be estimated (p = 0 or 1, or a single patient) every patient counts as one trial.

    Args:
        hits: bool [n]; groups: [n] patient of each.
    """
    values = np.asarray(hits, dtype=np.float64)
    names, codes = group_codes(groups)
    num, num_groups = len(values), len(names)
    p = float(values.mean())
    if num_groups in (1, num) or p in (0.0, 1.0):
        return float(num_groups)
    residual = np.bincount(codes, weights=values - p, minlength=num_groups)
    variance = num_groups / (num_groups - 1) * float(residual @ residual) / num**2
    design_effect = max(1.0, variance / (p * (1 - p) / num))
    return max(1.0, num / design_effect)


def proportion(hits: ArrayLike, groups: ArrayLike | None = None, level: float = 0.95) -> dict:
    """``{"value", "ci": [low, high], "method"}`` of the share of hits; value and ci None when there is no trial.

    Args:
        hits: bool [n]; groups: [n] patient of each trial, None when nothing is known about patients.
    """
    values = np.asarray(hits, dtype=bool)
    num = len(values)
    if groups is None:
        method = INDEPENDENT
    else:
        method = ONE_EACH if count_groups(groups) == num else CLUSTERED
    if num == 0:
        return {"value": None, "ci": None, "method": method}
    share = float(values.mean())
    worth = float(num) if groups is None else effective_number(values, groups)
    return {"value": share, "ci": list(wilson_interval(share, worth, level)), "method": method}


def balanced_accuracy(
    labels: NDArray[np.int64],
    predicted: NDArray[np.int64],
    num_classes: int,
    groups: ArrayLike | None = None,
    level: float = 0.95,
) -> dict:
    """Mean recall over the classes that occur, given as by ``proportion``; the interval is normal on the logit scale.

    A patient's share is the mean over classes of its deviations from the class's recall, each scaled by the root of
    I_k/(I_k-1), I_k patients with class k. ``ci`` is None where the variance cannot be estimated (perfect, or one
    patient in a class).
    """
    method = LINEARISED_INDEPENDENT if groups is None else LINEARISED
    present = [k for k in range(num_classes) if np.any(labels == k)]
    if not present:
        return {"value": None, "ci": None, "method": method}
    codes = np.arange(len(labels)) if groups is None else group_codes(groups)[1]
    size = int(codes.max()) + 1
    share = np.zeros(size)
    recalls = []
    for k in present:
        rows = labels == k
        hits = (predicted[rows] == k).astype(np.float64)
        recalls.append(float(hits.mean()))
        num_patients = count_groups(codes[rows])
        if num_patients < 2:
            share[:] = np.nan
            continue
        scale = math.sqrt(num_patients / (num_patients - 1)) / (len(hits) * len(present))
        share += scale * np.bincount(codes[rows], weights=hits - recalls[-1], minlength=size)
    value = float(np.mean(recalls))
    variance = float(share @ share)
    if not variance > NO_SPREAD or value in (0.0, 1.0):
        return {"value": value, "ci": None, "method": method}
    return {"value": value, "ci": list(logit_interval(value, variance, level)), "method": method}
