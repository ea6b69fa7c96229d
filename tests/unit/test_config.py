from __future__ import annotations

import math
import pickle

import pytest
import yaml

from medtl_dist.config import Config, differing_keys, load_config, parse_yaml, preset_names, preset_text, validate
from medtl_dist.errors import BY_NAME, ConfigError


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "optim.learning_rate=3",
            "unknown key optim.learning_rate; optim has: backbone_lr, clip_norm, decay_norms_and_biases, layer_decay, lr, mom",
        ),
        (
            "opt.lr=1",
            "unknown key opt; the config has: augment, cluster, data, evaluate, model, optim, schedule, train",
        ),
        ("optim.lr=-1", "optim.lr = -1 (Peak learning rate of the new head.) Expected greater than 0"),
        ("optim.lr=.nan", "optim.lr = nan (Peak learning rate of the new head.) Expected a finite number"),
        ("model.frozen_depth=deep", "model.frozen_depth = 'deep'"),
        ("train.precision=fp8", "Expected 'auto', 'fp32', 'bf16' or 'fp16'"),
        ("train.epochs=true", "a number or a name, not true or false"),
        ("optim=3", "--set optim=3: expected section.key=value"),
        ("optim.lr", "--set optim.lr: expected section.key=value"),
        ("model.zero_init_residual=true", "zero_init_residual = true needs weights = random"),
    ],
)
def test_a_bad_override_is_one_line_that_teaches(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=[override])
    assert message in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.exit_code == 2


