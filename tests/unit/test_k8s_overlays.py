"""k8s/: each overlay is what the renderer makes of the same choices, valid, within our rules, and its command runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from k8s_kustomize import apply_step, build
from k8s_policy import faults
from k8s_schema import manifest_errors, needs_crds
from k8s_targets import CHAIN, COMPARED
from shard_sets import write_set
from typer.testing import CliRunner

from cluster.manifests import Target, config_for, render, to_yaml
from cluster.placement import Store
from cluster.sizing import Shape, cpu_shape, gpu_shape
from cluster.trainings import training_shape
from medtl_dist.cli.main import app
from medtl_dist.config import Config, load_config, parse_yaml, validate

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
IMAGE = "registry.example.org/medtl@sha256:" + "0" * 64
S3 = Store("s3://my-bucket/medtl")
SPOT = ("karpenter.sh/capacity-type", "spot")


def gpus(least: int | None = None) -> Shape:
    return gpu_shape(gpus=8, gpus_per_worker=4, min_gpus=least, global_batch_size=64, image_size_px=224)


# What `medtl k8s render` would be asked for.
TARGETS = {
    "cpu-smoke": Target("medtl-train", IMAGE, cpu_shape(workers=2, cpus_per_worker=2), S3),
    "gpu": Target("medtl-train", IMAGE, gpus(), S3),
    "gpu-spot-elastic": Target("medtl-train", IMAGE, gpus(0), S3, spot=SPOT),
    "kueue": Target("medtl-train", IMAGE, gpus(), S3, queue="training"),
    "s3": Target("medtl-train", IMAGE, gpus(), S3, credentials_secret="medtl-s3"),
    "pvc": Target("medtl-train", IMAGE, gpus(), Store("/mnt/store", "medtl-store")),
}


def by_name(manifests: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {f"{m['kind']} {m['metadata']['name']}": m for m in manifests}


def shipped(manifests: list[dict[str, Any]]) -> Config:
    """The config in a ConfigMap, which is taken out: its text may differ from the renderer's, which is complete."""
    (text,) = [m["data"].pop("config.yaml") for m in manifests if m["kind"] == "ConfigMap"]
    return validate(parse_yaml(text, "ConfigMap"))


def test_there_is_an_overlay_of_each_name() -> None:
    assert {entry.name for entry in (K8S / "overlays").iterdir()} == set(TARGETS)


@pytest.mark.parametrize("name", TARGETS)
def test_an_overlay_is_what_the_renderer_makes_of_the_same_choices(name: str) -> None:
    built, target = build(K8S / "overlays" / name), TARGETS[name]
    config = shipped(built)
    rendered = render(config, target)
    assert shipped(rendered) == config == config_for(config, target)
    assert by_name(built) == by_name(rendered)


@needs_crds
@pytest.mark.parametrize("place", [*(f"overlays/{name}" for name in TARGETS), "interactive"])
def test_an_overlay_passes_the_schemas_strictly(place: str) -> None:
    assert [error for manifest in build(K8S / place) for error in manifest_errors(manifest)] == []


@pytest.mark.parametrize("place", [*(f"overlays/{name}" for name in TARGETS), "interactive"])
def test_an_overlay_keeps_our_rules(place: str) -> None:
    assert faults(build(K8S / place)) == []


def test_the_files_that_overlays_build_on_are_the_renderers_own() -> None:
    """Where this fails: `make k8s-files`, and look at the difference. The commands are the Makefile's."""
    lines = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    commands = [line.split() for line in lines if "$(BIN)/medtl k8s render" in line]
    assert {command[-1] for command in commands} == {
        f"k8s/{file.relative_to(K8S)}" for file in K8S.rglob("manifests.yaml")
    }
    for command in commands:
        arguments, (_, file) = command[1 : command.index(">")], command[command.index(">") :]
        arguments = [IMAGE if word == "$(K8S_IMAGE)" else word for word in arguments]
        arguments = [str(ROOT / word) if word.startswith("k8s/") else word for word in arguments]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
        assert done.stdout == (ROOT / file).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", TARGETS)
def test_an_overlays_command_runs(name: str, tmp_path: Path) -> None:
    """The entrypoint, as a shell on the head reads it, with --dry-run; its config is where the head has it mounted."""
    built = build(K8S / "overlays" / name)
    assert_entrypoint_runs(built, tmp_path)


