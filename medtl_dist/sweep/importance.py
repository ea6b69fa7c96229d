"""trials' knobs and AUCs → which knob mattered: permutation importance of a random forest, on trials it was not fitted to.

Each tree of the forest is fitted to a bootstrap draw of the trials. Of the trials that it has not seen it predicts the AUC
twice, as they are and with one knob's values shuffled between them: how much the squared error grows, over the variance of the
AUC, is the knob's importance (Breiman, Machine Learning 45, 2001, section 10). The same with the trials' AUCs dealt out at random
says how large an importance chance gives to some knob or other: what does not exceed it says nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MIN_TRIALS = 8
NUM_FORESTS, NUM_TREES = 6, 40
NUM_CHANCE = 20


@dataclass(frozen=True)
class KnobImportance:
    """``value``: growth of the squared error, in variances of the AUC; ``low`` and ``high`` are the extremes over forests."""

    knob: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Importance:
    """Knobs, the most important first. ``chance`` is what the best of as many knobs without influence reaches in 19 of 20 cases.

    ``reason`` says why there are none.
    """

    knobs: tuple[KnobImportance, ...]
    chance: float | None
    num_trials: int
    reason: str | None = None


def importance(rows: Sequence[Mapping[str, Any]], aucs: Sequence[float], *, seed: int = 0) -> Importance:
    """Which of the knobs decided the AUC.

    Args:
        rows: knob to value of each trial; a knob that a trial lacks counts as a value of its own.
        aucs: its best AUC.
    """
    named = _features(rows)
    if len(rows) < MIN_TRIALS:
        return Importance((), None, len(rows), f"too few trials: {len(rows)} ranked, expected {MIN_TRIALS} or more")
    if not named:
        return Importance((), None, len(rows), "no knob took more than one value")
    target = np.asarray(aucs, dtype=np.float64)
    if np.ptp(target) < 1e-9:
        return Importance((), None, len(rows), "all trials reached the same AUC")
    features = np.stack([column for _, column in named], axis=1)
    several = np.stack([_forest(features, target, seed + at) for at in range(NUM_FORESTS)])
    shuffler = np.random.default_rng(seed)
    best_by_chance = [
        _forest(features, shuffler.permutation(target), seed + NUM_FORESTS + at).max() for at in range(NUM_CHANCE)
    ]
    found = [
        KnobImportance(name, float(values.mean()), float(values.min()), float(values.max()))
        for (name, _), values in zip(named, several.T, strict=True)
    ]
    ordered = tuple(sorted(found, key=lambda one: (-one.value, one.knob)))
    return Importance(ordered, float(np.quantile(best_by_chance, 0.95)), len(rows))


def _forest(features: NDArray[np.float64], target: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Importance of each column: mean over the trees, of the trials that the tree has not seen."""
    from sklearn.tree import DecisionTreeRegressor

    rng = np.random.default_rng(seed)
    num_trials, num_knobs = features.shape
    grown, seen = np.zeros(num_knobs), 0
    for tree_seed in range(NUM_TREES):
        drawn = rng.integers(0, num_trials, num_trials)
        unseen = np.setdiff1d(np.arange(num_trials), drawn)
        if len(unseen) < 2:
            continue
        tree = DecisionTreeRegressor(
            max_features=max(1, (num_knobs + 1) // 2), min_samples_leaf=2, random_state=tree_seed
        )
        tree.fit(features[drawn], target[drawn])
        error = np.square(tree.predict(features[unseen]) - target[unseen]).sum()
        shuffled = np.repeat(features[unseen][None], num_knobs, axis=0)
        for knob in range(num_knobs):
            shuffled[knob, :, knob] = rng.permutation(shuffled[knob, :, knob])
        predicted = tree.predict(shuffled.reshape(-1, num_knobs)).reshape(num_knobs, -1)
        grown += np.square(predicted - target[unseen]).sum(axis=1) - error
        seen += len(unseen)
    return grown / max(seen, 1) / target.var()


def _features(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, NDArray[np.float64]]]:
    """Columns for trees, which ask for order only: numbers as they are, else the values' order of first appearance."""
    found = []
    for key in dict.fromkeys(key for row in rows for key in row):
        values = [row.get(key, "(not drawn)") for row in rows]
        texts = [_text(value) for value in values]
        order = list(dict.fromkeys(texts))
        if len(order) > 1:
            found.append((key, _column(values, [order.index(text) for text in texts])))
    return found


def _text(value: Any) -> str:
    return json.dumps(float(value) if _is_number(value) else value, sort_keys=True, default=str)


def _column(values: Sequence[Any], codes: Sequence[int]) -> NDArray[np.float64]:
    numbers = [value for value in values if _is_number(value)]
    if len(numbers) >= len(values) / 2 and len(set(numbers)) > 1:
        # What is no number ("all", or not drawn) lies beyond the largest.
        beyond = max(numbers) + 1 + (max(numbers) - min(numbers))
        return np.array([float(value) if _is_number(value) else beyond for value in values])
    return np.array(codes, dtype=np.float64)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
