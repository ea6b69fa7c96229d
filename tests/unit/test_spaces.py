"""Search spaces: what is drawn follows its distribution and the seed alone, a grid is the product, a bad file is one message."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from medtl_dist.config import Config, load_config
from medtl_dist.errors import ConfigError
from tune_spaces.space import (
    Choice,
    Space,
    apply,
    check,
    draw,
    load_space,
    names,
    optuna_points,
    optuna_trial_values,
)

PRESET_OF = {"resnet101": "resnet101", "head_only": "resnet101_head", "study": "classic", "smoke": "smoke"}


def space_of(tmp_path: Path, text: str) -> Space:
    file = tmp_path / "my.yaml"
    file.write_text(text)
    return load_space(str(file))


def knob(**keys: Any) -> Space:
    return Space.model_validate({"knobs": [keys]})


def drawn(space: Space, key: str, num: int, seed: int = 0) -> list[Any]:
    return [overrides[key] for overrides in draw(space, num, seed=seed)]


# ---- what is drawn


def test_log_uniform_is_uniform_in_the_logarithm() -> None:
    space = knob(key="optim.lr", type="log_uniform", low=1e-5, high=1e-1)
    shares = [(math.log10(value) + 5) / 4 for value in drawn(space, "optim.lr", 3000)]
    assert stats.kstest(shares, "uniform").pvalue > 0.01
    assert stats.kstest([10 ** (4 * share - 4) for share in shares], "uniform").pvalue < 1e-6  # the test can fail


def test_uniform_is_uniform() -> None:
    values = drawn(knob(key="train.label_smoothing", type="uniform", low=0.1, high=0.3), "train.label_smoothing", 3000)
    assert stats.kstest(values, "uniform", args=(0.1, 0.2)).pvalue > 0.01


def test_whole_numbers_and_choices_are_equally_likely() -> None:
    place = {"key": "schedule.step_epochs", "type": "int", "low": 3, "high": 9}
    width = {"key": "train.seed", "type": "int", "low": 0, "high": 10**6}  # so that no two trials are the same
    name = {"key": "schedule.name", "type": "choice", "values": ["constant", "step", "cosine"]}
    trials = draw(Space.model_validate({"knobs": [place, width, name]}), 2800)
    steps = [trial["schedule.step_epochs"] for trial in trials]
    assert set(steps) == set(range(3, 10))
    assert stats.chisquare([steps.count(value) for value in range(3, 10)]).pvalue > 0.01
    schedules = [trial["schedule.name"] for trial in trials]
    assert stats.chisquare([schedules.count(value) for value in ("constant", "step", "cosine")]).pvalue > 0.01


def test_knobs_and_seeds_are_independent() -> None:
    trials = draw(load_space("resnet101"), 1500, seed=3)
    rates = [math.log(trial["optim.lr"]) for trial in trials[1:]]
    decays = [math.log(trial["optim.weight_decay"]) for trial in trials[1:]]
    others = [math.log(trial["optim.lr"]) for trial in draw(load_space("resnet101"), 1500, seed=4)[1:]]
    for one, other in ((rates, decays), (rates, others), (rates[:-1], rates[1:])):
        assert abs(stats.spearmanr(one, other).statistic) < 0.08  # 3 standard errors


def test_drawing_depends_on_the_seed_alone_and_more_trials_keep_the_first() -> None:
    code = "from tune_spaces.space import *; print(draw(load_space('resnet101'), 5, seed=7))"
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("0", "1")
    }
    space = load_space("resnet101")
    assert said == {repr(draw(space, 5, seed=7))}
    assert draw(space, 40, seed=7)[:5] == draw(space, 5, seed=7) != draw(space, 5, seed=8)


def test_what_a_seed_draws_is_pinned() -> None:
    """A release that draws other trials from the same seed would break every sweep that is resumed."""
    assert draw(load_space("smoke"), 3, seed=1) == [
        {"model.frozen_depth": "all", "optim.lr": 0.0001131},
        {"model.frozen_depth": "all", "optim.lr": 0.003418},
        {"model.frozen_depth": 0, "optim.lr": 0.03847},
    ]


def test_a_knob_more_does_not_change_the_others() -> None:
    base = {"key": "optim.lr", "type": "log_uniform", "low": 1e-5, "high": 1e-1}
    more = {"key": "optim.momentum", "type": "uniform", "low": 0.5, "high": 0.9}
    with_more = Space.model_validate({"knobs": [more, base]})
    assert drawn(with_more, "optim.lr", 20) == drawn(Space.model_validate({"knobs": [base]}), "optim.lr", 20)


def test_a_finite_space_gives_no_trial_twice_and_ends() -> None:
    space = knob(key="schedule.name", type="choice", values=["constant", "step", "cosine"])
    assert sorted(drawn(space, "schedule.name", 12)) == ["constant", "cosine", "step"]


def test_points_to_try_first_come_first_and_are_not_drawn_again(tmp_path: Path) -> None:
    space = space_of(
        tmp_path,
        "knobs: [{key: schedule.name, type: choice, values: [constant, step]}]\ntry_first: [{}, {schedule.name: step}]",
    )
    assert draw(space, 9) == [{}, {"schedule.name": "step"}, {"schedule.name": "constant"}]
    assert draw(space, 1) == [{}]
    assert draw(space, 1, searcher="grid") == draw(space, 9)


# ---- conditions and grids


@pytest.mark.parametrize("depth", [0, 3, 5, "all"])
def test_a_backbone_rate_is_drawn_only_where_something_learns(depth: Any) -> None:
    space = load_space("resnet101")
    for trial in draw(space, 200)[1:]:
        assert ("optim.backbone_lr" in trial) == (trial["model.frozen_depth"] in (0, 3, 4))
    only = {
        "knobs": [
            one.model_dump(by_alias=True, exclude_none=True) for one in space.knobs if one.key == "optim.backbone_lr"
        ]
    }
    base = apply(Config(), {"model.frozen_depth": depth})
    assert bool(draw(Space.model_validate(only), 3, base=base)[0]) == (depth in (0, 3))


def test_ranges_that_depend_on_the_optimiser() -> None:
    for trial in draw(load_space("head_only"), 300)[1:]:
        low, high = {"adamw": (3e-4, 3e-2), "sgd": (3e-3, 3e-1)}[trial["optim.name"]]
        assert low <= trial["optim.lr"] <= high


def test_two_knobs_of_one_key_at_once_are_an_error(tmp_path: Path) -> None:
    space = space_of(
        tmp_path,
        "knobs:\n"
        "- {key: optim.name, type: choice, values: [adamw, sgd]}\n"
        "- {key: optim.lr, type: uniform, low: 1, high: 2, when: {optim.name: [adamw]}}\n"
        "- {key: optim.lr, type: uniform, low: 1, high: 2, when: {optim.name: [adamw, sgd]}}\n",
    )
    for what in (lambda: draw(space, 50), lambda: check(space, Config())):
        with pytest.raises(ConfigError, match=r"optim\.lr is set by two knobs at once"):
            what()


ranges = st.builds(
    lambda key, low, span, points: {"key": key, "type": "int", "low": low, "high": low + span, "points": points},
    st.just("k"),
    st.integers(-5, 5),
    st.integers(1, 9),
    st.integers(2, 5),
)
choices = st.builds(
    lambda values: {"key": "k", "type": "choice", "values": values},
    st.lists(st.integers(0, 5), min_size=1, max_size=3, unique=True),
)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.one_of(ranges, choices), min_size=1, max_size=4), st.data())
def test_a_grid_is_the_product_with_what_the_conditions_exclude_collapsed(
    knobs: list[dict], data: st.DataObject
) -> None:
    """Against brute force: all tuples of values, the inactive knobs' values struck out, each once."""
    for number, one in enumerate(knobs):
        one["key"] = f"train.k{number}"
        if number and data.draw(st.booleans()):
            parent = data.draw(st.integers(0, number - 1))
            allowed = data.draw(st.lists(st.integers(-5, 5), min_size=1, max_size=4))
            one["when"] = {f"train.k{parent}": {"not": allowed} if data.draw(st.booleans()) else allowed}
    space = Space.model_validate({"knobs": knobs})
    expected = set()
    for values in itertools.product(*[knob.grid() for knob in space.knobs]):
        point: dict[str, Any] = {}
        for definition, value in zip(knobs, values, strict=True):
            holds = True
            for key, rule in definition.get("when", {}).items():
                inside = key in point and point[key] in (rule["not"] if isinstance(rule, dict) else rule)
                holds &= not inside if isinstance(rule, dict) else inside
            if holds:
                point[definition["key"]] = value
        expected.add(tuple(point.items()))
    found = [tuple(point.items()) for point in draw(space, 1, searcher="grid")]
    assert len(found) == len(set(found))
    assert set(found) == expected


