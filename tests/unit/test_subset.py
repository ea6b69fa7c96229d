"""Fold sets: an ordinary set of the same bytes, from train and val alone, the same each time."""

from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shard_sets import write_set

from medtl_dist.data.encoding import Stored
from medtl_dist.data.plan import Piece
from medtl_dist.data.reader import Reader
from medtl_dist.data.shard_writer import Facts, SetWriter, SplitCounts, write_dataset_file
from medtl_dist.data.shards import Dataset, Shard, open_dataset, read_shard_rows, read_split
from medtl_dist.data.subset import epochs_fixed, read_members, write_fold_set
from medtl_dist.data.verify import verify
from medtl_dist.errors import DataError, UserError

FOLD = {"repeat": 0, "fold": 1, "num_folds": 3, "epochs": "fixed"}


@pytest.fixture
def source(tmp_path: Path) -> Dataset:
    return write_set(tmp_path / "set", {"train": [7, 6], "val": [5], "test": [4]})


def images_of(dataset: Dataset, split: str) -> dict[str, bytes]:
    """Key to stored bytes, by the plain way: the tar's own members."""
    found: dict[str, bytes] = {}
    for shard in dataset.shards(split):
        with tarfile.open(Path(dataset.folder) / shard.name) as tar:
            for member in tar.getmembers():
                if not member.name.endswith(".json"):
                    file = tar.extractfile(member)
                    assert file is not None
                    found[member.name.partition(".")[0]] = file.read()
    return found


def rows_by_fold(num: int) -> dict[str, list[int]]:
    return {"train": [i for i in range(num) if i % 3], "val": [0, 3], "test": [i for i in range(num) if i % 3 == 0]}


def test_a_fold_set_is_an_ordinary_set_of_the_same_bytes(source: Dataset, tmp_path: Path) -> None:
    members = read_members(source)
    assert len(members) == 18
    held_out = [row for row, group in enumerate(members.groups) if group in ("p0", "p1")]
    rows_of = {"train": [row for row in range(18) if row not in held_out], "test": held_out}
    made = write_fold_set(members, rows_of, tmp_path / "fold", FOLD, seed=3)
    assert made.splits == ("train", "test")
    originals = images_of(source, "train") | images_of(source, "val")
    for split, rows in rows_of.items():
        assert images_of(made, split) == {members.keys[row].hex(): originals[members.keys[row].hex()] for row in rows}
        index = {row["key"]: row for row in read_split(made, split).to_pylist()}
        for row in rows:
            before = members.table.slice(row, 1).to_pylist()[0]
            same = ("sha256", "domain", "label", "group", "size", "width", "height", "channels")
            assert {name: index[before["key"]][name] for name in same} == {name: before[name] for name in same}
    assert made.info["fold"] == FOLD | {"of_dataset_sha256": source.sha256}
    assert made.info["splits"]["test"]["classes"] == {"NORMAL": 6, "PNEUMONIA": 5}
    assert made.info["splits"]["test"]["groups"] == 2
    faults = verify(made.folder, num_workers=1).faults
    assert [fault for fault in faults if "no hash" not in fault.what] == []  # the tests' sets have plain names
    assert epochs_fixed(made)
    assert not epochs_fixed(source)


