"""A sweep's manifests: whole trials on the pods, a bounded cache, the space beside the config, and a command that runs."""

from __future__ import annotations

import dataclasses
import json
import shlex
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from k8s_policy import faults
from k8s_targets import (
    CONFIG,
    CPU,
    GPU,
    HALVED,
    LOADER,
    NAMED,
    SINGLE,
    SWEPT,
    TARGETS,
    changed_keys,
    of_kind,
    rendered,
)

from cluster.job_plan import planned
from cluster.manifests import config_for, render, to_yaml
from cluster.node_cache import NodeFolder, cache_place
from cluster.sizing import Shape
from cluster.sweep_pods import describe_trials, read_space, trial_shape, trials_at_once
from cluster.trial_workers import num_slots
from cluster.trials import reserved_for
from medtl_dist.config import Config, load_config
from medtl_dist.errors import UserError
from tune_spaces.space import load_space


def job_of(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    return of_kind(manifests, "RayJob")["spec"]


def group_of(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    return job_of(manifests)["rayClusterSpec"]["workerGroupSpecs"][0]


def config_of(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    return yaml.safe_load(of_kind(manifests, "ConfigMap")["data"]["config.yaml"])


@pytest.mark.parametrize("name", ["sweep", "sweep-file"])
def test_the_entrypoint_is_the_submitted_sweeps(name: str) -> None:
    target = TARGETS[name]
    assert target.space is not None
    assert target.store is not None
    submission = planned(
        "tune", CONFIG, name=target.name, store=target.store.root, space=target.space.word, space_text=target.space.text
    )
    mine = shlex.split(job_of(rendered(name))["entrypoint"])
    assert mine[0] == "medtl"
    assert [word.removeprefix("/etc/medtl/") for word in mine[1:]] == submission.command[4:]
    files = of_kind(rendered(name), "ConfigMap")["data"]
    assert {key: text for key, text in files.items() if key != "config.yaml"} == {
        key: text for key, text in submission.files.items() if key != "config.yaml"
    }


def test_the_config_is_the_laptops_but_for_places_and_sizes() -> None:
    target = TARGETS["sweep-file"]
    placed, laptop = config_for(SWEPT, target).model_dump(mode="json"), SWEPT.model_dump(mode="json")
    assert changed_keys(placed, laptop) == {
        "data.shards": "/mnt/store/sets/xrays", "data.loader_workers": 2, "train.threads": 1, "cluster.use_gpu": True,
        "cluster.cpus_per_worker": 3.0, "cluster.address": "auto", "tune.space": "/etc/medtl/space.yaml",
        "tune.prefix_cache_dir": "/cache", "tune.prefix_cache_mib": 20480,
    }  # fmt: skip
    assert placed["cluster"]["num_workers"] == 4  # of a trial, not of the eight GPUs
    once = config_for(SWEPT, target)
    assert config_for(once, target) == once


@settings(max_examples=30, deadline=None)
@given(
    workers=st.integers(0, 5),
    share=st.sampled_from([None, True, 0.5, 0.34, 0.25, 0.7]),
    pods=st.integers(1, 6),
    each=st.integers(1, 4),
)
def test_the_pods_hold_as_many_trials_as_is_said(workers: int, share: Any, pods: int, each: int) -> None:
    """Counted by what deals trials out in the cluster, from the nodes that the pods become."""
    cluster = CONFIG.cluster.model_copy(update={"num_workers": workers, "use_gpu": share})
    config = CONFIG.model_copy(update={"cluster": cluster})
    try:
        shape = trial_shape(config, NAMED.space, gpus=pods * each, gpus_per_worker=each, min_gpus=None)
        said = trials_at_once(config, shape)
    except UserError:
        assert pods * each < workers or (workers > 1 and isinstance(share, float))
        return
    placed = config_for(config, dataclasses.replace(TARGETS["sweep"], shape=shape))
    nodes = [{"CPU": float(shape.worker.cpus), "GPU": float(shape.worker.gpus)}] * shape.pods
    assert shape.worker.gpus == each
    assert num_slots(nodes, reserved_for(placed, num_gpus=pods * each), max(workers, 1)) == said >= 1
    # No CPU beside them, that nobody would use.
    assert shape.worker.cpus == shape.ranks_per_pod * placed.cluster.cpus_per_worker


def test_pods_are_sized_for_the_largest_that_the_space_draws(tmp_path: Path) -> None:
    file = tmp_path / "large.yaml"
    file.write_text(
        "knobs:\n  - {key: data.global_batch_size, type: choice, values: [64, 512, 128]}\n"
        "  - {key: data.image_size_px, type: choice, values: [224, 1024]}\n"
    )
    space = read_space(str(file), CONFIG).space
    single = trial_shape(CONFIG, space, gpus=4, gpus_per_worker=1, min_gpus=None)
    assert single.rank.memory_gib == 13  # 4 × 512 × 3 × 1024² B = 6 GiB beside 6.5; of a trial, not dealt to four
    assert SINGLE.rank.memory_gib == 7
    assert trial_shape(SWEPT, space, gpus=4, gpus_per_worker=1, min_gpus=None).rank.memory_gib == 8  # dealt to its four
    halved = trial_shape(HALVED, space, gpus=4, gpus_per_worker=1, min_gpus=None)
    assert (halved.rank.loaders, halved.worker.cpus, halved.worker.gpus) == (1, 4, 1)


@pytest.mark.parametrize(
    ("config", "shape", "line"),
    [
        (CONFIG, SINGLE, "4 of 12 trials at once"),
        (SWEPT, GPU, "2 of 12 trials at once"),
        (load_config(overrides=["cluster.num_workers=3"]), GPU, "2 of 12 trials at once; 2 GPUs stay unused"),
        (load_config(overrides=["tune.num_trials=3"]), GPU, "3 of 3 trials at once"),
    ],
)
def test_a_line_says_how_many_run_at_once(config: Config, shape: Shape, line: str) -> None:
    assert describe_trials(config, shape) == line


def test_a_trials_batch_is_dealt_to_its_own_workers_not_to_all_gpus() -> None:
    small = load_config(overrides=["data.shards=a", "data.global_batch_size=4", "cluster.num_workers=4"])
    assert config_for(small, dataclasses.replace(TARGETS["sweep"], shape=GPU)).cluster.num_workers == 4
    with pytest.raises(UserError, match="5 workers are more than the 4 lanes"):
        config_for(
            small.model_copy(update={"cluster": small.cluster.model_copy(update={"num_workers": 5})}),
            dataclasses.replace(TARGETS["sweep"], shape=GPU),
        )


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (dataclasses.replace(SINGLE, pods=3, min_pods=3), "--gpus 3: no room for one trial, which has 4 workers"),
        (
            CPU,
            "--cpu-workers 2: no room for one trial, which has 4 workers (cluster.num_workers); give --cpu-workers 4",
        ),
    ],
)
def test_too_few_pods_for_one_trial_are_refused(shape: Shape, message: str) -> None:
    with pytest.raises(UserError) as caught:
        render(SWEPT, dataclasses.replace(TARGETS["sweep"], shape=shape))
    assert message in caught.value.message


def cache_of(*overrides: str) -> tuple[str, Config]:
    config = load_config(preset="resnet101", overrides=["data.shards=sets/x", *overrides])
    manifests = render(config, TARGETS["sweep"])
    assert faults(manifests) == []
    (cache,) = [v for v in group_of(manifests)["template"]["spec"]["volumes"] if v["name"] == "cache"]
    (heads,) = [
        v
        for v in job_of(manifests)["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["volumes"]
        if v["name"] == "cache"
    ]
    assert heads["emptyDir"]["sizeLimit"] == "20Gi"  # no trial runs there
    return cache["emptyDir"]["sizeLimit"], config_for(config, TARGETS["sweep"])


def test_the_prefix_cache_lies_in_the_cache_volume_which_has_room_for_it() -> None:
    assert cache_of()[0] == "40Gi"
    assert cache_of("tune.prefix_cache=off")[0] == "20Gi"
    size, config = cache_of("tune.prefix_cache_mib=102401", "tune.prefix_cache_dir=/scratch/mine")
    assert (size, config.tune.prefix_cache_mib) == ("121Gi", 102401)  # 100 GiB and a bit
    place = cache_place("s3://bucket/team/medtl/runs/sweep-1", config.tune.prefix_cache_dir, own_cluster=False)
    assert isinstance(place, NodeFolder)
    assert place.path.is_relative_to("/cache")
    mounts = group_of(rendered("sweep"))["template"]["spec"]["containers"][0]["volumeMounts"]
    assert {"name": "cache", "mountPath": "/cache"} in mounts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("knobs: [{key: optim.lr, type: uniform, low: 1, high: 0}]", "optim.lr"),
        ("knobs: [{key: optim.rate, type: uniform, low: 0.1, high: 1}]", "unknown key optim.rate"),
        ("knobs: [{key: data.shards, type: choice, values: [a, b]}]", "AUCs of different images can't be ranked"),
        (
            "# s3://key:secret@bucket/x\nknobs: [{key: optim.lr, type: uniform, low: 0.1, high: 1}]",
            "no place for secrets",
        ),
        (
            "# https://host/x?X-Amz-Signature=1\nknobs: [{key: optim.lr, type: uniform, low: 0.1, high: 1}]",
            "no place for",
        ),
        (
            "knobs: [{key: model.weights, type: choice, values: [imagenet, /home/me/a.pth]}]",
            "pods can't see this machine's",
        ),
        (
            "knobs: [{key: model.weights, type: choice, values: [w/a.pth]}]",
            "give the address, s3://bucket/team/medtl/w/a.pth",
        ),
    ],
)
def test_a_space_that_pods_could_not_draw_from_is_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "space.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        render(CONFIG, dataclasses.replace(TARGETS["sweep"], space=read_space(str(file), CONFIG)))
    assert message in caught.value.message


