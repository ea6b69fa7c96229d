"""Sweeps that lose their driver, a worker or patience, and trials of several ranks: nothing hangs, is lost or is left over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from drivers import LIMIT_S, MARK, driving, processes_of, trial, until
from shard_sets import write_set

pytestmark = pytest.mark.ray

_ROOT = Path(__file__).resolve().parents[2]


def result(folder: Path) -> list[tuple[int, float, int]]:
    return [
        (row["trial"], row["auc"], row["epoch"]) for row in json.loads((folder / "sweep.json").read_text())["ranking"]
    ]


def curves(folder: Path) -> dict[int, list[tuple[float, float]]]:
    return {
        number: [(row["val_auc"], row["train_loss"]) for row in trial(folder, number)["curve"]] for number in range(4)
    }


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str | Path]:
    dataset = write_set(tmp_path_factory.mktemp("data") / "set", {"train": [30, 20, 14], "val": [20, 12]})
    given = [f"data.shards={dataset.folder}", "tune.scheduler=none", "train.epochs=3", "tune.seed=5"]
    return ["--preset", "smoke", "--space", "smoke", "--num-trials", "4", *(p for o in given for p in ("--set", o))]


@pytest.fixture(scope="module")
def undisturbed(options: list[str | Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "sweep"
    with driving(*options, "--sweep-dir", folder) as driver:
        code, said = driver.end()
    assert code == 0, said
    assert until(lambda: not processes_of(driver.mark), "without a process left")
    return folder


def test_ctrl_c_then_sigkill_then_resume_is_the_same_sweep(
    options: list[str | Path], undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "sweep"
    with driving(*options, "--sweep-dir", folder) as driver:
        until(lambda: trial(folder, 0)["curve"], "with an epoch")
        driver.process.send_signal(signal.SIGINT)
        code, said = driver.end()
    assert code == 130, said
    assert (folder / "sweep.json").is_file()
    assert (folder / "sweep.html").is_file()
    assert until(lambda: not processes_of(driver.mark), "without a process left")
    with driving(*options, "--sweep-dir", folder, "--resume") as driver:
        until(lambda: any(len(trial(folder, n)["curve"]) in (1, 2) for n in (2, 3)), "in a later trial")
        ended = [n for n in range(4) if trial(folder, n)["state"] == "finished"]
        driver.process.kill()
        driver.process.communicate()
    assert until(lambda: not processes_of(driver.mark), "without a process left")  # what it had started died with it
    before = {n: (folder / "trials" / f"{n:05d}" / "results.json").stat().st_mtime_ns for n in ended}
    with driving("--sweep-dir", folder, "--resume") as driver:
        code, said = driver.end()
    assert code == 0, said
    assert result(folder) == result(undisturbed)
    assert curves(folder) == curves(undisturbed)
    for number, stamp in before.items():  # what had finished was not run again
        assert (folder / "trials" / f"{number:05d}" / "results.json").stat().st_mtime_ns == stamp


def test_a_killed_worker_costs_one_try_and_a_second_driver_is_refused(
    options: list[str | Path], undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "sweep"
    with driving(*options, "--sweep-dir", folder) as driver:
        until(lambda: trial(folder, 0)["curve"], "with an epoch")
        workers = [pid for pid, name in processes_of(driver.mark).items() if name.startswith("ray::TrialWorker")]
        assert workers
        os.kill(workers[0], signal.SIGKILL)
        with driving(*options, "--sweep-dir", folder, "--resume") as second:
            code, said = second.end()
        assert code == 2
        assert "another driver is at work on this sweep" in said
        code, said = driver.end()
    assert code == 0, said
    assert sorted(pq.read_table(folder / "sweep.parquet").column("attempts").to_pylist()) == [1, 1, 1, 2]
    assert result(folder) == result(undisturbed)
    assert curves(folder) == curves(undisturbed)


def test_a_worker_that_hangs_without_dying_costs_one_try(
    options: list[str | Path], undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "sweep"
    with driving(*options, "--set", "tune.silence_timeout_s=25", "--sweep-dir", folder) as driver:
        until(lambda: trial(folder, 0)["curve"], "with an epoch")
        workers = [pid for pid, name in processes_of(driver.mark).items() if name.startswith("ray::TrialWorker")]
        os.kill(workers[0], signal.SIGSTOP)
        code, said = driver.end()
    assert code == 0, said
    assert workers[0] not in processes_of(driver.mark)
    assert "crashed, to be tried again: no sign of life" in said
    assert sorted(pq.read_table(folder / "sweep.parquet").column("attempts").to_pylist()) == [1, 1, 1, 2]
    assert result(folder) == result(undisturbed)
    assert curves(folder) == curves(undisturbed)


_DDP = """
import json, sys
from pathlib import Path
from cluster.launch import set_environment
from cluster.trial_state import TrialSpec
from medtl_dist.config import load_config

folder, shards = sys.argv[1:]
set_environment(own_cluster=True)
import cluster.trial_ddp as ddp
from cluster.trial_stop import stop_rule_of
from cluster.trials import run_trials


def config(lr):
    options = [f"data.shards={shards}", "train.threads=1", "train.epochs=3", "cluster.num_workers=2", f"optim.lr={lr}"]
    return load_config(preset="smoke", overrides=options)


def counted(remove=ddp.remove_leftover_groups):
    from ray.util.state import list_actors
    alive = sorted(actor.class_name for actor in list_actors(limit=1000) if actor.state == "ALIVE")
    before = len(ddp.leftover_groups())
    remove()
    print(json.dumps({"groups": [before, len(ddp.leftover_groups())], "actors": alive}))


ddp.remove_leftover_groups = counted
specs = [TrialSpec(n, {"optim.lr": lr}, config(lr)) for n, lr in enumerate([0.03, 0.01, 0.001])]
rule = stop_rule_of(specs[0].config.tune, 3)
outcomes = run_trials(Path(folder), specs, specs[0].config, stop_rule=rule, warm_options={"keep_epoch_scores": True})
print(json.dumps([[o.state, len(o.curve), o.reason] for o in outcomes]))
"""


def test_a_sweep_of_trials_with_two_ranks_leaves_no_group_and_no_process(tmp_path: Path) -> None:
    dataset = write_set(tmp_path / "set", {"train": [11, 9, 6], "val": [9, 5]})
    mark = uuid.uuid4().hex
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"PYTHONPATH": os.pathsep.join([str(_ROOT), environment.get("PYTHONPATH", "")]), MARK: mark}
    done = subprocess.run(
        [sys.executable, "-c", _DDP, tmp_path / "sweep", dataset.folder],
        capture_output=True, text=True, check=False, env=environment, timeout=LIMIT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    counted, outcomes = (json.loads(line) for line in done.stdout.splitlines()[-2:])
    assert counted["groups"] == [0, 0]
    assert not [name for name in counted["actors"] if "Train" in name or "Trial" in name]
    assert until(lambda: not processes_of(mark), "without a process left")
    assert {state for state, _, _ in outcomes} <= {"finished", "stopped"}
    for state, epochs, reason in outcomes:
        assert (epochs == 3) if state == "finished" else (epochs < 3 and "ASHA" in reason)
    assert [state for state, _, _ in outcomes].count("stopped") >= 1
    assert len(list((tmp_path / "sweep" / "trials").glob("*/predictions/epochs/0000.npy"))) == 3
