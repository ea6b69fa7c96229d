"""pooled rows of one split with several labels an image → its entry of results.json.

Every class is a binary question of its own, asked of the images whose answer is known: an unknown answer is no row of that
class, for its AUC, threshold, calibration and patients alike, so no number depends on it. The headline is the unweighted mean
of the classes' AUCs (macro, over the classes that have one).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medtl_dist.errors import UserError
from medtl_dist.metrics import bootstrap, intervals, scores
from medtl_dist.metrics.operating import choose_threshold
from medtl_dist.metrics.summary import LEVEL, UNITS, Cases, as_pair, entry_of, joined, mean_of, plain

UNKNOWN = -1
Thresholds = dict[str, dict[str, Any] | None]

# Of a class's own entry, as for a binary task.
_OF_A_CLASS = (
    "n", "n_groups", "n_positive", "n_negative", "n_positive_groups", "n_negative_groups", "prevalence",
    "auc", "auc_undefined", "auc_ci", "ci_method", "ci_warning", "average_precision",
    "threshold", "sensitivity", "specificity", "ppv", "npv", "f1", "confusion",
    "brier", "ece", "calibration", "curves", "histogram",
)  # fmt: skip
# Defined for one question only, or for one label an image.
_UNDEFINED = (
    "n_positive", "n_negative", "n_positive_groups", "n_negative_groups", "prevalence", "threshold", "sensitivity",
    "specificity", "ppv", "npv", "accuracy", "balanced_accuracy", "confusion", "calibration", "curves", "histogram",
)  # fmt: skip


def summarise_label_sets(
    *,
    classes: Sequence[str],
    sets: ArrayLike,
    logits: ArrayLike,
    groups: ArrayLike | None,
    loss: float | None,
    thresholds: Mapping[str, dict[str, Any] | None],
    unit: str = "image",
    aggregate: str = "mean",
    num_bootstrap: int = 2000,
    seed: int = 0,
) -> dict:
    """Everything that results.json says about one split; the shape is that of ``summary.summarise`` with several classes.

    Args:
        classes: K names.
        sets: int [n, K]: 1 present, 0 absent, -1 unknown.
        logits: float [n, K], log-odds of each class against its absence.
        groups: [n] patient of each image; None when nothing is known about patients.
        loss: mean loss over the known answers, or None.
        thresholds: class to its threshold at the level of ``unit`` (``fix_thresholds``), None where it has none.
        unit: "image" or "patient", the level of the entry; the other level is added as ``other_level``.
        aggregate: "mean" or "max" of the log-odds of a patient's images whose answer is known.
        num_bootstrap: replicates of the patient bootstrap of the macro AUC; 0 leaves it out.
        seed: of the bootstrap.

    Raises:
        UserError: unit "patient" without groups, an unknown unit or aggregate.
    """
    if unit not in UNITS:
        raise UserError(f"unknown unit {unit!r} of evaluation; valid: {', '.join(UNITS)}")
    images = Sets.of(classes, sets, logits, groups)
    if unit == "patient" and images.codes is None:
        raise UserError(
            "results per patient were asked for, but the data set has no patient groups (group_source: none); "
            "use evaluate.unit = image, or pack the data again with --group-col"
        )
    patients = None if images.codes is None else images.by_patient(aggregate)
    chosen, other = (images, patients) if unit == "image" or patients is None else (patients, images)
    entry = _entry(chosen, thresholds, num_bootstrap, seed) | {"loss": plain(loss), "mixed_label_groups": None}
    entry["aggregate"] = aggregate if unit == "patient" else None
    entry["other_level"] = None
    if other is not None:
        # A threshold belongs to the level that it was fixed on, so the other level has none.
        entry["other_level"] = _entry(other, {}, num_bootstrap, seed) | {"loss": None}
        entry["other_level"]["aggregate"] = aggregate if other.unit == "patient" else None
    return entry


def fix_thresholds(
    *,
    classes: Sequence[str],
    sets: ArrayLike,
    logits: ArrayLike,
    groups: ArrayLike | None,
    unit: str,
    aggregate: str,
    sensitivity: float | None,
) -> Thresholds:
    """Each class's operating point from its known answers in val (``operating.choose_threshold``); None where they are all
    alike. Arguments as ``summarise_label_sets``."""
    level = Sets.of(classes, sets, logits, groups)
    if unit == "patient" and level.codes is not None:
        level = level.by_patient(aggregate)
    found: Thresholds = {}
    for k, name in enumerate(classes):
        cases = level.question(k)
        has_both = len(np.unique(cases.labels)) == 2
        found[name] = choose_threshold(cases.labels, cases.logits, sensitivity=sensitivity) if has_both else None
    return found


@dataclass(frozen=True)
class Sets:
    """The rows of one level: ``sets`` int64 [n, K], ``logits`` float64 [n, K], ``codes`` int64 [n] of patients or None."""

    classes: tuple[str, ...]
    sets: NDArray[np.int64]
    logits: NDArray[np.float64]
    codes: NDArray[np.int64] | None
    unit: str

    @classmethod
    def of(cls, classes: Sequence[str], sets: ArrayLike, logits: ArrayLike, groups: ArrayLike | None) -> Sets:
        """The level of images. Raises ValueError, arrays that don't fit each other or hold no label sets."""
        found, values = np.asarray(sets, dtype=np.int64), np.asarray(logits, dtype=np.float64)
        if found.ndim != 2 or found.shape != values.shape or found.shape[1] != len(classes):
            raise ValueError(f"label sets {found.shape}, logits {values.shape}; expected [n, {len(classes)}] both")
        if not np.isin(found, (UNKNOWN, 0, 1)).all():
            raise ValueError("label sets hold other values than 1, 0 and -1")
        codes = None if groups is None else scores.group_codes(groups)[1]
        return cls(tuple(classes), found, values, codes, "image")

    def known(self, k: int) -> NDArray[np.bool_]:
        return self.sets[:, k] != UNKNOWN

    def question(self, k: int) -> Cases:
        """Class ``k`` as a binary task over the rows whose answer is known."""
        rows = self.known(k)
        logits = self.logits[rows, k]
        codes = None if self.codes is None else self.codes[rows]
        return Cases(("", self.classes[k]), self.sets[rows, k], np.stack([-logits, logits], axis=1), codes, self.unit)

    def by_patient(self, aggregate: str) -> Sets:
        """A row per patient: a class is present if it is in any image, absent if it is absent in all whose answer is known, else
        unknown; its log-odds are the mean or the largest over those images."""
        if self.codes is None:
            raise ValueError("nothing is known about patients")
        num_patients = int(self.codes.max()) + 1 if len(self.codes) else 0
        sets = np.full((num_patients, len(self.classes)), UNKNOWN)
        logits = np.zeros((num_patients, len(self.classes)))
        for k in range(len(self.classes)):
            cases, own = self.question(k), self.codes[self.known(k)]
            if len(own):
                found = scores.by_patient(cases.labels, cases.logits, own, aggregate=aggregate)
                sets[found.groups, k], logits[found.groups, k] = found.labels, found.logits[:, 1]
        return Sets(self.classes, sets, logits, np.arange(num_patients), "patient")


