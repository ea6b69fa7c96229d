"""config and space → the sweep and its trials, each with its config, checked before anything starts. No Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.trial_state import TrialSpec
from medtl_dist.config import Config
from medtl_dist.errors import ConfigError, DataError, UserError
from medtl_dist.sections import Train
from tune_spaces.space import Space, apply, check, draw, load_space


@dataclass(frozen=True)
class Sweep:
    """What a sweep varies, and around what. ``base``: the whole config, with the threads of a trial in it."""

    base: Config
    space: Space


def sweep_of(config: Config, space_file: Path | None = None) -> Sweep:
    """The config's sweep, checked before anything starts: every key and value of its space (``space_file``: of that one instead)
    fits the config.

    Raises:
        ConfigError: an unknown space, or one with a key that the config lacks or a value that it refuses.
        UserError: a chain of trainings.
    """
    if config.transfer.stages:
        raise UserError(
            "a sweep runs single trainings, and transfer.stages is a chain of them: sweep a stage's config by itself."
        )
    space = load_space(config.tune.space if space_file is None else str(space_file))
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
