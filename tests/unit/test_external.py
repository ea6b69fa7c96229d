"""External validation against scikit-learn; classes are mapped as said, and what the run knows is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
from predict_runs import pack_table, train, write_images
from sklearn.metrics import brier_score_loss, log_loss, recall_score, roc_auc_score
from tiny_backbone import tiny_registered

from medtl_dist.data.shards import Dataset, open_dataset
from medtl_dist.errors import LeakageError, UserError
from medtl_dist.report.external import beside, build_external_page
from medtl_dist.run import Folder
from medtl_dist.train import results
from medtl_dist.train.class_map import map_classes, parse_class_map
from medtl_dist.train.evaluate import cross_entropy
from medtl_dist.train.external import evaluate_external
from medtl_dist.train.predict import PredictOptions, predict


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """set/ and run/ of it; elsewhere/: other images, with classes healthy, ill and very ill."""
    place = tmp_path_factory.mktemp("external")
    with tiny_registered():
        train(pack_table(write_images(place / "images"), place / "set"), place / "runs" / "run", "optim.lr=0.1")
        table = write_images(place / "others", 40, classes=("healthy", "ill", "very ill"), seed=7)
        pack_table(table, place / "elsewhere", image_size_px=64, color="rgb")
        yield place


MAP = {"healthy": "NORMAL", "ill": "SICK", "very ill": "SICK"}


def _copy(place: Path, tmp_path: Path) -> Path:
    shutil.copytree(place / "runs" / "run", tmp_path / "runs" / "run")
    return tmp_path / "runs" / "run"


def test_the_numbers_are_scikit_learns_on_the_predictions(place: Path, tmp_path: Path) -> None:
    run = _copy(place, tmp_path)
    content = evaluate_external(Folder.local(run), str(place / "elsewhere"), class_map=MAP)
    folder = run / "external" / "elsewhere"
    assert content == json.loads((folder / "external.json").read_text()) | {"folder": str(folder)}
    parts = [pd.read_parquet(folder / "predictions" / f"{split}.parquet") for split in ("train", "val", "test")]
    table = pd.concat(parts)
    index = pd.read_parquet(place / "elsewhere" / "index.parquet")
    assert sorted(table.key) == sorted(key.hex() for key in index.key)  # every image, once
    both = table.merge(index.assign(key=[key.hex() for key in index.key]), on="key")
    assert (both.label_x == np.array([0, 1, 1])[both.label_y]).all()
    entry, known = content["entry"], results.read_results(Folder.local(run))
    assert entry["auc"] == pytest.approx(roc_auc_score(table.label, table.logit_SICK), abs=1e-12)
    assert entry["auc_ci"][0] < entry["auc"] < entry["auc_ci"][1]
    assert "clustered" in entry["ci_method"]
    assert entry["n_groups"] == 20
    assert entry["brier"] == pytest.approx(brier_score_loss(table.label, table.score_SICK), abs=1e-12)
    assert entry["loss"] == pytest.approx(log_loss(table.label, table.score_SICK), abs=1e-12)
    assert entry["prevalence"] == pytest.approx(table.label.mean())
    assert entry["prevalence"] > 0.6
    called = table.logit_SICK >= known["threshold"]["logit"]  # as it was fixed on val
    assert 0 < called.mean() < 1
    assert entry["sensitivity"]["value"] == pytest.approx(recall_score(table.label, called))
    assert entry["specificity"]["value"] == pytest.approx(recall_score(table.label, called, pos_label=0))
    assert content["own"]["val"]["prevalence"] == known["splits"]["val"]["prevalence"]
    assert any(text.startswith(f"Prevalence is {entry['prevalence']:.3f} here and") for text in content["cautions"])
    assert known == results.read_results(Folder.local(place / "runs" / "run"))  # the run's own results are as before


def test_the_predictions_are_those_of_predict(place: Path, tmp_path: Path) -> None:
    run = _copy(place, tmp_path)
    evaluate_external(Folder.local(run), str(place / "elsewhere"), class_map=MAP, split="val")
    scored = pd.read_parquet(run / "external" / "elsewhere" / "predictions" / "val.parquet")
    predict(run, str(place / "elsewhere"), tmp_path / "scores.parquet", PredictOptions(part_size=8))
    both = scored.merge(pd.read_parquet(tmp_path / "scores.parquet"), on="key", suffixes=("", "_too"))
    assert len(both) == len(scored) > 5
    assert (both.logit_SICK == both.logit_SICK_too).all()
    assert (both.group == both.group_too).all()


def test_opening_their_test_split_is_counted_and_the_others_are_not(place: Path, tmp_path: Path) -> None:
    run = _copy(place, tmp_path)
    told = [
        evaluate_external(Folder.local(run), str(place / "elsewhere"), class_map=MAP, split=split)["test_openings"]
        for split in ("val", "test", "all", "train")
    ]
    assert told == [None, {"count": 1, "configurations": 1}, {"count": 2, "configurations": 1}, None]
    lines = (tmp_path / "runs" / "test_openings.jsonl").read_text().splitlines()
    assert {json.loads(line)["dataset_sha256"] for line in lines} == {open_dataset(place / "elsewhere").sha256}
    with pytest.raises(UserError, match=r"--split dev: .* has train, val, test; all of them: --split all"):
        evaluate_external(Folder.local(run), str(place / "elsewhere"), class_map=MAP, split="dev")


def test_what_the_run_knows_is_no_external_set(place: Path, tmp_path: Path) -> None:
    run = _copy(place, tmp_path)
    with pytest.raises(UserError, match="is the set of this run"):
        evaluate_external(Folder.local(run), str(place / "set"))
    pack_table(place / "images" / "labels.csv", tmp_path / "repacked", seed=3)  # the same bytes under other keys
    with pytest.raises(LeakageError, match="shares 48 images with the same bytes with the set"):
        evaluate_external(Folder.local(run), str(tmp_path / "repacked"))
    secret = place / "set.private" / "key"
    pack_table(place / "images" / "labels.csv", tmp_path / "smaller", image_size_px=60, key_file=secret)
    with pytest.raises(LeakageError, match="shares 48 keys, 24 patients with"):
        evaluate_external(Folder.local(run), str(tmp_path / "smaller"))
    _lose_the_set(run)
    with pytest.raises(LeakageError, match="shares 12 keys, 6 patients with"):  # val, which the run has scored
        evaluate_external(Folder.local(run), str(tmp_path / "smaller"))
    content = evaluate_external(Folder.local(run), str(place / "elsewhere"), class_map=MAP)
    assert content["overlap"] == {"compared_with": "the images that the run has scored", "compared": ["key", "group"]}
    assert not (run / "external" / "smaller").exists()


def _lose_the_set(run: Path) -> None:
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(re.sub(r"shards: .*", "shards: /gone", config))


def test_a_folder_holds_one_set(place: Path, tmp_path: Path) -> None:
    run = _copy(place, tmp_path)
    evaluate_external(Folder.local(run), str(place / "elsewhere"), class_map=MAP, split="val", name="clinic #2/../x")
    assert [entry.name for entry in (run / "external").iterdir()] == ["clinic-2-..-x"]
    pack_table(write_images(tmp_path / "more", seed=9), tmp_path / "third")
    with pytest.raises(UserError, match="holds the scores of another set: give this one a name with --name"):
        evaluate_external(Folder.local(run), str(tmp_path / "third"), name="clinic #2/../x")
    again = evaluate_external(
        Folder.local(run), str(place / "elsewhere"), class_map=MAP, split="all", name="clinic #2/../x"
    )
    assert again["splits"] == ["train", "val", "test"]


def test_the_page_says_both_sets_numbers_and_runs_nothing(place: Path, tmp_path: Path) -> None:
    run = _copy(place, tmp_path)
    content = evaluate_external(Folder.local(run), str(place / "elsewhere"), class_map=MAP)
    page = build_external_page(Path(content["folder"])).read_text()
    assert "run on elsewhere" in page
    assert "very ill is SICK" in page
    rows = dict(beside(content))
    assert rows["Prevalence"] == [
        f"{content['entry']['prevalence'] * 100:.1f}%",
        f"{content['own']['val']['prevalence'] * 100:.1f}%",
    ]
    for cells in rows.values():
        assert all(cell in page for cell in cells)
    for text in content["cautions"]:
        assert text.split("'")[0] in page
    assert "<script" not in page
    assert "default-src 'none'" in page.replace("&#39;", "'")
    assert page == build_external_page(Path(content["folder"])).read_text()
    assert (run / "external" / "elsewhere" / "report.html").is_file()


def test_several_classes_are_mapped_by_name_and_one_may_be_absent(place: Path, tmp_path: Path) -> None:
    table = write_images(tmp_path / "images", 48, classes=("a", "b", "c"))
    run = train(pack_table(table, tmp_path / "set"), tmp_path / "run")
    pack_table(write_images(tmp_path / "two", 40, classes=("c", "a"), seed=5), tmp_path / "two-set")
    content = evaluate_external(Folder.local(run), str(tmp_path / "two-set"))
    folder = run / "external" / "two-set" / "predictions"
    scored = pd.concat([pd.read_parquet(folder / f"{split}.parquet") for split in content["splits"]])
    assert set(scored.label) == {0, 2}
    for k, name in enumerate(("a", "b", "c")):
        told = content["entry"]["per_class"][name]["auc"]
        expected = None if name == "b" else roc_auc_score(scored.label == k, scored[f"logit_{name}"])
        assert told == (None if expected is None else pytest.approx(expected, abs=1e-12))
    assert "No image here is of b: those classes are not judged." in content["cautions"]
    assert "Prevalence of b" in dict(beside(content))
    build_external_page(Path(content["folder"]))


def test_the_loss_follows_from_log_odds() -> None:
    from medtl_dist.metrics.scores import log_odds

    rng = np.random.default_rng(0)
    outputs, labels = rng.normal(size=(50, 4)), rng.integers(0, 4, 50)
    logits = log_odds(outputs)
    assert np.logaddexp(0, -logits[np.arange(50), labels]).mean() == pytest.approx(
        cross_entropy(outputs, labels), rel=1e-12
    )


def _set(classes: list[str], task: str = "binary") -> Dataset:
    return cast(Any, SimpleNamespace(classes=tuple(classes), task=task, folder="elsewhere"))


def test_a_class_map_names_theirs_once() -> None:
    assert parse_class_map(" viral=SICK , well = NORMAL") == {"viral": "SICK", "well": "NORMAL"}
    for text in ("viral", "viral=", "=SICK", "a=b,a=c", ""):
        with pytest.raises(UserError, match="expected theirs=ours"):
            parse_class_map(text)


def test_classes_without_a_counterpart_are_listed() -> None:
    ours = ["NORMAL", "SICK"]
    assert map_classes(_set(["SICK", "NORMAL"]), ours, "binary", {}).places == (1, 0)
    with pytest.raises(UserError, match=r"does not know: well, ill \(theirs: well, ill; ours: NORMAL, SICK\)"):
        map_classes(_set(["well", "ill"]), ours, "binary", {})
    with pytest.raises(UserError, match="--class-map names fever, COLD, which is no such class"):
        map_classes(_set(["well", "ill"]), ours, "binary", {"fever": "SICK", "well": "COLD"})
    with pytest.raises(UserError, match="no class of elsewhere stands for NORMAL"):
        map_classes(_set(["SICK", "ill"]), ours, "binary", {"ill": "SICK"})
    with pytest.raises(UserError, match="is multilabel and the run binary"):
        map_classes(_set(ours, "multilabel"), ours, "binary", {})


def test_label_sets_are_joined_and_unknown_is_never_absent() -> None:
    mapped = map_classes(
        _set(["x", "y", "mass"], "multilabel"), ["mass", "nodule", "node"], "multilabel", {"x": "nodule", "y": "nodule"}
    )
    assert mapped.without_images == ("node",)
    rows = [[1, 0, 1], [0, 0, None], [0, None, 0], [None, 1, 0]]
    assert mapped.labels(rows).tolist() == [[1, 1, -1], [-1, 0, -1], [0, -1, -1], [0, 1, -1]]
