"""Outliers and shortcuts: planted ones are found, plain sets have none, and the AUC is scikit-learn's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from audit_sets import Entry, base, pack_entries, texture
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from medtl_dist.data.audit import Audit, audit
from medtl_dist.data.audit_outliers import outliers
from medtl_dist.data.audit_shortcuts import _auc, _weighted_wins
from medtl_dist.data.findings import Finding


def finding(audited: Audit, kind: str) -> Finding | None:
    return next((entry for entry in audited.findings if entry.kind == kind), None)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Audit:
    """80 images and 4 odd ones; age tells the label; sick images have a bright strip at the left."""
    entries = []
    for number, entry in enumerate(base()):
        image = entry.image.copy()
        if entry.label == "sick":
            image[:, :5] = 250
        entries.append(entry._replace(image=image, age=60 + number % 3 if entry.label == "sick" else 30 + number % 3))
    entries += [
        Entry(255 - texture(200), "Doe-negative", "train"),
        Entry(np.ascontiguousarray(texture(201)[::-1]), "Doe-turned", "train", "sick"),
        Entry(np.full((96, 96), 77, np.uint8), "Doe-blank", "val"),
        Entry((texture(202) // 32 + 245).astype(np.uint8), "Doe-white", "train"),
    ]
    return audit(pack_entries(tmp_path_factory.mktemp("odd"), entries), num_workers=1)


def key_of(audited: Audit, patient: str) -> str:
    import pyarrow.parquet as pq

    table = pq.read_table(Path(f"{audited.seen.dataset.folder}.private") / "linkage.parquet")
    rows = zip(table.column("group_name").to_pylist(), table.column("key").to_pylist(), strict=True)
    return dict(rows)[patient]


@pytest.mark.parametrize(
    ("kind", "patient"),
    [
        ("opposite_polarity", "Doe-negative"),
        ("turned_images", "Doe-turned"),
        ("blank_images", "Doe-blank"),
        ("unusual_intensity", "Doe-white"),
    ],
)
def test_the_odd_image_is_pointed_at(odd: Audit, kind: str, patient: str) -> None:
    found = finding(odd, kind)
    assert found is not None
    assert [item["key"] for item in found.items] == [key_of(odd, patient)]
    assert found.level != "leakage"


def test_shortcuts_are_told_with_their_intervals(odd: Audit) -> None:
    tried = {facts["from"]: facts for facts in odd.summary["shortcuts"]}
    assert tried["column age"]["auc"] > 0.95
    assert tried["the image's borders"]["auc"] > 0.9
    for facts in tried.values():
        low, high = facts["auc_ci"]
        assert 0 <= low <= facts["auc"] <= high <= 1
        assert facts["groups"] == facts["images"] == 84
    said = {finding.items[0]["from"] for finding in odd.findings if finding.kind == "shortcut"}
    assert {"column age", "the image's borders"} <= said


def test_a_plain_set_has_neither(tmp_path: Path) -> None:
    audited = audit(pack_entries(tmp_path, base()), num_workers=1)
    kinds = {entry.kind for entry in audited.findings}
    assert not kinds & {"opposite_polarity", "turned_images", "blank_images", "unusual_intensity", "shortcut"}
    for facts in audited.summary["shortcuts"]:
        assert facts["auc_ci"][0] < 0.6, facts


def test_a_split_of_one_class_and_vendor_windows_are_said(odd: Audit) -> None:
    labels = np.where(odd.seen.split == 2, 0, odd.seen.label).astype(np.int32)
    info = odd.seen.dataset.info | {"preprocessing": odd.seen.dataset.info["preprocessing"] | {"window": "tags"}}
    seen = replace(odd.seen, label=labels, dataset=replace(odd.seen.dataset, info=info))
    found = {entry.kind: entry for entry in outliers(seen)}
    assert found["one_class_split"].items == [{"split": "test"}]
    assert "vendor" in found["vendor_windows"].text
    assert not {"one_class_split", "vendor_windows"} & {entry.kind for entry in odd.findings}


@given(st.integers(0, 10_000), st.integers(4, 40))
@settings(max_examples=30, deadline=None)
def test_weighted_wins_are_those_of_repeated_images(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 6, count).astype(float)  # with ties
    positive = np.arange(count) % 3 == 0
    weights = rng.integers(0, 4, (3, count)).astype(float)
    wins, pairs = _weighted_wins(scores, positive, weights)
    for row in range(3):
        repeats = weights[row].astype(int)
        s, p = np.repeat(scores, repeats), np.repeat(positive, repeats)
        if 0 < p.sum() < len(p):
            assert wins[row] / pairs[row] == pytest.approx(roc_auc_score(p, s))
        assert pairs[row] == p.sum() * (~p).sum()


def test_auc_counts_pairs_within_folds_and_its_interval_is_as_wide_as_delongs() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(400) % 2
    scores = rng.standard_normal(400) + labels
    folds = np.arange(400) // 2 % 5
    shifted = scores + 100 * folds  # a shift of a whole fold says nothing
    both = np.stack([-shifted, shifted], axis=1)
    auc, low, high = _auc(both, labels, np.arange(400), folds, 0)
    parts = [roc_auc_score(labels[folds == fold], scores[folds == fold]) for fold in range(5)]
    assert auc == pytest.approx(np.mean(parts), abs=0.001)
    # Hanley and McNeil's standard error of an AUC of .76 from 200 and 200: about 0.024
    assert high - low == pytest.approx(2 * 1.96 * 0.024, rel=0.35)