def test_a_grid_of_a_range_has_its_ends_and_even_steps() -> None:
    space = knob(key="optim.lr", type="log_uniform", low=1e-4, high=1e-1, points=4)
    assert [point["optim.lr"] for point in draw(space, 1, searcher="grid")] == [1e-4, 1e-3, 1e-2, 1e-1]
    steps = knob(key="schedule.step_epochs", type="int", low=1, high=2, points=5)
    assert [point["schedule.step_epochs"] for point in draw(steps, 1, searcher="grid")] == [1, 2]


def test_a_grid_without_end_is_refused() -> None:
    keys = ["optim.lr", "optim.weight_decay", "optim.momentum"]
    knobs = [{"key": key, "type": "uniform", "low": 0.1, "high": 0.2, "points": 30} for key in keys]
    with pytest.raises(ConfigError, match="more than 10,000 points"):
        draw(Space.model_validate({"knobs": knobs}), 1, searcher="grid")


# ---- onto the config


@pytest.mark.parametrize("name", sorted(PRESET_OF))
def test_packaged_spaces_fit_their_presets_and_come_back_from_yaml(name: str, tmp_path: Path) -> None:
    space, base = load_space(name), load_config(preset=PRESET_OF[name])
    check(space, base)
    for overrides in draw(space, 30, seed=5, base=base):
        config = apply(base, overrides)
        for key, value in overrides.items():
            section, last = key.split(".")
            assert getattr(getattr(config, section), last) == value
    again = space_of(tmp_path, space.to_yaml())
    assert (again.knobs, again.try_first) == (space.knobs, space.try_first)
    assert draw(again, 9, base=base) == draw(space, 9, base=base)