def test_what_is_no_sweep_is_refused() -> None:
    chain = load_config(overrides=["data.shards=sets/a", "transfer.stages=[{name: a}, {name: b}]"])
    with pytest.raises(UserError, match=r"transfer\.stages: a sweep runs single trainings"):
        read_space("resnet101", chain)
    with pytest.raises(UserError, match="unknown space 'resnet'"):
        read_space("resnet", CONFIG)
    with pytest.raises(UserError, match="--kind train: a sweep has a --space"):
        dataclasses.replace(TARGETS["sweep"], kind="train")
    with pytest.raises(UserError, match="--kind tune: a sweep has a --space"):
        dataclasses.replace(TARGETS["gpu"], kind="tune")
    with pytest.raises(UserError, match="--test with --kind tune"):
        render(CONFIG, TARGETS["sweep"], open_test=True)
    with pytest.raises(UserError, match="the ranks of one training can't share a GPU"):
        trial_shape(
            load_config(overrides=["cluster.num_workers=2", "cluster.use_gpu=0.5"]),
            NAMED.space, gpus=4, gpus_per_worker=1, min_gpus=None,
        )  # fmt: skip


def test_the_network_is_open_to_the_addresses_of_the_space(tmp_path: Path) -> None:
    file = tmp_path / "space.yaml"
    file.write_text("knobs: [{key: model.weights, type: choice, values: [imagenet, 'http://store.svc:8333/a.pth']}]")
    manifests = render(CONFIG, dataclasses.replace(TARGETS["sweep"], space=read_space(str(file), CONFIG)))
    egress = of_kind(manifests, "NetworkPolicy")["spec"]["egress"]
    assert [port["port"] for port in egress[2]["ports"]] == [443, 6443, 8333]
    assert faults(manifests) == []


