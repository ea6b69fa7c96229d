"""The entry of results.json against scikit-learn, at image and patient level, and where things are undefined."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    balanced_accuracy_score,
    brier_score_loss,
    f1_score,
    recall_score,
    roc_auc_score,
)

from medtl_dist.errors import UserError
from medtl_dist.metrics import scores
from medtl_dist.metrics.bootstrap import bootstrap_auc
from medtl_dist.metrics.intervals import auc_interval
from medtl_dist.metrics.operating import choose_threshold
from medtl_dist.metrics.summary import summarise

BINARY = ["NORMAL", "PNEUMONIA"]
SKIN = ["mel", "nev", "bcc", "akiec"]


def study(num_patients: int = 60, num_classes: int = 2, seed: int = 0) -> dict[str, Any]:
    """Arguments of ``summarise``: patients of one to four images, scores that follow class and patient."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(num_patients), rng.integers(1, 5, num_patients))
    labels = (np.arange(num_patients) % num_classes)[groups]
    outputs = rng.normal(size=(len(labels), num_classes)) + rng.normal(size=(num_patients, num_classes))[groups]
    outputs += 1.5 * np.eye(num_classes)[labels]
    return {
        "classes": BINARY if num_classes == 2 else SKIN[:num_classes],
        "task": "binary" if num_classes == 2 else "multiclass",
        "labels": labels,
        "logits": scores.log_odds(outputs),
        "groups": np.array([f"{g:032x}" for g in groups]),
        "loss": 0.25,
        "threshold": None,
        "num_bootstrap": 100,
    }


def entry_of(given: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return summarise(**(given | changes))


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for inner in value.values() for leaf in leaves(inner)]
    if isinstance(value, list):
        return [leaf for inner in value for leaf in leaves(inner)]
    return [value]


def test_binary_headline_equals_scikit_learn() -> None:
    given = study()
    given["threshold"] = choose_threshold(given["labels"], given["logits"], sensitivity=0.9)
    entry = entry_of(given)
    labels, logits = given["labels"], given["logits"]
    probability = 1 / (1 + np.exp(-logits[:, 1]))
    called = logits[:, 1] >= given["threshold"]["logit"]
    assert entry["auc"] == pytest.approx(roc_auc_score(labels, probability), abs=1e-12)
    assert entry["average_precision"] == pytest.approx(average_precision_score(labels, probability))
    assert entry["average_precision_chance"] == entry["prevalence"] == pytest.approx(labels.mean())
    assert entry["brier"] == pytest.approx(brier_score_loss(labels, probability))
    assert entry["accuracy"]["value"] == pytest.approx(accuracy_score(labels, called))
    assert entry["balanced_accuracy"]["value"] == pytest.approx(balanced_accuracy_score(labels, called))
    assert entry["sensitivity"]["value"] == pytest.approx(recall_score(labels, called))
    assert entry["specificity"]["value"] == pytest.approx(recall_score(1 - labels, ~called))
    assert entry["f1"] == pytest.approx(f1_score(labels, called))
    assert entry["loss"] == 0.25
    assert entry["threshold"] == given["threshold"]
    (tn, fp), (fn, tp) = entry["confusion"]
    assert (tn + fp, fn + tp) == (entry["n_negative"], entry["n_positive"])
    assert tp / (tp + fn) == entry["sensitivity"]["value"]
    assert sum(entry["histogram"]["positive"]) == entry["n_positive"]
    assert sum(entry["histogram"]["negative"]) == entry["n_negative"]
    assert sum(row["n"] for row in entry["calibration"]) == entry["n"]


def test_binary_interval_counts_and_both_classes() -> None:
    given = study()
    entry = entry_of(given)
    wanted = auc_interval(given["labels"], given["logits"][:, 1], given["groups"])
    assert wanted.interval is not None
    assert entry["auc_ci"] == list(wanted.interval)
    assert entry["ci_method"] == "patient-clustered DeLong (Obuchowski), logit scale"
    assert entry["ci_warning"] is None
    assert (entry["n_groups"], entry["n_positive_groups"], entry["n_negative_groups"]) == (60, 30, 30)
    resampled = bootstrap_auc(given["labels"], given["logits"][:, 1], given["groups"], num_replicates=100)
    assert entry["auc_ci_bootstrap"] == list(resampled or ())  # whole patients were drawn
    assert entry["bootstrap_replicates"] == 100
    assert list(entry["per_class"]) == BINARY
    assert entry["per_class"]["NORMAL"]["auc"] == entry["per_class"]["PNEUMONIA"]["auc"] == entry["auc"]
    assert entry["per_class"]["NORMAL"]["prevalence"] == pytest.approx(1 - entry["prevalence"])
    assert entry["macro"] == {
        "auc": entry["auc"],
        "average_precision": pytest.approx(np.mean([entry["per_class"][name]["average_precision"] for name in BINARY])),
        "n_defined": 2,
    }


