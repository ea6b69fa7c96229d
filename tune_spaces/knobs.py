"""one line of a space file → a knob: what values a config key may take, when it is drawn at all, and where in its range
a share from 0 to 1 lies. Plain arithmetic; no random state lives here."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

KEY = re.compile(r"[a-z][a-z0-9_]*(\.[A-Za-z0-9_][\w -]*)+")  # section.key, or deeper: train.class_weights.PNEUMONIA
NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
# YAML reads 1e-3 as text, for want of a point: who writes it means the number.
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")
MAX_VALUES = 100
SIGNIFICANT_DIGITS = 4  # of a drawn float: what the table shows is what ran

# Not of a space, and why: a sweep compares AUCs of the same images, and a trial is one training.
REFUSED = {
    "tune": "the sweep's own section can't differ between its trials",
    "cluster": "resources are derived for the whole sweep",
    "transfer": "a trial is one training, not a chain",
    "data.shards": "AUCs of different images can't be ranked",
    "augment.views": "one policy of views holds for the whole sweep, so that frozen depths compare fairly",
}


class Part(BaseModel):
    """Frozen, and without keys of its own invention."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number, not true or false")
    return value


Number = Annotated[float, BeforeValidator(_no_bool)]
Whole = Annotated[int, BeforeValidator(_no_bool)]


class Condition(Part):
    """When a knob is drawn: the value of another key is one of some, or none of some."""

    one_of: list[Any] | None = None
    none_of: list[Any] | None = Field(default=None, alias="not")

    @model_validator(mode="before")
    @classmethod
    def _a_list_means_one_of(cls, given: Any) -> Any:
        if isinstance(given, list):
            return {"one_of": given}
        if isinstance(given, Mapping) and set(given) in ({"not"}, {"one_of"}):
            return dict(given)
        raise ValueError("a list of values, or {not: [...]}")

    @field_validator("one_of", "none_of", mode="after")
    @classmethod
    def _some_plain_values(cls, given: list[Any] | None) -> list[Any] | None:
        return None if given is None else plain_values(given)

    def holds(self, value: Any) -> bool:
        if self.one_of is not None:
            return same_as_any(value, self.one_of)
        return not same_as_any(value, self.none_of or [])


class _Knob(Part):
    """A config key that a sweep varies."""

    key: str = Field(description="Dotted config key, for example optim.lr.")
    when: dict[str, Condition] = Field(
        default={}, description="Other keys and their values with which the knob is drawn; all must hold."
    )

    @field_validator("when")
    @classmethod
    def _conditions_are_on_keys(cls, when: dict[str, Condition]) -> dict[str, Condition]:
        for key in when:
            if not KEY.fullmatch(key):
                raise ValueError(f"{key!r} is no config key such as model.frozen_depth")
        return when

    def sets(self, value: Any) -> dict[str, Any]:
        """The overrides that a value of this knob stands for."""
        return {self.key: value}

    def config_keys(self) -> set[str]:
        return {self.key}


class _Range(_Knob):
    points: Annotated[Whole, Field(ge=2, le=MAX_VALUES)] = Field(
        default=3, description="Values in a grid: evenly spaced over the range, both ends included."
    )

    @field_validator("key")
    @classmethod
    def _is_of_the_config(cls, key: str) -> str:
        return _of_a_space(key)

    def at(self, share: float) -> float:
        raise NotImplementedError

    def ends(self) -> list[Any]:
        return [self.at(0.0), self.at(1.0)]

    def grid(self) -> list[Any]:
        values = [self.at(index / (self.points - 1)) for index in range(self.points)]
        return list(dict.fromkeys(values))


class LogUniform(_Range):
    """A positive number whose logarithm is uniform over [low, high]."""

    type: Literal["log_uniform"]
    low: Annotated[Number, Field(gt=0)]
    high: Annotated[Number, Field(gt=0)]

    @model_validator(mode="after")
    def _low_is_below_high(self) -> LogUniform:
        return _ordered(self)

    def at(self, share: float) -> float:
        """The value below which ``share`` (0 … 1) of the distribution lies."""
        return self.rounded(math.exp((1 - share) * math.log(self.low) + share * math.log(self.high)))

    def rounded(self, value: float) -> float:
        return _rounded(value, self.low, self.high)

    def holds(self, value: Any) -> bool:
        return _is_number(value) and self.low <= value <= self.high


class Uniform(_Range):
    """A number uniform over [low, high]."""

    type: Literal["uniform"]
    low: Number
    high: Number

    @model_validator(mode="after")
    def _low_is_below_high(self) -> Uniform:
        return _ordered(self)

    def at(self, share: float) -> float:
        """As ``LogUniform.at``."""
        return self.rounded((1 - share) * self.low + share * self.high)

    def rounded(self, value: float) -> float:
        return _rounded(value, self.low, self.high)

    def holds(self, value: Any) -> bool:
        return _is_number(value) and self.low <= value <= self.high


