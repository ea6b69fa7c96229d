"""pooled rows of one split → its entry of results.json, ready for JSON: None for what is undefined, never NaN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medtl_dist.errors import UserError
from medtl_dist.metrics import bootstrap, calibration, intervals, operating, proportions, ranking, scores

LEVEL = 0.95
MAX_POINTS = 500  # of a curve: more than a screen or a page can show
NUM_HISTOGRAM_BINS = 20
MAX_LISTED_GROUPS = 20
UNITS = ("image", "patient")
TASKS = ("binary", "multiclass")


@dataclass(frozen=True)
class Cases:
    """The rows that one level is computed from: labels int64 [n], logits float64 [n, K], patient codes [n] or None."""

    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    logits: NDArray[np.float64]
    codes: NDArray[np.int64] | None
    unit: str

    @property
    def counted(self) -> str:
        """What is independent: patients where they are known."""
        return "image" if self.unit == "image" and self.codes is None else "patient"

    def num_groups(self, rows: NDArray[np.bool_] | slice = slice(None)) -> int | None:
        return None if self.codes is None else scores.count_groups(self.codes[rows])


def summarise(
    *,
    classes: Sequence[str],
    task: str,
    labels: ArrayLike,
    logits: ArrayLike,
    groups: ArrayLike | None,
    loss: float | None,
    threshold: dict | None,
    unit: str = "image",
    aggregate: str = "mean",
    num_bootstrap: int = 2000,
    seed: int = 0,
) -> dict:
    """Everything that results.json says about one split (docs/intervals.md explains the intervals).

    Args:
        classes: K names; binary: K = 2 and classes[1] is the positive class.
        task: "binary" or "multiclass" (of several labels an image see ``metrics.multilabel``).
        labels: int [n] in 0 … K-1.
        logits: float [n, K], per-class log-odds (``scores.log_odds``), finite, one row per image.
        groups: [n] patient of each image; None when nothing is known about patients.
        loss: mean loss over the images, or None.
        threshold: from ``operating.choose_threshold`` at the level of ``unit``; None leaves the numbers that need one
            undefined (binary). Several classes are decided by the largest score and ignore it.
        unit: "image" or "patient", the level of the entry; the other level is added as ``other_level``.
        aggregate: "mean" or "max" of a patient's log-odds (``scores.by_patient``).
        num_bootstrap: replicates of the patient bootstrap; 0 leaves it out.
        seed: of the bootstrap.

    Returns:
        A dict of plain Python values. Headline ``auc``: of the positive class, or the macro one-vs-rest mean over the
        defined classes. ``accuracy, sensitivity …``: ``{"value", "ci", "method"}``.

    Raises:
        UserError: unit "patient" without groups, an unknown unit, aggregate or task.
    """
    if task not in TASKS:
        raise UserError(f"task {task!r} cannot be summarised; expected one of: {', '.join(TASKS)}")
    if unit not in UNITS:
        raise UserError(f"unknown unit {unit!r} of evaluation; valid: {', '.join(UNITS)}")
    if unit == "patient" and groups is None:
        raise UserError(
            "results per patient were asked for, but the data set has no patient groups (group_source: none); "
            "use evaluate.unit = image, or pack the data again with --group-col"
        )
    images, patients, mixed = _levels(tuple(classes), labels, logits, groups, aggregate)
    chosen, other = (images, patients) if unit == "image" or patients is None else (patients, images)
    entry = entry_of(chosen, threshold, num_bootstrap, seed) | {"loss": plain(loss), "mixed_label_groups": mixed}
    entry["aggregate"] = aggregate if unit == "patient" else None
    entry["other_level"] = None
    if other is not None:
        # A threshold belongs to the level that it was fixed on, so the other level has none.
        other_entry = entry_of(other, None, num_bootstrap, seed) | {"loss": None}
        other_entry["aggregate"] = aggregate if other.unit == "patient" else None
        entry["other_level"] = other_entry
    return entry


def _levels(
    classes: tuple[str, ...], labels: ArrayLike, logits: ArrayLike, groups: ArrayLike | None, aggregate: str
) -> tuple[Cases, Cases | None, dict | None]:
    """The image level, the patient level and the groups with mixed labels (the last two None without groups)."""
    labels, logits = np.asarray(labels, dtype=np.int64), np.asarray(logits, dtype=np.float64)
    if logits.shape != (len(labels), len(classes)):
        raise ValueError(f"logits has shape {logits.shape}; expected {(len(labels), len(classes))}")
    if groups is None:
        return Cases(classes, labels, logits, None, "image"), None, None
    _, codes = scores.group_codes(groups)
    images = Cases(classes, labels, logits, codes, "image")
    rows = scores.by_patient(labels, logits, groups, aggregate=aggregate)
    patients = Cases(classes, rows.labels, rows.logits, np.arange(len(rows.labels)), "patient")
    names = scores.mixed_groups(labels, groups)
    left_out = len(names) if len(classes) > 2 else 0
    mixed = {
        "count": len(names),
        "groups": [str(name) for name in names[:MAX_LISTED_GROUPS]],
        "left_out_of_patient_level": left_out,
    }
    return images, patients, mixed


def entry_of(cases: Cases, threshold: dict | None, num_bootstrap: int, seed: int) -> dict:
    binary = len(cases.classes) == 2
    per_class = {name: _class_entry(cases, k) for k, name in enumerate(cases.classes)}
    entry = {"unit": cases.unit, "n": len(cases.labels), "n_groups": cases.num_groups()}
    entry |= _positives(cases, 1) if binary else dict.fromkeys(_positives(cases, 0))
    entry |= _headline_auc(cases, [1] if binary else list(range(len(cases.classes))), num_bootstrap, seed)
    macro = {
        "auc": mean_of(row["auc"] for row in per_class.values()),
        "average_precision": mean_of(row["average_precision"] for row in per_class.values()),
        "n_defined": sum(row["auc"] is not None for row in per_class.values()),
    }
    headline = per_class[cases.classes[1]] if binary else macro
    entry["average_precision"] = headline["average_precision"]
    entry["average_precision_chance"] = (
        entry["prevalence"]
        if binary
        else mean_of(row["prevalence"] for row in per_class.values() if row["average_precision"] is not None)
    )
    entry |= _decisions(cases, threshold) | _calibration(cases)
    entry["curves"] = _curves(cases, 1) if binary else None
    if not binary:
        for k, name in enumerate(cases.classes):
            per_class[name]["curves"] = _curves(cases, k)
    return entry | {"histogram": _histogram(cases) if binary else None, "per_class": per_class, "macro": macro}


def _positives(cases: Cases, k: int) -> dict:
    positive = cases.labels == k
    return {
        "n_positive": int(positive.sum()),
        "n_negative": int((~positive).sum()),
        "n_positive_groups": cases.num_groups(positive),
        "n_negative_groups": cases.num_groups(~positive),
        "prevalence": float(positive.mean()) if len(positive) else None,
    }


def _class_entry(cases: Cases, k: int) -> dict:
    """One class against the rest."""
    positive, values = cases.labels == k, cases.logits[:, k]
    found = intervals.auc_interval(positive, values, cases.codes, level=LEVEL, unit=cases.unit)
    return {
        "auc": found.auc,
        "auc_undefined": found.reason if found.auc is None else None,
        "auc_ci": as_pair(found.interval),
        "ci_method": found.method,
        "ci_warning": joined(found.reason if found.auc is not None else None, found.warning),
        "average_precision": ranking.average_precision(positive, values),
        **_positives(cases, k),
    }


def _headline_auc(cases: Cases, targets: list[int], num_bootstrap: int, seed: int) -> dict:
    """AUC of the positive class, or the mean over the classes that have one, with both intervals."""
    wanted = {k: intervals.components(cases.labels == k, cases.logits[:, k], cases.codes) for k in targets}
    defined = {k: parts for k, parts in wanted.items() if parts is not None}
    entry = {"auc": None, "auc_undefined": None, "auc_ci": None, "ci_level": LEVEL, "auc_ci_bootstrap": None}
    entry["ci_method"] = intervals.method_name(cases.codes, cases.unit)
    entry |= {"ci_warning": None, "bootstrap_replicates": 0}
    if not defined:
        if len(targets) == 1:
            found = intervals.auc_interval(cases.labels == targets[0], cases.logits[:, targets[0]], unit=cases.unit)
            return entry | {"auc_undefined": found.reason}
        return entry | {
            "auc_undefined": f"undefined: the {len(cases.labels)} {cases.unit}s are of fewer than two classes"
        }
    method, counted = entry["ci_method"], cases.counted
    found = intervals.mean_interval(list(defined.values()), level=LEVEL, method=method, counted=counted)
    names = [cases.classes[k] if len(targets) > 1 else "" for k in defined]
    few = [
        intervals.small_sample_warning(parts, counted, name)
        for name, parts in zip(names, defined.values(), strict=True)
    ]
    entry |= {"auc": found.auc, "auc_ci": as_pair(found.interval), "ci_method": found.method}
    entry["ci_warning"] = joined(found.reason, *few)
    if num_bootstrap > 0:
        scorings = [(cases.labels == k, cases.logits[:, k]) for k in defined]
        draws = bootstrap.replicate_aucs(
            cases.labels, scorings, cases.codes, num_replicates=num_bootstrap, seed=seed
        ).mean(axis=1)
        entry["auc_ci_bootstrap"] = as_pair(bootstrap.percentile_interval(draws, LEVEL))
        entry["bootstrap_replicates"] = len(draws)
    return entry


def _decisions(cases: Cases, threshold: dict | None) -> dict:
    """Confusion and what follows from it: at the threshold (binary), by the largest score (several classes)."""
    names = ("accuracy", "balanced_accuracy", "sensitivity", "specificity", "ppv", "npv", "f1", "confusion")
    entry: dict = {**dict.fromkeys(names), "threshold": threshold}
    num_classes = len(cases.classes)
    if num_classes == 2 and threshold is None:
        return entry
    if num_classes == 2 and threshold is not None:
        predicted = (cases.logits[:, 1] >= threshold["logit"]).astype(np.int64)
        entry |= operating.rates(cases.labels == 1, predicted == 1, cases.codes)
    else:
        predicted = cases.logits.argmax(axis=1) if len(cases.labels) else np.empty(0, np.int64)
        by_class = {
            name: operating.rates(cases.labels == k, predicted == k, cases.codes)
            for k, name in enumerate(cases.classes)
        }
        entry |= {"threshold": None, "rates": by_class, "f1": mean_of(row["f1"] for row in by_class.values())}
    entry["accuracy"] = proportions.proportion(predicted == cases.labels, cases.codes)
    entry["balanced_accuracy"] = proportions.balanced_accuracy(cases.labels, predicted, num_classes, cases.codes)
    entry["confusion"] = operating.confusion(cases.labels, predicted, num_classes)
    return entry


def _calibration(cases: Cases) -> dict:
    """Binary: the positive class's probability. Several classes: that of the class called, and whether it is right."""
    probabilities = scores.probability(cases.logits)
    if len(cases.classes) == 2 or len(cases.labels) == 0:
        event, hits, given = "positive", cases.labels == 1, probabilities[:, 1]
    else:
        called = cases.logits.argmax(axis=1)
        event, hits, given = (
            "the class called is right",
            called == cases.labels,
            probabilities[np.arange(len(called)), called],
        )
    bins = calibration.reliability(hits, given, cases.codes)
    return {
        "brier": calibration.brier_score(cases.labels, probabilities),
        "ece": calibration.expected_calibration_error(bins),
        "calibration": bins,
        "calibration_event": event,
    }