def test_there_is_a_preset_for_every_space() -> None:
    assert names() == sorted(PRESET_OF)


def test_augment_name_takes_the_set_and_keeps_the_views() -> None:
    base = apply(load_config(overrides=["augment.views=5"]), {"augment.rotation_deg": 20})
    found = apply(base, {"augment.name": "none", "augment.contrast": 0.3}).augment
    assert (found.views, found.rotation_deg, found.crop_area_min, found.contrast) == (5, 0.0, 1.0, 0.3)
    assert base.augment.rotation_deg == 20


def test_apply_names_the_key_and_the_value() -> None:
    with pytest.raises(ConfigError, match=r"unknown key optim\.learning_rate; optim has: backbone_lr"):
        apply(Config(), {"optim.learning_rate": 1})
    with pytest.raises(ConfigError, match=r"optim\.lr = -1"):
        apply(Config(), {"optim.lr": -1})
    with pytest.raises(ConfigError, match="unknown key optimizer; the config has: augment"):
        apply(Config(), {"optimizer.lr": 1})


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ("[{key: optim.learning_rate, type: uniform, low: 1, high: 2}]", "unknown key optim.learning_rate; optim has"),
        ("[{key: optim.momentum, type: uniform, low: 0.5, high: 1.0}]", r"optim.momentum = 1.0 .*less than 1"),
        ("[{key: optim.momentum, type: uniform, low: -0.1, high: 0.5}]", r"optim.momentum = -0.1"),
        ("[{key: schedule.name, type: choice, values: [cosine, linear]}]", "schedule.name = 'linear'"),
        ("[{key: a, type: choice, options: {x: {optim.lr: 0.1}, y: {optim.lr: 0}}}]", "optim.lr = 0 "),
        # Only two together are refused.
        (
            ("[{key: data.sampling, type: choice, values: [natural, class]}, "
            "{key: train.class_weights, type: choice, values: [none, balanced]}]"),
            "correct the same twice.*tried: data.sampling = 'class', train.class_weights = 'balanced'",
        ),
        # Refused only where the knob's condition holds, and never drawn.
        (
            ("[{key: optim.name, type: choice, values: [adamw, sgd]}, "
            "{key: optim.momentum, type: choice, values: [0.9, 2], when: {optim.name: [sgd]}}]"),
            r"optim.momentum = 2 .*tried: optim.name = 'sgd', optim.momentum = 2",
        ),
        ("[{key: optim.lr, type: uniform, low: 1, high: 2, when: {optim.nam: [sgd]}}]", "unknown key optim.nam in `when`"),
        ("[{key: optim.lr, type: uniform, low: 1, high: 2, when: {optim.name: [lion]}}]", "never drawn"),
    ],
)  # fmt: skip
def test_what_the_config_refuses_is_an_error_before_anything_starts(tmp_path: Path, knobs: str, says: str) -> None:
    space = space_of(tmp_path, f"knobs: {knobs}")
    with pytest.raises(ConfigError, match=f"(?s)^space my: .*{says}"):
        check(space, Config())


