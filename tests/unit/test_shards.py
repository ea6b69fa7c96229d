"""Opening a set: what is damaged, missing or no set at all says so; the index reads back shard by shard."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from shard_sets import key_of, write_set

from medtl_dist.data import index
from medtl_dist.data.pack import PackOptions, pack
from medtl_dist.data.shards import INDEX_FILE, open_dataset, read_shard_rows, read_split
from medtl_dist.errors import DataError, UserError

SHARD = {"name": "train-000000.tar", "samples": 1, "bytes": 1, "sha256": ""}
SHARDS = {"train": [5, 3], "val": [2], "test": [4]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_set(tmp_path / "set", SHARDS)
    return tmp_path / "set"


def changed(folder: Path, **values: Any) -> None:
    path = folder / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values), encoding="utf-8")


def test_row_groups_follow_the_sorted_splits(folder: Path) -> None:
    splits = json.loads((folder / "dataset.json").read_text())["splits"]
    changed(folder, splits={split: splits[split] for split in ("train", "val", "test")})
    dataset = open_dataset(folder)
    assert dataset.splits == ("train", "val", "test")
    assert [shard.row_group for shard in dataset.shards("test")] == [0]
    assert [(shard.row_group, shard.samples) for shard in dataset.shards("train")] == [(1, 5), (2, 3)]
    assert [shard.row_group for shard in dataset.shards("val")] == [3]


def test_rows_read_back_by_shard_and_by_split(folder: Path) -> None:
    dataset = open_dataset(folder)
    second = read_shard_rows(dataset, dataset.shards("train")[1])
    assert [key.hex() for key in second["key"].to_pylist()] == [key_of("train", number) for number in (5, 6, 7)]
    whole = read_split(dataset, "train", ["key", "label"])
    assert whole.column_names == ["key", "label"]
    assert [key.hex() for key in whole["key"].to_pylist()] == [key_of("train", number) for number in range(8)]


def test_a_dataset_goes_to_another_process(folder: Path) -> None:
    dataset = open_dataset(str(folder))
    dataset.shards("train")
    assert pickle.loads(pickle.dumps(dataset)) == dataset  # noqa: S301 - our own bytes


def test_a_split_that_is_not_there(tmp_path: Path) -> None:
    dataset = write_set(tmp_path / "set", {"train": [2]})
    with pytest.raises(UserError, match="has no split 'test'; it has: train"):
        dataset.shards("test")


def test_no_folder_and_no_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder; make one with: medtl data pack SOURCE --out"):
        open_dataset(tmp_path / "none")
    with pytest.raises(UserError, match=r"is not a shard set: it has no dataset.json"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format_version": "1"}'])
def test_a_damaged_dataset_file(folder: Path, text: str) -> None:
    (folder / "dataset.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"dataset.json is damaged"):
        open_dataset(folder)


def test_another_format_version(folder: Path) -> None:
    changed(folder, format_version=2)
    with pytest.raises(UserError, match="has format version 2, this medtl reads version 1"):
        open_dataset(folder)


@pytest.mark.parametrize(
    "values",
    [
        {"splits": {}},
        {"splits": {"train": {"samples": 1, "shards": []}}},
        {"splits": {"dev": {"samples": 0, "shards": []}}},
        {
            "splits": {
                "train": {
                    "samples": 1,
                    "shards": [
                        {"name": "train-000000.tar/../../train-000000.tar", "samples": 1, "bytes": 1, "sha256": ""}
                    ],
                }
            }
        },
        {
            "splits": {
                "train": {"samples": 1, "shards": [{"name": "val-000000.tar", "samples": 1, "bytes": 1, "sha256": ""}]}
            }
        },
        {
            "splits": {
                "train": {
                    "samples": 1,
                    "shards": [{"name": "train-000000.tar", "samples": 1, "bytes": "x", "sha256": ""}],
                }
            }
        },
        {"preprocessing": {"color": "blue"}},
        {"preprocessing": None},
    ],
)
def test_a_dataset_file_that_makes_no_sense(folder: Path, values: dict[str, Any]) -> None:
    changed(folder, **values)
    with pytest.raises(DataError, match="is damaged"):
        open_dataset(folder)


@pytest.mark.parametrize("name", ["train-000001.tar", "index.parquet"])
def test_a_file_missing_or_cut_short(folder: Path, name: str) -> None:
    path = folder / name
    raw = path.read_bytes()
    path.write_bytes(raw[:-1])
    with pytest.raises(DataError, match=f"{name} is damaged: {len(raw) - 1} bytes, {len(raw)} expected"):
        open_dataset(folder)
    path.unlink()
    with pytest.raises(DataError, match=f"{name} is missing"):
        open_dataset(folder)


def test_an_index_with_damaged_bytes_or_of_another_set(folder: Path, tmp_path: Path) -> None:
    dataset = open_dataset(folder)
    other = write_set(tmp_path / "other", {"train": [1, 1], "val": [1], "test": [1]})
    index = Path(dataset.folder) / "index.parquet"
    whole = index.read_bytes()
    index.write_bytes((Path(other.folder) / "index.parquet").read_bytes())
    with pytest.raises(DataError, match=r"does not match dataset.json|is damaged"):
        read_split(dataset, "train")
    index.write_bytes(b"PAR1" + bytes(len(whole) - 8) + b"PAR1")
    damaged = open_dataset(folder)
    damaged.info["index"]["sha256"] = "another"  # else the footer is remembered from the whole index
    with pytest.raises(DataError, match=r"index.parquet is damaged"):
        read_shard_rows(damaged, damaged.shards("train")[0])


def test_a_large_index_is_read_by_each_row_groups_own_description(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(40):
        place = tmp_path / "tree" / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(place / f"{number}.png"), np.full((9, 9), number, np.uint8))
    dataset = pack(tmp_path / "tree", tmp_path / "set", PackOptions())
    shards = [shard for split in dataset.splits for shard in dataset.shards(split)]
    assert len(shards) > 3
    whole = [read_shard_rows(dataset, shard) for shard in shards]
    monkeypatch.setattr(index, "WHOLE_FOOTER_BYTES", 0)
    monkeypatch.setattr(index, "_local_footer", None)  # not to be asked
    for shard, expected in zip(shards, whole, strict=True):
        assert read_shard_rows(dataset, shard).equals(expected)
        assert read_shard_rows(dataset, shard, ["key", "label"]).equals(expected.select(["key", "label"]))
    path = Path(dataset.folder) / INDEX_FILE
    data = bytearray(path.read_bytes())
    start = dataset.info["index"]["row_groups"][shards[2].row_group]
    data[start : start + 40] = bytes(40)
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"index\.parquet is damaged"):
        read_shard_rows(dataset, shards[2])


def test_a_footer_described_wrongly_is_damage(tmp_path: Path) -> None:
    write_set(tmp_path / "set", {"train": [3, 4]})
    file = tmp_path / "set" / "dataset.json"
    info = json.loads(file.read_text())
    for footer, row_groups in (([0, 5, 9, 20], [6, 7]), ([0, 5, 9, 20], [6, 8, 7]), ([0, 5, 9, 10**9], [6, 7, 8])):
        info["index"] |= {"footer": footer, "row_groups": row_groups}
        file.write_text(json.dumps(info))
        with pytest.raises(DataError, match=r"dataset\.json is damaged \(the index's footer"):
            open_dataset(tmp_path / "set")


@pytest.mark.parametrize("counts", [7, {"a": -1}, {"a": True}, ["a"]])
def test_counts_that_are_none_are_damage(tmp_path: Path, counts: Any) -> None:
    write_set(tmp_path / "set", {"train": [3]})
    file = tmp_path / "set" / "dataset.json"
    info = json.loads(file.read_text())
    info["splits"]["train"]["shards"][0]["classes"] = counts
    file.write_text(json.dumps(info))
    with pytest.raises(DataError, match="has no counts of its classes"):
        open_dataset(tmp_path / "set")
