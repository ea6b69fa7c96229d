"""a sweep folder's config and space → what each trial's knobs were, the keys that no trial overrides left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from medtl_dist.config import parse_yaml
from medtl_dist.errors import ConfigError
from medtl_dist.sweep.outcome import Outcome


def knobs_of(folder: Path, outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Knob to value, for each outcome. A key that a trial does not override has the base config's value; keys that the space sets
    together are one knob, whose value is the option's name."""
    base = read_plain(folder / "config.yaml")
    keys = sorted({key for one in outcomes for key in one.overrides})
    rows = [{key: one.overrides.get(key, look_up(base, key)) for key in keys} for one in outcomes]
    for name, options in _options(read_plain(folder / "space.yaml")):
        together = set(next(iter(options.values())))
        for row in (row for row in rows if together <= row.keys()):
            chosen = next((label for label, sets in options.items() if all(row[k] == v for k, v in sets.items())), None)
            for key in together:
                del row[key]
            row[name] = chosen if chosen is not None else "(as configured)"
    return rows


def _options(space: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, dict[str, Any]]]]:
    knobs = space.get("knobs")
    for knob in knobs if isinstance(knobs, list) else []:
        options = knob.get("options") if isinstance(knob, dict) else None
        if isinstance(options, dict) and options and all(isinstance(sets, dict) and sets for sets in options.values()):
            yield str(knob.get("key")), options


def read_plain(file: Path) -> dict[str, Any]:
    """A YAML file of the sweep as plain values; {} where it is missing or damaged: then a little less is told."""
    try:
        return parse_yaml(file.read_text(encoding="utf-8"), str(file))
    except (OSError, UnicodeDecodeError, ConfigError):
        return {}


def look_up(config: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key, or None."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