def _entry(level: Sets, thresholds: Mapping[str, dict[str, Any] | None], num_bootstrap: int, seed: int) -> dict:
    per_class = {}
    for k, name in enumerate(level.classes):
        whole = entry_of(level.question(k), thresholds.get(name), 0, seed)
        per_class[name] = {what: whole[what] for what in _OF_A_CLASS} | {"n_unknown": int((~level.known(k)).sum())}
    defined = [row for row in per_class.values() if row["auc"] is not None]
    macro = {
        "auc": mean_of(row["auc"] for row in defined),
        "average_precision": mean_of(row["average_precision"] for row in defined),
        "n_defined": len(defined),
    }
    num_groups = None if level.codes is None else scores.count_groups(level.codes)
    entry = {"unit": level.unit, "n": len(level.sets), "n_groups": num_groups} | dict.fromkeys(_UNDEFINED)
    entry |= _macro_auc(level, num_bootstrap, seed)
    entry["average_precision"] = macro["average_precision"]
    entry["average_precision_chance"] = mean_of(row["prevalence"] for row in defined)
    entry |= {name: mean_of(row[name] for row in per_class.values()) for name in ("brier", "ece", "f1")}
    return entry | {"calibration_event": "each class, mean over classes", "per_class": per_class, "macro": macro}


