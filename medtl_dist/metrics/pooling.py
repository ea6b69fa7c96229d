"""scores of every rank → one row per image: duplicates dropped, and nothing missing, unknown or contradictory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from medtl_dist.errors import DataError, TrainingError


class Pooled(TypedDict):
    """Rows in the order of the expected keys: keys str [n], labels int64 [n] or [n, K], logits float [n, K] as they were sent."""

    keys: NDArray[np.str_]
    labels: NDArray[np.int64]
    logits: NDArray


def pool(parts: Sequence[Mapping[str, Any]], expected_keys: Sequence[str] | NDArray, split: str = "") -> Pooled:
    """Join what the ranks scored into exactly one row per expected key, in the order of ``expected_keys``.

    The result is the same, bit for bit, however the rows were dealt to ranks and however often one was sent.

    Args:
        parts: for each rank ``{"keys": str [m], "labels": int [m] or [m, K], "logits": float [m, K]}``, of one
            dtype; m may be 0.
        expected_keys: the key of every image of the split, each once.
        split: its name, for the messages.

    Raises:
        DataError: a key missing, unknown, expected twice, or sent twice with different label or logits.
        TrainingError: a logit that is not a finite number.
        ValueError: parts whose arrays differ in length.
    """
    expected = np.asarray(expected_keys, dtype=np.str_)
    of_split = f" of split {split}" if split else ""
    keys, labels, logits = _joined(parts)
    unique, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    inverse = inverse.reshape(-1)
    sorted_expected, repeats = np.unique(expected, return_counts=True)
    if len(sorted_expected) != len(expected):
        _fail(sorted_expected[repeats > 1], "are listed twice in the index", of_split, len(expected))
    missing = np.setdiff1d(sorted_expected, unique, assume_unique=True)
    if len(missing):
        _fail(missing, "were not scored", of_split, len(expected))
    unknown = np.setdiff1d(unique, sorted_expected, assume_unique=True)
    if len(unknown):
        _fail(unknown, "were scored but are not in the index", of_split, len(expected))
    bad = ~np.isfinite(logits).all(axis=1)
    if bad.any():
        raise TrainingError(
            f"the model's score is not a finite number for {int(bad.sum())} of {len(keys)} images{of_split} "
            f"(first: {keys[bad][0]}): training has diverged; lower optim.lr, or set train.precision = fp32"
        )
    same_labels = labels == labels[first][inverse]
    if labels.ndim == 2:
        same_labels = same_labels.all(axis=1)
    same = same_labels & (logits == logits[first][inverse]).all(axis=1)
    if not same.all():
        _fail(np.unique(keys[~same]), "were scored twice with different results", of_split, len(expected))
    rows = first[np.searchsorted(unique, expected)] if len(expected) else np.empty(0, np.int64)
    return {"keys": expected, "labels": labels[rows], "logits": logits[rows]}


def _joined(parts: Sequence[Mapping[str, Any]]) -> tuple[NDArray[np.str_], NDArray[np.int64], NDArray]:
    """All parts one after the other; a rank without rows adds nothing, whatever the shape of its empty logits."""
    keys, labels, logits = [], [], []
    for part in parts:
        part_keys = np.asarray(part["keys"], dtype=np.str_).reshape(-1)
        part_labels = np.asarray(part["labels"], dtype=np.int64)
        part_logits = np.asarray(part["logits"])
        if not len(part_keys) == len(part_labels) == len(part_logits):
            raise ValueError(f"{len(part_keys)} keys, {len(part_labels)} labels, {len(part_logits)} rows of logits")
        if len(part_keys):
            keys.append(part_keys)
            labels.append(part_labels)
            logits.append(part_logits)
    if not keys:
        return np.empty(0, np.str_), np.empty(0, np.int64), np.empty((0, 0))
    return np.concatenate(keys), np.concatenate(labels), np.concatenate(logits)


def _fail(keys: NDArray[np.str_], what: str, of_split: str, num_expected: int) -> None:
    raise DataError(
        f"{len(keys)} of {num_expected} images{of_split} {what} (first: {keys[0]}): results of a part of the data are "
        "not reported; check the shards with `medtl data verify`, then evaluate again"
    )