SPACE = "knobs: [{key: optim.lr, type: log_uniform, low: 1.0e-4, high: 1.0e-2}]\n"


@settings(max_examples=20, deadline=None)
@given(
    about=st.text(max_size=30),
    comment=st.text(max_size=30),
    name=st.sampled_from(["s.yaml", "$(id).yaml", "a b'.yml", "1e3.yaml"]),
)
@example(about="{{x}}", comment="a\x85b\u2028---", name="--set.yaml")
@example(about="é 漢", comment=" no: 1e3\t0o17 # `id` $(HOME)", name="-.yaml")
def test_any_space_comes_through_yaml_and_shells_unchanged(about: str, comment: str, name: str) -> None:
    text = SPACE + json.dumps({"about": about})[1:-1] + f"\n# {' '.join(comment.split())}\n"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, name)
        file.write_text(text, encoding="utf-8", errors="replace")
        try:
            shipped_space = read_space(str(file), CONFIG)
        except UserError:  # a character that YAML has no place for, a URL with a login
            return
        manifests = render(CONFIG, dataclasses.replace(TARGETS["sweep"], space=shipped_space))
        (config_map,) = [m for m in yaml.load_all(to_yaml(manifests), Loader=LOADER) if m["kind"] == "ConfigMap"]
        assert config_map["data"]["space.yaml"] == file.read_text(encoding="utf-8")
        Path(folder, "there.yaml").write_text(config_map["data"]["space.yaml"], encoding="utf-8")
        assert load_space(f"{folder}/there.yaml").to_yaml() == shipped_space.space.to_yaml()
    assert job_of(manifests)["entrypoint"].split(" ")[-1] == "/etc/medtl/space.yaml"
    assert name not in job_of(manifests)["entrypoint"].split(" ")
    assert faults(manifests) == []