def test_a_condition_lets_two_knobs_live_together(tmp_path: Path) -> None:
    text = (
        "knobs: [{key: data.sampling, type: choice, values: [natural, class]}, "
        "{key: train.class_weights, type: choice, values: [none, balanced], when: {data.sampling: [natural]}}]"
    )
    check(space_of(tmp_path, text), Config())


def test_many_knobs_are_tried_in_pairs(tmp_path: Path) -> None:
    """13 knobs of two ends are 8,192 combinations: still the refused pair is found."""
    fine = [
        f"{{key: optim.{key}, type: uniform, low: 0.1, high: 0.2}}"
        for key in ("lr", "backbone_lr", "momentum", "weight_decay", "layer_decay", "clip_norm")
    ]
    fine += [
        f"{{key: augment.{key}, type: uniform, low: 0.1, high: 0.2}}"
        for key in ("brightness", "contrast", "stain_jitter")
    ]
    fine += [f"{{key: schedule.{key}, type: uniform, low: 0.1, high: 0.2}}" for key in ("warmup_epochs", "gamma")]
    pair = [
        "{key: data.sampling, type: choice, values: [natural, class]}",
        "{key: train.class_weights, type: choice, values: [none, balanced]}",
    ]
    check(space_of(tmp_path, f"knobs: [{', '.join(fine)}]"), Config())
    with pytest.raises(ConfigError, match="correct the same twice"):
        check(space_of(tmp_path, f"knobs: [{', '.join([pair[0], *fine, pair[1]])}]"), Config())


