"""`medtl compare` of two finished runs: the difference is of the same images, and what makes it meaningless is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from predict_runs import pack_table, train, write_images
from sklearn.metrics import roc_auc_score
from tiny_backbone import tiny_registered

from medtl_dist.errors import UserError
from medtl_dist.metrics.intervals import compare_auc
from medtl_dist.train.versus import compare_runs, describe


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two runs on one set, and one on another pack of the same images."""
    place = tmp_path_factory.mktemp("versus")
    with tiny_registered():
        table = write_images(place / "images", 80)
        shards = pack_table(table, place / "set", fractions=(0.3, 0.5, 0.2))
        train(shards, place / "one", "optim.lr=0.05")
        train(shards, place / "two", "train.seed=3", "augment.rotation_deg=0")
        train(pack_table(table, place / "again"), place / "elsewhere")
        yield place


def test_the_difference_is_paired_and_clustered(place: Path) -> None:
    content = compare_runs(place / "one", place / "two", "val")
    a, b = (pd.read_parquet(place / run / "predictions" / "val.parquet").sort_values("key") for run in ("one", "two"))
    aucs = [roc_auc_score(one.label, one.logit_SICK) for one in (a, b)]
    found = content["comparison"]
    assert aucs[0] != aucs[1]
    assert (found["auc_a"], found["auc_b"]) == pytest.approx(tuple(aucs), abs=1e-12)
    assert found["difference"] == pytest.approx(aucs[1] - aucs[0], abs=1e-12)
    expected = compare_auc(a.label.to_numpy(), a.logit_SICK.to_numpy(), b.logit_SICK.to_numpy(), a.group.to_numpy())
    assert expected.interval is not None
    assert found["interval"] == pytest.approx((-expected.interval[1], -expected.interval[0])) or found[
        "interval"
    ] == pytest.approx(expected.interval)
    assert content["n"] == len(a) == 40
    changed = {text.split(":")[0] for text in content["config"]}
    assert changed == {"optim.lr", "train.seed", "augment.rotation_deg"}
    assert any("optimistic" in text for text in content["cautions"])
    swapped = compare_runs(place / "two", place / "one", "val")["comparison"]
    assert swapped["difference"] == pytest.approx(-found["difference"])
    lines = describe(content)
    assert any(f"second minus first {found['difference']:+.3f}" in line for line in lines)
    json.dumps(content, allow_nan=False)


def test_other_images_are_refused_with_the_counts(place: Path) -> None:
    with pytest.raises(UserError, match=r"scored different images of val \(the sets set and again: 0 in both, 40 in"):
        compare_runs(place / "one", place / "elsewhere", "val")


def test_a_split_that_was_not_scored_and_a_run_that_has_not_finished(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"one has not scored test: medtl evaluate {place / 'one'} --split test"):
        compare_runs(place / "one", place / "two", "test")
    shutil.copytree(place / "two", tmp_path / "two")
    (tmp_path / "two" / "results.json").unlink()
    with pytest.raises(UserError, match="two: the run has not finished"):
        compare_runs(place / "one", tmp_path / "two", "val")
    with pytest.raises(UserError, match="is not a run folder"):
        compare_runs(place / "one", place / "set", "val")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("classes", ["NORMAL", "ILL"], "differ in classes"),
        ("positive_class", "NORMAL", "differ in positive class"),
        ("task", "multilabel", "task multilabel can't be compared yet"),
    ],
)
def test_runs_that_measure_different_things(place: Path, tmp_path: Path, key: str, value: object, words: str) -> None:
    shutil.copytree(place / "two", tmp_path / "two")
    file = tmp_path / "two" / "results.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(UserError, match=words):
        compare_runs(place / "one", tmp_path / "two", "val")


def test_other_labels_are_refused_and_two_packs_are_told(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "two", tmp_path / "two")
    results = tmp_path / "two" / "results.json"
    known = json.loads(results.read_text())
    known["provenance"]["dataset_sha256"] = "0" * 64
    results.write_text(json.dumps(known))
    content = compare_runs(place / "one", tmp_path / "two", "val")
    assert any("of two packs" in text for text in content["cautions"])
    file = tmp_path / "two" / "predictions" / "val.parquet"
    table = pq.read_table(file)
    labels = table.column("label").to_pylist()
    labels[:2] = [1 - label for label in labels[:2]]
    pq.write_table(table.set_column(table.column_names.index("label"), "label", pa.array(labels)), file)
    with pytest.raises(UserError, match="2 images of val have other labels"):
        compare_runs(place / "one", tmp_path / "two", "val")