def _set_config(manifests: list[dict[str, Any]], section: str, **keys: Any) -> None:
    tree = config_of(manifests)
    tree[section] |= keys
    of_kind(manifests, "ConfigMap")["data"]["config.yaml"] = yaml.safe_dump(tree)


Break = Callable[[list[dict[str, Any]]], Any]
SEEDED: dict[str, tuple[str, Break, str]] = {
    "ranks of all": ("sweep", lambda m: _set_config(m, "cluster", num_workers=8), "no room for one trial"),
    "odd CPUs": ("sweep", lambda m: _set_config(m, "cluster", cpus_per_worker=2), "don't fill the workers' CPUs"),
    "half CPUs": ("sweep", lambda m: _set_config(m, "cluster", cpus_per_worker=1), "are not the workers' GPUs"),
    "idle GPUs": ("sweep", lambda m: _set_config(m, "cluster", use_gpu=False), "are not the workers' GPUs"),
    "whole GPUs": ("sweep-shared", lambda m: _set_config(m, "cluster", use_gpu=True), "are not the workers' GPUs"),
    "own Ray": ("sweep", lambda m: _set_config(m, "cluster", address=None), "a Ray of its own"),
    "cache elsewhere": ("sweep", lambda m: _set_config(m, "tune", prefix_cache_dir=None), "not on a volume of the pod's own"),
    "cache in the store": ("sweep-file", lambda m: _set_config(m, "tune", prefix_cache_dir="/mnt/store"), "not on a volume"),
    "cache in memory": ("sweep", lambda m: _set_config(m, "tune", prefix_cache_dir="/dev/shm"), "not on a volume"),
    "no limit": ("sweep", lambda m: _set_config(m, "tune", prefix_cache_mib=None), "can outgrow its volume"),
    "large cache": ("sweep", lambda m: _set_config(m, "tune", prefix_cache_mib=40960), "can outgrow its volume"),
    "small volume": (
        "sweep",
        lambda m: group_of(m)["template"]["spec"]["volumes"][2]["emptyDir"].update(sizeLimit="20Gi"),
        "can outgrow its volume",
    ),
    "no space": ("sweep-file", lambda m: of_kind(m, "ConfigMap")["data"].pop("space.yaml"), "space is not beside"),
    "space elsewhere": (
        "sweep-file",
        lambda m: job_of(m).update(entrypoint=job_of(m)["entrypoint"].replace("/etc/medtl/space", "/tmp/space")),
        "space is not beside",
    ),
    "test split": (
        "sweep",
        lambda m: job_of(m).update(entrypoint=job_of(m)["entrypoint"] + " --then train --test"),
        "opens the test split",
    ),
    "no resume": (
        "sweep",
        lambda m: job_of(m).update(entrypoint=job_of(m)["entrypoint"].replace(" --resume", "")),
        "does not resume by run name",
    ),
    "another's folder": (
        "sweep",
        lambda m: job_of(m).update(entrypoint=job_of(m)["entrypoint"].replace("runs/sweep-1", "runs/sweep-2")),
        "does not resume by run name",
    ),
    "no retry": ("sweep", lambda m: job_of(m).update(backoffLimit=0), "backoffLimit is not set"),
}  # fmt: skip


@pytest.mark.parametrize("what", SEEDED)
def test_a_seeded_error_of_each_kind_is_caught(what: str) -> None:
    name, break_it, message = SEEDED[what]
    manifests = rendered(name)
    break_it(manifests)
    assert any(message in fault for fault in faults(manifests)), faults(manifests)