# ---- hostile and mistyped files


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "knobs is missing"),
        ("knobs: []", "at least 1 item"),
        ("knobs: 3", "knobs = 3"),
        ("- a\n- b", "found list"),
        ("knob: []", "unknown key knob; there are: about, knobs, try_first"),
        ("name: x\nknobs: [{key: optim.lr, type: uniform, low: 1, high: 2}]", "unknown key name"),
        ("knobs: [3]", "knob no. 1"),
        ("knobs: [{key: optim.lr, type: normal, low: 1, high: 2}]", r"knob no. 1 \(optim.lr\): type = 'normal': expected log_"),
        ("knobs: [{key: optim.lr, low: 1, high: 2}]", "type = None: expected log_uniform"),
        ("knobs: [{key: optim.lr, type: uniform, low: 1}]", r"\(optim.lr\): high is missing"),
        ("knobs: [{key: optim.lr, type: uniform, low: 1, hihg: 2}]", "unknown key hihg; there are: high, key, low, points"),
        ("knobs: [{key: optim.lr, type: log_uniform, low: 0, high: 2}]", r"low = 0: expected greater than 0"),
        ("knobs: [{key: optim.lr, type: uniform, low: 2, high: 1}]", "low = 2 must be below high = 1"),
        ("knobs: [{key: optim.lr, type: uniform, low: true, high: 2}]", "low: a number, not true or false"),
        ("knobs: [{key: optim.lr, type: uniform, low: .nan, high: 2}]", "low = nan"),
        ("knobs: [{key: optim.lr, type: uniform, low: 1, high: .inf}]", "high = inf"),
        ("knobs: [{key: optim.lr, type: uniform, low: 1, high: 2, points: 1}]", "points = 1"),
        ("knobs: [{key: train.epochs, type: int, low: 1.5, high: 2}]", "low = 1.5"),
        ("knobs: [{key: lr, type: uniform, low: 1, high: 2}]", "'lr' is no config key"),
        ("knobs: [{key: optim.lr, type: choice}]", "give values or options"),
        ("knobs: [{key: optim.lr, type: choice, values: [1], options: {a: {optim.lr: 1}}}]", "give values or options"),
        ("knobs: [{key: optim.lr, type: choice, values: [1, 1.0]}]", "1.0 is there twice"),
        ("knobs: [{key: optim.lr, type: choice, values: [.nan]}]", "nan is no number"),
        ("knobs: [{key: optim.lr, type: choice, values: [2001-01-01]}]", "a date is no value"),
        ("knobs: [{key: optim.lr, type: choice, values: [2001-99-99]}]", "month must be"),
        ("knobs: [{key: optim.lr, type: choice, values: [[[[1]]]]}]", "a list is no value"),
        ("knobs: [{key: a.b, type: choice, options: {x: {optim.lr: 1}}}]", "with options it is a name"),
        ("knobs: [{key: a, type: choice, options: {x: {optim.lr: 1}, y: {optim.momentum: 1}}}]", "set different keys"),
        ("knobs: [{key: a, type: choice, options: {x: {optim.lr: 1}, y: {optim.lr: 1}}}]", "set the same values"),
        ("knobs: [{key: a, type: choice, options: {x: {}}}]", "x sets no key"),
        ("knobs: [{key: tune.seed, type: int, low: 1, high: 2}]", "tune.seed can't be varied"),
        ("knobs: [{key: cluster.num_workers, type: int, low: 1, high: 2}]", "cluster.num_workers can't be varied"),
        ("knobs: [{key: data.shards, type: choice, values: [a, b]}]", "different images can't be ranked"),
        ("knobs: [{key: augment.views, type: choice, values: [1, 5]}]", "one policy of views"),
        ("knobs: [{key: optim.lr, type: uniform, low: 1, high: 2, when: {optim.name: 3}}]", "a list of values, or"),
        ("knobs: [{key: optim.lr, type: uniform, low: 1, high: 2, when: {optim.name: []}}]", "at least one value"),
        ("knobs: [{key: optim.lr, type: uniform, low: 1, high: 2, when: {optim.name: {nor: [3]}}}]", "a list of values, or"),
        ("knobs: [{key: optim.lr, type: uniform, low: 1, high: 2, when: {optim.lr: [1]}}]", "condition on itself"),
        (
            ("knobs: [{key: optim.lr, type: uniform, low: 1, high: 2, when: {optim.name: [sgd]}}, "
            "{key: optim.name, type: choice, values: [sgd]}]"),
            "depends on optim.name, which must stand before it",
        ),
        (
            "knobs: [{key: optim.lr, type: uniform, low: 1, high: 2}, {key: optim.lr, type: uniform, low: 1, high: 2}]",
            "set by two knobs",
        ),
        ("knobs: [{key: optim.lr, type: uniform, low: 1, high: 2}]\ntry_first: [{optim.lr: 3}]", "outside the knob's range"),
        ("knobs: [{key: optim.lr, type: uniform, low: 1, high: 2}]\ntry_first: [{optim.rl: 1}]", "optim.rl is no knob"),
        ("knobs: [{key: optim.lr, type: uniform, low: 1, high: 2}]\ntry_first: [3]", "try_first"),
        ("knobs: &a [*a]", "knob no. 1"),
        ("[" * 5000, "nested too deeply"),
        ("knobs: " + "[" * 5000, "nested too deeply"),
        ("a: 1\na: 2", "given twice"),
        ("knobs: !!python/object/apply:os.system [echo owned]", "could not determine a constructor"),
        ("x: &a [1,1]\ny: &b [*a,*a,*a,*a]\nz: &c [*b,*b,*b,*b]\nknobs: [*c]", "."),
        ("# " + "x" * 300_000, "more than 256 KiB"),
    ],
)  # fmt: skip
def test_a_bad_file_is_one_message_with_its_path(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){says}") as raised:
        space_of(tmp_path, text)
    assert raised.value.message.startswith(f"space {tmp_path / 'my.yaml'}")
    assert len(raised.value.message) < 800