def test_precedence_is_preset_then_file_then_override(tmp_path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("optim: {lr: 0.5}\ntrain: {epochs: 7}\n")
    config = load_config(preset="classic", file=file, overrides=["train.epochs=9", "optim.momentum=1e-1"])
    assert (config.optim.name, config.optim.lr, config.train.epochs, config.optim.momentum) == ("sgd", 0.5, 9, 0.1)


def test_a_path_is_taken_as_it_is() -> None:
    for path in ("/data/exp #1/set", "/data/exp: 1/set", "007", "null"):
        assert load_config(overrides=[f"data.shards={path}"]).data.shards == path


def test_a_resolved_config_repeats_itself() -> None:
    config = load_config(
        preset="resnet101_head", overrides=["data.shards=x", "model.frozen_depth=3", "train.unfreeze={2: 1}"]
    )
    assert validate(parse_yaml(config.to_yaml(), "test")) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {lr: 1}\noptim: {lr: 2}", "key 'optim' is given twice"),
        ("a: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("- 1", "expected sections"),
        ("optim: [", "line 1"),
    ],
)
def test_a_file_that_is_not_a_plain_mapping_is_refused(tmp_path, text: str, message: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml") as caught:
        load_config(file=file)
    assert message in caught.value.message


def test_a_missing_file_and_an_unknown_preset_are_named(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: can't be read"):
        load_config(file=tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="there are: classic, classic_text, demo, resnet101, resnet101_head, smoke"):
        load_config(preset="resnet")


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_valid_and_says_what_was_measured(name: str) -> None:
    header = [line for line in preset_text(name).splitlines() if line.startswith("#")]
    assert header[0].startswith(f"# {name}: ")
    assert any(f"--preset {name}" in line for line in header)
    assert any(line.startswith("# Measured: ") for line in header)
    load_config(preset=name)


def test_the_classic_presets_say_what_is_odd_and_it_is_so() -> None:
    for name, final in (("classic", 1e-7), ("classic_text", 1e-6)):
        config = load_config(preset=name)
        assert math.isclose(config.optim.lr * config.schedule.gamma ** (40 // config.schedule.step_epochs), final)
        text = preset_text(name)
        assert "from epoch 40 on" in text
        assert f"{final:.0e}".replace("e-0", "e-") in text
        assert "0.5" in text
        assert config.data.normalisation == "half"


def test_the_hash_ignores_where_a_run_happens_and_nothing_else() -> None:
    base = load_config(preset="smoke")
    moved = load_config(
        preset="smoke",
        overrides=[
            "train.collective_timeout_s=9",
            "cluster.num_workers=3",
            "tune.num_trials=3",
            "data.shards=elsewhere",
            "data.loader_workers=4",
            "data.endpoint_url=http://elsewhere:9000",
            "data.ca_bundle=ca.pem",
            "data.kms_key=alias/ours",
            "data.anonymous=true",
            "data.storage_timeout_s=3",
            "data.storage_retries=1",
            "data.cache_dir=cache",
            "data.cache_mib=5",
        ],
    )
    places = {"shards", "loader_workers", "endpoint_url", "ca_bundle", "kms_key", "anonymous"}
    places |= {"storage_timeout_s", "storage_retries", "cache_dir", "cache_mib"}
    assert moved.sha256() == base.sha256()
    assert differing_keys(base, moved) == []
    flat = {
        f"{section}.{key}"
        for section, keys in Config().model_dump().items()
        for key in keys
        if section not in ("tune", "cluster")
        and f"{section}.{key}"
        not in {"train.collective_timeout_s", "train.mlflow_uri", *(f"data.{place}" for place in places)}
    }
    other_values = {
        "optim.name": "adamw",
        "schedule.name": "step",
        "model.backbone": "resnet34",
        "model.weights": "f.pth",
    }
    other_values |= {"train.precision": "bf16", "train.class_weights": "balanced", "evaluate.unit": "patient"}
    other_values |= {
        "data.sampling": "class",
        "data.sampling_weights": {"PNEUMONIA": 2.0},
        "train.ema_decay": 0.9,
        "evaluate.views": "mirror",
        "train.unfreeze": {1: 0},
        "train.loss": "focal",
        "augment.stain_model": "color",
        "evaluate.sensitivity": 0.9,
        "evaluate.aggregate": "max",
        "data.normalisation": "half",
        "data.eval_view": "squash",
        "transfer.seeds": [3],
        "model.join": "serial",
        "model.second_backbone": "resnet34",
        "model.second_weights": "random",
        "transfer.stages": [{"name": "a"}, {"name": "b", "model": {"weights": "imagenet"}}],
    }
    for dotted in sorted(flat):
        section, key = dotted.split(".")
        value = base.model_dump()[section][key]
        new = other_values.get(
            dotted, (not value) if isinstance(value, bool) else 0.5 if isinstance(value, float) else 4
        )
        if dotted == "augment.name":  # changes the other keys of its section: see test_augment.py
            continue
        if dotted == "model.zero_init_residual":
            assert base.model.weights == "random"
        chain = "transfer.stages=[{name: a}, {name: b, model: {weights: imagenet}}]"
        needed = {
            "data.sampling_weights": ["data.sampling=class"],
            "transfer.compare": [chain],
            "model.join": ["model.join=concat", "model.second_backbone=resnet18"],
            "model.second_backbone": ["model.join=concat", "model.second_backbone=resnet18"],
            "transfer.seeds": [chain, "transfer.compare=true"],
        }.get(dotted, [])
        before = load_config(preset="smoke", overrides=needed)
        given = f"{dotted}={yaml.safe_dump(new, default_flow_style=True).splitlines()[0]}"
        changed = load_config(preset="smoke", overrides=[*needed, given])
        assert changed.sha256() != before.sha256(), dotted
        assert [line.split(":")[0] for line in differing_keys(before, changed)] == [dotted]


@pytest.mark.parametrize("cls", BY_NAME.values())
def test_errors_survive_pickling(cls) -> None:
    again = pickle.loads(pickle.dumps(cls("what, why, what next")))  # noqa: S301 - our own bytes
    assert (type(again), again.message, again.exit_code) == (cls, "what, why, what next", cls.exit_code)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.sampling=class", "train.class_weights=balanced"], r"^data\.sampling = class and .* choose one$"),
        (["data.sampling_weights={a: 2}"], "sampling_weights needs sampling = class or domain"),
        (["data.sampling=class", "data.sampling_weights={a: 200}"], r"sampling_weights.*less than or equal to 100"),
    ],
)
def test_sampling_that_makes_no_sense_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(overrides=overrides)