def test_a_renderings_command_runs(tmp_path: Path) -> None:
    config = load_config(preset="resnet101", overrides=["data.shards=sets/x"])
    target = Target("xrays-1", IMAGE, gpus(), S3)
    assert_entrypoint_runs(list(yaml.safe_load_all(to_yaml(render(config, target, open_test=True)))), tmp_path)


@pytest.mark.parametrize("config", [CHAIN, COMPARED], ids=["chain", "comparison"])
def test_a_chains_command_runs(config: Config, tmp_path: Path) -> None:
    target = Target("chain-1", IMAGE, training_shape(config, gpus=8, gpus_per_worker=4, min_gpus=None), S3)
    assert_entrypoint_runs(list(yaml.safe_load_all(to_yaml(render(config, target, open_test=True)))), tmp_path)


def test_a_doctors_command_runs(tmp_path: Path) -> None:
    """As the head's shell reads it, but for --nodes: one machine, with a set and a store of its own in place of the pods'."""
    dataset = write_set(tmp_path / "sets/x", {"train": [11, 9, 6], "val": [9, 5]})
    target = Target("xrays-1", IMAGE, cpu_shape(workers=2, cpus_per_worker=1), Store("/mnt/store", "c"), kind="doctor")
    config = load_config(preset="smoke", overrides=["data.shards=sets/x"])
    manifests = list(yaml.safe_load_all(to_yaml(render(config, target))))
    placed, line = as_on_the_head(manifests, tmp_path)
    (tmp_path / "config.yaml").write_text(placed.replace("/mnt/store/sets/x", str(dataset.folder)), encoding="utf-8")
    line = line.replace(" --nodes", "").replace("/mnt/store", str(tmp_path)) + " --json"
    done = shell(line, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    states = {row["check"]: row["state"] for row in json.loads(done.stdout)["findings"]}
    assert states["storage"] == states["shards"] == states["one step"] == states["versions"] == "ok"


def as_on_the_head(manifests: list[dict[str, Any]], tmp_path: Path) -> tuple[str, str]:
    """The config and the entrypoint of a job, with ``tmp_path`` for the folders that the head has."""
    (config_map,) = [m for m in manifests if m["kind"] == "ConfigMap"]
    (job,) = [m for m in manifests if m["kind"] == "RayJob"]
    for file, text in config_map["data"].items():
        (tmp_path / file).write_text(text, encoding="utf-8")
    (tmp_path / "medtl").write_text(
        f'#!/bin/sh\nexec "{sys.executable}" -m medtl_dist.cli.main "$@"\n', encoding="utf-8"
    )
    (tmp_path / "medtl").chmod(0o755)
    line = job["spec"]["entrypoint"]
    assert line.count("/etc/medtl/") == len(config_map["data"])
    return config_map["data"]["config.yaml"], line.replace("/etc/medtl/", f"{tmp_path}/")


def shell(line: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    return subprocess.run(["sh", "-c", line], env=path, cwd=tmp_path, capture_output=True, text=True, check=False)


def assert_entrypoint_runs(manifests: list[dict[str, Any]], tmp_path: Path) -> None:
    placed, line = as_on_the_head(manifests, tmp_path)
    done = shell(line + " --dry-run", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    expected = validate(parse_yaml(placed, "ConfigMap"))
    assert validate(parse_yaml(done.stdout, "output")) == expected
    assert {entry.name for entry in tmp_path.iterdir()} == {"config.yaml", "medtl"}  # nothing was written


@pytest.mark.parametrize(
    ("step", "error"),
    [
        ({"op": "replace", "path": "/spec/sus", "value": 1}, AssertionError),
        ({"op": "add", "path": "/sp/suspend", "value": 1}, KeyError),
        ({"op": "add", "path": "/spec/list/2", "value": 1}, AssertionError),
        ({"op": "replace", "path": "/spec/list/1", "value": 1}, AssertionError),
        ({"op": "remove", "path": "/spec/suspend"}, AssertionError),
    ],
)
def test_a_patch_of_what_is_not_there_is_an_error(step: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        apply_step({"spec": {"suspend": False, "list": [0]}}, step)
