"""Packing: what is in the set, byte for byte the same again, all or nothing, and nothing private in it."""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import json
import os
import stat
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from image_folders import write_folder, write_image, write_table
from PIL import Image
from webdataset.compat import WebDataset

from medtl_dist.data.pack import PackOptions, pack
from medtl_dist.data.shard_writer import samples_per_shard
from medtl_dist.data.shards import Dataset, open_dataset, read_split
from medtl_dist.data.sources import Columns
from medtl_dist.errors import DataError, LeakageError, UserError

SECRET = "ab" * 32
PATIENT = Columns(group=("patient_id",))


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "study.key"
    path.write_text(SECRET, encoding="ascii")
    return path


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def rows_of(dataset: Dataset) -> list[dict]:
    return [row for split in dataset.splits for row in read_split(dataset, split).to_pylist()]


def linkage(dest: Path) -> dict[str, dict]:
    rows = pq.read_table(dest.with_name(f"{dest.name}.private") / "linkage.parquet").to_pylist()
    return {row["key"]: row for row in rows}


def image_of(dataset: Dataset, row: dict) -> np.ndarray:
    with (Path(dataset.folder) / row["shard"]).open("rb") as file:
        file.seek(row["offset"])
        data = file.read(row["size"])
    assert hashlib.sha256(data).digest() == row["sha256"]
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)


def test_a_table_becomes_a_set_whose_rows_lead_back_to_the_files(tmp_path: Path) -> None:
    source = write_table(tmp_path / "in", 96, patients=30, splits=("train", "test"))
    columns = Columns(group=("split+patient_id",), split="split", domain="site", keep=("age",))
    dataset = pack(source, tmp_path / "set", PackOptions(columns=columns, num_workers=1))

    assert (dataset.task, dataset.classes, dataset.positive_class) == ("binary", ("normal", "sick"), "sick")
    assert (dataset.color, dataset.group_source) == ("grey", "column split+patient_id")
    assert dataset.info["split_source"] == {
        "method": "given, val from train by group",
        "seed": 0,
        "fractions": [0.7, 0.15, 0.15],
    }
    assert dataset.info["found"] == 96 == sum(entry["samples"] for entry in dataset.info["splits"].values())
    files = linkage(tmp_path / "set")
    rows = rows_of(dataset)
    assert len({row["key"] for row in rows}) == 96
    for row in rows:
        origin = files[row["key"].hex()]
        number = int(origin["file"][-8:-4])
        assert (origin["status"], origin["split"]) == ("packed", row["split"])
        assert row["age"] == 20 + number
        assert row["domain"] == "NS"[number // 3 % 2]
        assert row["group"] == origin["group"]
        assert origin["group_name"].startswith("test | Doe-" if row["split"] == "test" else "train | Doe-")
        with Image.open(tmp_path / "in" / origin["file"]) as image:
            stored = image_of(dataset, row)
            assert np.array_equal(stored, np.asarray(image))  # 30 px high: stored lossless
            assert (row["height"], row["width"], row["channels"]) == (*stored.shape, 1)
    for split, entry in dataset.info["splits"].items():
        of_split = [row for row in rows if row["split"] == split]
        assert entry["groups"] == len({row["group"] for row in of_split})
        assert entry["classes"] == {
            name: sum(row["label"] == label for row in of_split) for label, name in enumerate(dataset.classes)
        }
        assert entry["domains"] == {site: sum(row["domain"] == site for row in of_split) for site in "NS"}


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves its tars to the collector
def test_plain_webdataset_reads_every_sample(tmp_path: Path) -> None:
    dataset = pack(write_table(tmp_path / "in", 40), tmp_path / "set", PackOptions(columns=Columns(keep=("age",))))
    shards = [str(tmp_path / "set" / shard.name) for split in dataset.splits for shard in dataset.shards(split)]
    samples = list(WebDataset(shards, shardshuffle=False, empty_check=False).decode("l8"))  # pyright: ignore[reportArgumentType]
    expected = {row["key"].hex(): row for row in rows_of(dataset)}
    assert len(samples) == 40 == len(expected)
    for sample in samples:
        row = expected.pop(sample["__key__"])
        assert sample["json"] == {"class": dataset.classes[row["label"]], "label": row["label"], "age": row["age"]}
        assert sample["png"].shape == (30, 40)


def test_the_set_names_no_file_and_no_patient(tmp_path: Path) -> None:
    dataset = pack(write_table(tmp_path / "in"), tmp_path / "set", PackOptions(columns=PATIENT))
    for path in Path(dataset.folder).iterdir():
        assert b"Doe" not in path.read_bytes()
    for row in rows_of(dataset):
        assert "Doe" not in repr(row)


def test_the_private_folder_is_the_owners_alone(tmp_path: Path) -> None:
    pack(write_folder(tmp_path / "in"), tmp_path / "set")
    private = tmp_path / "set.private"
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert sorted(path.name for path in private.iterdir()) == ["key", "linkage.parquet"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in private.iterdir()} == {0o600}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "set", "set.private"]


