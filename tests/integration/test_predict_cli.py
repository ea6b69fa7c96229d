"""`medtl predict`, `evaluate --data`, `compare`, `export` as typed; a kill costs a part, and no input is scored twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from predict_runs import pack_table, write_images

from medtl_dist.cli.main import run

_MEDTL = [sys.executable, "-m", "medtl_dist.cli.main"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """images/, set/ and a finished run of the smoke preset; elsewhere/: another set."""
    place = tmp_path_factory.mktemp("predict-cli")
    pack_table(write_images(place / "images", 96), place / "set")
    pack_table(write_images(place / "others", 40, classes=("healthy", "ill"), seed=3), place / "elsewhere")
    command = ["train", "--preset", "smoke", "--set", f"data.shards={place / 'set'}", "--set", "train.epochs=1"]
    assert run([*command, "--set", "train.threads=1", "--run-dir", str(place / "run")]) == 0
    return place


def test_scores_of_raw_files_are_those_of_the_run(place: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "scores.parquet"
    command = ["predict", str(place / "run"), str(place / "images" / "labels.csv"), "--out", str(out)]
    assert run([*command, "--group-col", "patient", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["scored"], told["bad"], told["patients"]) == (96, 0, str(tmp_path / "scores.patients.parquet"))
    scores = pd.read_parquet(out)
    keys = pq.read_table(place / "set.private" / "linkage.parquet", columns=["key", "file"]).to_pandas()
    keys["key"] = [key.hex() if isinstance(key, bytes) else key for key in keys.key]
    val = pd.read_parquet(place / "run" / "predictions" / "val.parquet").merge(keys, on="key")
    both = val.merge(scores, on="file", suffixes=("", "_raw"))
    assert len(both) == len(val) == 24
    assert (both.logit_SICK == both.logit_SICK_raw).all()
    assert run([*command, "--group-col", "patient"]) == 0  # made already
    assert "96 images scored" in capsys.readouterr().out
    assert run(command) == 2
    assert "begun with another group" in capsys.readouterr().err


def test_bad_inputs_are_exit_code_3_unless_they_are_accepted(place: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(place / "images" / "pictures", tmp_path / "inputs")
    (tmp_path / "inputs" / "broken Doe.png").write_bytes(b"no image")
    command = ["predict", str(place / "run"), str(tmp_path / "inputs"), "--out", str(tmp_path / "s.parquet")]
    for _ in range(2):  # finished with 96 scores, and told again
        assert run(command) == 3
        told = capsys.readouterr()
        assert told.err.startswith("error: 1 inputs could not be scored (1 × unreadable image); they are listed in")
        assert "Doe" not in told.err + told.out
    assert run([*command, "--skip-bad"]) == 0
    assert pd.read_parquet(tmp_path / "s.errors.parquet").file.tolist() == ["broken Doe.png"]
    assert pq.read_metadata(tmp_path / "s.parquet").num_rows == 96


def test_killed_in_the_middle_the_same_command_goes_on_and_scores_each_input_once(place: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole.parquet", tmp_path / "scores.parquet"
    source = tmp_path / "inputs"
    for copy in range(2):  # enough that it is caught in the middle
        shutil.copytree(place / "images" / "pictures", source / str(copy))
    command = [*_MEDTL, "predict", str(place / "run"), str(source), "--part-size", "8", "--out"]
    process = subprocess.Popen([*command, str(out)], stdout=subprocess.DEVNULL)
    parts = tmp_path / "scores.parquet.parts"
    end = time.monotonic() + 120
    while not (parts / "part-00002.parquet").exists():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    made = {path.name: path.stat().st_mtime_ns for path in parts.glob("part-*.parquet")}
    assert 3 <= len(made) < 24
    watched = subprocess.run([*command, str(out), "--json"], capture_output=True, text=True, check=True)
    told = json.loads(watched.stdout)
    assert (told["scored"], told["resumed_parts"]) == (192, len(made))
    assert run([*command[3:], str(whole)]) == 0
    assert out.read_bytes() == whole.read_bytes()
    assert pd.read_parquet(out).file.is_unique
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inputs", "scores.parquet", "whole.parquet"]


def test_external_validation_and_its_refusals(place: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(place / "run", tmp_path / "runs" / "run")
    command = ["evaluate", str(tmp_path / "runs" / "run"), "--data", str(place / "elsewhere")]
    assert run(command) == 2
    assert "classes that the run does not know: healthy, ill" in capsys.readouterr().err
    assert run([*command, "--class-map", "healthy=NORMAL,ill=SICK"]) == 0
    told = capsys.readouterr().out
    assert "elsewhere (train, val, test)  AUC" in told
    assert "prevalence 0.500" in told
    assert "its test split  opened 1 time by 1 configuration" in told
    assert (tmp_path / "runs" / "run" / "external" / "elsewhere" / "report.html").is_file()
    assert run([*command, "--class-map", "healthy=NORMAL,ill=SICK", "--split", "val", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["splits"] == ["val"]
    assert run(["evaluate", str(place / "run"), "--class-map", "a=b"]) == 2
    assert "name it with --data SET" in capsys.readouterr().err
    assert run(["evaluate", str(place / "run"), "--split", "all"]) == 2


def test_a_run_compared_with_itself_does_not_differ(place: Path, capsys) -> None:
    assert run(["compare", str(place / "run"), str(place / "run")]) == 0
    assert "second minus first +0.000 (no interval" in capsys.readouterr().out
    assert run(["compare", str(place / "run"), str(place / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["comparison"]["difference"] == 0
    assert run(["compare", str(place / "run"), str(place / "run"), "--split", "train"]) == 2


def test_weights_are_exported_once(place: Path, tmp_path: Path, capsys) -> None:
    command = ["export", str(place / "run"), "--out", str(tmp_path / "m.safetensors")]
    assert run([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] > 40e6
    assert run(command) == 2
    assert "exists; name another file" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["predict", "compare", "export", "evaluate"])
def test_help_shows_an_example(command: str, capsys) -> None:
    assert run([command, "--help"]) == 0
    assert f"Example: medtl {command} runs/first" in " ".join(capsys.readouterr().out.split())
