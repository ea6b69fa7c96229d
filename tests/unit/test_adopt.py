"""`medtl data index`: sets of plain webdataset become ours and are read alike; ours are read by plain webdataset."""

from __future__ import annotations

import hashlib
import io
import json
import os
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from foreign_sets import ONE, SHOW, batches, by_webdataset, item, refused, write_foreign, write_shards
from image_folders import write_table
from shard_sets import image_of
from tar_files import END, sample

from medtl_dist.cli import main
from medtl_dist.data.adopt import AdoptOptions, adopt, parse_splits
from medtl_dist.data.identity import image_key, write_secret
from medtl_dist.data.pack import PackOptions, pack
from medtl_dist.data.shards import open_dataset, read_split
from medtl_dist.data.sidecars import Fields
from medtl_dist.data.sources import Columns
from medtl_dist.data.stream import train_batches
from medtl_dist.data.transforms import TrainTransform
from medtl_dist.data.verify import verify
from medtl_dist.errors import DataError, LeakageError, UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_foreign(tmp_path / "tars")


# --- foreign sets, read by us ---


def test_a_foreign_set_is_read_as_it_was_written_and_its_tars_stay(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    told: list[tuple[int, int]] = []
    dataset = adopt(folder, AdoptOptions(**ONE), lambda done, total: told.append((done, total)))
    assert told == [(done, 6) for done in range(1, 7)]
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert sorted(path.name for path in folder.iterdir()) == sorted([*before, "dataset.json", "index.parquet"])
    assert (dataset.classes, dataset.color, dataset.group_source) == (("0", "1"), "grey", "none")
    for split, count in (("train", 17), ("val", 6)):
        seen = batches(dataset, split)
        pixels = np.concatenate([batch.images[: batch.num_real].numpy() for batch in seen])
        labels = [label for batch in seen for label in batch.labels.tolist()]
        assert labels == [number % 2 for number in range(count)]
        for number in range(count):
            assert np.array_equal(pixels[number], SHOW(image_of(number)))
    assert verify(folder, 1).faults == []


def test_training_on_a_foreign_set_covers_it(folder: Path) -> None:
    dataset = adopt(folder, AdoptOptions(**ONE))
    keys = [
        key
        for batch in train_batches(dataset, transform=TrainTransform(16), global_batch_size=1, seed=0, epoch=3)
        for key in batch.keys
    ]
    assert sorted(keys) == sorted(key.hex() for key in read_split(dataset, "train", ["key"])["key"].to_pylist())
    assert len(set(keys)) == 17


def test_fields_of_json_become_label_group_domain_and_columns(folder: Path) -> None:
    fields = Fields("finding", ("patient",), "site", ("age", "weight"))
    dataset = adopt(folder, AdoptOptions(fields, positive="a", **ONE))
    assert (dataset.classes, dataset.positive_class, dataset.group_source) == (("b", "a"), "a", "column patient")
    table = read_split(dataset, "train").to_pydict()
    assert table["label"] == [1 - number % 2 for number in range(17)]
    assert table["domain"] == ["NS"[number // 4 % 2] for number in range(17)]
    assert table["age"] == list(range(20, 37))
    assert table["weight"] == [1.5 if number % 3 else None for number in range(17)]
    assert [table["group"].index(group) for group in table["group"]] == [number // 3 * 3 for number in range(17)]
    entry = dataset.info["splits"]["train"]
    assert (entry["groups"], entry["classes"], entry["domains"]) == (6, {"b": 8, "a": 9}, {"N": 9, "S": 8})
    first = entry["shards"][0]
    assert (first["samples"], first["classes"], first["domains"]) == (5, {"a": 3, "b": 2}, {"N": 4, "S": 1})
    assert verify(folder, 1).faults == []
    assert "Doe" not in (folder / "dataset.json").read_text()
    assert b"Doe" not in (folder / "index.parquet").read_bytes()


def test_keys_come_from_the_secret_the_tar_and_the_key(folder: Path, tmp_path: Path) -> None:
    write_secret(tmp_path / "secret", bytes(range(32)))
    dataset = adopt(folder, AdoptOptions(key_file=tmp_path / "secret", **ONE))
    keys = read_split(dataset, "train", ["key"])["key"].to_pylist()
    assert keys[6] == image_key(bytes(range(32)), "train-001.tar/study/Doe006")
    linkage = pq.read_table(f"{folder}.private/linkage.parquet").to_pylist()
    assert {row["file"] for row in linkage if row["key"] == keys[6].hex()} == {"train-001.tar/study/Doe006.png"}
    assert len(linkage) == 23
    assert os.stat(f"{folder}.private").st_mode & 0o777 == 0o700


def test_processes_change_nothing(folder: Path, tmp_path: Path) -> None:
    write_secret(tmp_path / "secret", bytes(32))
    made = []
    for workers in (1, 2):
        adopt(folder, AdoptOptions(num_workers=workers, key_file=tmp_path / "secret"))
        made.append([(folder / name).read_bytes() for name in ("dataset.json", "index.parquet")])
        (folder / "dataset.json").unlink()
    assert made[0] == made[1]


def test_patients_in_two_splits_are_leakage_and_scoped_ids_are_the_remedy(tmp_path: Path) -> None:
    folder = tmp_path / "tars"
    for split in ("train", "val"):
        write_shards(folder, split, [item("same", number) for number in range(6)])
    fields = Fields(groups=("patient",))
    said = refused(folder, LeakageError, fields=fields)
    assert "2 of 2 groups (column patient) are in more than one split (2 in train and val)" in said
    assert "--group-field split+patient" in said
    dataset = adopt(folder, AdoptOptions(Fields(groups=("split+patient",)), **ONE))
    assert [dataset.info["splits"][split]["groups"] for split in dataset.splits] == [2, 2]
    assert verify(folder, 1).faults == []


def test_group_fields_repeated_are_joined(folder: Path) -> None:
    dataset = adopt(folder, AdoptOptions(Fields(groups=("split+patient", "split+site")), **ONE))
    assert dataset.group_source == "columns split+patient, split+site joined"
    assert len(set(read_split(dataset, "train", ["group"])["group"].to_pylist())) == 1


def test_splits_by_name_and_by_globs(tmp_path: Path) -> None:
    folder = tmp_path / "tars"
    for name in ("Training_0", "validation.0", "dev-1", "test"):
        write_shards(folder, name, [item(name, number) for number in range(3)])
    dataset = adopt(folder, AdoptOptions(**ONE))
    listed = {split: [shard.name for shard in dataset.shards(split)] for split in dataset.splits}
    assert listed == {
        "train": ["Training_0-000.tar"],
        "val": ["dev-1-000.tar", "validation.0-000.tar"],
        "test": ["test-000.tar"],
    }
    (folder / "dataset.json").unlink()
    globs = parse_splits("train=[Td]*,val=validation*,test=test*")
    dataset = adopt(folder, AdoptOptions(splits=globs, **ONE))
    assert [shard.name for shard in dataset.shards("train")] == ["Training_0-000.tar", "dev-1-000.tar"]
    assert verify(folder, 1).faults == []


@pytest.mark.parametrize(
    ("splits", "says"),
    [
        ("train=train-*", "2 of 6 tars belong to no split, as val-000.tar"),
        ("train=*,val=val-*", "--split puts val-000.tar into train and val"),
    ],
)
def test_every_tar_is_in_one_split(folder: Path, splits: str, says: str) -> None:
    assert says in refused(folder, UserError, splits=parse_splits(splits))


@pytest.mark.parametrize("text", ["train", "train=", "dev=*", "0.7,0.15,0.15", ""])
def test_splits_of_another_form(text: str) -> None:
    with pytest.raises(UserError, match="SPLIT=GLOB,… expected"):
        parse_splits(text)


# --- images as they come ---


def bgr_png(number: int) -> bytes:
    return cv2.imencode(".png", image_of(number, channels=3)[:, :, ::-1])[1].tobytes()


def test_mixed_channels_are_read_in_colour_and_only_grey_ones_in_grey(tmp_path: Path) -> None:
    same = np.repeat(image_of(1), 3, axis=2)
    grey_in_rgb = cv2.imencode(".png", same)[1].tobytes()
    for name, third, color in (("grey", grey_in_rgb, "grey"), ("rgb", bgr_png(2), "rgb")):
        folder = tmp_path / name
        write_shards(folder, "val", [item("val", 0), item("val", 1, png=grey_in_rgb), item("val", 2, png=third)])
        dataset = adopt(folder, AdoptOptions(**ONE))
        assert dataset.color == color
        (batch,) = batches(dataset, "val")
        expected = image_of(0) if color == "grey" else np.repeat(image_of(0), 3, axis=2)
        assert np.array_equal(batch.images[0].numpy(), SHOW(expected))
        last = same if color == "grey" else image_of(2, channels=3)
        assert np.array_equal(batch.images[2].numpy(), SHOW(last[:, :, : dataset.channels]))
        assert read_split(dataset, "val", ["channels"])["channels"].to_pylist() == [1, 3, 3]
        assert verify(folder, 1).faults == []


def test_a_photo_on_its_side_has_the_size_that_is_read(tmp_path: Path) -> None:
    from PIL import Image

    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(image_of(0)[:, :, 0]).save(file, "JPEG", exif=exif)
    write_shards(tmp_path / "t", "val", [item("val", 0, png=None, jpg=file.getvalue()), item("val", 1)])
    dataset = adopt(tmp_path / "t", AdoptOptions(**ONE))
    table = read_split(dataset, "val", ["width", "height"]).to_pylist()
    assert table == [{"width": 20, "height": 24}, {"width": 24, "height": 20}]
    assert verify(tmp_path / "t", 1).faults == []


def test_what_decoding_takes_away_is_said(tmp_path: Path) -> None:
    deep = cv2.imencode(".png", image_of(0).astype(np.uint16) * 257)[1].tobytes()
    alpha = cv2.imencode(".png", np.dstack([image_of(1, channels=3), image_of(1)]))[1].tobytes()
    write_shards(tmp_path / "t", "val", [item("val", 0, png=deep), item("val", 1, png=alpha)])
    dataset = adopt(tmp_path / "t", AdoptOptions(**ONE))
    assert "1 images have 16 bits a channel: only the upper 8 are used" in dataset.info["cautions"]
    assert "1 images have an alpha channel, which is ignored" in dataset.info["cautions"]
    assert verify(tmp_path / "t", 1).faults == []


def test_more_dots_are_read_as_webdataset_reads_them_and_said(tmp_path: Path) -> None:
    folder = tmp_path / "t"
    folder.mkdir()
    tar = sample("1.2.840.7", 0) + sample("2.2.840.7", 1) + END
    (folder / "val-0.tar").write_bytes(tar)
    dataset = adopt(folder, AdoptOptions(**ONE))
    assert any(text.startswith("2 images have a name with more than one dot") for text in dataset.info["cautions"])
    theirs = [one["__key__"] for one in by_webdataset([str(folder / "val-0.tar")])]
    linkage = pq.read_table(f"{folder}.private/linkage.parquet").to_pylist()
    assert theirs == ["1", "2"]
    assert [row["file"] for row in linkage] == ["val-0.tar/1.2.840.7.png", "val-0.tar/2.2.840.7.png"]
    assert verify(folder, 1).faults == []


def test_uids_that_share_a_key_are_refused(tmp_path: Path) -> None:
    """TRAPS: two DICOM UIDs became one sample."""
    write_shards(tmp_path / "t", "train", [item("train", n, __key__=f"1.2.840.{n}") for n in range(4)])
    said = refused(tmp_path / "t")
    assert "member 4: a second .cls member under one key (a key ends at the first dot" in said


def test_verify_finds_an_adopted_tar_whose_texts_changed(folder: Path) -> None:
    """Checksums and index agree, but the tar tells something else than the index."""
    fields = Fields("finding", ("patient",), "site", ("age",))
    adopt(folder, AdoptOptions(fields, **ONE))
    path = folder / "val-000.tar"
    raw = path.read_bytes()
    for old, new in ((b'"a"', b'"b"'), (b'"N"', b'"S"'), (b'"age": 21', b'"age": 99')):
        assert raw.count(old) >= 1
        raw = raw.replace(old, new, 1)
    path.write_bytes(raw)
    info = json.loads((folder / "dataset.json").read_text())
    info["splits"]["val"]["shards"][0]["sha256"] = hashlib.sha256(raw).hexdigest()
    (folder / "dataset.json").write_text(json.dumps(info))
    whats = [fault.what for fault in verify(folder, 1).faults]
    assert whats == [
        "its tar tells another label than the index",
        "its tar tells another domain than the index",
        "its tar tells another age than the index",
    ]


def test_a_damaged_entry_of_an_adopted_set(folder: Path) -> None:
    adopt(folder, AdoptOptions(**ONE))
    for entry in (None, {}, {"label": 1, "groups": [], "domain": None, "keep": []}):
        info = json.loads((folder / "dataset.json").read_text()) | {"adopted": entry}
        (folder / "dataset.json").write_text(json.dumps(info))
        with pytest.raises(DataError, match="damaged entry 'adopted'"):
            verify(folder, 1)


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main.run(
        ["data", "index", str(folder), "--label-field", "finding", "--group-field", "patient", "--domain-field", "site",
         "--keep-field", "age", "--split", "train=train-*,val=val-*", "--positive", "a", "--workers", "1"]
    )  # fmt: skip
    printed = capsys.readouterr().out.splitlines()
    assert code == 0
    assert printed[0] == f"{folder}: 23 images, binary, positive a; grey, native size, as found"
    assert (
        printed[2]
        == "adopted: tars of another tool, indexed where they lie; label from field 'finding', domain from field 'site'"
    )
    assert "domains of train: N 9, S 8" in printed
    assert printed[-1].startswith(f"{folder}.private names files and patients")
    (folder / "dataset.json").unlink()
    assert main.run(["data", "index", str(folder), "--workers", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["adopted"] == {"label": None, "groups": [], "domain": None, "keep": []}


# --- our sets, read by plain webdataset ---


@pytest.mark.parametrize("size", [16, 80])
def test_plain_webdataset_reads_our_sets_alike(tmp_path: Path, size: int) -> None:
    """PNG (16 px) and JPEG; ``decode("pil")`` is the way of its manual."""
    source = write_table(tmp_path / "in", 30, patients=10, splits=("train",))
    columns = Columns(group=("patient_id",), split="split", keep=("age",))
    dataset = pack(source, tmp_path / "set", PackOptions(columns=columns, image_size_px=size, num_workers=1))
    for split in dataset.splits:
        ours = batches(dataset, split)
        labels = [label for batch in ours for label in batch.labels.tolist()]
        keys = [key for batch in ours for key in batch.keys]
        paths = [os.path.join(dataset.folder, shard.name) for shard in dataset.shards(split)]
        theirs = by_webdataset(paths, "pil")
        assert [one["__key__"] for one in theirs] == keys
        assert [one["json"]["label"] for one in theirs] == labels
        assert [one["json"]["class"] for one in theirs] == [dataset.classes[label] for label in labels]
        pixels = np.concatenate([batch.images[: batch.num_real].numpy() for batch in ours])
        for one, mine in zip(theirs, pixels, strict=True):
            image = np.asarray(one["png" if size == 16 else "jpg"].convert("L"))[:, :, None]
            assert np.abs(SHOW(image).astype(int) - mine.astype(int)).max() <= (0 if size == 16 else 1)


def test_a_set_of_ours_whose_index_is_lost_can_be_adopted_again(tmp_path: Path) -> None:
    """Both ways at once: our tars are tars like any other."""
    source = write_table(tmp_path / "in", 24, patients=8)
    before = pack(source, tmp_path / "set", PackOptions(columns=Columns(keep=("age",)), num_workers=1))
    old = {split: batches(before, split) for split in before.splits}
    for name in ("dataset.json", "index.parquet"):
        (tmp_path / "set" / name).unlink()
    after = adopt(tmp_path / "set", AdoptOptions(Fields("class", keep=("age",)), **ONE))
    assert open_dataset(tmp_path / "set").classes == before.classes
    for split in before.splits:
        for one, other in zip(old[split], batches(after, split), strict=True):
            assert np.array_equal(one.images.numpy(), other.images.numpy())
            assert one.labels.tolist() == other.labels.tolist()
