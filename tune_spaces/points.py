"""a space and the config it varies → points: the overrides of each trial, drawn at random, laid out as a grid, or asked of
Optuna. What is drawn depends on the seed, the trial's place and the knob's key alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from medtl_dist.config import Config
from medtl_dist.errors import ConfigError
from tune_spaces.definition import Space
from tune_spaces.knobs import Choice, Int, LogUniform

MAX_GRID = 10_000
NEW_POINT_TRIES = 200  # draws in a row that repeat earlier trials, after which a finite space counts as used up
ABSENT = object()


def optuna_trial_values(space: Space, trial: Any, base: Config | None = None) -> dict[str, Any]:
    """The overrides of an Optuna trial, asked for knob by knob, so that a knob whose conditions don't hold is not asked.

    Args:
        trial: an ``optuna.Trial``; parameters are named by ``space.labels``.
        base: as ``draw``.
    """
    return assign(space, dump(base), lambda knob, label: _suggested(knob, label, trial))


def _suggested(knob: Any, label: str, trial: Any) -> Any:
    if isinstance(knob, Choice):
        coded = [_coded(name) for name in knob.names]
        return knob.names[coded.index(trial.suggest_categorical(label, coded))]
    if isinstance(knob, Int):
        return trial.suggest_int(label, knob.low, knob.high)
    return knob.rounded(trial.suggest_float(label, knob.low, knob.high, log=isinstance(knob, LogUniform)))


def optuna_points(space: Space, base: Config | None = None) -> list[dict[str, Any]]:
    """``space.try_first`` as parameters for ``study.enqueue_trial``.

    A knob that a point does not give has the base config's value where that lies in its range; else Optuna chooses.
    """
    config = dump(base)
    points = []
    for point in space.try_first:
        asked: dict[str, Any] = {}

        def value_of(knob: Any, label: str, point: Any = point, asked: dict[str, Any] = asked) -> Any:
            value = of_point(knob, point)
            value = _of_config(knob, config) if value is ABSENT else value
            if value is not ABSENT:
                asked[label] = _coded(value) if isinstance(knob, Choice) else value
            return value

        assign(space, config, value_of)
        points.append(asked)
    return points


def _of_config(knob: Any, config: Mapping[str, Any]) -> Any:
    """What the knob would have to be to leave the config as it is, or ABSENT."""
    if isinstance(knob, Choice):
        same = (name for name in knob.names if all(look_up(config, k) == v for k, v in knob.sets(name).items()))
        return next(same, ABSENT)
    value = look_up(config, knob.key)
    return value if knob.holds(value) else ABSENT


def _coded(value: Any) -> Any:
    """A value as Optuna can keep it: lists and mappings as JSON."""
    return json.dumps(value, sort_keys=True) if isinstance(value, list | dict) else value


def draw(
    space: Space,
    num_trials: int,
    *,
    searcher: Literal["random", "grid"] = "random",
    seed: int = 0,
    base: Config | None = None,
) -> list[dict[str, Any]]:
    """The overrides of each trial, the points to try first in front; no two trials are the same.

    random: ``num_trials`` of them, fewer where the space has no more. A trial's values depend on the seed, its place and the
    knobs' keys: more trials don't change the first ones, a knob more does not change the others.
    grid: as many as the grid has points, in the knobs' order; ``num_trials`` and ``seed`` say nothing.

    Args:
        base: the config that is varied, for conditions on keys that no knob sets; None: the defaults.

    Raises:
        ConfigError: a grid too large, or two knobs that set the same key in one trial.
    """
    config = dump(base)
    found: dict[str, dict[str, Any]] = {}
    for point in space.try_first if searcher == "grid" else space.try_first[:num_trials]:
        _add(found, assign(space, config, lambda knob, _, at=point: of_point(knob, at)))
    if searcher == "grid":
        for overrides in _grid(space, config):
            _add(found, overrides)
        return list(found.values())
    place = tries = 0
    while len(found) < num_trials and tries < NEW_POINT_TRIES:
        is_new = _add(found, assign(space, config, lambda knob, label, i=place: knob.at(_share(seed, i, label))))
        place, tries = place + 1, 0 if is_new else tries + 1
    return list(found.values())


def _share(seed: int, place: int, label: str) -> float:
    """A share in [0, 1), uniform over places and labels: no generator whose stream a release could change."""
    digest = hashlib.sha256(f"{seed}/{place}/{label}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def _add(found: dict[str, dict[str, Any]], overrides: dict[str, Any]) -> bool:
    return found.setdefault(repr(sorted(overrides.items())), overrides) is overrides


def of_point(knob: Any, point: Mapping[str, Any]) -> Any:
    value = point.get(knob.key, ABSENT)
    return value if value is not ABSENT and knob.holds(value) else ABSENT


def assign(space: Space, config: Mapping[str, Any], value_of: Callable[[Any, str], Any]) -> dict[str, Any]:
    """One trial: each knob whose conditions hold gets its value, in the space's order."""
    overrides: dict[str, Any] = {}
    for knob, label in zip(space.knobs, space.labels, strict=True):
        if is_drawn(knob, overrides, config):
            value = value_of(knob, label)
            if value is not ABSENT:
                put(overrides, knob, value)
    return overrides


def put(overrides: dict[str, Any], knob: Any, value: Any) -> None:
    sets = knob.sets(value)
    if twice := sorted(overrides.keys() & sets.keys()):
        raise ConfigError(f"{twice[0]} is set by two knobs at once: give them conditions that exclude each other")
    overrides |= sets


def is_drawn(knob: Any, overrides: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    return all(
        condition.holds(overrides[key] if key in overrides else look_up(config, key))
        for key, condition in knob.when.items()
    )


def _grid(space: Space, config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    points = combinations(space.knobs, config, lambda knob: knob.grid())
    for number, overrides in enumerate(points, start=1):
        if number > MAX_GRID:
            raise ConfigError(f"space {space.name}: the grid has more than {MAX_GRID:,} points; give fewer `points`")
        yield overrides


def combinations(
    knobs: Sequence[Any], config: Mapping[str, Any], values: Callable[[Any], list[Any]]
) -> Iterator[dict[str, Any]]:
    """The product of the knobs' values, each knob skipped where its conditions don't hold: so no point comes twice."""

    def below(at: int, overrides: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if at == len(knobs):
            yield overrides
        elif is_drawn(knobs[at], overrides, config):
            for value in values(knobs[at]):
                deeper = dict(overrides)
                put(deeper, knobs[at], value)
                yield from below(at + 1, deeper)
        else:
            yield from below(at + 1, overrides)

    return below(0, {})


def look_up(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value.get(part, ABSENT) if isinstance(value, Mapping) else ABSENT
    return value


def dump(base: Config | None) -> dict[str, Any]:
    return (base or Config()).model_dump(mode="json")
