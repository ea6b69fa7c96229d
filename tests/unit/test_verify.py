"""`medtl data verify`: a whole set passes; every kind of damage is named, and all of it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_folders import write_folder, write_table
from shard_sets import write_set
from time_limit import within
from typer.testing import CliRunner

from medtl_dist.cli import main
from medtl_dist.data import index_check
from medtl_dist.data.pack import PackOptions, pack
from medtl_dist.data.shards import INDEX_FIELDS, Dataset, open_dataset
from medtl_dist.data.sources import Columns
from medtl_dist.data.verify import Report, verify
from medtl_dist.errors import DataError, UserError


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    source = write_table(folder / "in", 48, patients=24, splits=("train", "val"))
    columns = Columns(group=("split+patient_id",), split="split", domain="site", keep=("age",))
    pack(source, folder / "set", PackOptions(columns=columns, num_workers=1))
    return folder / "set"


@pytest.fixture
def folder(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "set"))


def faults(folder: Path, **options: Any) -> list[tuple[str, str, str]]:
    return [(fault.kind, fault.file, fault.what) for fault in verify(folder, 1, **options).faults]


def edit_info(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "dataset.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))


def edit_index(folder: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    """Changes the rows, and lets dataset.json agree."""
    table = pq.read_table(folder / "index.parquet")
    rows = table.to_pylist()
    change(rows)
    shards = list(dict.fromkeys(table["shard"].to_pylist()))
    changed = pa.Table.from_pylist(rows, table.schema)
    with pq.ParquetWriter(folder / "index.parquet", table.schema, store_schema=False) as writer:
        at = 0
        for name in shards:
            count = table["shard"].to_pylist().count(name)
            writer.write_table(changed.slice(at, count), row_group_size=count)
            at += count
    raw = (folder / "index.parquet").read_bytes()
    entry = {"name": "index.parquet", "bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    edit_info(folder, lambda info: info.update(index=entry))


def edit_tar(folder: Path, name: str, change: Callable[[list[tuple[str, bytes]]], object]) -> None:
    """Writes the tar's members again after a change, and lets dataset.json agree with its length and checksum."""
    with tarfile.open(folder / name) as tar:
        members = [(info.name, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]
    change(members)
    with tarfile.open(folder / name, "w", format=tarfile.USTAR_FORMAT) as tar:
        for member, data in members:
            info = tarfile.TarInfo(member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    raw = (folder / name).read_bytes()

    def agree(info: dict[str, Any]) -> None:
        for entry in info["splits"].values():
            for shard in entry["shards"]:
                if shard["name"] == name:
                    shard.update(bytes=len(raw), sha256=hashlib.sha256(raw).hexdigest())

    edit_info(folder, agree)


def edit_json(members: list[tuple[str, bytes]], number: int, **values: Any) -> None:
    """Replaces fields of the ``number``-th sample's .json, its length kept so that the offsets behind it stay."""
    name, data = members[2 * number + 1]
    changed = json.dumps(json.loads(data) | values, sort_keys=True).encode()
    members[2 * number + 1] = (name, changed)


FIRST = "train-000000.tar"


# --- whole sets ---


def test_a_whole_set_has_no_fault_and_progress_reaches_all(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = verify(folder, 1, lambda done, total: seen.append((done, total)))
    assert report.faults == []
    assert report.lines() == [f"{folder}: 48 images in {report.num_shards} shards: no fault found"]
    assert seen[-1] == (48, 48)
    assert len(seen) == report.num_shards == 6
    report.check()


def test_processes_find_what_one_process_finds(folder: Path) -> None:
    edit_tar(folder, FIRST, lambda members: edit_json(members, 0, label=1, **{"class": "sick"}))
    edit_tar(folder, "val-000001.tar", lambda members: members.append(("x.pkl", b"")))
    assert verify(folder, 2).faults == verify(folder, 1).faults != []


@pytest.mark.parametrize("size", [None, 16])
def test_sets_without_groups_and_in_colour_pass(tmp_path: Path, size: int | None) -> None:
    pack(write_folder(tmp_path / "in"), tmp_path / "set", PackOptions(image_size_px=size, color="rgb", num_workers=1))
    assert faults(tmp_path / "set") == []


# --- one thing wrong at a time: (kind, file, words) ---


def shard_missing(folder: Path) -> None:
    (folder / FIRST).unlink()


def shard_is_a_fifo(folder: Path) -> None:
    (folder / FIRST).unlink()
    os.mkfifo(folder / FIRST)


def shard_longer(folder: Path) -> None:
    with (folder / FIRST).open("ab") as file:
        file.write(bytes(512))


def index_missing(folder: Path) -> None:
    (folder / "index.parquet").unlink()


def index_flipped(folder: Path) -> None:
    path = folder / "index.parquet"
    raw = bytearray(path.read_bytes())
    raw[100] ^= 1
    path.write_bytes(raw)


def image_flipped(folder: Path) -> None:
    raw = bytearray((folder / FIRST).read_bytes())
    raw[raw.index(b"IDAT") + 20] ^= 1
    (folder / FIRST).write_bytes(raw)


def header_flipped(folder: Path) -> None:
    raw = bytearray((folder / FIRST).read_bytes())
    raw[5] ^= 1
    (folder / FIRST).write_bytes(raw)


def padding_flipped(folder: Path) -> None:
    raw = bytearray((folder / FIRST).read_bytes())
    raw[-3000] ^= 1
    (folder / FIRST).write_bytes(raw)


def tar_with(change: Callable[[list[tuple[str, bytes]]], object]) -> Callable[[Path], None]:
    return lambda folder: edit_tar(folder, FIRST, change)


def index_with(change: Callable[[list[dict[str, Any]]], object]) -> Callable[[Path], None]:
    return lambda folder: edit_index(folder, change)


def info_with(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    return lambda folder: edit_info(folder, change)


def swap(members: list[tuple[str, bytes]]) -> None:
    members[0], members[1] = members[1], members[0]


def rename(members: list[tuple[str, bytes]]) -> None:
    members[0:2] = [(f"{'f' * 32}.{name.rpartition('.')[2]}", data) for name, data in members[0:2]]


def other_group(rows: list[dict[str, Any]]) -> None:
    rows[0]["group"] = rows[-1]["group"]


@pytest.mark.parametrize(
    ("damage", "kind", "file", "says"),
    [
        (shard_missing, "missing", FIRST, "is missing"),
        (shard_is_a_fifo, "missing", FIRST, r"cannot be opened \(not a regular file"),
        (shard_longer, "length", FIRST, r"is \d+ bytes long, \d+ in dataset.json"),
        (padding_flipped, "checksum", FIRST, "its sha256 differs from dataset.json's"),
        (image_flipped, "checksum", FIRST, "its bytes differ from the checksum in the index"),
        (image_flipped, "image", FIRST, "a bad image: the image can't be decoded"),
        (header_flipped, "tar", FIRST, "its header differs from the header's checksum"),
        (header_flipped, "tar", FIRST, r"[1-9] images can't be reached .* their bytes are whole"),
        (index_missing, "missing", "index.parquet", "is missing"),
        (index_flipped, "checksum", "index.parquet", "its sha256 differs"),
        (index_flipped, "index", FIRST, "its index rows cannot be read"),
        (tar_with(lambda m: m.insert(2, ("x.pkl", b"x"))), "tar", FIRST, "member 3: a .pkl member"),
        (tar_with(lambda m: m.append(m[0])), "tar", FIRST, r"member \d+: its key occurred before"),
        (tar_with(lambda m: m.extend([("a.png", m[0][1]), ("a.json", b"{}")])), "tar", FIRST, "index does not hav"),
        (tar_with(lambda m: m.append((m[-1][0][:-4] + "cls", b"1"))), "tar", FIRST, "not one image and then one"),
        (tar_with(swap), "tar", FIRST, "an image that the index does not have"),
        (tar_with(rename), "tar", FIRST, "its member has another name than its key"),
        (tar_with(lambda m: m.pop()), "json", FIRST, "it has no .json member"),
        (tar_with(lambda m: m.__delitem__(slice(-2, None))), "tar", FIRST, "no such member at its offset"),
        (tar_with(lambda m: edit_json(m, 1, label=7)), "label", FIRST, "its .json has another label"),
        (tar_with(lambda m: edit_json(m, 1, label=True)), "label", FIRST, "its .json has another label"),
        (tar_with(lambda m: edit_json(m, 1, **{"class": "x"})), "label", FIRST, "its .json has another class"),
        (tar_with(lambda m: edit_json(m, 1, age=-1)), "json", FIRST, "its .json has another age"),
        (tar_with(lambda m: edit_json(m, 1, name="Doe")), "json", FIRST, "other fields than: age, class, label"),
        (tar_with(lambda m: m.__setitem__(1, (m[1][0], b"{,}"))), "json", FIRST, "a damaged .json member"),
        (index_with(lambda r: r[0].update(label=2)), "index", FIRST, "has label 2, of 2 classes"),
        (index_with(lambda r: r[0].update(label=1 - r[0]["label"])), "label", FIRST, "another class than the index"),
        (index_with(lambda r: r[0].update(split="test")), "index", FIRST, "names another shard or split"),
        (index_with(lambda r: r[1].update(offset=0)), "index", FIRST, "out of order, or points outside"),
        (index_with(lambda r: r[0].update(size=10**9)), "index", FIRST, "out of order, or points outside"),
        (index_with(lambda r: r[0].update(size=r[0]["size"] - 1)), "index", FIRST, r"its member has \d+ bytes"),
        (index_with(lambda r: r[0].update(group=None)), "index", FIRST, "has no group"),
        (index_with(lambda r: r[0].update(width=31)), "image", FIRST, "it is 40 x 30 px of 1 channels, in the index 3"),
        (index_with(lambda r: r[0].update(channels=3)), "image", FIRST, "in the index 40 x 30 px of 3 channels"),
        (index_with(lambda r: r[0].update(key=r[9]["key"])), "key", "index.parquet", "its key occurs more than once"),
        (index_with(other_group), "group", "index.parquet", r"group [0-9a-f]{32} is in more than one split \(train"),
        (info_with(lambda i: i.update(found=99)), "counts", "dataset.json", "found is not the images packed"),
        (info_with(lambda i: i["splits"]["train"].update(groups=1)), "counts", "dataset.json", r"train has \d+ groups"),
        (info_with(lambda i: i["splits"]["train"].update(classes={})), "counts", "dataset.json", "classes of split tra"),
        (info_with(lambda i: i["splits"]["val"].update(domains=[])), "counts", "dataset.json", "domains of split val"),
        (info_with(lambda i: i["splits"]["val"]["shards"][1].update(classes={})), "counts", "dataset.json", "000001"),
        (info_with(lambda i: i.update(excluded=[1])), "counts", "dataset.json", "not of the format's shape"),
        (info_with(lambda i: i["preprocessing"].update(color="rgb")), "image", FIRST, "in a set of rgb images"),
        (lambda folder: (folder / "train-99.tar").touch(), "extra", "train-99.tar", "dataset.json does not list"),
        (lambda folder: (folder / "Doe.txt").touch(), "extra", ".", "1 files or folders that are no part of the set"),
    ],
)  # fmt: skip
def test_damage_is_named(folder: Path, damage: Callable[[Path], None], kind: str, file: str, says: str) -> None:
    damage(folder)
    with within(15):
        found = faults(folder)
    assert any(fault[:2] == (kind, file) and re.search(says, fault[2]) for fault in found), found
    assert "Doe" not in str(found)


def test_a_fault_names_the_key(folder: Path) -> None:
    image_flipped(folder)
    key = pq.read_table(folder / "index.parquet")["key"][0].as_py().hex()
    report = verify(folder, 1)
    assert {fault.key for fault in report.faults if fault.kind in ("checksum", "image") and fault.key} == {key}
    assert f"  {FIRST}: image {key}: its bytes differ from the checksum in the index" in report.lines()


def test_a_patient_id_in_the_index_is_a_fault_and_not_told(folder: Path) -> None:
    edit_index(folder, lambda rows: [row.update(group="Doe-7") for row in rows])
    found = faults(folder)
    assert ("index", FIRST, "its index row has a group that is no hash; is it a patient's own id?") in found
    assert any(kind == "group" and what.startswith("group (no hash, so not told)") for kind, _, what in found)
    assert "Doe" not in str(found)


def test_every_fault_is_told_not_only_the_first(folder: Path) -> None:
    shard_missing(folder)
    edit_tar(folder, "train-000001.tar", lambda members: edit_json(members, 0, age=0))
    edit_tar(folder, "val-000000.tar", lambda members: edit_json(members, 1, age=0))
    (folder / "notes").mkdir()
    kinds = [(kind, file) for kind, file, _ in faults(folder)]
    for expected in [("missing", FIRST), ("json", "train-000001.tar"), ("json", "val-000000.tar"), ("extra", ".")]:
        assert expected in kinds


def test_many_faults_are_cut_in_print_and_whole_in_json(folder: Path) -> None:
    def all_labels(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            row["label"] = 5

    edit_index(folder, all_labels)
    report = verify(folder, 1)
    lines = report.lines()
    assert "index: 48" in lines
    assert "  … and 38 more (--json lists all)" in lines
    assert sum(fault["kind"] == "index" for fault in report.as_dict()["faults"]) == 48
    with pytest.raises(DataError, match=r"is damaged: \d+ faults \(48 index, "):
        report.check()


def test_a_set_in_colour_where_grey_was_promised(tmp_path: Path) -> None:
    write_set(tmp_path, {"train": [3]}, channels=3)
    edit_info(tmp_path, lambda info: info["preprocessing"].update(color="grey"))
    assert ("image", FIRST, "it is 24 x 20 px of 3 channels in a set of grey images") in faults(tmp_path)


def test_a_damaged_dataset_file_is_the_one_fault_that_ends_it(folder: Path) -> None:
    (folder / "dataset.json").write_text("{")
    with pytest.raises(DataError, match=r"dataset.json is damaged"):
        verify(folder, 1)
    (folder / "dataset.json").unlink()
    with pytest.raises(UserError, match="is not a shard set"):
        verify(folder, 1)
    with pytest.raises(UserError, match="--workers 0"):
        verify(folder, 0)


def test_keys_and_groups_are_compared_in_shares_as_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What bounds memory at 10^8 samples: several passes find the same as one."""

    def spoil(rows: list[dict[str, Any]]) -> None:
        for row in rows[::5]:
            row["key"] = rows[0]["key"]
        other_group(rows)

    edit_index(folder, spoil)
    at_once = set(verify(folder, 1).faults)
    monkeypatch.setattr(index_check, "_AT_ONCE", 5)
    assert set(verify(folder, 1).faults) == at_once
    assert {"key", "group"} <= {fault.kind for fault in at_once}


def test_an_index_of_another_schema_is_a_fault(folder: Path) -> None:
    table = pq.read_table(folder / "index.parquet")
    key = table["key"].cast(pa.binary())
    pq.write_table(table.set_column(0, pa.field("key", pa.binary()), key), folder / "index.parquet", store_schema=False)
    raw = (folder / "index.parquet").read_bytes()
    entry = {"name": "index.parquet", "bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    edit_info(folder, lambda info: info.update(index=entry))
    assert any("no index of this format (column key)" in what for _, _, what in faults(folder))
    with pytest.raises(DataError, match=r"is no index of this format|is damaged"):
        read_rows(open_dataset(folder))


def read_rows(dataset: Dataset) -> pa.Table:
    from medtl_dist.data.shards import read_split

    return read_split(dataset, "train", [field.name for field in INDEX_FIELDS])


# --- the command ---


def test_the_command_prints_a_line_or_the_faults_and_exits_3(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["data", "verify", str(folder), "--workers", "1"]) == 0
    assert capsys.readouterr().out == f"{folder}: 48 images in 6 shards: no fault found\n"
    shard_missing(folder)
    assert main.run(["data", "verify", str(folder), "--workers", "1"]) == 3
    printed = capsys.readouterr()
    assert "missing: 1\n  train-000000.tar: is missing\n" in printed.out
    assert printed.err.startswith(f"error: {folder} is damaged: 1 fault (1 missing)")
    assert main.run(["data", "verify", str(folder), "--workers", "1", "--json"]) == 3
    facts = json.loads(capsys.readouterr().out)
    assert facts["faults"] == [{"kind": "missing", "file": FIRST, "what": "is missing", "key": None}]
    assert (facts["samples"], facts["shards"], facts["kinds"]) == (48, 6, {"missing": 1})


def test_info_tells_every_shard_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["data", "info", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    for split in facts["splits"].values():
        for shard in split["shards"]:
            assert {"name", "samples", "bytes", "sha256", "classes", "domains"} <= set(shard)
            assert sum(shard["classes"].values()) == shard["samples"]


@pytest.mark.parametrize("command", ["verify", "index"])
def test_help_has_an_example(command: str) -> None:
    assert f"medtl data {command} " in CliRunner().invoke(main.app, ["data", command, "--help"]).output


def test_report_of_nothing_is_whole(folder: Path) -> None:
    assert Report(open_dataset(folder)).as_dict()["faults"] == []
