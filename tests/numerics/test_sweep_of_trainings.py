"""Real trainings → ranking and page: what a trial's run folder holds is what the sweep reads, to the exact AUC."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from shard_sets import write_set

from medtl_dist.config import load_config
from medtl_dist.report.sweep_page import build_sweep_page
from medtl_dist.run import Folder, LocalRun
from medtl_dist.sweep.outcome import Epoch, Outcome
from medtl_dist.sweep.scores import read_scores
from medtl_dist.sweep.summary import write_sweep
from medtl_dist.train.loop import fit
from medtl_dist.train.warm import Warm
from tune_spaces.space import apply, check, draw, load_space


def test_trials_trained_by_the_loop_are_ranked_by_their_exact_auc(tmp_path: Path) -> None:
    write_set(tmp_path / "set", {"train": [11, 9], "val": [9, 9]})
    base = load_config(preset="smoke", overrides=[f"data.shards={tmp_path / 'set'}", "train.threads=1"])
    space = load_space("smoke")
    check(space, base)
    sweep, warm, outcomes = tmp_path / "sweep", Warm(keep_epoch_scores=True), []
    sweep.mkdir()
    (sweep / "config.yaml").write_text(base.to_yaml())
    (sweep / "space.yaml").write_text(space.to_yaml())
    for number, overrides in enumerate(draw(space, 2, seed=2, base=base)):
        folder = f"trials/{number:05d}"
        fit(apply(base, overrides), LocalRun(Folder.local(sweep / folder)), warm=warm)
        rows = pq.read_table(sweep / folder / "history.parquet").to_pylist()
        curve = tuple(Epoch(r["epoch"], r["val_auc"], r["val_loss"], r["train_loss"], r["epoch_s"]) for r in rows)
        depth = 5 if overrides["model.frozen_depth"] == "all" else 0
        outcomes.append(Outcome(number, overrides, "finished", None, curve, depth, 5, 1.0, 0.0, 0.0, 1, None, folder))
    scores = read_scores(sweep, outcomes)
    assert scores is not None
    assert scores.notes == ()
    for one in outcomes:
        assert one.best is not None
        assert sorted(scores.epochs[one.number]) == [0, 1]
        for row in one.curve:
            (found,) = scores.val.components(scores.epochs[one.number][row.epoch])
            assert found.auc == pytest.approx(row.val_auc, abs=1e-9)
    content = write_sweep(sweep, outcomes)
    assert content["best"]["auc"] == max(
        row.val_auc for one in outcomes for row in one.curve if row.val_auc is not None
    )
    assert content["best"]["auc_ci"] is not None
    assert content["optimism"]["candidates"] == 4
    assert "Sweep report" in build_sweep_page(sweep).read_text(encoding="utf-8")