def test_same_input_and_key_same_bytes_whatever_the_workers_and_the_order(tmp_path: Path, key_file: Path) -> None:
    source = write_table(tmp_path / "in", 80)
    header, *lines = source.read_text(encoding="utf-8").splitlines()
    options = PackOptions(columns=PATIENT, key_file=key_file, image_size_px=16, seed=5)
    one = pack(source, tmp_path / "one", options)
    source.write_text("\n".join([header, *reversed(lines)]) + "\n", encoding="utf-8")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "in").rename(tmp_path / "elsewhere/in")
    moved = PackOptions(columns=PATIENT, key_file=key_file, image_size_px=16, seed=5, num_workers=2)
    two = pack(tmp_path / "elsewhere/in/labels.csv", tmp_path / "two", moved)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert one.sha256 == two.sha256
    assert not (tmp_path / "one.private/key").exists()

    other = pack(
        tmp_path / "elsewhere/in/labels.csv", tmp_path / "three", PackOptions(columns=PATIENT, image_size_px=16)
    )
    assert {row["key"] for row in rows_of(other)}.isdisjoint(row["key"] for row in rows_of(one))


def test_a_removed_set_is_packed_again_with_its_own_key(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in")
    pack(source, tmp_path / "set")
    before = contents(tmp_path / "set")
    for path in (tmp_path / "set").iterdir():
        path.unlink()
    pack(source, tmp_path / "set")  # an empty folder is as good as none
    assert contents(tmp_path / "set") == before


def test_the_index_is_sorted_and_a_row_group_is_a_shard(tmp_path: Path) -> None:
    dataset = pack(write_folder(tmp_path / "in", 80), tmp_path / "set", PackOptions(num_workers=1))
    with pq.ParquetFile(tmp_path / "set/index.parquet") as file:
        table = file.read()
        rows = table.to_pylist()
        groups = [file.read_row_group(i)["shard"].unique().to_pylist() for i in range(file.num_row_groups)]
    place = [(row["split"], row["shard"], row["offset"]) for row in rows]
    assert place == sorted(place)
    assert groups == [[shard.name] for split in sorted(dataset.splits) for shard in dataset.shards(split)]
    labels = [row["label"] for row in rows if row["split"] == "train"]
    assert 0 < sum(labels[: len(labels) // 2]) < len(labels) // 2  # shuffled over the whole split, not class by class


def test_tars_have_no_owner_and_no_time(tmp_path: Path) -> None:
    dataset = pack(write_folder(tmp_path / "in"), tmp_path / "set")
    [first, *_] = dataset.shards("train")
    with tarfile.open(tmp_path / "set" / first.name) as tar:
        members = tar.getmembers()
    assert len(members) == 2 * first.samples
    for image, described in zip(members[::2], members[1::2], strict=True):
        assert image.name.removesuffix(".png") == described.name.removesuffix(".json")
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}


@pytest.mark.parametrize(
    ("samples", "most"),
    [(1, 1), (8, 8), (12, 6), (63, 8), (64, 8), (800, 100), (7999, 1000), (10_000, 1000), (10_001, 910)],
)
def test_shards_are_enough_and_of_about_equal_size(samples: int, most: int) -> None:
    assert samples_per_shard(samples) == most


def test_the_short_side_is_stored_and_small_images_are_left_alone(tmp_path: Path, key_file: Path) -> None:
    source = write_folder(tmp_path / "in", 8)
    write_image(source / "sick/large.png", 9, size=(400, 300))
    dataset = pack(source, tmp_path / "set", PackOptions(image_size_px=200, key_file=key_file))
    assert dataset.info["preprocessing"] == {
        "image_size_px": 200,
        "color": "grey",
        "resize": "short_side_area",
        "window": None,
        "encoding": "jpeg95",
    }
    assert sorted((row["width"], row["height"]) for row in rows_of(dataset)) == [(40, 30)] * 8 + [(267, 200)]


@pytest.mark.parametrize(
    ("color", "mixed", "stored"),
    [("keep", False, "grey"), ("keep", True, "rgb"), ("grey", True, "grey"), ("rgb", False, "rgb")],
)
def test_the_set_has_one_colour(tmp_path: Path, color: str, mixed: bool, stored: str) -> None:
    source = write_folder(tmp_path / "in", 8)
    if mixed:
        write_image(source / "sick/colour.png", 9, color=True)
    dataset = pack(source, tmp_path / "set", PackOptions(color=color))
    assert dataset.color == stored
    assert {row["channels"] for row in rows_of(dataset)} == {dataset.channels}
    assert {image_of(dataset, row).ndim for row in rows_of(dataset)} == {2 if stored == "grey" else 3}
    assert any("is in colour" in note for note in dataset.info["notes"]) == (color == "keep" and mixed)


def test_colour_found_late_gives_the_set_that_colour_found_early_gives(
    tmp_path: Path, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_folder(tmp_path / "in", 20)
    write_image(source / "sick/colour.png", 99, color=True)
    pack(source, tmp_path / "early", PackOptions(key_file=key_file))
    monkeypatch.setattr("medtl_dist.data.pack._PROBED", 1)
    late = pack(source, tmp_path / "late", PackOptions(key_file=key_file))
    assert late.color == "rgb"
    assert contents(tmp_path / "early") == contents(tmp_path / "late")


def test_an_unreadable_image_stops_the_pack_by_key_and_is_named_in_private(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in")
    bad = source / "sick/Doe-bad.png"
    bad.write_bytes(b"John Doe's image")
    with pytest.raises(DataError) as caught:
        pack(source, tmp_path / "set")
    text = str(caught.value)
    assert "Doe" not in text
    assert "--skip-bad" in text
    assert not (tmp_path / "set").exists()
    problems = list(csv.DictReader((tmp_path / "set.private/problems.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["file"] for row in problems] == ["sick/Doe-bad.png"]
    assert problems[0]["key"] in text
    assert stat.S_IMODE((tmp_path / "set.private/problems.csv").stat().st_mode) == 0o600

    dataset = pack(source, tmp_path / "set", PackOptions(skip_bad=True))
    [excluded] = dataset.info["excluded"]
    assert (excluded["reason"], excluded["class"], excluded["samples"]) == ("unreadable image", "sick", 1)
    assert excluded["split"] in dataset.splits
    assert dataset.info["found"] == 25 == 1 + sum(entry["samples"] for entry in dataset.info["splits"].values())
    assert linkage(tmp_path / "set")[problems[0]["key"]]["status"] == "unreadable image"


def test_missing_files_are_counted_before_anything_is_packed(tmp_path: Path) -> None:
    source = write_table(tmp_path / "in")
    for number in (3, 4):
        (tmp_path / f"in/images/Doe-{number:04d}.png").unlink()
    with pytest.raises(
        DataError, match=r"2 of 24 image files are missing \(for example key [0-9a-f]{32}\).*problems.csv"
    ):
        pack(source, tmp_path / "set")
    assert len((tmp_path / "set.private/problems.csv").read_text(encoding="utf-8").splitlines()) == 3
    dataset = pack(source, tmp_path / "set", PackOptions(skip_bad=True))
    assert {entry["reason"] for entry in dataset.info["excluded"]} == {"missing file"}
    assert sum(entry["samples"] for entry in dataset.info["excluded"]) == 2


def test_nothing_readable_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in", 4)
    for path in source.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="4 images cannot be packed, and fewer than two classes are left"):
        pack(source, tmp_path / "set", PackOptions(skip_bad=True))
    assert not (tmp_path / "set").exists()


def test_leakage_leaves_the_linkage_and_no_set(tmp_path: Path) -> None:
    source = write_table(tmp_path / "in", splits=("train", "test"))
    columns = Columns(group=("patient_id",), split="split")
    with pytest.raises(LeakageError, match="8 of 8 groups"):
        pack(source, tmp_path / "set", PackOptions(columns=columns))
    assert {row["group_name"] for row in linkage(tmp_path / "set").values()} >= {"Doe-0", "Doe-1"}
    assert not (tmp_path / "set").exists()


def test_an_existing_set_is_never_written_over(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in")
    pack(source, tmp_path / "set")
    before = contents(tmp_path / "set")
    with pytest.raises(UserError, match="exists and is not empty: name a new folder"):
        pack(source, tmp_path / "set")
    assert contents(tmp_path / "set") == before
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="exists and is not a folder"):
        pack(source, tmp_path / "file")
    with pytest.raises(UserError, match="lies inside the folder that is packed"):
        pack(source, source / "set")


def test_a_typing_error_leaves_nothing_behind(tmp_path: Path) -> None:
    source = write_table(tmp_path / "in")
    with pytest.raises(UserError, match="--label-col diagnosis"):
        pack(source, tmp_path / "set", PackOptions(columns=Columns(label="diagnosis")))
    with pytest.raises(UserError, match="is packed as a folder, which has no columns"):
        pack(tmp_path / "in", tmp_path / "set", PackOptions(columns=PATIENT))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


@pytest.mark.parametrize("options", [{"format": "dcm"}, {"color": "blue"}, {"image_size_px": 4}, {"num_workers": 0}])
def test_options_out_of_range_are_refused(options: dict) -> None:
    with pytest.raises(UserError, match="expected"):
        PackOptions(**options)


def test_two_packs_to_one_place_are_refused(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in")
    work = tmp_path / ".set.packing"
    work.mkdir()
    other = os.open(work / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(other, fcntl.LOCK_EX)
    try:
        with pytest.raises(UserError, match="another process is packing to"):
            pack(source, tmp_path / "set")
        assert not (tmp_path / "set").exists()
    finally:
        os.close(other)
    (work / "set").mkdir()  # what a killed pack leaves
    (work / "set/train-000000.tar").write_bytes(b"half")
    assert pack(source, tmp_path / "set").info["found"] == 24
    assert not work.exists()


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "/secret/Doe.tar")

    monkeypatch.setattr("medtl_dist.data.shard_writer.SetWriter.add", full)
    with pytest.raises(UserError, match=r"cannot write the set at .*: No space left on device") as caught:
        pack(write_folder(tmp_path / "in"), tmp_path / "set")
    assert "Doe" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "set.private"]


def test_an_empty_class_in_a_split_is_a_caution(tmp_path: Path) -> None:
    for name in ("train/a/1", "train/a/2", "train/b/1", "val/a/1", "test/a/1", "test/b/1"):
        write_image(tmp_path / "in" / f"{name}.png", 1)
    dataset = pack(tmp_path / "in", tmp_path / "set")
    assert "split val has no image of class 'b'" in dataset.info["cautions"]
    assert dataset.info["splits"]["val"]["classes"] == {"a": 1, "b": 0}


def test_medmnist_is_stored_without_loss_and_without_patients(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 30), ("val", 10), ("test", 10)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[f"{split}_labels"] = rng.integers(0, 3, (count, 1), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", **arrays)
    dataset = pack(tmp_path / "x.npz", tmp_path / "set", PackOptions(num_workers=1))
    assert (dataset.group_source, dataset.task, dataset.positive_class) == ("none", "multiclass", None)
    assert dataset.info["split_source"]["method"] == "given"
    assert dataset.info["preprocessing"]["encoding"] == "png"
    files = linkage(tmp_path / "set")
    for row in rows_of(dataset):
        origin = files[row["key"].hex()]
        assert origin["file"] == "x.npz"
        assert np.array_equal(image_of(dataset, row), arrays[f"{row['split']}_images"][origin["row"]])
        assert row["label"] == arrays[f"{row['split']}_labels"][origin["row"], 0]
        assert row["group"] == row["key"].hex()
    assert not list(tmp_path.glob(".*"))


def test_progress_counts_every_image(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    pack(write_folder(tmp_path / "in", 10), tmp_path / "set", progress=lambda done, total: seen.append((done, total)))
    assert seen[:10] == [(done, 10) for done in range(1, 11)]  # then comes the audit


def test_the_opened_set_is_the_packed_one(tmp_path: Path) -> None:
    packed = pack(write_folder(tmp_path / "in"), tmp_path / "set")
    opened = open_dataset(tmp_path / "set")
    assert opened == packed
    assert opened.name == "set"
    raw = (tmp_path / "set/dataset.json").read_bytes()
    assert opened.sha256 == hashlib.sha256(raw).hexdigest()
    assert "name" not in json.loads(raw)  # so that a set's bytes do not depend on where it was packed to
