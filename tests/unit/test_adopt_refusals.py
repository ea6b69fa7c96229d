"""`medtl data index` of tars that make no set: what is wrong is named by position, and nothing is written."""

from __future__ import annotations

import csv
import os
import re
from pathlib import Path
from typing import Any

import cv2
import pytest
from foreign_sets import ONE, item, refused, write_foreign, write_shards
from shard_sets import image_of
from tar_files import END, member, png, sample

from medtl_dist.data.adopt import AdoptOptions, adopt
from medtl_dist.data.sidecars import Fields
from medtl_dist.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_foreign(tmp_path / "tars")


@pytest.mark.parametrize(
    ("changes", "fields", "says"),
    [
        ({"cls": None}, Fields(), "train-000.tar: member 7: a sample without a .cls member; --label-field FIELD"),
        ({"cls": " "}, Fields(), "member 7: an empty or missing label"),
        ({"cls": b"\xff"}, Fields(), "member 7: a .cls member that is not UTF-8"),
        ({"cls": "x" * 300}, Fields(), "member 7: a label of more than 200 characters"),
        ({"cls": "a\nb"}, Fields(), "member 7: a label of more than 200 characters, or not printable"),
        ({"json": None}, Fields("finding"), "member 7: a sample without a .json member"),
        ({"json": {"patient": "Doe"}}, Fields("finding"), "member 7: an empty or missing label"),
        ({"json": b"[1]"}, Fields("finding"), "member 7: a .json member that holds no object"),
        ({"json": b'{"finding": NaN}'}, Fields("finding"), "member 7: a damaged .json member"),
        ({"json": b'{"finding": 1e999}'}, Fields("finding"), "member 7: a damaged .json member"),
        ({"json": b'{"finding": "a", "finding": "b"}'}, Fields("finding"), "member 7: a damaged .json member"),
        ({"json": b"[" * 10**5}, Fields("finding"), "member 7: a damaged .json member"),
        ({"json": {"finding": ["a"]}}, Fields("finding"), "field 'finding' of its .json holds a list"),
        ({"json": {"patient": None}}, Fields(groups=("patient",)), "member 7: no group (--group-field)"),
        ({"png": b"GIF89a"}, Fields(), "member 7: a bad image: neither JPEG nor PNG"),
        ({"png": png(0)[:-30]}, Fields(), "member 7: a bad image: the image can't be decoded, or not to its end"),
        ({"png": None}, Fields(), "member 7: a key without an image"),
        ({"pyd": b"x"}, Fields(), "member 10: a .pyd member: only jpg, jpeg, png, json, cls, txt are read"),
        ({"jpg": b"x"}, Fields(), "member 10: a second image under one key"),
    ],
)
def test_a_bad_sample_is_named_by_position_and_in_the_private_folder(
    tmp_path: Path, changes: dict[str, Any], fields: Fields, says: str
) -> None:
    items = [item("train", number) for number in range(4)]
    items[2] = item("train", 2, **changes)
    write_shards(tmp_path / "t", "train", items)
    # Members of a sample are written in the order of their extensions: cls, json, png.
    assert says in refused(tmp_path / "t", fields=fields)
    with open(f"{tmp_path}/t.private/refused.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["name"].partition(".")[0] for row in rows} == {"study/Doe002"}
    assert os.stat(f"{tmp_path}/t.private/refused.csv").st_mode & 0o777 == 0o600


def test_all_that_is_wrong_is_counted_over_all_tars(folder: Path) -> None:
    for name in ("train-001.tar", "val-000.tar"):
        (folder / name).write_bytes(member("Doe.pkl") * 4 + sample("Doe", 0) + END)
    said = refused(folder)
    assert said.startswith(f"8 members of the tars in {folder} cannot be used: train-001.tar: member 1: a .pkl")
    assert "; … and 3 more. " in said


def test_a_truncated_jpeg_is_not_adopted_though_training_would_decode_it(tmp_path: Path) -> None:
    whole = cv2.imencode(".jpg", image_of(0, (200, 240)))[1].tobytes()
    write_shards(tmp_path / "t", "val", [item("val", 0, png=None, jpg=whole[: len(whole) // 2]), item("val", 1)])
    assert "the image can't be decoded, or not to its end" in refused(tmp_path / "t")


def test_tars_without_any_cls_are_a_slip(tmp_path: Path) -> None:
    write_shards(tmp_path / "t", "val", [item("val", number, cls=None) for number in range(3)])
    said = refused(tmp_path / "t", UserError)
    assert said.endswith("with --label-field; there are: age, finding, patient, site, weight")


def test_a_field_that_no_sample_has_is_a_slip(folder: Path) -> None:
    said = refused(folder, UserError, fields=Fields("findings"))
    assert said == "no .json member has a field 'findings'; the first ones have: age, finding, patient, site, weight"


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (lambda folder: [path.unlink() for path in folder.iterdir()], "has no .tar files"),
        (lambda folder: (folder / "train-9.tar.gz").touch(), "1 of 7 tars in .* not compressed; rename or unpack"),
        (lambda folder: (folder / "-x.tar").touch(), "1 of 7 tars in .* have names that no set can have"),
        (
            lambda folder: (folder / "pipe:touch canary.tar").touch(),
            "1 of 7 tars in .* have names that no set can have",
        ),
        (lambda folder: (folder / "more.tar").touch(), "1 of 7 tars belong to no split, as more.tar: name them train-"),
    ],
)
def test_folders_that_are_not_ready(folder: Path, prepare: Any, says: str) -> None:
    prepare(folder)
    assert re.search(says, refused(folder, UserError))


def test_not_twice_and_not_nowhere(folder: Path, tmp_path: Path) -> None:
    adopt(folder, AdoptOptions(**ONE))
    with pytest.raises(UserError, match="it is a set already"):
        adopt(folder, AdoptOptions(**ONE))
    with pytest.raises(UserError, match="no such folder"):
        adopt(tmp_path / "none", AdoptOptions(**ONE))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_workers": 0}, "--workers 0"),
        ({"fields": Fields(keep=("label",))}, "--keep-field label: the index has a column of that name"),
        ({"fields": Fields(keep=("a", "a"))}, "--keep-field names a field twice"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        AdoptOptions(**options)


def test_one_class_and_mixed_kinds_are_refused(tmp_path: Path) -> None:
    write_shards(tmp_path / "one", "val", [item("val", number, cls=0) for number in range(3)])
    assert "at least two classes" in refused(tmp_path / "one", UserError)
    items = [item("val", number, json={"age": [1, "x"][number % 2]}) for number in range(3)]
    write_shards(tmp_path / "mixed", "val", items)
    assert "text in some samples and numbers in others" in refused(
        tmp_path / "mixed", UserError, fields=Fields(keep=("age",))
    )


def test_a_folder_that_is_a_disk_of_its_own_is_refused_before_a_tar_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_stat = os.stat

    def stat(path: Any, *args: Any, **more: Any) -> os.stat_result:
        found = true_stat(path, *args, **more)
        return os.stat_result((*found[:2], found.st_dev + 1, *found[3:10])) if path == folder else found

    monkeypatch.setattr(os, "stat", stat)
    (folder / "train-000.tar").write_bytes(b"never read")
    with pytest.raises(UserError, match="is a disk of its own"):
        adopt(folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(p.name for p in folder.glob("*.tar"))
