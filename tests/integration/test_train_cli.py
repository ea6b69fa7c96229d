"""`medtl train`, `evaluate` and `report` as a user types them, on a tiny packed set; every mistake is one line and a code."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from kept_weights import weights_in
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from medtl_dist.cli.main import run
from medtl_dist.config import load_config
from medtl_dist.demo_data import write_demo_images

_MEDTL = [sys.executable, "-m", "medtl_dist.cli.main"]
_SMOKE = ["--preset", "smoke", "--set", "train.threads=1"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed set of made-up radiographs, 40 patients."""
    place = tmp_path_factory.mktemp("cli")
    table = write_demo_images(place / "images", num_patients=40, seed=1, image_size_px=32)
    (place / "key").write_text("5a" * 32)  # a key of our own, so that every run of the tests packs the same bytes
    command = [
        "data",
        "pack",
        str(table),
        "--out",
        str(place / "set"),
        "--group-col",
        "patient_id",
        "--domain-col",
        "domain",
    ]
    assert (
        run(
            [
                *command,
                "--key-file",
                str(place / "key"),
                "--keep-col",
                "view",
                "--split",
                "0.6,0.2,0.2",
                "--workers",
                "1",
            ]
        )
        == 0
    )
    return place / "set"


@pytest.fixture(scope="module")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its test split opened once."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    assert run(["train", *_SMOKE, "--set", f"data.shards={shards}", "--run-dir", str(folder), "--test"]) == 0
    return folder


def test_a_run_leaves_the_whole_folder(trained: Path) -> None:
    names = {entry.name for entry in trained.iterdir() if not entry.name.startswith(".")}
    assert names == {
        "checkpoints", "config.yaml", "events", "history.parquet", "log.jsonl", "predictions", "report.html", "results.json",
    }  # fmt: skip
    assert (trained / "report.html").stat().st_size > 10_000


def test_reported_numbers_are_scikit_learns_on_the_predictions(trained: Path, shards: Path) -> None:
    results = json.loads((trained / "results.json").read_text())
    index = pq.read_table(shards / "index.parquet").to_pandas()
    for split in ("val", "test"):
        table = pq.read_table(trained / "predictions" / f"{split}.parquet").to_pandas()
        expected_keys = [key.hex() for key in index[index.split == split].key]
        assert table.key.tolist() == expected_keys  # every image, each once
        entry = results["splits"][split]
        assert entry["auc"] == pytest.approx(roc_auc_score(table.label, table.logit_OPACITY), abs=1e-12)
        expected_precision = average_precision_score(table.label, table.logit_OPACITY)
        assert entry["average_precision"] == pytest.approx(expected_precision, abs=1e-12)
        assert entry["prevalence"] == pytest.approx(table.label.mean())
        assert entry["n_groups"] == table.group.nunique()
        np.testing.assert_allclose(table.score_OPACITY, 1 / (1 + np.exp(-table.logit_OPACITY)))
        assert {"domain", "view"} <= set(table.columns)
        predicted = table.logit_OPACITY >= results["threshold"]["logit"]
        confusion = [[int(((table.label == t) & (predicted == p)).sum()) for p in (False, True)] for t in (0, 1)]
        assert entry["confusion"] == confusion
    assert results["test_openings"] == {"count": 1, "configurations": 1}
    val = pq.read_table(trained / "predictions" / "val.parquet").to_pandas()
    wrong, right, _ = roc_curve(val.label, val.logit_OPACITY)
    called = val.logit_OPACITY >= results["threshold"]["logit"]
    assert called[val.label == 1].mean() - called[val.label == 0].mean() == pytest.approx(
        (right - wrong).max()
    )  # Youden, on val


def test_the_resolved_config_repeats_the_run(trained: Path, tmp_path: Path) -> None:
    assert run(["train", "--config", str(trained / "config.yaml"), "--run-dir", str(tmp_path / "again")]) == 0
    results = json.loads((tmp_path / "again" / "results.json").read_text())
    assert results["test_openings"] is None  # nobody asked for test, so nobody opened it
    assert list(results["splits"]) == ["val"]
    assert not (tmp_path / "test_openings.jsonl").exists()
    one, again = (sorted((folder / "checkpoints").iterdir())[-1] for folder in (trained, tmp_path / "again"))
    weights = weights_in(one)
    for name, tensor in weights_in(again).items():
        assert tensor.equal(weights[name]), name


