"""`medtl data`: options reach the library, facts are printed, mistakes are one line and an exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from dicom_files import write_tree
from image_folders import write_folder, write_table
from typer.testing import CliRunner

from medtl_dist.cli import main
from medtl_dist.cli.data import app
from medtl_dist.errors import MedtlError, UserError


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, MedtlError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_pack_prints_what_the_set_holds(tmp_path: Path) -> None:
    source = write_table(tmp_path / "in", 48, patients=24, splits=("train", "test"))
    (tmp_path / "in/images/Doe-0003.png").write_bytes(b"")
    out = run(
        "pack", source, "--out", tmp_path / "set", "--group-col", "split+patient_id", "--split-col", "split",
        "--domain-col", "site", "--keep-col", "age", "--positive", "normal", "--skip-bad", "--workers", 1,
    )  # fmt: skip
    lines = out.splitlines()
    assert lines[0] == f"{tmp_path}/set: 47 images, binary, positive normal; grey, native size, png"
    assert lines[1] == "groups: column split+patient_id; splits: given, val from train by group"
    assert lines[2].split() == ["split", "images", "groups", "sick", "normal", "shards"]
    assert [line.split()[0] for line in lines[3:6]] == ["train", "val", "test"]
    assert "found 48, left out 1" in lines
    assert "  1 × unreadable image (test, sick; 1 groups)" in lines
    assert "set.private names files and patients" in lines[-1]
    assert "Doe" not in out

    again = run("info", tmp_path / "set").splitlines()
    assert again == lines[:-1]


def test_dicom_options_reach_the_library(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "in", 24, BurnedInAnnotation="YES", PatientAge="095Y", Manufacturer="Maker")
    facts = json.loads(
        run(
            "pack", source, "--out", tmp_path / "set", "--label-tag", "BodyPartExamined", "--group-tag", "StudyInstanceUID",
            "--domain-tag", "Manufacturer", "--keep-tag", "PatientAge", "--keep-tag", "PatientSex", "--keep-window",
            "--window", "-10,1000.5", "--frames", "first", "--allow", "ultrasound,burned-in", "--workers", 1, "--json",
        )
    )  # fmt: skip
    assert facts["group_source"] == "column StudyInstanceUID"
    assert facts["preprocessing"]["window"] == {"policy": "fixed", "low": -10.0, "high": 1000.5, "frames": "first"}
    rows = pq.read_table(tmp_path / "set/index.parquet").to_pylist()
    assert {(r["domain"], r["PatientAge"], r["PatientSex"], r["window"]) for r in rows} == {
        ("Maker", 90, None, "fixed")
    }
    table = tmp_path / "labels.csv"
    table.write_text("\n".join(["patient,label", *(f"P{n},{'ab'[n % 2]}" for n in range(12))]), encoding="ascii")
    out = run(
        "pack", source, "--out", tmp_path / "joined", "--table", table, "--join-on", "PatientID", "--image-col", "patient",
        "--allow", "burned-in", "--workers", 1,
    )  # fmt: skip
    assert "note: the table is joined on PatientID (--join-on)" in out
    assert "groups: column PatientID; splits: by group" in out
    with pytest.raises(UserError, match="--window wide: tags, percentile, or LO,HI"):
        run("pack", source, "--out", tmp_path / "none", "--label-tag", "Modality", "--window", "wide")


def test_json_is_the_dataset_file_and_where_it_is(tmp_path: Path) -> None:
    facts = json.loads(run("pack", write_folder(tmp_path / "in"), "--out", tmp_path / "set", "--seed", 3, "--json"))
    assert facts["folder"] == str(tmp_path / "set")
    assert facts["split_source"]["seed"] == 3
    assert facts == json.loads(run("info", tmp_path / "set", "--json"))
    assert facts["group_source"] == "none"


def test_unknown_patients_are_said_twice(tmp_path: Path) -> None:
    out = run("pack", write_folder(tmp_path / "in"), "--out", tmp_path / "set")
    assert "groups: none, patients are unknown; splits: by image" in out
    assert "caution: patients are unknown" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split", "1,2"], "three shares of train, val, test"),
        (["--format", "dcm"], "--format dcm: one of auto, folder, table, medmnist, dicom expected"),
        (["--label-col", "diagnosis"], "its columns: file, label, patient_id, split, site, age"),
        (["--key-file", "none.key"], "key file none.key cannot be read"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    source = write_table(tmp_path / "in", 4)
    with pytest.raises(UserError) as caught:
        run("pack", source, "--out", tmp_path / "set", *arguments)
    assert message in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("command", ["pack", "info"])
def test_help_has_an_example(command: str) -> None:
    assert f"medtl data {command} " in run(command, "--help")


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["data", "pack", "x", "--lable-col", "y"], "--lable-col"),
        (["data", "pack"], "SOURCE"),
        (["data", "info", "a", "b"], "unexpected extra argument"),
        (["trian"], "trian"),
        (["train", "--set"], "--set"),
    ],
)
def test_a_mistyped_command_line_is_two_and_no_traceback(
    command: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(command) == 2
    errors = capsys.readouterr().err
    assert says in errors
    assert "Traceback" not in errors
    assert "bug" not in errors
