"""The numbers of crossval.json from pooled rows, for each kind of task and unit, against counting pairs one by one."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from medtl_dist.data.folds import class_columns, deal_folds
from medtl_dist.metrics.crossval import summarise_folds


def rows(num_patients: int, num_classes: int, *, label_sets: bool = False, num_repeats: int = 2) -> dict[str, Any]:
    """Two images a patient, dealt to 4 folds anew in each repeat, with scores that say something."""
    rng = np.random.default_rng(7)
    codes = np.repeat(np.arange(num_patients), 2)
    groups = np.array([f"g{code:03d}" for code in codes])
    if label_sets:
        labels = (rng.random((len(codes), num_classes)) < 0.4).astype(int)
        labels[rng.random(labels.shape) < 0.15] = -1
        truth = (labels == 1).astype(float)
    else:
        labels = codes % num_classes
        truth = np.eye(num_classes)[labels]
    classes = [f"c{k}" for k in range(num_classes)]
    parts: dict[str, list] = {name: [] for name in ("labels", "logits", "groups", "folds", "repeats")}
    for repeat in range(num_repeats):
        has, _ = class_columns(labels, classes)
        parts["labels"].append(labels)
        logits = truth + rng.normal(size=truth.shape)
        if num_classes == 2 and not label_sets:
            logits[:, 0] = -logits[:, 1]
        parts["logits"].append(logits)
        parts["groups"].append(groups)
        parts["folds"].append(deal_folds(groups.tolist(), has, 4, repeat))
        parts["repeats"].append(np.full(len(codes), repeat))
    task = "multilabel" if label_sets else "binary" if num_classes == 2 else "multiclass"
    whole = {name: np.concatenate(values) for name, values in parts.items()}
    return whole | {"classes": classes, "task": task, "groups_known": True}


def brute_force(given: dict[str, Any], k: int, repeat: int) -> float:
    """Pairs within folds of one repeat that are ranked rightly, counted one by one."""
    won = pairs = 0.0
    here = given["repeats"] == repeat
    labels, values, folds = given["labels"][here], given["logits"][here][:, k], given["folds"][here]
    if labels.ndim == 2:
        positive, negative = labels[:, k] == 1, labels[:, k] == 0
    else:
        positive, negative = labels == k, labels != k
    for i in np.flatnonzero(positive):
        for j in np.flatnonzero(negative & (folds == folds[i])):
            pairs += 1
            won += (values[i] > values[j]) + 0.5 * (values[i] == values[j])
    return won / pairs


@pytest.mark.parametrize(("num_classes", "label_sets"), [(2, False), (3, False), (3, True)])
def test_every_class_and_the_headline_are_the_counts_of_pairs(num_classes: int, label_sets: bool) -> None:
    given = rows(40, num_classes, label_sets=label_sets)
    found = summarise_folds(**given)
    asked = [1] if found["per_class"].keys() == {"c1"} else list(range(num_classes))
    expected = {k: [brute_force(given, k, repeat) for repeat in (0, 1)] for k in asked}
    for k in asked:
        assert found["per_class"][f"c{k}"]["auc"] == pytest.approx(np.mean(expected[k]))
    assert found["auc"] == pytest.approx(np.mean(list(expected.values())))
    assert found["per_repeat"] == pytest.approx(np.mean(list(expected.values()), axis=0))
    assert found["auc_ci"][0] < found["auc"] < found["auc_ci"][1]
    assert (found["n"], found["n_groups"], len(found["per_fold"])) == (80, 40, 8)
    assert sum(entry["n"] for entry in found["per_fold"] if entry["repeat"] == 1) == 80
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    for entry in found["per_class"].values():
        mean = entry["curves"]["mean"]
        assert np.trapezoid(mean["tpr"], mean["fpr"]) == pytest.approx(entry["auc"])


@pytest.mark.parametrize("label_sets", [False, True])
def test_by_patient_a_patient_is_one_row(label_sets: bool) -> None:
    given = rows(40, 2, label_sets=label_sets)
    found = summarise_folds(**given, unit="patient")
    assert (found["unit"], found["n"], found["n_groups"]) == ("patient", 40, 40)
    if label_sets:
        return
    by_hand = dict(given)
    for name in ("labels", "folds", "repeats", "groups"):
        by_hand[name] = given[name][::2]
    by_hand["logits"] = (given["logits"][::2] + given["logits"][1::2]) / 2
    assert found["auc"] == pytest.approx(np.mean([brute_force(by_hand, 1, repeat) for repeat in (0, 1)]))
    largest = summarise_folds(**given, unit="patient", aggregate="max")
    by_hand["logits"] = np.maximum(given["logits"][::2], given["logits"][1::2])
    assert largest["auc"] == pytest.approx(np.mean([brute_force(by_hand, 1, repeat) for repeat in (0, 1)]))


def test_a_fold_of_one_class_counts_in_nothing_and_is_told() -> None:
    given = rows(20, 2, num_repeats=1)
    given["labels"][given["folds"] == 2] = 0
    found = summarise_folds(**given)
    assert found["auc"] == pytest.approx(brute_force(given, 1, 0))
    assert found["folds_without_auc"] == 1
    (entry,) = (one for one in found["per_fold"] if one["auc"] is None)
    assert (entry["fold"], entry["pairs"], entry["n_positive"]) == (2, 0, 0)
    given["labels"][:] = 0
    nothing = summarise_folds(**given)
    assert (nothing["auc"], nothing["spread"]) == (None, None)
    assert nothing["auc_undefined"] == "undefined: no fold has patients of both classes"


def test_images_without_patients_are_called_independent() -> None:
    given = rows(40, 2)
    given["groups_known"] = False
    given["groups"] = np.concatenate([[f"i{i:02d}" for i in range(80)]] * 2)
    found = summarise_folds(**given)
    assert found["n_groups"] is None
    assert "assumes independent images" in found["ci_method"]
