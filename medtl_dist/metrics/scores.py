"""model outputs → log-odds → probabilities, and images → patients: the scores that every metric ranks."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medtl_dist.errors import UserError

AGGREGATES = ("mean", "max")


def log_odds(outputs: ArrayLike) -> NDArray[np.float64]:
    """Per-class log-odds of softmax outputs: ``log(p_k / (1 - p_k)) = z_k - logsumexp over j != k of z_j``.

    Ranking by log-odds is ranking by probability without its saturation: two images at p = 1 - 1e-20 still differ.

    Args:
        outputs: float [n, K], K >= 2, the network's last layer (any float precision; computed in float64).

    Returns:
        float64 [n, K]. For K = 2 column 1 is ``z_1 - z_0`` and column 0 exactly its negative.
    """
    z = np.asarray(outputs, dtype=np.float64)
    if z.ndim != 2 or z.shape[1] < 2:
        raise ValueError(f"outputs has shape {z.shape}; expected [n, K] with K >= 2")
    rest = np.empty_like(z)
    for k in range(z.shape[1]):
        # Leaving k out before the sum, rather than subtracting it after, keeps the digits when p_k is nearly 1.
        others = np.delete(z, k, axis=1)
        top = others.max(axis=1)
        rest[:, k] = top + np.log(np.exp(others - top[:, None]).sum(axis=1))
    return z - rest


def probability(logits: ArrayLike) -> NDArray[np.float64]:
    """Probability of log-odds, ``1 / (1 + exp(-logit))``, without overflow. Any shape, float64 in [0, 1]."""
    return np.exp(-np.logaddexp(0.0, -np.asarray(logits, dtype=np.float64)))


class Patients(NamedTuple):
    """One row per patient: ``labels`` int64 [G], ``logits`` float64 [G, K], ``groups`` [G] (sorted names)."""

    labels: NDArray[np.int64]
    logits: NDArray[np.float64]
    groups: NDArray


def group_codes(groups: ArrayLike) -> tuple[NDArray, NDArray[np.int64]]:
    """Sorted group names [G] and each row's position among them, int64 [n]."""
    values = np.asarray(groups).reshape(-1)
    if _are_codes(values):
        present = np.bincount(values) > 0
        return np.flatnonzero(present), (np.cumsum(present) - 1)[values]
    names, codes = np.unique(values, return_inverse=True)
    return names, codes.reshape(-1).astype(np.int64)


def count_groups(groups: ArrayLike) -> int:
    """How many different groups [n] names."""
    values = np.asarray(groups).reshape(-1)
    return int(np.count_nonzero(np.bincount(values))) if _are_codes(values) else len(np.unique(values))


def _are_codes(values: NDArray) -> bool:
    """Whether these are small whole numbers, which are counted ten times faster than sorted."""
    if not np.issubdtype(values.dtype, np.integer) or len(values) == 0:
        return False
    return bool(values.min() >= 0 and values.max() <= 10 * len(values) + 1000)


def mixed_groups(labels: ArrayLike, groups: ArrayLike) -> NDArray:
    """Names of the groups whose images carry more than one label, sorted."""
    names, codes = group_codes(groups)
    low, high = label_range(np.asarray(labels, dtype=np.int64), codes, len(names))
    return names[low != high]


def label_range(
    labels: NDArray[np.int64], codes: NDArray[np.int64], num_groups: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Smallest and largest label of each group, int64 [G] each; they differ where a group's labels are mixed."""
    low = np.full(num_groups, np.iinfo(np.int64).max)
    high = np.full(num_groups, np.iinfo(np.int64).min)
    np.minimum.at(low, codes, labels)
    np.maximum.at(high, codes, labels)
    return low, high


def by_patient(labels: ArrayLike, logits: ArrayLike, groups: ArrayLike, *, aggregate: str = "mean") -> Patients:
    """One label and one row of log-odds for each patient.

    ``mean`` averages the images' log-odds (so the patient's odds are the geometric mean of the images' odds);
    ``max`` takes the most suspicious image. With two classes (K = 2) a patient is positive if any image is, and column
    0 stays the negative of column 1. With more classes each class is aggregated on its own, and a patient whose images
    carry several classes has no single label and is left out (``mixed_groups`` lists them).

    Args:
        labels: int [n] in 0 … K-1.
        logits: float [n, K] per-class log-odds.
        groups: [n] patient of each image.
        aggregate: "mean" or "max".

    Raises:
        UserError: another aggregate.
    """
    if aggregate not in AGGREGATES:
        raise UserError(f"unknown aggregate {aggregate!r} for patient scores; valid: {', '.join(AGGREGATES)}")
    labels = np.asarray(labels, dtype=np.int64)
    logits = np.asarray(logits, dtype=np.float64)
    names, codes = group_codes(groups)
    low, high = label_range(labels, codes, len(names))
    if logits.shape[1] == 2:
        positive = _aggregate(logits[:, 1], codes, len(names), aggregate)
        return Patients(high, np.stack([-positive, positive], axis=1), names)
    columns = [_aggregate(column, codes, len(names), aggregate) for column in logits.T]
    single = low == high
    return Patients(low[single], np.stack(columns, axis=1)[single], names[single])


def _aggregate(
    values: NDArray[np.float64], codes: NDArray[np.int64], num_groups: int, aggregate: str
) -> NDArray[np.float64]:
    if aggregate == "mean":
        counts = np.bincount(codes, minlength=num_groups)
        return np.bincount(codes, weights=values, minlength=num_groups) / counts
    top = np.full(num_groups, -np.inf)
    np.maximum.at(top, codes, values)
    return top
