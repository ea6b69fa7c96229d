"""pooled rows of all folds and repeats → the numbers of crossval.json, ready for JSON (see ``metrics.within`` for the AUC)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medtl_dist.metrics import ranking, scores
from medtl_dist.metrics.multilabel import UNKNOWN, Sets
from medtl_dist.metrics.summary import LEVEL, MAX_POINTS, as_pair, joined, mean_of
from medtl_dist.metrics.within import Within, mean_roc, within_folds, within_interval


@dataclass(frozen=True)
class Repeat:
    """One repeat's rows at the level that is counted: ``labels`` int [n] or label sets [n, K], ``logits`` float [n, K],
    ``codes`` int [n] of patients, ``folds`` int [n]."""

    labels: NDArray[np.int64]
    logits: NDArray[np.float64]
    codes: NDArray[np.int64]
    folds: NDArray[np.int64]

    def question(self, k: int) -> tuple[NDArray[np.bool_], NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
        """Class ``k`` against the rest, of label sets against its absence where that is known: labels, scores, codes, folds."""
        if self.labels.ndim == 1:
            return self.labels == k, self.logits[:, k], self.codes, self.folds
        known = self.labels[:, k] != UNKNOWN
        return self.labels[known, k] == 1, self.logits[known, k], self.codes[known], self.folds[known]


def summarise_folds(
    *,
    classes: Sequence[str],
    task: str,
    labels: ArrayLike,
    logits: ArrayLike,
    groups: ArrayLike,
    groups_known: bool,
    folds: ArrayLike,
    repeats: ArrayLike,
    unit: str = "image",
    aggregate: str = "mean",
) -> dict[str, Any]:
    """The AUC of pairs within folds with its interval, of each fold, each repeat and each class.

    Args:
        classes: K names; of a binary task classes[1] is the positive one.
        labels: int [n], or label sets int [n, K] with -1 for unknown; logits: float [n, K]; both of all repeats.
        groups: [n] the patient of each row; where ``groups_known`` is false, the image.
        folds, repeats: int [n].
        unit: "image" or "patient": what a row of the numbers is; ``aggregate`` how a patient's images become one score.
    """
    codes = scores.group_codes(groups)[1]
    num_patients = int(codes.max()) + 1
    counted = "patient" if groups_known else "image"
    whole = Repeat(np.asarray(labels, np.int64), np.asarray(logits, np.float64), codes, np.asarray(folds, np.int64))
    numbers = np.unique(np.asarray(repeats))
    several = [_rows(whole, np.asarray(repeats) == number) for number in numbers]
    if unit == "patient":
        several = [by_patient(one, classes, aggregate) for one in several]
    asked = [1] if task == "binary" else list(range(len(classes)))
    found = [[within_folds(*one.question(k), num_patients) for one in several] for k in asked]
    headline = within_interval(found, level=LEVEL, counted=counted, names=classes)
    per_fold = [
        entry
        for place, number in enumerate(numbers.tolist())
        for entry in _fold_entries(number, several[place], [one[place] for one in found])
    ]
    aucs = [entry["auc"] for entry in per_fold if entry["auc"] is not None]
    return {
        "unit": unit,
        "n": len(several[0].folds),
        "n_groups": num_patients if groups_known else None,
        "auc": headline.auc,
        "auc_undefined": headline.reason if headline.auc is None else None,
        "auc_ci": as_pair(headline.interval),
        "ci_level": LEVEL,
        "ci_method": headline.method,
        "ci_warning": joined(headline.reason if headline.auc is not None else None, headline.warning),
        "per_repeat": [mean_of(one[place].auc for one in found) for place in range(len(numbers))],
        "per_fold": per_fold,
        "folds_without_auc": len(per_fold) - len(aucs),
        "spread": {
            "min": min(aucs), "median": float(np.median(aucs)), "max": max(aucs),
            "sd": float(np.std(aucs, ddof=1)) if len(aucs) > 1 else None,
        } if aucs else None,
        "per_class": {
            classes[k]: _class_entry(repeats_of, counted, several, k) for k, repeats_of in zip(asked, found, strict=True)
        },
    }  # fmt: skip


def by_patient(rows: Repeat, classes: Sequence[str], aggregate: str) -> Repeat:
    """One row per patient, who is in one fold. Raises: UserError, another aggregate than mean and max."""
    patients, first = np.unique(rows.codes, return_index=True)
    fold_of = dict(zip(patients.tolist(), rows.folds[first].tolist(), strict=True))
    if rows.labels.ndim == 2:
        level = Sets.of(classes, rows.labels, rows.logits, rows.codes).by_patient(aggregate)
        return Repeat(level.sets, level.logits, patients, np.array([fold_of[one] for one in patients.tolist()]))
    found = scores.by_patient(rows.labels, rows.logits, rows.codes, aggregate=aggregate)
    folds = np.array([fold_of[one] for one in found.groups.tolist()], np.int64)
    return Repeat(found.labels, found.logits, np.asarray(found.groups, np.int64), folds)


def _rows(whole: Repeat, chosen: NDArray[np.bool_]) -> Repeat:
    return Repeat(whole.labels[chosen], whole.logits[chosen], whole.codes[chosen], whole.folds[chosen])


def _fold_entries(repeat: int, rows: Repeat, classes: Sequence[Within]) -> list[dict[str, Any]]:
    """What each fold of a repeat is, and its AUC: of several classes the mean over those that have one in it."""
    entries = []
    for fold in np.unique(rows.folds).tolist():
        here = rows.folds == fold
        own = [one for found in classes for one in found.folds if one.fold == fold]
        entries.append(
            {
                "repeat": repeat,
                "fold": fold,
                "n": int(here.sum()),
                "n_groups": scores.count_groups(rows.codes[here]),
                "n_positive": own[0].num_positive if len(classes) == 1 else None,
                "n_negative": own[0].num_negative if len(classes) == 1 else None,
                "pairs": sum(one.pairs for one in own),
                "auc": mean_of(one.auc for one in own),
            }
        )
    return entries


def _class_entry(found: Sequence[Within], counted: str, several: Sequence[Repeat], k: int) -> dict[str, Any]:
    interval = within_interval([found], level=LEVEL, counted=counted)
    usable = [one for within in found for one in within.folds if one.auc is not None]
    return {
        "auc": interval.auc,
        "auc_ci": as_pair(interval.interval),
        "ci_warning": joined(interval.reason, interval.warning),
        "n_positive": sum(one.num_positive for one in found[0].folds),
        "n_negative": sum(one.num_negative for one in found[0].folds),
        "folds_without_auc": sum(len(within.folds) for within in found) - len(usable),
        "curves": _curves(found, several, k) if usable else None,
    }


def _curves(found: Sequence[Within], several: Sequence[Repeat], k: int) -> dict[str, Any]:
    """The ROC curve of each fold, and their mean, below which lies the AUC."""
    drawn, weighed = [], []
    for number, (within, rows) in enumerate(zip(found, several, strict=True)):
        labels, values, _, folds = rows.question(k)
        all_pairs = sum(one.pairs for one in within.folds)
        for one in within.folds:
            here = folds == one.fold
            curve = ranking.roc_curve(labels[here], values[here])
            if curve is not None:
                weighed.append((curve.x, curve.y, one.pairs / all_pairs))
                x, y = _thinned(curve.x, curve.y)
                drawn.append({"repeat": number, "fold": one.fold, "fpr": x, "tpr": y})
    mean = mean_roc(weighed)
    x, y = _thinned(mean.x, mean.y)
    return {"mean": {"fpr": x, "tpr": y}, "folds": drawn}


def _thinned(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[list[float], list[float]]:
    places = np.unique(np.linspace(0, len(x) - 1, min(len(x), MAX_POINTS)).astype(int))
    return x[places].tolist(), y[places].tolist()