def test_without_a_threshold_what_needs_one_is_undefined() -> None:
    entry = entry_of(study())
    names = (
        "accuracy",
        "balanced_accuracy",
        "sensitivity",
        "specificity",
        "ppv",
        "npv",
        "f1",
        "confusion",
        "threshold",
    )
    assert [entry[name] for name in names] == [None] * len(names)


def test_macro_is_scikit_learns_one_vs_rest() -> None:
    given = study(num_classes=4, num_patients=80)
    entry = entry_of(given)
    labels = given["labels"]
    probability = scores.probability(given["logits"])
    assert entry["auc"] == entry["macro"]["auc"]
    wanted = roc_auc_score(labels, probability, multi_class="ovr", average="macro")
    assert entry["auc"] == pytest.approx(wanted, abs=1e-12)
    precisions = [average_precision_score(labels == k, probability[:, k]) for k in range(4)]
    assert entry["average_precision"] == pytest.approx(np.mean(precisions))
    assert entry["auc_ci"][0] < entry["auc"] < entry["auc_ci"][1]
    assert entry["auc_ci_bootstrap"] == pytest.approx(entry["auc_ci"], abs=0.05)
    called = probability.argmax(axis=1)
    assert entry["accuracy"]["value"] == pytest.approx(accuracy_score(labels, called))
    assert entry["balanced_accuracy"]["value"] == pytest.approx(balanced_accuracy_score(labels, called))
    assert entry["f1"] == pytest.approx(f1_score(labels, called, average="macro"))
    assert np.array(entry["confusion"]).sum() == entry["n"]
    assert entry["curves"] is None
    assert entry["histogram"] is None
    assert set(entry["per_class"]["mel"]["curves"]) == {"roc", "pr"}
    assert entry["rates"]["nev"]["sensitivity"]["value"] == pytest.approx(recall_score(labels == 1, called == 1))


def test_an_absent_class_is_left_out_of_the_macro_and_said() -> None:
    given = study(num_classes=3)
    given["classes"] = SKIN
    given["logits"] = np.concatenate([given["logits"], np.full((len(given["labels"]), 1), -9.0)], axis=1)
    entry = entry_of(given)
    absent = entry["per_class"]["akiec"]
    assert (absent["auc"], absent["auc_ci"], absent["average_precision"]) == (None, None, None)
    assert absent["auc_undefined"].startswith("undefined: no positive images")
    assert entry["macro"]["n_defined"] == 3
    defined = [entry["per_class"][name]["auc"] for name in SKIN[:3]]
    assert entry["auc"] == pytest.approx(np.mean(defined))
    json.dumps(entry, allow_nan=False)


@pytest.mark.parametrize("aggregate", ["mean", "max"])
def test_patient_level_scores_each_patient_once(aggregate: str) -> None:
    given = study()
    labels, values = [], []
    for group in sorted(set(given["groups"])):
        rows = given["groups"] == group
        labels.append(max(given["labels"][rows]))
        values.append(getattr(np, aggregate)(given["logits"][rows, 1]))
    given["threshold"] = choose_threshold(labels, values)
    given["aggregate"] = aggregate
    entry = entry_of(given, unit="patient")
    assert (entry["unit"], entry["n"], entry["n_groups"], entry["aggregate"]) == ("patient", 60, 60, aggregate)
    assert entry["auc"] == pytest.approx(roc_auc_score(labels, values))
    assert entry["ci_method"] == "DeLong over patients, logit scale"
    assert entry["sensitivity"]["method"] == "Wilson over patients"
    other = entry["other_level"]
    assert (other["unit"], other["n"], other["threshold"]) == ("image", len(given["labels"]), None)
    image_entry = entry_of(given, unit="image", threshold=None)
    assert image_entry["other_level"]["auc"] == entry["auc"]
    assert other["auc"] == image_entry["auc"]
    assert other["auc_ci"] == image_entry["auc_ci"]


def test_mixed_groups_are_listed_and_a_binary_one_is_positive() -> None:
    given = study()
    patient = given["groups"] == f"{4:032x}"
    given["labels"] = np.where(patient, np.arange(len(patient)) % 2, given["labels"])
    assert len(set(given["labels"][patient])) == 2
    entry = entry_of(given)
    assert entry["mixed_label_groups"] == {"count": 1, "groups": [f"{4:032x}"], "left_out_of_patient_level": 0}
    assert (entry["n_positive_groups"], entry["n_negative_groups"], entry["n_groups"]) == (31, 30, 60)
    assert entry["other_level"]["n_positive"] == 31


