"""k8s/tune: what the renderer makes of the same choices, alone and with each component, valid, and its command runs."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from k8s_kustomize import build
from k8s_policy import faults
from k8s_schema import manifest_errors, needs_crds
from k8s_targets import CPU, FILE, IMAGE, PVC, SINGLE
from shard_sets import write_set
from test_k8s_overlays import K8S, as_on_the_head, by_name, shell, shipped

from cluster.manifests import Target, config_for, render, to_yaml
from cluster.placement import Store
from cluster.sweep_pods import read_space
from medtl_dist.cli.main import run
from medtl_dist.config import load_config
from tune_spaces.space import load_space

ZEROS = "registry.example.org/medtl@sha256:" + "0" * 64
ELASTIC = dataclasses.replace(SINGLE, min_pods=0)
SHIPPED = dataclasses.replace(
    FILE, text=(K8S / "tune/space.yaml").read_text(encoding="utf-8"), space=load_space(str(K8S / "tune/space.yaml"))
)
TUNE = Target("medtl-tune", ZEROS, SINGLE, Store("s3://my-bucket/medtl"), kind="tune", space=SHIPPED)
WITH = {
    None: TUNE,
    "s3": dataclasses.replace(TUNE, credentials_secret="medtl-s3"),
    "kueue": dataclasses.replace(TUNE, queue="training"),
    "spot-elastic": dataclasses.replace(TUNE, shape=ELASTIC, spot=("karpenter.sh/capacity-type", "spot")),
}


def built(component: str | None) -> list[dict[str, Any]]:
    manifests = build(K8S / "tune")
    return manifests if component is None else build(K8S / "components" / component, manifests)


@pytest.mark.parametrize("component", WITH)
def test_the_folder_is_what_the_renderer_makes_of_the_same_choices(component: str | None) -> None:
    made, target = built(component), WITH[component]
    assert faults(made) == []
    config = shipped(made)
    manifests = render(config, target)
    assert shipped(manifests) == config == config_for(config, target)
    assert by_name(made) == by_name(manifests)


@needs_crds
@pytest.mark.parametrize("component", WITH)
def test_the_folder_passes_the_schemas_strictly(component: str | None) -> None:
    assert [error for manifest in built(component) for error in manifest_errors(manifest)] == []


def test_the_folders_config_and_space_are_those_that_are_packaged() -> None:
    config = shipped(built(None))
    preset = load_config(preset="resnet101").model_dump(mode="json")
    differing = {s for s, keys in config.model_dump(mode="json").items() if keys != preset[s]}
    assert differing <= {"data", "train", "tune", "cluster"}
    assert SHIPPED.space.to_yaml() == load_space("resnet101").to_yaml()


def test_the_folders_command_runs(tmp_path: Path) -> None:
    """As the head's shell reads it, with --dry-run: the space is read, trials are drawn, checked on a set and timed. A small
    network on tiny images stands in for ResNet101, and a set of this machine's for the store's."""
    dataset = write_set(tmp_path / "set", {"train": [11, 9, 6], "val": [9, 5]})
    text, line = as_on_the_head(built(None), tmp_path)
    tree = yaml.safe_load(text)
    tree["data"] |= {"shards": str(dataset.folder), "image_size_px": 32, "global_batch_size": 8, "loader_workers": 0}
    tree["model"] |= {"backbone": "resnet18", "weights": "random"}
    tree["tune"]["num_trials"] = 3  # each frozen depth among them is timed
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    done = shell(f"{line} --dry-run --json", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    plan = json.loads(done.stdout)
    assert plan["resources"] == {"workers": 1, "cpus": 3.0, "gpus": 1.0}
    assert plan["concurrency"] is None  # the job's own cluster is not asked
    assert len(plan["trials"]) == 3
    assert {"model.frozen_depth", "optim.lr"} <= {key for trial in plan["trials"] for key in trial["overrides"]}
    assert {entry.name for entry in tmp_path.iterdir()} == {"config.yaml", "space.yaml", "medtl", "set"}


def test_a_renderings_command_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a packaged space, in this process; Optuna draws while the sweep runs, so nothing is timed and no set is opened."""
    config = load_config(preset="smoke", overrides=["data.shards=sets/x", "tune.searcher=optuna"])
    target = Target("sweep-1", IMAGE, CPU, PVC, kind="tune", space=read_space("smoke", config))
    _, line = as_on_the_head(list(yaml.safe_load_all(to_yaml(render(config, target)))), tmp_path)
    words = shlex.split(line)
    assert run([*words[1:], "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["resources"], plan["trials"]) == ({"workers": 1, "cpus": 2.0, "gpus": 0.0}, [])
    assert run([*words[1:-1], "smok", "--dry-run"]) == 2
    assert "unknown space 'smok'" in capsys.readouterr().err
