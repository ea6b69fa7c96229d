"""Folders and MedMNIST archives as listings: layouts, what is left alone, what is refused."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from medtl_dist.data import sources
from medtl_dist.errors import DataError, UserError


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_classes_on_top_have_no_split(tmp_path: Path) -> None:
    touch(tmp_path, "b/2.png", "a/1.JPG", "a/deep/er/3.tiff")
    listing = sources.read_folder(tmp_path)
    assert list(zip(listing.names, listing.labels, listing.splits, strict=True)) == [
        ("a/1.JPG", "a", None),
        ("a/deep/er/3.tiff", "a", None),
        ("b/2.png", "b", None),
    ]
    assert listing.files == [str(tmp_path / name) for name in listing.names]
    assert listing.classes == ["a", "b"]


def test_splits_on_top_go_by_their_usual_names(tmp_path: Path) -> None:
    touch(tmp_path, "Train/a/1.png", "validation/b/2.png", "test/a/3.png")
    listing = sources.read_folder(tmp_path)
    assert dict(zip(listing.names, listing.splits, strict=True)) == {
        "Train/a/1.png": "train",
        "validation/b/2.png": "val",
        "test/a/3.png": "test",
    }


def test_a_test_only_tree_is_a_split(tmp_path: Path) -> None:
    touch(tmp_path, "test/a/1.png", "test/b/2.png")
    assert sources.read_folder(tmp_path).splits == ["test", "test"]


def test_clutter_is_passed_over_and_other_files_are_counted(tmp_path: Path) -> None:
    touch(
        tmp_path, "a/1.png", "b/1.png", "a/.DS_Store", "a/Thumbs.db", "__MACOSX/a/1.png", ".git/x/1.png", "b/notes.txt"
    )
    listing = sources.read_folder(tmp_path)
    assert listing.names == ["a/1.png", "b/1.png"]
    assert listing.cautions == ["1 files without an image's extension were left alone"]


def test_links_are_followed_once(tmp_path: Path) -> None:
    touch(tmp_path, "store/1.png", "set/b/2.png")
    (tmp_path / "set/a").symlink_to(tmp_path / "store")
    (tmp_path / "store/loop").symlink_to(tmp_path / "store")
    assert sources.read_folder(tmp_path / "set").names == ["a/1.png", "b/2.png"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "holds no images in class folders"),
        (["1.png", "2.png"], "holds no images in class folders"),
        (["train/a/1.png", "other/a/1.png"], "has train beside other: move what is neither train, val nor test"),
        (["train/a/1.png", "val/a/1.png", "valid/a/1.png"], "two folders for one split"),
        (["a/1.png", "b/readme.md"], "class 'b' of .* has no image: add images or remove the folder"),
        (["images/1.png", "labels.csv"], "one class folder only .*it has a table: medtl data pack .*labels.csv"),
    ],
)
def test_folders_that_cannot_be_a_set_are_refused(tmp_path: Path, names: list[str], message: str) -> None:
    touch(tmp_path, *names)
    with pytest.raises(UserError, match=message):
        sources.read_folder(tmp_path)


def test_a_class_may_be_missing_from_one_split(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.png", "train/b/1.png", "test/a/1.png")
    (tmp_path / "test/b").mkdir()
    assert sources.read_folder(tmp_path).classes == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "kind"), [("x", "folder"), ("x.csv", "table"), ("x.PARQUET", "table"), ("x.npz", "medmnist")]
)
def test_the_format_is_told_from_the_name(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / name
    path.mkdir() if kind == "folder" else path.touch()
    assert sources.detect_format(path) == kind


def test_what_is_neither_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        sources.detect_format(tmp_path / "none")
    touch(tmp_path, "x.docx")
    with pytest.raises(UserError, match=r"none of: a folder of images, a table .*--format folder\|table\|medmnist"):
        sources.detect_format(tmp_path / "x.docx")


def test_whole_numbers_sort_by_value() -> None:
    assert sources.class_order({"10", "2", "-1"}) == ["-1", "2", "10"]
    assert sources.class_order({"10", "2", "a"}) == ["10", "2", "a"]


def archive(path: Path, **arrays: np.ndarray) -> Path:
    np.savez_compressed(path, **arrays)  # pyright: ignore[reportArgumentType]
    return path


def medmnist(path: Path, **changed: np.ndarray) -> Path:
    arrays = {}
    for split, count in (("train", 6), ("val", 2), ("test", 3)):
        arrays[f"{split}_images"] = np.zeros((count, 28, 28), dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(count) % 2).astype(np.uint8)[:, None]
    return archive(path, **arrays | changed)


def test_medmnist_keeps_its_splits(tmp_path: Path) -> None:
    listing = sources.read_medmnist(medmnist(tmp_path / "m.npz"), tmp_path / "scratch")
    assert listing.splits == ["train"] * 6 + ["val"] * 2 + ["test"] * 3
    assert listing.labels[:3] == ["0", "1", "0"]
    assert listing.rows == [*range(6), 0, 1, 0, 1, 2]
    assert listing.units == {}
    assert np.load(listing.files[0], mmap_mode="r").shape == (6, 28, 28)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"train_labels": np.full((6, 14), 2, dtype=np.uint8)},
            "14 labels per image, and not only 0 and 1",
        ),
        ({"val_labels": np.zeros((2, 1), dtype=np.float32)}, r"val_labels has shape \(2, 1\), float32; integers"),
        ({"train_images": np.zeros((6, 28, 28, 28), dtype=np.uint8)}, "3D sets cannot be packed"),
        ({"train_images": np.zeros((6, 28, 28), dtype=np.float32)}, "uint8 .* expected"),
        ({"train_images": np.array([{"evil": 1}] * 6, dtype=object)}, "objects are never unpickled"),
    ],
)
def test_other_arrays_are_refused(tmp_path: Path, changed: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sources.read_medmnist(medmnist(tmp_path / "m.npz", **changed), tmp_path / "scratch")


def test_an_archive_of_something_else_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "weights.npz", weight=np.zeros(3))
    with pytest.raises(UserError, match="no train_images; it holds: weight"):
        sources.read_medmnist(path, tmp_path / "scratch")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as half:
        half.writestr("train_images.npy", b"")
    (tmp_path / "half.npz").write_bytes(buffer.getvalue())
    with pytest.raises((UserError, DataError)):
        sources.read_medmnist(tmp_path / "half.npz", tmp_path / "scratch")


def test_a_damaged_archive_is_told_apart(tmp_path: Path) -> None:
    path = medmnist(
        tmp_path / "m.npz", train_images=np.random.default_rng(0).integers(0, 255, (6, 28, 28), dtype=np.uint8)
    )
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(DataError, match="damaged"):
        sources.read_medmnist(path, tmp_path / "scratch")
    flipped = bytearray(whole)
    flipped[whole.index(b"train_images.npy") + 400] ^= 255
    path.write_bytes(flipped)
    with pytest.raises(DataError, match="damaged"):
        sources.read_medmnist(path, tmp_path / "scratch")
    with pytest.raises(DataError, match="6 train images but 5 labels"):
        sources.read_medmnist(medmnist(path, train_labels=np.zeros((5, 1), dtype=np.uint8)), tmp_path / "scratch")
