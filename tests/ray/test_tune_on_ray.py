"""Sweeps on a local Ray: from one command to its page; trials that crash, blow up or have no AUC; warm processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from shard_sets import write_set
from sklearn.metrics import roc_auc_score

from medtl_dist.config import load_config

pytestmark = pytest.mark.ray

_ROOT = Path(__file__).resolve().parents[2]


def _medtl(*arguments: str | Path, timeout_s: float = 220) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, against a cluster of its own (token authentication, loopback)."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-m", "medtl_dist.cli.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=timeout_s)


def test_one_command_from_a_space_to_a_page_and_a_retrained_winner(tmp_path: Path) -> None:
    """Four trials under ASHA: two to be ranked, one that blows up, one that crashes whatever it is given."""
    dataset = write_set(tmp_path / "set", {"train": [11, 9, 6], "val": [12, 10], "test": [9]})
    space, folder = tmp_path / "four.yaml", tmp_path / "sweep"
    points = [{"optim.lr": 0.05}, {"optim.lr": 0.0001}, {"optim.lr": 1e30}, {"optim.lr": 0.01}]
    knobs = [{"key": "optim.lr", "type": "log_uniform", "low": 1e-5, "high": 1e30}]
    space.write_text(json.dumps({"knobs": knobs, "try_first": points}))
    (folder / "trials" / "00003").mkdir(parents=True)
    (folder / "trials" / "00003" / "events").write_text("a file where a folder should be: its journal can't be opened")
    (folder / "config.yaml").write_text(
        load_config(preset="smoke", overrides=[f"data.shards={dataset.folder}", "tune.num_trials=4", "train.threads=1"])
        .to_yaml()
        .replace("space: resnet101", f"space: {space}")
    )
    (folder / "space.yaml").write_text(_space_yaml(space))
    done = _medtl(
        "tune", "--preset", "smoke", "--set", f"data.shards={dataset.folder}", "--set", "train.threads=1", "--space", space,
        "--num-trials", "4", "--sweep-dir", folder, "--resume", "--then", "train", "--test",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "sweep.json").read_text())
    assert [row["trial"] for row in found["unranked"]] == [2, 3]
    assert "training has diverged" in found["unranked"][0]["reason"]
    assert "crashed in 2 tries" in found["unranked"][1]["reason"]
    assert "not ranked: trial 2 (failed): the model's score is not a finite number" in done.stdout
    assert sorted(row["trial"] for row in found["ranking"]) == [0, 1]
    assert pq.read_table(folder / "sweep.parquet").num_rows == 4
    assert (folder / "sweep.html").is_file()
    for row in found["ranking"]:
        trial = folder / "trials" / f"{row['trial']:05d}"
        assert not list(trial.glob("predictions/test*"))  # a sweep never opens the test split
        if row["state"] == "finished":
            table = pq.read_table(trial / "predictions" / "val.parquet").to_pandas()
            assert row["auc"] == pytest.approx(roc_auc_score(table.label, table.logit_PNEUMONIA), abs=1e-12)
    winner = json.loads((folder / "winner" / "seed-0" / "results.json").read_text())
    assert winner["test_openings"] == {"count": 1, "configurations": 1}
    assert (tmp_path / "test_openings.jsonl").read_text().count("\n") == 1  # beside the sweep, for all sweeps there
    assert f"winner trial {found['winner']['trial']}: val AUC" in done.stdout
    told = [line for line in done.stderr.splitlines() if line.startswith("trial 0 ")]
    assert told[0].startswith("trial 0 running")
    assert "Traceback" not in done.stderr

    again = _medtl("tune", "--sweep-dir", folder, "--resume", "--json")  # as it was begun; nothing runs again
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["ranking"] == found["ranking"]


def _space_yaml(space: Path) -> str:
    from tune_spaces.space import load_space

    return load_space(str(space)).to_yaml()


_TRIALS = """
import json, sys, time
from pathlib import Path
from cluster.launch import set_environment
from cluster.trial_state import TrialSpec
from medtl_dist.config import load_config

folder, *sets = map(Path, sys.argv[1:])
set_environment(own_cluster=True)
from cluster.trials import run_trials


def config(number, place):
    options = [f"data.shards={place}", "train.threads=1", "train.epochs=1", f"optim.lr=0.0{number + 1}"]
    return load_config(preset="smoke", overrides=options)


specs = [TrialSpec(n, {"n": n}, config(n, place)) for n, place in enumerate(sets)]
outcomes = run_trials(folder, specs, config(0, sets[0]))
print(json.dumps([[o.number, o.state, o.reason, len(o.curve), o.seconds, o.best is None] for o in outcomes]))
"""


def test_trials_after_the_first_cost_little_and_an_undefined_auc_is_no_number(tmp_path: Path) -> None:
    ours = write_set(tmp_path / "set", {"train": [11, 9], "val": [9, 5]})
    single = write_set(tmp_path / "single", {"train": [11, 9], "val": [1]})  # one val image, so one class
    sets = [ours.folder, single.folder, *[ours.folder] * 4]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(_ROOT), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", _TRIALS, tmp_path / "trials", *sets],
        capture_output=True, text=True, check=False, env=environment, timeout=220,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows: list[list[Any]] = json.loads(done.stdout.splitlines()[-1])
    assert [row[:2] for row in rows] == [[number, "finished"] for number in range(6)]
    assert rows[1][2] == "its val AUC is undefined in every epoch"
    assert [row[5] for row in rows] == [False, True, False, False, False, False]
    # An epoch of 20 tiny images and a checkpoint of resnet18 included; a fresh process alone takes three times that.
    assert sorted(row[4] for row in rows)[3] < 6