def test_a_space_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="unknown space 'resnet'; there are: head_only, resnet101, smoke, study; or give"
    ):
        load_space("resnet")
    with pytest.raises(ConfigError, match=r"gone\.yaml: can't be read \(No such file"):
        load_space(str(tmp_path / "gone.yaml"))
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"bytes\.yaml: can't be read \(not UTF-8"):
        load_space(str(tmp_path / "bytes.yaml"))


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    space = space_of(tmp_path, "knobs: [{key: optim.lr, type: choice, values: [1e-3, 1E-4]}]")
    assert isinstance(space.knobs[0], Choice)
    assert space.knobs[0].values == [1e-3, 1e-4]


# ---- Optuna


class Asked:
    """Stands for an Optuna trial: answers with the share that it was made with, and remembers what it was asked."""

    def __init__(self, share: float) -> None:
        self.share, self.names = share, list[str]()

    def suggest_categorical(self, name: str, choices: list[Any]) -> Any:
        self.names.append(name)
        assert all(choice is None or isinstance(choice, str | int | float | bool) for choice in choices)
        return choices[int(self.share * len(choices))]

    def suggest_float(self, name: str, low: float, high: float, *, log: bool) -> float:
        self.names.append(name)
        return low * (high / low) ** self.share if log else low + (high - low) * self.share

    def suggest_int(self, name: str, low: int, high: int) -> int:
        self.names.append(name)
        return low + int(self.share * (high - low + 1))


def test_optuna_is_asked_only_what_a_trial_needs(tmp_path: Path) -> None:
    space, first, last = load_space("head_only"), Asked(0.0), Asked(0.99)
    assert optuna_trial_values(space, first)["optim.lr"] == 3e-4
    assert optuna_trial_values(space, last)["optim.lr"] == pytest.approx(0.2865, rel=1e-3)
    assert first.names[:3] == ["model.frozen_depth", "optim.name", "optim.lr"]
    assert last.names[:3] == ["model.frozen_depth", "optim.name", "optim.lr#2"]
    deep = space_of(tmp_path, "knobs: [{key: train.unfreeze, type: choice, values: [{1: 2}, {}]}]")
    assert optuna_trial_values(deep, Asked(0.0)) == {"train.unfreeze": {1: 2}}
    bundle = optuna_trial_values(load_space("resnet101"), Asked(0.0))
    assert bundle["augment.crop_area_min"] == 1.0
    assert "augmentation" not in bundle


def test_optuna_itself_takes_the_points_and_the_knobs() -> None:
    optuna = pytest.importorskip("optuna", reason="the extra optuna is not installed")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for name in names():
        space, base = load_space(name), load_config(preset=PRESET_OF[name])
        study = optuna.create_study(
            sampler=optuna.samplers.TPESampler(seed=0, n_startup_trials=4), direction="maximize"
        )
        points = optuna_points(space, base)
        for point in points:
            study.enqueue_trial(point)
        for number in range(8):
            trial = study.ask()
            overrides = optuna_trial_values(space, trial, base)
            apply(base, overrides)
            if number < len(points):
                assert points[number] == trial.params
            study.tell(trial, float(number))
