"""transfer.stages: each stage is the whole config with its own keys in it, and a mistake in one is told by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from medtl_dist.cli.main import run
from medtl_dist.config import Config, differing_keys, parse_yaml, stages_of, validate
from medtl_dist.errors import ConfigError

_BASE: dict[str, Any] = {
    "data": {"shards": "both", "sampling": "class", "sampling_weights": {"A": 2}},
    "augment": {"name": "none"},
    "model": {"backbone": "resnet18", "weights": "random", "zero_init_residual": True},
    "optim": {"lr": 0.5},
}


def _config(*stages: dict[str, Any]) -> Config:
    return validate(_BASE | {"transfer": {"stages": list(stages)}})


def test_a_stage_is_the_whole_config_with_its_own_keys() -> None:
    source, target = stages_of(
        _config(
            {"name": "source", "optim": {"lr": 0.1}},
            {
                "name": "target",
                "data": {"shards": "small", "sampling_weights": {"B": 3}},
                "augment": {"name": "histology", "rotation_deg": 9},
                "train": {"epochs": 2},
            },
        )
    )
    assert (source.name, source.config.data.shards, source.config.optim.lr) == ("source", "both", 0.1)
    assert (source.config.model.weights, source.config.model.zero_init_residual) == ("random", True)
    assert source.config.augment.crop_area_min == 1
    assert (target.config.data.shards, target.config.optim.lr, target.config.train.epochs) == ("small", 0.5, 2)
    assert target.config.data.sampling_weights == {"B": 3}  # its own, not joined with the whole's
    assert (target.config.augment.stain_jitter, target.config.augment.rotation_deg) == (0.15, 9)
    assert (target.config.model.weights, target.config.model.zero_init_residual) == ("stage:source", False)
    assert target.config.transfer.stages == []


def test_a_chain_repeats_itself_from_its_yaml() -> None:
    config = _config({"name": "a"}, {"name": "b", "model": {"weights": "imagenet", "zero_init_residual": False}})
    assert validate(parse_yaml(config.to_yaml(), "test")) == config


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (({"name": "a"},), "transfer.stages: one stage is no chain"),
        (({"name": "a"}, {"name": "a"}), "stage 2: name = 'a': expected a name of its own"),
        (({"name": "a"}, {"optim": {"lr": 1}}), "stage 2: name = None"),
        (({"name": "../a"}, {"name": "b"}), "stage 1: name = '../a'"),
        (({"name": "a"}, {"name": "b", "cluster": {}}), "stage 2 (b): unknown key cluster; a stage has: name, data, augment"),
        (({"name": "a"}, {"name": "b", "optim": 3}), "stage 2 (b): optim = 3: expected keys below it"),
        (({"name": "a"}, {"name": "b", "optim": {"rate": 3}}), "stage 2 (b): unknown key optim.rate; optim has: backbone_lr"),
        (({"name": "a"}, {"name": "b", "optim": {"lr": -3}}), "stage 2 (b): optim.lr = -3"),
        (({"name": "a", "model": {"weights": "stage:b", "zero_init_residual": False}}, {"name": "b"}), "there is no such stage"),
        (
            ({"name": "a"}, {"name": "b", "model": {"backbone": "vgg11"}}),
            "stage 2 (b): model.backbone = vgg11 can't start from stage a, which is a resnet18",
        ),
        ((3, {"name": "b"}), "transfer.stages"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_stage_is_one_line_that_teaches(stages: tuple[dict[str, Any], ...], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _config(*stages)
    assert message in caught.value.message
    assert "\n" not in caught.value.message


def test_another_network_needs_weights_of_its_own_and_a_later_stage_may_go_back() -> None:
    stages = stages_of(
        _config(
            {"name": "a"},
            {"name": "b", "model": {"backbone": "vgg11", "weights": "imagenet", "zero_init_residual": False}},
            {"name": "c", "model": {"weights": "stage:a", "zero_init_residual": False}},
        )
    )
    assert [stage.config.model.weights for stage in stages] == ["random", "imagenet", "stage:a"]


def test_the_identity_of_a_chain_is_what_decides_its_numbers() -> None:
    base = _config({"name": "a"}, {"name": "b", "data": {"shards": "here"}, "optim": {"lr": 1}})
    moved = _config({"name": "a"}, {"name": "b", "data": {"shards": "there", "cache_dir": "x"}, "optim": {"lr": 1}})
    other = _config({"name": "a"}, {"name": "b", "data": {"shards": "here"}, "optim": {"lr": 2}})
    assert moved.sha256() == base.sha256()
    assert differing_keys(base, moved) == []
    assert other.sha256() != base.sha256()
    assert len(differing_keys(base, other)) == 1


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ["crossval", "--run-dir"],
            "transfer.stages: a chain can't be cross-validated yet; give the config of one training.",
        ),
        (
            ["tune", "--space", "smoke", "--sweep-dir"],
            "a sweep runs single trainings, and transfer.stages is a chain of them",
        ),
        (
            ["doctor", "--store"],
            "transfer.stages: doctor looks at one set and trains one step: give it a stage's config.",
        ),
    ],
)
def test_what_is_made_of_single_trainings_refuses_a_chain_before_it_begins(
    command: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chain = ["--set", "data.shards=nowhere", "--set", "transfer.stages=[{name: a}, {name: b}]"]
    assert run([*command, str(tmp_path / "new"), *chain]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
