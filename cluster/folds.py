"""folds of a cross-validation → trained at once on warm Ray workers, by the machinery of sweeps."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Sequence

from cluster.sweep_mirror import Mirror
from cluster.trial_state import TRIAL_FILE, TrialSpec
from cluster.trials import run_trials, stopping_on_signals
from medtl_dist.config import Config
from medtl_dist.errors import Interrupted, TrainingError
from medtl_dist.storage import Folder
from medtl_dist.store_folder import StoreFolder, fetched
from medtl_dist.train.crossval import FoldTrial, TrainFolds


def folds_on_ray(folder: Folder, base: Config) -> TrainFolds:
    """Train as many folds at once as the cluster has room for, each in its own place below ``folder``.

    What it returns raises Interrupted after SIGTERM, KeyboardInterrupt after Ctrl-C, both after checkpoints, and TrainingError
    where a fold failed: the others have finished by then.
    """

    def train_folds(trials: Sequence[FoldTrial]) -> None:
        left = [trial for trial in trials if not trial.place.exists("results.json")]
        specs = [TrialSpec(trial.number, trial.overrides, trial.config, trial.name) for trial in left]
        with _as_driven(folder, specs) as place, stopping_on_signals() as stopped:
            outcomes = run_trials(place, specs, base, stopped=stopped)
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


@contextlib.contextmanager
def _as_driven(folder: Folder, specs: Sequence[TrialSpec]) -> Iterator[Folder]:
    """The folder; of one in a store the ``Mirror``, with what an earlier driver has left of these folds."""
    if not isinstance(folder, StoreFolder):
        yield folder
        return
    known = tuple(f"{spec.name}/{file}" for spec in specs for file in ("config.yaml", TRIAL_FILE))
    with fetched(folder, known) as here:
        yield Mirror(Folder.local(here).fs, str(here), folder)
