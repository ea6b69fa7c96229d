"""config and space → a sweep in its folder: what is drawn, what runs, what comes of it. Ray only below ``run_trials``."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.launch import set_environment
from cluster.sweep_folder import opened_sweep_folder
from cluster.trial_desk import Propose, waiting_numbers
from cluster.trial_state import TrialSpec, read_specs, write_specs
from cluster.trials import Stopped, run_trials, stopping_on_signals
from medtl_dist.config import Config
from medtl_dist.errors import ConfigError, DataError, Interrupted, TrainingError, UserError
from medtl_dist.sections import Train
from medtl_dist.sweep.outcome import Outcome
from tune_spaces.space import Space, apply, check, draw, load_space

CACHE_FOLDER = "cache"


@dataclass(frozen=True)
class Sweep:
    """What a sweep varies, and around what. ``base``: the whole config, with the threads of a trial in it."""

    base: Config
    space: Space


def sweep_of(config: Config) -> Sweep:
    """The config's sweep, checked before anything starts: every key and value of its space fits the config.

    Raises:
        ConfigError: an unknown space, or one with a key that the config lacks or a value that it refuses.
        UserError: a chain of trainings.
    """
    if config.transfer.stages:
        raise UserError(
            "a sweep runs single trainings, and transfer.stages is a chain of them: sweep a stage's config by itself."
        )
    space = load_space(config.tune.space)
    base = with_threads(config)
    check(space, base)
    return Sweep(base, space)


def with_threads(config: Config) -> Config:
    """``train.threads`` of a trial: its reserved CPUs, since several share a machine. What the user has set stays."""
    if config.train.threads is not None:
        return config
    threads = max(1, int(config.cluster.cpus_per_worker))
    train = Train.model_validate(config.train.model_dump() | {"threads": threads})
    return config.model_copy(update={"train": train})


def specs_of(sweep: Sweep, drawn: list[tuple[int, dict[str, Any]]]) -> list[TrialSpec]:
    """Each drawn trial with its config. Raises ConfigError naming the trial that has none."""
    return [spec_of(sweep, number, overrides) for number, overrides in drawn]


def spec_of(sweep: Sweep, number: int, overrides: Mapping[str, Any]) -> TrialSpec:
    """A drawn trial with its config. Raises ConfigError naming the trial."""
    try:
        return TrialSpec(number, dict(overrides), apply(sweep.base, overrides))
    except ConfigError as error:
        raise ConfigError(f"trial {number}: {error.message}") from None


def drawn_trials(sweep: Sweep) -> list[tuple[int, dict[str, Any]]]:
    """What the searcher draws before the sweep begins; nothing for optuna, which is asked while it runs."""
    tune = sweep.base.tune
    if tune.searcher == "optuna":
        return []
    return list(enumerate(draw(sweep.space, tune.num_trials, searcher=tune.searcher, seed=tune.seed, base=sweep.base)))


def check_trials(specs: list[TrialSpec]) -> None:
    """Whether every trial fits the data set, without touching an image. Raises UserError or DataError naming the trial."""
    from medtl_dist.train.start import check_inputs

    for spec in specs:
        try:
            check_inputs(spec.config)
        except (UserError, DataError) as error:
            drawn = ", ".join(f"{key}={value}" for key, value in spec.overrides.items())
            raise type(error)(f"trial {spec.number} ({drawn}): {error.message}") from None


def run_sweep(
    sweep: Sweep,
    folder: Path,
    *,
    resume: bool,
    on_start: Callable[[list[TrialSpec]], None] = lambda _specs: None,
    on_news: Callable[[list[Outcome]], None] | None = None,
) -> list[Outcome]:
    """Run the sweep, or go on with it, and leave its table, ranking and page in the folder. How all trials ended.

    The test split is never opened here.

    Raises:
        UserError: the folder is another sweep's, or another driver is at work in it; no room on the cluster.
        KeyboardInterrupt: after Ctrl-C, once running trials have stopped and the results so far are written.
        Interrupted: likewise after SIGTERM.
    """
    tune = sweep.base.tune
    propose: Propose | None = None
    with (
        opened_sweep_folder(folder, sweep.base, sweep.space.to_yaml(), resume=resume),
        stopping_on_signals() as stopped,
    ):
        drawn = read_specs(folder)
        if drawn is None:
            drawn = drawn_trials(sweep)
            write_specs(folder, drawn)
        specs = specs_of(sweep, drawn)
        check_trials(specs or [TrialSpec(0, {}, sweep.base)])
        if tune.searcher == "optuna" and len(drawn) < tune.num_trials:
            from cluster.sweep_optuna import proposer

            propose = _announced(proposer(sweep, folder, drawn), on_start)
        on_start(specs)
        set_environment(own_cluster=sweep.base.cluster.address is None)
        outcomes = run_trials(
            folder,
            specs,
            sweep.base,
            stop_rule=_rule_of(sweep, specs),
            on_news=on_news,
            propose=propose,
            stopped=stopped,
            warm_options=warm_options(sweep.base, folder),
        )
        _write_result(folder, outcomes)
        if not tune.keep_prefix_cache and not waiting_numbers(outcomes):
            shutil.rmtree(
                folder / CACHE_FOLDER, ignore_errors=True
            )  # it is made from patients' images; a sweep that will go on still needs it
    _raise_if_stopped(stopped, outcomes, folder)
    return outcomes


def _write_result(folder: Path, outcomes: list[Outcome]) -> None:
    from medtl_dist.report.sweep_page import build_sweep_page
    from medtl_dist.sweep.summary import write_sweep

    try:
        write_sweep(folder, outcomes)
    except OSError as error:
        raise TrainingError(
            f"{folder}: its result can't be written ({error.strerror or error}). The trials are whole: free space, then the "
            "same command with --resume writes it."
        ) from None
    build_sweep_page(folder)


def warm_options(base: Config, folder: Path) -> dict[str, Any]:
    """What a sweep's worker processes keep between trials."""
    tune = base.tune
    return {
        "keep_epoch_scores": True,
        "cache_dir": folder / CACHE_FOLDER,
        "cache_mode": tune.prefix_cache,
        "cache_limit_mib": tune.prefix_cache_mib,
    }


def _rule_of(sweep: Sweep, specs: list[TrialSpec]) -> Any:
    if sweep.base.tune.scheduler == "none":
        return None
    from cluster.trial_stop import stop_rule_of

    # Optuna's trials are not drawn yet: they may be as long as the space lets them be.
    ends = [knob.sets(end) for knob in sweep.space.knobs if "train.epochs" in knob.config_keys() for end in knob.ends()]
    longest = [sets["train.epochs"] for sets in ends] + [spec.config.train.epochs for spec in specs]
    return stop_rule_of(sweep.base.tune, max([sweep.base.train.epochs, *longest]))


def _announced(propose: Propose, on_start: Callable[[list[TrialSpec]], None]) -> Propose:
    def proposing(outcomes: list[Outcome]) -> TrialSpec | None:
        spec = propose(outcomes)
        if spec is not None:
            on_start([spec])
        return spec

    return proposing


def _raise_if_stopped(stopped: Stopped, outcomes: list[Outcome], folder: Path) -> None:
    left = len(waiting_numbers(outcomes))
    if stopped.received == signal.SIGINT:
        raise KeyboardInterrupt
    if stopped.received is not None:
        raise Interrupted(
            f"{folder}: stopped as asked with {left} trials to go; the same command with --resume goes on."
        )
