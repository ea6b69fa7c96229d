"""Packing DICOM trees: what is packed, left out and told, how labels and patients are joined on, and what stays private."""

from __future__ import annotations

import io
import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pydicom
import pytest
from dicom_files import dataset, ramp, save, sequence_item, write, write_tree
from image_folders import write_folder
from PIL import Image
from pydicom._dicom_dict import DicomDictionary
from pydicom.tag import Tag
from pydicom.uid import UID

from medtl_dist.cli.main import run
from medtl_dist.data.dicom import read_dicom
from medtl_dist.data.dicom_source import DicomOptions
from medtl_dist.data.dicom_window import parse_window, rendering_from
from medtl_dist.data.pack import PackOptions, pack
from medtl_dist.data.shards import Dataset, read_split
from medtl_dist.data.sources import Columns, detect_format
from medtl_dist.errors import DataError, LeakageError, UserError
from medtl_dist.report.tables import _stored

BODY = DicomOptions(label_tag="BodyPartExamined")


def options(dicom: DicomOptions = BODY, **more: Any) -> PackOptions:
    return PackOptions(**({"format": "dicom", "num_workers": 1, "dicom": dicom} | more))


def rows_of(dataset: Dataset) -> list[dict]:
    return [row for split in dataset.splits for row in read_split(dataset, split).to_pylist()]


def linkage(dest: Path) -> dict[str, dict]:
    rows = pq.read_table(dest.with_name(f"{dest.name}.private") / "linkage.parquet").to_pylist()
    return {row["key"]: row for row in rows}


def image_of(dataset: Dataset, row: dict) -> np.ndarray:
    with (Path(dataset.folder) / row["shard"]).open("rb") as file:
        file.seek(row["offset"])
        data = file.read(row["size"])
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)


def reasons(dataset: Dataset) -> dict[str, int]:
    counts: dict[str, int] = {}
    for entry in dataset.info["excluded"]:
        counts[entry["reason"]] = counts.get(entry["reason"], 0) + entry["samples"]
    return counts


