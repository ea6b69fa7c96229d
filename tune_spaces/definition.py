"""a space's name or file → Space: its knobs, typed and checked, or one message that says where it errs."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from medtl_dist.config import parse_yaml
from medtl_dist.errors import ConfigError
from tune_spaces.knobs import Choice, Int, Knob, LogUniform, Part, Uniform, plain_values, short

MAX_BYTES = 1 << 18
_KINDS = {"log_uniform": LogUniform, "uniform": Uniform, "int": Int, "choice": Choice}


class Space(Part):
    """What a sweep varies: knobs in the order in which they are drawn, and points to try first."""

    about: str = Field(default="", description="What the space is for, in a sentence.")
    knobs: list[Knob] = Field(min_length=1, max_length=64, description="The config keys that vary.")
    try_first: list[dict[str, Any]] = Field(
        default=[],
        max_length=1000,
        description="Points to try before any is drawn: knob to value, options by name; {} is the config itself.",
    )
    name: str = Field(default="", exclude=True)

    @field_validator("try_first", mode="after")
    @classmethod
    def _points_are_plain(cls, points: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [dict(zip(point, plain_values(list(point.values())), strict=True)) if point else {} for point in points]

    @model_validator(mode="after")
    def _knobs_fit_together(self) -> Space:
        seen: dict[str, Any] = {}
        later = {key: knob.key for knob in self.knobs for key in knob.config_keys()}
        for knob in self.knobs:
            for key in knob.config_keys():
                if key in seen and not (knob.when and seen[key].when):
                    raise ValueError(f"{key} is set by two knobs: give both a `when`, so that one of them is drawn")
                seen[key] = knob
            for key in knob.when:
                if key in knob.config_keys():
                    raise ValueError(f"{knob.key} has a condition on itself")
                if key in later and key not in seen:
                    raise ValueError(f"{knob.key} depends on {key}, which must stand before it")
        for number, point in enumerate(self.try_first, start=1):
            for key, value in point.items():
                fitting = [knob for knob in self.knobs if knob.key == key]
                if not fitting:
                    raise ValueError(f"try_first, no. {number}: {key} is no knob; there are: {', '.join(self.labels)}")
                if not any(knob.holds(value) for knob in fitting):
                    raise ValueError(f"try_first, no. {number}: {key} = {short(value)} is outside the knob's range")
        return self

    @property
    def labels(self) -> list[str]:
        """A name for each knob of its own: its key, and a number where several knobs set the same key."""
        keys = [knob.key for knob in self.knobs]
        return [f"{key}#{keys[:at].count(key) + 1}" if key in keys[:at] else key for at, key in enumerate(keys)]

    def to_yaml(self) -> str:
        """The space as a file that ``load_space`` reads."""
        tree = self.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        for knob in tree["knobs"]:
            for key, condition in knob.get("when", {}).items():
                knob["when"][key] = condition.get("one_of", condition)
        return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def names() -> list[str]:
    """Names of the packaged spaces, sorted."""
    files = (file.name for file in resources.files("tune_spaces").iterdir())
    return sorted(name.removesuffix(".yaml") for name in files if name.endswith(".yaml"))


def load_space(name_or_file: str) -> Space:
    """The packaged space of that name, or the space in a YAML file.

    Raises:
        ConfigError: no such name or file, not a space, or a knob that can't be; one message with the file's path.
    """
    if name_or_file in names():
        text = (resources.files("tune_spaces") / f"{name_or_file}.yaml").read_text(encoding="utf-8")
        return _parse(text, f"space {name_or_file}", name_or_file)
    path = Path(name_or_file)
    if path.suffix not in (".yaml", ".yml") and not path.is_file():
        raise ConfigError(f"unknown space {name_or_file!r}; there are: {', '.join(names())}; or give a YAML file.")
    where = f"space {path}"
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        text = content.decode("utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where}: can't be read ({getattr(error, 'strerror', None) or 'not UTF-8 text'}).") from None
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{where}: more than {MAX_BYTES // 1024} KiB; a space is a page of knobs.")
    return _parse(text, where, path.stem)


def _parse(text: str, where: str, name: str) -> Space:
    expected = "Expected `knobs:` with a list below it; `medtl tune --help` names an example."
    tree: dict[str, Any] = {}
    try:
        tree = parse_yaml(text, where)
        if tree.keys() & {"name"}:
            raise ConfigError(f"{where}: unknown key name; a space has: about, knobs, try_first")
        return Space.model_validate(tree | {"name": name})
    except ConfigError as error:
        message = error.message if error.message.startswith(where) else f"{where}: {error.message}"
        raise ConfigError(message) from None
    except ValidationError as error:
        raise ConfigError(f"{where}: " + "\n".join(_explain(fault, tree) for fault in error.errors()[:10])) from None
    except (ValueError, TypeError, OverflowError) as error:  # YAML that names an impossible date, say
        raise ConfigError(f"{where}: {short(str(error))}. {expected}") from None
    except RecursionError:
        raise ConfigError(f"{where}: nested too deeply. {expected}") from None


def _explain(fault: Any, tree: Mapping[str, Any]) -> str:
    """One pydantic fault as a sentence: which knob, which of its keys, what was given and what is expected."""
    loc, said = list(fault["loc"]), fault["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    at = ""
    if loc[:1] == ["knobs"] and len(loc) > 1:
        entry = tree["knobs"][loc[1]]
        key = entry.get("key") if isinstance(entry, Mapping) else None
        at = f"knob no. {loc[1] + 1}" + (f" ({key})" if isinstance(key, str) and len(key) <= 80 else "") + ": "
        loc = loc[3:] if len(loc) > 2 else []
    path = ".".join(str(part) for part in loc)
    if fault["type"] == "extra_forbidden":
        model = _KINDS.get(fault["loc"][2], Space) if at else Space
        return f"{at}unknown key {path}; there are: {', '.join(sorted(set(model.model_fields) - {'name'}))}"
    if fault["type"] in ("union_tag_not_found", "union_tag_invalid"):
        return f"{at}type = {short(_given_type(fault['input']))}: expected log_uniform, uniform, int or choice"
    if fault["type"] == "missing":
        return f"{at}{path} is missing"
    if fault["type"] in ("value_error", "model_type", "model_attributes_type"):
        return f"{at}{path + ': ' if path else ''}{said}"
    return f"{at}{path} = {short(fault['input'])}: expected {said}"


def _given_type(entry: Any) -> Any:
    return entry.get("type") if isinstance(entry, Mapping) else entry
