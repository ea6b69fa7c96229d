"""kept columns and image borders ─► how well the label follows from them alone, without looking at the anatomy.

A one-column model (or one of a few numbers of the border) is a logistic regression, its scores are out of fold with
groups kept together, and its AUC counts pairs within folds only: pooled out-of-fold scores would rank the folds.
The interval is a percentile bootstrap over groups. Age may well predict a disease; the laterality marker should not.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from medtl_dist.data.audit_scan import Scan
from medtl_dist.data.findings import Finding
from medtl_dist.data.fingerprint import stat
from medtl_dist.data.shards import INDEX_FIELDS, read_shard_rows

_MAX_IMAGES = 5000
_MIN_GROUPS = 20  # of a class
_FOLDS = 5
_RESAMPLES = 200
_MAX_CATEGORIES = 20
_BINS = 10
# An interval wholly above this is worth a warning.
SUSPICIOUS_AUC = 0.6

_BORDER = ("ring", "left", "right", "top", "bottom")
_CORNERS = ("top_left", "top_right", "bottom_left", "bottom_right")
Matrix = NDArray[np.float64]


def shortcuts(seen: Scan, seed: int = 0) -> tuple[list[Finding], list[dict[str, Any]]]:
    """Findings, and every model tried: ``{"from", "auc", "auc_ci", "images", "groups"}``."""
    if seen.dataset.task == "multilabel":  # a model for each of many sets of labels would say little
        return [], []
    chosen = _sample(seen, seed)
    labels, groups = seen.label[chosen], seen.group[chosen]
    enough = [int(k) for k in np.unique(labels[labels >= 0]) if len(np.unique(groups[labels == k])) >= _MIN_GROUPS]
    if len(enough) < 2:
        return [], []
    inside = np.isin(labels, enough)
    chosen, labels, groups = chosen[inside], labels[inside], groups[inside]
    folds = _folds(labels, groups, seed)
    tried, findings = [], []
    for name, features in _features(seen, chosen):
        scores = _out_of_fold(features, labels, folds)
        auc, low, high = _auc(scores, labels, groups, folds, seed)
        facts = {"from": name, "auc": auc, "auc_ci": [low, high], "images": len(labels)}
        facts["groups"] = len(np.unique(groups))
        tried.append(facts)
        if low > SUSPICIOUS_AUC:
            text = f"the label follows from {name} alone: AUC {auc:.2f} [{low:.2f}, {high:.2f}]; may a model use that?"
            findings.append(Finding("shortcut", "warning", 1, text, [facts]))
    return findings, tried


def _sample(seen: Scan, seed: int) -> NDArray[np.int64]:
    """Whole groups, drawn at random, of about 5,000 images; sorted."""
    if len(seen) <= _MAX_IMAGES:
        return np.arange(len(seen))
    sizes = np.bincount(seen.group)
    order = np.random.default_rng([seed, 3]).permutation(len(sizes))
    taken = order[np.cumsum(sizes[order]) <= _MAX_IMAGES]
    return np.flatnonzero(np.isin(seen.group, taken))


def _features(seen: Scan, chosen: NDArray[np.int64]) -> Iterator[tuple[str, Matrix]]:
    records = seen.records[chosen]
    width, height = (records["size"][:, side].astype(np.float64) for side in (0, 1))
    shape = np.stack([width, height, width / height], axis=1)
    if np.ptp(shape, axis=0).any():
        binned = [_binned(column) for column in shape.T]
        yield "image size and aspect", np.concatenate(binned, axis=1)
    for name, stats in (("the image's borders", _BORDER), ("the image's corners", _CORNERS)):
        values = np.stack([stat(records, field) for field in stats], axis=1)
        yield name, np.concatenate([values, values**2 / 255], axis=1)
    if seen.dataset.channels == 3 and np.ptp(stat(records, "grey")):
        yield "being grey or in colour", stat(records, "grey")[:, None]
    table = _kept(seen)
    for name in table.column_names:
        features = _encoded(table.column(name).take(pa.array(chosen)))
        if features is not None:
            label = "the domain" if name == "domain" else f"column {name}"
            yield label, features


def _kept(seen: Scan) -> pa.Table:
    """The kept columns and the domain of every image, in the scan's order."""
    dataset = seen.dataset
    shards = [shard for split in dataset.splits for shard in dataset.shards(split)]
    # Not of the index's own columns: they are the answer, or where an image lies.
    own = {entry.name for entry in INDEX_FIELDS} - {"domain"}
    names = [name for name in read_shard_rows(dataset, shards[0]).column_names if name not in own]
    return pa.concat_tables([read_shard_rows(dataset, shard, names) for shard in shards]).combine_chunks()


