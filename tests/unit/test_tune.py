"""`medtl tune` without Ray: what it refuses before anything starts, its folder, its plan, its table, its winner."""

from __future__ import annotations

import dataclasses
import fcntl
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from shard_sets import write_set

from cluster import sweep_optuna
from cluster.sweep_folder import opened_sweep_folder
from cluster.sweep_optuna import proposer
from cluster.sweep_trials import drawn_trials, specs_of, sweep_of
from cluster.trial_state import read_specs
from cluster.tune import run_sweep
from medtl_dist.cli.main import run
from medtl_dist.cli.sweep_table import Lines, line_of, screen_of, seconds_left, summary_of, table_of
from medtl_dist.config import Config, load_config
from medtl_dist.errors import DataError, UserError
from medtl_dist.sweep.outcome import Epoch, Outcome, State


@pytest.fixture
def shards(tmp_path: Path) -> str:
    return str(write_set(tmp_path / "set", {"train": [11, 9, 6], "val": [9, 5]}).folder)


def smoke(shards: str, *overrides: str) -> Config:
    return load_config(preset="smoke", overrides=[f"data.shards={shards}", "tune.space=smoke", *overrides])


def outcome(number: int, state: State = "finished", aucs: list[float | None] | None = None, **options: Any) -> Outcome:
    curve = tuple(Epoch(n, auc, 0.5, 0.6, 10.0 * (n + 1)) for n, auc in enumerate(aucs or []))
    defaults: dict[str, Any] = {
        "overrides": {"optim.lr": 0.01}, "reason": None, "frozen_depth": 0, "num_stages": 5, "seconds": 1.0,
        "cpu_hours": 0.0, "gpu_hours": 0.0, "attempts": 1, "cached_s": None, "folder": f"trials/{number:05d}",
    }  # fmt: skip
    return Outcome(number=number, state=state, curve=curve, **(defaults | options))