def test_evaluate_repeats_the_numbers_and_counts_the_opening(trained: Path, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(trained, folder)
    before = json.loads((folder / "results.json").read_text())
    for opening in (1, 2):
        assert run(["evaluate", str(folder), "--split", "test"]) == 0
        after = json.loads((folder / "results.json").read_text())
        assert after["splits"] == before["splits"]
        assert after["test_openings"] == {"count": opening, "configurations": 1}  # this folder has a ledger of its own
    assert "AUC" in capsys.readouterr().out
    assert run(["evaluate", str(folder)]) == 0
    assert json.loads((folder / "results.json").read_text())["splits"]["val"] == before["splits"]["val"]


def test_a_run_follows_its_set_to_another_place_but_not_to_another_set(
    trained: Path, shards: Path, tmp_path: Path, capsys
) -> None:
    folder, moved = tmp_path / "copy", tmp_path / "exp #1: moved"
    shutil.copytree(trained, folder)
    shutil.copytree(shards, moved)
    command = ["train", *_SMOKE, "--run-dir", str(folder), "--resume", "--set"]
    assert run([*command, f"data.shards={moved}"]) == 0
    assert load_config(file=folder / "config.yaml").data.shards == str(moved)
    assert run(["evaluate", str(folder)]) == 0
    capsys.readouterr()
    (moved / "dataset.json").write_text((moved / "dataset.json").read_text() + " ")
    _fails([*command, f"data.shards={moved}"], 2, "another data set", capsys=capsys)


def test_a_run_folder_that_cannot_be_written_is_one_line(trained: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(trained, folder)

    def full(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("medtl_dist.storage.os.replace", full)
    before = (folder / "results.json").read_bytes()
    _fails(["evaluate", str(folder)], 5, "No space left on device", capsys=capsys)
    assert (folder / "results.json").read_bytes() == before


def _fails(arguments: list[str], code: int, *parts: str, capsys) -> None:
    assert run(arguments) == code
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: ")
    assert "Traceback" not in captured.err
    for part in parts:
        assert part in lines[0]


def test_an_existing_run_folder_is_refused(trained: Path, shards: Path, tmp_path: Path, capsys) -> None:
    base = ["train", *_SMOKE, "--set", f"data.shards={shards}", "--run-dir"]
    _fails([*base, str(trained)], 2, "already holds a run", "--resume", capsys=capsys)
    _fails([*base, str(trained), "--resume", "--set", "optim.lr=0.5"], 2, "optim.lr: 0.01 -> 0.5", capsys=capsys)
    (tmp_path / "other.txt").write_text("mine")
    _fails([*base, str(tmp_path)], 2, "is not a run folder", capsys=capsys)
    assert run([*base, str(trained), "--resume"]) == 0
    assert "had already finished" in capsys.readouterr().err


def test_bad_configs_and_inputs_name_themselves(shards: Path, tmp_path: Path, capsys) -> None:
    base = ["train", *_SMOKE, "--set", f"data.shards={shards}", "--run-dir", str(tmp_path / "run")]
    _fails(
        [*base, "--set", "optim.learning_rate=1"], 2, "unknown key optim.learning_rate", "lr, momentum", capsys=capsys
    )
    _fails([*base, "--set", f"data.shards={tmp_path / 'none'}"], 2, "none", capsys=capsys)
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"not weights")
    _fails([*base, "--set", f"model.weights={weights}"], 2, "weights.pth", capsys=capsys)
    _fails(["evaluate", str(tmp_path / "none")], 2, "not a run folder", capsys=capsys)
    _fails(["evaluate", str(tmp_path), "--split", "all"], 2, "val or test", capsys=capsys)


def test_a_mistake_leaves_a_folder_that_the_corrected_command_can_use(shards: Path, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "run"
    base = ["train", *_SMOKE, "--set", f"data.shards={shards}", "--set", "train.epochs=1", "--run-dir", str(folder)]
    _fails([*base, "--set", "model.weights=absent.pth"], 2, "absent.pth", capsys=capsys)
    assert run(base) == 0


def test_a_truncated_shard_is_damage(shards: Path, tmp_path: Path, capsys) -> None:
    copy = tmp_path / "set"
    shutil.copytree(shards, copy)
    tar = sorted(copy.glob("train-*.tar"))[0]
    tar.write_bytes(tar.read_bytes()[:-2000])
    command = ["train", *_SMOKE, "--set", f"data.shards={copy}", "--run-dir", str(tmp_path / "run")]
    _fails(command, 3, tar.name, capsys=capsys)


def test_three_classes_with_one_absent_from_val(tmp_path: Path) -> None:
    """Multi-class, no patients, a class that val lacks: macro over the classes that are defined, never a NaN."""
    drawing = np.random.default_rng(0)
    for split, counts in (("train", (12, 12, 12)), ("val", (6, 6, 0)), ("test", (5, 5, 5))):
        for label, count in zip(("a", "b", "c"), counts, strict=True):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                image = drawing.integers(0, 255, (32, 32), dtype=np.uint8)
                assert cv2.imwrite(str(folder / f"{number}.png"), image)
    shutil.rmtree(tmp_path / "images" / "val" / "c")
    (tmp_path / "key").write_text("5a" * 32)
    pack = ["data", "pack", str(tmp_path / "images"), "--out", str(tmp_path / "set"), "--workers", "1"]
    assert run([*pack, "--key-file", str(tmp_path / "key")]) == 0
    command = ["train", *_SMOKE, "--set", f"data.shards={tmp_path / 'set'}", "--set", "train.class_weights=balanced"]
    assert run([*command, "--run-dir", str(tmp_path / "run"), "--test"]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert "NaN" not in (tmp_path / "run" / "results.json").read_text()
    val, test = results["splits"]["val"], results["splits"]["test"]
    assert val["per_class"]["c"]["auc"] is None
    assert val["macro"]["n_defined"] == 2
    table = pq.read_table(tmp_path / "run" / "predictions" / "test.parquet").to_pandas()
    scores = table[["score_a", "score_b", "score_c"]].to_numpy()
    # Ranked by log-odds: scores of a network this raw may be 1.0 to the last bit.
    aucs = [roc_auc_score(table.label == k, table[f"logit_{name}"]) for k, name in enumerate("abc")]
    assert test["macro"]["auc"] == pytest.approx(sum(aucs) / 3, abs=1e-12)
    np.testing.assert_allclose(scores.sum(axis=1), 1)
    confusion = np.zeros((3, 3), int)
    logits = table[["logit_a", "logit_b", "logit_c"]].to_numpy()
    np.add.at(confusion, (table.label, logits.argmax(axis=1)), 1)
    assert test["confusion"] == confusion.tolist()
    assert any("calibrated" in caution for caution in results["cautions"])


def test_patients_as_the_unit(shards: Path, tmp_path: Path) -> None:
    """``evaluate.unit=patient``: a patient's score is its images' largest, and the threshold is fixed on val's patients."""
    command = [
        "train",
        *_SMOKE,
        "--set",
        f"data.shards={shards}",
        "--set",
        "train.epochs=1",
        "--set",
        "evaluate.unit=patient",
    ]
    assert run([*command, "--set", "evaluate.aggregate=max", "--run-dir", str(tmp_path / "run"), "--test"]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    for split in ("val", "test"):
        table = pq.read_table(tmp_path / "run" / "predictions" / f"{split}.parquet").to_pandas()
        patients = table.groupby("group")[["label", "logit_OPACITY"]].max()
        entry = results["splits"][split]
        assert entry["unit"] == "patient"
        assert entry["n"] == len(patients) < len(table)
        assert entry["auc"] == pytest.approx(roc_auc_score(patients.label, patients.logit_OPACITY), abs=1e-12)
        assert entry["other_level"]["auc"] == pytest.approx(roc_auc_score(table.label, table.logit_OPACITY), abs=1e-12)
        if split == "val":
            wrong, right, _ = roc_curve(patients.label, patients.logit_OPACITY)
            called = patients.logit_OPACITY >= results["threshold"]["logit"]
            found = called[patients.label == 1].mean() - called[patients.label == 0].mean()
            assert found == pytest.approx((right - wrong).max())


def test_sigkill_then_the_same_command_equals_an_undisturbed_run(trained: Path, shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    command = [
        *_MEDTL,
        "train",
        *_SMOKE,
        "--set",
        f"data.shards={shards}",
        "--run-dir",
        str(folder),
        "--resume",
        "--test",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = folder / "log.jsonl"
    deadline = time.monotonic() + 240
    while not (log.exists() and '"kind": "epoch"' in log.read_text()):  # the first epoch's checkpoint is committed
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (folder / "results.json").exists()
    assert subprocess.run(command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0
    one, other = (json.loads((run / "results.json").read_text()) for run in (trained, folder))
    assert one["splits"] == other["splits"]
    newest = sorted((folder / "checkpoints").iterdir())[-1].name
    weights = weights_in(trained / "checkpoints" / newest)
    for name, tensor in weights_in(folder / "checkpoints" / newest).items():
        assert tensor.equal(weights[name]), name


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_polite_stop_leaves_a_checkpoint_and_says_so(shards: Path, tmp_path: Path, number: int, code: int) -> None:
    folder = tmp_path / "stopped"
    command = [*_MEDTL, "train", *_SMOKE, "--set", f"data.shards={shards}", "--set", "train.epochs=2000"]
    process = subprocess.Popen(
        [*command, "--run-dir", str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    log = folder / "log.jsonl"
    deadline = time.monotonic() + 240
    while not (log.exists() and '"kind": "epoch"' in log.read_text()):
        assert process.poll() is None, "the run ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == code, errors
    assert "--resume goes on" in errors
    assert "Traceback" not in errors
