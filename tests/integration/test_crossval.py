"""`medtl crossval` as a user types it, on 20 images of 8 patients: read back from what it leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score
from tiny_backbone import tiny_registered

from medtl_dist.cli.main import run
from medtl_dist.data.shards import open_dataset, read_split

_SMOKE = [
    "--preset", "smoke", "--set", "train.threads=1", "--set", "model.backbone=tiny", "--set", "optim.lr=0.2",
    "--set", "train.epochs=3",
]  # fmt: skip
# The command line with the tests' own tiny network, as a process of its own.
_SCRIPT = """
import sys
from tiny_backbone import tiny_registered
from medtl_dist.cli.main import run
with tiny_registered():
    sys.exit(run(sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def tiny() -> Iterator[None]:
    with tiny_registered():
        yield


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of 20 images of 8 patients, without signal, and 10 of 4 patients in test, whose shard holds garbage."""
    place = tmp_path_factory.mktemp("crossval")
    (place / "images").mkdir()
    rng, lines = np.random.default_rng(0), ["file,label,patient,split"]
    for patient in range(12):
        for image in range(3 - patient % 2):
            name = f"images/{patient}-{image}.png"
            cv2.imwrite(str(place / name), rng.integers(0, 255, (32, 32), np.uint8))
            split = "test" if patient >= 8 else "val" if patient >= 6 else "train"
            lines.append(f"{name},{('well', 'sick')[patient // 2 % 2]},{patient},{split}")
    (place / "table.csv").write_text("\n".join(lines) + "\n")
    (place / "key").write_text("5a" * 32)
    packed = run(
        ["data", "pack", str(place / "table.csv"), "--out", str(place / "set"), "--group-col", "patient", "--split-col",
         "split", "--positive", "sick", "--key-file", str(place / "key"), "--workers", "1"]
    )  # fmt: skip
    assert packed == 0
    for shard in open_dataset(place / "set").shards("test"):
        (place / "set" / shard.name).write_bytes(b"\xff" * shard.bytes)  # whoever reads it will know
    return place / "set"


@pytest.fixture(scope="module")
def done(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cross-validation of 4 folds and 2 repeats, its sets kept."""
    folder = tmp_path_factory.mktemp("runs") / "cv"
    with tiny_registered():
        assert run(command(shards, folder, "--repeats", "2", "--keep-folds")) == 0
    return folder


def command(shards: Path, folder: Path, *more: str) -> list[str]:
    return ["crossval", "--folds", "4", *_SMOKE, "--set", f"data.shards={shards}", "--run-dir", str(folder), *more]


def test_every_patient_outside_test_is_held_out_whole_and_once_a_repeat(done: Path, shards: Path) -> None:
    table = pq.read_table(done / "predictions" / "oof.parquet").to_pandas()
    source = open_dataset(shards)
    expected = {
        key.hex() for split in ("train", "val") for key in read_split(source, split, ["key"]).column("key").to_pylist()
    }
    assert len(expected) == 20
    for _, repeat in table.groupby("repeat"):
        assert sorted(repeat.key) == sorted(expected)
        assert (repeat.groupby("group").fold.nunique() == 1).all()
        assert repeat.groupby("fold").label.nunique().tolist() == [2, 2, 2, 2]
        assert repeat.group.nunique() == 8
    one, other = ({frozenset(part.group) for _, part in table[table.repeat == r].groupby("fold")} for r in (0, 1))
    assert one != other
    # What each model was trained and watched on, from the sets themselves.
    sets = sorted((done / "sets").iterdir())
    assert [place.name for place in sets] == [f"{r:02d}-{f}" for r in (1, 2) for f in (1, 2, 3, 4)]
    for place in sets:
        parts = {split: read_split(open_dataset(place), split, ["key", "group"]) for split in ("train", "val", "test")}
        keys = {split: {key.hex() for key in part.column("key").to_pylist()} for split, part in parts.items()}
        groups = {split: set(part.column("group").to_pylist()) for split, part in parts.items()}
        repeat, fold = (int(number) - 1 for number in place.name.split("-"))
        held_out = table[(table.repeat == repeat) & (table.fold == fold)]
        assert keys["test"] == set(held_out.key)
        assert keys["train"] == expected - keys["test"]
        assert groups["train"].isdisjoint(groups["test"])
        assert keys["val"] <= keys["train"]


def test_test_is_never_opened(done: Path) -> None:
    assert not list(done.parent.rglob("test_openings.jsonl"))
    assert not list(done.rglob("predictions/test.parquet"))
    for file in done.glob("folds/*/results.json"):
        results = json.loads(file.read_text())
        assert list(results["splits"]) == ["val"]
        assert results["test_openings"] is None


def test_the_numbers_are_those_of_the_predictions(done: Path) -> None:
    found = json.loads((done / "crossval.json").read_text())
    table = pq.read_table(done / "predictions" / "oof.parquet").to_pandas()
    repeats = []
    for repeat, rows in table.groupby("repeat"):
        won = pairs = 0.0
        for fold, part in rows.groupby("fold"):
            auc, count = roc_auc_score(part.label, part.logit_sick), part.label.sum() * (1 - part.label).sum()
            entry = next(one for one in found["per_fold"] if (one["repeat"], one["fold"]) == (repeat, fold))
            assert entry["auc"] == pytest.approx(auc)
            assert (entry["n"], entry["n_positive"], entry["pairs"]) == (len(part), part.label.sum(), count)
            won, pairs = won + auc * count, pairs + count
        repeats.append(won / pairs)
    assert found["per_repeat"] == pytest.approx(repeats)
    assert found["auc"] == pytest.approx(np.mean(repeats))
    assert found["auc_ci"][0] < found["auc"] < found["auc_ci"][1]
    assert (found["n"], found["n_groups"], found["folds"], found["repeats"]) == (20, 8, 4, 2)
    assert any("Training variance" in text for text in found["leaves_out"])
    assert "unreliable" in found["ci_warning"]


def test_the_last_epoch_is_scored_whatever_val_says(done: Path) -> None:
    best_by_val = []
    for place in (done / "folds").iterdir():
        results = json.loads((place / "results.json").read_text())
        history = pq.read_table(place / "history.parquet").to_pandas()
        assert results["best_epoch"] == 2
        assert results["best_checkpoint"] == history.checkpoint.iloc[-1]
        best_by_val.append(int(history.val_auc.to_numpy().argmax()))
        seed = int(place.name.split("-")[0]) - 1
        assert f"seed: {seed}\n" in (place / "config.yaml").read_text()
    assert set(best_by_val) != {2}  # choosing by val would have shown


def test_the_page_and_the_ensemble_are_complete(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (done / "crossval.html").read_text()
    for said in ("What the interval leaves out", "Training variance", "Each grey curve is a fold", "was not opened"):
        assert said in page
    assert "http://" not in page
    assert "<script" not in page
    assert run(["report", str(done)]) == 0
    assert (done / "crossval.html").read_text() == page
    capsys.readouterr()
    assert run(["status", str(done), "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["state"], len(status["parts"])) == ("finished", 8)
    members = json.loads((done / "ensemble.json").read_text())["members"]
    assert len(members) == 8
    assert all((done / member / "results.json").is_file() for member in members)


def test_a_killed_cross_validation_goes_on_where_it_was(done: Path, shards: Path, tmp_path: Path) -> None:
    folder, second = tmp_path / "cv", tmp_path / "cv" / "folds" / "01-2"
    tests = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])}
    arguments = command(shards, folder)
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", _SCRIPT, *arguments], env=environment, stdout=log, stderr=log, start_new_session=True
        )
        while not (second / "checkpoints").is_dir() and process.poll() is None:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()
    first = [folder / "folds" / "01-1" / name for name in ("results.json", "predictions/held_out.parquet")]
    before = [file.stat().st_mtime_ns for file in first]
    assert not (folder / "crossval.json").exists()
    assert run(arguments) == 2  # a folder in use needs --resume
    assert run([*command(shards, folder, "--repeats", "2"), "--resume"]) == 2
    assert run([*arguments, "--resume"]) == 0
    assert [file.stat().st_mtime_ns for file in first] == before  # neither trained nor scored again
    assert not (folder / "sets").exists()
    one, other = (pq.read_table(place / "predictions" / "oof.parquet").to_pandas() for place in (folder, done))
    assert one.equals(other[other.repeat == 0])  # killed and resumed, or not: the same numbers


def test_inner_epochs_are_chosen_on_other_patients(shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cv"
    assert (
        run(command(shards, folder, "--epochs-from", "inner", "--keep-folds", "--set", "data.global_batch_size=4")) == 0
    )
    for place in (folder / "sets").iterdir():
        groups = {
            split: set(read_split(open_dataset(place), split, ["group"]).column("group").to_pylist())
            for split in ("train", "val", "test")
        }
        assert sum(map(len, groups.values())) == 8 == len(set.union(*groups.values()))
        results = json.loads((folder / "folds" / place.name / "results.json").read_text())
        history = pq.read_table(folder / "folds" / place.name / "history.parquet").to_pandas()
        assert history.val_auc[results["best_epoch"]] == history.val_auc.max()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--folds", "5"], "--folds 5: each fold needs a patient of each class"),
        (["--set", "train.early_stop_epochs=2"], "give --epochs-from inner"),
        (["--set", "data.global_batch_size=16"], "the smallest fold trains on 1"),
        (["--repeats", "0"], "--repeats 0"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    more: list[str], message: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command(shards, tmp_path / "cv", *more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "cv").exists()