class Int(_Range):
    """A whole number uniform over low, low + 1, … high."""

    type: Literal["int"]
    low: Whole
    high: Whole

    @model_validator(mode="after")
    def _low_is_below_high(self) -> Int:
        return _ordered(self)

    def at(self, share: float) -> int:
        """As ``LogUniform.at``; each whole number has an equal piece of [0, 1]."""
        count = self.high - self.low + 1
        return self.low + min(int(share * count), count - 1)

    def grid(self) -> list[Any]:
        span = self.high - self.low
        return list(dict.fromkeys(self.low + round(span * index / (self.points - 1)) for index in range(self.points)))

    def holds(self, value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and self.low <= value <= self.high


class Choice(_Knob):
    """One of some values of a key; or, with ``options``, one of some named sets of keys (``key`` is then any name)."""

    type: Literal["choice"]
    values: list[Any] = Field(default=[], description="What the key may be.")
    options: dict[str, dict[str, Any]] = Field(
        default={}, description="In place of values: names, and the keys that each sets; all set the same keys."
    )

    @field_validator("values", mode="after")
    @classmethod
    def _different_plain_values(cls, given: list[Any]) -> list[Any]:
        values = plain_values(given) if given else []
        for index, value in enumerate(values):
            if same_as_any(value, values[:index]):
                raise ValueError(f"{short(value)} is there twice")
        return values

    @field_validator("options", mode="after")
    @classmethod
    def _options_set_the_same_keys(cls, given: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for name, keys in given.items():
            if not keys:
                raise ValueError(f"{name} sets no key")
            found[name] = dict(zip(map(_of_a_space, keys), plain_values(list(keys.values())), strict=True))
            first = next(iter(found.values()))
            if set(keys) != set(first):
                differing = ", ".join(sorted(set(keys) ^ set(first)))
                raise ValueError(f"{name} and {next(iter(found))} set different keys ({differing}); give all in each")
        if len({json.dumps(keys, sort_keys=True) for keys in found.values()}) < len(found):
            raise ValueError("two of them set the same values")
        return found

    @model_validator(mode="after")
    def _either_values_or_options(self) -> Choice:
        if bool(self.values) == bool(self.options):
            raise ValueError("give values or options, one of the two")
        if self.options and not NAME.fullmatch(self.key):
            raise ValueError(f"key = {self.key!r}: with options it is a name such as augmentation, without a point")
        if self.values:
            _of_a_space(self.key)
        return self

    @property
    def names(self) -> list[Any]:
        """What is drawn: the values, or the names of the options."""
        return list(self.options) or self.values

    def sets(self, value: Any) -> dict[str, Any]:
        return dict(self.options[value]) if self.options else {self.key: value}

    def config_keys(self) -> set[str]:
        return set(next(iter(self.options.values()))) if self.options else {self.key}

    def at(self, share: float) -> Any:
        """As ``LogUniform.at``, in the order given; each value has an equal piece of [0, 1]."""
        return self.names[min(int(share * len(self.names)), len(self.names) - 1)]

    def ends(self) -> list[Any]:
        return self.names

    def grid(self) -> list[Any]:
        return self.names

    def holds(self, value: Any) -> bool:
        return same_as_any(value, self.names)


Knob = Annotated[LogUniform | Uniform | Int | Choice, Field(discriminator="type")]


def plain_values(given: Sequence[Any]) -> list[Any]:
    """Values as a config file could hold them. Raises ValueError for none, too many, or what is no plain value."""
    if not given:
        raise ValueError("give at least one value")
    if len(given) > MAX_VALUES:
        raise ValueError(f"{len(given)} values; at most {MAX_VALUES}")
    return [_plain(value) for value in given]


def same_as_any(value: Any, others: Sequence[Any]) -> bool:
    """Whether one of ``others`` is ``value``; 1 is 1.0, but true is not 1."""
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in others)


def short(value: Any) -> str:
    """A value for a message, at most 60 characters of it."""
    shown = repr(value) if isinstance(value, str | int | float | bool | None) else f"a {type(value).__name__}"
    return shown if len(shown) <= 60 else shown[:59] + "…"


def _plain(value: Any, depth: int = 0) -> Any:
    if isinstance(value, str):
        return float(value) if _NUMBER.fullmatch(value) else value
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is no number to train with")
    if value is None or isinstance(value, bool | int | float):
        return value
    if depth < 2 and isinstance(value, list | dict) and len(value) <= MAX_VALUES:
        if isinstance(value, list):
            return [_plain(item, depth + 1) for item in value]
        if all(isinstance(key, str | int) for key in value):
            return {key: _plain(item, depth + 1) for key, item in value.items()}
    raise ValueError(f"{short(value)} is no value of a config key")


def _of_a_space(key: str) -> str:
    if not KEY.fullmatch(key):
        raise ValueError(f"{short(key)} is no config key such as optim.lr")
    for prefix, reason in REFUSED.items():
        if key == prefix or key.startswith(prefix + "."):
            raise ValueError(f"{key} can't be varied: {reason}")
    return key


def _ordered(knob: Any) -> Any:
    if not knob.low < knob.high:
        raise ValueError(f"low = {knob.low:g} must be below high = {knob.high:g}")
    return knob


def _rounded(value: float, low: float, high: float) -> float:
    return min(max(float(f"{value:.{SIGNIFICANT_DIGITS - 1}e}"), low), high)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
