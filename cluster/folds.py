"""folds of a cross-validation → trained at once on warm Ray workers, by the machinery of sweeps."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path

from cluster.trial_state import TrialSpec, trial_name
from cluster.trials import run_trials, stopping_on_signals
from medtl_dist.config import Config
from medtl_dist.errors import Interrupted, TrainingError
from medtl_dist.train.crossval import FoldTrial, TrainFolds


def folds_on_ray(folder: Path, base: Config) -> TrainFolds:
    """Train as many folds at once as the cluster has room for. A fold lies in ``folder/trials`` until it has finished.

    What it returns raises Interrupted after SIGTERM, KeyboardInterrupt after Ctrl-C, both after checkpoints, and TrainingError
    where a fold failed: the others have finished by then.
    """

    def train_folds(trials: Sequence[FoldTrial]) -> None:
        left = [trial for trial in trials if not (trial.place / "results.json").is_file()]
        specs = [TrialSpec(trial.number, trial.overrides, trial.config) for trial in left]
        with stopping_on_signals() as stopped:
            outcomes = run_trials(folder, specs, base, stopped=stopped)
        for trial in left:
            done = folder / trial_name(trial.number)
            if (done / "results.json").is_file():
                trial.place.parent.mkdir(exist_ok=True)
                done.rename(trial.place)
        if stopped.received == signal.SIGINT:
            raise KeyboardInterrupt
        if stopped.received is not None:
            raise Interrupted("stopped as asked; the same command with --resume goes on.")
        failed = [outcome for outcome in outcomes if outcome.state == "failed"]
        if failed:
            raise TrainingError(
                f"{len(failed)} of {len(left)} folds failed: {failed[0].reason} --resume with another config is another "
                "cross-validation: name a new folder with --run-dir."
            )

    return train_folds
