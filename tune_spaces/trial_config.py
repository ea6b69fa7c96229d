"""a config and a trial's overrides → the trial's config; and whether a space fits a config, before anything starts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from medtl_dist.config import Config, validate
from medtl_dist.errors import ConfigError
from tune_spaces.definition import Space
from tune_spaces.knobs import short
from tune_spaces.points import ABSENT, assign, combinations, dump, is_drawn, look_up, of_point, put

MAX_COMBINATIONS = 4096  # of the knobs' ends, up to which all are tried before a sweep; beyond, every two knobs


def apply(base: Config, overrides: Mapping[str, Any]) -> Config:
    """The config of a trial: ``base`` with the overrides, validated as a whole.

    ``augment.name`` takes that set's augmentations, as in a file; the policy of views stays the base's.

    Raises:
        ConfigError: a key that the config lacks (with the valid ones) or a value that it refuses.
    """
    tree = base.model_dump(mode="json")
    if "augment.name" in overrides:
        tree["augment"] = {"views": base.augment.views}
    for key, value in overrides.items():
        *sections, last = key.split(".")
        place: Any = tree
        for section in sections:
            below = place.get(section) if isinstance(place, dict) else None
            if not isinstance(below, dict):
                place[section] = below = {}
            place = below
        place[last] = value
    return validate(tree)


def check(space: Space, base: Config) -> None:
    """Try the knobs' values on the config before anything starts: both ends of each range, every choice, every point to try
    first; each knob by itself, then together with the others.

    Raises:
        ConfigError: a key that the config lacks, a value that it refuses, or knobs that can't be drawn together; or a
            knob that is never drawn.
    """
    config = dump(base)
    where = f"space {space.name}"
    for knob in space.knobs:
        _check_conditions(knob, space, config, where)
    tried: set[str] = set()
    for overrides in _to_try(space, config, where):
        text = repr(sorted(overrides.items()))
        if text in tried:
            continue
        tried.add(text)
        try:
            apply(base, overrides)
        except ConfigError as error:
            shown = ", ".join(f"{key} = {short(value)}" for key, value in overrides.items())
            raise ConfigError(f"{where}: {error.message} (tried: {shown})") from None


def _check_conditions(knob: Any, space: Space, config: Mapping[str, Any], where: str) -> None:
    set_by_knobs = {key for other in space.knobs for key in other.config_keys()}
    for key in knob.when:
        if key not in set_by_knobs and look_up(config, key) is ABSENT:
            section = key.split(".")[0]
            there = config.get(section)
            valid = f"{section} has: {', '.join(sorted(there))}" if isinstance(there, dict) else "no such section"
            raise ConfigError(f"{where}: knob {knob.key}: unknown key {key} in `when`; {valid}")


def _to_try(space: Space, config: Mapping[str, Any], where: str) -> Iterator[dict[str, Any]]:
    for at, knob in enumerate(space.knobs):
        needed = _needed(space, at)
        reached = [one for one in combinations(needed, config, _ends) if is_drawn(knob, one, config)]
        if not reached:
            raise ConfigError(f"{where}: knob {knob.key} is never drawn: its `when` holds for no value of the others")
        for value in _ends(knob):
            overrides = dict(reached[0])
            put(overrides, knob, value)
            yield overrides
    for point in space.try_first:
        yield assign(space, config, lambda knob, _, at=point: of_point(knob, at))
    every = list(itertools.islice(combinations(space.knobs, config, _ends), MAX_COMBINATIONS + 1))
    if len(every) <= MAX_COMBINATIONS:
        yield from every
        return
    for first, second in itertools.combinations(range(len(space.knobs)), 2):
        both = {first, second} | {at for one in (first, second) for at in _needed_places(space, one)}
        chosen = [space.knobs[at] for at in sorted(both)]
        yield from itertools.islice(combinations(chosen, config, _ends), MAX_COMBINATIONS)


def _ends(knob: Any) -> list[Any]:
    return knob.ends()


def _needed(space: Space, at: int) -> list[Any]:
    return [space.knobs[place] for place in sorted(_needed_places(space, at))]


def _needed_places(space: Space, at: int) -> set[int]:
    """Places of the knobs on which a knob's conditions depend, directly or through others."""
    found: set[int] = set()
    for place, other in enumerate(space.knobs[:at]):
        if other.config_keys() & set(space.knobs[at].when):
            found |= {place} | _needed_places(space, place)
    return found
