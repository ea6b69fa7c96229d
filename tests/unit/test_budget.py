"""A limit of GPU hours: counted over attempts, stopped at a checkpoint, told as the run's own state."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

import pytest
from shard_sets import write_set

from medtl_dist.cli.main import run
from medtl_dist.errors import DataError, TrainingError, UserError
from medtl_dist.run import Folder, LocalRun, Run, Signal
from medtl_dist.train import budget


def test_without_a_limit_the_run_is_itself(tmp_path: Path) -> None:
    local = LocalRun(Folder.local(tmp_path))
    budget.limit(local.folder, None)
    with budget.budgeted(local) as same:
        assert same is local
    assert list(tmp_path.iterdir()) == []


def test_a_rank_counts_as_one_gpu_and_attempts_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    folder = Folder.local(tmp_path)
    budget.limit(folder, 2.0)
    lost = budget.budgeted(LocalRun(folder, world_size=4)).__enter__()
    assert isinstance(lost, Run)
    now[0] += 900  # a quarter of an hour on four ranks
    assert lost.poll() is Signal.GO_ON
    assert budget.read(folder) == {"max_gpu_hours": 2.0, "gpu_hours": pytest.approx(1.0)}
    budget.limit(folder, 2.0)  # the driver was lost and starts again
    with budget.budgeted(LocalRun(folder, world_size=2)) as second:
        now[0] += 1799
        assert second.poll() is Signal.GO_ON
        now[0] += 1
        assert second.poll() is Signal.CHECKPOINT_AND_STOP
    with pytest.raises(TrainingError, match="2 of 2 GPU hours"):
        budget.raise_if_used_up(folder)
    with pytest.raises(TrainingError):
        budget.limit(folder, 2.0)
    budget.limit(folder, 3.0)
    with budget.budgeted(LocalRun(folder)) as third:
        assert third.poll() is Signal.GO_ON


def test_what_was_used_after_the_last_poll_counts_and_so_does_a_time_without_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    folder = Folder.local(tmp_path)
    budget.limit(folder, 9.0)
    failing = contextlib.suppress(KeyError)
    with failing, budget.budgeted(LocalRun(folder, world_size=2)) as limited:
        limited.poll()
        now[0] += 1800  # the end's evaluation, say
        raise KeyError
    assert budget.read(folder) == {"max_gpu_hours": 9.0, "gpu_hours": pytest.approx(1.0)}
    budget.limit(folder, None)
    with budget.budgeted(LocalRun(folder)) as unlimited:
        now[0] += 99 * 3600
        assert unlimited.poll() is Signal.GO_ON
    assert budget.read(folder) == {"max_gpu_hours": None, "gpu_hours": pytest.approx(100.0)}


def test_a_runs_own_stop_is_kept(tmp_path: Path) -> None:
    local = LocalRun(Folder.local(tmp_path))
    budget.limit(local.folder, 100.0)
    with budget.budgeted(local) as limited:
        local.received = 15
        assert limited.poll() is Signal.CHECKPOINT_AND_STOP
    budget.raise_if_used_up(local.folder)  # not by the budget


@pytest.mark.parametrize("hours", [0.0, -1.0, float("nan"), float("inf")])
def test_a_limit_that_is_none_is_refused(tmp_path: Path, hours: float) -> None:
    with pytest.raises(UserError, match="--max-gpu-hours"):
        budget.limit(Folder.local(tmp_path), hours)


def test_a_damaged_account_is_told(tmp_path: Path) -> None:
    (tmp_path / "budget.json").write_text("{")
    with pytest.raises(DataError, match=r"budget\.json"):
        budget.limit(Folder.local(tmp_path), 1.0)


def test_a_training_stops_with_a_checkpoint_and_goes_on_with_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = write_set(tmp_path / "set", {"train": [11, 9, 6], "val": [9, 5]})
    command = ["train", "--preset", "smoke", "--set", f"data.shards={dataset.folder}", "--set", "train.threads=1"]
    command += ["--run-dir", str(tmp_path / "run"), "--resume"]
    assert run([*command, "--max-gpu-hours", "1e-9"]) == 5
    assert "GPU hours are used" in capsys.readouterr().err
    assert list((tmp_path / "run" / "checkpoints").iterdir())
    assert not (tmp_path / "run" / "results.json").exists()
    assert run([*command, "--max-gpu-hours", "1e-9"]) == 5  # at once, without training
    assert run([*command, "--max-gpu-hours", "1"]) == 0
    assert (tmp_path / "run" / "results.json").exists()
    assert json.loads((tmp_path / "run" / "budget.json").read_text())["gpu_hours"] > 0
