"""A chain's manifests: every stage's paths placed, pods for the largest of them, and the command that a user would submit."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from k8s_policy import faults
from k8s_targets import CHAIN, CHAINED, COMPARED, CONFIG, LOADER, TARGETS, chained, changed_keys, of_kind, rendered

from cluster.job_plan import planned
from cluster.manifests import config_for, render, to_yaml
from cluster.sizing import HEAD, gpu_shape
from cluster.trainings import training_shape, trainings_of, with_driver
from medtl_dist.cli.main import run
from medtl_dist.config import Config, load_config, stages_of, validate
from medtl_dist.errors import UserError

AMOUNTS: dict[str, Any] = {"gpus": 8, "gpus_per_worker": 4, "min_gpus": None}


def job_of(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    return of_kind(manifests, "RayJob")["spec"]


def config_of(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    return yaml.safe_load(of_kind(manifests, "ConfigMap")["data"]["config.yaml"])


def pair(first: str, second: str = "", *overrides: str) -> Config:
    """A chain of two stages with these keys."""
    return chained(f"[{{name: a, {first}}}, {{name: b, {second}}}]", *overrides)


@pytest.mark.parametrize("test", [False, True])
@pytest.mark.parametrize("name", ["chain", "compare"])
def test_the_entrypoint_is_the_submitted_chains(name: str, test: bool) -> None:
    target, config = TARGETS[name], {"chain": CHAIN, "compare": COMPARED}[name]
    assert target.store is not None
    submission = planned("train", config, name=target.name, store=target.store.root, test=test)
    mine = shlex.split(job_of(render(config, target, open_test=test))["entrypoint"])
    assert mine[0] == "medtl"
    assert [word.removeprefix("/etc/medtl/") for word in mine[1:]] == submission.command[4:]


def test_the_config_is_the_laptops_but_for_places_and_sizes() -> None:
    shipped, store = config_of(rendered("chain")), "s3://bucket/team/medtl"
    assert changed_keys(shipped, CHAIN.model_dump(mode="json")) == {
        "data.shards": f"{store}/sets/xrays", "data.loader_workers": 2, "train.threads": 1, "cluster.num_workers": 8,
        "cluster.use_gpu": True, "cluster.cpus_per_worker": 3.0, "cluster.address": "auto",
        "transfer.stages": [
            {
                "name": "source", "model": {"weights": f"{store}/w/a.pth"},
                "data": {"shards": f"{store}/sets/source", "global_batch_size": 512, "image_size_px": 1024},
            },
            # What was null, the machine's own, is a rank's.
            {"name": "shared", "data": {"shards": "s3://other/shared", "loader_workers": 4}, "train": {"threads": 1}},
            {"name": "target", "data": {"loader_workers": 2}, "train": {"threads": 2, "epochs": 3}},
        ],
    }  # fmt: skip
    effective = [one.config for one in stages_of(validate(shipped))]
    assert [config.data.shards for config in effective] == [
        f"{store}/sets/source", "s3://other/shared", f"{store}/sets/xrays",
    ]  # fmt: skip
    assert [config.model.weights for config in effective] == [f"{store}/w/a.pth", "stage:source", "stage:shared"]
    assert [(config.train.threads, config.data.loader_workers) for config in effective] == [(1, 2), (1, 4), (2, 2)]
    once = config_for(CHAIN, TARGETS["chain"])
    assert config_for(once, TARGETS["chain"]) == once


def test_stages_may_each_name_a_set_and_the_whole_none() -> None:
    stages = "[{name: a, data: {shards: sets/a}}, {name: b, data: {shards: /mnt/store/b}}]"
    config = load_config(overrides=[f"transfer.stages={stages}"])
    placed = config_for(config, TARGETS["compare"])
    assert placed.data.shards is None
    assert [one.config.data.shards for one in stages_of(placed)] == ["/mnt/store/sets/a", "/mnt/store/b"]


STAGE = st.fixed_dictionaries(
    {"global_batch_size": st.sampled_from([8, 64, 4096]), "image_size_px": st.sampled_from([None, 64, 224, 1024])}
)


@settings(max_examples=30, deadline=None)
@given(st.lists(STAGE, min_size=2, max_size=4))
def test_every_stage_fits_into_the_pods(sizes: list[dict[str, Any]]) -> None:
    stages = [{"name": f"s{number}", "data": keys} for number, keys in enumerate(sizes)]
    config = validate({"data": {"shards": "x"}, "transfer": {"stages": stages}})
    shape = training_shape(config, **AMOUNTS)
    each = [gpu_shape(**AMOUNTS, **keys).worker for keys in sizes]
    assert shape.worker.memory_gib == max(one.memory_gib for one in each)
    assert {(one.cpus, one.gpus) for one in each} == {(shape.worker.cpus, shape.worker.gpus)}


def test_the_largest_stage_decides_wherever_it_stands() -> None:
    # 4 × 64 × 3 × 1024² B = 0.75 GiB beside 6.5, which the last stage alone would not need.
    assert (CHAINED.rank.memory_gib, CHAINED.worker.gpus, CHAINED.ranks) == (8, 4, 8)
    assert training_shape(CONFIG, **AMOUNTS).rank.memory_gib == 7
    large = "data: {global_batch_size: 512, image_size_px: 1024}"
    assert training_shape(pair(large), **AMOUNTS) == training_shape(pair("train: {epochs: 1}", large), **AMOUNTS)


def test_the_driver_of_a_comparison_has_room_to_score_the_source() -> None:
    head = job_of(rendered("compare"))["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    # 32 images of 1024² px at 1 KiB beside the driver's 8 GiB; the CPUs of a rank.
    assert head["resources"]["limits"] == {"cpu": "3", "memory": "40Gi"}
    head = job_of(rendered("chain"))["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert head["resources"]["limits"] == {"cpu": "2", "memory": "8Gi"}
    assert with_driver(CHAINED, CHAIN).head == HEAD


def test_a_comparison_trains_its_stages_and_the_last_alone_with_each_seed() -> None:
    assert [(one.name, one.times, one.config.train.epochs) for one in trainings_of(COMPARED)] == [
        ("source", 2, 20), ("shared", 2, 20), ("target", 2, 3), ("target alone", 2, 3),
    ]  # fmt: skip
    assert [(one.name, one.times) for one in trainings_of(CHAIN)] == [("source", 1), ("shared", 1), ("target", 1)]
    assert [(one.name, one.times, one.config) for one in trainings_of(CONFIG)] == [("", 1, CONFIG)]
    assert [one.times for one in trainings_of(pair("", "", "transfer.compare=true"))] == [1, 1, 1]


@pytest.mark.parametrize(
    ("target", "config", "message"),
    [
        ("chain", lambda: pair("data: {shards: /home/me/x}"), "stage a: data.shards = '/home/me/x': pods can't see this"),
        ("chain", lambda: pair("", "data: {shards: ../x}"), "stage b: data.shards = '../x': pods can't see this machine's"),
        ("chain", lambda: pair("", "data: {shards: null}"), "stage b: data.shards is not set"),
        ("chain", lambda: load_config(overrides=["transfer.stages=[{name: a}, {name: b}]"]), "stage a: data.shards is not set"),
        ("chain", lambda: pair("model: {weights: ~/a.pth}"), "stage a: model.weights = '~/a.pth': pods can't see this"),
        ("chain", lambda: pair("", "model: {second_weights: /b.pt}"), "stage b: model.second_weights = '/b.pt': pods"),
        ("chain", lambda: pair("", "data: {global_batch_size: 4}"), "stage b: 8 workers are more than the 4 lanes"),
        ("chain", lambda: pair("data: {shards: 's3://key:secret@b/x'}"), "transfer.stages.data.shards holds a URL with a login"),
        ("chain", lambda: pair('data: {shards: "a\\u2028b"}'), "transfer.stages.data.shards = 'a\\u2028b': expected printable"),
        ("chain", lambda: pair("", "data: {endpoint_url: 'http://e:9'}"), "stage b: data.endpoint_url = http://e:9, and the run"),
        ("doctor", lambda: CHAIN, "--kind doctor with transfer.stages: a doctor looks at the set of single trainings"),
        ("sweep", lambda: CHAIN, "--kind tune with transfer.stages: a sweep runs single trainings"),
    ],
)  # fmt: skip
def test_a_chain_that_pods_could_not_run_is_refused(target: str, config: Callable[[], Config], message: str) -> None:
    with pytest.raises(UserError) as caught:
        render(config(), TARGETS[target])
    assert message in caught.value.message
    assert "key:secret" not in caught.value.message


def test_on_a_volume_stages_may_have_endpoints_of_their_own_and_the_network_is_open_to_them() -> None:
    config = pair(
        "data: {shards: 's3://b/x', endpoint_url: 'http://store.svc:8333'}", "model: {weights: 'http://w.svc/a.pth'}"
    )
    manifests = render(config, TARGETS["compare"])
    egress = of_kind(manifests, "NetworkPolicy")["spec"]["egress"]
    assert [port["port"] for port in egress[2]["ports"]] == [80, 443, 6443, 8333]
    assert faults(manifests) == []


PATHS = st.text(min_size=1, max_size=30) | st.sampled_from(
    ["$(id)", "`id`", "a: b", "#x", "1e3", "null", "~", "é 漢 #: x", "{{x}}", "w/a.pth", "-", "'", '"', "a\nb", "\x85"]
)


@settings(max_examples=20, deadline=None)
@given(shards=PATHS, weights=PATHS, whole=st.booleans())
@example(shards="1e3", weights="no.pth", whole=False)
@example(shards="é 漢 #: x", weights="a'\": b.pth", whole=True)
@example(shards="$(id)", weights="imagenet", whole=True)
def test_what_a_stage_says_is_refused_or_comes_through_unchanged(shards: str, weights: str, whole: bool) -> None:
    stages = [{"name": "a", "data": {"shards": shards}, "model": {"weights": weights}}]
    stages.append({"name": "b", "data": {"shards": shards}})
    try:
        config = validate({"data": {"shards": "x" if whole else None}, "transfer": {"stages": stages}})
        manifests = render(config, TARGETS["chain"])
    except UserError:  # a folder of this machine, a login, a line break
        return
    assert shards.isprintable()
    assert weights.isprintable()
    (config_map,) = [m for m in yaml.load_all(to_yaml(manifests), Loader=LOADER) if m["kind"] == "ConfigMap"]
    there = validate(yaml.safe_load(config_map["data"]["config.yaml"]))
    assert there == config_for(config, TARGETS["chain"])
    first, second = stages_of(there)
    store = "s3://bucket/team/medtl"
    assert first.config.data.shards == second.config.data.shards
    assert first.config.data.shards in (shards, f"{store}/{PurePosixPath(shards)}")
    assert first.config.model.weights in (weights, f"{store}/{PurePosixPath(weights)}")
    assert shlex.split(job_of(manifests)["entrypoint"])[-2:] == [f"{store}/runs/chain-1", "--resume"]
    assert faults(manifests) == []


def _set_stage(manifests: list[dict[str, Any]], number: int, section: str, **keys: Any) -> None:
    tree = config_of(manifests)
    stage = tree["transfer"]["stages"][number]
    stage[section] = stage.get(section, {}) | keys
    of_kind(manifests, "ConfigMap")["data"]["config.yaml"] = yaml.safe_dump(tree)


SEEDED: dict[str, tuple[Callable[[list[dict[str, Any]]], Any], str]] = {
    "a laptop's set": (lambda m: _set_stage(m, 1, "data", shards="sets/shared"), "pods can't see data.shards"),
    "no set": (lambda m: _set_stage(m, 2, "data", shards=None), "pods can't see data.shards"),
    "a laptop's weights": (lambda m: _set_stage(m, 0, "model", weights="w/a.pth"), "pods can't see model.weights"),
    "the node's threads": (lambda m: _set_stage(m, 1, "train", threads=None), "threads would follow the node's CPUs"),
    "the node's loaders": (lambda m: _set_stage(m, 2, "data", loader_workers=None), "threads would follow the node's"),
    "a login": (lambda m: _set_stage(m, 2, "data", shards="s3://key:secret@b/x"), "looks like a credential"),
    "no resume": (
        lambda m: job_of(m).update(entrypoint=job_of(m)["entrypoint"].replace(" --resume", "")),
        "does not resume by run name",
    ),
}


@pytest.mark.parametrize("what", SEEDED)
def test_a_seeded_error_of_each_kind_is_caught(what: str) -> None:
    break_it, message = SEEDED[what]
    manifests = rendered("chain")
    break_it(manifests)
    assert any(message in fault for fault in faults(manifests)), faults(manifests)


def test_a_chain_is_rendered_as_a_user_types_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "chain.yaml"
    file.write_text(COMPARED.to_yaml())
    command = ["k8s", "render", "--config", str(file), "--name", "chain-1", "--gpus", "8", "--gpus-per-worker", "4"]
    target = TARGETS["compare"]
    where = ["--image", target.image, "--store", "/mnt/store", "--claim", "claim-1", "--credentials-secret", "s3-login"]
    assert run([*command, *where]) == 0
    out, err = capsys.readouterr()
    assert out == to_yaml(render(COMPARED, target))
    assert "2 worker pods of 12 CPUs, 34 GiB, 4 GPUs" in err
    assert run([*command, *where, "--kind", "doctor"]) == 2
    assert "--kind doctor with transfer.stages" in capsys.readouterr().err
    assert run([*command, *where, "--kind", "tune", "--space", "resnet101"]) == 2
    assert "transfer.stages: a sweep runs single trainings" in capsys.readouterr().err
