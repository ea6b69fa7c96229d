"""Packing of real sets: Kermany's chest X-rays by table, and PneumoniaMNIST."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from medtl_dist.data.pack import PackOptions, pack
from medtl_dist.data.shards import Dataset, read_split
from medtl_dist.data.sources import Columns, read_folder
from medtl_dist.errors import LeakageError

DATA = Path(os.environ.get("MEDTL_DATA_DIR", Path(__file__).parents[2] / "../shared/data")).resolve()
KERMANY = DATA / "kermany_cxr_224/labels.csv"
PNEUMONIAMNIST = DATA / "medmnist/pneumoniamnist.npz"
NIH = DATA / "nih_cxr14_native/labels.csv"


def needs(path: Path) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not path.exists(), reason=f"no {path.relative_to(DATA)} in MEDTL_DATA_DIR")


def rows_of(dataset: Dataset) -> list[dict]:
    return [row for split in dataset.splits for row in read_split(dataset, split).to_pylist()]


def image_of(dataset: Dataset, row: dict) -> np.ndarray:
    with (Path(dataset.folder) / row["shard"]).open("rb") as file:
        file.seek(row["offset"])
        data = file.read(row["size"])
    assert hashlib.sha256(data).digest() == row["sha256"]
    return np.asarray(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED))


@needs(KERMANY)
def test_kermany_by_patient(tmp_path: Path) -> None:
    """5,840 images; the given test split is kept, val comes out of train by patient, RGB files of grey images are grey."""
    columns = Columns(label="class", group=("split+patient_id",), split="split", keep=("etiology",))
    dataset = pack(KERMANY, tmp_path / "set", PackOptions(columns=columns))
    assert dataset.info["found"] == 5840
    assert dataset.info["excluded"] == []
    assert (dataset.classes, dataset.color) == (("NORMAL", "PNEUMONIA"), "grey")
    splits = dataset.info["splits"]
    assert splits["test"]["classes"] == {"NORMAL": 234, "PNEUMONIA": 390}
    for label, given in (("NORMAL", 1341), ("PNEUMONIA", 3875)):
        assert splits["train"]["classes"][label] + splits["val"]["classes"][label] == given
        assert abs(splits["val"]["classes"][label] / given - 0.15 / 0.85) < 0.005

    rows = rows_of(dataset)
    assert len({row["key"] for row in rows}) == 5840
    seen: dict[str, set[str]] = {}
    for row in rows:
        seen.setdefault(row["group"], set()).add(row["split"])
    assert Counter(map(len, seen.values())) == {1: len(seen)}
    assert {row["etiology"] for row in rows} == {"bacteria", "virus", None}

    files = {row["key"]: row["file"] for row in pq.read_table(tmp_path / "set.private/linkage.parquet").to_pylist()}
    for row in rows[::500]:
        with Image.open(KERMANY.parent / files[row["key"].hex()]) as image:
            original = np.asarray(image)[..., 0].astype(int)
        assert np.abs(image_of(dataset, row) - original).mean() < 1.5


@needs(KERMANY)
def test_kermany_patient_numbers_start_again_in_test(tmp_path: Path) -> None:
    columns = Columns(label="class", group=("patient_id",), split="split")
    with pytest.raises(LeakageError, match=r"170 of \d+ groups .*--group-col split\+patient_id") as caught:
        pack(KERMANY, tmp_path / "set", PackOptions(columns=columns))
    assert "person" not in caught.value.message
    assert caught.value.exit_code == 4


@needs(KERMANY)
def test_kermany_as_a_folder(tmp_path: Path) -> None:
    listing = read_folder(KERMANY.parent / "images")
    assert Counter(zip(listing.splits, listing.labels, strict=True)) == {
        ("train", "NORMAL"): 1341,
        ("train", "PNEUMONIA"): 3875,
        ("test", "NORMAL"): 234,
        ("test", "PNEUMONIA"): 390,
    }
    dataset = pack(KERMANY.parent / "images/test", tmp_path / "set", PackOptions(image_size_px=64, num_workers=1))
    assert (dataset.group_source, dataset.info["split_source"]["method"]) == ("none", "by image")
    assert [dataset.info["splits"][split]["samples"] for split in dataset.splits] == [437, 94, 93]
    assert {(row["width"], row["height"]) for row in rows_of(dataset)} == {(64, 64)}


@needs(PNEUMONIAMNIST)
def test_pneumoniamnist_keeps_its_official_splits(tmp_path: Path) -> None:
    dataset = pack(PNEUMONIAMNIST, tmp_path / "set")
    counts = {split: entry["classes"] for split, entry in dataset.info["splits"].items()}
    assert counts == {
        "train": {"0": 1214, "1": 3494},
        "val": {"0": 135, "1": 389},
        "test": {"0": 234, "1": 390},
    }
    assert dataset.group_source == "none"
    files = {row["key"]: row["row"] for row in pq.read_table(tmp_path / "set.private/linkage.parquet").to_pylist()}
    with np.load(PNEUMONIAMNIST, allow_pickle=False) as archive:
        for split in dataset.splits:
            images = archive[f"{split}_images"]
            for row in read_split(dataset, split).to_pylist()[::50]:
                assert np.array_equal(image_of(dataset, row), images[files[row["key"].hex()]])


@needs(NIH)
def test_nih_at_a_quarter_of_its_size(tmp_path: Path) -> None:
    columns = Columns(label="class", group=("patient_id",), split="split", keep=("age", "sex", "view"))
    dataset = pack(NIH, tmp_path / "set", PackOptions(columns=columns, image_size_px=256, num_workers=1))
    rows = rows_of(dataset)
    assert len(rows) == 153
    assert {(row["width"], row["height"], row["channels"]) for row in rows} == {(256, 256, 1)}
    assert {row["sex"] for row in rows} == {"M", "F"}
    assert sum(entry["groups"] for entry in dataset.info["splits"].values()) == 115
