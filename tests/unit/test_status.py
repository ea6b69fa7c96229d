from __future__ import annotations

import fcntl
import json
import threading
from pathlib import Path

import pytest

from medtl_dist.cli.main import run
from medtl_dist.config import load_config
from medtl_dist.errors import UserError
from medtl_dist.run import Folder
from medtl_dist.train import budget
from medtl_dist.train.run_folder import opened_run_folder

_ROW = {
    "train_loss": 0.5,
    "val_loss": 0.4,
    "val_auc": 0.9,
    "images_per_s": 12.0,
    "data_wait_fraction": 0.1,
    "epoch_s": 30.0,
    "data_wait_s": 3.0,
    "compute_s": 20.0,
    "communication_s": 1.0,
    "evaluation_s": 5.0,
    "checkpoint_s": 1.0,
}
_PROGRESS = {
    "epoch": 2, "epochs": 5, "step": 7, "steps": 40, "loss": 0.25, "images_per_s": 12.5, "data_wait_fraction": 0.02,
    "best_val_auc": 0.91, "seconds_left": 75.0,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two finished epochs, the second one run twice; a line cut off in the middle; three checkpoints."""
    place = tmp_path / "my-run"
    for step in (4, 8, 9):
        (place / "checkpoints" / f"{step:08d}").mkdir(parents=True)
    (place / "config.yaml").write_text("{}")
    (place / ".lock").touch()
    lines = [
        {"kind": "note", "text": "ImageNet weights"},
        {"kind": "epoch", "epoch": 0} | _ROW,
        {"kind": "epoch", "epoch": 1} | _ROW,
        {"kind": "note", "text": "resumed at epoch 1"},
        {"kind": "epoch", "epoch": 1} | _ROW | {"val_auc": 0.95},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (place / "log.jsonl").write_text(text + '{"kind": "epo')
    (place / "progress.json").write_text(json.dumps(_PROGRESS))
    return place


def _facts(folder: Path, capsys: pytest.CaptureFixture[str]) -> dict:
    assert run(["status", str(folder), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_facts_of_a_run_in_progress(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        facts = _facts(folder, capsys)
        assert run(["status", str(folder)]) == 0
        lines = capsys.readouterr().out.splitlines()
    assert (facts["run"], facts["state"], facts["checkpoints"]) == ("my-run", "running", [4, 8, 9])
    assert facts["progress"] == _PROGRESS
    assert [row["val_auc"] for row in facts["epochs"]] == [0.9, 0.95]
    assert facts["notes"] == ["ImageNet weights", "resumed at epoch 1"]
    assert 0 <= facts["seconds_since_news"] < 60
    assert lines[0].startswith("my-run: running, last news ")
    assert lines[3].startswith("epoch 2: train loss 0.500, val loss 0.400, val AUC 0.950")
    assert lines[4] == "  data wait 3.0 s, compute 20.0 s, communication 1.0 s, evaluation 5.0 s, checkpoint 1.0 s"
    assert lines[5] == "epoch 3/5, step 7/40 · 1:15 left · 12.5 images/s"


def test_a_stopped_run_says_what_goes_on_and_a_finished_one_is_finished(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _facts(folder, capsys)["state"] == "stopped"
    assert run(["status", str(folder)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "its newest checkpoint is of step 9; the same `medtl train` command with --resume goes on."
    (folder / "results.json").write_text("{}")
    assert _facts(folder, capsys)["state"] == "finished"


def test_the_gpu_hours_used_are_told_beside_their_limit(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def told() -> list[str]:
        assert run(["status", str(folder)]) == 0
        return [line for line in capsys.readouterr().out.splitlines() if "GPU hours" in line]

    assert _facts(folder, capsys)["budget"] is None
    assert told() == []
    budget.limit(Folder.local(folder), 8.0)
    (folder / "budget.json").write_text('{"max_gpu_hours": 8.0, "gpu_hours": 1.23456}')
    assert _facts(folder, capsys)["budget"] == {"max_gpu_hours": 8.0, "gpu_hours": 1.23456}
    assert told() == ["GPU hours: 1.235 used, of 8"]
    budget.limit(Folder.local(folder), None)
    assert told() == ["GPU hours: 1.235 used, no limit now"]
    (folder / "budget.json").write_text("{")
    assert told() == []


def test_asking_takes_no_lock_and_a_run_just_begun_has_no_news(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text("{}")
    facts = _facts(tmp_path, capsys)
    assert (facts["state"], facts["progress"], facts["epochs"], facts["seconds_since_news"]) == (
        "stopped",
        None,
        [],
        None,
    )
    assert not (tmp_path / ".lock").exists()


def test_a_folder_without_a_run_is_the_users_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["status", str(tmp_path)]) == 2
    assert "is not a run folder: it has no config.yaml" in capsys.readouterr().err


def test_a_driver_waits_out_a_glance_but_not_another_driver(tmp_path: Path) -> None:
    config = load_config(preset="smoke")
    (tmp_path / ".lock").touch()
    with (tmp_path / ".lock").open() as glance:
        fcntl.flock(glance, fcntl.LOCK_SH)
        with (
            pytest.raises(UserError, match="another process is training"),
            opened_run_folder(tmp_path, config, resume=False),
        ):
            pass
        release = threading.Timer(0.05, fcntl.flock, (glance, fcntl.LOCK_UN))
        release.start()
        with opened_run_folder(tmp_path, config, resume=False) as opened:
            assert opened == tmp_path
        release.join()
