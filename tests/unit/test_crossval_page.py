"""crossval.html: complete, closed to the outside, and honest where there is little to say."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medtl_dist.errors import DataError, UserError
from medtl_dist.metrics.crossval import summarise_folds
from medtl_dist.report.crossval_page import build_crossval_page


def content(num_classes: int = 2, *, num_repeats: int = 2, labels: np.ndarray | None = None) -> dict[str, Any]:
    """A finished cross-validation of 48 images of 24 patients in 4 folds."""
    rng = np.random.default_rng(0)
    codes = np.tile(np.repeat(np.arange(24), 2), num_repeats)
    labels = codes % num_classes if labels is None else np.tile(labels, num_repeats)
    names = ["<b>well</b>", "sick", "third"][:num_classes]
    numbers = summarise_folds(
        classes=names,
        task="binary" if num_classes == 2 else "multiclass",
        labels=labels,
        logits=rng.normal(size=(len(codes), num_classes)) + np.eye(num_classes)[labels],
        groups=codes,
        groups_known=True,
        folds=codes // num_classes % 4,
        repeats=np.repeat(np.arange(num_repeats), 48),
    )
    for entry in numbers["per_fold"]:
        entry |= {
            "folder": "folds/x",
            "train": {"samples": 36, "groups": 18},
            "epoch": 1,
            "epochs_run": 2,
            "seconds": 3.0,
        }
    return {
        "schema_version": 1, "run": "mine", "task": "binary" if num_classes == 2 else "multiclass", "classes": names,
        "positive_class": None, "folds": 4, "repeats": num_repeats, "epochs_from": "fixed", **numbers,
        "leaves_out": ["Training variance: not counted."], "cautions": ["One thing."],
        "model": {"backbone": "resnet18", "parameters": 11_000_000, "weights": "imagenet"},
        "data": {"name": "set", "sha256": "ab" * 32},
        "provenance": {"finished": "2026-11-23T07:00:00+00:00", "versions": {"medtl_dist": "0"}},
    }  # fmt: skip


def page_of(folder: Path, found: dict[str, Any]) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text("train: {}\n")
    (folder / "crossval.json").write_text(json.dumps(found))
    return build_crossval_page(folder).read_text()


def test_the_page_says_the_result_and_what_its_interval_leaves_out(tmp_path: Path) -> None:
    found = content()
    page = page_of(tmp_path, found)
    assert f"{found['auc']:.3f}" in page
    assert f"{found['auc_ci'][0]:.3f} to {found['auc_ci'][1]:.3f}" in page
    assert "Training variance: not counted." in page
    assert "One thing." in page
    assert len(re.findall(r"<circle [^>]*class=\"(?:dot|ring)\"", page)) == 8 + 1  # the folds, and the headline's scale
    assert page.count("line-other") >= 8
    table = page[page.index("<h2>Trainings") :]
    assert table.count("<tr>") == 1 + 8
    for entry in found["per_fold"]:
        assert f'<th scope="row">{entry["repeat"] + 1}, {entry["fold"] + 1}</th>' in table
    assert page == page_of(tmp_path, found)


def test_names_can_not_become_markup_and_nothing_is_fetched(tmp_path: Path) -> None:
    page = page_of(tmp_path, content())
    assert "<b>well" not in page
    assert "default-src 'none'" in html.unescape(page)
    assert "<script" not in page
    assert not re.search(r"(src|href)=", page)


def test_several_classes_have_a_curve_and_a_row_each(tmp_path: Path) -> None:
    page = page_of(tmp_path, content(3))
    assert "ROC within folds: third" in page
    assert "Each class against the rest, pairs within folds" in page
    assert "mean over classes" in page


def test_an_undefined_auc_is_a_page_too(tmp_path: Path) -> None:
    page = page_of(tmp_path, content(labels=np.zeros(48, int)))
    assert "The AUC is undefined: no fold has patients of both classes." in page
    assert "no pair" in page


def test_a_missing_or_damaged_record_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has not finished"):
        build_crossval_page(tmp_path)
    (tmp_path / "config.yaml").write_text("{}")
    for damage in ("{", "[]", '{"schema_version": 2}', '{"schema_version": 1}'):
        (tmp_path / "crossval.json").write_text(damage)
        with pytest.raises(DataError, match=re.escape(str(tmp_path / "crossval.json"))):
            build_crossval_page(tmp_path)
