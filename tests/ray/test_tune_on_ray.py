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
import yaml
from shard_sets import write_set
from sklearn.metrics import roc_auc_score

from medtl_dist.config import load_config

pytestmark = pytest.mark.ray

_ROOT = Path(__file__).resolve().parents[2]


def _medtl(*arguments: str | Path, script: tuple[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, against a cluster of its own (token authentication, loopback).

    ``script``: Python to run it by, and that script's own argument.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(_ROOT), environment.get("PYTHONPATH", "")])
    by = ["-m", "medtl_dist.cli.main"] if script is None else ["-c", *script]
    command = [sys.executable, *by, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=220)


# A sweep's trials share a set, so none alone has a val of one class: trial 4 is given another set behind the command's back.
_ONE_ALONE = """
import sys
import cluster.sweep_trials as tune
from cluster.trial_state import TrialSpec
from medtl_dist.cli.main import main

single, whole = sys.argv.pop(1), tune.spec_of


def spec_of(sweep, number, overrides):
    spec = whole(sweep, number, overrides)
    data = spec.config.data.model_copy(update={"shards": single})
    return spec if number != 4 else TrialSpec(number, overrides, spec.config.model_copy(update={"data": data}))


tune.spec_of = spec_of
main()
"""


def test_one_command_from_a_space_to_a_page_and_a_retrained_winner(tmp_path: Path) -> None:
    """Five trials under ASHA: two to be ranked; one blows up, one crashes whatever it is given, one has no AUC."""
    dataset = write_set(tmp_path / "set", {"train": [11, 9, 6], "val": [12, 10], "test": [9]})
    single = write_set(tmp_path / "single", {"train": [11, 9, 6], "val": [1]})  # one val image, so one class
    space, folder = tmp_path / "five.yaml", tmp_path / "sweep"
    points = [{"optim.lr": lr} for lr in (0.05, 0.0001, 1e30, 0.01, 0.02)]
    knobs = [{"key": "optim.lr", "type": "log_uniform", "low": 1e-5, "high": 1e30}]
    space.write_text(json.dumps({"knobs": knobs, "try_first": points}))
    (folder / "trials" / "00003").mkdir(parents=True)
    (folder / "trials" / "00003" / "events").write_text("a file where a folder should be: its journal can't be opened")
    (folder / "config.yaml").write_text(
        load_config(preset="smoke", overrides=[f"data.shards={dataset.folder}", "tune.num_trials=5", "train.threads=1"])
        .to_yaml()
        .replace("space: resnet101", f"space: {space}")
    )
    (folder / "space.yaml").write_text(_space_yaml(space))
    options = [
        "tune", "--preset", "smoke", "--set", f"data.shards={dataset.folder}", "--set", "train.threads=1", "--space", space,
        "--num-trials", "5", "--sweep-dir", folder, "--resume", "--then", "train", "--seeds", "2", "--test",
    ]  # fmt: skip
    done = _medtl(*options, script=(_ONE_ALONE, single.folder))
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "sweep.json").read_text())
    assert [row["trial"] for row in found["unranked"]] == [2, 3, 4]
    assert "training has diverged" in found["unranked"][0]["reason"]
    assert "crashed in 2 tries" in found["unranked"][1]["reason"]
    assert "its val AUC is undefined in every epoch" in found["unranked"][2]["reason"]
    assert "not ranked: trial 2 (failed): the model's score is not a finite number" in done.stdout
    assert "not ranked: trial 3 (failed): crashed in 2 tries" in done.stdout
    assert "not ranked: trial 4 (finished): its val AUC is undefined" in done.stdout
    assert sorted(row["trial"] for row in found["ranking"]) == [0, 1]
    assert pq.read_table(folder / "sweep.parquet").num_rows == 5
    page = (folder / "sweep.html").read_text()
    for said in ("training has diverged", "crashed in 2 tries", "its val AUC is undefined in every epoch"):
        assert said in page
    for row in found["ranking"]:
        trial = folder / "trials" / f"{row['trial']:05d}"
        assert not list(trial.glob("predictions/test*"))  # a sweep never opens the test split
        if row["state"] == "finished":
            table = pq.read_table(trial / "predictions" / "val.parquet").to_pandas()
            assert row["auc"] == pytest.approx(roc_auc_score(table.label, table.logit_PNEUMONIA), abs=1e-12)
    assert f"winner trial {found['winner']['trial']}: val AUC" in done.stdout
    told = [line for line in done.stderr.splitlines() if line.startswith("trial 0 ")]
    assert told[0].startswith("trial 0 running")
    assert "Traceback" not in done.stderr
    _assert_winner_tested_once_a_seed(folder, done.stdout)

    again = _medtl(*options, "--json", script=(_ONE_ALONE, single.folder))  # nothing runs again, nor opens test again
    assert again.returncode == 0, again.stderr
    told_again = json.loads(again.stdout)
    assert told_again["ranking"] == found["ranking"]
    assert [run["seed"] for run in told_again["winner_runs"]] == [0, 1]
    _assert_winner_tested_once_a_seed(folder, done.stdout)
    plain = _medtl("tune", "--sweep-dir", folder, "--resume", "--json")  # as it was begun
    assert plain.returncode == 0, plain.stderr
    assert json.loads(plain.stdout)["ranking"] == found["ranking"]


def _assert_winner_tested_once_a_seed(folder: Path, told: str) -> None:
    """Each seed's own model scored test once, and the ledger beside the sweep, for all sweeps there, counts just that."""
    winner = json.loads((folder / "sweep.json").read_text())["winner"]
    trained = yaml.safe_load((folder / winner["folder"] / "config.yaml").read_text())
    entries = [json.loads(line) for line in (folder.parent / "test_openings.jsonl").read_text().splitlines()]
    assert [entry["run"] for entry in entries] == ["seed-0", "seed-1"]
    assert not list((folder / "trials").rglob("test.parquet"))
    tables = []
    for seed in (0, 1):
        place = folder / "winner" / f"seed-{seed}"
        results = json.loads((place / "results.json").read_text())
        assert results["test_openings"] == {"count": seed + 1, "configurations": seed + 1}
        config = yaml.safe_load((place / "config.yaml").read_text())
        assert config["train"].pop("seed") == seed
        assert config == trained | {"train": {k: v for k, v in trained["train"].items() if k != "seed"}}
        table = pq.read_table(place / "predictions" / "test.parquet").to_pandas()
        assert len(table) == 9
        assert results["splits"]["test"]["auc"] == pytest.approx(
            roc_auc_score(table.label, table.logit_PNEUMONIA), abs=1e-12
        )
        tables.append(table.logit_PNEUMONIA.tolist())
    assert tables[0] != tables[1]
    assert told.count("test  opened") == 2


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
