"""Several labels an image: cells and lists read, sets packed, counted, read back and verified; unknown is never absent."""

from __future__ import annotations

import json
import os
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_folders import write_image
from label_tables import CLASSES, label_sets_of, write_label_table

from medtl_dist.cli.data import summary
from medtl_dist.data import label_sets
from medtl_dist.data.audit import audit
from medtl_dist.data.audit_fix import fix
from medtl_dist.data.pack import PackOptions, pack
from medtl_dist.data.private import KEY_FILE, LINKAGE_FILE
from medtl_dist.data.shards import Dataset, open_dataset, read_split
from medtl_dist.data.sources import Columns, read_medmnist
from medtl_dist.data.strata import strata_of
from medtl_dist.data.stream import eval_batches, train_batches
from medtl_dist.data.tables import read_table
from medtl_dist.data.transforms import EvalTransform, TrainTransform
from medtl_dist.data.verify import verify
from medtl_dist.errors import DataError, UserError

NUM_IMAGES = 48
COLUMNS = Columns(labels=CLASSES, group=("patient_id",), domain="site")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sets")
    table = write_label_table(root, NUM_IMAGES)
    pack(table, root / "set", PackOptions(columns=COLUMNS, num_workers=1, image_size_px=24))
    return root


@pytest.fixture
def dataset(folder: Path) -> Dataset:
    return open_dataset(folder / "set")


def _truth(folder: Path) -> dict[str, list[int]]:
    """Key to label set, by the linkage and the table's own numbers."""
    sets = label_sets_of(NUM_IMAGES).tolist()
    rows = pq.read_table(folder / "set.private" / LINKAGE_FILE).to_pylist()
    return {row["key"]: sets[int(row["file"].split("-")[1][:4])] for row in rows}


def test_every_row_of_the_index_is_the_tables(folder: Path, dataset: Dataset) -> None:
    assert (dataset.task, dataset.classes, dataset.positive_class) == ("multilabel", CLASSES, None)
    truth = _truth(folder)
    seen = {}
    for split in dataset.splits:
        for row in read_split(dataset, split, ["key", "label"]).to_pylist():
            seen[row["key"].hex()] = [-1 if value is None else value for value in row["label"]]
    assert seen == truth
    assert any(-1 in labels for labels in seen.values())


def test_sidecars_say_the_same(folder: Path, dataset: Dataset) -> None:
    truth = _truth(folder)
    for shard in dataset.shards("train"):
        with tarfile.open(os.path.join(dataset.folder, shard.name)) as tar:
            for member in tar.getmembers():
                if member.name.endswith(".json"):
                    told = json.load(tar.extractfile(member))  # type: ignore[arg-type]
                    labels = truth[member.name.removesuffix(".json")]
                    assert told["label"] == [None if value == -1 else value for value in labels]
                    assert told["class"] == [name for name, value in zip(CLASSES, labels, strict=True) if value == 1]


def test_counts_are_those_of_the_rows(dataset: Dataset) -> None:
    for split in dataset.splits:
        entry = dataset.info["splits"][split]
        rows = read_split(dataset, split, ["label", "shard"]).to_pylist()
        for what, value in (("classes", 1), ("negatives", 0), ("unknown", None)):
            expected = {name: sum(row["label"][k] == value for row in rows) for k, name in enumerate(CLASSES)}
            assert entry[what] == expected
            by_shard = Counter[str]()
            for shard in entry["shards"]:
                by_shard.update(shard[what])
            assert by_shard == Counter({name: count for name, count in expected.items() if count})
    text = "\n".join(summary(dataset))
    train = dataset.info["splits"]["train"]
    shown = "/".join(str(train[what]["Mass"]) for what in ("classes", "negatives", "unknown"))
    assert f"Mass {shown}" in " ".join(text.split())


def test_batches_hold_the_label_sets(folder: Path, dataset: Dataset) -> None:
    truth = _truth(folder)
    transform = EvalTransform(24)
    for batch in eval_batches(dataset, "train", transform=transform, batch_size=5):
        assert batch.labels.tolist() == [truth[key] for key in batch.keys]
    by_domain = strata_of(dataset, "train", "domain")
    for strata in (None, by_domain):
        batches = train_batches(
            dataset, transform=TrainTransform(24), global_batch_size=8, seed=0, epoch=0, strata=strata
        )
        for batch in batches:
            assert batch.labels.tolist() == [truth[key] for key in batch.keys]


def test_sampling_by_class_is_refused(dataset: Dataset) -> None:
    with pytest.raises(UserError, match=r"data\.sampling = class: an image of .* may have several classes; use domain"):
        strata_of(dataset, "train", "class")