def _macro_auc(level: Sets, num_bootstrap: int, seed: int) -> dict:
    """The mean of the classes' AUCs with both intervals. A patient's share of it is the mean of its shares of the classes in
    which it has a known answer, so that what one patient adds to several classes counts as one patient's."""
    counted = "image" if level.unit == "image" and level.codes is None else "patient"
    entry: dict[str, Any] = {"auc": None, "auc_undefined": None, "auc_ci": None, "ci_level": LEVEL}
    entry |= {"auc_ci_bootstrap": None, "bootstrap_replicates": 0, "ci_warning": None}
    entry["ci_method"] = intervals.method_name(level.codes, level.unit)
    codes = np.arange(len(level.sets)) if level.codes is None else level.codes
    parts: dict[int, intervals.Components] = {}
    for k in range(len(level.classes)):
        rows = level.known(k)
        found = intervals.components(level.sets[rows, k] == 1, level.logits[rows, k], codes[rows])
        if found is not None:
            parts[k] = found
    if not parts:
        return entry | {
            "auc_undefined": f"undefined: no class has a positive and a negative {level.unit} that are known"
        }
    auc = float(np.mean([found.auc for found in parts.values()]))
    # Obuchowski's variance of one class, and the one-sided bound of a perfect mean, count the patients of each class alone;
    # the variance of a mean adds each patient's shares over the classes.
    several = list(parts.values())
    if len(parts) > 1 and auc not in (0.0, 1.0):
        several = [_over_all(found, codes[level.known(k)], codes) for k, found in parts.items()]
    interval = intervals.mean_interval(several, level=LEVEL, method=entry["ci_method"], counted=counted)
    few = [intervals.small_sample_warning(found, counted, level.classes[k]) for k, found in parts.items()]
    entry |= {"auc": interval.auc, "auc_ci": as_pair(interval.interval), "ci_method": interval.method}
    entry["ci_warning"] = joined(interval.reason, *few)
    if num_bootstrap > 0:
        draws = bootstrap.replicate_aucs(
            patient_strata(level.sets, codes),
            [(level.sets[:, k] == 1, level.logits[:, k]) for k in parts],
            codes,
            num_replicates=num_bootstrap,
            seed=seed,
            known=[level.known(k) for k in parts],
        ).mean(axis=1)
        entry["auc_ci_bootstrap"] = as_pair(bootstrap.percentile_interval(draws, LEVEL))
        entry["bootstrap_replicates"] = len(draws)
    return entry


def _over_all(found: intervals.Components, own: NDArray[np.int64], codes: NDArray[np.int64]) -> intervals.Components:
    """A class's components with a place for every patient, zero where none of the patient's answers is known."""
    patients, size = np.unique(own), int(codes.max()) + 1

    def spread(values: NDArray) -> NDArray:
        whole = np.zeros(size, values.dtype)
        whole[patients] = values
        return whole

    shares, has = (found.positive, found.negative), (found.has_positive, found.has_negative)
    return intervals.Components(found.auc, *(spread(values) for values in (*shares, *has)))


def patient_strata(sets: NDArray[np.int64], codes: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64 [n], the same for all rows of a patient: the rarest class (by patients) that any of them has, K where none has."""
    num_patients, num_classes = int(codes.max()) + 1, sets.shape[1]
    present = np.zeros((num_patients, num_classes), bool)
    rows, columns = np.nonzero(sets == 1)
    present[codes[rows], columns] = True
    by_rarity = np.argsort(present.sum(axis=0), kind="stable")
    rarest = by_rarity[present[:, by_rarity].argmax(axis=1)]
    return np.where(present.any(axis=1), rarest, num_classes)[codes]
