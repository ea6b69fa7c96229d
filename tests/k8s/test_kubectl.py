"""Every overlay through kubectl's own kustomize: the same manifests as our reader's, valid and within our rules."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from k8s_kustomize import build
from k8s_policy import faults
from k8s_schema import CRDS, manifest_errors

from cluster.manifests import Target, render, to_yaml
from cluster.placement import Store
from cluster.sizing import gpu_shape
from medtl_dist.config import load_config

K8S = Path(__file__).parents[2] / "k8s"
PLACES = [
    *sorted(str(path.parent.relative_to(K8S)) for path in K8S.glob("overlays/*/kustomization.yaml")),
    "interactive",
    "tune",
]


def kustomize(folder: Path) -> list[dict[str, Any]]:
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def by_name(manifests: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {f"{m['kind']} {m['metadata']['name']}": m for m in manifests}


@pytest.mark.parametrize("place", PLACES)
def test_kubectl_builds_what_our_reader_builds(place: str) -> None:
    built = kustomize(K8S / place)
    assert by_name(built) == by_name(build(K8S / place))
    assert faults(built) == []
    if (CRDS / "ray.io_rayjobs.yaml").exists():
        assert [error for manifest in built for error in manifest_errors(manifest)] == []


def test_an_image_is_set_by_kustomize_in_every_pod(tmp_path: Path) -> None:
    """As docs/kubernetes.md says: kustomize finds `image` in a RayJob too."""
    image = {
        "name": "registry.example.org/medtl",
        "newName": "ghcr.example.org/me/medtl",
        "digest": "sha256:" + "a" * 64,
    }
    (tmp_path / "mine").mkdir()
    subprocess.run(["cp", "-r", str(K8S), str(tmp_path / "k8s")], check=True)
    spec = {"resources": ["../k8s/overlays/gpu-spot-elastic"], "images": [image]}
    (tmp_path / "mine/kustomization.yaml").write_text(yaml.safe_dump(spec), encoding="utf-8")
    text = str(kustomize(tmp_path / "mine"))
    assert text.count(f"ghcr.example.org/me/medtl@{image['digest']}") == 3
    assert "registry.example.org" not in text


def test_kubectl_reads_our_yaml_as_we_meant_it(tmp_path: Path) -> None:
    """Names and annotations that YAML 1.1 and 1.2 read differently, through kubectl's parser."""
    shape = gpu_shape(gpus=1, gpus_per_worker=1, min_gpus=None, global_batch_size=8, image_size_px=32)
    strange = {
        "example.org/a": "1e3",
        "example.org/b": "0o17",
        "example.org/c": "yes",
        "example.org/d": "1_000",
        "example.org/e": "1:30",
    }
    target = Target("y", "medtl@sha256:" + "1" * 64, shape, Store("s3://bucket"), namespace="1e3", identity=strange)
    manifests = render(load_config(preset="smoke", overrides=["data.shards=null: # x"]), target)
    (tmp_path / "all.yaml").write_text(to_yaml(manifests), encoding="utf-8")
    (tmp_path / "kustomization.yaml").write_text("resources: [all.yaml]\n", encoding="utf-8")
    assert by_name(kustomize(tmp_path)) == by_name(manifests)