def test_the_same_table_gives_the_same_bytes_whatever_its_order(folder: Path, tmp_path: Path) -> None:
    head, *lines = (folder / "labels.csv").read_text().splitlines()
    (folder / "turned.csv").write_text("\n".join([head, *lines[::-1]]) + "\n")
    key_file = folder / "set.private" / KEY_FILE
    again = pack(
        folder / "turned.csv",
        tmp_path / "set",
        PackOptions(columns=COLUMNS, num_workers=1, image_size_px=24, key_file=key_file),
    )
    assert again.sha256 == open_dataset(folder / "set").sha256


def test_verify_finds_nothing_then_a_changed_label_and_count(folder: Path, tmp_path: Path) -> None:
    assert verify(folder / "set").faults == []
    info = json.loads((folder / "set" / "dataset.json").read_text())
    for path in (folder / "set").iterdir():
        os.link(path, tmp_path / path.name)
    (tmp_path / "dataset.json").unlink()
    info["splits"]["train"]["unknown"]["Mass"] += 1
    negatives = info["splits"]["train"]["shards"][0]["negatives"]
    negatives["Mass"] = negatives.get("Mass", 0) + 1
    (tmp_path / "dataset.json").write_text(json.dumps(info))
    told = [fault.what for fault in verify(tmp_path).faults]
    name = info["splits"]["train"]["shards"][0]["name"]
    assert told == [f"negatives of {name} differ from the index", "unknown of split train differ from the index"]


def test_verify_compares_each_sidecar_with_its_row(folder: Path, tmp_path: Path) -> None:
    for path in (folder / "set").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    shard = next(path for path in tmp_path.iterdir() if path.name.startswith("train"))
    raw = shard.read_bytes()
    where = raw.index(b'"label": [') + 10
    flipped = b"0" if raw[where : where + 1] == b"1" else b"1"
    if raw[where : where + 1] == b"n":
        where, flipped = raw.index(b"null", where), b"  0 "
    shard.write_bytes(raw[:where] + flipped + raw[where + len(flipped) :])
    assert "label" in {fault.kind for fault in verify(tmp_path).faults}


def test_fix_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="several labels an image, which --fix cannot write"):
        fix(audit(dataset, num_workers=1), tmp_path / "fixed")


def test_lists_with_a_separator_are_nihs(tmp_path: Path) -> None:
    cells = ["Mass|Effusion", "No Finding", " Effusion ", "", "Mass"]
    lines = ["file,Finding Labels"]
    for number, cell in enumerate(cells):
        write_image(tmp_path / f"{number}.png", number)
        lines.append(f"{number}.png,{cell}")
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    columns = Columns(label="Finding Labels", label_separator="|", negative="No Finding")
    listing = read_table(tmp_path / "t.csv", columns)
    assert listing.classes == ["Effusion", "Mass"]
    assert listing.label_sets is not None
    assert listing.label_sets.tolist() == [[1, 1], [0, 0], [1, 0], [-1, -1], [0, 1]]
    packed = pack(tmp_path / "t.csv", tmp_path / "set", PackOptions(columns=columns, num_workers=1))
    assert packed.info["excluded"] == [
        {"reason": "empty label", "split": None, "class": None, "samples": 1, "groups": 1}
    ]
    with pytest.raises(UserError, match="--negative Nothing: no cell"):
        read_table(tmp_path / "t.csv", Columns(label="Finding Labels", label_separator="|", negative="Nothing"))
    with pytest.raises(UserError, match=r"1 rows of .* name 'Effusion' \(--negative\) beside other labels"):
        read_table(tmp_path / "t.csv", Columns(label="Finding Labels", label_separator="|", negative="Effusion"))