def test_the_same_fold_is_the_same_bytes(source: Dataset, tmp_path: Path) -> None:
    members = read_members(source)
    rows_of = {"train": list(range(9)), "test": list(range(9, 18))}
    one = write_fold_set(members, rows_of, tmp_path / "one", FOLD, seed=3)
    again = write_fold_set(members, rows_of, tmp_path / "again", FOLD, seed=3)
    assert one.sha256 == again.sha256
    other = write_fold_set(members, rows_of, tmp_path / "other", FOLD, seed=4)
    assert other.sha256 != one.sha256
    for name in ("index.parquet", "train-000000.tar"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_whole_fold_set_is_kept_and_another_one_refused(source: Dataset, tmp_path: Path) -> None:
    members = read_members(source)
    rows_of = {"train": list(range(9)), "test": list(range(9, 18))}
    one = write_fold_set(members, rows_of, tmp_path / "fold", FOLD, seed=3)
    before = (tmp_path / "fold" / "dataset.json").stat().st_mtime_ns
    assert write_fold_set(members, rows_of, tmp_path / "fold", FOLD, seed=3).sha256 == one.sha256
    assert (tmp_path / "fold" / "dataset.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="another set"):
        write_fold_set(members, rows_of, tmp_path / "fold", FOLD | {"fold": 2}, seed=3)


def test_test_is_never_opened(source: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for shard in source.shards("test"):
        path = Path(source.folder) / shard.name
        path.write_bytes(b"\xff" * shard.bytes)  # whoever read it would know
    opened: list[str] = []

    def noted(dataset: Dataset, shard: Shard) -> pa.Table:
        opened.append(shard.split)
        return read_shard_rows(dataset, shard)

    monkeypatch.setattr("medtl_dist.data.subset.read_shard_rows", noted)
    members = read_members(source)
    assert set(opened) == {"train", "val"}
    test_keys = {key.hex() for key in read_split(source, "test", ["key"]).column("key").to_pylist()}
    assert test_keys.isdisjoint(key.hex() for key in members.keys)
    write_fold_set(members, {"train": range(9), "test": range(9, 18)}, tmp_path / "fold", FOLD, seed=0)


def test_a_flipped_byte_is_told_by_its_key(source: Dataset, tmp_path: Path) -> None:
    row = read_split(source, "train").to_pylist()[2]
    path = Path(source.folder) / row["shard"]
    raw = bytearray(path.read_bytes())
    raw[row["offset"] + row["size"] // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DataError, match=row["key"].hex()):
        write_fold_set(read_members(source), {"train": range(9), "test": range(9, 18)}, tmp_path / "fold", FOLD, seed=0)
    assert not (tmp_path / "fold").exists()
    assert not list(tmp_path.glob(".fold*"))


def write_label_sets(folder: Path, num: int = 12) -> Dataset:
    """A set with a label set per image and a kept column, by the packing side's own writer."""
    folder.mkdir()
    classes = ("Effusion", "Mass")
    writer = SetWriter(folder, pa.schema([pa.field("age", pa.int64())]), "png", classes)
    counts = SplitCounts(classes, classes)
    writer.begin_split("train", num)
    for i in range(num):
        data = f"image {i}".encode()
        label = ((i % 2), (None if i % 5 == 0 else i % 3 % 2))
        names = tuple(name for name, answer in zip(classes, label, strict=True) if answer == 1)
        digest = hashlib.sha256(data).digest()
        facts = Facts(digest[:16], f"p{i // 2}", label, names, None, {"age": 40 + i})
        writer.add(facts, Stored(data, digest, 8, 8, 1))
        counts.add(facts)
    splits = {"train": counts.as_dict() | {"shards": writer.end_split()}}
    info = {"format_version": 1, "task": "multilabel", "classes": list(classes), "positive_class": None,
            "preprocessing": {"image_size_px": None, "color": "grey", "encoding": "png"}, "splits": splits,
            "group_source": "column patient_id", "index": writer.finish()}  # fmt: skip
    write_dataset_file(folder, info)
    return open_dataset(folder)


def test_label_sets_and_kept_columns_come_along(tmp_path: Path) -> None:
    source = write_label_sets(tmp_path / "set")
    members = read_members(source)
    assert members.labels.shape == (12, 2)
    assert members.labels[0].tolist() == [0, -1]
    made = write_fold_set(members, {"train": range(6), "test": range(6, 12)}, tmp_path / "fold", FOLD, seed=0)
    before = {row["key"]: row for row in members.table.to_pylist()}
    for split in made.splits:
        for row in read_split(made, split).to_pylist():
            assert (row["label"], row["age"], row["group"]) == tuple(
                before[row["key"]][name] for name in ("label", "age", "group")
            )
    assert made.info["splits"]["test"]["unknown"] == {"Effusion": 0, "Mass": 1}
    [sample] = Reader(made, "test").read(Piece(0, 0, 1))
    assert sample.sha256 == hashlib.sha256(sample.data).digest()
    index = pq.read_table(tmp_path / "fold" / "index.parquet")
    assert index.schema.field("label").type.value_type == pa.int8()