def _curves(cases: Cases, k: int) -> dict:
    roc = ranking.roc_curve(cases.labels == k, cases.logits[:, k], MAX_POINTS)
    pr = ranking.pr_curve(cases.labels == k, cases.logits[:, k], MAX_POINTS)
    return {
        "roc": None if roc is None else {"fpr": roc.x.tolist(), "tpr": roc.y.tolist()},
        "pr": None if pr is None else {"recall": pr.x.tolist(), "precision": pr.y.tolist()},
    }


def _histogram(cases: Cases) -> dict:
    edges = np.linspace(0, 1, NUM_HISTOGRAM_BINS + 1)
    values, positive = scores.probability(cases.logits[:, 1]), cases.labels == 1
    return {
        "edges": edges.tolist(),
        "positive": np.histogram(values[positive], edges)[0].tolist(),
        "negative": np.histogram(values[~positive], edges)[0].tolist(),
    }


def joined(*parts: str | None) -> str | None:
    said = list(dict.fromkeys(part for part in parts if part is not None))
    return "; ".join(said) if said else None


def mean_of(values) -> float | None:
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None


def as_pair(interval: tuple[float, float] | None) -> list[float] | None:
    return None if interval is None else [float(interval[0]), float(interval[1])]


def plain(value: float | None) -> float | None:
    """A float for JSON: what is not finite is None."""
    return float(value) if value is not None and np.isfinite(value) else None