def test_cells_in_every_spelling(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("file,a,b\n1.png,1,TRUE\n2.png,0.0,false\n3.png,-1,1.0\n4.png,,-1.0\n")
    listing = read_table(tmp_path / "t.csv", Columns(labels=("b", "a")))
    assert listing.classes == ["b", "a"]
    assert listing.label_sets is not None
    assert listing.label_sets.tolist() == [[1, 1], [0, 0], [1, -1], [-1, -1]]


def test_other_cells_name_columns_and_counts_but_no_value(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("file,a,b\n1.png,1,Doe\n2.png,2,Doe\n3.png,0,1\n")
    with pytest.raises(UserError, match="1 in column 'a', 2 in column 'b'") as caught:
        read_table(tmp_path / "t.csv", Columns(labels=("a", "b")))
    assert "Doe" not in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (Columns(labels=("a",)), "two or more different columns"),
        (Columns(labels=("a", "a")), "two or more different columns"),
        (Columns(labels=("a", "c")), "--label-cols c: .* no such column"),
        (Columns(labels=("a", "b"), label_separator="|"), "--label-sep is for one label column"),
        (Columns(label="a", negative="0"), "--negative 0 is what a label column with --label-sep"),
        (Columns(label="a", label_separator=""), "--label-sep is empty"),
        (Columns(labels=("a", "b"), group=("b",)), "--group-col b is the label column"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, columns: Columns, message: str) -> None:
    (tmp_path / "t.csv").write_text("file,a,b\n1.png,1,0\n2.png,0,1\n")
    with pytest.raises(UserError, match=message):
        read_table(tmp_path / "t.csv", columns)


def test_a_set_in_which_nothing_can_be_learned_is_refused(tmp_path: Path) -> None:
    for number in (1, 2):
        write_image(tmp_path / f"{number}.png", number)
    (tmp_path / "t.csv").write_text("file,a,b\n1.png,1,0\n2.png,,0\n")
    with pytest.raises(UserError, match="no class has both"):
        pack(tmp_path / "t.csv", tmp_path / "set", PackOptions(columns=Columns(labels=("a", "b")), num_workers=1))
    options = PackOptions(columns=Columns(labels=("a", "b")), num_workers=1, positive="a")
    with pytest.raises(UserError, match="--positive a: of several labels"):
        pack(tmp_path / "t.csv", tmp_path / "set", options)


def test_a_class_with_one_value_in_a_split_is_a_caution(folder: Path, tmp_path: Path) -> None:
    lines = ["file,a,b,split"]
    for number in range(8):
        write_image(tmp_path / f"{number}.png", number)
        lines.append(f"{number}.png,{number % 2},{1 if number < 4 else 0},{'train' if number < 6 else 'val'}")
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    columns = Columns(labels=("a", "b"), split="split")
    cautions = pack(tmp_path / "t.csv", tmp_path / "set", PackOptions(columns=columns, num_workers=1)).info["cautions"]
    assert "split val has no image of class 'b'" in cautions
    assert not [text for text in cautions if "'a'" in text]


def test_rows_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    for number in (1, 2):
        write_image(tmp_path / f"{number}.png", number)
    (tmp_path / "t.csv").write_text("file,a,b\n1.png,1,0\n1.png,1,\n2.png,0,1\n")
    with pytest.raises(UserError, match="1 rows name an image again with another label"):
        pack(tmp_path / "t.csv", tmp_path / "set", PackOptions(columns=Columns(labels=("a", "b")), num_workers=1))


def test_chest_medmnist_has_several_labels(tmp_path: Path) -> None:
    sets = np.array([[1, 0, 1], [0, 0, 0], [0, 1, 1], [1, 1, 0]], np.uint8)
    images = np.random.default_rng(0).integers(0, 255, (4, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "chest.npz", train_images=images, train_labels=sets, val_images=images, val_labels=sets)
    listing = read_medmnist(tmp_path / "chest.npz", tmp_path / "scratch")
    assert listing.classes == ["0", "1", "2"]
    assert listing.label_sets is not None
    assert listing.label_sets.tolist() == sets.tolist() * 2
    packed = pack(tmp_path / "chest.npz", tmp_path / "set", PackOptions(num_workers=1))
    assert packed.task == "multilabel"
    assert packed.info["splits"]["val"]["classes"] == {"0": 2, "1": 2, "2": 2}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.sampled_from((-1, 0, 1)), min_size=4, max_size=4), min_size=1, max_size=20))
def test_the_stratum_is_the_rarest_class_that_is_present(rows: list[list[int]]) -> None:
    sets = np.array(rows, np.int8)
    counts = [sum(row[k] == 1 for row in rows) for k in range(4)]
    for row, stratum in zip(rows, label_sets.strata(sets).tolist(), strict=True):
        present = [k for k in range(4) if row[k] == 1]
        assert stratum == (min(present, key=lambda k: (counts[k], k)) if present else 4)


@pytest.mark.parametrize(
    ("rows", "valid"),
    [
        ([[1, 0], [-1, 1]], True),
        ([[1, 0], [-1, -1]], False),
        ([[1, 2]], False),
        ([[1, -2]], False),
        ([[1, 0, 1]], False),
    ],
)
def test_what_is_no_label_set(rows: list[list[int]], valid: bool) -> None:
    assert label_sets.are_valid(np.array(rows, np.int8), 2) is valid


def test_an_index_of_single_labels_does_not_pass_for_sets(folder: Path, tmp_path: Path) -> None:
    for path in (folder / "set").iterdir():
        os.link(path, tmp_path / path.name)
    text = (folder / "set" / "dataset.json").read_text().replace('"multilabel"', '"multiclass"')
    (tmp_path / "dataset.json").unlink()
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(DataError, match=r"no index of this format \(column label\)"):
        next(eval_batches(open_dataset(tmp_path), "val", transform=EvalTransform(24), batch_size=4))