def _encoded(column: pa.ChunkedArray) -> Matrix | None:
    """Indicators of bins (numbers) or categories, a missing value being one; None if there is only one."""
    kind = column.type
    if pa.types.is_boolean(kind):
        column = column.cast(pa.string())
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return _several(_binned(np.array(column.to_pylist(), np.float64)))
    texts = np.array(["" if value is None else f"={value}" for value in column.to_pylist()], dtype=object)
    names, codes, counts = np.unique(texts, return_inverse=True, return_counts=True)
    common = np.argsort(-counts, kind="stable")[:_MAX_CATEGORIES]
    rank = np.full(len(names), len(common))
    rank[common] = np.arange(len(common))
    return _several(np.eye(len(common) + 1)[rank[codes]])


def _several(indicators: Matrix) -> Matrix | None:
    used = indicators[:, indicators.any(axis=0)]
    return used if used.shape[1] > 1 else None


def _binned(values: Matrix) -> Matrix:
    finite = values[np.isfinite(values)]
    edges = np.unique(np.quantile(finite, np.arange(1, _BINS) / _BINS)) if len(finite) else np.zeros(0)
    bins = np.where(np.isfinite(values), np.searchsorted(edges, np.nan_to_num(values), side="right"), len(edges) + 1)
    return np.eye(len(edges) + 2)[bins]


def _folds(labels: NDArray, groups: NDArray, seed: int) -> NDArray[np.int64]:
    from sklearn.model_selection import StratifiedGroupKFold

    fold = np.zeros(len(labels), np.int64)
    splitter = StratifiedGroupKFold(_FOLDS, shuffle=True, random_state=seed)
    for number, (_, held_out) in enumerate(splitter.split(labels, labels, groups)):
        fold[held_out] = number
    return fold


def _out_of_fold(features: Matrix, labels: NDArray, folds: NDArray) -> Matrix:
    """float64 [n, classes]: probabilities by models that did not see the image's group."""
    from sklearn.linear_model import LogisticRegression

    classes = np.unique(labels)
    scores = np.zeros((len(labels), len(classes)))
    spread = features.std(axis=0)
    features = (features - features.mean(axis=0)) / np.where(spread > 0, spread, 1)
    for fold in range(_FOLDS):
        train, held_out = folds != fold, folds == fold
        if not held_out.any() or len(np.unique(labels[train])) < len(classes):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an optimiser that stops early still ranks
            model = LogisticRegression(max_iter=200).fit(features[train], labels[train])
        scores[held_out] = model.predict_proba(features[held_out])
    return scores


def _auc(scores: Matrix, labels: NDArray, groups: NDArray, folds: NDArray, seed: int) -> tuple[float, float, float]:
    """The AUC over pairs within folds, one class against the others, unweighted mean, with its 95 % interval."""
    members, place = np.unique(groups, return_inverse=True)
    rng = np.random.default_rng([seed, 4])
    weights = np.ones((_RESAMPLES + 1, len(members)))  # the first row: the groups as they are
    for row in weights[1:]:
        row[:] = np.bincount(rng.integers(len(members), size=len(members)), minlength=len(members))
    classes = np.unique(labels)
    if len(classes) == 2:
        classes = classes[1:]
    total = np.zeros(_RESAMPLES + 1)
    for class_ in classes:
        wins, pairs = np.zeros(_RESAMPLES + 1), np.zeros(_RESAMPLES + 1)
        column = scores[:, np.searchsorted(np.unique(labels), class_)]
        for fold in range(_FOLDS):
            inside = np.flatnonzero(folds == fold)
            won, of = _weighted_wins(column[inside], labels[inside] == class_, weights[:, place[inside]])
            wins, pairs = wins + won, pairs + of
        total += wins / np.maximum(pairs, 1e-9)
    values = total / len(classes)
    low, high = np.quantile(values[1:], (0.025, 0.975))
    return round(float(values[0]), 3), round(float(low), 3), round(float(high), 3)


def _weighted_wins(scores: NDArray, positive: NDArray, weights: Matrix) -> tuple[NDArray, NDArray]:
    """Per row of weights [rows, n]: pairs that the positive image wins (a tie counts half), and all pairs."""
    if not len(scores):
        return np.zeros(len(weights)), np.zeros(len(weights))
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) > 0])
    weights, positive = weights[:, order], positive[order]
    good = np.add.reduceat(weights * positive, starts, axis=1)
    bad = np.add.reduceat(weights * ~positive, starts, axis=1)
    below = np.cumsum(bad, axis=1) - bad
    return (good * (below + bad / 2)).sum(axis=1), good.sum(axis=1) * bad.sum(axis=1)