# What is refused.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--then", "dance"], "--then dance: expected train"),
        (["--test"], "--test is of the winner's training: add --then train"),
        (["--seeds", "3"], "--seeds is of the winner's training"),
        (["--then", "train", "--seeds", "0"], "--seeds 0: expected 1 to 100"),
        (["--then", "train", "--dry-run"], "--dry-run starts nothing"),
        (["--then", "train", "--test"], "no split .test."),
        (["--space", "no_such_space"], "no_such_space"),
        (["--num-trials", "0"], "tune.num_trials"),
        (["--set", "data.global_batch_size=999", "--dry-run"], "trial 0"),
    ],
)
def test_a_mistake_is_one_message_before_anything_starts(
    options: list[str], message: str, shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "sweep"
    given = [
        "tune",
        "--preset",
        "smoke",
        "--space",
        "smoke",
        "--set",
        f"data.shards={shards}",
        "--sweep-dir",
        str(folder),
    ]
    assert run([*given, *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert re.search(message, error)
    assert not folder.exists()


def test_a_chain_is_not_swept(shards: str, tmp_path: Path) -> None:
    (tmp_path / "chain.yaml").write_text("transfer: {stages: [{name: a}, {name: b}]}")
    with pytest.raises(UserError, match="chain of them"):
        sweep_of(load_config(preset="smoke", file=tmp_path / "chain.yaml"))


def test_a_space_that_does_not_fit_the_config_is_refused(shards: str, tmp_path: Path) -> None:
    space = tmp_path / "mine.yaml"
    space.write_text("knobs: [{key: optim.learning_rate, type: choice, values: [1, 2]}]")
    with pytest.raises(UserError, match=r"unknown key optim\.learning_rate"):
        sweep_of(smoke(shards, f"tune.space={space}"))


def test_optuna_is_asked_for_by_name_where_it_is_missing(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(UserError, match=re.escape("pip install 'medtl_dist[optuna]'")):
        run_sweep(sweep_of(smoke(shards, "tune.searcher=optuna")), tmp_path / "sweep", resume=False)


def test_optuna_goes_on_where_a_killed_driver_left_it(shards: str, tmp_path: Path) -> None:
    """Points to try first come first; nothing is drawn twice; failed trials are no values; as many as asked for."""
    pytest.importorskip("optuna")
    space = tmp_path / "mine.yaml"
    space.write_text(
        "knobs: [{key: optim.lr, type: log_uniform, low: 1.0e-4, high: 1.0}, "
        "{key: model.frozen_depth, type: choice, values: [0, 5]}]\n"
        "try_first: [{optim.lr: 0.5, model.frozen_depth: 5}]"
    )
    sweep = sweep_of(smoke(shards, f"tune.space={space}", "tune.searcher=optuna", "tune.num_trials=5"))
    assert drawn_trials(sweep) == []
    outcomes: list[Outcome] = []
    propose = None
    for driver, num_trials in enumerate((2, 3)):
        drawn = read_specs(tmp_path) or []
        propose = proposer(sweep, tmp_path, drawn)
        for _ in range(num_trials):
            spec = propose(outcomes)
            assert spec is not None
            assert spec.number == len(outcomes)
            assert spec.config.optim.lr == spec.overrides["optim.lr"]
            failed = spec.number == 1
            outcomes.append(outcome(spec.number, "failed" if failed else "finished", [None if failed else 0.6]))
        assert [number for number, _ in read_specs(tmp_path) or []] == list(range(2 + 3 * driver))
    assert propose is not None
    assert propose(outcomes) is None
    rates = [overrides["optim.lr"] for _, overrides in read_specs(tmp_path) or []]
    assert rates[0] == 0.5
    assert len(set(rates)) == 5
    (tmp_path / "searcher.json").write_text("{")
    with pytest.raises(DataError, match=r"searcher\.json: damaged"):
        proposer(sweep, tmp_path, read_specs(tmp_path) or [])


def test_a_resumed_optuna_knows_what_every_trial_came_to(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """14 trials with a peak at lr 0.01, a driver for each: the last one's study holds them all, and TPE goes on from them."""
    pytest.importorskip("optuna")
    studies: list[Any] = []
    made = sweep_optuna._study
    monkeypatch.setattr(sweep_optuna, "_study", lambda seed: studies.append(made(seed)) or studies[-1])
    space = tmp_path / "mine.yaml"
    space.write_text(
        "knobs: [{key: optim.lr, type: log_uniform, low: 1.0e-6, high: 10.0}, "
        "{key: model.frozen_depth, type: choice, values: [0, 5]}, "
        "{key: optim.backbone_lr, type: log_uniform, low: 1.0e-5, high: 1.0, when: {model.frozen_depth: [0]}}]"
    )
    sweep = sweep_of(smoke(shards, f"tune.space={space}", "tune.searcher=optuna", "tune.num_trials=40"))
    auc_of = {"finished": lambda lr: 1 - 0.1 * abs(math.log10(lr) + 2), "failed": lambda lr: None}

    def ended(spec: Any) -> Outcome:
        state: State = "failed" if spec.number == 3 else "finished"
        return outcome(spec.number, state, [auc_of[state](spec.overrides["optim.lr"])], overrides=spec.overrides)

    def told(study: Any) -> list[tuple[Any, ...]]:
        return [(trial.params, trial.state.name, trial.value) for trial in study.trials]

    outcomes: list[Outcome] = []
    for _ in range(14):  # a driver for each trial
        spec = proposer(sweep, tmp_path, read_specs(tmp_path) or [])(outcomes)
        assert spec is not None
        outcomes.append(ended(spec))
    propose = proposer(sweep, tmp_path, read_specs(tmp_path) or [])
    spec = propose(outcomes)
    resumed = studies[-1]
    assert spec is not None
    assert [(values, state) for values, state, _ in told(resumed)][14] == (resumed.trials[14].params, "RUNNING")
    for number, (values, state, value) in enumerate(told(resumed)[:14]):
        assert values["optim.lr"] == pytest.approx(outcomes[number].overrides["optim.lr"], rel=1e-3)
        assert ("optim.backbone_lr" in values) == (outcomes[number].overrides["model.frozen_depth"] == 0)
        best = outcomes[number].best
        assert (state, value) == (("FAIL", None) if number == 3 else ("COMPLETE", best and best.val_auc))
    # What it draws next comes of what it was told: had the peak been elsewhere, it would look elsewhere.
    other = tmp_path / "other"
    other.mkdir()
    for name in ("searcher.json", "trials.json"):
        rows = json.loads((tmp_path / name).read_text())
        (other / name).write_text(json.dumps(rows[:14]))
    again = proposer(sweep, other, read_specs(other) or [])(outcomes)
    assert again is not None
    assert again.overrides == spec.overrides  # the same telling, the same draw
    for name in ("searcher.json", "trials.json"):
        (other / name).write_text(json.dumps(json.loads((other / name).read_text())[:14]))
    upside_down = [
        dataclasses.replace(
            one, curve=tuple(dataclasses.replace(row, val_auc=1 - (row.val_auc or 0)) for row in one.curve)
        )
        for one in outcomes
    ]
    elsewhere = proposer(sweep, other, read_specs(other) or [])(upside_down)
    assert elsewhere is not None
    assert elsewhere.overrides["optim.lr"] != spec.overrides["optim.lr"]


# The folder.


def test_a_sweep_is_taken_up_by_the_same_sweep_only(shards: str, tmp_path: Path) -> None:
    folder, base, space = tmp_path / "sweep", smoke(shards), sweep_of(smoke(shards)).space.to_yaml()
    with opened_sweep_folder(folder, base, space, resume=False):
        assert (folder / "space.yaml").read_text() == space
        (folder / "trials").mkdir()
        with (
            pytest.raises(UserError, match="another driver is at work"),
            opened_sweep_folder(folder, base, space, resume=True),
        ):
            pass
    with opened_sweep_folder(folder, base, space, resume=True):
        pass
    refused = [
        (base, space, False, "already holds a sweep; add --resume"),
        (smoke(shards, "tune.num_trials=99", "tune.seed=7"), space, True, r"num_trials: 12 -> 99; tune\.seed: 0 -> 7"),
        (base, space + "# other", True, "the search space is not that of"),
        (smoke(shards, "optim.momentum=0.5"), space, True, r"optim\.momentum: 0\.9 -> 0\.5"),
    ]
    for config, text, resume, message in refused:
        with pytest.raises(UserError, match=message), opened_sweep_folder(folder, config, text, resume=resume):
            pass


def test_a_training_s_folder_is_no_sweep(shards: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(smoke(shards).to_yaml())
    (tmp_path / "run" / "checkpoints").mkdir()
    with (
        pytest.raises(UserError, match="holds a training run, not a sweep"),
        opened_sweep_folder(tmp_path / "run", smoke(shards), "", resume=True),
    ):
        pass


def test_two_drivers_on_one_sweep_are_refused(shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "sweep"
    folder.mkdir()
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        given = ["tune", "--preset", "smoke", "--space", "smoke", "--set", f"data.shards={shards}"]
        assert run([*given, "--sweep-dir", str(folder)]) == 2
    assert "another driver is at work on this sweep" in capsys.readouterr().err
    assert read_specs(folder) is None


# What is drawn, and the plan.


def test_trials_differ_in_what_is_drawn_and_in_nothing_else(shards: str) -> None:
    sweep = sweep_of(smoke(shards, "tune.num_trials=5", "cluster.cpus_per_worker=2"))
    specs = specs_of(sweep, drawn_trials(sweep))
    assert [spec.number for spec in specs] == list(range(5))
    for spec in specs:
        assert spec.config.optim.lr == spec.overrides["optim.lr"]
        assert spec.config.train.threads == 2  # its share of the machine, whatever else runs there
        optim = spec.config.optim.model_copy(update={"lr": sweep.base.optim.lr})
        model = spec.config.model.model_copy(update={"frozen_depth": sweep.base.model.frozen_depth})
        assert spec.config.model_copy(update={"optim": optim, "model": model}) == sweep.base
    assert sweep_of(smoke(shards, "train.threads=3")).base.train.threads == 3


def test_a_dry_run_names_trials_resources_groups_and_time(shards: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["tune", "--preset", "smoke", "--space", "smoke", "--set", f"data.shards={shards}", "--num-trials", "3"]
    assert run([*given, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [trial["number"] for trial in plan["trials"]] == [0, 1, 2]
    assert plan["resources"] == {"workers": 1, "cpus": 1.0, "gpus": 0.0}
    assert plan["concurrency"] >= 1
    assert sorted(number for group in plan["groups"] for number in group["trials"]) == [0, 1, 2]
    assert {group["frozen_depth"] for group in plan["groups"]} <= {0, 5}
    epochs_s = sum(group["epoch_s"] * 2 * len(group["trials"]) for group in plan["groups"])
    assert plan["estimate"]["seconds_at_most"] == pytest.approx(epochs_s / plan["concurrency"])
    assert 0 < epochs_s < 600


# The table.


def test_the_table_shows_what_says_most_first() -> None:
    outcomes = [
        outcome(0, "waiting"),
        outcome(1, "failed", reason="the loss is not finite"),
        outcome(2, "stopped", [0.6]),
        outcome(3, "finished", [0.7, 0.9]),
        outcome(4, "running", [0.8]),
    ]
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(screen_of(outcomes, lambda _: 2, 65.0))
    text = console.export_text()
    rows = [line.split()[:4] for line in text.splitlines()[1:6]]
    assert [row[0] for row in rows] == ["4", "3", "2", "1", "0"]
    assert rows[1] == ["3", "finished", "2/2", "0.900"]
    assert "best val AUC 0.900 (trial 3)" in text
    assert "1 running, 1 finished, 1 stopped, 1 failed, 1 waiting" in text.replace("\n", " ")


def test_thousands_of_trials_fit_a_screen() -> None:
    assert table_of([outcome(n, "finished", [0.5]) for n in range(3000)], lambda _: 1).row_count == 16


def test_time_left_is_what_remains_at_the_pace_of_the_same_depth() -> None:
    assert seconds_left([outcome(0, "running")], lambda _: 2) is None
    slow = outcome(0, "running", [0.5])  # 10 s an epoch, 3 of 4 to go
    fast = outcome(1, "running", [0.5, 0.5], frozen_depth=5)  # 10 s an epoch, 2 to go
    waiting = outcome(2, "waiting", frozen_depth=5)  # 4 epochs of 10 s
    ended = outcome(3, "stopped", [0.5])
    assert seconds_left([slow, fast, waiting, ended], lambda _: 4) == pytest.approx((30 + 20 + 40) / 2)


def test_lines_tell_each_change_once_and_undefined_is_a_word() -> None:
    said: list[str] = []
    lines = Lines(said.append, lambda _: 3)
    lines.tell([outcome(0, "waiting"), outcome(1, "waiting")])
    assert said == []
    lines.tell([outcome(0, "running", [None]), outcome(1, "waiting")])
    lines.tell([outcome(0, "running", [None]), outcome(1, "waiting")])
    assert said == ["trial 0 running: epoch 1/3, val AUC undefined; optim.lr 0.01"]
    lines.tell([outcome(0, "running", [None, 0.9123])])
    assert said[-1] == "trial 0 running: epoch 2/3, val AUC 0.912 (best 0.912); optim.lr 0.01"
    assert line_of(outcome(0, "failed", reason="why"), 3).endswith("; why")


def test_a_summary_without_any_auc_has_no_best() -> None:
    assert summary_of([outcome(0, "finished", [None])], lambda _: 1, 3725.0).startswith("1 finished · 1:02:05")
