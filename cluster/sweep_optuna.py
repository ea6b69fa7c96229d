"""a space → Optuna's TPE, asked for one trial after another while the sweep runs; what it has seen is told again on resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.sweep_trials import Sweep, spec_of
from cluster.trial_state import TrialSpec, place_of, write_specs
from medtl_dist.errors import DataError, UserError
from medtl_dist.storage import Folder
from medtl_dist.sweep.outcome import Outcome
from tune_spaces.space import optuna_points, optuna_trial_values

PARAMS_FILE = "searcher.json"


def proposer(
    sweep: Sweep, folder: Path | Folder, drawn: list[tuple[int, dict[str, Any]]]
) -> Callable[[list[Outcome]], TrialSpec | None]:
    """Asks Optuna for one more trial, told of those that have ended; None once ``tune.num_trials`` are drawn.

    ``drawn`` grows with each, and so do ``trials.json`` and ``searcher.json`` (what Optuna called their values).

    Raises:
        UserError: Optuna is not installed.
        DataError: ``searcher.json`` does not fit ``trials.json``.
    """
    place = place_of(folder)
    params = _read_params(place.local_path, len(drawn))
    # A sampler that begins anew with the same seed would begin with the same draws.
    study = _study((sweep.base.tune.seed + len(params)) % 2**32)
    asked: dict[int, Any] = {}
    for number, values in enumerate(params):
        study.enqueue_trial(values)
        asked[number] = study.ask()
        optuna_trial_values(sweep.space, asked[number], sweep.base)
    if not params:
        for point in optuna_points(sweep.space, sweep.base):
            study.enqueue_trial(point)
    told: set[int] = set()

    def propose(outcomes: list[Outcome]) -> TrialSpec | None:
        for outcome in outcomes:
            if outcome.state in ("finished", "stopped", "failed") and outcome.number not in told:
                told.add(outcome.number)
                _tell(study, asked[outcome.number], outcome)
        if len(drawn) >= sweep.base.tune.num_trials:
            return None
        number = len(drawn)
        trial = asked[number] = study.ask()
        overrides = optuna_trial_values(sweep.space, trial, sweep.base)
        spec = spec_of(sweep, number, overrides)
        params.append(dict(trial.params))
        place.write(PARAMS_FILE, json.dumps(params, indent=1).encode())
        drawn.append((number, dict(overrides)))
        write_specs(place, drawn)
        return spec

    return propose


def _study(seed: int) -> Any:
    try:
        import optuna  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            "tune.searcher = optuna needs Optuna, which is not installed: pip install 'medtl_dist[optuna]', or take "
            "tune.searcher=random or grid."
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)  # trials run side by side
    return optuna.create_study(direction="maximize", sampler=sampler)


def _tell(study: Any, trial: Any, outcome: Outcome) -> None:
    """An AUC that is undefined is no value; a trial that was stopped counts with the best that it reached."""
    from optuna.trial import TrialState  # pyright: ignore[reportMissingImports]

    best = outcome.best
    if outcome.state == "failed" or best is None:
        study.tell(trial, state=TrialState.FAIL)
    else:
        study.tell(trial, best.val_auc)


def _read_params(folder: Path, num_drawn: int) -> list[dict[str, Any]]:
    path = folder / PARAMS_FILE
    if not path.is_file() and num_drawn == 0:
        return []
    try:
        found = [dict(values) for values in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        raise DataError(f"{path}: damaged or missing; start the sweep again in a new folder.") from None
    if len(found) < num_drawn:
        raise DataError(f"{path}: names {len(found)} trials of {num_drawn}; start the sweep again in a new folder.")
    return found[:num_drawn]  # written first: a driver killed in between drew one that never ran