def test_a_tree_becomes_a_set_that_can_be_made_again(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "in", 48)
    (source / "DICOMDIR.txt").write_text("not DICOM", encoding="ascii")
    (source / ".hidden").write_bytes((source / "study0/series/IM0000").read_bytes())
    packed = pack(source, tmp_path / "set", options(format="auto"))
    assert (packed.task, packed.classes, packed.group_source) == ("binary", ("CHEST", "HIP"), "column PatientID")
    info = packed.info
    assert info["found"] == 48 == sum(entry["samples"] for entry in info["splits"].values())
    assert sum(entry["groups"] for entry in info["splits"].values()) == 24
    assert info["preprocessing"]["window"] == {"policy": "percentile", "percentiles": [0.5, 99.5], "frames": "single"}
    assert "1 files that are not DICOM were left alone" in info["cautions"]
    assert any("BurnedInAnnotation is absent in 48 of 48 images" in text for text in info["cautions"])
    assert info["counted"] == {
        "window": {"percentile": {"CHEST": 24, "HIP": 24}},
        "photometric": {"MONOCHROME2": {"CHEST": 24, "HIP": 24}},
        "modality": {"CR": {"CHEST": 24, "HIP": 24}},
        "burned_in_annotation": {"absent": {"CHEST": 24, "HIP": 24}},
    }
    files = linkage(tmp_path / "set")
    rendering = rendering_from(json.loads(json.dumps(info["preprocessing"]["window"])))
    rows = rows_of(packed)
    for row in rows:
        origin = files[row["key"].hex()]
        number = int(origin["file"][-4:])
        assert (origin["row"], origin["group_name"]) == (None, f"P{number // 2}")
        assert packed.classes[row["label"]] == ("CHEST", "HIP")[number // 2 % 2]
        stored = image_of(packed, row)  # 24 px high: stored lossless
        assert np.array_equal(stored, read_dicom(source / origin["file"], -1, rendering))
    groups = {row["group"]: {other["split"] for other in rows if other["group"] == row["group"]} for row in rows}
    assert {len(splits) for splits in groups.values()} == {1}


def test_the_window_is_one_for_the_set_and_its_source_is_counted(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "in", 12, WindowCenter=500, WindowWidth=300)
    write_tree(tmp_path / "in/other", 12, VOILUTFunction="SIGMOID", WindowCenter=500, WindowWidth=300)
    write_tree(tmp_path / "in/third", 12)
    dicom = DicomOptions(parse_window("tags"), label_tag="BodyPartExamined", keep_window=True)
    packed = pack(source, tmp_path / "tags", options(dicom))
    assert packed.info["counted"]["window"] == {
        source: {"CHEST": 6, "HIP": 6} for source in ("LINEAR", "SIGMOID", "percentile")
    }
    assert any(
        "windows come from several sources (LINEAR 12, SIGMOID 12, percentile 12)" in t for t in packed.info["cautions"]
    )
    files = linkage(tmp_path / "tags")
    expected = {"s": "LINEAR", "o": "SIGMOID", "t": "percentile"}
    assert {(files[row["key"].hex()]["file"][0], row["window"]) for row in rows_of(packed)} == set(expected.items())

    fixed = pack(
        source, tmp_path / "fixed", options(DicomOptions(parse_window("100,900"), label_tag="BodyPartExamined"))
    )
    assert fixed.info["preprocessing"]["window"] == {"policy": "fixed", "low": 100.0, "high": 900.0, "frames": "single"}
    assert list(fixed.info["counted"]["window"]) == ["fixed"]
    assert "window 100 to 900" in _stored(fixed.info["preprocessing"])
    assert "window tags" in _stored(packed.info["preprocessing"])
    row = rows_of(fixed)[0]
    number = int(linkage(tmp_path / "fixed")[row["key"].hex()]["file"][-4:])
    exact = np.clip((ramp(number).astype(float) - 100) / 800, 0, 1) * 255
    assert np.abs(image_of(fixed, row) - exact).max() <= 0.5


def test_what_is_no_image_or_may_show_a_name_is_left_out_and_counted(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "in", 16)
    others: list[dict[str, Any]] = [
        {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"},
        {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7.2"},
        {"ConversionType": "WSD"},
        {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.6.1"},
        {"Modality": "US"},
        {"BurnedInAnnotation": "YES"},
        {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.481.2"},
    ]
    for number, tags in enumerate(others):
        write(source / "others" / f"{number}", ramp(number), BodyPartExamined="HIP", **tags)
    write(source / "others/report", None, SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11", Modality="SR")
    write(source / "others/document", None, SOPClassUID="1.2.840.10008.5.1.4.1.1.104.1")
    write(source / "others/DICOMDIR", None, SOPClassUID="1.2.840.10008.1.3.10")
    write(source / "others/private", None, SOPClassUID="1.2.3.4.55555")
    write(source / "others/cine", np.stack([ramp(0)] * 3), BodyPartExamined="HIP", NumberOfFrames=3)
    write(source / "others/no", ramp(0), BodyPartExamined="HIP", BurnedInAnnotation="NO")

    packed = pack(source, tmp_path / "set", options())
    assert reasons(packed) == {
        "secondary capture (--allow secondary-capture)": 3,
        "ultrasound (--allow ultrasound)": 2,
        "burned-in annotation (--allow burned-in)": 1,
        "no image (RT Dose Storage)": 1,
        "no image (Basic Text SR Storage)": 1,
        "no image (Encapsulated PDF Storage)": 1,
        "no image (Media Storage Directory Storage)": 1,
        "no image (of an unknown SOP class)": 1,
        "several frames (--frames first, middle or all)": 1,
    }
    assert packed.info["found"] == 16 + 13
    assert packed.info["counted"]["burned_in_annotation"]["no"] == {"HIP": 1}
    assert {row["status"] for row in linkage(tmp_path / "set").values()} == {"packed", *reasons(packed)}

    allowed = DicomOptions(label_tag="BodyPartExamined", allow=("burned-in", "secondary-capture", "ultrasound"))
    everything = pack(source, tmp_path / "all", options(allowed))
    assert sum(reasons(everything).values()) == 6
    for name in ("cine", "no"):
        (source / "others" / name).unlink()
    with pytest.raises(
        UserError, match=r"holds no DICOM image to pack: .*1 × no image \(RT Dose.*3 × secondary capture"
    ):
        pack(source / "others", tmp_path / "none", options())


@pytest.mark.parametrize(("frames", "expected"), [("first", [0]), ("middle", [2]), ("all", [0, 1, 2, 3])])
def test_frames_become_images_as_asked(tmp_path: Path, frames: str, expected: list[int]) -> None:
    source = write_tree(tmp_path / "in", 8)
    for patient in "AB":
        pixels = np.stack([ramp(number) for number in range(4)])
        write(source / f"cine{patient}", pixels, bits=12, NumberOfFrames=4, PatientID=patient, BodyPartExamined="HIP")
    dicom = DicomOptions(parse_window("percentile", frames), label_tag="BodyPartExamined")
    packed = pack(source, tmp_path / "set", options(dicom))
    assert packed.info["preprocessing"]["window"]["frames"] == frames
    files = linkage(tmp_path / "set")
    rows = [row for row in rows_of(packed) if files[row["key"].hex()]["file"].startswith("cine")]
    assert sorted(files[row["key"].hex()]["row"] for row in rows) == sorted(expected * 2)
    for row in rows:
        alone = write(tmp_path / "alone", ramp(files[row["key"].hex()]["row"]), bits=12)
        assert np.array_equal(image_of(packed, row), read_dicom(alone, -1, dicom.rendering))


def test_a_file_of_too_many_frames_is_not_spread(tmp_path: Path) -> None:
    """Two thousand million entries would be more than any memory."""
    source = write_tree(tmp_path / "in", 24)
    write(source / "x", ramp(0), BodyPartExamined="HIP", NumberOfFrames=2_000_000_000)
    dicom = DicomOptions(parse_window("percentile", "all"), label_tag="BodyPartExamined")
    packed = pack(source, tmp_path / "set", options(dicom, skip_bad=True))
    assert reasons(packed) == {"more than 10000 frames": 1}


@pytest.mark.parametrize("join_on", ["SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "PatientID", "file"])
@pytest.mark.parametrize("named", [False, True])
def test_labels_are_joined_on(tmp_path: Path, join_on: str, named: bool) -> None:
    source = write_tree(tmp_path / "in", 24)
    lines, expected = [], {}
    for number, path in enumerate(sorted(path for path in source.rglob("*") if path.is_file())[:22]):
        ds = pydicom.dcmread(path)
        key = path.relative_to(source).as_posix() if join_on == "file" else str(ds[join_on].value)
        label = ("a", "b")[number // 2 % 2]
        lines.append(f"{key},{label},{20 + number // 2},{'NS'[number % 2] if join_on != 'PatientID' else 'N'}")
        expected[path.relative_to(source).as_posix()] = label
    column = "what" if named else join_on
    table = tmp_path / "labels.csv"
    unique = dict.fromkeys([*lines, f"{'gone' if join_on == 'file' else '1.2.3'},a,70,N"])
    table.write_text("\n".join([f"{column},label,age,site", *unique]) + "\n", encoding="ascii")
    default = join_on == "PatientID" or named
    dicom = DicomOptions(table=table, join_on=join_on if default else None)
    columns = Columns(image="what" if named else None, keep=("age",), domain="site")
    packed = pack(source, tmp_path / "set", options(dicom, columns=columns))
    assert reasons(packed) == {"no row in the table": 2}
    assert f"the table is joined on {join_on} (--join-on)" in packed.info["notes"]
    assert f"1 of {len(unique)} rows of the table match no DICOM file" in packed.info["cautions"]
    assert "2 of 24 DICOM files have no row in the table" in packed.info["cautions"]
    files = linkage(tmp_path / "set")
    got = {files[row["key"].hex()]["file"]: packed.classes[row["label"]] for row in rows_of(packed)}
    assert got == expected
    assert {row["age"] for row in rows_of(packed)} == set(range(20, 31))
    assert packed.group_source == "column PatientID"


def test_ambiguous_joins_are_refused(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "in", 8)
    some = pydicom.dcmread(source / "study0/series/IM0000")
    table = tmp_path / "labels.csv"
    dicom = DicomOptions(table=table)
    table.write_text(f"SOPInstanceUID,label\n{some.SOPInstanceUID},a\n{some.SOPInstanceUID},b\n", encoding="ascii")
    with pytest.raises(UserError, match=r"1 rows of .* have the SOPInstanceUID of another row, but say something else"):
        pack(source, tmp_path / "set", options(dicom))
    table.write_text(f"SOPInstanceUID,label\n{some.SOPInstanceUID},a\n", encoding="ascii")
    some.PatientID = "P7"
    save(some, source / "copy")
    with pytest.raises(UserError, match=r"1 rows of .* match more than one file by SOPInstanceUID"):
        pack(source, tmp_path / "set", options(dicom))
    table.write_text("SOPInstanceUID,label\n1.2,a\n1.3,b\n", encoding="ascii")
    with pytest.raises(UserError, match=r"no DICOM file has a row in .* by SOPInstanceUID"):
        pack(source, tmp_path / "set", options(dicom))
    assert not (tmp_path / "set").exists()


def test_given_splits_are_kept_and_their_leaks_found(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "in", 24)
    names = sorted(path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file())
    table = tmp_path / "labels.csv"

    def write_rows(split_of: Any) -> None:
        rows = [f"{name},{'ab'[n // 2 % 2]},{split_of(n)}" for n, name in enumerate(names)]
        table.write_text("\n".join(["file,label,split", *rows]) + "\n", encoding="ascii")

    write_rows(lambda n: "test" if n < 8 else "train")
    packed = pack(source, tmp_path / "set", options(DicomOptions(table=table), columns=Columns(split="split")))
    assert packed.info["splits"]["test"]["samples"] == 8
    write_rows(lambda n: ("train", "test")[n % 2])  # both images of a patient
    with pytest.raises(LeakageError, match="12 of 12 groups"):
        pack(source, tmp_path / "leak", options(DicomOptions(table=table), columns=Columns(split="split")))


def test_patients_are_named_by_tags(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "in", 8)
    write(source / "x", ramp(50), BodyPartExamined="HIP", PatientID="")
    with pytest.raises(UserError, match=r"PatientID is empty in 1 of 9 DICOM files: .*--group-tag none"):
        pack(source, tmp_path / "set", options())
    study = pydicom.dcmread(source / "study0/series/IM0000").StudyInstanceUID
    write(source / "x", ramp(50), BodyPartExamined="HIP", PatientID="", StudyInstanceUID=study)
    joined = DicomOptions(label_tag="BodyPartExamined", group_tags=("PatientID", "StudyInstanceUID"))
    packed = pack(source, tmp_path / "set", options(joined))
    assert packed.group_source == "columns PatientID, StudyInstanceUID joined"
    files = linkage(tmp_path / "set")
    group = {row["file"]: row["group"] for row in files.values()}
    assert group["x"] == group["study0/series/IM0000"] == group["study0/series/IM0001"]
    assert len(set(group.values())) == 4
    unknown = DicomOptions(label_tag="BodyPartExamined", group_tags=("none",))
    assert pack(source, tmp_path / "none", options(unknown)).group_source == "none"
    composite = DicomOptions(label_tag="BodyPartExamined", group_tags=("PatientID+Modality", "StudyInstanceUID"))
    assert (
        pack(source, tmp_path / "both", options(composite)).group_source
        == "columns PatientID+Modality, StudyInstanceUID joined"
    )


def test_kept_tags_are_columns_and_small_cells_are_told(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "in", 24, PatientSex="F", PatientAge="091Y", Manufacturer="Maker")
    write(source / "x", ramp(50), BodyPartExamined="HIP", PatientID="PX", PatientSex="M", PatientAge="018M")
    dicom = DicomOptions(
        label_tag="BodyPartExamined", domain_tag="Manufacturer", keep_tags=("PatientAge", "PatientSex")
    )
    packed = pack(source, tmp_path / "set", options(dicom))
    rows = rows_of(packed)
    assert {(row["PatientAge"], row["PatientSex"], row["domain"]) for row in rows} == {
        (90, "F", "Maker"),
        (1, "M", None),
    }
    assert (
        "the kept PatientAge, PatientSex may single patients out: 1 of 2 combinations of their values are shared by "
        "fewer than 5 patients (1 patients in all)"
    ) in packed.info["cautions"]
    without = pack(source, tmp_path / "without", options())
    assert not any("single patients out" in text for text in without.info["cautions"])


def test_a_bad_file_is_named_by_key_with_its_reason(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "in", 24)
    for name, less in (("IM0000", 1700), ("IM0001", 20)):  # cut in the header, and in the pixels
        path = source / "study0/series" / name
        path.write_bytes(path.read_bytes()[:-less])
    (source / "gone").symlink_to(source / "nowhere")
    with pytest.raises(DataError, match="1 of 24 image files are missing or damaged") as caught:
        pack(source, tmp_path / "set", options())
    assert "IM0" not in caught.value.message
    assert "study0/series/IM0000" in (tmp_path / "set.private/problems.csv").read_text(encoding="ascii")
    packed = pack(source, tmp_path / "set", options(skip_bad=True))
    assert reasons(packed) == {
        "damaged DICOM header": 1,
        "pixels that cannot be decoded (Explicit VR Little Endian)": 1,
    }


def test_keys_do_not_depend_on_workers_or_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_tree(tmp_path / "in", 66)
    key = tmp_path / "key"
    key.write_text("ab" * 32, encoding="ascii")
    monkeypatch.setattr("medtl_dist.data.dicom_source._MIN_FOR_PROCESSES", 1)
    seen = []
    alone = pack(source, tmp_path / "one", options(key_file=key), lambda done, total: seen.append((done, total)))
    many = pack(source, tmp_path / "two", options(key_file=key, num_workers=2))
    assert alone.sha256 == many.sha256
    assert seen[: 2 * 66] == [(n, 66) for n in range(1, 67)] * 2  # headers, then pixels; then comes the audit


@pytest.mark.parametrize(
    ("dicom", "more", "message"),
    [
        (DicomOptions(), {}, "labelled by a table .* or by a tag"),
        (BODY, {"columns": Columns(group=("id",))}, "columns are named, but no table"),
        (DicomOptions(label_tag="BodyPartExamined", join_on="file"), {}, "columns are named, but no table"),
        (DicomOptions(label_tag="PatientName"), {}, r"--label-tag PatientName \(PN\): names, identifiers"),
        (DicomOptions(label_tag="Modality", keep_tags=("StudyDate",)), {}, r"--keep-tag StudyDate \(DA\): dates"),
        (DicomOptions(label_tag="Modality", domain_tag="StationName"), {}, "--domain-tag StationName"),
        (DicomOptions(table=Path("t.csv"), join_on="PixelData"), {}, "--join-on PixelData"),
        (DicomOptions(label_tag="Modality", group_tags=("Rows+PatientID",)), {}, "--group-tag Rows"),
        (
            DicomOptions(table=Path("t.csv"), label_tag="Modality"),
            {"columns": Columns(label="x")},
            "only one can be the label",
        ),
        (
            DicomOptions(table=Path("t.csv"), keep_tags=("KVP",)),
            {"columns": Columns(keep=("KVP",))},
            "columns of one name",
        ),
        (DicomOptions(table=Path("t.csv")), {}, "no such table: t.csv"),
        (BODY, {"format": "folder"}, "are for DICOM trees"),
        (BODY, {"out": "in/set"}, "lies inside the folder that is packed"),
    ],
)
def test_options_that_contradict_are_refused(tmp_path: Path, dicom: DicomOptions, more: dict, message: str) -> None:
    source = write_tree(tmp_path / "in", 2)
    out = tmp_path / more.pop("out", "set")
    with pytest.raises(UserError, match=message) as caught:
        pack(source, out, options(dicom, **more))
    assert "\n" not in caught.value.message


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(UserError, match="--allow anything: of burned-in, secondary-capture, ultrasound expected"):
        DicomOptions(allow=("anything",))
    with pytest.raises(UserError, match="--group-tag none stands alone"):
        DicomOptions(group_tags=("none", "PatientID"))


def test_a_dicom_folder_is_known_by_its_content(tmp_path: Path) -> None:
    assert detect_format(write_tree(tmp_path / "dicom", 4)) == "dicom"
    assert detect_format(write_folder(tmp_path / "images", 4)) == "folder"
    write(tmp_path / "images/normal/one", ramp(0))
    assert detect_format(tmp_path / "images") == "folder"


def test_without_pydicom_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_tree(tmp_path / "in", 2)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(UserError, match=r'pip install "medtl_dist\[dicom\]"'):
        pack(source, tmp_path / "set", options(format="auto"))


CANARY = "CANARY"


def canary_file(path: Path, number: int) -> None:
    """A file with the canary in every text tag of the standard, private tags, sequences, the file meta and the preamble."""
    canary = f"{CANARY}{number:04d}"
    ds = dataset(ramp(number), bits=12)
    values = {"DS": None, "IS": None, "AS": None, "DA": None, "TM": None, "DT": None, "AT": None}
    kept = {
        "PhotometricInterpretation",
        "BodyPartExamined",
        "SOPClassUID",
        "NumberOfFrames",
        "ConversionType",
        "LUTLabel",
    }
    for tag, (vr, _, _, _, keyword) in DicomDictionary.items():
        if keyword in kept or keyword in ds or not keyword or Tag(tag).group in (0x0000, 0x0002, 0x0004, 0x7FE0):
            continue
        if vr in values:  # no room for other than numbers and dates: pydicom would not write it
            continue
        if vr in ("CS", "LO", "SH", "PN", "LT", "ST", "UT", "UC", "UR", "AE", "UI"):
            ds.add_new(tag, vr, canary)
    for keyword in (
        "PatientID",
        "SOPInstanceUID",
        "SeriesInstanceUID",
        "StudyInstanceUID",
        "Modality",
        "VOILUTFunction",
    ):
        setattr(ds, keyword, canary)
    ds.BodyPartExamined = ("CHEST", "HIP")[number % 2]
    ds.PatientAge = f"{CANARY}"
    ds.RequestAttributesSequence = [sequence_item(StudyInstanceUID=canary, ScheduledProcedureStepDescription=canary)]
    block = ds.private_block(0x0041, f"{CANARY} block", create=True)
    block.add_new(1, "LO", canary)
    block.add_new(2, "UN", canary.encode())
    ds.file_meta.SourceApplicationEntityTitle = canary
    ds.file_meta.MediaStorageSOPInstanceUID = UID(canary)
    ds.file_meta.ImplementationVersionName = canary
    ds.preamble = canary.encode().ljust(128, b"\0")
    path.parent.mkdir(parents=True, exist_ok=True)
    save(ds, path)


@pytest.mark.filterwarnings("ignore")  # pydicom warns of what these tests write
@pytest.mark.parametrize("window", ["percentile", "tags"])
def test_no_text_of_a_file_leaves_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], window: str
) -> None:
    """Through the command line, packing and failing: nothing but the private folder may hold the canary."""
    source = tmp_path / "in"
    for number in range(12):
        canary_file(source / f"{CANARY}-folder" / f"{CANARY}{number:04d}.dcm", number)
    assert sum(path.read_bytes().count(CANARY.encode()) for path in source.rglob("*.dcm")) > 12 * 500
    undecodable = source / f"{CANARY}-undecodable"
    undecodable.write_bytes((source / f"{CANARY}-folder/{CANARY}0003.dcm").read_bytes()[:-100])
    headless = source / f"{CANARY}-headless"
    headless.write_bytes((source / f"{CANARY}-folder/{CANARY}0004.dcm").read_bytes()[:500])
    arguments = [
        "data", "pack", str(source), "--out", str(tmp_path / "set"), "--label-tag", "BodyPartExamined",
        "--keep-tag", "PatientAge", "--keep-tag", "PatientSex", "--keep-tag", "KVP", "--keep-window", "--window", window,
    ]  # fmt: skip
    caplog.clear()
    caplog.set_level(logging.DEBUG)
    capfd.readouterr()
    said = []
    for more, code, message in (
        ([], 3, "missing or damaged (damaged DICOM header)"),
        ([], 3, "cannot be packed: pixels that cannot be decoded"),
        (["--skip-bad"], 0, "12 images"),
    ):
        assert run([*arguments, *more]) == code
        said.append("".join(capfd.readouterr()))
        assert message in said[-1]
        headless.unlink(missing_ok=True)
    assert CANARY not in "".join(said) + caplog.text
    files = list((tmp_path / "set").iterdir())
    assert len(files) >= 4
    for path in files:
        assert CANARY.encode() not in path.read_bytes()
        assert CANARY not in path.name
    index = pq.read_table(tmp_path / "set/index.parquet")
    assert index.num_rows == 12
    assert CANARY not in repr(index.to_pylist())
    assert CANARY in repr(pq.read_table(tmp_path / "set.private/linkage.parquet").to_pylist())