def test_a_patient_of_several_classes_has_no_patient_level_label() -> None:
    given = study(num_classes=3)
    patient = given["groups"] == f"{4:032x}"
    given["labels"] = np.where(patient, np.arange(len(patient)) % 3, given["labels"])
    entry = entry_of(given)
    assert entry["mixed_label_groups"]["left_out_of_patient_level"] == 1
    assert entry["other_level"]["n"] == 59


def test_without_patients_the_interval_says_what_it_assumes() -> None:
    given = study()
    entry = entry_of(given, groups=None)
    assert "assumes independent images" in entry["ci_method"]
    assert (entry["n_groups"], entry["n_positive_groups"], entry["other_level"]) == (None, None, None)
    assert entry["mixed_label_groups"] is None
    assert entry["auc_ci"] == list(auc_interval(given["labels"], given["logits"][:, 1]).interval or ())
    with pytest.raises(UserError, match="group_source: none"):
        entry_of(given, groups=None, unit="patient")


def test_few_patients_are_unreliable() -> None:
    entry = entry_of(study(num_patients=12))
    assert entry["ci_warning"] == "unreliable: 6 positive patients and 6 negative patients (fewer than 10)"
    several = entry_of(study(num_patients=30, num_classes=4))
    assert "unreliable: 8 positive patients for class mel (fewer than 10)" in several["ci_warning"]


def test_auc_of_one_gets_its_one_sided_bound() -> None:
    given = study()
    sign = np.where(given["labels"] == 1, 5.0, -5.0)
    given["logits"] = np.stack([-sign, sign], axis=1)
    entry = entry_of(given)
    assert entry["auc"] == 1.0
    assert entry["auc_ci"] == pytest.approx([0.05 ** (1 / 30), 1.0])
    assert "one-sided" in entry["ci_method"]
    assert "patient pairs" in entry["ci_method"]
    assert entry["auc_ci_bootstrap"] is None


@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("kept", [0, 1, None])
def test_one_class_or_none_is_undefined_never_nan(num_classes: int, kept: int | None) -> None:
    given = study(num_classes=num_classes)
    rows = given["labels"] == kept if kept is not None else np.zeros(len(given["labels"]), bool)
    given |= {name: given[name][rows] for name in ("labels", "logits", "groups")}
    given["threshold"] = choose_threshold([0, 1], [0.0, 1.0])
    given["loss"] = math.nan
    for groups in (given["groups"], None):
        entry = entry_of(given, groups=groups)
        assert entry["auc"] is None
        assert entry["auc_ci"] is None
        assert entry["auc_undefined"].startswith("undefined: ")
        assert entry["loss"] is None
        text = json.dumps(entry, allow_nan=False)
        assert "NaN" not in text


@pytest.mark.parametrize("num_classes", [2, 3])
def test_the_entry_is_plain_json(num_classes: int) -> None:
    given = study(num_classes=num_classes)
    given["threshold"] = choose_threshold([0, 1], [0.0, 1.0])
    entry = entry_of(given)
    assert json.loads(json.dumps(entry, allow_nan=False)) == entry
    assert {type(leaf) for leaf in leaves(entry)} <= {float, int, str, type(None)}


def test_the_same_seed_gives_the_same_entry() -> None:
    given = study()
    assert entry_of(given) == entry_of(given)
    assert entry_of(given)["auc_ci_bootstrap"] != entry_of(given, seed=1)["auc_ci_bootstrap"]
    assert entry_of(given, num_bootstrap=0)["auc_ci_bootstrap"] is None


def test_saturated_scores_are_still_ranked() -> None:
    """At p = 1 - 1e-20 every probability is 1; the log-odds still tell the images apart."""
    logits = np.array([46.0, 47.0, 48.0, 49.0])
    both = np.stack([-logits, logits], axis=1)
    entry = entry_of(study(), labels=np.array([0, 0, 1, 1]), groups=None, logits=both)
    assert entry["auc"] == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unit": "study"}, "unknown unit 'study'.*image, patient"),
        ({"aggregate": "median"}, "unknown aggregate 'median'.*mean, max"),
        ({"task": "multilabel"}, "'multilabel' cannot be summarised.*binary, multiclass"),
    ],
)
def test_a_wrong_choice_lists_the_valid_ones(change: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        entry_of(study(), **change)
